"""How a large axis is cut into tiles, and the loops over them.

Two loops, for two ways to end an axis that no tile size divides:

  - ``fold`` runs the last tile at its own, smaller size. No tile is masked, but the body is
    compiled twice: for the axis where every element counts, the vocabulary.
  - ``fold_overlapping`` moves the last tile back until it fits. The body is compiled once and told
    which elements are new: for an axis whose masks are one number a row, the tokens.

Either loop can be differentiated, again and again, at the memory of one tile: what a tile computes
is computed anew rather than kept.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import numerics


class Room(NamedTuple):
    """The largest tile of logits, and how many of them may be kept from one loop to the next."""

    tokens: int
    classes: int
    area: int  # tokens times classes
    kept_tokens: int = 0  # at a time, where the classes are all
    kept_bytes: int = 0

    def keeps(self, tokens: int, classes: int) -> bool:
        """Whether so many logits are kept: of fewer tokens, products would be slower than new."""
        return 0 < min(tokens, self.kept_tokens) * classes * 4 <= self.kept_bytes


# A tile of 4 MiB stays in a cache; with more kept tokens its products would not be faster.
CPU = Room(tokens=1024, classes=2048, area=2**20, kept_tokens=512, kept_bytes=2**27)
# Smaller products leave an H100 idle, and it computes logits anew as fast as it reads kept ones.
GPU = Room(tokens=4096, classes=8192, area=2**25)


def room(platform: str) -> Room:
    """What ``platform`` has room for, measured on a CPU and a GPU; any other is taken for a CPU."""
    return GPU if platform == "gpu" else CPU


def tile_sizes(tokens: int, classes: int, keeps_logits: bool, room: Room) -> tuple[int, int]:
    """How many tokens and classes make a tile of logits."""
    tokens = even(tokens, room.kept_tokens if keeps_logits else room.tokens, 8)
    return tokens, class_tile(tokens, classes, room)


def class_tile(tokens: int, classes: int, room: Room) -> int:
    """How many classes make a tile of so many tokens."""
    return even(classes, min(room.classes, max(room.area // max(tokens, 1), 1)), 16)


def even(total: int, limit: int, multiple: int = 1) -> int:
    """The size of the fewest tiles of at most ``limit`` that cover ``total``, made equal.

    It is rounded up to a ``multiple`` where the limit allows, which keeps vector loads aligned.

    Example:
      >>> even(50257, 1024, multiple=16)
      1008
    """
    size = math.ceil(total / math.ceil(total / max(limit, 1))) if total else 1
    rounded = math.ceil(size / multiple) * multiple
    return rounded if rounded <= min(limit, total) else size


def fold(
    body: Callable[[Any, Any, int, Any], tuple[Any, Any]],
    carry: Any,
    total: int,
    size: int,
    kept: tuple[Any, Any] | None = None,
) -> tuple[Any, tuple[Any, Any]]:
    """``carry`` after ``body(carry, start, size, kept)`` at each tile; the last may be smaller.

    What the bodies return beside the carry comes back as a pair, of the full tiles stacked and of
    the last one, and may be given to another ``fold`` as ``kept``.
    """
    size = min(size, total)
    count, rest = divmod(total, size) if total else (0, 0)
    tiles, last = (None, None) if kept is None else kept

    def step(carry, tile):
        i, kept = tile
        return body(carry, i * size, size, kept)

    carry, full = lax.scan(_anew(step), carry, (jnp.arange(count, dtype=jnp.int32), tiles))
    if not rest:
        return carry, (full, None)
    carry, end = _anew(lambda c, k: body(c, count * size, rest, k))(carry, last)
    return carry, (full, end)


def fold_overlapping(
    body: Callable[[Any, Array, int, Array | None], tuple[Any, Any]],
    carry: Any,
    total: int,
    size: int,
) -> tuple[Any, Any]:
    """``carry`` after ``body(carry, start, size, new)`` at each tile, all of one size.

    ``new`` is ``bool[size]``: which elements no earlier tile had; None where all are new. What the
    bodies return beside the carry, ``[size, ...]``, is joined to ``[total, ...]``.
    """
    size = min(size, total)
    count = math.ceil(total / size) if total else 0
    rest = total - (count - 1) * size

    def step(carry, i):
        start = jnp.minimum(i * size, total - size)
        new = None if rest == size else start + jnp.arange(size, dtype=jnp.int32) >= i * size
        return body(carry, start, size, new)

    def join(tiles):
        flat = tiles.reshape(count * size, *tiles.shape[2:])
        return flat if len(flat) == total else jnp.concatenate([flat[:-size], flat[-rest:]])

    carry, tiles = lax.scan(_anew(step), carry, jnp.arange(count, dtype=jnp.int32))
    return carry, jax.tree.map(join, tiles)


def product(
    a: Array,
    b: Array,
    dimensions: Any,
    dtype: Any,
    precision: Any = None,
    branches: bool = True,
) -> Array:
    """``lax.dot_general`` summed in ``dtype``; where one factor is of 16 bits, both are.

    But few CPUs multiply 16-bit numbers (:func:`multiplies`); on others XLA widens them inside the
    product, again and again. There both are widened before it, and none is rounded; without
    ``branches``, nowhere.
    """
    narrowest = min(a.dtype, b.dtype, key=lambda dtype: jnp.finfo(dtype).bits)

    def of(factors: Any) -> Callable[[Array, Array], Array]:
        return lambda a, b: lax.dot_general(
            a.astype(factors),
            b.astype(factors),
            dimensions,
            precision=precision,
            preferred_element_type=dtype,
        )

    if jnp.finfo(narrowest).bits >= 32 or multiplies(narrowest) or not branches:
        return of(narrowest)(a, b)
    return lax.platform_dependent(a, b, cpu=of(dtype), default=of(narrowest))


def factor(x: Array, dtype: Any) -> Array:
    """``x`` as a CPU multiplies it with a factor of ``dtype``."""
    return x.astype(dtype) if multiplies(dtype) else x


def multiplies(dtype: Any) -> bool:
    """Whether the CPU of this machine multiplies ``dtype``, of 16 bits, and XLA lets it.

    Measured: such products take a third of the time of wide ones with AMX, a half with AVX-512.
    """
    return dtype == jnp.bfloat16 and bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What the CPU has beside the common instructions; nothing where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(flags, "").split())


def take(x: Array, start: Any, size: int, axis: int) -> Array:
    """``size`` elements of ``x`` from ``start`` on; ``x`` itself where it has no more."""
    if x.shape[axis] == size:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating) and not numerics.is_wide(x):
        # XLA's CPU slices bfloat16 in float32. Tied to the loop, x is not widened whole before it.
        x, start = lax.optimization_barrier((x, jnp.asarray(start, jnp.int32)))
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def rows(tree: Any, start: Any, size: int) -> Any:
    """``size`` rows from ``start`` on of each array; a single row stands for all."""
    return jax.tree.map(lambda x: x if len(x) == 1 else take(x, start, size, 0), tree)


def only(new: Array | None, tree: Any) -> Any:
    """Arrays of rows, 0 but for the ``new`` ones; None: all are."""
    return tree if new is None else jax.tree.map(lambda x: jnp.where(new[:, None], x, 0), tree)


def put(x: Array, tile: Array, *start: Any) -> Array:
    """``x`` with ``tile`` at ``start``, one index an axis, rounded to the dtype of ``x``."""
    return lax.dynamic_update_slice(x, tile.astype(x.dtype), _int32(start))


def put_part(x: Array, tile: Array, start: Any, axis: int) -> Array:
    """``x`` with ``tile`` from ``start`` on along ``axis``, which :func:`parted` may have cut."""
    if x.ndim > tile.ndim:
        start, tile = start // tile.shape[axis], jnp.expand_dims(tile, axis)
    return put(x, tile, *(start if i == axis else 0 for i in range(x.ndim)))


def parted(x: Array, size: int, axis: int) -> Array:
    """``x`` with one axis cut into parts of ``size``, if that divides it, for :func:`put_part`.

    XLA's CPU puts a tile of 16 bits by a pass over all of an array, which is several times as fast
    where the tiles have an axis of their own.
    """
    if x.shape[axis] % size:
        return x
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def add(x: Array, tile: Array, *start: Any) -> Array:
    """``x`` with ``tile`` added at ``start``, one index an axis."""
    if x.shape == tile.shape:
        return x + tile.astype(x.dtype)
    return put(x, lax.dynamic_slice(x, _int32(start), tile.shape) + tile.astype(x.dtype), *start)


def _int32(start):  # one dtype is asked of them all
    return tuple(jnp.asarray(i, jnp.int32) for i in start)


def _anew(step):
    # A scan's forward and backward loop share no expression, so nothing has to be hidden from XLA.
    return jax.checkpoint(step, prevent_cse=False)
