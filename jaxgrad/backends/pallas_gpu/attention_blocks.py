"""How the attention kernels cut queries and keys into blocks, and which of them meet.

Sizes are powers of two, as Triton has them, and at least those of a tensor core's product. What a
block has beyond the end of its axis is neither read nor written: it counts as 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxgrad.backends.pallas_gpu import chips

SMALLEST = 16  # side of a product
WIDEST = 256  # head: wider ones would not fit in registers

# Queries, keys, warps and stages of the pipeline, by kernel and padded size of a head. In 16 bits,
# those of 64 and 128 were the fastest of eight or nine on an H100, causal, for T = 4096, when p̄ was
# computed along with z. The rest were not timed: by ptxas, registers of an H100 hold all, and
# elsewhere those of an A100. Where query heads share a key head, a kernel has fewer to spare: what
# differs there is told apart.
SIZES = {
    "forward": {64: (64, 128, 4, 2), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    "of_queries": {64: (64, 64, 4, 2), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "of_keys": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    "of_keys of groups": {128: (64, 32, 4, 2)},
}
SIZES_ELSEWHERE = {
    "forward": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
    "of_queries": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 2)},
    "of_keys": {64: (64, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
}
SIZES_FLOAT32 = {
    "forward": {64: (64, 32, 8, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    "of_queries": {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 32, 4, 1)},
    "of_keys": {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
    "of_keys of groups": {128: (32, 16, 4, 1), 256: (32, 16, 4, 1)},
}


class Cut(NamedTuple):
    """The sizes of a kernel's blocks, and how the GPU runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Side(NamedTuple):
    """A block of an axis: of queries, of keys, or of the entries of a head."""

    first: Any
    size: int
    length: int  # of the axis
    inside: bool  # no part lies beyond the end

    @property
    def index(self) -> Any:
        """Places on the axis."""
        return self.first + jnp.arange(self.size, dtype=jnp.int32)

    def of(self, n: int) -> "Side":
        """The same for an axis of ``n``, which is 1 where it stands for any length."""
        return Side(0, 1, 1, True) if n == 1 else self


def cut(name: str, q: Any, v: Any) -> Cut:
    """The blocks of the kernel ``name``, for ``q`` and ``v`` as the kernels take them."""
    width = max(64, padded(q.shape[-1]), padded(v.shape[-1]))
    of_16_bits = SIZES if chips.is_hopper() else SIZES_ELSEWHERE
    table = SIZES_FLOAT32 if q.dtype.itemsize == 4 else of_16_bits
    sizes = table[name]
    if q.shape[3] > 1:
        sizes = sizes | table.get(f"{name} of groups", {})
    rows, columns, warps, stages = sizes[width]
    return Cut(min(rows, padded(q.shape[1])), min(columns, padded(v.shape[1])), warps, stages)


def padded(n: int) -> int:
    """The size of a block that holds ``n``."""
    return max(SMALLEST, pl.next_power_of_2(n))


def side(i: Any, size: int, length: int) -> Side:
    """Block ``i`` of an axis."""
    return Side(i * size, size, length, length % size == 0)


def whole(n: int) -> Side:
    """A block that is the axis."""
    return Side(0, padded(n), n, padded(n) == n)


class Span(NamedTuple):
    """The blocks of the other side that a block sees, from ``first`` to before ``last``.

    It sees every entry of those from ``all_first`` to before ``all_last``.
    """

    first: Any
    all_first: Any
    all_last: Any
    last: Any
    size: int
    length: int
    masked: tuple[bool, bool]  # whether any is seen wholly, and any partly

    def fold(self, body: Callable[[Any, Side, bool], Any], carry: Any) -> Any:
        """The last of ``carry = body(carry, block, edge)`` over the blocks."""

        def block(j, edge):
            start = pl.multiple_of(j * self.size, self.size)
            return Side(start, self.size, self.length, not edge or self.length % self.size == 0)

        def edge(i, carry):
            before = self.all_first - self.first
            j = jnp.where(i < before, self.first + i, self.all_last + i - before)
            return body(carry, block(j, True), True)

        wholly, partly = self.masked
        if wholly:
            inner = lambda j, carry: body(carry, block(j, False), False)
            carry = lax.fori_loop(self.all_first, self.all_last, inner, carry)
        if partly:
            edges = self.all_first - self.first + self.last - self.all_last
            carry = lax.fori_loop(jnp.int32(0), edges, edge, carry)
        return carry


def span(
    own: Side, own_limit: Any, size: int, length: int, limit: Any, sees: Any, masked: bool
) -> Span:
    """The blocks of an axis that the block ``own`` of another one sees.

    Args:
      own: The block.
      own_limit: From where on nothing is seen from its axis; None: sees to the end.
      size: Of the blocks.
      length: Of their axis.
      limit: As ``own_limit``, for their axis.
      sees: How many before and after its own place a place sees; None: all.
      masked: Whether any entry may be hidden by what is not known here.
    """
    before, after = sees
    end = lax.full((), length, jnp.int32) if limit is None else jnp.minimum(length, limit)
    own_last = jnp.minimum(own.first + own.size, own.length) - 1
    clip = lambda x: jnp.minimum(jnp.maximum(x, 0), end)
    zero = jnp.zeros_like(end)
    low, all_low = (
        (zero, zero) if before is None else map(clip, (own.first - before, own_last - before))
    )
    high, all_high = (
        (end, end)
        if after is None
        else map(clip, (own_last + (after + 1), own.first + (after + 1)))
    )
    if own_limit is not None:
        high = jnp.where(own.first < own_limit, high, low)
        all_high = jnp.where(own_last < own_limit, all_high, zero)
    down = lambda x: lax.div(x, jnp.int32(size))
    up = lambda x: down(x + (size - 1))
    first = down(low)
    last = jnp.where(low < high, up(high), first)
    all_first = jnp.clip(up(all_low), first, last)
    all_last = all_first if masked else jnp.clip(down(all_high), all_first, last)
    bounded = (before, after, limit, own_limit) != (None,) * 4 or length % size != 0
    return Span(first, all_first, all_last, last, size, length, (not masked, masked or bounded))


def load(ref: Any, *at: Any, other: Any = 0) -> Any:
    """What is held at a place or a ``Side`` of each axis, ``other`` beyond the end."""
    mask = _inside(at)
    fill = None if mask is None else jnp.asarray(other, ref.dtype)
    return plgpu.load(ref.at[_index(at)], mask=mask, other=fill)


def store(ref: Any, value: Any, *at: Any) -> None:
    """Write what lies before the end."""
    plgpu.store(ref.at[_index(at)], value.astype(ref.dtype), mask=_inside(at))


def _index(at):
    return tuple(pl.ds(a.first, a.size) if isinstance(a, Side) else a for a in at)


def _inside(at):
    sides = [a for a in at if isinstance(a, Side)]
    shape, mask = tuple(side.size for side in sides), None
    for axis, side in enumerate(sides):
        if not side.inside:
            inside = lax.broadcast_in_dim(side.index < side.length, shape, (axis,))
            mask = inside if mask is None else mask & inside
    return mask
