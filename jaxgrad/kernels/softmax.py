r"""Soft-max, its Jacobian, and the product of a row with that Jacobian.

Write e = exp(x - max x): the shift cancels, so max x counts as a constant.

    y_i          = e_i / Σ_k e_k                                       (1)
    ∂y_i / ∂x_j  = y_i (δ_ij - y_j)        J = diag(y) - y yᵀ = Jᵀ     (2)
    x̄ = Jᵀ ȳ     = y ⊙ (ȳ - ⟨ȳ, y⟩)                                    (3)

(3) reads y alone: the output is the only residual, and the n × n matrix (2) is never formed.
Where one y_i is nearly 1, ȳ_i - ⟨ȳ, y⟩ cancels. Since J·1 = 0, (3) may be applied to
d = ȳ - ⟨ȳ, y⟩ in place of ȳ; what the first subtraction rounded away, the second puts back:

    x̄ = y ⊙ (d - ⟨y, d⟩)                   d = ȳ - ⟨ȳ, y⟩              (4)

A y rounded to 16 bits does not sum to 1, which (4) rests on; there x is kept with the maximum and
the sum of its row, and y is computed again. Where a row is empty (all -inf, or masked), y = 0 and
(4) gives x̄ = 0.

A tangent goes the same way, since J = Jᵀ: by (4) in transposed order, which JAX transposes back to
(4) for reverse mode. Twice it takes off what ẏ sums to, which is 0 as y sums to 1:

    ẏ = t - y Σ t            t = u - y Σ u            u = y ⊙ ẋ        (5)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.modes import Mode
from jaxgrad.numerics import Axis


@modes.public
def softmax(
    mode: Mode,
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: sharding.AxisName = None,
) -> Array:
    r"""Soft-max of ``x`` along ``axis``: non-negative, summing to one.

    .. math:: y_i = e^{x_i} / \sum_k e^{x_k}, \qquad
              \bar x = y \odot (\bar y - \langle \bar y, y \rangle)

    A drop-in for :func:`jax.nn.softmax`. A row without an entry above -inf gives 0 with gradient
    0, where ``jax.nn`` gives NaN.

    Args:
      x: Logits, ``float[..., n, ...]``. 16-bit input is summed in float32; integers are promoted.
      axis: The axis or axes that sum to one; None for all.
      where: ``bool``, broadcastable to ``x``: the entries that take part. The others give 0 with
        gradient 0, whatever they hold.
      axis_name: A mesh axis of the ``shard_map`` around the call, or the axis of a ``vmap``, that
        ``axis`` is cut over; ``x`` holds this shard's part, as long as any other's.

    Returns:
      Probabilities, with the shape and dtype of ``x``.

    Raises:
      TypeError: ``x`` is complex.
      ValueError: ``axis`` is out of bounds, ``where`` does not broadcast to ``x``, or ``x`` is not
        cut over ``axis_name``.

    Example:
      >>> softmax(jnp.array([0.0, jnp.log(3.0), -jnp.inf])).round(2)
      Array([0.25, 0.75, 0.  ], dtype=float32)

    See also:
      :func:`log_softmax` where the logarithm is wanted, :func:`softmax_cross_entropy` for a loss.
    """
    return _softmax_jit(mode, x, numerics.as_static(axis), where, axis_name)


@functools.partial(jax.jit, static_argnames=("mode", "axis", "axis_name"))
def _softmax_jit(mode, x, axis, where, axis_name):
    x = numerics.as_float(x, of="softmax")
    where = numerics.as_mask(where, x, of="softmax")
    axes = numerics.as_axes(axis, x, of="softmax")
    sharding.check("softmax", axis_name, cut={"x": x})
    softmax = modes.of(mode, _softmax, _softmax_twin)
    return softmax(axes, axis_name, *sharding.lift((x, where), axis_name))


@functools.partial(jax.jit, static_argnames="axis")
def softmax_vjp(y: ArrayLike, y_bar: ArrayLike, axis: Axis = -1) -> Array:
    r"""A cotangent through soft-max, from its output alone: O(n), the Jacobian never formed.

    .. math:: \bar x = y \odot (\bar y - \langle \bar y, y \rangle)

    The Jacobian is symmetric, so the same product pushes a tangent forward. Differentiated by
    ``y``, the product is right along directions that leave the sum of a row as it is, for it
    rests on that sum being 1.

    Args:
      y: Output of :func:`softmax`, ``float[..., n, ...]``: every row sums to one, or is 0.
      y_bar: Cotangent (or tangent), of the shape of ``y``.
      axis: The axis or axes that ``y`` sums to one along; None for all.

    Returns:
      The cotangent (or tangent) of x (or y), with the shape and dtype of ``y``.

    Raises:
      TypeError: An argument is complex.
      ValueError: The shapes differ, or ``axis`` is out of bounds.

    Example:
      >>> softmax_vjp(jnp.array([0.25, 0.75]), jnp.array([4.0, 0.0]))
      Array([ 0.75, -0.75], dtype=float32)
    """
    y = numerics.as_float(y, of="softmax_vjp", name="y")
    y_bar = numerics.as_float(y_bar, of="softmax_vjp", name="y_bar")
    if y.shape != y_bar.shape:
        raise ValueError(
            f"softmax_vjp: y_bar must have the shape of y, {numerics.describe(y)}, "
            f"got {numerics.describe(y_bar)}"
        )
    axes = numerics.as_axes(axis, y, of="softmax_vjp", name="y")
    x_bar = _vjp(lambda *_: (numerics.widen(y), numerics.widen(y_bar)), axes)
    return numerics.narrow(x_bar, like=y)


@functools.partial(jax.jit, static_argnames="axis")
def softmax_jacobian(x: ArrayLike, axis: int = -1) -> Array:
    r"""The matrix of all partial derivatives of soft-max, one per row of ``x``.

    .. math:: J = \operatorname{diag}(y) - y y^\top

    J is symmetric and its rows sum to 0: the diagonal is computed as minus the sum of the others,
    which keeps its digits where :math:`1 - y_i` would cancel. To multiply by J use
    :func:`softmax_vjp`, which never forms it.

    Args:
      x: Logits, ``float[..., n, ...]``.
      axis: The axis of length n.

    Returns:
      ``float[..., n, n]``, the other axes of ``x`` first, in the dtype of ``x``.

    Raises:
      TypeError: ``x`` is complex.
      ValueError: ``axis`` is out of bounds.

    Example:
      >>> softmax_jacobian(jnp.log(jnp.array([1.0, 3.0]))).round(4)
      Array([[ 0.1875, -0.1875],
             [-0.1875,  0.1875]], dtype=float32)
    """
    x = numerics.as_float(x, of="softmax_jacobian")
    (axis,) = numerics.as_axes(axis, x, of="softmax_jacobian")
    y = jnp.moveaxis(_forward((axis,), None, numerics.widen(x), None)[0], axis, -1)
    others = ~jnp.eye(y.shape[-1], dtype=bool)
    products = jnp.where(others, y[..., :, None] * y[..., None, :], 0)
    diagonal = jnp.where(others, 0, products.sum(-1)[..., None])
    return numerics.narrow(diagonal - products, like=x)  # (2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(
    axis: tuple[int, ...], axis_name: sharding.AxisName, x: Array, where: Array | None
) -> Array:
    return _forward(axis, axis_name, x, where)[0]


def _forward(axis, axis_name, x, where):  # (1)
    x = numerics.masked(x, where)
    m = sharding.pmax(numerics.row_max(x, axis), axis_name)
    if numerics.is_wide(x) and axis_name is None:
        return _at_once(axis, x, m)
    below = numerics.below_max(*numerics.apart(*sharding.lift((x, m))))
    s = jnp.exp(below).sum(axis, keepdims=True)
    s = sharding.psum(s, axis_name)
    return numerics.narrow(_share(x, m, s), like=x), m, s


def _at_once(axis, x, m):
    """The same, but XLA's CPU takes the maximum and the exponential in one pass over ``x``."""
    e = jnp.exp(x - m)  # for that, with nothing in between, and m of no other use
    s = e.sum(axis, keepdims=True)
    return numerics.without_empty(e * (1 / s), s, x, axis), m, s


def _share(x, m, s):
    return jnp.exp(numerics.below_max(x, m)) * jnp.where(s == 0, 0, 1 / jnp.where(s == 0, 1, s))


def _fwd(axis, axis_name, x, where):
    y, m, s = checkpoint_name(_forward(axis, axis_name, x, where), "softmax")
    return y, ((y,) if numerics.is_wide(x) else (x, m, s), where)


def _bwd(axis, axis_name, residuals, y_bar):
    kept, where = residuals
    y_bar = numerics.masked(y_bar, where, 0)

    def operands(*rows):
        y_bar_, *again = numerics.apart(*sharding.lift((y_bar, *kept, *rows)))
        if numerics.is_wide(y_bar):
            return again[0], y_bar_
        x, m, s = again[:3]
        return _share(numerics.masked(x, where), m, s), numerics.widen(y_bar_)

    return numerics.narrow(_vjp(operands, axis, axis_name), like=y_bar), None


# ``operands(*rows)`` gives y and ȳ, computed anew for a consumer that follows ``rows``.
def _vjp(  # (4)
    operands: Callable[..., tuple[Array, Array]],
    axis: tuple[int, ...],
    axis_name: sharding.AxisName = None,
) -> Array:
    y, y_bar = operands()
    inner = sharding.psum((y_bar * y).sum(axis, keepdims=True), axis_name)
    y, y_bar = operands(inner)
    rest = sharding.psum(((y_bar - inner) * y).sum(axis, keepdims=True), axis_name)
    y, y_bar = operands(rest)
    return y * ((y_bar - inner) - rest)


_softmax.defvjp(_fwd, _bwd)


def _jvp(axis, axis_name, residuals, x_dot, _):  # (5)
    kept, where = residuals

    def y():
        if numerics.is_wide(x_dot):
            return kept[0]
        x, m, s = numerics.apart(*sharding.lift(kept))
        return _share(numerics.masked(x, where), m, s)

    def total(u):
        return sharding.psum(u.sum(axis, keepdims=True), axis_name)

    u = y() * numerics.widen(numerics.masked(x_dot, where, 0))
    t = u - y() * total(u)
    return numerics.narrow(t - y() * total(t), like=x_dot)


_softmax_twin = modes.custom_jvp(_fwd, _jvp, static=2)
