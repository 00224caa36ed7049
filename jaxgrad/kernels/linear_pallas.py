"""The fused head by Pallas kernels: which may run, and what they are asked for.

The two functions of ``linear_schedules.per_token`` that visit tiles are here those of a device,
``linear_pallas_tpu`` or ``linear_pallas_gpu``. What a tile computes is typed in ``linear_tile`` and
the row rule. Residuals are those of the loops in plain JAX. There is no second derivative.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrad import backends, modes
from jaxgrad.kernels import linear_labels
from jaxgrad.kernels.linear_rows import Sums
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Part, Rule


def implemented(
    of: str, plan: Plan, head: Head, tokens: Tokens, mode: str, implementation: Any, chunk_size: Any
) -> Plan:
    """``plan`` with the implementation that runs the call, and the tile as that takes it."""
    obstacle = None
    if implementation in backends.OTHERS[of]:
        obstacle = _obstacle(_kernels(implementation), plan, head, tokens, mode, chunk_size)
    name = backends.choose(of, implementation, obstacle).name
    if name == "xla":
        return plan
    return plan._replace(implementation=name, tile=chunk_size, keeps_logits=False)


def _obstacle(kernels, plan, head, tokens, mode, chunk_size):
    floats = (tokens.x.dtype, head.w.dtype)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if mode != "reverse":
        return "has a backward rule alone"
    if not linear_labels.is_integer(tokens.labels):
        return "takes integer labels alone"
    if tokens.where is not None:
        return "takes no where"
    if manual or plan.axis_name is not None:
        return f"runs outside of shard_map alone, got axes {manual or plan.axis_name}"
    if not all(dtype in kernels.DTYPES for dtype in floats):
        names = " or ".join(jnp.dtype(dtype).name for dtype in kernels.DTYPES)
        return f"takes x and w of {names}, got {floats[0]} and {floats[1]}"
    if plan.accumulate != jnp.float32:
        return f"takes accumulate_dtype=float32 alone, got {plan.accumulate}"
    if 0 in (*tokens.x.shape, *head.w.shape):
        return f"takes no array of size 0, got x {tokens.x.shape} and w {head.w.shape}"
    return None if chunk_size is None else kernels.obstacle(chunk_size)


def stream(plan: Plan, head: Head, tokens: Tokens, rule: Rule) -> Sums:
    """The sums over all classes, and the best class, of every token."""
    sums = functools.partial(_kernels(plan.implementation).stream, plan)
    return _differentiable_once(sums)(_wide(plan, head), tokens, rule)


def pull_back(
    plan: Plan,
    wanted: Wanted,
    head: Head,
    tokens: Tokens,
    rule: Rule,
    part: Part,
    row_bars: tuple[Array, Array | None, Array | None],
) -> Bars:
    """The cotangents of x, w and bias."""
    if wanted.rule is not None:
        raise NotImplementedError(
            f"linear_softmax_cross_entropy: implementation={plan.implementation!r} has no gradient "
            "for label_smoothing, z_loss, temperature and logit_soft_cap; 'xla' has"
        )
    gradients = functools.partial(_kernels(plan.implementation).pull_back, plan, wanted)
    return _differentiable_once(gradients)(_wide(plan, head), tokens, rule, part, row_bars)


def _kernels(implementation) -> Any:
    if implementation.startswith("pallas_gpu"):
        from jaxgrad.kernels import linear_pallas_gpu as kernels
    else:
        from jaxgrad.kernels import linear_pallas_tpu as kernels
    return kernels


def _differentiable_once(f):
    needs = "a second derivative needs implementation='xla'"
    return modes.refusing(f, f"linear_softmax_cross_entropy: {needs}")


def _wide(plan, head):
    return head if head.bias is None else head._replace(bias=head.bias.astype(plan.wide))
