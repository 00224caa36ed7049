"""The loops of ``linear_schedules.per_token`` as Pallas kernels, around the same tiles.

    forward:   for tokens: for classes: x, measure, merge                      one product
    backward:  for classes: for tokens: x, x̄, h̄ += x̄ w, w̄ += h x̄              three

What a tile computes is typed in ``linear_tile`` and the row rule; ``backends.pallas_tpu`` decides
where it is held. Residuals are those of the loops in plain JAX. There is no second derivative.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrad import backends
from jaxgrad.kernels import linear_rows, linear_tile
from jaxgrad.kernels.linear_rows import Sums
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Part, Rule

LANES = 128  # of a vector register: a tile has a multiple of them


def implemented(
    of: str, plan: Plan, head: Head, tokens: Tokens, mode: str, implementation: Any, chunk_size: Any
) -> Plan:
    """``plan`` with the implementation that runs the call, and the tile as that takes it."""
    obstacle = _obstacle(plan, head, tokens, mode, chunk_size)
    name = backends.choose(of, implementation, obstacle).name
    if name == "xla":
        return plan
    return plan._replace(implementation=name, tile=chunk_size, keeps_logits=False)


def _obstacle(plan, head, tokens, mode, chunk_size):
    floats = (tokens.x.dtype, head.w.dtype)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if mode != "reverse":
        return "has a backward rule alone"
    if not linear_tile.is_integer(tokens.labels):
        return "takes integer labels alone"
    if tokens.where is not None:
        return "takes no where"
    if manual or plan.axis_name is not None:
        return f"runs outside of shard_map alone, got axes {manual or plan.axis_name}"
    if not all(dtype in (jnp.float32, jnp.bfloat16) for dtype in floats):
        return f"takes x and w of float32 or bfloat16, got {floats[0]} and {floats[1]}"
    if plan.accumulate != jnp.float32:
        return f"takes accumulate_dtype=float32 alone, got {plan.accumulate}"
    if 0 in (*tokens.x.shape, *head.w.shape):
        return f"takes no array of size 0, got x {tokens.x.shape} and w {head.w.shape}"
    if chunk_size is not None and (
        not isinstance(chunk_size, tuple) or any(size % LANES for size in chunk_size)
    ):
        return f"takes chunk_size=(tokens, classes), multiples of {LANES}, got {chunk_size}"
    return None


def stream(plan: Plan, head: Head, tokens: Tokens, rule: Rule) -> Sums:
    """The sums over all classes, and the best class, of every token."""
    from jaxgrad.backends.pallas_tpu import loops

    def start(size):
        return linear_tile.nothing(plan, tokens._replace(x=jnp.zeros((size, 1))), rule)

    def body(so_far, tile, column, where):
        some = Tokens(tile.x, tile.rows, where)
        size = tile.w.shape[plan.vocab_axis]
        layer = Head(tile.w, tile.bias)
        return linear_rows.visit(plan, layer, some, tile.scalars, so_far, column, size)[0]

    @_differentiable_once
    def sums(operands):
        return loops.sums(start, body, operands, plan.vocab_axis, plan.tile, _interpret(plan))

    return sums(loops.Operands(tokens.x, head.w, _wide(plan, head.bias), tokens.labels, rule))


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
    from jaxgrad.backends.pallas_tpu import loops

    if wanted.rule is not None:
        raise NotImplementedError(
            f"linear_softmax_cross_entropy: implementation={plan.implementation!r} has no gradient "
            "for label_smoothing, z_loss, temperature and logit_soft_cap; 'xla' has"
        )

    def body(bars, tile, column, where):
        labels, part, row_bars = tile.rows
        some, layer = Tokens(tile.x, labels, where), Head(tile.w, tile.bias)
        size = tile.w.shape[plan.vocab_axis]
        x = linear_tile.logits(plan, layer, tile.x, column, size)
        bars = linear_tile.pull_back(
            plan,
            wanted,
            Bars(x=bars.x, w=bars.w, bias=bars.bias),
            layer,
            some,
            x,
            tile.scalars,
            part,
            row_bars,
            start=(0, column),
            x_at=0,
            w_at=0,
        )
        return loops.Gradients(bars.x, bars.w, bars.bias)

    @_differentiable_once
    def gradients(operands):
        dtypes = loops.Gradients(wanted.x, wanted.w, wanted.bias)
        return loops.gradients(body, operands, dtypes, plan.vocab_axis, plan.tile, _interpret(plan))

    rows = (tokens.labels, part, row_bars)
    bias = _wide(plan, head.bias)
    bars = gradients(loops.Operands(tokens.x, head.w, bias, rows, rule))
    return Bars(x=bars.x, w=bars.w, bias=bars.bias)


def _differentiable_once(f):
    f = jax.custom_jvp(f)

    @f.defjvp
    def _(*_):
        raise NotImplementedError(
            "linear_softmax_cross_entropy: a second derivative needs implementation='xla'"
        )

    return f


def _interpret(plan):
    return plan.implementation == "pallas_interpret"


def _wide(plan, bias):
    return None if bias is None else bias.astype(plan.wide)
