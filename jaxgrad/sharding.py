"""What the kernels ask of JAX's own SPMD engine."""

from typing import Any, TypeVar

import jax
from jax import Array, lax

Tree = TypeVar("Tree")


def lift(tree: Tree) -> Tree:
    """All arrays of ``tree``, varying over every mesh axis of ``shard_map`` that one varies over.

    A rule then owes each argument a cotangent that varies as the argument does, and sums over no
    axis itself: that is the transpose of the ``pcast`` here, outside of the rule.
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - _varying(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def _varying(x: Array) -> frozenset:
    kind: Any = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # newer JAX; older has vma alone
    return frozenset(kind.vma if manual is None else manual.varying)
