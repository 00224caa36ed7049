r"""Cross-entropy of probabilities against labels, and its backward rule.

    l           = -Σ_i t_i log z_i             0 log 0 = 0             (1)
    ∂l / ∂z_j   = -t_j / z_j        (the sum collapses to its j-th term)  (2)
    ∂l / ∂t_j   = -log z_j                                             (3)
    l̇           = Σ_j ż_j ∂l / ∂z_j + Σ_j ṫ_j ∂l / ∂t_j                (4)

(2) is not computable where z_j = 0. If t_j = 0 there, the term is absent from (1), and value and
gradient are 0; if t_j > 0, the value is +inf and the gradient -inf: the truth, not a clip. A
soft-max never is 0 in exact arithmetic, but underflows to it in floating point, where the chain
rule then meets 0 · inf. :func:`softmax_cross_entropy` starts from the logits and cannot fail.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.modes import Mode
from jaxgrad.numerics import Axis


@modes.public
def cross_entropy(
    mode: Mode, probs: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Cross-entropy of probabilities against a distribution of labels, per example.

    .. math:: l = -\sum_i t_i \log z_i, \qquad \bar z_j = -\bar l\, t_j / z_j

    Nothing is clipped: a label above 0 on a probability of 0 gives +inf with gradient -inf. If the
    probabilities come from :func:`softmax`, use :func:`softmax_cross_entropy` on the logits: where
    the soft-max underflowed to 0, its gradient meets this one in 0 · inf = NaN.

    Args:
      probs: Probabilities z, ``float[..., n, ...]``; they need not sum to one.
      labels: Target distribution t, broadcastable against ``probs``; integers are promoted.
      axis: The axis or axes of the classes; None for all.
      where: ``bool``, broadcastable to ``probs`` or of the shape of the result: the entries that
        take part. The others count 0, with gradient 0.

    Returns:
      Losses in nats, ``float[...]`` without ``axis``; float32 for 16-bit input. NaN where z < 0
      and t is not 0.

    Raises:
      TypeError: An argument is complex.
      ValueError: The shapes do not match, or ``axis`` is out of bounds.

    Example:
      >>> cross_entropy(jnp.array([0.5, 0.5, 0.0]), jnp.array([1.0, 0.0, 0.0])).round(4)
      Array(0.6931, dtype=float32)
    """
    return _cross_entropy_jit(mode, probs, labels, numerics.as_static(axis), where)


@functools.partial(jax.jit, static_argnames=("mode", "axis"))
def _cross_entropy_jit(mode, probs, labels, axis, where):
    z = numerics.as_float(probs, of="cross_entropy", name="probs")
    t = numerics.as_float(labels, of="cross_entropy", name="labels")
    z, t, axes = numerics.broadcast_labels(z, t, axis, of="cross_entropy", name="probs")
    where = numerics.as_row_mask(where, z, axes, of="cross_entropy", name="probs")
    cross_entropy = modes.of(mode, _cross_entropy, _cross_entropy_twin)
    return cross_entropy(axes, *sharding.lift((z, t, where)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(axis: tuple[int, ...], z: Array, t: Array, where: Array | None) -> Array:
    return _forward(axis, z, t, where)


def _forward(axis, z, t, where):  # (1)
    _, t_, divisor = _operands(z, t, where)
    return (t_ * -jnp.log(divisor)).sum(axis)


def _operands(z, t, where):
    z_ = numerics.widen(numerics.masked(z, where, 1))
    t_ = numerics.widen(numerics.masked(t, where, 0))
    z_ = jnp.where(z_ == 0, 0, jnp.where(z_ < 0, jnp.nan, z_))  # -0.0 is 0
    absent = (t_ == 0) & ~(z_ > 0)
    return z_, t_, jnp.where(absent, 1, z_)


def _fwd(axis, z, t, where):
    return _forward(axis, z, t, where), (z, t, where)


def _bwd(axis, residuals, l_bar):
    z, t, where = residuals
    z_, t_, divisor = _operands(z, t, where)
    l_bar = numerics.masked(jnp.expand_dims(l_bar, axis), where, 0)
    z_bar = numerics.safe_multiply(t_ * l_bar, -1 / divisor)  # (2)
    t_bar = numerics.safe_multiply(l_bar, -jnp.log(z_))  # (3)
    return numerics.narrow(z_bar, like=z), numerics.narrow(t_bar, like=t), None


_cross_entropy.defvjp(_fwd, _bwd)


def _jvp(axis, residuals, z_dot, t_dot, _):  # (4)
    z, t, where = residuals
    z_, t_, divisor = _operands(z, t, where)

    def total(tangent, slope):
        return (numerics.widen(numerics.masked(tangent, where, 0)) * slope).sum(axis)

    l_dot = 0 if z_dot is None else total(z_dot, numerics.safe_multiply(t_, -1 / divisor))
    return l_dot if t_dot is None else l_dot + total(t_dot, -jnp.log(z_))


_cross_entropy_twin = modes.custom_jvp(_fwd, _jvp, static=1)
