r"""Hyperbolic tangent and soft-cap, and their backward rules.

    y      = tanh x                                                    (1)
    ∂y/∂x  = 1 - y²  = sech² x = 4 e / (1 + e)²      e = exp(-2|x|)    (2)
    x̄      = ȳ sech² x                     ẏ = ẋ sech² x               (3)

1 - y² (the square of the value, not tanh of tanh) cancels where y is nearly ±1; the last form of
(2) does not, so x is the residual and not y. A soft-cap is a tanh of height and width c:

    y      = c tanh u                                u = x / c         (4)
    ∂y/∂x  = sech² u                                                   (5)
    ∂y/∂c  = tanh u - u sech² u                                        (6)

(6) cancels near 0, where a series without a negative term takes its place:

    ∂y/∂c  = sech² u (½ sinh 2u - u) = sech² u Σ_{k≥1} 4^k u^(2k+1) / (2k+1)!            (7)

It goes to ±1 at ±inf, where u is clipped so that u sech² u is 0 and not inf · 0. A tangent is

    ẏ      = ẋ ∂y/∂x + ċ ∂y/∂c                                         (8)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.modes import Mode


@modes.public
def tanh(mode: Mode, x: ArrayLike) -> Array:
    r"""Hyperbolic tangent, with a derivative that keeps its digits in saturation.

    .. math:: y = \tanh x, \qquad \bar x = \bar y\,\operatorname{sech}^2 x

    A drop-in for :func:`jax.numpy.tanh`, whose derivative :math:`1 - y^2` has no digits left
    beyond :math:`|x| \approx 8` in float32 and :math:`|x| \approx 3` in bfloat16.

    Args:
      x: ``float[...]``; integers are promoted. Complex input is handed to :func:`jax.numpy.tanh`
        with JAX's own derivative.

    Returns:
      tanh of each element, with the shape and dtype of ``x``.

    Example:
      >>> print(f"{jax.grad(tanh)(12.0):.4e}, {jax.grad(jnp.tanh)(12.0):.4e}")
      1.5101e-10, 0.0000e+00
    """
    return _tanh_jit(mode, x)


@functools.partial(jax.jit, static_argnames="mode")
def _tanh_jit(mode, x):
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.tanh(x)
    return modes.of(mode, _tanh, _tanh_twin)(numerics.as_float(x, of="tanh"))


@modes.public
def soft_cap(mode: Mode, x: ArrayLike, cap: ArrayLike) -> Array:
    r"""Squash ``x`` smoothly into (-cap, cap), leaving small values as they are.

    .. math:: y = c \tanh(x / c), \qquad \bar x = \bar y\,\operatorname{sech}^2 u, \qquad
              \bar c = \sum \bar y\,(\tanh u - u \operatorname{sech}^2 u), \quad u = x / c

    Args:
      x: ``float[...]``, in the units of ``cap``; integers are promoted.
      cap: The bound, ``float[]`` or broadcastable to ``x``, above 0. It may be traced and has a
        gradient of its own.

    Returns:
      The capped values, with the shape and dtype of ``x``.

    Raises:
      TypeError: An argument is complex.
      ValueError: ``cap`` is not above 0 (where its value is known), or does not broadcast to ``x``.

    Example:
      >>> soft_cap(jnp.array([1.0, 100.0, jnp.inf]), 30.0).round(2)
      Array([ 1.  , 29.92, 30.  ], dtype=float32)

    Source:
      Gemma 2 (Gemma Team, 2024, arXiv:2408.00118), section 2, "Logit soft-capping".

    See also:
      ``logit_soft_cap`` of :func:`softmax_cross_entropy_with_integer_labels`, the two in one.
    """
    numerics.check_positive(cap, of="soft_cap", name="cap")
    return _soft_cap_jit(mode, x, cap)


@functools.partial(jax.jit, static_argnames="mode")
def _soft_cap_jit(mode, x, cap):
    x = numerics.as_float(x, of="soft_cap")
    cap = numerics.as_float(cap, of="soft_cap", name="cap").astype(numerics.widen(x).dtype)
    if not numerics.broadcasts(cap, x):
        raise ValueError(
            f"soft_cap: cap must broadcast to x of {numerics.describe(x)}, "
            f"got {numerics.describe(cap)}"
        )
    soft_cap = modes.of(mode, _soft_cap, _soft_cap_twin)
    return soft_cap(*sharding.lift((x, cap.reshape((1,) * (x.ndim - cap.ndim) + cap.shape))))


@jax.custom_vjp
def _tanh(x: Array) -> Array:
    return _forward(x)


def _forward(x):  # (1)
    return numerics.narrow(jnp.tanh(numerics.widen(x)), like=x)


def _fwd(x):
    return _forward(x), x


def _bwd(x, y_bar):  # (3)
    x_bar = numerics.widen(y_bar) * sech2(numerics.widen(x))
    return (numerics.narrow(x_bar, like=x),)


def sech2(x: Array) -> Array:
    """(2); a choice of sign, unlike |x|, leaves the derivatives of every order right at 0."""
    e = jnp.exp(jnp.where(x < 0, 2 * x, -2 * x))
    return 4 * e / ((1 + e) * (1 + e))


_tanh.defvjp(_fwd, _bwd)


def _jvp(x, x_dot):  # (3), symmetric
    return _bwd(x, x_dot)[0]


_tanh_twin = modes.custom_jvp(_fwd, _jvp)


@jax.custom_vjp
def _soft_cap(x: Array, cap: Array) -> Array:
    return _soft_cap_forward(x, cap)


def _soft_cap_forward(x, cap):  # (4)
    return numerics.narrow(cap * jnp.tanh(numerics.widen(x) / cap), like=x)


def _soft_cap_fwd(x, cap):
    return _soft_cap_forward(x, cap), (x, cap)


def _soft_cap_bwd(residuals, y_bar):
    x, cap = residuals
    y_bar_ = numerics.widen(y_bar)
    x_bar = numerics.narrow(y_bar_ * _slope(x, cap), like=x)
    return x_bar, numerics.sum_to(y_bar_ * cap_slope(numerics.widen(x) / cap), cap.shape)


def _slope(x, cap):  # (5)
    u = numerics.widen(x) / cap
    return sech2(u) * (1 - 2 * jnp.tanh(u) * _remainder(numerics.widen(x), u, cap))


def _remainder(x, u, cap):
    """x / cap - u, which the rounding of u lost: far out, sech² u feels it |u| times over."""
    half = (jnp.finfo(u.dtype).nmant - 1) // 2  # and a leading 1: products of two are exact
    exponent = jnp.finfo(u.dtype).nexp
    u_high, cap_high = (lax.reduce_precision(a, exponent, half) for a in (u, cap))
    u_low, cap_low = u - u_high, cap - cap_high
    rest = (x - u_high * cap_high) - (u_high * cap_low + u_low * cap_high) - u_low * cap_low
    return lax.stop_gradient(jnp.where(jnp.isfinite(rest), rest, 0) / cap)


def cap_slope(u: Array) -> Array:
    """(6); (7) below |u| = 3/2."""
    near = jnp.abs(u) < 1.5
    v, w = jnp.where(near, u, 0), jnp.clip(jnp.where(near, 2, u), -400, 400)
    series = functools.reduce(lambda sum_, c: sum_ * (v * v) + c, _CAP_SERIES)
    return jnp.where(near, v * v * v * series * sech2(v), jnp.tanh(w) - w * sech2(w))


_CAP_SERIES = [4.0**k / math.factorial(2 * k + 1) for k in range(15, 0, -1)]

_soft_cap.defvjp(_soft_cap_fwd, _soft_cap_bwd)


def _soft_cap_jvp(residuals, x_dot, cap_dot):  # (8)
    x, cap = residuals
    y_dot: Any = 0 if x_dot is None else numerics.widen(x_dot) * _slope(x, cap)
    y_dot += 0 if cap_dot is None else cap_dot * cap_slope(numerics.widen(x) / cap)
    return numerics.narrow(y_dot, like=x)


_soft_cap_twin = modes.custom_jvp(_soft_cap_fwd, _soft_cap_jvp)
