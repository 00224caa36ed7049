"""Attention as Pallas kernels for GPU, by way of Triton; what an entry of a tile is, they are told.

A program has one block of queries, or of keys, and goes through the blocks of the other side that
see it: first those of which it sees every entry, which need no mask, then those at the edges.

    forward:     for keys:     z = ⟨q, k⟩, merge    o += σ(z) v                   two products
    of queries:  for keys:     z, p̄ = ⟨ō, v⟩        q̄ += z̄ k                       three
    of keys:     for queries:  z    v̄ += pᵀ ō    p̄    k̄ += z̄ᵀ q                   four

Nothing is added up in memory, so that results do not depend on the order in which programs run.
Query, key, value and output have the layout of the public function, [B, T, heads, H]: to take heads
apart costs no copy. JAX calls Pallas by way of Triton deprecated since 0.11, where it still works.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxgrad import numerics
from jaxgrad.backends.pallas_gpu import attention_blocks as blocks
from jaxgrad.backends.pallas_gpu.attention_blocks import load, store
from jaxgrad.backends.pallas_gpu.attention_operands import by_place, call, operands

LOG2E = 1.4426950408889634
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def obstacle(q: Any, k: Any, v: Any, terms: Any, masks: Any) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    del k, terms, masks
    if q.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16 alone, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > blocks.WIDEST:
        return f"takes heads of at most {blocks.WIDEST}, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def forward(
    entry: Any, band: Any, q: Any, k: Any, v: Any, terms: Any, masks: Any, interpret: Any
) -> tuple[Any, Any, Any]:
    """The output, and the maximum and excess of each row."""
    x = operands(q, k, v, terms, masks)
    (batch, t, heads, group, h), (s, d) = x.q.shape, (x.v.shape[1], x.v.shape[-1])
    cut = blocks.cut("forward", x.q, x.v)

    def kernel(x, out):
        rows, g = _block_of_queries(band, cut, t, group)
        q = load(x.q, rows, g, blocks.whole(h))

        def step(part, keys, edge):
            o, m, excess = part
            v = load(x.v, keys, blocks.whole(d))
            z = _dot_heads(q, load(x.k, keys, blocks.whole(h)))
            z, _ = _logits(entry, band, x, z, rows, keys, g, edge)
            m_new = jnp.maximum(m, z.max(1))
            e = _exp(numerics.below_max(z, m_new[:, None]))
            before, more = _exp(numerics.below_max(m, m_new)), e.sum(1)
            # As ``numerics.merge``, by the exponential that the output needs too.
            excess = jnp.where(m == m_new, excess + more, (more - 1) + (1 + excess) * before)
            return o * before[:, None] + _dot(e.astype(v.dtype), v), m_new, excess

        row = jnp.zeros(rows.size, jnp.float32)
        o = jnp.zeros((rows.size, blocks.padded(d)), jnp.float32)
        seen = _keys_seen(band, cut, x, rows, s)
        o, m, excess = seen.fold(step, (o, row - jnp.inf, row - 1))
        store(out[0], o * numerics.inverse_sum(excess)[:, None], rows, g, blocks.whole(d))
        store(out[1], m, g, rows)
        store(out[2], excess, g, rows)

    row = jax.ShapeDtypeStruct((batch, heads, group, t), jnp.float32)
    out = (jax.ShapeDtypeStruct((batch, t, heads, group, d), q.dtype), row, row)
    grid = (pl.cdiv(t, cut.queries), heads * group, batch)
    o, m, excess = call(kernel, "forward", x, out, (2, 1, 1), grid, group, cut, interpret)
    return o.transpose(0, 2, 3, 1, 4), m[..., None], excess[..., None]


def backward(
    entry: Any, band: Any, q: Any, k: Any, v: Any, terms: Any, masks: Any,
    o_bar: Any, mean: Any, m: Any, excess: Any, interpret: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The cotangents of query, key and value."""
    x = operands(q, k, v, terms, masks)
    numbers = (mean, m, numerics.inverse_sum(excess))
    x = x._replace(o_bar=by_place(o_bar), numbers=tuple(z[..., 0] for z in numbers))
    q_bar = _of_queries(entry, band, x, interpret)
    k_bar, v_bar = _of_keys(entry, band, x, interpret)
    by_head = lambda z: z.transpose(0, 2, 1, 3)[:, :, None]
    return q_bar.transpose(0, 2, 3, 1, 4), by_head(k_bar), by_head(v_bar)


def _of_queries(entry, band, x, interpret):
    (batch, t, heads, group, h), (s, d) = x.q.shape, (x.v.shape[1], x.v.shape[-1])
    cut = blocks.cut("of_queries", x.q, x.v)

    def kernel(x, out):
        rows, g = _block_of_queries(band, cut, t, group)
        q, o_bar = load(x.q, rows, g, blocks.whole(h)), load(x.o_bar, rows, g, blocks.whole(d))
        mean, m, over_sum = (read()[:, None] for read in _numbers(x, rows, g))

        def step(q_bar, keys, edge):
            k, v = load(x.k, keys, blocks.whole(h)), load(x.v, keys, blocks.whole(d))
            z, u = _logits(entry, band, x, _dot_heads(q, k), rows, keys, g, edge)
            _, slope = _slope(entry, z, u, m, over_sum)
            z_bar = slope * (_dot_heads(o_bar, v) - mean)
            return q_bar + _dot(z_bar.astype(k.dtype), k)

        seen = _keys_seen(band, cut, x, rows, s)
        q_bar = seen.fold(step, jnp.zeros((rows.size, blocks.padded(h)), jnp.float32))
        store(out[0], q_bar * x.terms.scale, rows, g, blocks.whole(h))

    grid = (pl.cdiv(t, cut.queries), heads * group, batch)
    return call(kernel, "of_queries", x, (x.q,), (2,), grid, group, cut, interpret)[0]


def _of_keys(entry, band, x, interpret):
    (batch, t, heads, group, h), (s, d) = x.q.shape, (x.v.shape[1], x.v.shape[-1])
    cut = blocks.cut("of_keys", x.q, x.v)

    def kernel(x, out):
        keys = blocks.side(pl.program_id(0), cut.keys, s)
        k, v = load(x.k, keys, blocks.whole(h)), load(x.v, keys, blocks.whole(d))

        def of_head(g, bars):
            def step(bars, rows, edge):
                k_bar, v_bar = bars
                q, o_bar = (load(z, rows, g, blocks.whole(n)) for z, n in ((x.q, h), (x.o_bar, d)))
                mean, m, over_sum = _numbers(x, rows, g)
                z = _dot_heads(k, q)
                z, u = _logits(entry, band, x, z, rows, keys, g, edge, by_key=True)
                p, slope = _slope(entry, z, u, m()[None, :], over_sum()[None, :])
                v_bar += _dot(p.astype(v.dtype), o_bar)
                z_bar = slope * (_dot_heads(v, o_bar) - mean()[None, :])
                return k_bar + _dot(z_bar.astype(q.dtype), q), v_bar

            return seen.fold(step, bars)

        seen = _queries_that_see(band, cut, x, keys, t)
        zeros = lambda n: jnp.zeros((keys.size, blocks.padded(n)), jnp.float32)
        k_bar, v_bar = lax.fori_loop(jnp.int32(0), jnp.int32(group), of_head, (zeros(h), zeros(d)))
        store(out[0], k_bar * x.terms.scale, keys, blocks.whole(h))
        store(out[1], v_bar, keys, blocks.whole(d))

    grid = (pl.cdiv(s, cut.keys), heads, batch)
    return call(kernel, "of_keys", x, (x.k, x.v), (2, 2), grid, 1, cut, interpret)


def _block_of_queries(band, cut, t, group):
    """The queries of this program, and their head in its group."""
    i = pl.program_id(0)
    if band.right is not None:  # those that see the most keys begin first
        i = pl.num_programs(0) - 1 - i
    return blocks.side(i, cut.queries, t), lax.rem(pl.program_id(1), group)


def _keys_seen(band, cut, x, rows, s):
    of_queries, of_keys = x.masks.query_length, x.masks.key_length
    return blocks.span(rows, of_queries, cut.keys, s, of_keys, band, _hides(x))


def _queries_that_see(band, cut, x, keys, t):
    of_queries, of_keys = x.masks.query_length, x.masks.key_length
    seen_by = (band.right, band.left)
    return blocks.span(keys, of_keys, cut.queries, t, of_queries, seen_by, _hides(x))


def _hides(x):
    """Whether any entry may be hidden, in band and lengths too."""
    return x.masks.mask is not None or x.masks.query_segment is not None


def _logits(entry, band, x, products, rows, keys, g, edge, by_key=False):
    """z and u of a tile, whose rows are the queries, or its columns ``by_key``."""
    of_rows = lambda z: z[None, :] if by_key else z[:, None]
    of_keys = lambda z: z[:, None] if by_key else z[None, :]

    def tile(ref):
        heads, queries, columns = ref.shape
        z = load(ref, lax.rem(g, heads), rows.of(queries), keys.of(columns))
        return z.T if by_key else z

    bias = x.terms.bias
    terms = x.terms._replace(bias=None if bias is None else tile(bias))
    where = None
    if edge:
        mask, _, s_end, t_segment, s_segment = x.masks
        if not keys.inside:
            s_end = keys.length if s_end is None else jnp.minimum(s_end, keys.length)
        masks = x.masks._replace(
            mask=None if mask is None else tile(mask),
            key_length=s_end,
            query_segment=None if t_segment is None else of_rows(load(t_segment, rows)),
            key_segment=None if s_segment is None else of_keys(load(s_segment, keys)),
        )
        where = entry.visible(band, masks, of_rows(rows.index), of_keys(keys.index))
    return entry.logits(products, terms, where)


def _numbers(x, rows, g):
    """What reads the numbers of queries, late: each takes registers from then on.

    Queries beyond the end see no key.
    """
    mean, m, over_sum = x.numbers
    read = lambda ref, other: lambda: load(ref, g, rows, other=other)
    return read(mean, 0), read(m, jnp.inf), read(over_sum, 0)


def _slope(entry, z, u, m, over_sum):
    """p, and z̄ / (p̄ - mean) of scale ⟨q, k⟩; m is inf, not -inf, where a query sees no key."""
    p = _exp(z - m) * over_sum
    return p, p if u is None else p * entry.slope(u)


def _exp(x):
    return jnp.exp2(LOG2E * x)


def _dot_heads(a, b):
    return _product(a, b, 1, 1)


def _dot(a, b):
    return _product(a, b, 1, 0)


def _product(a, b, over_a, over_b):
    return lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
