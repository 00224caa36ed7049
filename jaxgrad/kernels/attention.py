r"""Attention: the soft-max of query · key times value, and its derivative by tiles.

One query q with keys k_s and values v_s, s running over the keys that the query sees:

    z_s = scale ⟨q, k_s⟩        p = σ(z)        o = Σ_s p_s v_s                        (1)

ō being the cotangent of o, that of p is p̄_s = ⟨ō, v_s⟩, and soft-max takes it to

    z̄ = p ⊙ (p̄ - ⟨p, p̄⟩)                       ⟨p, p̄⟩ = Σ_s p_s ⟨ō, v_s⟩ = ⟨o, ō⟩     (2)

The last form of ⟨p, p̄⟩ reads one vector, not a row of the matrix. The log-sum-exp l of z, with
cotangent l̄, adds l̄ p to z̄. Then, summed over the queries t,

    v̄_s = Σ_t p_ts ō_t      q̄_t = scale Σ_s z̄_ts k_s      k̄_s = scale Σ_t z̄_ts q_t    (3)

A bias is added to z: its cotangent is z̄, summed over the axes it was broadcast along. A soft-cap c
makes z_s = c tanh u_s before the bias, u_s = scale ⟨q, k_s⟩ / c; behind it, z̄ passes through

    ∂z/∂(c u) = sech² u         ∂z/∂c = tanh u - u sech² u                             (4)

The T × S matrix is never held. A tile of p is made from q, k and two numbers per query, the maximum
and the excess of the sum of its row; it is used and dropped, in the forward and once more in the
backward. Residuals: query, key, value, output, and these two numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import numerics
from jaxgrad.kernels import attention_arguments as arguments
from jaxgrad.kernels import attention_tiles as tiles
from jaxgrad.kernels.attention_tiles import Band, Masks, Plan, Terms
from jaxgrad.kernels.tanh import cap_slope, sech2


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Attention that never holds the matrix of its logits, forward or backward.

    .. math:: o = \sigma(c\tanh(s\,q k^\top / c) + b)\, v, \qquad
              \bar z = p \odot (\bar o v^\top - \langle o, \bar o \rangle)

    A drop-in for :func:`jax.nn.dot_product_attention`, with a soft-cap and segments besides. Memory
    grows with T + S, not with T · S. What ``is_causal`` and ``local_window_size`` hide is not
    computed, up to the tiles that straddle the edge. A query that sees no key gives 0 with gradient
    0, where ``jax.nn`` gives the mean of ``value``.

    Args:
      query: ``float[B, T, N, H]``, or ``float[T, N, H]``. 16-bit input is summed in float32.
      key: ``float[B, S, K, H]``, in the dtype of ``query``. N is a multiple of K; each group of
        N / K consecutive query heads shares one key head.
      value: ``float[B, S, K, D]``, in the dtype of ``query``; mostly D = H.
      bias: ``float``, broadcastable to ``[B, N, T, S]``; added to the logits after the soft-cap, so
        that -inf hides an entry. It has a gradient.
      mask: ``bool``, broadcastable to ``[B, N, T, S]``: the entries that take part.
      scale: Factor of the logits, ``float[]``; :math:`1/\sqrt H` by default. It has a gradient.
      is_causal: Query t sees the keys s ≤ t alone, counted from the first of each.
      query_seq_lengths: ``int[B]``; queries from there on give 0.
      key_value_seq_lengths: ``int[B]``; keys from there on are hidden.
      local_window_size: (left, right), or one number for both: query t sees the keys from t - left
        to t + right alone.
      logits_soft_cap: c above, ``float[]`` above 0. It may be traced and has a gradient.
      segment_ids: ``int[B, T]``, or a pair of ``int[B, T]`` and ``int[B, S]``: a query sees the
        keys of its own segment alone.
      return_residual: Whether to return the log-sum-exp of the logits too.

    Returns:
      ``float[B, T, N, D]`` in the dtype of ``query``, without B if that has none. With
      ``return_residual`` a pair of this and ``float[B, T, N]``, the log-sum-exp of each query's
      logits: float32 for 16-bit input, -inf where a query sees no key, and differentiable.

    Raises:
      TypeError: An argument is complex, or not of the kind or dtype above.
      ValueError: An argument does not have the shape above, or ``logits_soft_cap`` is not above 0.

    Example:
      >>> q, k, v = jnp.zeros((3, 1, 2)), jnp.zeros((3, 1, 2)), jnp.arange(6.0).reshape(3, 1, 2)
      >>> dot_product_attention(q, k, v, is_causal=True)[:, 0]
      Array([[0., 1.],
             [1., 2.],
             [2., 3.]], dtype=float32)

    Under :func:`jax.checkpoint`, the policy ``save_only_these_names("dot_product_attention")``
    keeps the residuals that are not arguments, so that the forward is not run again.

    Source:
      FlashAttention-2 (Dao, 2023, arXiv:2307.08691), section 3; Rabe and Staats (2021,
      arXiv:2112.05682) for memory without the matrix.

    See also:
      :func:`softmax_vjp`, the backward rule of one row.
    """
    numerics.check_positive(logits_soft_cap, arguments.OF, "logits_soft_cap")
    band = arguments.band(local_window_size, is_causal)
    return _jit(
        band,
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
    band,
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
    q, k, v = arguments.arrays(query, key, value)
    sizes = arguments.sizes(q, k)
    terms = arguments.terms(sizes, q, bias, scale, cap)
    masks = arguments.masks(sizes, mask, query_seq_lengths, key_value_seq_lengths, segment_ids)
    out: Any = _attention(band, *arguments.by_head(sizes, q, k, v), terms, masks)
    o, lse = out
    shape = jnp.shape(query)[:-1]
    o = arguments.by_token(o).reshape(*shape, v.shape[-1])
    return (o, arguments.by_token(lse).reshape(shape)) if return_residual else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    band: Band, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Array, Array]:
    o, m, excess = _forward(band, q, k, v, terms, masks)
    return o, numerics.log_sum_exp(m, excess)


def _forward(band, q, k, v, terms, masks):
    plan = Plan(q, k, band)

    def heads(_, of_heads):
        at, q, k, v = of_heads

        def block(_, starts, sizes):
            @jax.checkpoint
            def tile(q, k, v, terms):
                z, _ = _logits(band, q, k, terms, masks, starts, sizes)
                m = numerics.row_max(z, -1)
                e = jnp.exp(numerics.below_max(z, m))
                excess = e.sum(-1, keepdims=True) - 1
                o = _dot(numerics.narrow(e, like=v), v) * numerics.inverse_sum(excess)  # (1)
                return o, m, excess

            rows, keys = tiles.slices(starts, sizes)
            return None, tile(rows(q), keys(k), keys(v), terms)

        return None, plan.over_blocks(block, None, at)[1]

    _, (o, m, excess) = plan.over_heads(heads, None, q, k, v)
    return numerics.narrow(o, like=q), m, excess


def _fwd(band, q, k, v, terms, masks):
    o, m, excess = (checkpoint_name(x, arguments.OF) for x in _forward(band, q, k, v, terms, masks))
    return (o, numerics.log_sum_exp(m, excess)), (q, k, v, terms, masks, o, m, excess)


def _bwd(band, residuals, bars):
    q, k, v, terms, masks, o, m, excess = residuals
    o_bar, l_bar = bars
    plan = Plan(q, k, band)
    mean = (numerics.widen(o) * numerics.widen(o_bar)).sum(-1, keepdims=True) - l_bar  # (2)

    def heads(terms_bar, of_heads):
        at, q, k, v, o_bar, mean, m, excess = of_heads

        def block(carry, starts, sizes):
            @jax.checkpoint
            def tile(q, k, v, o_bar, mean, m, excess, terms):
                z, u = _logits(band, q, k, terms, masks, starts, sizes)
                p = jnp.exp(numerics.below_max(z, m)) * numerics.inverse_sum(excess)
                v_bar = _dot_rows(numerics.narrow(p, like=v), o_bar)  # (3)
                z_bar = p * (_dot_heads(o_bar, v) - mean)  # (2)
                bar = _to_terms(terms, z_bar, u, sizes)
                z_bar = numerics.narrow(z_bar if u is None else z_bar * sech2(u), like=q)  # (4)
                return _dot(z_bar, k), _dot_rows(z_bar, q), v_bar, bar  # (3)

            rows, keys = tiles.slices(starts, sizes)
            k_bar, v_bar, terms_bar = carry
            q_bar, k_add, v_add, terms_add = tile(
                rows(q), keys(k), keys(v), rows(o_bar), rows(mean), rows(m), rows(excess), terms
            )
            at_keys = (0, 0, 0, starts[4], 0)
            k_bar, v_bar = tiles.add(k_bar, k_add, at_keys), tiles.add(v_bar, v_add, at_keys)
            return (k_bar, v_bar, _added(terms_bar, terms_add, starts)), q_bar

        zeros = (jnp.zeros(k.shape, m.dtype), jnp.zeros(v.shape, m.dtype), terms_bar)
        (k_bar, v_bar, terms_bar), q_bar = plan.over_blocks(block, zeros, at)
        return terms_bar, (q_bar, k_bar, v_bar)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, m.dtype), terms)
    terms_bar, (q_bar, k_bar, v_bar) = plan.over_heads(
        heads, zeros, q, k, v, o_bar, mean, m, excess
    )
    terms_bar = terms_bar._replace(scale=(q_bar * numerics.widen(q)).sum())
    return (
        numerics.narrow(terms.scale * q_bar, like=q),
        numerics.narrow(terms.scale * k_bar, like=k),
        numerics.narrow(v_bar, like=v),
        jax.tree.map(numerics.narrow, terms_bar, terms),
        None,
    )


_attention.defvjp(_fwd, _bwd)


def _logits(band, q, k, terms, masks, starts, sizes):
    """z of (1), -inf where hidden, and u of (4)."""
    # A 16-bit q is scaled afterwards: the product would be rounded.
    z = _dot_heads(q * terms.scale, k) if numerics.is_wide(q) else _dot_heads(q, k) * terms.scale
    # With nothing in between, product and z - m may be contracted into a multiply-add, whose z is
    # not the one that m was taken from.
    z = jnp.maximum(z, jnp.finfo(z.dtype).min)
    u = None
    if terms.cap is not None:
        u = z / terms.cap
        z = terms.cap * jnp.tanh(u)
    if terms.bias is not None:
        z += tiles.cut(terms.bias, starts, sizes).astype(z.dtype)
    return numerics.masked(z, tiles.visible(band, masks, starts, sizes)), u


def _to_terms(terms, z_bar, u, sizes):
    """What a tile adds to the cotangents of bias and soft-cap."""
    bias = cap = None
    if terms.bias is not None:
        bias = numerics.sum_to(z_bar, tuple(map(min, terms.bias.shape, sizes)))
    if u is not None:
        cap = (z_bar * cap_slope(u)).sum()  # (4)
    return Terms(bias, None, cap)


def _added(bar, add, starts):
    return bar._replace(
        bias=None if add.bias is None else tiles.add(bar.bias, add.bias, starts),
        cap=None if add.cap is None else bar.cap + add.cap,
    )


def _dot_heads(a, b):  # Σ over the head size: rows by keys
    return _product(a, b[:, :, 0], (4,), (3,))


def _dot(a, b):  # Σ over the keys
    return _product(a, b[:, :, 0], (4,), (2,))


def _dot_rows(a, b):  # Σ over the queries, those of all heads of a group
    return _product(a, b, (2, 3), (2, 3))[:, :, None]


def _product(a, b, over_a, over_b):
    return lax.dot_general(
        a, b, ((over_a, over_b), ((0, 1), (0, 1))), preferred_element_type=numerics.widen(a).dtype
    )
