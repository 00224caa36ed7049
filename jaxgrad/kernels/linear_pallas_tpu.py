"""The loops of ``linear_schedules.per_token`` as Pallas kernels for TPU, around the same tiles.

    forward:   for tokens: for classes: x, measure, merge                      one product
    backward:  for classes: for tokens: x, x̄, h̄ += x̄ w, w̄ += h x̄              three

``backends.pallas_tpu`` decides where a tile is held.

Three products, by logits kept from the first loop to the second, were compiled and not adopted.
Estimates at (4096, 2048, 131072), bfloat16, against 44 ms on v5e and 12 on v6e in 32 MiB: all
logits in 16 bits, 33 and 10 ms, but 1056 MiB; those of 2048 tokens at a time and a float32 w̄,
43 and 18 ms in 1024 MiB. At 16384 tokens, where w̄ is float32 anyway, the latter is 141 of 193 ms
on v5e; but 16-bit logits that are large raised errors of gradients from 2.3e-3 to 4.1e-3.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxgrad.backends.pallas_tpu import loops
from jaxgrad.backends.pallas_tpu.tiles import LANES
from jaxgrad.kernels import linear_rows, linear_tile
from jaxgrad.kernels.linear_rows import Sums
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Part, Rule

DTYPES = (jnp.float32, jnp.bfloat16)


def obstacle(chunk_size: Any) -> str | None:
    """Why this is no tile; None if it is one."""
    if isinstance(chunk_size, tuple) and not any(size % LANES for size in chunk_size):
        return None
    return f"takes chunk_size=(tokens, classes), multiples of {LANES}, got {chunk_size}"


def stream(plan: Plan, head: Head, tokens: Tokens, rule: Rule) -> Sums:
    """The sums over all classes, and the best class, of every token."""

    def start(size):
        return linear_tile.nothing(plan, tokens._replace(x=jnp.zeros((size, 1))), rule)

    def body(tile, column, where):
        size = tile.w.shape[plan.vocab_axis]
        x = linear_tile.logits(plan, Head(tile.w, tile.bias), tile.x, column, size)
        some = Tokens(tile.x, tile.rows, where)
        return linear_tile.measure(plan, some, tile.scalars, x, column)

    operands = loops.Operands(tokens.x, *head, tokens.labels, rule)
    way = plan.vocab_axis, plan.tile, _interpret(plan)
    return loops.sums(start, body, linear_rows.merge, operands, *way)


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

    dtypes = loops.Gradients(wanted.x, wanted.w, wanted.bias)
    operands = loops.Operands(tokens.x, *head, (tokens.labels, part, row_bars), rule)
    bars = loops.gradients(body, operands, dtypes, plan.vocab_axis, plan.tile, _interpret(plan))
    return Bars(x=bars.x, w=bars.w, bias=bars.bias)


def _interpret(plan):
    return plan.implementation == "pallas_interpret"
