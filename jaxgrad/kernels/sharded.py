"""A fused head on the arrays of a mesh: which device holds what, and what moves between them.

Tokens are cut over some mesh axes, classes over others, and each device runs the head on its tokens
and its classes. Over the axes of the classes, each tile of tokens takes one maximum and one sum of
a few numbers a token; x̄ is summed once a call. Over the axes of the tokens, w̄ is summed once a
call; an axis that the features of w are cut over (FSDP) collects w instead, a tile of classes at a
time or at once, and w̄ is summed to the device that holds its part. Neither w nor anything of
tokens × classes is ever sent besides. All sums are of float32 or wider, as they are written here;
XLA for TPU does an all-reduce in bfloat16 where its sum is rounded to that, a reduce-scatter not.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

from jaxgrad import numerics, sharding
from jaxgrad.kernels.linear_labels import SparseLabels
from jaxgrad.sharding import AxisName


def sharded(
    fn: Callable[..., Any],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    *,
    batch_axes: AxisName = None,
    sequence_axes: AxisName = None,
    vocab_axis_name: AxisName = None,
    fsdp_axis: AxisName = None,
    gather_once: bool = False,
) -> Callable[..., Any]:
    """``linear_softmax_cross_entropy`` or ``linear_log_probs`` on the arrays of a mesh.

    Arguments and results are whole arrays, as on one device, in any sharding; a mean is over all
    tokens. Any of the axes may be left out, and each may be a tuple of mesh axes.

    Args:
      fn: The head, a function of the arguments of those two.
      mesh: Of Auto or Explicit axes; None for that of ``jax.set_mesh``.
      batch_axes: What the first axis of the tokens is cut over.
      sequence_axes: What the second axis of the tokens is cut over.
      vocab_axis_name: What the classes are cut over.
      fsdp_axis: What the features of w are cut over, among the axes that cut the tokens. A device
        collects all features of its classes, a tile of them at a time, in the forward and again in
        the backward.
      gather_once: Whether to collect them all at once instead, for the length of a call: with a
        reduction, one product less and half of what is collected, for the memory of w.

    Returns:
      A function of the arguments of ``fn``, but for ``axis_name``; call it under ``jax.jit``.

    Raises:
      ValueError: ``fsdp_axis`` cuts no tokens, or ``gather_once`` is set without it. In a call:
        there is no mesh or it lacks an axis, or the shards of an axis do not divide what it cuts.

    Example:
      >>> from jaxgrad import linear_softmax_cross_entropy
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> head = sharded(
      ...     linear_softmax_cross_entropy, mesh, batch_axes="data", vocab_axis_name="model"
      ... )
      >>> x, w, labels = jnp.ones((2, 4)), jnp.zeros((4, 10)), jnp.array([1, 2])
      >>> jax.jit(lambda *args: head(*args, reduction="mean"))(x, w, labels).round(4)
      Array(2.3026, dtype=float32)

    Where the tokens and classes at hand are a device's own, inside of ``shard_map``, call ``fn``
    itself with ``axis_name``.

    Source: Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053, section 3; Zhao et al., "PyTorch
    FSDP", 2023, arXiv:2304.11277.
    """
    cuts = Cuts(batch_axes, sequence_axes, vocab_axis_name, fsdp_axis, gather_once)
    of = getattr(fn, "__name__", "sharded")
    if not set(sharding.names(fsdp_axis)) <= set(cuts.tokens):
        raise ValueError(
            f"sharded: fsdp_axis must be among the axes that cut the tokens, {cuts.tokens}, "
            f"got {fsdp_axis!r}"
        )
    if gather_once and fsdp_axis is None:
        raise ValueError("sharded: gather_once needs fsdp_axis, got None")
    order = tuple(inspect.signature(fn).parameters)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        given = dict(zip(order, args, strict=False)) | kwargs
        over = _mesh(mesh, cuts)
        arrays = {
            name: z if isinstance(z, SparseLabels) else jnp.asarray(z)
            for name, z in given.items()
            if (name in ARRAYS and z is not None) or isinstance(z, jax.Array)
        }
        options = {name: z for name, z in given.items() if name not in arrays}
        specs = cuts.specs(of, arrays, given.get("vocab_axis", -1))
        _check_sizes(of, arrays, specs, over)
        arrays = jax.tree.map(functools.partial(_placed, over), arrays, specs)
        tokens = P(*specs["x"][:-1])
        if given.get("reduction") is None:
            out_specs = tokens
        else:
            out_specs = (P(), tokens) if given.get("return_aux") else P()
        body = functools.partial(_on_device, fn, cuts, options)
        return jax.shard_map(body, mesh=over, in_specs=(specs,), out_specs=out_specs)(arrays)

    return call


ARRAYS = ("x", "w", "labels", "bias", "where", "weights")


class Cuts(NamedTuple):
    """The mesh axes that each axis of the arguments is cut over."""

    batch: AxisName
    sequence: AxisName
    classes: AxisName
    features: AxisName
    gather_once: bool

    @property
    def tokens(self) -> tuple[Any, ...]:
        """The mesh axes that the tokens are cut over."""
        return (*sharding.names(self.batch), *sharding.names(self.sequence))

    def specs(self, of: str, arrays: dict[str, Any], vocab_axis: int) -> dict[str, Any]:
        """How each argument is cut."""
        x, labels = arrays["x"], arrays["labels"]
        lead = x.ndim - 1
        if lead < (1 if self.sequence is None else 2):
            raise ValueError(
                f"{of}: x must be float[batch, ..., d], and float[batch, sequence, ..., d] for "
                f"sequence_axes, got {numerics.describe(x)}"
            )
        tokens = (self.batch, self.sequence, *[None] * lead)[:lead]
        w = (self.features, self.classes)
        rows = tokens if "where" in arrays and arrays["where"].ndim > 1 else ()
        specs: dict[str, Any] = dict.fromkeys(arrays, P()) | {
            "x": P(*tokens, None),
            "w": P(*(w if vocab_axis % 2 else reversed(w))),
            "bias": P(self.classes),
            "weights": P(*tokens),
            "where": P(*rows, self.classes),
            "labels": P(*tokens),
        }
        if isinstance(labels, SparseLabels):
            specs["labels"] = SparseLabels(P(*tokens, None), P(*tokens, None))
        elif jnp.issubdtype(labels.dtype, jnp.floating):
            specs["labels"] = P(*tokens, self.classes)
        return {name: specs[name] for name in arrays}


def _on_device(fn, cuts, options, arrays):
    """What one device computes of a call."""
    reduction = options.get("reduction")
    if cuts.gather_once:
        features = 1 - options.get("vocab_axis", -1) % 2
        arrays = arrays | {"w": sharding.collect(arrays["w"], cuts.features, features)}
    elif cuts.features is not None:
        options = options | {"fsdp_axis": cuts.features}
    if reduction is None:
        return fn(**arrays, **options, axis_name=cuts.classes)
    options = options | {"reduction": "sum" if reduction == "mean" else reduction}
    out = fn(**arrays, **options, axis_name=cuts.classes)
    loss, *aux = out if isinstance(out, tuple) else (out,)
    loss = lax.psum(loss, cuts.tokens)
    if reduction == "mean":
        count = _weights(arrays, options.get("ignore_index")).sum(dtype=loss.dtype)
        loss *= numerics.safe_divide(1, lax.psum(count, cuts.tokens))
    return (loss, *aux) if aux else loss


def _weights(arrays, ignore_index):
    """The weight of each token of this device in a mean."""
    x, labels = arrays["x"], arrays["labels"]
    weights = arrays.get("weights", jnp.ones_like(x, shape=x.shape[:-1]))
    if ignore_index is None:
        return weights
    ignored = labels == ignore_index
    if isinstance(labels, SparseLabels):
        ignored = (labels.indices == ignore_index).all(-1)
    return jnp.where(ignored, 0, weights)


def _mesh(mesh, cuts):
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    named = (*cuts.tokens, *sharding.names(cuts.classes))
    if not set(named) <= set(mesh.axis_names):
        raise ValueError(
            f"sharded: mesh must have the axes {named}, got {mesh.axis_names or 'none'}; "
            "give a mesh, or set one by jax.set_mesh"
        )
    return mesh


def _check_sizes(of, arrays, specs, mesh):
    for name, tree in arrays.items():
        for z, spec in zip(*map(jax.tree.leaves, (tree, specs[name])), strict=True):
            for axis, cut in enumerate(spec):
                shards = math.prod(mesh.shape[a] for a in sharding.names(cut))
                if z.shape[axis] % shards:
                    raise ValueError(
                        f"{of}: axis {axis} of {name} must be a multiple of the {shards} shards of "
                        f"{cut!r}, got {numerics.describe(z)}; pad it: tokens with ignore_index, "
                        "classes with where, features with 0 in x and w"
                    )


def _placed(mesh, z, spec):
    """``z`` cut as ``spec`` says over axes whose sharding is part of a type."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    if not explicit:
        return z
    kept = (tuple(a for a in sharding.names(cut) if a in explicit) or None for cut in spec)
    return jax.sharding.reshard(z, NamedSharding(mesh, P(*kept)))
