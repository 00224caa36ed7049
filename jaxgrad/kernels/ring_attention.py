r"""Attention over a sequence that the shards of a mesh axis hold parts of.

Shard i of n holds queries q_i, keys k_i and values v_i. It keeps its queries and passes keys and
values on, so that after j steps it sees those of shard i - j (mod n), and merges what they give:

    (o, m, excess)_i = merge over j of attention(q_i, k_{i-j}, v_{i-j})                (1)

With causal masking it sees its own keys up to each query, all keys of shards before it, and none of
shards after it: the steps j > i are skipped. In the backward, (3) of ``attention.py`` needs m and
the excess of whole rows alone, which (1) left behind; so each block of keys adds to q̄_i, and k̄ and
v̄ travel along with their keys until the n-th step takes them home:

    q̄_i += q̄(q_i, k_{i-j}, v_{i-j})           k̄_{i-j}, v̄_{i-j} += k̄, v̄ of the same       (2)

What a shard sends in a step does not depend on what it computes in it, but for k̄ and v̄.

A window that bounds what a query sees needs no ring: the keys of shard i - j come straight from
there, for the few j that the window reaches, and k̄ and v̄ go straight back. ``ring_blocks.py`` has
the window of each, and its part of bias and masks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxgrad import numerics, sharding
from jaxgrad.kernels import attention, attention_parts
from jaxgrad.kernels import attention_arguments as arguments
from jaxgrad.kernels.attention_tiles import Masks, Terms
from jaxgrad.kernels.ring_blocks import EVERY, Ring
from jaxgrad.sharding import AxisName

OF = "ring_attention"


def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    axis_name: AxisName,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Attention inside ``shard_map``, each shard with the next part of one sequence.

    .. math:: o = \sigma(c\tanh(s\,q k^\top / c))\, v

    What :func:`dot_product_attention` gives for the whole sequence. A shard holds the keys and
    values of two shards at a time, and sends them n times around the ring, k̄ and v̄ with them in
    the backward. With ``is_causal`` the last shard computes n blocks and the first one. With
    ``local_window_size`` it gets those of the shards alone that its window reaches.

    Args:
      query: ``float[B, T, N, H]``, or ``float[T, N, H]``: this shard's part of the sequence, as
        long as any other's.
      key: ``float[B, S, K, H]``, likewise.
      value: ``float[B, S, K, D]``, likewise.
      bias: ``float``, broadcastable to ``[B, N, T, n S]``: this shard's queries, and the keys of
        all n shards; added to the logits after the soft-cap.
      mask: ``bool``, likewise: the entries that take part.
      axis_name: The mesh axis of the ``shard_map`` around the call that the sequence is cut over.
      scale: Factor of the logits, ``float[]``; :math:`1/\sqrt H` by default.
      is_causal: A query sees the keys up to its own place in the sequence alone.
      query_seq_lengths: ``int[B]``, of whole sequences; queries from there on give 0.
      key_value_seq_lengths: ``int[B]``, likewise; keys from there on are hidden.
      local_window_size: As of :func:`dot_product_attention`, in places of the sequence.
      logits_soft_cap: c above, ``float[]`` above 0.
      segment_ids: This shard's, as of :func:`dot_product_attention`.
      return_residual: Whether to return the log-sum-exp of the logits too.

    Returns:
      This shard's part of what :func:`dot_product_attention` returns.

    Raises:
      TypeError: An argument is complex, or not of the kind or dtype above.
      ValueError: An argument does not have the shape above, or is not cut over ``axis_name``.

    Example:
      >>> mesh = jax.make_mesh((1,), ("sequence",))
      >>> q = k = jnp.zeros((2, 1, 2))
      >>> v = jnp.arange(4.0).reshape(2, 1, 2)
      >>> ring = functools.partial(ring_attention, axis_name="sequence", is_causal=True)
      >>> specs = jax.P("sequence")
      >>> o = jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=specs)(
      ...     *(jax.device_put(z, jax.NamedSharding(mesh, specs)) for z in (q, k, v))
      ... )
      >>> o[:, 0]
      Array([[0., 1.],
             [1., 2.]], dtype=float32)

    Where heads or batch are cut and not the sequence, :func:`dot_product_attention` needs no ring.

    Source: Liu, Zaharia and Abbeel, "Ring Attention", 2023, arXiv:2310.01889.
    """
    numerics.check_positive(logits_soft_cap, OF, "logits_soft_cap")
    return _jit(
        Ring(axis_name, arguments.band(local_window_size, is_causal, OF)),
        return_residual,
        query,
        key,
        value,
        bias,
        mask,
        scale,
        query_seq_lengths,
        key_value_seq_lengths,
        logits_soft_cap,
        segment_ids,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jit(
    ring,
    return_residual,
    query,
    key,
    value,
    bias,
    mask,
    scale,
    query_seq_lengths,
    key_value_seq_lengths,
    cap,
    segment_ids,
):
    q, k, v = arguments.arrays(query, key, value, OF)
    lengths = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    cut = {"query": q, "key": k, "value": v, "segment_ids": segment_ids}
    sharding.check(OF, ring.axis_name, cut, whole=lengths)
    if ring.band != EVERY and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{OF}: key must be as long as query with is_causal or local_window_size, got query of "
            f"{numerics.describe(q)} and key of {numerics.describe(k)}"
        )
    sizes = arguments.sizes(q, k, OF)
    of_all_keys = sizes._replace(keys=ring.shards * sizes.keys)
    terms = arguments.terms(of_all_keys, q, bias, scale, cap)
    masks = arguments.masks(sizes, None, query_seq_lengths, key_value_seq_lengths, segment_ids)
    masks = masks._replace(mask=arguments.masks(of_all_keys, mask, None, None, None).mask)
    given = (*arguments.by_head(sizes, q, k, v), terms, masks)
    out: Any = _ring(ring, *sharding.lift(given, ring.axis_name))
    o, lse = out
    return arguments.results(query, o, lse, return_residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    ring: Ring, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Array, Array]:
    o, m, excess = _forward(ring, q, k, v, terms, masks)
    return numerics.narrow(o, like=q), numerics.log_sum_exp(m, excess)


def _wide(x, like):  # what blocks give is rounded once, when they are together
    return x


def _forward(ring, q, k, v, terms, masks):  # (1)
    def see(j, keys, band):
        k, v, ids = keys
        terms_, masks_ = ring.block(j, q, k, terms, masks, ids)
        return attention._forward(band, q, k, v, terms_, masks_, _wide)

    def merged(part, j, keys, band):
        more = lambda: attention_parts.merge(part, see(j, keys, band))
        return ring.if_there(j, more, lambda: part)

    def step(carry, j):
        part, keys = carry
        coming = ring.passed_on(keys)
        return (merged(part, j, keys, EVERY), coming), None

    keys = (k, v, masks.key_segment)
    part = see(0, keys, ring.band)
    if (steps := ring.steps()) is not None:
        return lax.scan(step, (part, ring.passed_on(keys)), steps)[0][0]
    for j in ring.reached(q.shape[3]):
        part = merged(part, j, ring.passed_on(keys, j), ring.moved(j, q.shape[3]))
    return part


def _fwd(ring, q, k, v, terms, masks):
    o, m, excess = _forward(ring, q, k, v, terms, masks)
    o = numerics.narrow(o, like=q)
    return (o, numerics.log_sum_exp(m, excess)), (q, k, v, terms, masks, o, m, excess)


def _bwd(ring, residuals, bars):  # (2)
    q, k, v, terms, masks, o, m, excess = residuals
    o_bar, l_bar = bars
    mean = attention.dot_each(o, o_bar) - l_bar

    def added(before, j, keys, band):
        def more():
            (q_bar, terms_bar), travels = before
            k, v, ids = keys
            terms_, masks_ = ring.block(j, q, k, terms, masks, ids)
            q_bar_, k_bar, v_bar, block_bar = attention._backward(
                band, q, k, v, terms_, masks_, o_bar, mean, m, excess, _wide
            )
            stays = (q_bar + q_bar_, ring.with_block(j, k, terms_bar, block_bar))
            return stays, jax.tree.map(jnp.add, travels, (k_bar, v_bar))

        return ring.if_there(j, more, lambda: before)

    def step(carry, j):
        stays, keys, travels = carry
        coming = ring.passed_on(keys)
        stays, travels = added((stays, travels), j, keys, EVERY)
        return (stays, coming, ring.passed_on(travels)), None

    def zeros(tree):
        return sharding.lift((q, jax.tree.map(lambda x: jnp.zeros_like(x, m.dtype), tree)))[1]

    keys = (k, v, masks.key_segment)
    stays, travels = added(zeros(((q, terms), (k, v))), 0, keys, ring.band)
    if (steps := ring.steps()) is not None:
        carry = (stays, *ring.passed_on((keys, travels)))
        (stays, _, travels), _ = lax.scan(step, carry, steps)
    else:
        for j in ring.reached(q.shape[3]):
            there, nothing = ring.passed_on(keys, j), zeros((k, v))
            stays, back = added((stays, nothing), j, there, ring.moved(j, q.shape[3]))
            travels = jax.tree.map(jnp.add, travels, ring.passed_on(back, -j))
    bars = (stays[0], *travels, stays[1])
    return *jax.tree.map(numerics.narrow, bars, (q, k, v, terms)), None


_ring.defvjp(_fwd, _bwd)
