r"""Log-probabilities of given labels under a linear soft-max head, the logits never formed.

    log p(y_i | h_i) = x_i,y - lse(x_i)            x_ij = ⟨h_i, w_j⟩ + b_j

It is the fused loss with its sign turned, plain: what policy gradients and preference losses weigh.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxgrad import backends, modes, numerics, sharding
from jaxgrad.kernels import (
    linear_arguments,
    linear_fsdp,
    linear_pallas,
    linear_schedules,
    linear_tangents,
)
from jaxgrad.kernels.loss_options import make_rule
from jaxgrad.modes import Mode


@modes.public
def linear_log_probs(
    mode: Mode,
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    ignore_index: int | None = None,
    vocab_axis: int = -1,
    chunk_size: int | tuple[int, int] | None = None,
    accumulate_dtype: Any = jnp.float32,
    precision: Any = None,
    axis_name: sharding.AxisName = None,
    fsdp_axis: sharding.AxisName = None,
    implementation: backends.Implementation | None = None,
    return_entropy: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Log-probability of each token's label: ``log softmax(x @ w + bias)[labels]``.

    Differentiable in x, w, bias, temperature and logit_soft_cap, for any cotangent. The backward
    computes the logits anew, tile by tile: four matrix products in all, one without a gradient.

    Args:
      x: Features, ``float[..., d]``.
      w: Weights, ``float[d, v]``, or ``float[v, d]`` with ``vocab_axis=0``.
      labels: Classes, ``int[...]``. One out of range gives NaN.
      bias: ``float[v]``, or None.
      where: Classes that exist, ``bool[v]`` or ``bool[..., v]``; a label that does not: -inf.
      temperature: Divides the logits, after the soft-cap.
      logit_soft_cap: c of c·tanh(logits / c), or None.
      ignore_index: Label of tokens that get 0, gradient 0: padding, prompts.
      vocab_axis: The axis of ``w`` that counts classes.
      chunk_size: Tokens of a tile, or (tokens, classes); None: chosen. Any gives the same result.
      accumulate_dtype: In which the gradients are summed over tiles.
      precision: Of the matrix products, as in ``jax.lax.dot_general``.
      axis_name: A mesh axis of the ``shard_map`` around the call, or the axis of a ``vmap``,
        that classes are cut over; see ``linear_softmax_cross_entropy``.
      fsdp_axis: One that the features of ``w`` are cut over, as are tokens; see there.
      implementation: None, "xla", "pallas_tpu", "pallas_gpu", "pallas_interpret" or
        "pallas_gpu_interpret"; see ``linear_softmax_cross_entropy``.
      return_entropy: Whether to return the entropy of the distribution too, differentiable.

    Returns:
      ``float[...]``, float32 for 16-bit input; with ``return_entropy`` a pair of such.

    Raises:
      TypeError: labels are not integers.
      ValueError: Shapes do not fit.
      NotImplementedError: ``implementation`` cannot run this call.

    Example:
      Direct preference optimisation, on sequences chosen and rejected, prompts ignored:

      >>> def dpo(h_chosen, y_chosen, h_rejected, y_rejected, w, reference, beta=0.1):
      ...     log_p = lambda h, y: linear_log_probs(h, w, y, ignore_index=-100).sum(-1)
      ...     margin = log_p(h_chosen, y_chosen) - log_p(h_rejected, y_rejected) - reference
      ...     return -jax.nn.log_sigmoid(beta * margin).mean()
      >>> h, w = jnp.ones((2, 3, 4)), jnp.zeros((4, 10))
      >>> y = jnp.array([[-100, 1, 2], [-100, 3, 4]])
      >>> dpo(h, y, h, y, w, reference=0.0).round(4)
      Array(0.6931, dtype=float32)

      Group-relative policy optimisation, with an entropy bonus:

      >>> def grpo(h, y, w, old_log_p, advantage, clip=0.2, bonus=0.01):
      ...     log_p, entropy = linear_log_probs(h, w, y, return_entropy=True)
      ...     ratio = jnp.exp(log_p - old_log_p)
      ...     kept = jnp.clip(ratio, 1 - clip, 1 + clip)
      ...     gain = jnp.minimum(ratio * advantage, kept * advantage)
      ...     return -(gain + bonus * entropy).mean()
      >>> old = linear_log_probs(h, w, jnp.abs(y) % 10)
      >>> grpo(h, jnp.abs(y) % 10, w, old, advantage=jnp.ones((2, 1))).round(4)
      Array(-1.023, dtype=float32)

    For a loss to be minimised as it stands, ``linear_softmax_cross_entropy`` with a reduction saves
    the fourth product. Where logits exist already, use ``log_softmax``.

    Source: Rafailov et al., "Direct Preference Optimization", 2023; Shao et al.,
    "DeepSeekMath", 2024.
    """
    rule = make_rule("linear_log_probs", 0.0, 0.0, temperature, logit_soft_cap)
    return _jit(
        mode,
        x,
        w,
        labels,
        bias,
        where,
        rule,
        ignore_index=ignore_index,
        vocab_axis=vocab_axis,
        chunk_size=chunk_size,
        accumulate_dtype=jnp.dtype(accumulate_dtype),
        precision=precision,
        axis_name=axis_name,
        fsdp_axis=fsdp_axis,
        implementation=implementation,
        return_entropy=return_entropy,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "mode",
        "ignore_index",
        "vocab_axis",
        "chunk_size",
        "accumulate_dtype",
        "precision",
        "axis_name",
        "fsdp_axis",
        "implementation",
        "return_entropy",
    ),
)
def _jit(
    mode,
    x,
    w,
    labels,
    bias,
    where,
    rule,
    *,
    ignore_index,
    vocab_axis,
    chunk_size,
    accumulate_dtype,
    precision,
    axis_name,
    fsdp_axis,
    implementation,
    return_entropy,
):
    of = "linear_log_probs"
    labels = numerics.as_labels(labels, of)
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
        False,
        accumulate_dtype,
        precision,
        axis_name,
        fsdp_axis,
    )
    plan = plan._replace(entropy=return_entropy)
    plan = linear_pallas.implemented(of, plan, head, tokens, mode, implementation, chunk_size)
    if mode == "forward":
        plan, head = linear_fsdp.whole(plan, head)
    schedules = modes.of(mode, linear_schedules, linear_tangents)
    rows: Any = schedules.per_token(plan, head, tokens, rule)
    log_p = -rows.loss.reshape(lead)
    return (log_p, rows.entropy.reshape(lead)) if return_entropy else log_p
