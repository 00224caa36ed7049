r"""What the kernels ask of JAX's own SPMD engine: who holds what, and sums over those who hold it.

A row that is cut over a mesh axis is known to each shard by (m_k, excess_k) of its own part. With
m = max m_k over the shards, in ``numerics`` (4) taken for any number of parts,

    S = Σ_k (1 + excess_k) exp(m_k - m)                   excess = S - 1                (1)

where a shard with m_k = m gives excess_k in place of 1 + excess_k, and 1 is given back for each of
them but the first. That is one maximum and one sum over the axis. The maximum counts as a constant
where a rule is differentiated again, so that S moves with every entry, the largest too.
"""

import functools
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import numerics

AxisName = Hashable | tuple[Hashable, ...] | None
Tree = TypeVar("Tree")
_NONE: Mapping[str, Any] = MappingProxyType({})


def lift(tree: Tree, axis_name: AxisName = None) -> Tree:
    """The floats of ``tree``, varying over every mesh axis that an array of it varies over.

    Mesh axes are those of the ``shard_map`` around the call. A rule then owes each argument a
    cotangent that varies as the argument does, and sums over no axis itself: that is the transpose
    of the ``pcast`` here, outside of the rule. ``axis_name`` is one more axis to vary over.
    """
    return _cast(tree, _axes(tree) | _manual(axis_name))


def lift_rows(rows: Tree, like: Any, axis_name: AxisName = None) -> Tree:
    """Floats that vary as the arrays ``like`` do, but are the same on all shards of a row."""
    return _cast(rows, _axes((rows, like)) - _manual(axis_name))


def check(
    of: str,
    axis_name: AxisName,
    cut: Mapping[str, Any],
    whole: Mapping[str, Any] = _NONE,
    argument: str = "axis_name",
) -> None:
    """Raise unless arrays may be cut over ``axis_name``, as far as that can be told.

    Args:
      of: The call, as errors name it.
      axis_name: The axis or axes, None for none.
      cut: Arguments of which each shard holds a part of its own.
      whole: Arguments that are the same on all shards.
      argument: What the call names ``axis_name``.
    """
    if axis_name is None:
        return
    given = f"{argument}={axis_name!r}"
    try:
        index = lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"{of}: {argument} must name an axis of the shard_map or vmap around the call, "
            f"got {axis_name!r}: {error}"
        ) from None
    axes = _manual(axis_name)
    if not axes <= _varying(index):
        raise ValueError(
            f"{of}: {given} needs shard_map(..., check_vma=True), its default: "
            "without, cotangents would be scaled by the number of shards or its inverse"
        )
    for name, x in cut.items():
        if not all(axes <= _varying(z) for z in jax.tree.leaves(x)):
            raise ValueError(
                f"{of}: {name} must be cut over {given}, each shard with "
                f"a part of its own, got {_types(x)}, the same on every shard"
            )
    for name, x in whole.items():
        if axes & _axes(x):
            raise ValueError(
                f"{of}: {name} must be the same on every shard of {given}, where "
                f"indices count what all shards hold, got {_types(x)}, which varies over it"
            )


def extent(axis_name: AxisName, size: int) -> tuple[Array | int, int]:
    """The first index of this shard's ``size`` elements, and the number of all shards'."""
    if axis_name is None:
        return 0, size
    first: Any = lax.axis_index(axis_name) * size
    return first, lax.axis_size(axis_name) * size


def is_cut(x: Array, axis: int) -> bool:
    """Whether this axis of ``x`` is known to be sharded: by its type, over an Explicit mesh."""
    return jax.typeof(x).sharding.spec[axis] is not None


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def collect(x: Array, axis_name: AxisName, axis: int) -> Array:
    """The parts of ``x`` that the shards hold, along one axis of it.

    Transposed, this is :func:`scatter`, of float32 for 16-bit arrays.
    """
    return lax.all_gather(x, axis_name, axis=axis, tiled=True)


@collect.defjvp
def _(axis_name, axis, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    whole_dot = lax.all_gather(numerics.widen(x_dot), axis_name, axis=axis, tiled=True)
    return collect(x, axis_name, axis), numerics.narrow(whole_dot, like=x_dot)


def scatter(x: Array, axis_name: AxisName, axis: int) -> Array:
    """The sum over the shards, of which each keeps its part along ``axis``."""
    return lax.psum_scatter(x, axis_name, scatter_dimension=axis, tiled=True)


def psum(tree: Tree, axis_name: AxisName) -> Tree:
    """The sums over the shards.

    Transposed inside of a ``vmap``, where no type tells that all shards know a cotangent, this adds
    up those of all shards, as JAX has it: so many times the cotangent of one.
    """
    return tree if axis_name is None else lax.psum(tree, axis_name)


def once(tree: Tree, axis_name: AxisName) -> Tree:
    """``tree`` on the first shard and 0 on all others: what all know, for a sum over them."""
    if axis_name is None:
        return tree
    first = lax.axis_index(axis_name) == 0
    return jax.tree.map(lambda x: jnp.where(first, x, 0), tree)


def pmax(x: Array, axis_name: AxisName) -> Array:
    """The largest over the shards. It has no derivative: a row's maximum, which it is, cancels."""
    return x if axis_name is None else lax.pmax(lax.stop_gradient(x), axis_name)


def first(index: Array, found: Array, axis_name: AxisName) -> Array:
    """The smallest ``index`` of the shards that found one."""
    return lax.pmin(jnp.where(found, index, jnp.iinfo(index.dtype).max), axis_name)


def merge(m: Array, excess: Array, axis_name: AxisName) -> tuple[Array, Array]:
    """(m, excess) of the rows that the shards hold parts of."""
    if axis_name is None:
        return m, excess
    top = pmax(m, axis_name)
    return top, add_up(numerics.below_max(m, top), excess, axis_name)[0]


def add_up(gap: Array, excess: Array, axis_name: AxisName, *sums: Any) -> tuple[Any, ...]:
    """Excess of (1), ``gap`` being m_k - m; and whatever else is to be added, in the same go."""
    leads = gap == 0
    own = jnp.where(leads, excess + (1 + excess) * jnp.expm1(gap), (1 + excess) * jnp.exp(gap))
    total, count, *rest = psum((own, leads.astype(own.dtype), *sums), axis_name)
    return total + (count - 1), *rest


def names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """The axes as a tuple."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _manual(axis_name: AxisName) -> frozenset:
    """The axes named, but for those of ``vmap``, which no type tells of."""
    return frozenset(names(axis_name)) & frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def _axes(tree: Any) -> frozenset:
    return frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))


def _cast(tree: Tree, axes: frozenset) -> Tree:
    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - _varying(x), key=str))
        if not missing or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        # Transposed, this is a sum over devices: of float32 for 16-bit arrays.
        return numerics.narrow(lax.pcast(numerics.widen(x), missing, to="varying"), like=x)

    return jax.tree.map(cast, tree) if axes else tree


def _types(tree: Any) -> str:
    return ", ".join(str(jax.typeof(x)) for x in jax.tree.leaves(tree))


def _varying(x: Any) -> frozenset:
    kind: Any = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # newer JAX; older has vma alone
    return frozenset(kind.vma if manual is None else manual.varying)
