"""Attention as Pallas kernels for TPU, forward and backward.

Tiles of logits lie on their side, keys by queries. A number per query is then a row [1, queries]:
it fills the lanes of a register, sums over keys add register to register, and no tile of logits
is ever transposed. In the notation of ``kernels/attention.py``, with columns for queries,

    z = k qᵀ      o ← o exp(m_old - m) + vᵀ exp(z - m)                                 (1)
    p = exp(z - m) / S      v̄ ← v̄ + p ō      z̄ = p ⊙ (v ōᵀ - mean)                     (2)
    k̄ ← k̄ + z̄ q             q̄ ← q̄ + kᵀ z̄                                              (3)

where o and q̄ are [features, queries], turned once, at the end. The backward is one kernel, of five
products: q̄ stays in VMEM over the tiles of keys of a block of queries, k̄ and v̄ over all queries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl

from jaxgrad import numerics
from jaxgrad.backends.pallas_tpu import attention_loop as loop
from jaxgrad.backends.pallas_tpu import attention_plan
from jaxgrad.backends.pallas_tpu.attention_plan import Plan


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
    plan = attention_plan.forward(_plan(band, q, k, v, interpret))

    def kernel(given, out, scratch):
        o, m, excess = scratch
        limits = loop.limits(plan, given.masks)
        j = pl.program_id(5)

        @pl.when(j == 0)
        def _():
            _fill(o, 0)
            _fill(m, -jnp.inf)
            _fill(excess, -1)

        def tile(at):
            q, k, v = _operands(plan, given, at)
            z, _ = _logits(plan, entry, band, given, limits, q, k, at)
            m_old, excess_old = m[...], excess[...]
            m_new = jnp.maximum(m_old, numerics.row_max(z, 0))
            e = jnp.exp(numerics.below_max(z, m_new))
            more = e.sum(0, keepdims=True) - 1
            older = jnp.exp(numerics.below_max(m_old, m_new))
            o[...] = o[...] * older + _dot(v, numerics.narrow(e, like=v), 0, 0)  # (1)
            m[...], excess[...] = numerics.merge(m_old, excess_old, m_new, more)

        loop.visit(plan, limits, tile)

        @pl.when(j == pl.num_programs(5) - 1)
        def _():
            of_sum = o[...] * numerics.inverse_sum(excess[...])
            _write(out, of_sum.T, m[...], excess[...])

    row = ShapeDtypeStruct((*q.shape[:3], 1, plan.queries), jnp.float32), loop.of_rows(plan)
    o = ShapeDtypeStruct((*q.shape[:4], plan.depth), q.dtype), loop.of_queries(plan, plan.depth)
    o, m, excess = loop.run(
        kernel,
        "forward",
        plan,
        loop.given(q, k, v, terms, masks),
        outputs=[o, row, row],
        scratch=[(plan.depth, plan.rows), (1, plan.rows), (1, plan.rows)],
        products=2,
    )
    return o, m.mT, excess.mT


def backward(
    entry: Any, band: Any, q: Array, k: Array, v: Array, terms: Any, masks: Any,
    o_bar: Array, mean: Array, m: Array, excess: Array, interpret: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The cotangents of query, key and value."""
    plan = attention_plan.backward(_plan(band, q, k, v, interpret))

    def kernel(given, out, scratch):
        q_bar, k_bar, v_bar = scratch
        limits = loop.limits(plan, given.masks)
        c, g, i, j = (pl.program_id(axis) for axis in (2, 3, 4, 5))
        last = j == pl.num_programs(5) - 1
        last_of_all = last & (g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1)

        @pl.when((g == 0) & (i == 0) & (j == 0))
        def _():
            loop.each_tile(plan, lambda at: (_fill(k_bar, 0, at), _fill(v_bar, 0, at)))

        @pl.when(j == 0)
        def _():
            _fill(q_bar, 0)

        def tile(at):
            q, k, v = _operands(plan, given, at)
            o_bar = loop.cut(given.o_bar[...], plan.queries, at.row, 0)
            mean, m, excess = (
                loop.cut(ref[...], plan.queries, at.row, 1, beyond)  # p = 0 beyond the end
                for ref, beyond in zip(given.rows, (0, jnp.inf, 0), strict=True)
            )
            z, u = _logits(plan, entry, band, given, limits, q, k, at)
            p = jnp.exp(z - m) * numerics.inverse_sum(excess)
            here = loop.place(plan, at.tile - c * plan.stretch)
            v_bar[here, :] += _dot(numerics.narrow(p, like=v), o_bar, 1, 0)  # (2)
            z_bar = p * (_dot(v, o_bar, 1, 1) - mean)
            z_bar = numerics.narrow(z_bar if u is None else z_bar * entry.slope(u), like=q)
            k_bar[here, :] += _dot(z_bar, q, 1, 0)  # (3)
            q_bar[...] += _dot(k, z_bar, 0, 0)

        loop.visit(plan, limits, tile)
        scale = given.terms.scale[0, 0]

        @pl.when(last)
        def _():
            _write(out[:1], scale * q_bar[...].T)

        @pl.when(last_of_all)
        def _():
            def write(at):
                _write(out[1:], scale * k_bar[at, :], v_bar[at, :], at=at)

            loop.each_tile(plan, write)

    stretches, kept = plan.grid[2], plan.stretch * plan.columns

    def of_keys(x):
        at = lambda b, h, c, g, i, j: (b, h, 0, c, 0)
        block = (None, None, None, kept, x.shape[4])
        spec = pl.BlockSpec(block, at, pipeline_mode=pl.Buffered(1))
        return ShapeDtypeStruct(x.shape, x.dtype), spec

    of_q = loop.of_queries(plan, plan.width), q.shape, q.dtype
    if stretches > 1:  # a gradient from each, to be summed
        spec = pl.BlockSpec(
            (None, None, None, None, plan.rows, plan.width),
            lambda b, h, c, g, i, j: (c, b, h, g, i, 0),
        )
        of_q = spec, (stretches, *q.shape), jnp.float32
    q_bar, k_bar, v_bar = loop.run(
        kernel,
        "backward",
        plan,
        loop.given(q, k, v, terms, masks, o_bar, tuple(x.mT for x in (mean, m, excess))),
        outputs=[(ShapeDtypeStruct(*of_q[1:]), of_q[0]), of_keys(k), of_keys(v)],
        scratch=[(plan.width, plan.rows), (kept, plan.width), (kept, plan.depth)],
        products=5,
        in_place=stretches == 1 and plan.queries % plan.rows == plan.keys % kept == 0,
    )
    return q_bar if stretches == 1 else q_bar.sum(0), k_bar, v_bar


def _plan(band, q, k, v, interpret):
    batch, heads, group, queries, width = q.shape
    keys, depth = v.shape[3:]
    sizes = (batch, heads, group, queries, keys, width, depth, q.dtype.itemsize)
    return Plan(*sizes, left=band.left, right=band.right, interpret=interpret)


def _operands(plan, given, at):
    """Query, key and value of a tile."""
    k, v = (loop.cut(ref[...], plan.keys, at.column, 0) for ref in (given.k, given.v))
    return loop.cut(given.q[...], plan.queries, at.row, 0), k, v


def _logits(plan, entry, band, given, limits, q, k, at):
    """z and u of a tile, keys by queries."""
    t, s = (
        start + lax.broadcasted_iota(jnp.int32, (plan.columns, plan.rows), axis)
        for start, axis in ((at.row, 1), (at.column, 0))
    )
    terms = jax.tree.map(lambda ref: ref[0, 0], given.terms)
    where = entry.visible(band, loop.masks_of_tile(plan, given.masks, limits), t, s)
    return entry.logits(_dot(k, q, 1, 1), terms, where)


def _dot(a, b, a_axis, b_axis):
    """A product of tiles, contracted over one axis of each."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _fill(ref, value, at=slice(None)):
    size = ref.shape[0] if isinstance(at, slice) else at.size
    ref[at, :] = jnp.full((size, ref.shape[1]), value, ref.dtype)


def _write(refs, *values, at=slice(None)):
    for ref, value in zip(refs, values, strict=True):
        ref[at, :] = value.astype(ref.dtype)
