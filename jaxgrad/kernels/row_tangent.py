r"""The row rule of cross-entropy, pushed forward: the gradient of a row against its tangent.

    l̇ = Σ_i x̄_i ẋ_i + Σ_i t̄_i ṫ_i + ε̄ ε̇ + ζ̄ ζ̇ + T̄ Ṫ + c̄ ċ             at l̄ = 1        (1)

with the cotangents of ``row_rule.py``; likewise L̇ and Ḣ, at L̄ = 1 and H̄ = 1. The first two sums and
parts of Ṫ and ċ come class by class, the rest once a row.
"""

from typing import Any

from jax import Array

from jaxgrad import numerics, sharding
from jaxgrad.kernels import row_rule
from jaxgrad.kernels.row_rule import Part, Rule


def of_classes(
    rule: Rule,
    x: Array,
    t: Array,
    where: Array | None,
    part: Part,
    bars: tuple[Any, ...],
    x_dot: Array | None,
    t_dot: Array | None,
    rule_dot: Rule,
) -> Any:
    """What some classes of a row add to (1); ``bars``: l̄, L̄ and H̄, of which one is 1."""
    x, t = numerics.widen(x), t if t.dtype == bool else numerics.widen(t)
    z_bar = row_rule.gradient(rule, x, t, where, part, *bars)
    y_dot = _dot(row_rule.to_rule(rule, x, where, part, z_bar), rule_dot)
    if x_dot is not None:
        x_bar = row_rule.to_logits(rule, x, where, z_bar)
        y_dot += _total(x_bar, x_dot, where, part)
    if t_dot is not None:
        t_bar = row_rule.to_targets(rule, x, t, where, part, bars[0])
        y_dot += _total(t_bar, t_dot, where, part)
    return y_dot


def of_rows(rule: Rule, part: Part, bars: tuple[Any, ...], rule_dot: Rule) -> Any:
    """What whole rows add to (1): the rest."""
    return _dot(row_rule.rows_to_rule(rule, part, *bars[:2]), rule_dot)


def of_whole(axis_name: sharding.AxisName, rule: Rule, *row: Any) -> Array:
    """(1) of rows that come whole, or cut over shards; the arguments of :func:`of_classes`."""
    _, _, _, part, bars, _, _, rule_dot = row
    of_all = sharding.psum(of_classes(rule, *row), axis_name)
    return of_all + of_rows(rule, part, bars, rule_dot)


def _total(bar, dot, where, part):
    dot = numerics.widen(numerics.masked(dot, where, 0))
    return numerics.sum_to(bar * dot, part.top.shape)


def _dot(bar: Rule, dot: Rule) -> Any:
    return sum(a * b for a, b in zip(bar, dot, strict=True) if not (a is None or b is None))
