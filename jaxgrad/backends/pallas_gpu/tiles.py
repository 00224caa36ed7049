"""How the tiles of the fused head are cut on a GPU: from its shapes, its dtypes and the chip.

A program holds the float32 logits of one tile in registers, and chunks of d in shared memory,
``stages`` of them under way. Sides are powers of two, as Triton wants them, and products have none
below 16. A tile that is smaller than the largest leaves fewer idle lanes where there is less to do.
"""

import math
from typing import Any, NamedTuple

from jaxgrad.backends.pallas_gpu import chips

SMALLEST = 16  # side of a product
PROGRAMS = 4096  # of the forward: more than enough to fill a chip evenly, a few numbers a row each
BLOCK = 8192  # classes of x̄ in memory at a time, for all tokens
BLOCK_BYTES = 128 * 2**20  # of it


class Operands(NamedTuple):
    """What a loop reads. Its body is given ``rows`` and ``scalars`` alone, cut to a tile."""

    x: Any  # [t, d]
    w: Any  # [d, v], or [v, d]
    bias: Any  # [v], or None
    rows: Any  # arrays of [t, 1]
    scalars: Any  # arrays of []


class Tile(NamedTuple):
    """The largest tile, and how it is worked on."""

    tokens: int
    classes: int
    feature_bytes: int  # of a row of a chunk of d
    warps: int
    stages: int
    parts: int  # that a body is given one after the other: fewer registers are in use at a time


# The fastest of those that were tried on an H100, at 4096 × 2048 × 131072 in bfloat16.
LARGEST = {
    "sums": Tile(128, 256, 128, warps=8, stages=4, parts=2),
    "bars": Tile(128, 256, 128, warps=8, stages=4, parts=1),
    "heavy bars": Tile(128, 128, 128, warps=8, stages=4, parts=1),  # the body needs registers
}
# Of chips that nothing was timed on: for an A100 ptxas finds registers for all, and any chip since
# has as much shared memory.
LARGEST_ELSEWHERE = Tile(128, 128, 128, warps=8, stages=4, parts=2)


class Plan(NamedTuple):
    """Sizes, and how they are cut."""

    t: int
    d: int
    v: int
    tokens: int  # of a tile
    classes: int
    features: int
    warps: int
    stages: int
    parts: int

    @property
    def tiles(self) -> tuple[int, int]:
        """How many there are along tokens, and along classes."""
        return math.ceil(self.t / self.tokens), math.ceil(self.v / self.classes)

    @property
    def chunks(self) -> int:
        """How many there are along d."""
        return math.ceil(self.d / self.features)

    @property
    def splits(self) -> int:
        """Into how many ranges of tiles classes are cut, a power of two."""
        rows, columns = self.tiles
        wanted = min(columns, max(1, PROGRAMS // rows))
        return 2 ** math.floor(math.log2(wanted))


def plan(name: str, operands: Operands, vocab_axis: int, tile: tuple[int, int] | None) -> Plan:
    """The sizes of a loop, and the tile that is asked for or the largest that is of use."""
    (t, d), v = operands.x.shape, operands.w.shape[vocab_axis]
    itemsize = max(operands.x.dtype.itemsize, operands.w.dtype.itemsize)
    largest = LARGEST[name] if chips.is_hopper() else LARGEST_ELSEWHERE
    tokens, classes = tile or (_side(t, largest.tokens), _side(v, largest.classes))
    features = _side(d, largest.feature_bytes // itemsize)
    parts = min(largest.parts, classes // SMALLEST)
    return Plan(t, d, v, tokens, classes, features, *largest[3:5], parts)


def obstacle(tile: Any) -> str | None:
    """Why this is no tile; None if it is one."""
    if tile is None or (isinstance(tile, tuple) and all(_is_side(size) for size in tile)):
        return None
    return f"takes chunk_size=(tokens, classes), powers of two from {SMALLEST} on, got {tile}"


def block(t: int, itemsize: int, multiple: int) -> int:
    """How many classes of x̄ may be in memory at a time."""
    classes = min(BLOCK, BLOCK_BYTES // (itemsize * t))
    return max(multiple, classes // multiple * multiple)


def _side(total, largest):
    return max(SMALLEST, min(largest, 2 ** math.ceil(math.log2(total))))


def _is_side(size):
    return size >= SMALLEST and size & (size - 1) == 0
