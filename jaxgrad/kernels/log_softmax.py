r"""Logarithm of soft-max, and its backward rule.

With m = max x, e = exp(x - m), S = Σ e = 1 + excess and p = e / S:

    y_i          = (x_i - m) - log1p(excess)                           (1)
    ∂y_i / ∂x_j  = δ_ij - p_j              (p_j, the column's, not p_i)  (2)
    x̄            = ȳ - p Σ_k ȳ_k                                       (3)

For an entry w that wins its row, (1) is -log1p(excess), exact however far the others lie below.
There p_w is nearly 1 and (3) cancels; with 1 - p_w = (excess + 1 - e_w) / S, e_w = 1, it does not:

    x̄_w = ȳ_w (excess + 1 - e_w) / S - p_w Σ_{k≠w} ȳ_k                 (4)

A tangent loses ⟨p, ẋ⟩, of which the winner's is ẋ_w all but (1 - p_w) ẋ_w. So ẋ_w is taken off by
itself, and the rest with weights r that are p but for r_w = p_w - 1:

    ẏ_i          = (ẋ_i - ẋ_w) - Σ_k r_k ẋ_k        r_w = -excess / S  (5)

Residuals: x, and (m, excess) per row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.modes import Mode
from jaxgrad.numerics import Axis


@modes.public
def log_softmax(
    mode: Mode,
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: sharding.AxisName = None,
) -> Array:
    r"""Logarithm of soft-max along ``axis``, never by way of soft-max itself.

    .. math:: y_i = x_i - \log \sum_k e^{x_k}, \qquad \bar x = \bar y - p \sum_k \bar y_k

    A drop-in for :func:`jax.nn.log_softmax`. The value of a class that wins keeps its relative
    accuracy, where ``jax.nn`` rounds it to 0; a row without an entry above -inf gives -inf with
    gradient 0, where ``jax.nn`` gives NaN.

    Args:
      x: Logits, ``float[..., n, ...]``. 16-bit input is summed in float32; integers are promoted.
      axis: The axis or axes of the classes; None for all.
      where: ``bool``, broadcastable to ``x``: the entries that take part. The others give -inf
        with gradient 0, whatever they hold.
      axis_name: A mesh axis of the ``shard_map`` around the call, or the axis of a ``vmap``, that
        ``axis`` is cut over; ``x`` holds this shard's part, as long as any other's.

    Returns:
      Log-probabilities (natural logarithm, nats), with the shape and dtype of ``x``.

    Raises:
      TypeError: ``x`` is complex.
      ValueError: ``axis`` is out of bounds, ``where`` does not broadcast to ``x``, or ``x`` is not
        cut over ``axis_name``.

    Example:
      >>> print(log_softmax(jnp.array([30.0, 0.0])))
      [-9.357623e-14 -3.000000e+01]

    See also:
      :func:`softmax_cross_entropy_with_integer_labels`, the loss that needs one entry of it.
    """
    return _log_softmax_jit(mode, x, numerics.as_static(axis), where, axis_name)


@functools.partial(jax.jit, static_argnames=("mode", "axis", "axis_name"))
def _log_softmax_jit(mode, x, axis, where, axis_name):
    x = numerics.as_float(x, of="log_softmax")
    where = numerics.as_mask(where, x, of="log_softmax")
    axes = numerics.as_axes(axis, x, of="log_softmax")
    sharding.check("log_softmax", axis_name, cut={"x": x})
    log_softmax = modes.of(mode, _log_softmax, _log_softmax_twin)
    return log_softmax(axes, axis_name, *sharding.lift((x, where), axis_name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_softmax(
    axis: tuple[int, ...], axis_name: sharding.AxisName, x: Array, where: Array | None
) -> Array:
    return _forward(axis, axis_name, x, where)[0]


def _forward(axis, axis_name, x, where):  # (1)
    x = numerics.masked(x, where)
    m = numerics.row_max(x, axis)
    excess = numerics.row_excess(lambda: numerics.below_max(*numerics.apart(x, m)), axis)
    m, excess = sharding.merge(m, excess, axis_name)
    y = numerics.below_max(x, m) - numerics.log_sum(excess)
    y = numerics.masked(y, where)  # -inf as it is, but without the tangent of the sum
    return numerics.narrow(y, like=x), m, excess


def _fwd(axis, axis_name, x, where):
    y, *row = _forward(axis, axis_name, x, where)
    return y, (x, where, *checkpoint_name(row, "log_softmax"))


def _bwd(axis, axis_name, residuals, y_bar):
    x, where, *row = residuals
    m, excess = sharding.lift(row, axis_name)  # here, not in a branch that some shards do not take
    x = numerics.masked(x, where)
    y_bar = numerics.masked(y_bar, where, 0)
    won, inverse = numerics.won(excess), numerics.inverse_sum(excess)
    total = numerics.widen(y_bar).sum(axis, keepdims=True)

    def total_of_others():
        lost = jnp.sign(-numerics.below_max(x, m))  # 0 for the winner, else 1
        return (numerics.widen(y_bar) * lost).sum(axis, keepdims=True)

    others = numerics.if_any(won, total_of_others, lambda: total)
    total, others = sharding.psum((total, others), axis_name)
    x, m, y_bar, total = numerics.apart(*sharding.lift((x, m, y_bar, total)))
    e, y_bar_ = jnp.exp(numerics.below_max(x, m)), numerics.widen(y_bar)
    winner = y_bar_ * ((excess + (1 - e)) * inverse) - e * (inverse * others)  # (4)
    x_bar = jnp.where(e > jnp.where(won, 0.5, 2), winner, y_bar_ - e * (inverse * total))  # (3)
    return numerics.narrow(jnp.where(excess == -1, 0, x_bar), like=x), None


_log_softmax.defvjp(_fwd, _bwd)


def _jvp(axis, axis_name, residuals, x_dot, _):  # (5)
    x, where, *row = residuals
    m, excess = sharding.lift(row, axis_name)
    x_dot_ = numerics.widen(numerics.masked(x_dot, where, 0))
    x_, m_, _ = numerics.apart(x, m, excess, wide=True)
    e = jnp.exp(numerics.below_max(numerics.masked(x_, where), m_))
    wins = e > jnp.where(numerics.won(excess), 0.5, 2)
    rest = (jnp.where(wins, -excess, e) * x_dot_).sum(axis, keepdims=True)
    # After it, so that the transpose takes it off ȳ before.
    winner = jnp.where(wins, x_dot_, 0).sum(axis, keepdims=True)
    winner, rest = sharding.psum((winner, rest), axis_name)

    def spread(row):
        return numerics.narrow(jnp.broadcast_to(-row, x.shape), like=x)

    # Apart, so that the transpose sums ȳ without a wide copy of it.
    rows = sharding.lift((winner, rest * numerics.inverse_sum(excess)), axis_name)
    winner, rest = numerics.apart(*map(spread, rows))
    own = numerics.narrow(jnp.where(excess == -1, 0, x_dot_), like=x)
    return numerics.masked((own + winner) + rest, where, 0)


_log_softmax_twin = modes.custom_jvp(_fwd, _jvp, static=2)
