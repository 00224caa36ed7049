"""Attention to a part of the keys, and to two parts together.

A part i knows its output o_i, and m_i and S_i of its row: the maximum and the sum of exp(z - m_i).
Together, the outputs weigh as much as their sums:

    m = max m_i      S = Σ_i S_i exp(m_i - m)      o = Σ_i S_i exp(m_i - m) o_i / S        (1)

m is a shift: it cancels but for rounding, and counts as a constant in every derivative. The sum is
held as its excess, S - 1. A part without a visible key has S = 0, and o = 0.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxgrad import numerics


class Part(NamedTuple):
    """Attention to some of the keys: the output, and the maximum and excess of each row."""

    o: Array
    m: Array
    excess: Array


def nothing(q: Array, v: Array) -> Part:
    """The attention of ``q`` to none of the keys, for values as in ``v``."""
    row = jnp.zeros_like(q[..., :1], numerics.widen(q).dtype)
    return Part(jnp.broadcast_to(row, (*q.shape[:-1], v.shape[-1])), row - jnp.inf, row - 1)


def merge(a: Part, b: Part) -> Part:
    """Attention to the keys of both parts."""
    m, excess = numerics.merge(a.m, a.excess, b.m, b.excess)

    def share(part: Part) -> Array:
        return (1 + part.excess) * jnp.exp(numerics.below_max(part.m, m))

    o = (share(a) * a.o + share(b) * b.o) * numerics.inverse_sum(excess)  # (1)
    return Part(o, m, excess)
