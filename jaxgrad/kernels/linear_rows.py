"""What is known of a token of the fused head: while classes come by, in the end, and going back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxgrad.kernels import linear_tile, loss_options, row_rule
from jaxgrad.kernels.linear_labels import Labels, is_integer
from jaxgrad.kernels.linear_tile import Head, Plan, Tokens
from jaxgrad.kernels.row_rule import Part, Rule

Sums = tuple[Part, Array]  # of the row rule, and the best class


class Rows(NamedTuple):
    """What is known of each token in the end, [t, 1] each."""

    loss: Array
    lse: Array
    entropy: Array | None
    argmax: Array


def visit(
    plan: Plan, head: Head, tokens: Tokens, rule: Rule, so_far: Sums, start: Any, size: int
) -> tuple[Sums, Array]:
    """``so_far`` with the sums of one more tile, and its logits."""
    x = linear_tile.logits(plan, head, tokens.x, start, size)
    return merge(rule, so_far, linear_tile.measure(plan, tokens, rule, x, start)), x


def merge(rule: Rule, a: Sums, b: Sums) -> Sums:
    """The sums over the classes of both, those of ``a`` the first."""
    best = jnp.where(b[0].top > a[0].top, b[1], a[1])
    return row_rule.merge(rule, a[0], b[0]), best


def finish(plan: Plan, tokens: Tokens, rule: Rule, part: Part, best: Array) -> tuple[Rows, Part]:
    """The rows, and the sums as the backward takes them."""
    integer, some = is_integer(tokens.labels), None
    if integer and tokens.where is not None:
        some = jnp.broadcast_to(tokens.where.any(1, keepdims=True), part.gap.shape)
    part, best, some = linear_tile.merge_shards(plan, tokens, rule, part, best, some)
    if integer:
        part = part._replace(mass=None)
        if some is not None:
            part = part._replace(gap=jnp.where(some, part.gap, 0), mass=some.astype(plan.wide))
    ignored, unknown = linear_tile.row_state(plan, tokens.labels)

    def unless_ignored(row):
        return row if ignored is None else jnp.where(ignored, 0, row)

    loss = row_rule.loss(rule, part)
    rows = Rows(
        unless_ignored(loss if unknown is None else jnp.where(unknown, jnp.nan, loss)),
        unless_ignored(row_rule.log_sum_exp(rule, part)),
        unless_ignored(row_rule.entropy(part)) if plan.entropy else None,
        best,
    )
    return rows, loss_options.kept(rule, part)


def row_bars(plan: Plan, labels: Labels, *bars: Any) -> tuple[Any, ...]:
    """l̄, L̄ and H̄, 0 for tokens that are ignored or unknown; None for one that is 0 for all."""
    ignored, unknown = linear_tile.row_state(plan, labels)
    bars = tuple(None if isinstance(z, SymbolicZero) else z for z in bars)
    for out in (ignored, unknown):
        if out is not None:
            bars = jax.tree.map(lambda z, out=out: jnp.where(out, 0, z), bars)
    loss_bar, lse_bar, entropy_bar = (*bars, None, None)[:3]
    if loss_bar is None:
        loss_bar = jnp.zeros((len(jax.tree.leaves(labels)[0]), 1), plan.wide)
    return loss_bar, lse_bar, entropy_bar
