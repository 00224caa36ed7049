"""The tiles of the T × S logits that attention visits, and what is visible inside one.

A tile is a block of queries against a block of keys. Query t sees the keys of a *band*,
t - left ≤ s ≤ t + right. A block of queries goes through the keys from the first that its first
query sees to the last that its last one sees, tile by tile; a tile outside of the band is skipped.
Masks exist inside a tile only, made from the indices of its rows and columns.

Arrays have the axes [batch, key heads, group, queries, keys], where the group is the query heads
that share one key head. The head size takes the place of the last axis in query, key and value,
and the keys that of the queries in key and value, whose group is 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import backends, tiling

NARROWEST = 128  # block of queries, where a window shows few keys to each


class Room(NamedTuple):
    """The largest tile."""

    queries: int
    keys: int  # the fewer, the more of them are hidden whole; the more, the faster are products
    area: int  # of all its heads together


CPU = Room(queries=512, keys=1024, area=2**19)  # stays in a cache
GPU = Room(queries=1024, keys=1024, area=2**25)  # a smaller one leaves it idle


def room() -> Room:
    """That of the platform: measured on a CPU and a GPU, taken for any other from a CPU."""
    return GPU if backends.platform() == "gpu" else CPU


class Band(NamedTuple):
    """How many keys before and after its own index a query sees; None: all of them."""

    left: int | None
    right: int | None


class Masks(NamedTuple):
    """Which keys which queries see inside the band, in five axes; None: all."""

    mask: Array | None = None
    query_length: Array | None = None
    key_length: Array | None = None
    query_segment: Array | None = None
    key_segment: Array | None = None


class Terms(NamedTuple):
    """What makes logits of the products of queries and keys."""

    bias: Array | None  # five axes
    scale: Array | None
    cap: Array | None


class Tile(NamedTuple):
    """Where a tile lies, and which of its queries and keys no earlier tile had; None: all."""

    starts: tuple[Array | int, ...]
    sizes: tuple[int, ...]
    new_queries: Array | None
    new_keys: Array | None

    def queries(self, x: Array) -> Array:
        """The queries of the tile, from an array of its heads."""
        return tiling.take(x, self.starts[3], self.sizes[3], 3)

    def keys(self, x: Array) -> Array:
        """The keys of the tile, from an array of its heads."""
        return tiling.take(x, self.starts[4], self.sizes[4], 3)

    def add_keys(self, x: Array, tile: Array) -> Array:
        """``x`` with ``tile`` added where :meth:`keys` takes it from."""
        return tiling.add(x, tile, 0, 0, 0, self.starts[4], 0)

    def cut(self, x: Array) -> Array:
        """What ``x`` holds for the tile; an axis of length 1 stands for any length."""
        for axis, (length, start, size) in enumerate(
            zip(x.shape, self.starts, self.sizes, strict=True)
        ):
            if size < length:
                x = tiling.take(x, start, size, axis)
        return x

    def add(self, x: Array, tile: Array) -> Array:
        """``x`` with ``tile`` added where :meth:`cut` takes it from."""
        starts = (0 if n == 1 else start for n, start in zip(x.shape, self.starts, strict=True))
        return tiling.add(x, tile, *starts)

    def meets(self, band: Band) -> Array | bool:
        """Whether any query of the tile has any key of the tile in its band."""
        first, low = self.starts[3:]
        last, high = first + self.sizes[3] - 1, low + self.sizes[4] - 1
        meets = True
        if band.left is not None:
            meets &= first - band.left <= high
        if band.right is not None:
            meets &= low <= last + band.right
        return meets

    def visible(self, band: Band, masks: Masks) -> Array | None:
        """Which entries of the tile take part; None: all."""
        t = self.starts[3] + lax.broadcasted_iota(jnp.int32, (1, 1, 1, self.sizes[3], 1), 3)
        s = self.starts[4] + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, self.sizes[4]), 4)
        seen = visible(band, Masks(*(None if x is None else self.cut(x) for x in masks)), t, s)
        for part in (
            None if self.new_queries is None else self.new_queries[:, None],
            None if self.new_keys is None else self.new_keys[None, :],
        ):
            if part is not None:
                part = part.reshape((1,) * 3 + part.shape)
                seen = part if seen is None else seen & part
        return seen


def visible(band: Band, masks: Masks, t: Array, s: Array) -> Array | None:
    """Which entries of a tile take part, of queries t and keys s, by its masks; None: all."""
    seen = masks.mask
    for part in (
        None if band.left is None else t - band.left <= s,
        None if band.right is None else s <= t + band.right,
        None if masks.query_length is None else t < masks.query_length,
        None if masks.key_length is None else s < masks.key_length,
        None if masks.query_segment is None else masks.query_segment == masks.key_segment,
    ):
        if part is not None:
            seen = part if seen is None else seen & part
    return seen


class Plan:
    """The order in which tiles are visited: a few heads at a time, and in them block by block."""

    def __init__(self, q: Array, k: Array, band: Band) -> None:
        self.batch, self.heads, self.group, self.queries, _ = q.shape
        self.keys, self.band = k.shape[3], band
        self.rows, self.width, self.columns = lengths(self.queries, self.keys, self.group, band)
        most = room().area // max(1, self.group * self.rows * self.columns)
        self.heads_step = _divisor(self.heads, most)
        whole = self.heads_step == self.heads
        self.batch_step = _divisor(self.batch, most // max(1, self.heads)) if whole else 1

    def over_heads(self, body: Callable, carry: Any, *arrays: Array) -> tuple[Any, Any]:
        """Scan ``body(carry, ((batch, head), *arrays))`` over the heads, a few at a time."""
        across = self.heads // max(1, self.heads_step)
        steps = self.batch // max(1, self.batch_step) * across
        i = jnp.arange(steps, dtype=jnp.int32)
        at = (i // max(1, across) * self.batch_step, i % max(1, across) * self.heads_step)
        few = (steps, self.batch_step, self.heads_step)
        arrays = tuple(x.reshape(*few, *x.shape[2:]) for x in arrays)
        carry, out = lax.scan(body, carry, (at, *arrays))
        return carry, jax.tree.map(lambda x: x.reshape(self.batch, self.heads, *x.shape[3:]), out)

    def over_queries(self, body: Callable, carry: Any, at: tuple) -> tuple[Any, Any]:
        """Run ``body(carry, block)`` over the blocks of queries of the heads at ``at``.

        ``block`` is a tile that has all keys of the block. Returns the last carry, and the outputs
        joined along the axis of queries.
        """

        def block(carry: Any, first: Array, rows: int, new: Array | None) -> tuple[Any, Any]:
            low = first_key(first, self.width, self.keys, self.band)
            sizes = (self.batch_step, self.heads_step, self.group, rows, self.width)
            carry, out = body(carry, Tile((*at, 0, first, low), sizes, new, None))
            return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 3, 0), out)

        carry, out = tiling.fold_overlapping(block, carry, self.queries, self.rows)
        return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3), out)

    def over_keys(self, body: Callable, carry: Any, block: Tile) -> Any:
        """The last of ``carry = body(carry, tile)`` over the tiles of a block of queries."""

        def step(carry: Any, start: Array, columns: int, new: Array | None) -> tuple[Any, None]:
            starts = (*block.starts[:4], block.starts[4] + start)
            tile = Tile(starts, (*block.sizes[:4], columns), block.new_queries, new)
            meets = tile.meets(self.band)
            if meets is True:
                return body(carry, tile), None
            return lax.cond(meets, lambda c: body(c, tile), lambda c: c, carry), None

        return tiling.fold_overlapping(step, carry, self.width, self.columns)[0]


def lengths(queries: int, keys: int, group: int, band: Band) -> tuple[int, int, int]:
    """How many queries make a block, how many keys it goes through, how many of them at a time."""
    most = room()
    rows, width = most.queries // group, keys
    if band.left is not None and band.right is not None:
        window = max(band.left + band.right, 0)
        rows = min(rows, max(window, NARROWEST))
    rows = tiling.even(queries, max(1, rows), 8)
    if band.left is not None and band.right is not None:
        width = min(max(rows + band.left + band.right, 0), keys)
    return rows, width, tiling.even(width, most.keys, 8)


def first_key(first: Any, width: int, keys: int, band: Band) -> Any:
    """Where the keys begin for the block of queries that begins at ``first``."""
    if band.left is None or width == keys:
        return 0
    return jnp.clip(first - band.left, 0, keys - width)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` that is at most ``most``, and at least 1."""
    return next((d for d in range(min(n, most), 1, -1) if n % d == 0), min(n, 1))
