r"""Log-sum-exp along axes, with scaling factors, and its backward rule.

Without factors, m = max a and S = Σ exp(a - m) = 1 + excess:

    L = m + log1p(excess)                                              (1)
    ∂L/∂a_i = p_i = exp(a_i - m) / S                                   (2)

With factors b, m the maximum over b_i ≠ 0 and R = Σ b_i exp(a_i - m), which may be negative:

    L = m + log|R|                                                     (3)
    ∂L/∂a_i = b_i exp(a_i - m) / R                                     (4)
    ∂L/∂b_i = exp(a_i - m) / R            also where b_i = 0           (5)

The sign of R is constant almost everywhere: its cotangent is dropped. An empty row (no entry above
-inf) has L = -inf and gradient 0. Residuals: a, b and two numbers per row, (m, excess) or (m, R).
"""

import functools
from typing import Literal, cast, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxgrad import numerics, sharding
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


def logsumexp(
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
    return _logsumexp_jit(a, numerics.as_static(axis), b, keepdims, return_sign, where, axis_name)


@functools.partial(jax.jit, static_argnames=("axis", "keepdims", "return_sign", "axis_name"))
def _logsumexp_jit(a, axis, b, keepdims, return_sign, where, axis_name):
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
        lse = cast(Array, _logsumexp(axes, axis_name, *sharding.lift((a, where), axis_name)))
        sign = jnp.where(jnp.isnan(lse), lse, (lse > -jnp.inf).astype(lse.dtype))
    else:
        arrays = sharding.lift((a, b, where), axis_name)
        lse, sign = cast(tuple[Array, Array], _scaled(axes, axis_name, *arrays))
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
    lse, m, excess = _forward(axis, axis_name, a, where)
    return lse, (a, where, m, excess)


def _bwd(axis, axis_name, residuals, lse_bar):  # (2)
    a, where, m, excess = residuals
    e = jnp.exp(numerics.below_max(numerics.masked(a, where), m))
    p = e * numerics.inverse_sum(excess)
    return numerics.narrow(numerics.widen(lse_bar) * p, like=a), None


_logsumexp.defvjp(_fwd, _bwd)


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
    out, m, r = _scaled_forward(axis, axis_name, a, b, where)
    return out, (a, b, where, m, r)


def _scaled_bwd(axis, axis_name, residuals, cotangents):
    a, b, where, m, r = residuals
    lse_bar = numerics.widen(cotangents[0])
    share = jnp.exp(numerics.below_max(numerics.masked(a, where), m)) / jnp.where(
        m == -jnp.inf, 1, r
    )
    b_bar = lse_bar * jnp.where(m == -jnp.inf, 0, share)  # (5)
    a_bar = numerics.safe_multiply(numerics.widen(b), b_bar)  # (4)
    return numerics.narrow(a_bar, like=a), numerics.narrow(b_bar, like=b), None


_scaled.defvjp(_scaled_fwd, _scaled_bwd)
