"""Attention as Pallas kernels for TPU, forward and backward.

Tiles of logits lie on their side, keys by queries. A number per query is then a row [1, queries]:
it fills the lanes of a register, sums over keys add register to register, and no tile of logits
is ever transposed. In the notation of ``kernels/attention.py``, with columns for queries,

    z = k qᵀ      o ← o exp(m_old - m) + vᵀ exp(z - m)                                 (1)
    p = exp(z - m) / S      v̄ += p ō      z̄ = p ⊙ (v ōᵀ - mean)                        (2)
    k̄ += z̄ q                q̄ ← q̄ + kᵀ z̄                                              (3)

where o and q̄ are [features, queries], turned once, at the end. The backward is one kernel, of five
products: q̄ stays in VMEM over the tiles of keys of a block of queries, k̄ and v̄ over all queries.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxgrad import numerics
from jaxgrad.backends.pallas_tpu import attention_plan, tiles
from jaxgrad.backends.pallas_tpu.attention_plan import Plan


class Given(NamedTuple):
    """What a kernel reads, as it lies in memory."""

    q: Any  # [B, K, G, T, H]
    k: Any  # [B, K, 1, S, H]
    v: Any  # [B, K, 1, S, D]
    terms: Any  # scale and soft-cap, [1, 1]
    masks: Any  # lengths [B], segments [B, 1, T] and [B, 1, S]
    o_bar: Any = None  # [B, K, G, T, D]
    rows: Any = None  # mean, m, excess: [B, K, G, 1, T]


def obstacle(q: Array, k: Array, v: Array, terms: Any, masks: Any) -> str | None:
    """Why a call cannot run, None if it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, got {q.dtype}"
    for given, name in ((terms.bias, "bias"), (masks.mask, "mask")):
        if given is not None:
            return f"takes no {name}, an array of queries by keys"
    return None


def forward(
    entry: Any, band: Any, q: Array, k: Array, v: Array, terms: Any, masks: Any, interpret: Any
) -> tuple[Array, Array, Array]:
    """The output, and the maximum and excess of each row."""
    plan = attention_plan.forward(_plan(band, q, k, v))

    def kernel(given, out, acc):
        o, m, excess = acc
        limits = _limits(plan, given.masks)
        j = pl.program_id(5)

        @pl.when(j == 0)
        def _():
            o[...] = jnp.zeros_like(o)
            m[...] = jnp.full_like(m, -jnp.inf)
            excess[...] = jnp.full_like(excess, -1.0)

        def tile(at, partial):
            q, k, v = _read(plan, given.q, given.k, given.v, at, partial)
            z, _ = _logits(plan, entry, band, given, limits, q, k, at, partial)
            m_old, excess_old = m[...], excess[...]
            m_new = jnp.maximum(m_old, numerics.row_max(z, 0))
            e = jnp.exp(numerics.below_max(z, m_new))
            more = e.sum(0, keepdims=True) - 1
            o[...] = o[...] * jnp.exp(numerics.below_max(m_old, m_new)) + _dot(  # (1)
                v, numerics.narrow(e, like=v), 0, 0
            )
            m[...], excess[...] = numerics.merge(m_old, excess_old, m_new, more)

        _visit(plan, given.masks, limits, tile)

        @pl.when(j == pl.num_programs(5) - 1)
        def _():
            o_ = o[...] * numerics.inverse_sum(excess[...])
            out[0][...] = o_.T.astype(out[0].dtype)
            out[1][...], out[2][...] = m[...], excess[...]

    row = jax.ShapeDtypeStruct((*q.shape[:3], 1, plan.queries), jnp.float32)
    o, m, excess = _call(
        kernel,
        "forward",
        plan,
        _given(q, k, v, terms, masks),
        out_shape=(jax.ShapeDtypeStruct((*q.shape[:4], plan.depth), q.dtype), row, row),
        out_specs=(_of_queries(plan, plan.depth), _of_rows(plan), _of_rows(plan)),
        scratch=[(plan.depth, plan.rows), (1, plan.rows), (1, plan.rows)],
        kept=1,
        products=2,
        interpret=interpret,
    )
    return o, m.mT, excess.mT


def backward(
    entry: Any, band: Any, q: Array, k: Array, v: Array, terms: Any, masks: Any,
    o_bar: Array, mean: Array, m: Array, excess: Array, interpret: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The cotangents of query, key and value."""
    plan = attention_plan.backward(_plan(band, q, k, v))
    stretches = plan.grid[2]

    def kernel(given, out, acc):
        q_bar, k_bar, v_bar = acc
        limits = _limits(plan, given.masks)
        g, i, j = (pl.program_id(axis) for axis in (3, 4, 5))
        last_j = j == pl.num_programs(5) - 1
        last = last_j & (g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1)
        first_tile = pl.program_id(2) * plan.stretch

        @pl.when((g == 0) & (i == 0) & (j == 0))
        def _():
            _each_tile(plan, lambda here: _fill(k_bar, v_bar, here))

        @pl.when(j == 0)
        def _():
            q_bar[...] = jnp.zeros_like(q_bar)

        def tile(at, partial):
            q, k, v = _read(plan, given.q, given.k, given.v, at, partial)
            o_bar = given.o_bar[...]
            mean, m, excess = (ref[...] for ref in given.rows)
            if partial:
                o_bar = _cut(o_bar, plan.queries, at.row, 0)
                m = _cut(m, plan.queries, at.row, 1, jnp.inf)  # so that p = 0
                mean, excess = (_cut(x, plan.queries, at.row, 1) for x in (mean, excess))
            z, u = _logits(plan, entry, band, given, limits, q, k, at, partial)
            p = jnp.exp(z - m) * numerics.inverse_sum(excess)
            here = pl.ds(
                pl.multiple_of((at.tile - first_tile) * plan.columns, plan.columns), plan.columns
            )
            v_bar[here, :] += _dot(numerics.narrow(p, like=v), o_bar, 1, 0)  # (2)
            z_bar = p * (_dot(v, o_bar, 1, 1) - mean)
            z_bar = numerics.narrow(z_bar if u is None else z_bar * entry.slope(u), like=q)
            k_bar[here, :] += _dot(z_bar, q, 1, 0)  # (3)
            q_bar[...] += _dot(k, z_bar, 0, 0)

        _visit(plan, given.masks, limits, tile)
        scale = given.terms.scale[0, 0]

        @pl.when(last_j)
        def _():
            out[0][...] = (scale * q_bar[...].T).astype(out[0].dtype)

        @pl.when(last)
        def _():
            def write(here):
                out[1][here, :] = (scale * k_bar[here, :]).astype(out[1].dtype)
                out[2][here, :] = v_bar[here, :].astype(out[2].dtype)

            _each_tile(plan, write)

    of_stretch = plan.stretch * plan.columns

    def of_keys(width):
        at = lambda b, h, c, g, i, j: (b, h, 0, c, 0)
        shape = (None, None, None, of_stretch, width)
        return pl.BlockSpec(shape, at, pipeline_mode=pl.Buffered(1))

    of_q = pl.BlockSpec(
        (None, None, None, None, plan.rows, plan.width),
        lambda b, h, c, g, i, j: (c, b, h, g, i, 0),
    )
    q_dtype = q.dtype if stretches == 1 else jnp.float32
    bars = _call(
        kernel,
        "backward",
        plan,
        _given(q, k, v, terms, masks, o_bar, (mean, m, excess)),
        out_shape=(
            jax.ShapeDtypeStruct((stretches, *q.shape), q_dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        out_specs=(of_q, of_keys(plan.width), of_keys(plan.depth)),
        scratch=[(plan.width, plan.rows), (of_stretch, plan.width), (of_stretch, plan.depth)],
        kept=3,
        products=5,
        interpret=interpret,
    )
    q_bar = bars[0][0] if stretches == 1 else bars[0].sum(0)
    return q_bar, bars[1], bars[2]


class At(NamedTuple):
    """Where a tile lies."""

    tile: Any
    row: Any
    column: Any


def _plan(band, q, k, v):
    batch, heads, group, queries, width = q.shape
    itemsize = q.dtype.itemsize
    return Plan(
        batch, heads, group, queries, k.shape[3], width, v.shape[4], itemsize, *band
    )


def _given(q, k, v, terms, masks, o_bar=None, rows=None):
    masks = masks._replace(
        query_length=_flat(masks.query_length),
        key_length=_flat(masks.key_length),
        query_segment=None if masks.query_segment is None else masks.query_segment[:, 0, 0].mT,
        key_segment=None if masks.key_segment is None else masks.key_segment[:, 0, 0],
    )
    terms = jax.tree.map(lambda x: x.reshape(1, 1), terms)
    return Given(q, k, v, terms, masks, o_bar, jax.tree.map(lambda x: x.mT, rows))


def _flat(x):
    return None if x is None else x.reshape(-1)


def _call(
    kernel, name, plan, given, out_shape, out_specs, scratch, kept, products, interpret
):
    steps = plan.grid
    tile = lambda i, c, j: jnp.clip(plan.span(c, i)[0] + j, 0, jnp.maximum(plan.span(c, i)[1], 0))
    of_keys = lambda width: pl.BlockSpec(
        (None, None, None, plan.columns, width),
        lambda b, h, c, g, i, j: (b, h, 0, tile(i, c, j), 0),
    )
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    masks = given.masks
    in_specs = Given(
        _of_queries(plan, plan.width),
        of_keys(plan.width),
        of_keys(plan.depth),
        jax.tree.map(lambda _: scalar, given.terms),
        masks._replace(
            query_length=None if masks.query_length is None else scalar,
            key_length=None if masks.key_length is None else scalar,
            query_segment=None
            if masks.query_segment is None
            else pl.BlockSpec((None, 1, plan.rows), lambda b, h, c, g, i, j: (b, 0, i)),
            key_segment=None
            if masks.key_segment is None
            else pl.BlockSpec(
                (None, 1, plan.columns), lambda b, h, c, g, i, j: (b, 0, tile(i, c, j))
            ),
        ),
        None if given.o_bar is None else _of_queries(plan, plan.depth),
        jax.tree.map(lambda _: _of_rows(plan), given.rows),
    )
    entries = plan.rows * plan.columns * functools.reduce(lambda a, b: a * b, steps)
    semantics = ("parallel",) * 3 + ("arbitrary" if kept > 1 else "parallel",) * 2 + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        grid=steps,
        in_specs=(in_specs,),
        out_specs=(out_specs,),
        out_shape=(out_shape,),
        scratch_shapes=[[pltpu.VMEM(shape, jnp.float32) for shape in scratch]],
        cost_estimate=pl.CostEstimate(
            flops=products * entries * (plan.width + plan.depth),
            transcendentals=entries,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=tiles.usable()
        ),
        interpret=interpret,
        name=f"dot_product_attention_{name}",
    )(given)[0]


def _of_queries(plan, width):
    shape = (None, None, None, plan.rows, width)
    return pl.BlockSpec(shape, lambda b, h, c, g, i, j: (b, h, g, i, 0))


def _of_rows(plan):
    shape = (None, None, None, 1, plan.rows)
    return pl.BlockSpec(shape, lambda b, h, c, g, i, j: (b, h, g, 0, i))


def _limits(plan, masks):
    """How many queries and keys there are, in this entry of the batch."""
    b = pl.program_id(0)
    return tuple(
        total if lengths is None else jnp.minimum(lengths[b], total)
        for total, lengths in (
            (plan.queries, masks.query_length),
            (plan.keys, masks.key_length),
        )
    )


def _visit(plan, masks, limits, body):
    """Run ``body(at, partial)`` on the tile of this step, if any query sees any key in it."""
    c, i, j = (pl.program_id(axis) for axis in (2, 4, 5))
    first, last = plan.span(c, i)
    tile = first + j
    at = At(tile, i * plan.rows, tile * plan.columns)
    seen = (tile <= last) & (at.row < limits[0]) & (at.column < limits[1])
    holds = plan.whole(at.row, at.column)
    for start, size, limit in ((at.row, plan.rows, limits[0]), (at.column, plan.columns, limits[1])):
        if not isinstance(limit, int) or limit % size:
            holds.append(start + size <= limit)
    if masks.query_segment is not None:
        pl.when(seen)(lambda: body(at, True))
    elif not holds:
        pl.when(seen)(lambda: body(at, False))
    else:
        whole = functools.reduce(jnp.logical_and, holds)
        pl.when(seen & whole)(lambda: body(at, False))
        pl.when(seen & jnp.logical_not(whole))(lambda: body(at, True))


def _read(plan, q, k, v, at, partial):
    """The operands of a tile, 0 where it reaches beyond the end: what is read there times 0 is 0."""
    q, k, v = q[...], k[...], v[...]
    if not partial:
        return q, k, v
    k, v = (_cut(x, plan.keys, at.column, 0) for x in (k, v))
    return _cut(q, plan.queries, at.row, 0), k, v


def _cut(x, total, start, axis, fill=0.0):
    if total % x.shape[axis] == 0:
        return x
    inside = start + lax.broadcasted_iota(jnp.int32, x.shape, axis) < total
    return jnp.where(inside, x, jnp.full((), fill, x.dtype))


def _logits(plan, entry, band, given, limits, q, k, at, partial):
    """z and u of a tile, keys by queries."""
    terms = jax.tree.map(lambda ref: ref[0, 0], given.terms)
    where = None
    if partial:
        t, s = (
            start + lax.broadcasted_iota(jnp.int32, (plan.columns, plan.rows), axis)
            for start, axis in ((at.row, 1), (at.column, 0))
        )
        masks = given.masks
        masks = masks._replace(
            query_length=limits[0],
            key_length=limits[1],
            query_segment=None if masks.query_segment is None else masks.query_segment[...],
            key_segment=None if masks.key_segment is None else masks.key_segment[0][:, None],
        )
        where = entry.visible(band, masks, t, s)
    return entry.logits(_dot(k, q, 1, 1), terms, where)


def _each_tile(plan, body):
    """Run ``body`` on the place of each tile of keys in a stretch."""

    def step(n, _):
        body(pl.ds(pl.multiple_of(n * plan.columns, plan.columns), plan.columns))

    lax.fori_loop(0, plan.stretch, step, None)


def _fill(k_bar, v_bar, here):
    for ref in (k_bar, v_bar):
        ref[here, :] = jnp.zeros((here.size, ref.shape[1]), ref.dtype)


def _dot(a, b, a_axis, b_axis):
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
