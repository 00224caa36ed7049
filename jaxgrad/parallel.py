"""Kernels over the devices of a mesh: a fused head on sharded arrays, and attention by a ring.

The row kernels and the fused heads need nothing from here: give them sharded arrays under
``jax.jit``, or ``axis_name`` inside ``shard_map``.
"""

from .kernels.ring_attention import ring_attention as ring_attention
from .kernels.sharded import sharded as sharded

__all__ = ["ring_attention", "sharded"]
