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
from jaxgrad.kernels.attention_tiles import Band, Masks, Terms
from jaxgrad.sharding import AxisName

OF = "ring_attention"


def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: AxisName,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    logits_soft_cap: ArrayLike | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Attention inside ``shard_map``, each shard with the next part of one sequence.

    .. math:: o = \sigma(c\tanh(s\,q k^\top / c))\, v

    What :func:`dot_product_attention` gives for the whole sequence. A shard holds the keys and
    values of two shards at a time, and sends them n times around the ring, k̄ and v̄ with them in
    the backward. With ``is_causal`` the last shard computes n blocks and the first one.

    Args:
      query: ``float[B, T, N, H]``, or ``float[T, N, H]``: this shard's part of the sequence, as
        long as any other's.
      key: ``float[B, S, K, H]``, likewise.
      value: ``float[B, S, K, D]``, likewise.
      axis_name: The mesh axis of the ``shard_map`` around the call that the sequence is cut over.
      scale: Factor of the logits, ``float[]``; :math:`1/\sqrt H` by default.
      is_causal: A query sees the keys up to its own place in the sequence alone.
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
        axis_name,
        is_causal,
        return_residual,
        query,
        key,
        value,
        scale,
        logits_soft_cap,
        segment_ids,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jit(axis_name, is_causal, return_residual, query, key, value, scale, cap, segment_ids):
    q, k, v = arguments.arrays(query, key, value)
    sharding.check(
        OF, axis_name, cut={"query": q, "key": k, "value": v, "segment_ids": segment_ids}
    )
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{OF}: key must be as long as query with is_causal, got query of "
            f"{numerics.describe(q)} and key of {numerics.describe(k)}"
        )
    sizes = arguments.sizes(q, k)
    terms = arguments.terms(sizes, q, None, scale, cap)
    masks = arguments.masks(sizes, None, None, None, segment_ids)
    given = (*arguments.by_head(sizes, q, k, v), terms, masks)
    out: Any = _ring(axis_name, is_causal, *sharding.lift(given, axis_name))
    o, lse = out
    return arguments.results(query, o, lse, return_residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    axis_name: AxisName, is_causal: bool, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Array, Array]:
    o, m, excess = _forward(axis_name, is_causal, q, k, v, terms, masks)
    return numerics.narrow(o, like=q), numerics.log_sum_exp(m, excess)


def _forward(axis_name, is_causal, q, k, v, terms, masks):  # (1)
    def see(keys, band=EVERY):
        k, v, ids = keys
        return attention._forward(band, q, k, v, terms, masks._replace(key_segment=ids))

    def step(carry, j):
        part, keys = carry
        coming = _passed_on(keys, axis_name)
        more = lambda: attention_parts.merge(part, see(keys))
        return (_unless_after(is_causal, axis_name, j, more, lambda: part), coming), None

    keys = (k, v, masks.key_segment)
    carry = (see(keys, CAUSAL if is_causal else EVERY), _passed_on(keys, axis_name))
    return lax.scan(step, carry, _steps(axis_name))[0][0]


def _fwd(axis_name, is_causal, q, k, v, terms, masks):
    o, m, excess = _forward(axis_name, is_causal, q, k, v, terms, masks)
    o = numerics.narrow(o, like=q)
    return (o, numerics.log_sum_exp(m, excess)), (q, k, v, terms, masks, o, m, excess)


def _bwd(axis_name, is_causal, residuals, bars):  # (2)
    q, k, v, terms, masks, o, m, excess = residuals
    o_bar, l_bar = bars
    mean = (numerics.widen(o) * numerics.widen(o_bar)).sum(-1, keepdims=True) - l_bar

    def pull(keys, band=EVERY):
        k, v, ids = keys
        masks_ = masks._replace(key_segment=ids)
        q_bar, k_bar, v_bar, terms_bar = attention._backward(
            band, q, k, v, terms, masks_, o_bar, mean, m, excess
        )
        return (q_bar, terms_bar), (k_bar, v_bar)

    def step(carry, j):
        stays, keys, travels = carry
        coming = _passed_on(keys, axis_name)
        before = (stays, travels)
        more = lambda: jax.tree.map(jnp.add, before, pull(keys))
        stays, travels = _unless_after(is_causal, axis_name, j, more, lambda: before)
        return (stays, coming, _passed_on(travels, axis_name)), None

    keys = (k, v, masks.key_segment)
    stays, travels = pull(keys, CAUSAL if is_causal else EVERY)
    carry = (stays, *_passed_on((keys, travels), axis_name))
    ((q_bar, terms_bar), _, (k_bar, v_bar)), _ = lax.scan(step, carry, _steps(axis_name))
    bars = (q_bar, k_bar, v_bar, terms_bar)
    return *jax.tree.map(numerics.narrow, bars, (q, k, v, terms)), None


_ring.defvjp(_fwd, _bwd)

EVERY, CAUSAL = Band(None, None), Band(None, 0)


def _steps(axis_name):
    return jnp.arange(1, lax.axis_size(axis_name), dtype=jnp.int32)


def _passed_on(tree, axis_name):
    n = lax.axis_size(axis_name)
    ring = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, ring), tree)


def _unless_after(is_causal, axis_name, j, then, otherwise):
    """``then()``, but not in step j of a causal ring if it has come to keys of a later shard."""
    return lax.cond(lax.axis_index(axis_name) >= j, then, otherwise) if is_causal else then()
