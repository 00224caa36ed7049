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

The T × S matrix is never held. In the forward, a row is merged from the parts that tiles of keys
give. In the backward, a tile of p is made again from q, k and two numbers per query: the maximum m
of its row, and the excess of its sum of exp(z - m) over 1. Residuals: query, key, value, output,
and these two numbers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxgrad import modes, numerics, sharding
from jaxgrad.backends import Choice, Implementation
from jaxgrad.kernels import attention_arguments as arguments
from jaxgrad.kernels import attention_pallas, attention_tangents
from jaxgrad.kernels.attention_parts import Part, merge, nothing
from jaxgrad.kernels.attention_products import dot, dot_each, dot_heads, dot_rows, logits
from jaxgrad.kernels.attention_tiles import Band, Masks, Plan, Terms
from jaxgrad.kernels.tanh import cap_slope, sech2
from jaxgrad.modes import Mode


@modes.public
def dot_product_attention(
    mode: Mode,
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
    implementation: Implementation | None = None,
    return_residual: bool = False,
    logits_soft_cap: ArrayLike | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
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
      bias: ``float``, broadcastable to ``[B, N, T, S]``; added to the logits after the soft-cap, as
        in Gemma 2 and FlashAttention, so that -inf hides an entry. (tokamax adds it before.) It has
        a gradient.
      mask: ``bool``, broadcastable to ``[B, N, T, S]``: the entries that take part.
      scale: Factor of the logits, ``float[]``; :math:`1/\sqrt H` by default. It has a gradient.
      is_causal: Query t sees the keys s ≤ t alone, counted from the first of each.
      query_seq_lengths: ``int[B]``; queries from there on give 0.
      key_value_seq_lengths: ``int[B]``; keys from there on are hidden.
      local_window_size: (left, right), or one number for both: query t sees the keys from t - left
        to t + right alone.
      implementation: None to choose: "pallas_gpu" for 16-bit arrays where one H100 is all there is,
        as it was measured to be faster there, with "xla" for what it lacks; else "xla". By name:
        "xla", any device and all that is described here; "pallas_gpu", kernels for GPU by way of
        Triton (a part of JAX that is deprecated since 0.11, where it works), for heads of at most
        256; "pallas_tpu", kernels for TPU, for no bias and no mask, compiled for it and never run
        on one; "pallas_gpu_interpret" and "pallas_interpret", the same two on any device, slowly.
        The kernels lack derivatives to bias, scale and soft-cap, and second ones. What is named
        runs, or an error tells why not. :func:`jax.export` does not serialize kernels: name "xla"
        there.
      return_residual: Whether to return the log-sum-exp of the logits too.
      logits_soft_cap: c above, ``float[]`` above 0. It may be traced and has a gradient.
      segment_ids: ``int[B, T]``, or a pair of ``int[B, T]`` and ``int[B, S]``: a query sees the
        keys of its own segment alone.

    Returns:
      ``float[B, T, N, D]`` in the dtype of ``query``, without B if that has none. With
      ``return_residual`` a pair of this and ``float[B, T, N]``, the log-sum-exp of each query's
      logits: float32 for 16-bit input, -inf where a query sees no key, and differentiable.

    Raises:
      TypeError: An argument is complex, or not of the kind or dtype above.
      ValueError: An argument does not have the shape above, ``logits_soft_cap`` is not above 0, or
        there is no such ``implementation``.
      NotImplementedError: ``implementation`` cannot run this call, or be differentiated so.

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
        mode,
        implementation,
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _jit(
    mode,
    implementation,
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
    given = (*arguments.by_head(sizes, q, k, v), terms, masks)
    runs, given = attention_pallas.implemented(mode, implementation, *given)
    attention = modes.of(mode, _attention, _attention_twin)
    o, lse = attention(runs, band, *sharding.lift(given))
    return arguments.results(query, o, lse, return_residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    runs: Choice, band: Band, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Array, Array]:
    return _fwd(runs, band, q, k, v, terms, masks)[0]


def _forward(band, q, k, v, terms, masks, narrow=numerics.narrow):
    plan = Plan(q, k, band)

    def heads(_, of_heads):
        at, q, k, v = of_heads

        def block(_, rows):
            q_ = rows.queries(q)

            def tile(part, at):
                v_ = at.keys(v)
                z, _ = logits(band, q_, at.keys(k), terms, masks, at)
                m = lax.stop_gradient(numerics.row_max(z, -1))  # any shift gives the same p
                e = jnp.exp(numerics.below_max(z, m))
                excess = e.sum(-1, keepdims=True) - 1
                o = dot(e, v_) * numerics.inverse_sum(excess)  # (1)
                return merge(part, Part(o, m, excess))

            _, start = sharding.lift((q, nothing(q_, v)))
            part = plan.over_keys(tile, start, rows)
            return None, part._replace(o=narrow(part.o, like=q_))

        return None, plan.over_queries(block, None, at)[1]

    return plan.over_heads(heads, None, q, k, v)[1]


def _fwd(runs, band, *given):
    forward = attention_pallas.forward(runs, band, functools.partial(_forward, band))
    o, m, excess = forward(*given)
    o, m, excess = checkpoint_name((o, m, excess), arguments.OF)
    return (o, numerics.log_sum_exp(m, excess)), (*given, o, m, excess)


def _bwd(runs, band, residuals, bars):
    q, k, v, terms, masks, o, m, excess = residuals
    o_bar, l_bar = bars
    mean = dot_each(o, o_bar) - l_bar  # (2)
    backward = attention_pallas.backward(runs, band, functools.partial(_backward, band))
    out = backward(q, k, v, terms, masks, o_bar, mean, m, excess)
    return *jax.tree.map(numerics.narrow, out, (q, k, v, terms)), None


def _backward(band, q, k, v, terms, masks, o_bar, mean, m, excess, narrow=numerics.narrow):
    plan = Plan(q, k, band)

    def zeros(tree):
        return sharding.lift((q, jax.tree.map(lambda x: jnp.zeros_like(x, m.dtype), tree)))[1]

    def heads(terms_bar, of_heads):
        at, q, k, v, o_bar, mean, m, excess = of_heads

        def block(carry, rows):
            q_, o_bar_, mean_, m_, excess_ = map(rows.queries, (q, o_bar, mean, m, excess))
            over_sum = numerics.inverse_sum(excess_)

            def tile(carry, at):
                q_bar, k_bar, v_bar, terms_bar = carry
                k_, v_ = at.keys(k), at.keys(v)
                z, u = logits(band, q_, k_, terms, masks, at)
                p = jnp.exp(numerics.below_max(z, m_)) * over_sum
                v_bar = at.add_keys(v_bar, dot_rows(p, o_bar_))  # (3)
                z_bar = p * (dot_heads(o_bar_, v_) - mean_)  # (2)
                terms_bar = _with_tile(terms_bar, z_bar, u, at)
                z_bar = z_bar if u is None else z_bar * sech2(u)  # (4)
                k_bar = at.add_keys(k_bar, dot_rows(z_bar, q_))  # (3)
                return q_bar + dot(z_bar, k_), k_bar, v_bar, terms_bar

            q_bar, *carry = plan.over_keys(tile, (zeros(q_), *carry), rows)
            return tuple(carry), q_bar

        carry = (*zeros((k, v)), terms_bar)
        (k_bar, v_bar, terms_bar), q_bar = plan.over_queries(block, carry, at)
        of_scale = (q_bar * numerics.widen(q)).sum()
        terms_bar = terms_bar._replace(scale=terms_bar.scale + of_scale)
        bars = terms.scale * q_bar, terms.scale * k_bar, v_bar
        return terms_bar, tuple(map(narrow, bars, (q, k, v)))

    terms_bar, bars = plan.over_heads(heads, zeros(terms), q, k, v, o_bar, mean, m, excess)
    return *bars, terms_bar


_attention.defvjp(_fwd, _bwd)
_attention_twin = modes.custom_jvp(_fwd, attention_tangents.push, static=2)


def _with_tile(bars, z_bar, u, tile):
    """The cotangents of bias and soft-cap, with what a tile adds to them."""
    if bars.bias is not None:
        shape = tuple(map(min, bars.bias.shape, tile.sizes))
        bars = bars._replace(bias=tile.add(bars.bias, numerics.sum_to(z_bar, shape)))
    if u is not None:
        bars = bars._replace(cap=bars.cap + (z_bar * cap_slope(u)).sum())  # (4)
    return bars
