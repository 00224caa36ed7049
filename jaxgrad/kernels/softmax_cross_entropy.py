r"""Soft-max cross-entropy from logits, with dense labels.

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
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.kernels import row_rule, row_tangent
from jaxgrad.kernels.loss_options import as_scalars, kept, lifted, make_rule, to_options
from jaxgrad.kernels.row_rule import Rule
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


@functools.partial(jax.jit, static_argnames=("mode", "axis", "axis_name"))
def _dense_jit(mode, logits, labels, axis, where, rule, axis_name):
    of = "softmax_cross_entropy"
    x = numerics.as_float(logits, of, "logits")
    t = numerics.as_float(labels, of, "labels")
    x, t, axes = numerics.broadcast_labels(x, t, axis, of, "logits")
    where = numerics.as_row_mask(where, x, axes, of, "logits")
    rule = as_scalars(rule, numerics.widen(x).dtype, of)
    sharding.check(of, axis_name, cut={"logits": x, "labels": t})
    dense = modes.of(mode, _dense, _dense_twin)
    return dense(axes, axis_name, *lifted((x, t, where, rule), axis_name)).squeeze(axes)


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
    part = checkpoint_name(kept(rule, part), "softmax_cross_entropy")
    return loss, (x, t, where, rule, part)


def _dense_bwd(axis, axis_name, residuals, loss_bar):
    x, t, where, rule, part = residuals
    z_bar = row_rule.gradient(rule, x, t, where, part, loss_bar)
    return (
        row_rule.to_logits(rule, x, where, z_bar),
        row_rule.to_targets(rule, x, t, where, part, loss_bar),
        None,
        to_options(axis_name, rule, x, where, part, loss_bar, z_bar),
    )


_dense.defvjp(_dense_fwd, _dense_bwd)


def _dense_jvp(_, axis_name, residuals, x_dot, t_dot, __, rule_dot):
    x, t, where, rule, part = residuals
    bars = (jnp.ones_like(part.top),)
    dots = (x_dot, t_dot, rule_dot)
    return row_tangent.of_whole(axis_name, rule, x, t, where, part, bars, *dots)


_dense_twin = modes.custom_jvp(_dense_fwd, _dense_jvp, static=2)
