"""The loop of attention over its tiles: what lies in VMEM while a tile is worked on.

Of query, key and value, and of what has their axes, a tile; of numbers per query, a row of them,
[1, queries]; scale, soft-cap and lengths whole, in scalar memory. The grid is that of the plan.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxgrad.backends.pallas_tpu import tiles
from jaxgrad.backends.pallas_tpu.attention_plan import Plan


class Given(NamedTuple):
    """What a kernel reads, as it lies in memory."""

    q: Any  # [B, K, G, T, H]
    k: Any  # [B, K, 1, S, H]
    v: Any  # [B, K, 1, S, D]
    terms: Any  # scale and soft-cap, [1, 1]
    masks: Any  # lengths [B], segments [B, 1, T] and [B, 1, S]
    o_bar: Any = None  # [B, K, G, T, D]
    rows: Any = None  # [B, K, G, 1, T] each


class At(NamedTuple):
    """Where a tile lies: of keys the how manieth, its first query and its first key."""

    tile: Any
    row: Any
    column: Any


def given(q: Array, k: Array, v: Array, terms: Any, masks: Any, *of_backward: Any) -> Given:
    """The arguments of a kernel, from five axes."""
    flat = lambda x: None if x is None else x.reshape(-1)
    query_segment, key_segment = masks.query_segment, masks.key_segment
    masks = masks._replace(
        query_length=flat(masks.query_length),
        key_length=flat(masks.key_length),
        query_segment=None if query_segment is None else query_segment[:, 0, 0].mT,
        key_segment=None if key_segment is None else key_segment[:, 0, 0],
    )
    return Given(q, k, v, jax.tree.map(lambda x: x.reshape(1, 1), terms), masks, *of_backward)


def run(
    kernel: Callable[..., None],
    name: str,
    plan: Plan,
    given: Given,
    outputs: Any,
    scratch: list[tuple[int, int]],
    products: int,
    in_place: bool = False,
) -> Any:
    """Run ``kernel(given, out, scratch)`` at each step of the grid.

    Args:
      given: What the kernel reads; it gets references to the part of a step.
      outputs: Pairs of a ``ShapeDtypeStruct`` and its ``BlockSpec``.
      scratch: Shapes of float32 arrays in VMEM that stay from step to step.
      products: How many products of matrices a tile takes.
      in_place: Whether the outputs take the memory of q, k and v: none of a block is read any more
        when its output is written.
    """

    def tile(c, i, j):  # clamped, so that one that nobody sees is not fetched
        first, last = plan.span(c, i)
        return jnp.clip(first + j, 0, jnp.maximum(last, 0))

    def of_keys(width):
        at = lambda b, h, c, g, i, j: (b, h, 0, tile(c, i, j), 0)
        return pl.BlockSpec((None, None, None, plan.columns, width), at)

    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_masks = (
        None,
        scalar,
        scalar,
        pl.BlockSpec((None, 1, plan.rows), lambda b, h, c, g, i, j: (b, 0, i)),
        pl.BlockSpec((None, 1, plan.columns), lambda b, h, c, g, i, j: (b, 0, tile(c, i, j))),
    )
    masks = given.masks
    of_masks = (None if z is None else spec for z, spec in zip(masks, of_masks, strict=True))
    in_specs = Given(
        of_queries(plan, plan.width),
        of_keys(plan.width),
        of_keys(plan.depth),
        jax.tree.map(lambda _: scalar, given.terms),
        type(masks)(*of_masks),
        None if given.o_bar is None else of_queries(plan, plan.depth),
        jax.tree.map(lambda _: of_rows(plan), given.rows),
    )
    entries = math.prod(plan.grid) * plan.rows * plan.columns
    inner = "parallel" if name == "forward" else "arbitrary"
    shapes, specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=(in_specs,),
        out_specs=(specs,),
        out_shape=(shapes,),
        scratch_shapes=[[pltpu.VMEM(shape, jnp.float32) for shape in scratch]],
        cost_estimate=pl.CostEstimate(
            flops=products * entries * (plan.width + plan.depth),
            transcendentals=entries,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + (inner, inner, "arbitrary"),
            vmem_limit_bytes=tiles.usable(),
        ),
        input_output_aliases={n: n for n in range(3)} if in_place else {},
        interpret=plan.interpret,
        name=f"dot_product_attention_{name}",
    )(given)[0]


def of_queries(plan: Plan, width: int) -> pl.BlockSpec:
    """A block of what has the axes of queries."""
    shape = (None, None, None, plan.rows, width)
    return pl.BlockSpec(shape, lambda b, h, c, g, i, j: (b, h, g, i, 0))


def of_rows(plan: Plan) -> pl.BlockSpec:
    """A block of numbers per query."""
    shape = (None, None, None, 1, plan.rows)
    return pl.BlockSpec(shape, lambda b, h, c, g, i, j: (b, h, g, 0, i))


def limits(plan: Plan, masks: Any) -> tuple[Any, Any]:
    """How many queries and keys there are, in this entry of the batch."""
    b = pl.program_id(0)
    least = lambda lengths, total: total if lengths is None else jnp.minimum(lengths[b], total)
    return least(masks.query_length, plan.queries), least(masks.key_length, plan.keys)


def visit(plan: Plan, limits: tuple[Any, Any], body: Callable[[At], None]) -> None:
    """Run ``body`` on the tile of this step, if there is anything to see in it."""
    c, i, j = (pl.program_id(axis) for axis in (2, 4, 5))
    first, last = plan.span(c, i)
    at = At(first + j, i * plan.rows, (first + j) * plan.columns)
    pl.when((at.tile <= last) & (at.row < limits[0]) & (at.column < limits[1]))(lambda: body(at))


def each_tile(plan: Plan, body: Callable[[Any], Any]) -> None:
    """Run ``body`` on the place of each tile in a stretch of keys."""

    def step(n, _):
        body(place(plan, n))

    lax.fori_loop(0, plan.stretch, step, None)


def place(plan: Plan, n: Any) -> Any:
    """Where tile n lies among the keys of a stretch."""
    return pl.ds(pl.multiple_of(n * plan.columns, plan.columns), plan.columns)


def cut(x: Array, total: int, start: Any, axis: int, beyond: float = 0.0) -> Array:
    """``x``, replaced beyond the end: what is read there, times 0, need not be 0."""
    if total % x.shape[axis] == 0:
        return x
    inside = start + lax.broadcasted_iota(jnp.int32, x.shape, axis) < total
    return jnp.where(inside, x, jnp.full((), beyond, x.dtype))


def masks_of_tile(plan: Plan, masks: Any, limits: tuple[Any, Any]) -> Any:
    """The masks of a tile, keys by queries; those that hide nothing are None."""
    query_segment, key_segment = masks.query_segment, masks.key_segment
    ragged = plan.queries % plan.rows, plan.keys % plan.columns
    return masks._replace(
        query_length=limits[0] if ragged[0] or masks.query_length is not None else None,
        key_length=limits[1] if ragged[1] or masks.key_length is not None else None,
        query_segment=None if query_segment is None else query_segment[...],
        key_segment=None if key_segment is None else key_segment[0][:, None],
    )
