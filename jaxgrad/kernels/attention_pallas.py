"""Attention by Pallas kernels: what a backend is asked for, and what an entry of its tiles is.

A backend has three functions. Arrays have the five axes of ``attention_tiles``, numbers of a row
among them, [..., T, 1]; m and the excess are float32, and so is the mean, ⟨o, ō⟩ - l̄:

    obstacle(q, k, v, terms, masks)                                     -> why it cannot, or None
    forward(entry, band, q, k, v, terms, masks, interpret)              -> o, m, excess
    backward(entry, band, q, k, v, terms, masks, ō, mean, m, excess, interpret)  -> q̄, k̄, v̄

It decides which tiles it visits and where they are held. What an entry of them is stands here and
in ``attention_tiles``. Residuals are those of the loops in plain JAX. There is no derivative to
bias, scale and soft-cap, and no second one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrad import backends, numerics
from jaxgrad.backends import Implementation
from jaxgrad.kernels import attention_products, attention_tiles
from jaxgrad.kernels.attention_arguments import OF
from jaxgrad.kernels.attention_tiles import Band, Masks, Terms
from jaxgrad.kernels.tanh import sech2


class Entry(NamedTuple):
    """The entries of a tile of any axes, from what broadcasts to them."""

    visible: Callable[[Band, Masks, Array, Array], Array | None]  # of band, masks of the tile, t, s
    logits: Callable[[Array, Terms, Array | None], tuple[Array, Array | None]]
    slope: Callable[[Array], Array]  # of u, what z̄ is multiplied by where there is a soft-cap


def _logits(products: Array, terms: Terms, where: Array | None) -> tuple[Array, Array | None]:
    """z and u from ⟨q, k⟩, the terms of the tile, and which entries are visible."""
    return attention_products.of_scaled(products * terms.scale, terms, where)


ENTRY = Entry(attention_tiles.visible, _logits, sech2)


def implemented(
    mode: str, implementation: Any, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Implementation, tuple[Array, Array, Array, Terms, Masks]]:
    """The implementation that runs a call, and the arguments as that takes them."""
    obstacle = None
    if implementation in backends.OTHERS[OF]:
        obstacle = _obstacle(implementation, mode, q, k, v, terms, masks)
    runs = backends.choose(OF, implementation, obstacle).name
    if runs != "xla":
        refuse = f"{OF}: implementation={runs!r} has no gradient for bias, scale and "
        terms = _raises(lambda terms: terms, refuse + "logits_soft_cap; 'xla' has")(terms)
    return runs, (q, k, v, terms, masks)


def _obstacle(implementation, mode, q, k, v, terms, masks):
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if mode != "reverse":
        return "has a backward rule alone"
    if manual:
        return f"runs outside of shard_map alone, got axes {manual}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "takes no array of size 0"
    return _backend(implementation)[0].obstacle(q, k, v, terms, masks)


def forward(
    runs: Implementation, band: Band, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Array, Array, Array]:
    """The output, and the maximum and excess of each row."""
    backend, interpret = _backend(runs)

    def run(*given):
        return backend.forward(ENTRY, band, *given, interpret)

    return _once(run)(q, k, v, terms, masks)


def backward(
    runs: Implementation, band: Band, q: Array, k: Array, v: Array, terms: Terms, masks: Masks,
    o_bar: Array, mean: Array, m: Array, excess: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The cotangents of query, key and value."""
    backend, interpret = _backend(runs)
    # All p of a query without a key are 0, whatever the logits are.
    m = jnp.where(excess == -1, jnp.inf, m)

    def run(*given):
        return backend.backward(ENTRY, band, *given, interpret)

    bars = _once(run)(q, k, v, terms, masks, o_bar, mean, m, excess)
    return tuple(map(numerics.narrow, bars, (q, k, v)))


def _backend(runs) -> tuple[Any, bool]:
    if runs.startswith("pallas_gpu"):
        from jaxgrad.backends.pallas_gpu import attention as backend
    else:
        from jaxgrad.backends.pallas_tpu import attention as backend
    return backend, runs.endswith("interpret")


def _once(f):
    return _raises(f, f"{OF}: a second derivative needs implementation='xla'")


def _raises(f, message):
    """``f``, and an error where it is differentiated."""
    f = jax.custom_jvp(f)

    @f.defjvp
    def _(*_):
        raise NotImplementedError(message)

    return f
