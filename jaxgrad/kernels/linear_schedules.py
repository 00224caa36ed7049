r"""The two schedules of the fused head: in which order tiles are visited, and what is kept.

``per_token`` gives a loss a token, and any cotangent may come. Its forward keeps the sums of the
row rule, a few numbers a token; the backward computes every tile of logits anew:

    forward:   for tokens: for classes: x, measure, merge                      one product
    backward:  for classes: for tokens: x, x̄, h̄ += x̄ w, w̄ += h x̄              three

``total`` gives Σ c l. There l̄ = c is known in the forward, up to one factor for all tokens, so the
gradients are made at once and kept; the backward multiplies them:

    forward:   for tokens: { for classes: x, measure, merge;
                             for classes: x̄, h̄ += x̄ w, w̄ += h x̄ }             three in all

with the logits of one tile of tokens × all classes held between the inner loops. Undifferentiated,
either is the first loop alone. Every loop can be differentiated again, at the memory of its tiles.

Where a device holds some features of w alone, the loops of ``per_token`` are in ``linear_fsdp.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxgrad import backends, modes, sharding, tiling
from jaxgrad.kernels import (
    linear_bars,
    linear_fsdp,
    linear_pallas,
    linear_rows,
    linear_tile,
    row_rule,
)
from jaxgrad.kernels.linear_labels import Labels
from jaxgrad.kernels.linear_rows import Rows
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.loss_options import add_rules
from jaxgrad.kernels.row_rule import Part, Rule

# A w̄ of 16 bits is rounded so many times: summed as a whole, it would be held in 32 bits as well;
# class tile by class tile, XLA's CPU would widen and round all of it for each.
BLOCKS = 4


def _in_halves(schedule: Callable) -> Callable:
    """``schedule``, at the same memory where it is differentiated: by tiles half as large."""
    op = functools.partial(jax.custom_jvp, nondiff_argnums=(0,))(schedule)

    @functools.partial(op.defjvp, symbolic_zeros=True)
    def _(plan, primals, tangents):
        return modes.push(functools.partial(schedule, halved(plan)), primals, tangents)

    return op


def halved(plan: Plan) -> Plan:
    """``plan`` with half the tokens a tile, where each tile comes with its tangents."""
    tokens, classes = plan.tile
    return plan._replace(tile=(max(tokens // 2, 1), classes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_token(plan: Plan, head: Head, tokens: Tokens, rule: Rule) -> Rows:
    """Rows of all tokens; loss, lse and entropy have a gradient."""
    return _forward(plan, head, tokens, rule)[0]


def _forward(plan, head, tokens, rule):
    tokens = _without_ignored(plan, tokens)
    if (loops := _other_loops(plan)) is not None:
        sums = loops.stream(plan, head, tokens, rule)
        return linear_rows.finish(plan, tokens, rule, *sums)
    return _rows(plan, head, tokens, rule)


@_in_halves
def _rows(plan, head, tokens, rule):
    def chunk(carry, row, size, _):
        some = tiling.rows(tokens, row, size)
        part, best, _ = _stream(plan, head, some, rule)
        return carry, linear_rows.finish(plan, some, rule, part, best)

    return tiling.fold_overlapping(chunk, (), len(tokens.x), plan.tile[0])[1]


def _per_token_fwd(plan, head, tokens, rule):
    (head, tokens, rule), wanted = linear_bars.asked(head, tokens, rule)
    rows, part = _forward(plan, head, tokens, rule)
    part = checkpoint_name(part, "linear_softmax_cross_entropy")
    return rows, (wanted, head, tokens, rule, part)


def _per_token_bwd(plan, residuals, bar):
    wanted, head, tokens, rule, part = residuals
    row_bars = linear_rows.row_bars(plan, tokens.labels, bar.loss, bar.lse, bar.entropy)
    clean = _without_ignored(plan, tokens)
    of_rows = (rule, part, row_bars)
    if (loops := _other_loops(plan)) is not None:
        bars = loops.pull_back(plan, wanted, head, clean, *of_rows)
    else:
        bars = _all_tiles(plan, wanted, head, clean, *sharding.lift(of_rows, plan.axis_name))
    bars = bars._replace(x=_marked(plan, bars.x, tokens.labels))
    bars = _with_rows(plan, wanted, bars, *of_rows)
    return linear_bars.cotangents(wanted, _over_shards(plan, bars))


per_token.defvjp(_per_token_fwd, _per_token_bwd, symbolic_zeros=True)


def _other_loops(plan: Plan) -> Any:
    """What takes the place of the loops here, or None."""
    if plan.implementation != "xla":
        return linear_pallas
    return None if plan.fsdp_axis is None else linear_fsdp


@_in_halves
def _all_tiles(plan, wanted, head, tokens, rule, part, row_bars):
    zero = linear_bars.zeros(plan, wanted, head, tokens, rule)
    turned = _turned(plan, tokens.x)

    def block(bars, first, size, _):
        def classes(bars, column, width, _):
            def chunk(bars, row, size, new):
                some, part_, row_bars_ = tiling.rows((tokens, part, row_bars), row, size)
                some = some._replace(turned=_some_turned(turned, row, size))
                x = linear_tile.logits(plan, head, some.x, first + column, width)
                return linear_tile.pull_back(
                    plan,
                    wanted,
                    bars,
                    head,
                    some,
                    x,
                    rule,
                    part_,
                    tiling.only(new, row_bars_),
                    start=(row, first + column),
                    x_at=row,
                    w_at=column,
                ), ()

            return tiling.fold_overlapping(chunk, bars, len(tokens.x), plan.tile[0])

        sums = bars._replace(
            w=linear_bars.resized(zero.w, plan.vocab_axis, size),
            bias=linear_bars.resized(zero.bias, 0, size),
        )
        sums, _ = tiling.fold(classes, sums, size, plan.tile[1])
        if wanted.w is not None:
            sums = sums._replace(w=tiling.put_part(bars.w, sums.w, first, plan.vocab_axis))
        if wanted.bias is not None:
            sums = sums._replace(bias=tiling.put(bars.bias, sums.bias, first))
        return sums, ()

    bars = zero._replace(
        w=linear_bars.cast(zero.w, wanted.w), bias=linear_bars.cast(zero.bias, wanted.bias)
    )
    size = block_size(plan, wanted.w)
    if wanted.w is not None:
        bars = bars._replace(w=tiling.parted(bars.w, size, plan.vocab_axis))
    bars, _ = tiling.fold(block, bars, plan.v, size)
    return bars if wanted.w is None else bars._replace(w=bars.w.reshape(head.w.shape))


def block_size(plan: Plan, w_dtype: Any) -> int:
    """How many classes of w̄, if one is wanted, are summed before they are rounded."""
    if w_dtype is None or w_dtype == plan.accumulate:
        return plan.v
    count = next((n for n in range(BLOCKS, 2 * BLOCKS) if plan.v % n == 0), BLOCKS)
    return -(-plan.v // count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(plan: Plan, head: Head, tokens: Tokens, rule: Rule, scale: Array) -> tuple[Array, Rows]:
    """Σ scale · loss with scale [t, 1], which has a gradient, and the rows, which have none."""
    rows, _ = _forward(plan, head, tokens, rule)
    return (scale * rows.loss).sum(), rows


def _total_fwd(plan, head, tokens, rule, scale):
    (head, tokens, rule), wanted = linear_bars.asked(head, tokens, rule)
    return _gradients(plan, wanted, head, tokens, rule, scale.value)


@_in_halves
def _gradients(plan, wanted, head, tokens, rule, scale):
    clean = _without_ignored(plan, tokens)
    zero = linear_bars.zeros(plan, wanted, head, tokens, rule)

    def chunk(bars, row, size, new):
        some, scale_ = tiling.rows((clean, scale), row, size)
        part, best, kept = _stream(plan, head, some, rule, keep=True)
        rows, part = linear_rows.finish(plan, some, rule, part, best)
        row_bars = linear_rows.row_bars(plan, some.labels, tiling.only(new, scale_))
        of_rows = (rule, part, row_bars)
        of_classes = sharding.lift(of_rows, plan.axis_name)
        some = some._replace(turned=_turned(plan, some.x))

        def classes(bars, column, _, x):
            return linear_tile.pull_back(
                plan,
                wanted,
                bars,
                head,
                some,
                x,
                *of_classes,
                start=(row, column),
                x_at=0,
                w_at=column,
            ), ()

        bars = bars._replace(x=linear_bars.resized(zero.x, 0, size))
        bars, _ = tiling.fold(classes, bars, plan.v, plan.tile[1], kept)
        bars = _with_rows(plan, wanted, bars, *of_rows)
        return bars._replace(x=None), (rows, _marked(plan, bars.x, some.labels))

    bars, (rows, x_bar) = tiling.fold_overlapping(
        chunk, zero._replace(x=None), len(tokens.x), plan.tile[0]
    )
    bars = _over_shards(plan, bars._replace(x=x_bar))
    return ((scale * rows.loss).sum(), rows), (wanted, bars, rows.loss)


def _total_bwd(plan, residuals, bar):
    wanted, bars, loss = residuals
    if isinstance(bar[0], SymbolicZero):
        return None, None, None, None
    bars, loss = jax.tree.map(lambda z: bar[0] * z.astype(plan.wide), (bars, loss))
    return *linear_bars.cotangents(wanted, bars), loss


total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


def _stream(
    plan: Plan, head: Head, tokens: Tokens, rule: Rule, keep: bool = False
) -> tuple[Part, Array, Any]:
    """The sums over all classes, the best class, and the logits if they are to be kept."""
    rule = sharding.lift(rule, plan.axis_name)

    def merge(carry, column, size, _):
        carry, x = linear_rows.visit(plan, head, tokens, rule, carry, column, size)
        return carry, x if keep else None

    nothing = linear_tile.nothing(plan, tokens, rule)
    (part, best), kept = tiling.fold(merge, nothing, plan.v, plan.tile[1])
    return part, best, kept


def _turned(plan: Plan, x: Array) -> Array | None:
    """``x`` transposed, once for all tiles, where ``linear_tile`` makes w̄ of that."""
    return x.T if plan.vocab_axis == 1 and backends.platform() == "cpu" else None


def _some_turned(turned: Array | None, row: Any, size: int) -> Array | None:
    return None if turned is None else tiling.take(turned, row, size, 1)


def _without_ignored(plan: Plan, tokens: Tokens) -> Tokens:
    """Features 0 where a token is ignored: 0 · NaN would reach w̄."""
    ignored, _ = linear_tile.row_state(plan, tokens.labels)
    return tokens if ignored is None else tokens._replace(x=jnp.where(ignored, 0, tokens.x))


def _marked(plan: Plan, x_bar: Array | None, labels: Labels) -> Array | None:
    """h̄ with NaN for unknown tokens: there alone, so that w̄ stays finite."""
    _, unknown = linear_tile.row_state(plan, labels)
    return x_bar if x_bar is None or unknown is None else jnp.where(unknown, jnp.nan, x_bar)


def _with_rows(
    plan: Plan, wanted: Wanted, bars: Bars, rule: Rule, part: Part, row_bars: Any
) -> Bars:
    if wanted.rule is None:
        return bars
    rest = sharding.once(row_rule.rows_to_rule(rule, part, *row_bars[:2]), plan.axis_name)
    return bars._replace(rule=add_rules(bars.rule, jax.tree.map(jnp.sum, rest)))


def _over_shards(plan: Plan, bars: Bars) -> Bars:
    """``bars`` with that of the rule, which all shards share, summed over them."""
    return bars._replace(rule=sharding.psum(bars.rule, plan.axis_name))
