"""The loops of ``linear_schedules.per_token`` where each device holds some features of w (FSDP).

    forward:   for classes: { collect w;  for tokens: x, measure, merge }
    backward:  for classes: { collect w;  for tokens: x, x̄, h̄ += x̄ w, w̄ += h x̄;  scatter w̄ }

Classes come first, so that a tile of w is sent once however many tokens there are, and of w no more
than a tile is whole on any device. A tile of w̄ is summed over the devices as it was summed over
tokens, in float32, and each keeps its features of it.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxgrad import sharding, tiling
from jaxgrad.kernels import linear_bars, linear_rows, linear_tile
from jaxgrad.kernels.linear_rows import Sums
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Part, Rule


def stream(plan: Plan, head: Head, tokens: Tokens, rule: Rule) -> Sums:
    """The sums over all classes, and the best class, of every token."""
    rule = sharding.lift(rule, plan.axis_name)

    def classes(sums, column, width, _):
        layer = _collected(plan, head, column, width)

        def chunk(_, row, size, __):
            some, so_far = tiling.rows((tokens, sums), row, size)
            return (), linear_rows.visit(plan, layer, some, rule, so_far, column, width)[0]

        return tiling.fold_overlapping(chunk, (), len(tokens.x), plan.tile[0])[1], ()

    return tiling.fold(classes, linear_tile.nothing(plan, tokens, rule), plan.v, plan.tile[1])[0]


def pull_back(
    plan: Plan,
    wanted: Wanted,
    head: Head,
    tokens: Tokens,
    rule: Rule,
    part: Part,
    row_bars: tuple[Array, Array | None, Array | None],
) -> Bars:
    """The cotangents of all but the whole rows."""
    rule, part, row_bars = sharding.lift((rule, part, row_bars), plan.axis_name)

    def classes(bars, column, width, _):
        layer = _collected(plan, head, column, width)

        def chunk(bars, row, size, new):
            some, part_, row_bars_ = tiling.rows((tokens, part, row_bars), row, size)
            x = linear_tile.logits(plan, layer, some.x, column, width)
            return linear_tile.pull_back(
                plan,
                wanted,
                bars,
                layer,
                some,
                x,
                rule,
                part_,
                tiling.only(new, row_bars_),
                start=(row, column),
                x_at=row,
                w_at=0,
            ), ()

        sums = bars._replace(
            w=None if wanted.w is None else jnp.zeros_like(layer.w, plan.accumulate),
            bias=linear_bars.resized(bars.bias, 0, width),
        )
        sums, _ = tiling.fold_overlapping(chunk, sums, len(tokens.x), plan.tile[0])
        if wanted.w is not None:
            w_bar = sharding.scatter(sums.w, plan.fsdp_axis, 1 - plan.vocab_axis)
            corner = linear_tile.along(plan, column)
            sums = sums._replace(w=tiling.put(bars.w, w_bar, *corner))
        if wanted.bias is not None:
            sums = sums._replace(bias=tiling.put(bars.bias, sums.bias, column))
        return sums, ()

    zero = linear_bars.zeros(plan, wanted, head, tokens, rule)
    return tiling.fold(classes, zero, plan.v, plan.tile[1])[0]


def whole(plan: Plan, head: Head) -> tuple[Plan, Head]:
    """The same with all features of w, collected at once."""
    if plan.fsdp_axis is None:
        return plan, head
    return plan._replace(fsdp_axis=None), _collected(plan, head, 0, plan.v)


def _collected(plan: Plan, head: Head, column: Any, width: int) -> Head:
    """``head`` with all features of some classes; its bias is that of all."""
    w = tiling.take(head.w, column, width, plan.vocab_axis)
    return head._replace(w=sharding.collect(w, plan.fsdp_axis, 1 - plan.vocab_axis))
