r"""Attention pushed forward, by tiles.

With r_s = scale ⟨q, k_s⟩ the logits before soft-cap and bias, u = r / c and p as in
``attention.py``, tangents of the arguments give

    ṙ_s = scale (⟨q̇, k_s⟩ + ⟨q, k̇_s⟩) + ⟨q, k_s⟩ d(scale)                  (1)
    ż_s = sech² u_s ṙ_s + (tanh u_s - u_s sech² u_s) ċ + ḃ_s               (2)
    l̇   = Σ_s p_s ż_s                                                     (3)
    ȯ   = Σ_s p_s (ż_s v_s + v̇_s) - o l̇                                   (4)

(3) and (4) are sums over the keys, so that tiles add to them; p is made again from the maximum and
the excess of its row, as in the backward, which is what the transpose of this becomes.
"""

import jax
import jax.numpy as jnp

from jaxgrad import numerics, sharding
from jaxgrad.kernels.attention_products import dot, dot_heads, logits
from jaxgrad.kernels.attention_tiles import Plan
from jaxgrad.kernels.tanh import cap_slope, sech2


def push(_, band, residuals, q_dot, k_dot, v_dot, terms_dot, masks_dot):
    """Tangents of output and log-sum-exp."""
    q, k, v, terms, masks, o, m, excess = residuals
    plan = Plan(q, k, band)
    # Wide, since the transpose sums over tiles in their dtype.
    dots, tree = jax.tree.flatten(jax.tree.map(numerics.widen, (q_dot, k_dot, v_dot)))

    def heads(_, of_heads):
        at, q, k, v, m, excess, *dots = of_heads
        q_dot, k_dot, v_dot = tree.unflatten(dots)

        def block(_, rows):
            q_, m_, excess_ = map(rows.queries, (q, m, excess))
            q_dot_ = None if q_dot is None else numerics.narrow(rows.queries(q_dot), like=q)
            over_sum = numerics.inverse_sum(excess_)

            def tile(carry, at):
                o_dot, l_dot = carry
                k_, v_ = at.keys(k), at.keys(v)
                z, u = logits(band, q_, k_, terms, masks, at)
                p = jnp.exp(numerics.below_max(z, m_)) * over_sum
                k_dot_ = None if k_dot is None else numerics.narrow(at.keys(k_dot), like=k)
                z_dot = _logits_dot(q_, k_, terms, u, q_dot_, k_dot_, terms_dot, at)
                if z_dot is not None:
                    weights = p * z_dot
                    l_dot += weights.sum(-1, keepdims=True)  # (3)
                    o_dot += dot(numerics.narrow(weights, like=v), v_)  # (4)
                if v_dot is not None:
                    v_dot_ = numerics.narrow(at.keys(v_dot), like=v)
                    o_dot += dot(numerics.narrow(p, like=v), v_dot_)
                return o_dot, l_dot

            row = jnp.zeros_like(m_)
            start = (jnp.broadcast_to(row, (*m_.shape[:-1], v.shape[-1])), row)
            return None, plan.over_keys(tile, sharding.lift((q, start))[1], rows)

        return None, plan.over_queries(block, None, at)[1]

    o_dot, l_dot = plan.over_heads(heads, None, q, k, v, m, excess, *dots)[1]
    return numerics.narrow(o_dot - numerics.widen(o) * l_dot, like=q), l_dot  # (4)


def _logits_dot(q, k, terms, u, q_dot, k_dot, terms_dot, tile):
    parts = []
    if q_dot is not None:  # (1)
        parts.append(terms.scale * dot_heads(q_dot, k))
    if k_dot is not None:
        parts.append(terms.scale * dot_heads(q, k_dot))
    if terms_dot.scale is not None:
        parts.append(terms_dot.scale * dot_heads(q, k))
    if u is not None:  # (2)
        parts = [sech2(u) * part for part in parts]
        if terms_dot.cap is not None:
            parts.append(terms_dot.cap * cap_slope(u))
    if terms_dot.bias is not None:
        parts.append(tile.cut(numerics.widen(terms_dot.bias)))
    return sum(parts) if parts else None
