r"""The two schedules of the fused head pushed forward, at no more logits than a tile.

    ẋ_ij = ⟨ḣ_i, w_j⟩ + ⟨h_i, ẇ_j⟩ + ḃ_j                               (1)
    l̇_i  = Σ_j x̄_ij ẋ_ij + ...             at l̄_i = 1                  (2)

with the rest of (2), and x̄, by the row rule. ``per_token`` goes the way of its backward:

    for classes: for tokens: x, ẋ, l̇ += Σ x̄ ẋ              three products beside the forward

Each tile is rematerialised, so its transpose makes x again, then h̄ += l̄ x̄ w and w̄ += l̄ h x̄: the
backward. ``total`` has its gradients from the forward, and multiplies tangents by them:

    l̇    = ⟨h̄, ḣ⟩ + ⟨w̄, ẇ⟩ + ⟨b̄, ḃ⟩ + ...                              (3)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import modes, sharding, tiling
from jaxgrad.kernels import linear_rows, linear_schedules, linear_tile, row_tangent
from jaxgrad.kernels.linear_labels import Labels, SparseLabels
from jaxgrad.kernels.linear_rows import Rows
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Rule


def _per_token_fwd(plan, head, tokens, rule):
    rows, part = linear_schedules._forward(plan, head, tokens, rule)
    return rows, (head, tokens, rule, part)


def _per_token_jvp(plan, residuals, head_dot, tokens_dot, rule_dot):
    plan, (head, tokens, rule, part) = linear_schedules.halved(plan), residuals
    clean = linear_schedules._without_ignored(plan, tokens)
    widened = functools.partial(jax.tree.map, lambda z: z.astype(plan.accumulate))
    tokens_dot = widened(tokens_dot)  # the transpose sums over tiles in this dtype
    units = _units(plan, tokens.labels)
    of_rows = (rule, part, units, rule_dot)
    rule_, part_, units_, rule_dot_ = sharding.lift(of_rows, plan.axis_name)

    def block(rows_dot, first, size, _):
        block_dot = widened(_columns_dot(plan, head_dot, first, size))
        classes = functools.partial(tile, block_dot, first)
        return tiling.fold(classes, rows_dot, size, plan.tile[1])[0], ()

    def tile(block_dot, first, rows_dot, column, width, _):
        columns_dot, column = _columns_dot(plan, block_dot, column, width), first + column

        def chunk(_, row, size, __):
            some, some_dot, some_part, some_units = tiling.rows(
                (clean, tokens_dot, part_, units_), row, size
            )
            x = linear_tile.logits(plan, head, some.x, column, width)
            x_dot = _logits_dot(plan, head, columns_dot, some.x, some_dot.x, column, width)
            labels = linear_tile._own(some)
            t = linear_tile.targets(plan, labels, column, width)
            t_dot = _targets_dot(plan, labels, some_dot.labels, column, width)
            where = linear_tile._columns(some.where, column, width)
            given, dots = (rule_, x, t, where, some_part), (x_dot, t_dot, rule_dot_)
            return (), [row_tangent.of_classes(*given, unit, *dots) for unit in some_units]

        _, more = tiling.fold_overlapping(chunk, (), len(tokens.x), plan.tile[0])
        return jax.tree.map(jnp.add, rows_dot, more), ()

    zero = jnp.zeros_like(part_.top)
    size = linear_schedules.block_size(plan, None if head_dot.w is None else head_dot.w.dtype)
    (loss, *aux), _ = tiling.fold(block, [zero for _ in units], plan.v, size)
    _, unknown = linear_tile.row_state(plan, tokens.labels)
    if unknown is not None and tokens_dot.x is not None:  # NaN in its row of h̄, and there alone
        loss += jnp.where(unknown, jnp.nan, 0) * tokens_dot.x.astype(plan.wide).sum(1)[:, None]
    of_classes = sharding.psum((loss, *aux), plan.axis_name)
    loss, *aux = (
        z + row_tangent.of_rows(rule, part, unit, rule_dot)
        for z, unit in zip(of_classes, units, strict=True)
    )
    none: Any = None
    lse, entropy = aux or (none, none)
    return Rows(loss, lse, entropy, none)


per_token = modes.custom_jvp(_per_token_fwd, _per_token_jvp, static=1)


def _units(plan: Plan, labels: Labels) -> list[tuple[Any, ...]]:
    """l̄ = 1; and L̄ = 1, then H̄ = 1, where lse and entropy are asked for."""
    one = jnp.ones((len(jax.tree.leaves(labels)[0]), 1), plan.wide)
    units: list[tuple[Any, ...]] = [(one, None, None)]
    if plan.entropy:
        units += [(None, one, None), (None, None, one)]
    return [linear_rows.row_bars(plan, labels, *unit) for unit in units]


def _columns_dot(plan, head_dot, start, size) -> Head:
    def take(z, axis):  # not that of tiling, whose barrier JAX does not transpose
        return None if z is None else lax.dynamic_slice_in_dim(z, start, size, axis)

    w_dot: Any = take(head_dot.w, plan.vocab_axis)
    return Head(w_dot, take(head_dot.bias, 0))


def _logits_dot(plan, head, head_dot, x, x_dot, column, width) -> Array | None:  # (1)
    terms = []
    if x_dot is not None:
        plain = head._replace(bias=None)
        terms.append(linear_tile.logits(plan, plain, x_dot.astype(x.dtype), column, width))
    if head_dot.w is not None:
        columns_dot = Head(head_dot.w.astype(head.w.dtype), None)
        terms.append(linear_tile.logits(plan, columns_dot, x, None, width))
    if head_dot.bias is not None:
        terms.append(head_dot.bias.astype(plan.wide)[None])
    return functools.reduce(jnp.add, terms) if terms else None


def _targets_dot(plan, labels, labels_dot, column, width) -> Array | None:
    if not jax.tree.leaves(labels_dot):
        return None
    if isinstance(labels, SparseLabels):
        labels_dot = labels._replace(probs=labels_dot.probs)
    return linear_tile.targets(plan, labels_dot, column, width)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def total(plan: Plan, head: Head, tokens: Tokens, rule: Rule, scale: Array) -> tuple[Array, Rows]:
    """As ``linear_schedules.total``."""
    rows, _ = linear_schedules._forward(plan, head, tokens, rule)
    return (scale * rows.loss).sum(), rows


@functools.partial(total.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):  # (3)
    head_dot, tokens_dot, rule_dot, scale_dot = modes.or_none(tangents)
    dots = (tokens_dot.x, head_dot.w, tokens_dot.labels, head_dot.bias, rule_dot)
    dots = Bars(*(dot if jax.tree.leaves(dot) else None for dot in dots))
    wanted = Wanted(*(dot if dot is None else jax.tree.leaves(dot)[0].dtype for dot in dots))
    out, (_, bars, losses) = linear_schedules._gradients(plan, wanted, *primals)

    def product(dot, bar):
        return 0 if dot is None else (bar.astype(plan.wide) * dot.astype(plan.wide)).sum()

    def products(dots, bars):
        return sum(jax.tree.leaves(jax.tree.map(product, dots, bars, is_leaf=modes.is_none)))

    of_classes = products(dots._replace(rule=None), bars._replace(rule=None))
    loss_dot = sharding.psum(of_classes, plan.axis_name)
    loss_dot += products((dots.rule, scale_dot), (bars.rule, losses))
    none = jax.tree.map(lambda _: None, out[1])
    return out, modes.instantiated((loss_dot, none), out)
