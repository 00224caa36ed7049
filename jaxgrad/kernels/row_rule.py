r"""The one row rule of cross-entropy: from logits and labels to the loss and its gradient.

With logits x, the transformed logits are z = c tanh(x / c) / T (soft-cap c, temperature T). With
targets t, smoothed to q = (1 - ε) t + ε s / v over the v valid classes, and s = Σ t = Σ q:

    p      = exp(z - L)            L = lse(z) = z_max + log S,   S = 1 + excess           (1)
    loss   = s L - ⟨q, z⟩ + ζ L²                                        ζ: z_loss       (2)
    H      = -⟨p, log p⟩ = L - ⟨p, z⟩                                                     (3)

Written in d = z - z_max ≤ 0, no two large numbers are subtracted:

    loss   = (1 - ε) Σ t_i (-d_i) + ε s/v Σ (-d_i) + s log S + ζ L²                     (4)
    H      = log S + Σ p_i (-d_i)                                                         (5)

Let l̄, L̄, H̄ be the cotangents of loss, lse and entropy, and a = l̄ s + L̄ + 2 ζ L l̄. Then

    z̄_i    = a p_i - l̄ q_i - H̄ p_i (d_i - log S + H)                                     (6)
    x̄_i    = z̄_i sech²(x_i / c) / T                                                       (7)
    t̄_i    = l̄ ((1 - ε)(-d_i) + ε/v Σ (-d_k) + log S)                                    (8)

In (6) p_i nearly 1 against q_i nearly s cancels. p_i - 1 = (e_i - 1 - excess) / S, e = exp d, does
not, so above p_i = 1/2 a p_i - l̄ q_i is taken as a (p_i - 1) + (a - l̄ q_i)             (9)

A row may come in parts, tiles or shards of the vocabulary: ``Part`` holds the sums of one relative
to its own maximum, ``merge`` and ``merge_shards`` add them. Sums keep their axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxgrad import numerics, sharding
from jaxgrad.kernels.tanh import cap_slope, sech2


class Rule(NamedTuple):
    """The options of a cross-entropy, scalars; None for one that is not in use."""

    label_smoothing: Any = None
    z_loss: Any = None
    temperature: Any = None
    soft_cap: Any = None


class Part(NamedTuple):
    """Sums over some classes of a row, in d relative to their own maximum; None: not asked for."""

    top: Array  # max x, before soft-cap and temperature
    excess: Array  # Σ exp d - 1
    gap: Any = None  # Σ t (-d)
    mass: Any = None  # Σ t; None: 1
    spread: Any = None  # Σ (-d) over valid classes
    count: Any = None  # valid classes
    moment: Any = None  # Σ exp(d) (-d)


def transform(rule: Rule, x: Array) -> Array:
    """z of x."""
    z = numerics.widen(x)
    if rule.soft_cap is not None:
        z = rule.soft_cap * jnp.tanh(z / rule.soft_cap)
    return z if rule.temperature is None else z / rule.temperature


def below(rule: Rule, x: Array, top: Array, where: Array | None) -> Array:
    """d = z - z_max, exactly 0 at the maximum; -inf where masked. x holds no NaN that is masked."""
    if rule.soft_cap is None:
        d = numerics.below_max(x, top)
    else:
        cap = rule.soft_cap
        d = cap * (jnp.tanh(numerics.widen(x) / cap) - jnp.tanh(top / cap))
    d = d if rule.temperature is None else d * (1 / rule.temperature)
    return numerics.masked(d, where)


def measure(
    rule: Rule,
    x: Array,
    t: Array | None,
    where: Array | None,
    axis: tuple[int, ...],
    entropy: bool = False,
    in_kernel: bool = False,
) -> Part:
    """The sums of (4) and (5) over the classes of ``x``; ``t``: their targets, or None."""
    top = numerics.row_max(numerics.masked(x, where), axis)
    x = numerics.masked(x, where, 0)
    shared = in_kernel or (t is None and numerics.is_wide(x))  # the exponential, by the gradient

    def d() -> Array:
        x_, top_, rule_ = (x, top, rule) if shared else _apart(rule, x, top)
        return below(rule_, x_, top_, where)

    part = Part(top, numerics.row_excess(d, axis, branches=not in_kernel))
    if t is not None:
        t = numerics.masked(numerics.widen(t), where, 0)

        def gap(multiply: Callable[..., Array]) -> Array:
            x_, top_, t_, rule_ = _apart(rule, x, top, t)  # shared, its scalars would be spread out
            return multiply(t_, -below(rule_, x_, top_, where)).sum(axis, keepdims=True)

        plain, safe = gap(jnp.multiply), lambda: gap(numerics.safe_multiply)
        gaps = numerics.if_any(jnp.isnan(plain), safe, lambda: plain)
        part = part._replace(gap=gaps, mass=t.sum(axis, keepdims=True))
    if rule.label_smoothing is not None:
        valid = jnp.broadcast_to(True if where is None else where, x.shape)
        part = part._replace(
            spread=jnp.where(valid, -d(), 0).sum(axis, keepdims=True),
            count=valid.sum(axis, keepdims=True, dtype=top.dtype),
        )
    if entropy:
        moment = numerics.safe_multiply(jnp.exp(d()), -d())
        part = part._replace(moment=moment.sum(axis, keepdims=True))
    return part


def _apart(rule, *arrays):  # each by itself: no tangent of 0 of the rule meets a d of -inf
    return *numerics.apart(*arrays, wide=True), *numerics.apart(rule, wide=True)


def merge(rule: Rule, a: Part, b: Part) -> Part:
    """The sums over two sets of classes of a row; where there is a ``gap``, with its ``mass``."""
    top = jnp.where(a.top >= b.top, a.top, b.top)  # with the derivative of the part that leads
    (z_a, a), (z_b, b) = _raised(rule, a, top), _raised(rule, b, top)
    _, excess = numerics.merge(z_a, a.excess, z_b, b.excess)
    sums = (None if j is None or k is None else j + k for j, k in zip(a[2:], b[2:], strict=True))
    return Part(top, excess, *sums)


def merge_shards(
    rule: Rule, part: Part, axis_name: sharding.AxisName, *more: Array | None
) -> tuple[Any, ...]:
    """The sums over the classes of all shards, each with a ``part``; and ``more`` sums."""
    if axis_name is None:
        return part, *more
    top = sharding.pmax(part.top, axis_name)
    z, part = _raised(rule, part, top)
    excess, sums, *more_sums = sharding.add_up(z, part.excess, axis_name, part[2:], *more)
    return Part(top, excess, *sums), *more_sums


def _raised(rule: Rule, part: Part, top: Array) -> tuple[Array, Part]:
    """z_max of a part less that of its row, whose maximum is ``top``; its sums in d of the row."""
    level = jnp.where(top == -jnp.inf, 0, top)
    empty = part.excess == -1
    rise = -below(rule, jnp.where(empty, level, part.top), level, None)  # an empty part has no sums

    def shifted(value, size):  # Σ size (-d), once d falls by the rise
        return None if value is None else value + numerics.safe_multiply(size, rise)

    moment = shifted(part.moment, 1 + part.excess)
    return jnp.where(empty, -jnp.inf, -rise), part._replace(
        gap=shifted(part.gap, part.mass),
        spread=shifted(part.spread, part.count),
        moment=None if moment is None else moment * jnp.exp(-rise),
    )


def log_sum_exp(rule: Rule, part: Part) -> Array:
    """L of (1); -inf for a row without a valid class above -inf."""
    empty = part.excess == -1
    z_max = transform(rule, jnp.where(empty, 0, part.top))
    return jnp.where(empty, -jnp.inf, numerics.log_sum_exp(z_max, part.excess))


def entropy(part: Part) -> Array:
    """H of (5)."""
    return numerics.log_sum(part.excess) + part.moment * numerics.inverse_sum(part.excess)


def loss(rule: Rule, part: Part) -> Array:
    """(4); 0 for a row without a valid class."""
    mass = 1 if part.mass is None else part.mass
    value = mass * numerics.log_sum(part.excess)
    if rule.label_smoothing is None:
        value += part.gap
    else:
        value += numerics.safe_multiply(1 - rule.label_smoothing, part.gap)
        value += numerics.safe_multiply(rule.label_smoothing * mass, _mean_gap(part))
    if rule.z_loss is not None:
        value += rule.z_loss * _finite_lse(rule, part) ** 2
    return value


def gradient(
    rule: Rule,
    x: Array,
    t: Array,
    where: Array | None,
    part: Part,
    loss_bar: Array,
    lse_bar: Array | None = None,
    entropy_bar: Array | None = None,
) -> Array:
    """z̄ of (6) and (9), for some classes of a row.

    Args:
      t: Targets of these classes: ``bool``, at most one a row, or a distribution.
      part: The sums of the whole row.
      loss_bar: l̄, the row's axis kept; likewise ``lse_bar`` and ``entropy_bar``.
    """
    l_bar = _unless_empty(part, loss_bar)
    a = _sum_of_gradient(rule, part, l_bar, lse_bar)
    a += l_bar if part.mass is None else l_bar * part.mass
    kept = l_bar if rule.label_smoothing is None else l_bar * (1 - rule.label_smoothing)

    d = below(rule, numerics.masked(x, where, 0), part.top, where)
    e, a_over_s = jnp.exp(d), a * numerics.inverse_sum(part.excess)
    ap, a_less_ap = a_over_s * e, a_over_s * ((e - 1) - part.excess)
    if t.dtype == bool:
        z_bar = jnp.where(t, a_less_ap + (a - kept), ap)
    else:
        kept = kept * numerics.masked(numerics.widen(t), where, 0)
        z_bar = jnp.where(e > (1 + part.excess) / 2, a_less_ap + (a - kept), ap - kept)  # (9)
    if rule.label_smoothing is not None:
        mass = 1 if part.mass is None else part.mass
        z_bar -= l_bar * rule.label_smoothing * numerics.safe_divide(mass, part.count)
    if entropy_bar is not None:
        p = e * numerics.inverse_sum(part.excess)
        h = d - numerics.log_sum(part.excess) + entropy(part)
        z_bar -= _unless_empty(part, entropy_bar) * numerics.safe_multiply(p, h)
    return numerics.masked(z_bar, where, 0)


def to_logits(rule: Rule, x: Array, where: Array | None, z_bar: Array) -> Array:
    """x̄ of (7), in the dtype of ``x``."""
    x_bar = z_bar
    if rule.soft_cap is not None:
        x_bar *= sech2(numerics.widen(numerics.masked(x, where, 0)) / rule.soft_cap)
    if rule.temperature is not None:
        x_bar *= 1 / rule.temperature
    return numerics.narrow(x_bar, like=x)


def to_targets(
    rule: Rule, x: Array, t: Array, where: Array | None, part: Part, loss_bar: Array
) -> Array:
    """t̄ of (8), in the dtype of ``t``."""
    gap = -below(rule, numerics.masked(x, where, 0), part.top, where)
    gap = numerics.masked(gap, where, 0)  # its inf times the 0 of a later derivative is NaN
    if rule.label_smoothing is not None:
        gap = numerics.safe_multiply(1 - rule.label_smoothing, gap)
        gap += numerics.safe_multiply(rule.label_smoothing, _mean_gap(part))
    t_bar = numerics.safe_multiply(loss_bar, gap + numerics.log_sum(part.excess))
    return numerics.narrow(numerics.masked(t_bar, where, 0), like=t)


def to_rule(rule: Rule, x: Array, where: Array | None, part: Part, z_bar: Array) -> Rule:
    """What some classes of a row add to the cotangents of temperature and soft-cap, by rows."""
    x = numerics.masked(x, where, 0)
    bar = Rule()
    total = functools.partial(numerics.sum_to, shape=part.top.shape)
    scale = 1 if rule.temperature is None else 1 / rule.temperature
    if rule.temperature is not None:
        gap = -below(rule, x, part.top, where)
        bar = bar._replace(temperature=scale * total(numerics.safe_multiply(z_bar, gap)))
    if rule.soft_cap is not None:
        slope = cap_slope(numerics.widen(x) / rule.soft_cap)
        bar = bar._replace(soft_cap=scale * total(z_bar * slope))
    return bar


def rows_to_rule(rule: Rule, part: Part, loss_bar: Array, lse_bar: Array | None = None) -> Rule:
    """What whole rows add to the cotangents of the rule: the rest of :func:`to_rule`."""
    l_bar = _unless_empty(part, loss_bar)
    bar = Rule()
    if rule.label_smoothing is not None:
        mass = 1 if part.mass is None else part.mass
        change = numerics.safe_multiply(l_bar, mass * _mean_gap(part) - part.gap)
        bar = bar._replace(label_smoothing=change)
    if rule.z_loss is not None:
        bar = bar._replace(z_loss=numerics.safe_multiply(l_bar, _finite_lse(rule, part) ** 2))
    if rule.temperature is not None:
        z_max = transform(rule, _unless_empty(part, part.top))
        total = _sum_of_gradient(rule, part, l_bar, lse_bar)
        bar = bar._replace(temperature=-numerics.safe_multiply(total, z_max) / rule.temperature)
    return bar


def _sum_of_gradient(rule, part, l_bar, lse_bar):  # Σ_i z̄_i = a - l̄ s
    total = jnp.zeros_like(l_bar) if lse_bar is None else _unless_empty(part, lse_bar)
    if rule.z_loss is not None:
        total += 2 * rule.z_loss * _finite_lse(rule, part) * l_bar
    return total


def _unless_empty(part, row):
    return jnp.where(part.excess == -1, 0, row)


def _finite_lse(rule, part):
    return _unless_empty(part, log_sum_exp(rule, part))


def _mean_gap(part):
    return numerics.safe_divide(part.spread, part.count)
