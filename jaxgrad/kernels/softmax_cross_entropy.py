r"""Soft-max cross-entropy from logits, with dense and with integer labels.

    l = s lse(x) - ⟨t, x⟩                          s = Σ t             (1)
    x̄ = l̄ (s σ(x) - t)                                                 (2)

(1) and (2) never divide by a probability, so both are finite for all finite x. The options and the
arithmetic that keeps every digit of (1) and (2) are the row rule's, in ``row_rule.py``; here it is
applied to whole rows. Residuals: logits, labels, and a few numbers per row, (max, excess) at least.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.kernels import row_rule, row_tangent
from jaxgrad.kernels.loss_options import add_rules, as_scalars, make_rule
from jaxgrad.kernels.row_rule import Part, Rule
from jaxgrad.modes import Mode
from jaxgrad.numerics import Axis


@modes.public
def softmax_cross_entropy(
    mode: Mode,
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    axis_name: sharding.AxisName = None,
) -> Array:
    r"""Cross-entropy of soft-max against a distribution of labels, from the logits.

    .. math:: l = s \log \sum_i e^{z_i} - \sum_i t_i z_i, \qquad
              \bar z = \bar l\,(s\,\sigma(z) - t), \qquad s = \sum_i t_i

    with :math:`z = \mathrm{soft\_cap}(x) / T`. A drop-in for ``optax.softmax_cross_entropy``, and
    finite wherever the logits are: a label of 0 on a logit of -inf counts 0, where optax gives NaN.

    Args:
      logits: x, ``float[..., v, ...]``.
      labels: Targets t, ``float``, broadcastable against ``logits``. They need not sum to one, and
        have a gradient.
      axis: The axis or axes of the v classes; None for all.
      where: ``bool``, of the shape of ``logits`` or of the losses: the entries that take part. The
        others have gradient 0, whatever they hold; a row without any has loss 0.
      label_smoothing: The part ε of each row of targets, in [0, 1], that is spread evenly over its
        valid classes.
      z_loss: ζ of a term :math:`\zeta\,(\log \sum_i e^{z_i})^2` added to each loss.
      temperature: T > 0, dividing the logits after the soft-cap.
      logit_soft_cap: Squash logits into (-cap, cap) by :func:`soft_cap`; None for not at all.
      axis_name: A mesh axis of the ``shard_map`` around the call, or the axis of a ``vmap``, that
        the classes are cut over; ``logits`` and ``labels`` hold this shard's classes, as many as
        any other's.

    Returns:
      Losses in nats, ``float[...]`` without ``axis``: float32 for 16-bit logits, else their dtype.

    Raises:
      TypeError: ``logits`` or ``labels`` is complex.
      ValueError: Shapes do not match, or an option is out of its range.

    Example:
      >>> logits = jnp.array([[1.0, -jnp.inf, 0.0], [2.0, 2.0, 2.0]])
      >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
      >>> [f"{loss:.4f}" for loss in softmax_cross_entropy(logits, labels)]
      ['0.3133', '1.0986']

    Source:
      Smoothing: Szegedy et al., 2016, arXiv:1512.00567, section 7. z-loss: Chowdhery et al., 2022,
      arXiv:2204.02311, section 5. Soft-cap: Gemma Team, 2024, arXiv:2408.00118, section 2.

    See also:
      :func:`softmax_cross_entropy_with_integer_labels` where one class is right,
      :func:`cross_entropy` where probabilities are given and not logits.
    """
    of = "softmax_cross_entropy"
    rule = make_rule(of, label_smoothing, z_loss, temperature, logit_soft_cap)
    axis = numerics.as_static(axis)
    return _dense_jit(mode, logits, labels, axis, where, rule, axis_name)


@modes.public
def softmax_cross_entropy_with_integer_labels(
    mode: Mode,
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis_name: sharding.AxisName = None,
) -> Array:
    r"""Cross-entropy of soft-max against the index of the right class, from the logits.

    .. math:: l = \log \sum_i e^{z_i} - z_y, \qquad \bar z_i = \bar l\,(\sigma(z)_i - \delta_{iy})

    with :math:`z = \mathrm{soft\_cap}(x) / T`. A drop-in for
    ``optax.softmax_cross_entropy_with_integer_labels``. The loss and the gradient of a confident
    prediction keep their relative accuracy, where optax rounds both to 0.

    Args:
      logits: x, ``float[..., v, ...]``.
      labels: Class indices y, ``int[...]``, the shape of ``logits`` without ``axis``. One outside
        [0, v) gives NaN for its loss and for the gradient of its row, and touches no other.
      axis: The axis of the v classes; a tuple numbers the classes in that order of axes.
      where: ``bool``, of the shape of ``logits`` or of the losses: the classes that take part. The
        others have gradient 0, whatever they hold; a row without any has loss 0, and a label at a
        class that takes no part has loss +inf.
      label_smoothing: The part ε of each target, in [0, 1], that is spread evenly over the valid
        classes.
      z_loss: ζ of a term :math:`\zeta\,(\log \sum_i e^{z_i})^2` added to each loss.
      temperature: T > 0, dividing the logits after the soft-cap.
      logit_soft_cap: Squash logits into (-cap, cap) by :func:`soft_cap`; None for not at all.
      ignore_index: The label of rows with loss 0 and gradient 0, whatever they hold. Static.
      axis_name: As for :func:`softmax_cross_entropy`, but ``labels`` are the same on all shards:
        they count all classes, not a shard's.

    Returns:
      Losses in nats, ``float[...]`` without ``axis``: float32 for 16-bit logits, else their dtype.

    Raises:
      TypeError: ``labels`` is not integer, or ``logits`` is complex.
      ValueError: Shapes do not match, or an option is out of its range.

    Example:
      >>> logits = jnp.array([[30.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
      >>> labels = jnp.array([0, 1, -1])
      >>> loss = softmax_cross_entropy_with_integer_labels(logits, labels, ignore_index=-1)
      >>> print(loss)
      [9.357623e-14 6.931472e-01 0.000000e+00]

    Source:
      As :func:`softmax_cross_entropy`, its twin for a distribution of labels.
    """
    of = "softmax_cross_entropy_with_integer_labels"
    rule = make_rule(of, label_smoothing, z_loss, temperature, logit_soft_cap)
    if ignore_index is not None:
        ignore_index = numerics.as_index(ignore_index, of, "ignore_index")
    axis = numerics.as_static(axis)
    return _integer_jit(mode, logits, labels, axis, where, rule, ignore_index, axis_name)


@functools.partial(jax.jit, static_argnames=("mode", "axis", "axis_name"))
def _dense_jit(mode, logits, labels, axis, where, rule, axis_name):
    of = "softmax_cross_entropy"
    x = numerics.as_float(logits, of, "logits")
    t = numerics.as_float(labels, of, "labels")
    x, t, axes = numerics.broadcast_labels(x, t, axis, of, "logits")
    where = numerics.as_row_mask(where, x, axes, of, "logits")
    rule = as_scalars(rule, numerics.widen(x).dtype, of)
    sharding.check(of, axis_name, cut={"logits": x, "labels": t})
    dense = modes.of(mode, _dense, _dense_twin, axis_name)
    return dense(axes, axis_name, *_lifted((x, t, where, rule), axis_name)).squeeze(axes)


@functools.partial(jax.jit, static_argnames=("mode", "axis", "ignore_index", "axis_name"))
def _integer_jit(mode, logits, labels, axis, where, rule, ignore_index, axis_name):
    of = "softmax_cross_entropy_with_integer_labels"
    x = numerics.as_float(logits, of, "logits")
    labels = numerics.as_labels(labels, of)
    axes = numerics.as_axes(axis, x, of, "logits")
    where = numerics.as_row_mask(where, x, axes, of, "logits")
    rows = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    sizes = zip(labels.shape, rows, strict=False)
    if labels.ndim != len(rows) or any(size not in (1, row) for size, row in sizes):
        raise ValueError(
            f"{of}: labels must be int{list(rows)} for logits of "
            f"{numerics.describe(x)} and axis {axis}, got {numerics.describe(labels)}"
        )
    if len(axes) != 1:
        order = tuple(a for a in range(x.ndim) if a not in axes) + axes
        if where is not None:
            where = jnp.broadcast_to(where, x.shape).transpose(order).reshape(*rows, -1)
        x, axes = x.transpose(order).reshape(*rows, -1), (len(rows),)
    (along,) = axes
    labels = jnp.expand_dims(jnp.broadcast_to(labels, rows), along)
    sharding.check(of, axis_name, cut={"logits": x}, whole={"labels": labels})
    rule = as_scalars(rule, numerics.widen(x).dtype, of)
    integer = modes.of(mode, _integer, _integer_twin, axis_name)
    arrays = _lifted((x, labels, where, rule), axis_name)
    return integer(along, ignore_index, axis_name, *arrays).squeeze(along)


def _lifted(arrays, axis_name):
    """All that is of classes lifted to the shards too, but not the rule, the last."""
    lifted = sharding.lift(arrays, axis_name)
    return *lifted[:-1], sharding.lift_rows(arrays[-1], lifted, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(
    axis: tuple[int, ...],
    axis_name: sharding.AxisName,
    x: Array,
    t: Array,
    where: Array | None,
    rule: Rule,
) -> Array:
    return _dense_forward(axis, axis_name, x, t, where, rule)[0]


def _dense_forward(axis, axis_name, x, t, where, rule):
    part = row_rule.measure(sharding.lift(rule, axis_name), x, t, where, axis)
    (part,) = row_rule.merge_shards(rule, part, axis_name)
    return row_rule.loss(rule, part), part


def _dense_fwd(axis, axis_name, x, t, where, rule):
    loss, part = _dense_forward(axis, axis_name, x, t, where, rule)
    return loss, (x, t, where, rule, _kept(rule, part))


def _dense_bwd(axis, axis_name, residuals, loss_bar):
    x, t, where, rule, part = residuals
    z_bar = row_rule.gradient(rule, x, t, where, part, loss_bar)
    return (
        row_rule.to_logits(rule, x, where, z_bar),
        row_rule.to_targets(rule, x, t, where, part, loss_bar),
        None,
        _rule_bar(axis_name, rule, x, where, part, loss_bar, z_bar),
    )


_dense.defvjp(_dense_fwd, _dense_bwd)


def _dense_jvp(axis, _, residuals, x_dot, t_dot, __, rule_dot):
    x, t, where, rule, part = residuals
    bars = (jnp.ones_like(part.top),)
    return row_tangent.of_whole(rule, x, t, where, part, bars, x_dot, t_dot, rule_dot)


_dense_twin = modes.custom_jvp(_dense_fwd, _dense_jvp, static=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _integer(
    axis: int,
    ignore_index: int | None,
    axis_name: sharding.AxisName,
    x: Array,
    labels: Array,
    where: Array | None,
    rule: Rule,
) -> Array:
    return _integer_forward(axis, ignore_index, axis_name, x, labels, where, rule)[0]


def _integer_forward(axis, ignore_index, axis_name, x, labels, where, rule):
    part = row_rule.measure(sharding.lift(rule, axis_name), x, None, where, (axis,))
    known, index = _places(x, labels, axis, axis_name)
    here = None
    if axis_name is None and not sharding.is_cut(x, axis):
        pick = functools.partial(jnp.take_along_axis, indices=index, axis=axis)
    else:
        hit = _hit(x, index, axis)
        here = hit.any(axis, keepdims=True)
        pick = lambda z: jnp.where(hit, z, 0).sum(axis, keepdims=True, dtype=z.dtype)
    valid = None if where is None else pick(jnp.broadcast_to(where, x.shape))
    gap = -row_rule.below(rule, pick(x), part.top, valid)
    some = None
    if where is not None:
        some = jnp.broadcast_to(where, x.shape).any(axis, keepdims=True).astype(gap.dtype)
    if axis_name is not None:
        part = part._replace(gap=jnp.where(here, gap, 0), mass=here.astype(gap.dtype))
        part, some = row_rule.merge_shards(rule, part, axis_name, some)
        gap, part = part.gap, part._replace(mass=None)
    if some is not None:
        some = some > 0
        gap, part = jnp.where(some, gap, 0), part._replace(mass=some.astype(gap.dtype))
    part = part._replace(gap=jnp.where(known, gap, jnp.nan))
    return _unless_ignored(row_rule.loss(rule, part), labels, ignore_index), part


def _places(x, labels, axis, axis_name):
    """Which labels are classes, and their places in ``x``, outside of it for another shard's."""
    first, classes = sharding.extent(axis_name, x.shape[axis])
    known = (labels >= 0) & (labels < classes)
    return known, jnp.where(known, labels, 0).astype(jnp.int32) - first


def _hit(x, index, axis):
    classes = jnp.arange(x.shape[axis], dtype=jnp.int32)
    classes = jnp.expand_dims(classes, [a for a in range(x.ndim) if a != axis])
    if sharding.is_cut(x, axis):
        classes += jnp.zeros_like(x, jnp.int32)  # which are cut as x is
    return classes == index


def _integer_fwd(axis, ignore_index, axis_name, x, labels, where, rule):
    loss, part = _integer_forward(axis, ignore_index, axis_name, x, labels, where, rule)
    return loss, (x, labels, where, rule, _kept(rule, part))


def _integer_bwd(axis, ignore_index, axis_name, residuals, loss_bar):
    (x, hit, where, rule, part), mend = _mended(axis, ignore_index, axis_name, residuals)
    z_bar = row_rule.gradient(rule, x, hit, where, part, mend(loss_bar))
    z_bar = _unless_ignored(z_bar, residuals[1], ignore_index)
    rule_bar = _rule_bar(axis_name, rule, x, where, part, mend(loss_bar), z_bar)
    return row_rule.to_logits(rule, x, where, z_bar), None, None, rule_bar


def _mended(axis, ignore_index, axis_name, residuals):
    """The residuals, with the class hit for the label, and what mends l̄: 0 ignored, NaN unknown."""
    x, labels, where, rule, part = residuals
    x, part = jax.tree.map(  # they may hold NaN there
        lambda z: _unless_ignored(z, labels, ignore_index), (x, part)
    )
    known, index = _places(x, labels, axis, axis_name)

    def mend(loss_bar):
        return _unless_ignored(jnp.where(known, loss_bar, jnp.nan), labels, ignore_index)

    return (x, _hit(x, index, axis), where, rule, part), mend


def _unless_ignored(value, labels, ignore_index):
    return value if ignore_index is None else jnp.where(labels == ignore_index, 0, value)


_integer.defvjp(_integer_fwd, _integer_bwd)


def _integer_jvp(axis, ignore_index, _, residuals, x_dot, __, ___, rule_dot):
    (x, hit, where, rule, part), mend = _mended(axis, ignore_index, None, residuals)
    bars = (mend(jnp.ones_like(part.top)),)
    x_dot = None if x_dot is None else _unless_ignored(x_dot, residuals[1], ignore_index)
    return row_tangent.of_whole(rule, x, hit, where, part, bars, x_dot, None, rule_dot)


_integer_twin = modes.custom_jvp(_integer_fwd, _integer_jvp, static=3)


def _kept(rule: Rule, part: Part) -> Part:  # the gap of the targets is needed for ε̄ alone
    return part if rule.label_smoothing is not None else part._replace(gap=None)


def _rule_bar(axis_name, rule, x, where, part, loss_bar, z_bar) -> Rule:
    classes = sharding.psum(row_rule.to_rule(rule, x, where, part, z_bar), axis_name)
    rows = row_rule.rows_to_rule(rule, part, loss_bar)
    return jax.tree.map(jnp.sum, add_rules(classes, rows))
