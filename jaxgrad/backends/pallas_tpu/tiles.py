"""How the tiles of a loop are cut, from its shapes, its dtypes and the VMEM of the chip.

VMEM holds two of everything that streams by, as the next tile comes in while one is worked on; the
float32 gradients that stay; and what the body computes, counted as so many tiles of logits. The
counts are estimates: the compiler tells where they are too low, and nothing but it does.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of which a tile has a multiple
# Tiles: tokens, classes; of 32-bit arrays, half the classes, or compiling them takes minutes.
LARGEST = {"sums": (512, 2048), "gradients": (1024, 1024)}
SMALLEST_VMEM = 16 * 2**20  # of the chips that there are
USABLE = 0.8  # of VMEM; the rest is the compiler's
SMALLEST = 256 * 256  # entries of a tile; rather than smaller ones, tokens come in blocks
LIVE = 5  # float32 tiles of tokens × classes that a body holds at a time


class Operands(NamedTuple):
    """What a loop reads: whole, or cut to a tile."""

    x: Any  # [t, d]
    w: Any  # [d, v], or [v, d]
    bias: Any  # [v], or None
    rows: Any  # arrays of [t, 1]
    scalars: Any  # arrays of []


class Gradients(NamedTuple):
    """Those of x, w and bias; None where nobody asks."""

    x: Any
    w: Any
    bias: Any


class Plan(NamedTuple):
    """Sizes, and how they are cut."""

    t: int
    d: int
    v: int
    vocab_axis: int
    tokens: int  # of a tile
    classes: int
    itemsize: int
    interpret: Any

    @property
    def tiles(self) -> tuple[int, int]:
        """How many there are along tokens, and along classes."""
        return math.ceil(self.t / self.tokens), math.ceil(self.v / self.classes)


def vmem_bytes() -> int:
    """VMEM of the chip that is traced for; the smallest there is where no chip is known."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALLEST_VMEM


def plan(operands: Operands, vocab_axis: int, interpret: Any) -> Plan:
    """The sizes of a call, its tile yet to be chosen."""
    (t, d), v = operands.x.shape, operands.w.shape[vocab_axis]
    itemsize = max(operands.x.dtype.itemsize, operands.w.dtype.itemsize)
    return Plan(t, d, v, vocab_axis, 0, 0, itemsize, interpret)


def for_sums(cut: Plan, tile: tuple[int, int] | None) -> Plan:
    """``cut`` with the largest tile that VMEM holds, or the one that is asked for."""
    cuts = list(_cuts(cut, "sums", tile))
    return next((cut for cut in cuts if _tile_bytes(cut) <= usable()), cuts[-1])


def for_gradients(cut: Plan, dtypes: Gradients, tile: tuple[int, int] | None) -> tuple[Plan, int]:
    """The tile, and for how many tokens the gradient of x stays in VMEM at a time."""
    cuts = list(_cuts(cut, "gradients", tile))
    a_tile = lambda cut: 4 * cut.tokens * cut.d if dtypes.x is not None else 0
    for cut in cuts:
        needed = cut.tiles[0] * a_tile(cut) + _tile_bytes(cut, dtypes)
        if needed <= usable() and cut.tokens * cut.classes >= SMALLEST:
            return cut, cut.t
    room = lambda cut: usable() - _tile_bytes(cut, dtypes, handed_on=True)
    cut = next((cut for cut in cuts if room(cut) >= 2 * a_tile(cut)), cuts[-1])
    tiles = max(1, room(cut) // max(1, a_tile(cut)))
    blocks = math.ceil(cut.tiles[0] / tiles)
    return cut, cut.tokens * math.ceil(cut.tiles[0] / blocks)


def usable() -> int:
    """VMEM that a kernel may take."""
    return int(USABLE * vmem_bytes())


def _cuts(plan, name, tile):
    """``plan`` with the tile that is asked for, or with one after another, ever smaller."""
    if tile is not None:
        yield plan._replace(tokens=tile[0], classes=tile[1])
        return
    tokens, classes = LARGEST[name]
    classes = classes * 2 // plan.itemsize
    tokens, classes = (
        min(size, LANES * math.ceil(total / LANES))
        for size, total in ((tokens, plan.t), (classes, plan.v))
    )
    while True:
        yield plan._replace(tokens=tokens, classes=classes)
        if max(tokens, classes) <= LANES:
            return
        if classes >= tokens:
            classes = LANES * math.ceil(classes / 2 / LANES)
        else:
            tokens = LANES * math.ceil(tokens / 2 / LANES)


def _tile_bytes(plan, dtypes=None, handed_on=False):
    """VMEM that the tiles of a loop take: twice what streams by, as the next comes in meanwhile."""
    of_x, of_w = plan.tokens * plan.d, plan.d * plan.classes
    size = 2 * (of_x + of_w) * plan.itemsize + LIVE * 4 * plan.tokens * plan.classes
    if dtypes is not None and dtypes.x is not None:
        size += 4 * of_x
    if dtypes is not None and dtypes.w is not None:
        size += (8 + 2 * (8 if handed_on else jnp.dtype(dtypes.w).itemsize)) * of_w
    return size
