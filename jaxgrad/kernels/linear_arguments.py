"""The arguments of the fused head, checked and brought to the shapes that its loops take."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxgrad import backends, numerics, sharding, tiling
from jaxgrad.kernels.linear_labels import Labels, SparseLabels, index_state
from jaxgrad.kernels.linear_tile import Head, Plan, Tokens
from jaxgrad.kernels.loss_options import as_scalars, lifted
from jaxgrad.kernels.row_rule import Rule


def arguments(
    of: str,
    x: Any,
    w: Any,
    labels: Any,
    bias: Any,
    where: Any,
    rule: Rule,
    ignore_index: int | None,
    vocab_axis: int,
    chunk_size: Any,
    reduces: bool,
    accumulate_dtype: Any,
    precision: Any,
    axis_name: sharding.AxisName,
    fsdp_axis: sharding.AxisName = None,
) -> tuple[Plan, Head, Tokens, Rule, tuple[int, ...]]:
    """The arguments of a call, checked, leading dimensions flattened; and those dimensions."""
    x, w = numerics.as_float(x, of), numerics.as_float(w, of, "w")
    if w.ndim != 2 or vocab_axis not in (-2, -1, 0, 1):
        raise ValueError(
            f"{of}: w must be [d, v], or [v, d] with vocab_axis=0, got "
            f"{numerics.describe(w)} with vocab_axis={vocab_axis}"
        )
    vocab_axis %= 2
    sharding.check(of, fsdp_axis, cut={"w": w, "x": x}, argument="fsdp_axis")
    d, v = sharding.extent(fsdp_axis, w.shape[1 - vocab_axis])[1], w.shape[vocab_axis]
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(
            f"{of}: x must be float[..., {d}] for w of {numerics.describe(w)} with "
            f"vocab_axis={vocab_axis}, got {numerics.describe(x)}"
        )
    dense = not isinstance(labels, SparseLabels) and jnp.issubdtype(
        jnp.result_type(labels), jnp.floating
    )
    sharding.check(
        of,
        axis_name,
        cut={"w": w, "bias": bias, "where": where} | ({"labels": labels} if dense else {}),
        whole={} if dense else {"labels": labels},
    )
    lead = x.shape[:-1]
    wide = max((numerics.widen(x).dtype, numerics.widen(w).dtype), key=lambda z: z.itemsize)
    if bias is not None:
        bias = numerics.as_float(bias, of, "bias")
        if bias.shape != (v,):
            raise ValueError(f"{of}: bias must be float[{v}], got {numerics.describe(bias)}")
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != bool or where.shape not in ((v,), (*lead, v)):
            raise ValueError(
                f"{of}: where must be bool[{v}] or bool{[*lead, v]}, got {numerics.describe(where)}"
            )
        where = where.reshape(-1, v)
    first, classes = sharding.extent(axis_name, v)
    labels = _as_labels(of, labels, lead, v, classes, ignore_index)
    accumulate = wide if wide.itemsize > 4 else jnp.dtype(accumulate_dtype)
    t, room = math.prod(lead), tiling.room(backends.platform())
    fits = room.keeps(t, v) if chunk_size is None else room.kept_bytes > 0
    keeps_logits = reduces and fsdp_axis is None and fits
    plan = Plan(
        v=v,
        vocab_axis=vocab_axis,
        ignores=ignore_index is not None,
        tile=_tile(of, t, v, keeps_logits, chunk_size, room),
        wide=wide,
        accumulate=accumulate,
        precision=precision,
        axis_name=axis_name,
        fsdp_axis=fsdp_axis,
        keeps_logits=keeps_logits,
    )
    first = None if axis_name is None else jnp.full((1, 1), first, jnp.int32)
    tokens = Tokens(x.reshape(t, d), labels, where, first)
    arrays = (Head(w, bias), tokens, as_scalars(rule, wide, of))
    return plan, *lifted(arrays, axis_name), lead


def as_weights(of: str, weights: Any, lead: tuple[int, ...], plan: Plan) -> Array:
    """``weights`` as [t, 1]."""
    weights = numerics.as_float(weights, of, "weights")
    if weights.shape != lead:
        raise ValueError(
            f"{of}: weights must be float{list(lead)}, one a token, "
            f"got {numerics.describe(weights)}"
        )
    sharding.check(of, plan.axis_name, cut={}, whole={"weights": weights})
    return weights.astype(plan.wide).reshape(-1, 1)


def _as_labels(
    of: str, labels: Any, lead: tuple[int, ...], v: int, classes: int, ignore: int | None
) -> Labels:
    if isinstance(labels, SparseLabels):
        indices = numerics.as_labels(labels.indices, of)
        probs = numerics.as_float(labels.probs, of, "labels.probs")
        if (
            indices.ndim != len(lead) + 1
            or indices.shape != probs.shape
            or indices.shape[:-1] != lead
        ):
            raise ValueError(
                f"{of}: labels must be SparseLabels of int{[*lead, 'k']} and float{[*lead, 'k']}, "
                f"got {numerics.describe(indices)} and {numerics.describe(probs)}"
            )
        shape = (math.prod(lead), indices.shape[-1])
        return SparseLabels(
            index_state(indices, classes, ignore).reshape(shape), probs.reshape(shape)
        )
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        if labels.shape != (*lead, v):
            raise ValueError(
                f"{of}: labels must be int{list(lead)} or float{[*lead, v]}, "
                f"got {numerics.describe(labels)}"
            )
        if ignore is not None:
            raise ValueError(
                f"{of}: ignore_index needs integer labels or SparseLabels, "
                f"got {numerics.describe(labels)}"
            )
        return labels.reshape(-1, v)
    labels = numerics.as_labels(labels, of)
    if labels.shape != lead:
        raise ValueError(
            f"{of}: labels must be int{list(lead)} or float{[*lead, v]}, "
            f"got {numerics.describe(labels)}"
        )
    return index_state(labels, classes, ignore).reshape(-1, 1)


def _tile(of, t, v, keeps_logits, chunk_size, room) -> tuple[int, int]:
    if chunk_size is None:
        return tiling.tile_sizes(t, v, keeps_logits, room)
    tokens, classes = chunk_size if isinstance(chunk_size, tuple) else (chunk_size, None)
    if tokens < 1 or (classes is not None and classes < 1):
        raise ValueError(f"{of}: chunk_size must be positive, got {chunk_size}")
    tokens = min(tokens, t)
    return tokens, tiling.class_tile(tokens, v, room) if classes is None else min(classes, v)
