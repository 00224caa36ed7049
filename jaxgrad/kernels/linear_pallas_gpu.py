"""The loops of ``linear_schedules.per_token`` around Pallas kernels for GPU.

    forward:   for tokens, ranges of classes: for classes: x, measure, merge            one product
               merge the ranges
    backward:  for blocks of classes: { for tokens, classes: x, x̄;
                                        h̄ += x̄ w, w̄ = h x̄ }                             three

Within braces, x̄ of all tokens and a block of classes is in memory. The two products with it are
those of a library; a kernel would have to hold sums over all tokens, or all classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrad import tiling
from jaxgrad.backends.pallas_gpu import loops, tiles
from jaxgrad.kernels import linear_bars, linear_rows, linear_tile, row_rule
from jaxgrad.kernels.linear_rows import Sums
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Part, Rule

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def obstacle(chunk_size: Any) -> str | None:
    """Why this is no tile; None if it is one."""
    return tiles.obstacle(chunk_size)


def stream(plan: Plan, head: Head, tokens: Tokens, rule: Rule) -> Sums:
    """The sums over all classes, and the best class, of every token."""

    def start(size):
        return linear_tile.nothing(plan, tokens._replace(x=jnp.zeros((size, 1))), rule)

    def body(so_far, x, labels, rule, column, where):
        some = tokens._replace(labels=labels, where=where)
        part = linear_tile.measure(plan, some, rule, x, column)
        return linear_rows.merge(rule, so_far, part)

    ranges = loops.sums(
        start,
        _product(plan),
        body,
        loops.Operands(tokens.x, head.w, head.bias, tokens.labels, rule),
        plan.vocab_axis,
        plan.tile,
        _interpret(plan),
    )
    while (count := len(ranges[1])) > 1:
        halves = (jax.tree.map(lambda z, s=s: z[s], ranges) for s in _halves(count))
        ranges = linear_rows.merge(rule, *halves)
    return jax.tree.map(lambda z: z[0], ranges)


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
    dtype = linear_tile.bar_dtype(plan, tokens.x)
    operands = loops.Operands(tokens.x, *head, (tokens.labels, part, row_bars), rule)

    plain = rule.soft_cap is None and row_bars[2] is None
    name = "bars" if plain else "heavy bars"

    def body(x, rows, rule, column, where):
        labels, part, row_bars = rows
        t = linear_tile.targets(plan, labels, column, x.shape[1])
        z_bar = row_rule.gradient(rule, x, t, where, part, *row_bars)
        return row_rule.to_logits(rule, x, where, z_bar)

    def block(bars, first, size, _):
        some = Head(
            tiling.take(head.w, first, size, plan.vocab_axis),
            None if head.bias is None else tiling.take(head.bias, first, size, 0),
        )
        rows = tokens.labels - first, part, row_bars
        x_bar, bias_bar = loops.bars(
            _product(plan),
            body,
            name,
            operands._replace(w=some.w, bias=some.bias, rows=rows),
            dtype,
            wanted.bias is not None,
            plan.vocab_axis,
            plan.tile,
            _interpret(plan),
        )
        w_bar = None if wanted.w is None else jnp.zeros_like(some.w, plan.accumulate)
        new = linear_tile.add_products(
            plan, wanted, bars._replace(w=w_bar), some, tokens, x_bar, None, 0, 0
        )
        if wanted.w is not None:
            corner = linear_tile.along(plan, first)
            new = new._replace(w=tiling.put(bars.w, new.w, *corner))
        if bias_bar is not None:
            new = new._replace(bias=tiling.put(bars.bias, bias_bar, first))
        return new, ()

    zero = linear_bars.zeros(plan, wanted, head, tokens, rule)
    zero = zero._replace(w=linear_bars.cast(zero.w, wanted.w))
    multiple = tiles.plan(name, operands, plan.vocab_axis, plan.tile).classes
    limit = tiles.block(len(tokens.x), dtype.itemsize, multiple)
    return tiling.fold(block, zero, plan.v, tiling.even(plan.v, limit, multiple))[0]


def _product(plan):
    return lambda x, w: linear_tile.product(plan, x, w)


def _halves(count):
    return slice(count // 2), slice(count // 2, None)


def _interpret(plan):
    return plan.implementation == "pallas_gpu_interpret"
