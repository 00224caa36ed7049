"""The labels of the fused head: one class a token, a number for every class, or for k of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class SparseLabels(NamedTuple):
    """Soft labels that are 0 but for k classes a token: the top k of a teacher, say.

    Args:
      indices: Classes, ``int[..., k]``. A class named twice counts with the sum of its entries.
      probs: Their probabilities, ``float[..., k]``. They need not sum to 1.
    """

    indices: Any
    probs: Any


Labels = Array | SparseLabels  # int[t, 1], float[t, v], or [t, k]


UNKNOWN, IGNORED = -1, -2  # an index out of range, and one to be left out: no tile holds them


def index_state(labels: Array, v: int, ignore_index: int | None) -> Array:
    """Integer labels as int32 indices in [0, v), or ``UNKNOWN``, or ``IGNORED``."""
    known = (labels >= 0) & (labels < v)
    index = jnp.where(known, labels, UNKNOWN).astype(jnp.int32)
    return index if ignore_index is None else jnp.where(labels == ignore_index, IGNORED, index)


def is_dense(labels: Labels) -> bool:
    """Whether there is a float for every class."""
    return not isinstance(labels, SparseLabels) and jnp.issubdtype(labels.dtype, jnp.floating)


def is_integer(labels: Labels) -> bool:
    """Whether there is one class a token."""
    return not (isinstance(labels, SparseLabels) or is_dense(labels))


def entries(labels: SparseLabels, start: Any, size: int) -> tuple[Array, Array]:
    """Where the k classes stand in a tile, ``size`` if not in it; and whether they are in it."""
    inside = (labels.indices >= start) & (labels.indices < start + size)
    return jnp.where(inside, labels.indices - start, size), inside
