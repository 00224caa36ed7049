r"""Log-sum-exp along axes, with scaling factors, and its backward rule.

Without factors, m = max a and S = Σ exp(a - m) = 1 + excess:

    L = m + log1p(excess)                                              (1)
    ∂L/∂a_i = p_i = exp(a_i - m) / S                                   (2)

With factors b, m the maximum over b_i ≠ 0 and R = Σ b_i exp(a_i - m), which may be negative:

    L = m + log|R|                                                     (3)
    ∂L/∂a_i = b_i exp(a_i - m) / R                                     (4)
    ∂L/∂b_i = exp(a_i - m) / R            also where b_i = 0           (5)

Tangents are pushed forward by the same weights:

    L̇       = Σ_i ȧ_i ∂L/∂a_i + Σ_i ḃ_i ∂L/∂b_i                        (6)

The sign of R is constant almost everywhere: its cotangent is dropped. An empty row (no entry above
-inf) has L = -inf and gradient 0. Residuals: a, b and two numbers per row, (m, excess) or (m, R).
"""

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.modes import Mode
from jaxgrad.numerics import Axis


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: ArrayLike | None = None,
    *,
    axis_name: sharding.AxisName = None,
) -> Array: ...


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: ArrayLike | None = None,
    axis_name: sharding.AxisName = None,
) -> tuple[Array, Array]: ...


@modes.public
def logsumexp(
    mode: Mode,
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    axis_name: sharding.AxisName = None,
) -> Array | tuple[Array, Array]:
    r"""Logarithm of a sum of exponentials, without overflow.

    .. math:: L = \log \sum_i b_i e^{a_i}, \qquad \bar a_i = \bar L\, b_i e^{a_i - L}

    A drop-in for :func:`jax.nn.logsumexp`. The gradient of a row without an entry above -inf is
    0, where ``jax.nn`` gives NaN; the gradient to ``b`` is right also where ``b`` is 0.

    Args:
      a: Exponents, ``float[...]``. 16-bit input is summed in float32; integers are promoted.
        Complex input is handed to :func:`jax.nn.logsumexp` with JAX's own derivative.
      axis: The axis or axes to sum over; None for all.
      b: Factors of the exponentials, broadcastable to ``a``; they may be negative or 0.
      keepdims: Leave the summed axes in place with length 1.
      return_sign: Return ``(log|Σ|, sign Σ)``. Otherwise a negative sum gives NaN.
      where: ``bool``, broadcastable to ``a``: the entries that take part.
      axis_name: A mesh axis of the ``shard_map`` around the call, or the axis of a ``vmap``, that
        the sum is cut over; ``a`` holds this shard's part, as long as any other's.

    Returns:
      L, in the dtype of ``a``; with ``return_sign`` also the sign, -1, 0 or 1, of the same dtype.

    Raises:
      ValueError: ``axis`` is out of bounds, ``b`` or ``where`` does not broadcast to ``a``, or
        ``a`` is not cut over ``axis_name``.

    Example:
      >>> print((logsumexp(jnp.array([1000.0, 1000.0])) - 1000.0).round(3))
      0.693

    See also:
      :func:`log_softmax`, which subtracts it from every entry.
    """
    return _logsumexp_jit(
        mode, a, numerics.as_static(axis), b, keepdims, return_sign, where, axis_name
    )


@functools.partial(
    jax.jit, static_argnames=("mode", "axis", "keepdims", "return_sign", "axis_name")
)
def _logsumexp_jit(mode, a, axis, b, keepdims, return_sign, where, axis_name):
    a = jnp.asarray(a)
    if any(jnp.iscomplexobj(z) for z in (a, b)):
        if axis_name is not None:
            raise TypeError(f"logsumexp: a must be real with axis_name, got {numerics.describe(a)}")
        return jax.nn.logsumexp(a, axis, b, keepdims, return_sign, where)
    a = numerics.as_float(a, of="logsumexp", name="a")
    sharding.check("logsumexp", axis_name, cut={"a": a})
    if b is not None:
        a, b = _broadcast(a, numerics.as_float(b, of="logsumexp", name="b"))
    where = numerics.as_mask(where, a, of="logsumexp", name="a")
    axes = numerics.as_axes(axis, a, of="logsumexp", name="a")
    if b is None:
        logsumexp = modes.of(mode, _logsumexp, _logsumexp_twin)
        lse = logsumexp(axes, axis_name, *sharding.lift((a, where), axis_name))
        sign = jnp.where(jnp.isnan(lse), lse, (lse > -jnp.inf).astype(lse.dtype))
    else:
        scaled = modes.of(mode, _scaled, _scaled_twin)
        lse, sign = scaled(axes, axis_name, *sharding.lift((a, b, where), axis_name))
        if not return_sign:
            lse = jnp.where(sign < 0, jnp.nan, lse)
    if not keepdims:
        lse, sign = lse.squeeze(axes), sign.squeeze(axes)
    return (lse, sign) if return_sign else lse


def _broadcast(a, b):
    dtype = jnp.result_type(a, b)
    try:
        shape = jnp.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"logsumexp: b must broadcast to a of {numerics.describe(a)}, "
            f"got {numerics.describe(b)}"
        ) from None
    return tuple(jnp.broadcast_to(z.astype(dtype), shape) for z in (a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logsumexp(
    axis: tuple[int, ...], axis_name: sharding.AxisName, a: Array, where: Array | None
) -> Array:
    return _forward(axis, axis_name, a, where)[0]


def _forward(axis, axis_name, a, where):  # (1)
    a = numerics.masked(a, where)
    m = numerics.row_max(a, axis)
    excess = numerics.row_excess(lambda: numerics.below_max(*numerics.apart(a, m)), axis)
    m, excess = sharding.merge(m, excess, axis_name)
    return numerics.narrow(numerics.log_sum_exp(m, excess), like=a), m, excess


def _fwd(axis, axis_name, a, where):
    lse, *row = _forward(axis, axis_name, a, where)
    return lse, (a, where, *checkpoint_name(row, "logsumexp"))


def _share(residuals):  # (2)
    a, where, m, excess = residuals
    e = jnp.exp(numerics.below_max(numerics.masked(a, where), m))
    return e * numerics.inverse_sum(excess)


def _bwd(axis, axis_name, residuals, lse_bar):
    a_bar = numerics.widen(lse_bar) * _share(residuals)
    return numerics.narrow(a_bar, like=residuals[0]), None


_logsumexp.defvjp(_fwd, _bwd)


def _jvp(axis, axis_name, residuals, a_dot, _):  # (6)
    a_dot_ = numerics.widen(numerics.masked(a_dot, residuals[1], 0))
    lse_dot = (a_dot_ * _share(residuals)).sum(axis, keepdims=True)
    return numerics.narrow(sharding.psum(lse_dot, axis_name), like=a_dot)


_logsumexp_twin = modes.custom_jvp(_fwd, _jvp, static=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scaled(
    axis: tuple[int, ...], axis_name: sharding.AxisName, a: Array, b: Array, where: Array | None
) -> tuple[Array, Array]:
    return _scaled_forward(axis, axis_name, a, b, where)[0]


def _scaled_forward(axis, axis_name, a, b, where):  # (3)
    a, b_ = numerics.masked(a, where), numerics.widen(b)
    m = sharding.pmax(numerics.row_max(numerics.masked(a, b != 0), axis), axis_name)
    terms = numerics.safe_multiply(b_, jnp.exp(numerics.below_max(a, m)))
    r = sharding.psum(terms.sum(axis, keepdims=True), axis_name)
    lse = jnp.where(m == jnp.inf, m, m + jnp.log(jnp.abs(r)))
    return (numerics.narrow(lse, like=a), numerics.narrow(jnp.sign(r), like=a)), m, r


def _scaled_fwd(axis, axis_name, a, b, where):
    out, *row = _scaled_forward(axis, axis_name, a, b, where)
    return out, (a, b, where, *checkpoint_name(row, "logsumexp"))


def _scaled_share(residuals):  # (5)
    a, _, where, m, r = residuals
    e = jnp.exp(numerics.below_max(numerics.masked(a, where), m))
    return jnp.where(m == -jnp.inf, 0, e / jnp.where(m == -jnp.inf, 1, r))


def _scaled_bwd(axis, axis_name, residuals, cotangents):
    a, b, *_ = residuals
    b_bar = numerics.widen(cotangents[0]) * _scaled_share(residuals)
    a_bar = numerics.safe_multiply(numerics.widen(b), b_bar)  # (4)
    return numerics.narrow(a_bar, like=a), numerics.narrow(b_bar, like=b), None


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


def _scaled_jvp(axis, axis_name, residuals, a_dot, b_dot, _):  # (6)
    a, b, where, *_ = residuals
    share = _scaled_share(residuals)

    def total(tangent, slope):
        tangent = numerics.widen(numerics.masked(tangent, where, 0))
        return (tangent * slope).sum(axis, keepdims=True)

    lse_dot: Any = 0 if b_dot is None else total(b_dot, share)
    if a_dot is not None:
        lse_dot += total(a_dot, numerics.safe_multiply(numerics.widen(b), share))
    return numerics.narrow(sharding.psum(lse_dot, axis_name), like=a), None


_scaled_twin = modes.custom_jvp(_scaled_fwd, _scaled_jvp, static=2)
