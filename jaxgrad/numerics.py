r"""What every kernel means by a maximum, a sum of exponentials, a mask and an infinity.

A row x is held as two numbers per row, its maximum and the *excess* of its sum over one:

    m = max x        e_i = exp(x_i - m)        S = Σ e_i        excess = S - 1        (1)
    lse(x) = m + log1p(excess)                 σ_i = e_i / (1 + excess)               (2)

Where one entry wins, S is 1 plus a few tiny terms and S - 1 has no digits left. There the excess is
summed over the *others*. S < 3/2 proves that exactly one e_i is above 1/2; from S = 5/4 on, S - 1
has lost two bits at most, and is taken as it is:

    excess = Σ of the e_i ≤ 1/2                where |S - 1| < 1/4                    (3)

An empty row (no entry above -inf) has m = -inf, S = 0, excess = -1: its lse is -inf, its σ 0. Two
parts of a row, known by (m, excess), merge with h the part of the larger maximum, l the other:

    m = m_h        excess = excess_h + (1 + excess_l) exp(m_l - m_h)                  (4)
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

Axis = int | Sequence[int] | None
_NUMBER = (int, float, np.generic)


def describe(x: ArrayLike) -> str:
    """``x`` as errors quote it: ``int32[4, 3]``."""
    x = jnp.asarray(x)
    return f"{x.dtype}{list(x.shape)}"


def as_float(x: ArrayLike, of: str, name: str = "x") -> Array:
    """``x`` as a real floating array; integers and booleans are promoted as ``jnp.exp`` does."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{of}: {name} must be real, got {describe(x)}")
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    # A Python int gives a weak result, as in JAX.
    return x * 1.0 if x.weak_type else x.astype(jax.eval_shape(jnp.exp, x).dtype)


def as_static(axis: Axis) -> Axis:
    """``axis`` as ``jax.jit`` can hash it."""
    return tuple(axis) if isinstance(axis, Sequence) else axis


def as_axes(axis: Axis, x: Array, of: str, name: str = "x") -> tuple[int, ...]:
    """``axis`` as a tuple of non-negative axes of ``x``; None stands for all of them."""
    if axis is None:
        return tuple(range(x.ndim))
    wanted = tuple(axis) if isinstance(axis, Sequence) else (operator.index(axis),)
    if any(not -x.ndim <= a < x.ndim for a in wanted):
        raise ValueError(
            f"{of}: axis must lie in [{-x.ndim}, {x.ndim}) for {name} of {describe(x)}, got {axis}"
        )
    axes = tuple(a % x.ndim for a in wanted)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{of}: axis must not name an axis of {name} twice, got {axis}")
    return axes


def broadcasts(a: Array, x: Array) -> bool:
    """Whether ``a`` broadcasts to the shape of ``x``."""
    pairs = zip(reversed(a.shape), reversed(x.shape), strict=False)
    return a.ndim <= x.ndim and all(size in (1, full) for size, full in pairs)


def as_mask(where: ArrayLike | None, x: Array, of: str, name: str = "x") -> Array | None:
    """``where`` as a boolean array of the rank of ``x``, or None."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(f"{of}: where must be bool, got {describe(where)}")
    if not broadcasts(where, x):
        raise ValueError(
            f"{of}: where must broadcast to {name} of {describe(x)}, got {describe(where)}"
        )
    return where.reshape((1,) * (x.ndim - where.ndim) + where.shape)


def as_row_mask(
    where: ArrayLike | None, x: Array, axes: tuple[int, ...], of: str, name: str
) -> Array | None:
    """As ``as_mask``; a mask of the rank of the losses stands for whole rows, one entry a row."""
    if where is None or jnp.ndim(where) in (0, x.ndim):
        return as_mask(where, x, of, name)
    if jnp.ndim(where) != x.ndim - len(axes):
        raise ValueError(
            f"{of}: where must have the rank of {name}, {describe(x)}, or of the losses, "
            f"got {describe(where)}"
        )
    return as_mask(jnp.expand_dims(jnp.asarray(where), axes), x, of, name)


def broadcast_labels(
    x: Array, t: Array, axis: Axis, of: str, name: str
) -> tuple[Array, Array, tuple[int, ...]]:
    """``x`` and labels ``t``, one per entry of ``x``, in their common shape, and the class axes."""
    try:
        shape = jnp.broadcast_shapes(x.shape, t.shape)
    except ValueError:
        shape = ()
    wide = jnp.broadcast_to(x, shape) if len(shape) >= x.ndim else x
    axes = as_axes(axis, wide, of, name)
    classes = (1,) * (wide.ndim - x.ndim) + x.shape
    if wide.shape != shape or any(classes[a] != shape[a] for a in axes):
        raise ValueError(
            f"{of}: labels must broadcast against {name} of {describe(x)}, got {describe(t)}"
        )
    return wide, jnp.broadcast_to(t, shape), axes


def as_labels(labels: ArrayLike, of: str) -> Array:
    """``labels`` as integers wide enough to be compared with any index."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{of}: labels must be integer, got {describe(labels)}")
    return labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)


def is_wide(x: Array) -> bool:
    """Whether sums may run in the dtype of ``x`` itself."""
    return jnp.finfo(x.dtype).bits >= 32


def widen(x: Array) -> Array:
    """The dtype that sums and exponentials run in: float32 for anything narrower, else as it is."""
    return x if is_wide(x) else x.astype(jnp.float32)


def narrow(x: Array, like: Array) -> Array:
    """``x`` rounded once to the dtype of ``like``."""
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def apart(*arrays: Any, wide: bool = False) -> tuple[Any, ...]:
    """The same arrays, or trees of them, for one more consumer of what is computed from them.

    XLA's CPU backend computes what two consumers share into an array of the size of the logits. If
    they share an exponential that pays, and wide arrays are left alone unless ``wide`` is set; a
    widened copy does not, nor a difference. On other platforms they fuse as they should.
    """
    if not wide and is_wide(arrays[0]):
        return arrays
    return lax.platform_dependent(*arrays, cpu=_barrier, default=lambda *same: same)


def _barrier(*arrays):
    return lax.optimization_barrier(arrays)


def masked(x: Array, where: Array | None, fill: float = -jnp.inf) -> Array:
    """``x`` where the mask is set, ``fill`` elsewhere: whatever stood there, NaN too, is gone."""
    return x if where is None else jnp.where(where, x, fill)


def row_max(x: Array, axis: Axis) -> Array:
    """m of (1), the axis kept; -inf for an empty row."""
    return widen(jnp.max(x, axis, keepdims=True, initial=-jnp.inf))


def below_max(x: Array, m: Array) -> Array:
    """x - m ≤ 0, and -inf throughout an empty row, never inf - inf."""
    return widen(x) - jnp.where(m == -jnp.inf, 0, m)


def without_empty(y: Array, s: Array, x: Array, axis: Axis) -> Array:
    """``y`` with 0 in empty rows: there it is NaN if made of x - m, and so is the sum ``s``."""

    def mended() -> Array:
        return jnp.where(row_max(x, axis) == -jnp.inf, 0, y)

    return if_any(jnp.isnan(s), mended, lambda: y)


def row_excess(below: Callable[[], Array], axis: Axis, branches: bool = True) -> Array:
    """Excess of (1), by (3) where one entry wins; ``below()`` gives x - m.

    ``below`` is a function so that each sum fuses with a subtraction of its own. ``branches``:
    whether to compute (3) only if it is needed, where that pays.
    """
    excess = jnp.exp(below()).sum(axis, keepdims=True) - 1

    def others() -> Array:  # (3)
        e = jnp.exp(below())
        # XLA's CPU sums products without an array of them; a kernel is quicker to choose.
        rest = e * (1 - jnp.floor(e + 0.5)) if branches else jnp.where(e > 0.5, 0, e)
        return jnp.where(won(excess), rest.sum(axis, keepdims=True), excess)

    return if_any(won(excess), others, lambda: excess) if branches else others()


def if_any(rows: Array, then: Callable[[], Array], otherwise: Callable[[], Array]) -> Array:
    """``then()`` if it is needed by some of the rows, where asking costs less than computing it.

    On a CPU a branch saves a pass over the array. Elsewhere it would stall the device, and
    ``then()``, which must be right for all rows, fuses with the work around it.

    On a mesh, the arrays that the branches use must vary over the same axes, by ``sharding.lift``:
    JAX would make them so inside a branch, and sum their cotangents there, waiting for shards that
    take the other.
    """
    return lax.platform_dependent(
        cpu=lambda: lax.cond(_any(lax.stop_gradient(rows)), then, otherwise), default=then
    )


def won(excess: Array) -> Array:
    """Whether one entry outweighs all others of its row, four times over."""
    return jnp.abs(excess) < 0.25


@custom_vmap
def _any(rows: Array) -> Array:
    return jnp.any(rows)


@_any.def_vmap
def _any_batched(axis_size, in_batched, rows):  # one answer for the batch: cond stays a branch
    return jnp.any(rows), False


def log_sum(excess: Array) -> Array:
    """log S, and 0 for an empty row."""
    empty = excess == -1
    return jnp.where(empty, 0, jnp.log1p(jnp.where(empty, 0, excess)))


def log_sum_exp(m: Array, excess: Array) -> Array:
    """lse of (2): -inf for an empty row, +inf where the row holds +inf."""
    return jnp.where(m == jnp.inf, m, m + log_sum(excess))


def inverse_sum(excess: Array) -> Array:
    """1 / S, and 0 for an empty row: what e is multiplied by to give σ."""
    empty = excess == -1
    return jnp.where(empty, 0, 1 / jnp.where(empty, 1, 1 + excess))


def merge(m_a: Array, excess_a: Array, m_b: Array, excess_b: Array) -> tuple[Array, Array]:
    """(m, excess) of two parts of a row taken together, by (4)."""
    a_leads = m_a >= m_b  # chosen, not the maximum: its derivative at a tie would be of neither
    m, m_low = jnp.where(a_leads, m_a, m_b), jnp.where(a_leads, m_b, m_a)
    high, low = jnp.where(a_leads, excess_a, excess_b), jnp.where(a_leads, excess_b, excess_a)
    gap = jnp.where((m == m_low) & ~jnp.isfinite(m), 0, m_low - m)
    return m, high + (1 + low) * jnp.exp(gap)


def safe_divide(a: ArrayLike, b: Array) -> Array:
    """a / b, and 0 with gradient 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def safe_multiply(a: Array, b: Array) -> Array:
    """a · b, where 0 times an infinite or undefined b counts 0."""
    return a * jnp.where((a == 0) & ~jnp.isfinite(b), 0, b)


def as_index(value: SupportsIndex, of: str, name: str) -> int:
    """``value`` as a Python integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{of}: {name} must be an integer, got {value}") from None


def check_positive(value: ArrayLike | None, of: str, name: str) -> None:
    """Raise unless ``value`` is above 0, as far as it is known now and not traced."""
    if isinstance(value, _NUMBER) and not value > 0:
        raise ValueError(f"{of}: {name} must be above 0, got {value}")


def check_fraction(value: ArrayLike, of: str, name: str) -> None:
    """Raise unless ``value`` lies in [0, 1], as far as it is known now and not traced."""
    if isinstance(value, _NUMBER) and not 0 <= value <= 1:
        raise ValueError(f"{of}: {name} must lie in [0, 1], got {value}")


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """``x`` summed over the axes that ``shape`` was broadcast along: broadcasting, transposed."""
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b)
    return x.sum(axes, keepdims=True)
