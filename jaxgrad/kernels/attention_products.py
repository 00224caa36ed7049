"""The products of attention for one tile, and its logits."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxgrad import backends, numerics, tiling
from jaxgrad.kernels.attention_tiles import Band, Masks, Tile


def logits(
    band: Band, q: Array, k: Array, terms: Any, masks: Masks, tile: Tile
) -> tuple[Array, Array | None]:
    """z of (1) in ``attention.py``, -inf where hidden, and u of (4)."""
    # A 16-bit q is scaled afterwards: the product would be rounded.
    z = dot_heads(q * terms.scale, k) if numerics.is_wide(q) else dot_heads(q, k) * terms.scale
    bias = None if terms.bias is None else tile.cut(terms.bias)
    return of_scaled(z, terms._replace(bias=bias), tile.visible(band, masks))


def of_scaled(z: Array, terms: Any, where: Array | None) -> tuple[Array, Array | None]:
    """The same from scale ⟨q, k⟩, the bias of the tile and which of its entries are visible."""
    # With nothing in between, product and z - m may be contracted into a multiply-add, whose z is
    # not the one that m was taken from.
    z = jnp.maximum(z, jnp.finfo(z.dtype).min)
    u = None
    if terms.cap is not None:
        u = z / terms.cap
        z = terms.cap * jnp.tanh(u)
    if terms.bias is not None:
        z += terms.bias.astype(z.dtype)
    return numerics.masked(z, where), u


def dot_heads(a: Array, b: Array) -> Array:
    """Σ over the head size: rows by keys."""
    return _product(a, b[:, :, 0], (4,), (3,))


def dot(a: Array, b: Array) -> Array:
    """Σ over the keys."""
    return _product(a, b[:, :, 0], (4,), (2,))


def dot_rows(a: Array, b: Array) -> Array:
    """Σ over the queries, those of all heads of a group."""
    # As bᵀ a, transposed: XLA's CPU would transpose a, the larger, to compute aᵀ b. Wide there: it
    # may fold the transpose into a product of 16 bits, and cannot run what comes of it.
    b = numerics.widen(b) if backends.platform() == "cpu" else b
    return _product(b, a, (2, 3), (2, 3)).mT[:, :, None]


def dot_each(a: Array, b: Array) -> Array:
    """Σ over the head size: each row with its own, one number a row."""
    a, b = numerics.widen(a), numerics.widen(b)
    if backends.platform() != "cpu":
        return (a * b).sum(-1, keepdims=True)
    return jnp.einsum("...d,...d->...", a, b)[..., None]  # 20 times as fast there


def _product(a, b, over_a, over_b):
    return tiling.product(a, b, ((over_a, over_b), ((0, 1), (0, 1))), numerics.widen(a).dtype)
