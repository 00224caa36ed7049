"""Which tiles of its logits attention visits on a TPU, how they are cut, and what stays in VMEM.

A tile is a block of queries against a block of keys. The grid counts

    batch, key heads, stretches of keys, query heads of a group, blocks of queries, tiles of keys

and the last goes through the tiles that a block of queries sees, no further: the band of
``kernels/attention_tiles.py`` bounds it. In the backward, the gradients of a stretch of keys and
values stay in float32 while all queries come by; mostly one stretch is all keys.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxgrad.backends.pallas_tpu.tiles import LANES, LIVE, SMALLEST, usable

LARGEST = (512, 1024)  # tile: queries, keys


class Plan(NamedTuple):
    """Sizes, and how they are cut."""

    batch: int
    heads: int
    group: int
    queries: int
    keys: int
    width: int  # of a query and a key
    depth: int  # of a value
    itemsize: int
    left: int | None  # keys that a query sees before its own index; None: all
    right: int | None
    interpret: Any  # as ``pallas_call`` takes it
    rows: int = 0  # of a tile: queries
    columns: int = 0  # of a tile: keys
    stretch: int = 0  # tiles of keys whose gradients stay at a time

    @property
    def tiles(self) -> int:
        """How many tiles all keys make."""
        return math.ceil(self.keys / self.columns)

    @property
    def grid(self) -> tuple[int, ...]:
        """As above."""
        steps = self.stretch
        if self.left is not None and self.right is not None:
            seen = max(self.rows + self.left + self.right, 1)
            steps = min(steps, (seen + self.columns - 2) // self.columns + 1)
        stretches, blocks = (
            math.ceil(self.tiles / self.stretch),
            math.ceil(self.queries / self.rows),
        )
        return self.batch, self.heads, stretches, self.group, blocks, steps

    def span(self, stretch: Any, block: Any) -> tuple[Array, Array]:
        """The first and the last tile of a stretch of keys that a block of queries sees."""
        first, row = stretch * self.stretch, block * self.rows
        last = jnp.minimum(first + self.stretch, self.tiles) - 1
        if self.left is not None:
            first = jnp.maximum(first, (row - self.left) // self.columns)
        if self.right is not None:
            last = jnp.minimum(last, (row + self.rows - 1 + self.right) // self.columns)
        return first, last


def forward(cut: Plan) -> Plan:
    """``cut`` with the largest tiles that VMEM holds."""
    cuts = [cut._replace(stretch=cut.tiles) for cut in _cuts(cut)]
    return next((cut for cut in cuts if _forward_bytes(cut) <= usable()), cuts[-1])


def backward(cut: Plan) -> Plan:
    """The same, and as long a stretch of keys as there is room for."""
    cuts = list(_cuts(cut))
    room = lambda cut: (usable() - _backward_bytes(cut)) // _kept_bytes(cut)  # in tiles
    for cut in cuts:
        if room(cut) >= cut.tiles and cut.rows * cut.columns >= SMALLEST:
            return cut._replace(stretch=cut.tiles)
    cut = next((cut for cut in cuts if room(cut) > 1), cuts[-1])
    stretches = math.ceil(cut.tiles / max(1, room(cut)))
    return cut._replace(stretch=math.ceil(cut.tiles / stretches))


def _cuts(cut):
    """``cut`` with one tile after another, ever smaller."""
    rows, columns = (
        min(most, _lanes(total))
        for most, total in zip(LARGEST, (cut.queries, cut.keys), strict=True)
    )
    if cut.left is not None and cut.right is not None:  # a window: no tile far beyond it
        window = _lanes(max(cut.left + cut.right, 1))
        rows, columns = min(rows, window), min(columns, window)
    while True:
        yield cut._replace(rows=rows, columns=columns)
        if max(rows, columns) <= LANES:
            return
        if columns >= rows:
            columns = _lanes(columns // 2)
        else:
            rows = _lanes(rows // 2)


def _lanes(n):
    return LANES * math.ceil(n / LANES)


def _forward_bytes(cut):
    """Twice what streams by, as the next tile comes in meanwhile, and what the body computes."""
    a_row = _lanes(cut.width) + _lanes(cut.depth)
    streamed = 2 * cut.itemsize * (cut.rows + cut.columns) * a_row
    return streamed + 4 * cut.rows * (cut.depth + LIVE * cut.columns)


def _backward_bytes(cut):
    a_row = 2 * _lanes(cut.width) + _lanes(cut.depth)
    streamed = 2 * cut.itemsize * (cut.rows + cut.columns) * a_row
    return streamed + 4 * cut.rows * (cut.width + LIVE * cut.columns)


def _kept_bytes(cut):
    return cut.columns * (_lanes(cut.width) + _lanes(cut.depth)) * (4 + cut.itemsize)
