r"""Soft-max cross-entropy from logits, with integer labels.

    l = lse(x) - x_k                                                   (1)
    x̄ = l̄ (σ(x) - e_k)                                                 (2)

It is ``softmax_cross_entropy.py`` with t = e_k, which is never formed. Where the logits are whole,
x_k is taken from its place; where they are cut over a mesh axis, the shards that do not hold it
give 0 to a sum, and nothing of the size of a row is sent.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.kernels import row_rule, row_tangent
from jaxgrad.kernels.loss_options import as_scalars, kept, lifted, make_rule, to_options
from jaxgrad.kernels.row_rule import Rule
from jaxgrad.modes import Mode

OF = "softmax_cross_entropy_with_integer_labels"


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
    rule = make_rule(OF, label_smoothing, z_loss, temperature, logit_soft_cap)
    if ignore_index is not None:
        ignore_index = numerics.as_index(ignore_index, OF, "ignore_index")
    static = (numerics.as_static(axis), ignore_index, axis_name)
    return _integer_jit(mode, logits, labels, where, rule, *static)


@functools.partial(jax.jit, static_argnames=("mode", "axis", "ignore_index", "axis_name"))
def _integer_jit(mode, logits, labels, where, rule, axis, ignore_index, axis_name):
    x = numerics.as_float(logits, OF, "logits")
    labels = numerics.as_labels(labels, OF)
    axes = numerics.as_axes(axis, x, OF, "logits")
    where = numerics.as_row_mask(where, x, axes, OF, "logits")
    rows = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    sizes = zip(labels.shape, rows, strict=False)
    if labels.ndim != len(rows) or any(size not in (1, row) for size, row in sizes):
        raise ValueError(
            f"{OF}: labels must be int{list(rows)} for logits of "
            f"{numerics.describe(x)} and axis {axis}, got {numerics.describe(labels)}"
        )
    if len(axes) != 1:
        order = tuple(a for a in range(x.ndim) if a not in axes) + axes
        if where is not None:
            where = jnp.broadcast_to(where, x.shape).transpose(order).reshape(*rows, -1)
        x, axes = x.transpose(order).reshape(*rows, -1), (len(rows),)
    (along,) = axes
    labels = jnp.expand_dims(jnp.broadcast_to(labels, rows), along)
    sharding.check(OF, axis_name, cut={"logits": x}, whole={"labels": labels})
    rule = as_scalars(rule, numerics.widen(x).dtype, OF)
    integer = modes.of(mode, _integer, _integer_twin)
    arrays = lifted((x, labels, where, rule), axis_name)
    return integer(along, ignore_index, axis_name, *arrays).squeeze(along)


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
    if axis_name is None and not sharding.is_cut(x, axis):
        pick = functools.partial(jnp.take_along_axis, indices=index, axis=axis)
    else:
        hit = _hit(x, index, axis)
        pick = lambda z: jnp.where(hit, z, 0).sum(axis, keepdims=True, dtype=z.dtype)
    valid = None if where is None else pick(jnp.broadcast_to(where, x.shape))
    gap = -row_rule.below(rule, pick(x), part.top, valid)
    some = None
    if where is not None:
        some = jnp.broadcast_to(where, x.shape).any(axis, keepdims=True).astype(gap.dtype)
    if axis_name is not None:
        here = _hit(x, index, axis).any(axis, keepdims=True)
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
    part = checkpoint_name(kept(rule, part), OF)
    return loss, (x, labels, where, rule, part)


def _integer_bwd(axis, ignore_index, axis_name, residuals, loss_bar):
    (x, hit, where, rule, part), mend = _mended(axis, ignore_index, axis_name, residuals)
    z_bar = row_rule.gradient(rule, x, hit, where, part, mend(loss_bar))
    z_bar = _unless_ignored(z_bar, residuals[1], ignore_index)
    rule_bar = to_options(axis_name, rule, x, where, part, mend(loss_bar), z_bar)
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


def _integer_jvp(axis, ignore_index, axis_name, residuals, x_dot, _, __, rule_dot):
    (x, hit, where, rule, part), mend = _mended(axis, ignore_index, axis_name, residuals)
    bars = (mend(jnp.ones_like(part.top)),)
    x_dot = None if x_dot is None else _unless_ignored(x_dot, residuals[1], ignore_index)
    dots = (x_dot, None, rule_dot)
    return row_tangent.of_whole(axis_name, rule, x, hit, where, part, bars, *dots)


_integer_twin = modes.custom_jvp(_integer_fwd, _integer_jvp, static=3)
