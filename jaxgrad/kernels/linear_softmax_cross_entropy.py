r"""Linear layer, soft-max and cross-entropy in one: the logits never exist as a whole.

    x_ij = ⟨h_i, w_j⟩ + b_j         l_i = cross-entropy of x_i           i ≤ t, j ≤ v     (1)

x is far larger than all else, t × v against t × d and d × v. So it is made a tile at a time, by
tokens and by classes, and the sums over a row are merged as tiles come by (``row_rule.merge``).
The gradients are products with x̄, and x̄ is a function of x and of those sums, tile by tile too:

    h̄_i = Σ_j x̄_ij w_j             w̄_j = Σ_i x̄_ij h_i           b̄_j = Σ_i x̄_ij           (2)

``linear_tile.py`` types (1) and (2) for one tile, ``linear_schedules.py`` the order of the tiles.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxgrad import backends, modes, sharding
from jaxgrad.kernels import (
    linear_arguments,
    linear_fsdp,
    linear_pallas,
    linear_rows,
    linear_schedules,
    linear_tangents,
    linear_tile,
)
from jaxgrad.kernels.linear_labels import SparseLabels
from jaxgrad.kernels.loss_options import make_rule, mean_weights
from jaxgrad.modes import Mode


class Aux(NamedTuple):
    """What the loss knows of each token besides: ``float[...]``, and 0 for one that is ignored."""

    lse: Array  # log Σ exp of the logits, soft-cap and temperature applied
    z_loss: Array  # z_loss · lse², which the loss contains
    entropy: Array  # of the predicted distribution, in nats
    argmax: Array  # the class predicted, int32[...]


@modes.public
def linear_softmax_cross_entropy(
    mode: Mode,
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike | SparseLabels,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Literal["sum", "mean"] | None = None,
    return_aux: bool = False,
    vocab_axis: int = -1,
    chunk_size: int | tuple[int, int] | None = None,
    accumulate_dtype: Any = jnp.float32,
    precision: Any = None,
    axis_name: sharding.AxisName = None,
    fsdp_axis: sharding.AxisName = None,
    implementation: backends.Implementation | None = None,
) -> Array | tuple[Array, Aux]:
    r"""Cross-entropy of ``softmax(x @ w + bias)``, without ever holding the logits.

    With z = cap(x w + b) / temperature over the valid classes, and targets q, smoothed labels:

      loss = (Σ q) lse(z) - ⟨q, z⟩ + z_loss · lse(z)²

    It costs one matrix product without a gradient. With one:

    ==============  ========  ====================================================================
    reduction       products  memory beyond the gradients
    ==============  ========  ====================================================================
    "sum", "mean"   3         float32 sums of w̄ and x̄, and some tokens × all classes of logits
    None            4         float32 sums of w̄ and x̄, and a tile of logits; any cotangent
    ==============  ========  ====================================================================

    On a GPU all go the way of None, as fast there and with less memory. A product is skipped where
    x or w is not differentiated. The float32 sums are the gradients
    themselves where x and w are float32. To reduce with the least memory take ``reduction=None``
    and sum. Gradients of gradients work at the same kind of memory.

    Args:
      x: Features, ``float[..., d]``.
      w: Weights, ``float[d, v]``, or ``float[v, d]`` with ``vocab_axis=0``, a tied embedding say;
        neither is transposed or widened as a whole.
      labels: ``int[...]``, or ``float[..., v]``, or ``SparseLabels`` of ``[..., k]``. A token with
        an index out of range has loss NaN and NaN in its own row of x̄, and adds nothing to
        the other gradients.
      bias: ``float[v]``, or None.
      where: The valid classes, ``bool[v]`` or ``bool[..., v]``. A token without any has loss 0; an
        integer label that is not valid gives +inf, with a finite gradient.
      weights: A factor for each token's loss, ``float[...]``. To leave a token out for good, even
        if its row holds NaN, give it ``ignore_index``.
      label_smoothing: ε: labels t become (1 - ε) t + ε (Σ t) / (valid classes).
      z_loss: Factor of lse², which keeps the normaliser near 1.
      temperature: Divides the logits, after the soft-cap.
      logit_soft_cap: c of c · tanh(logits / c); None: no cap.
      ignore_index: Label of tokens that count for nothing, loss 0 and gradient 0; an entry of
        ``SparseLabels`` with this index is left out, and the token if all its entries are.
      reduction: None for ``float[...]``; "sum": Σ wᵢ lᵢ; "mean": Σ wᵢ lᵢ / Σ wᵢ over tokens not
        ignored, and 0 if their weights sum to 0. NaN if any of these losses is.
      return_aux: Whether to return ``Aux(lse, z_loss, entropy, argmax)`` per token too. It has a
        gradient where ``reduction`` is None (argmax never).
      vocab_axis: The axis of ``w`` that counts classes.
      chunk_size: Tokens of a tile, or (tokens, classes); None: chosen to fit a cache and a byte
        budget (``jaxgrad/tiling.py``). The result is the same.
      accumulate_dtype: In which x̄, w̄ and b̄ are summed over tiles; float64 input: always float64.
      precision: Of the matrix products, as in ``jax.lax.dot_general``.
      axis_name: A mesh axis of the ``shard_map`` around the call, or the axis of a ``vmap``,
        that classes are cut over: w, bias, where and dense labels hold this shard's classes, as
        many as any other's, and all else is the same on all shards, indices counting all classes.
      fsdp_axis: A mesh axis of the ``shard_map`` around the call that the features of w are cut
        over, as are tokens: w holds this shard's features, ``[d / shards, v]``. They are collected
        a tile of classes at a time, forward and backward, and w̄ is summed to the shard that holds
        its part. With a reduction too the memory is that of None.
      implementation: None to choose (today "xla" on every device), or by name: "xla"; "pallas_tpu"
        or "pallas_gpu", kernels for these devices; "pallas_interpret" or "pallas_gpu_interpret",
        the same on any device, slowly. The Pallas kernels take integer labels and no ``where``, and
        have no second derivative. What is named runs, or an error tells why it cannot.

    Returns:
      The loss, float32 for 16-bit input; or ``(loss, aux)``.

    Raises:
      TypeError: An argument is not of the kind asked for.
      ValueError: Shapes do not fit, or an option is out of range.
      NotImplementedError: ``implementation`` cannot run this call.

    Example:
      >>> x, w = jnp.eye(3, 4), jnp.eye(4, 5) * 9
      >>> labels = jnp.array([0, 1, -100])
      >>> linear_softmax_cross_entropy(x, w, labels, ignore_index=-100, reduction="mean").round(5)
      Array(0.00049, dtype=float32)
      >>> loss, aux = linear_softmax_cross_entropy(x, w, labels, ignore_index=-100, return_aux=True)
      >>> (aux.argmax == labels).sum()
      Array(2, dtype=int32)

    Where the logits exist already, or v is small, use ``softmax_cross_entropy``; for
    log-probabilities, in reinforcement learning say, ``linear_log_probs``.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al.,
    "Liger Kernel", 2024.
    """
    of = "linear_softmax_cross_entropy"
    if reduction not in (None, "sum", "mean"):
        raise ValueError(f'{of}: reduction must be None, "sum" or "mean", got {reduction!r}')
    rule = make_rule(of, label_smoothing, z_loss, temperature, logit_soft_cap)
    return _jit(
        mode,
        of,
        x,
        w,
        labels,
        bias,
        where,
        rule,
        weights,
        ignore_index=ignore_index,
        reduction=reduction,
        return_aux=return_aux,
        vocab_axis=vocab_axis,
        chunk_size=chunk_size,
        accumulate_dtype=jnp.dtype(accumulate_dtype),
        precision=precision,
        axis_name=axis_name,
        fsdp_axis=fsdp_axis,
        implementation=implementation,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "mode",
        "of",
        "ignore_index",
        "reduction",
        "return_aux",
        "vocab_axis",
        "chunk_size",
        "accumulate_dtype",
        "precision",
        "axis_name",
        "fsdp_axis",
        "implementation",
    ),
)
def _jit(
    mode,
    of,
    x,
    w,
    labels,
    bias,
    where,
    rule,
    weights,
    *,
    ignore_index,
    reduction,
    return_aux,
    vocab_axis,
    chunk_size,
    accumulate_dtype,
    precision,
    axis_name,
    fsdp_axis,
    implementation,
):
    plan, head, tokens, rule, lead = linear_arguments.arguments(
        of,
        x,
        w,
        labels,
        bias,
        where,
        rule,
        ignore_index,
        vocab_axis,
        chunk_size,
        reduction is not None,
        accumulate_dtype,
        precision,
        axis_name,
        fsdp_axis,
    )
    plan = plan._replace(entropy=return_aux, argmax=return_aux, gauss_newton=mode == "gauss_newton")
    plan = linear_pallas.implemented(of, plan, head, tokens, mode, implementation, chunk_size)
    if mode == "forward":
        plan, head = linear_fsdp.whole(plan, head)
    schedules = modes.of(mode, linear_schedules, linear_tangents)
    weights = None if weights is None else linear_arguments.as_weights(of, weights, lead, plan)
    if reduction is None:
        rows: Any = schedules.per_token(plan, head, tokens, rule)
        loss = rows.loss if weights is None else weights * rows.loss
        loss = loss.reshape(lead)
    else:
        scale = jnp.ones((len(tokens.x), 1), plan.wide) if weights is None else weights
        ignored, _ = linear_tile.row_state(plan, tokens.labels)
        scale = scale if ignored is None else jnp.where(ignored, 0, scale)
        scale = mean_weights(scale) if reduction == "mean" else scale
        scale = sharding.lift_rows(scale, (head, tokens, rule), axis_name)
        if plan.keeps_logits:
            loss, rows = schedules.total(plan, head, tokens, rule, scale)
        else:
            rows = schedules.per_token(plan, head, tokens, rule)
            loss = (scale * rows.loss).sum()
        rows = linear_rows.Rows(*map(lax.stop_gradient, rows))
    if not return_aux:
        return loss
    zl = jnp.zeros_like(rows.lse) if rule.z_loss is None else rule.z_loss * rows.lse**2
    return loss, Aux(*(z.reshape(lead) for z in (rows.lse, zl, rows.entropy, rows.argmax)))
