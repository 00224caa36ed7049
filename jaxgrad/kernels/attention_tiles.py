"""The tiles of the T × S logits that attention visits, and what is visible inside one.

A tile is a block of queries against a range of keys. It is never a part of a row: every query in it
has all keys that it may see, so each row of a tile is a whole soft-max. Query t sees the keys of a
*band*, t - left ≤ s ≤ t + right. A block sees the union of its queries' bands, and nothing else is
computed. Masks exist inside a tile only, made from the indices of its rows and columns.

Arrays have the axes [batch, key heads, group, queries, keys], where the group is the query heads
that share one key head. The head size takes the place of the last axis in query, key and value,
and the keys that of the queries in key and value, whose group is 1.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jaxgrad import tiling

ROWS = 256  # of a tile: enough for its products to run at full speed
STEP = 2**18  # entries up to which small heads share a tile
MOST_SPANS = 8  # each is compiled on its own

Starts = tuple[Array | int, ...]
Sizes = tuple[int, ...]


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


class Span(NamedTuple):
    """Consecutive blocks of queries that see about equally many keys."""

    first: int  # query
    rows: int  # queries of a block
    blocks: int
    width: int  # keys that a block sees


def spans(queries: int, keys: int, group: int, band: Band) -> Iterator[Span]:
    """The blocks of queries, those that see equally many keys, to an eighth of all, joined."""
    rows = tiling.even(queries, max(1, ROWS // group), 8)
    level = max(1, -(-keys // MOST_SPANS))
    span = None
    for first in range(0, queries, rows):
        block = Span(first, min(rows, queries - first), 1, 0)
        block = block._replace(width=_width(block, keys, band))
        if span is None:
            span = block
        elif (block.rows, -(-block.width // level)) == (span.rows, -(-span.width // level)):
            span = span._replace(blocks=span.blocks + 1, width=max(span.width, block.width))
        else:
            yield span
            span = block
    yield Span(0, 0, 1, 0) if span is None else span


def _width(block: Span, keys: int, band: Band) -> int:
    low = 0 if band.left is None else max(block.first - band.left, 0)
    high = keys if band.right is None else min(block.first + block.rows + band.right, keys)
    return max(0, high - low)


def visible(band: Band, masks: Masks, starts: Starts, sizes: Sizes) -> Array | None:
    """Which entries of a tile take part; None: all."""
    t = starts[3] + lax.broadcasted_iota(jnp.int32, (1, 1, 1, sizes[3], 1), 3)
    s = starts[4] + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, sizes[4]), 4)
    masks = Masks(*(None if x is None else cut(x, starts, sizes) for x in masks))
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


def cut(x: Array, starts: Starts, sizes: Sizes) -> Array:
    """What ``x`` holds for a tile; an axis of length 1 stands for any length."""
    for axis, (length, start, size) in enumerate(zip(x.shape, starts, sizes, strict=True)):
        if size < length:
            x = tiling.take(x, start, size, axis)
    return x


def slices(starts: Starts, sizes: Sizes) -> tuple[Callable, Callable]:
    """Two functions that take, from an array of its heads, the queries and the keys of a tile."""
    return (
        lambda x: tiling.take(x, starts[3], sizes[3], 3),
        lambda x: tiling.take(x, starts[4], sizes[4], 3),
    )


def add(x: Array, block: Array, starts: Starts) -> Array:
    """``x`` with ``block`` added where :func:`cut` takes it from."""
    within = (0 if n == 1 else start for n, start in zip(x.shape, starts, strict=True))
    return tiling.add(x, block, *within)


class Plan:
    """The order in which tiles are visited: a few heads at a time, and in them block by block."""

    def __init__(self, q: Array, k: Array, band: Band) -> None:
        self.batch, self.heads, self.group, queries, _ = q.shape
        self.keys, self.band = k.shape[3], band
        self.spans = list(spans(queries, self.keys, self.group, band))
        largest = max((self.group * s.rows * s.width for s in self.spans), default=0)
        room = STEP // max(1, largest)
        self.heads_step = _divisor(self.heads, room)
        whole = self.heads_step == self.heads
        self.batch_step = _divisor(self.batch, room // max(1, self.heads)) if whole else 1

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

    def over_blocks(self, body: Callable, carry: Any, at: Starts) -> tuple[Any, Any]:
        """Run ``body(carry, starts, sizes)`` over the tiles of the heads at ``at``.

        Returns the last carry, and the outputs joined along the axis of queries.
        """

        def step(span: Span, carry: Any, first: Array | int) -> tuple[Any, Any]:
            low: Array | int = 0
            if self.band.left is not None and span.width < self.keys:
                low = jnp.clip(first - self.band.left, 0, self.keys - span.width)
            sizes = (self.batch_step, self.heads_step, self.group, span.rows, span.width)
            return body(carry, (*at, 0, first, low), sizes)

        outs, zero = [], jnp.int32(0)
        for span in self.spans:
            if span.blocks == 1:
                carry, out = step(span, carry, span.first + zero)
            else:
                firsts = zero + span.first + span.rows * jnp.arange(span.blocks, dtype=jnp.int32)
                carry, out = lax.scan(functools.partial(step, span), carry, firsts)
                out = jax.tree.map(_joined, out)
            outs.append(out)
            zero = _zero_after(lax.stop_gradient(jax.tree.leaves(out)[0][..., -1:, -1:]))
        return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs, 3), *outs)


@custom_vmap
def _zero_after(x: Array) -> Array:
    """0, but not before ``x`` is known: else XLA would hold the tiles of all spans at once."""
    return (x > jnp.inf).sum(dtype=jnp.int32)


@_zero_after.def_vmap
def _zero_after_batched(axis_size, in_batched, x):  # not batched: slices stay slices
    return _zero_after(x), False


def _joined(x: Array) -> Array:
    """Blocks stacked along a new first axis, put one after the other along the queries."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` that is at most ``most``, and at least 1."""
    return next((d for d in range(min(n, most), 1, -1) if n % d == 0), min(n, 1))
