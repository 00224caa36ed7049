"""Which keys come to a shard of a ring in which step, and what of its terms and masks is theirs.

In step j, shard i has the keys of shard i - j (mod n). Query t of shard i and key s of shard i - j,
of T each, are t - s + jT places apart, so that for these keys a band

    t - left ≤ s ≤ t + right        becomes        t - (left - jT) ≤ s ≤ t + right + jT        (1)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import sharding, tiling
from jaxgrad.kernels.attention_tiles import Band, Masks, Terms

EVERY, CAUSAL = Band(None, None), Band(None, 0)


class Ring(NamedTuple):
    """The mesh axis that the sequence is cut over, and what a query sees by its place in it."""

    axis_name: sharding.AxisName
    band: Band

    @property
    def shards(self) -> int:
        """How many they are."""
        return lax.axis_size(self.axis_name)

    def owner(self, j: Any) -> Array:
        """Whose keys come in step j, but for multiples of n."""
        index: Any = lax.axis_index(self.axis_name)
        return index - j

    def passed_on(self, tree: Any, by: int = 1) -> Any:
        """What shard i - ``by`` has."""
        ring = [(i, (i + by) % self.shards) for i in range(self.shards)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, ring), tree)

    def if_there(self, j: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """``then()`` if there is a shard i - j; without a band, it is counted mod n."""
        if self.band == EVERY or (isinstance(j, int) and j == 0):
            return then()
        owner = self.owner(j)
        return lax.cond((owner >= 0) & (owner < self.shards), then, otherwise)

    def steps(self) -> Array | None:
        """The steps j > 0 of the whole ring; None if the keys of some shards are all it takes."""
        if self.band not in (EVERY, CAUSAL):
            return None
        return jnp.arange(1, self.shards, dtype=jnp.int32)

    def reached(self, length: int) -> list[int]:
        """The j ≠ 0 whose keys some query sees, by (1), ``length`` being T."""
        most, size = self.shards - 1, max(length, 1)
        left, right = (
            most if side is None else min((side + size - 1) // size, most) for side in self.band
        )
        return [j for j in range(-right, left + 1) if j != 0]

    def moved(self, j: int, length: int) -> Band:  # (1)
        """The band for the keys of step j."""
        left, right = self.band
        by = j * length
        return Band(None if left is None else left - by, None if right is None else right + by)

    def block(
        self, j: Any, q: Array, k: Array, terms: Terms, masks: Masks, key_segment: Array | None
    ) -> tuple[Terms, Masks]:
        """Terms and masks of the queries ``q`` of this shard and the keys ``k`` of step j."""
        low, first = self._start(j, k), self._start(0, q)

        def columns(x):
            return x if x is None or x.shape[4] == 1 else tiling.take(x, low, k.shape[3], 4)

        def counted(length, start):
            return None if length is None else length - start

        return terms._replace(bias=columns(terms.bias)), Masks(
            columns(masks.mask),
            counted(masks.query_length, first),
            counted(masks.key_length, low),
            masks.query_segment,
            key_segment,
        )

    def with_block(self, j: Any, k: Array, bars: Any, block_bars: Any) -> Terms:
        """The cotangents ``bars`` of the terms, with those of a block added."""
        bias = bars.bias
        if bias is not None:
            low = 0 if bias.shape[4] == 1 else self._start(j, k)
            bias = tiling.add(bias, block_bars.bias, 0, 0, 0, 0, low)
        rest = jax.tree.map(jnp.add, bars._replace(bias=None), block_bars._replace(bias=None))
        return rest._replace(bias=bias)

    def _start(self, j, x):
        """The place in the sequence of the first element of ``x``, which comes in step j."""
        return self.owner(j) % self.shards * x.shape[3]
