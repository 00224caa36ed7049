"""Attention by Pallas kernels: what a backend is asked for, and what an entry of its tiles is.

A backend has three functions. Arrays have the five axes of ``attention_tiles``, numbers of a row
among them, [..., T, 1]; m and the excess are float32, and so is the mean, ⟨o, ō⟩ - l̄:

    obstacle(q, k, v, terms, masks)                                     -> why it cannot, or None
    forward(entry, band, q, k, v, terms, masks, interpret)              -> o, m, excess
    backward(entry, band, q, k, v, terms, masks, ō, mean, m, excess, interpret)  -> q̄, k̄, v̄

where m is inf in the backward for a query that sees no key, so that each p of it is 0. A backend
decides which tiles it visits and where they are held. What an entry of them is stands here and in
``attention_tiles``. Residuals are those of the loops in plain JAX.

There is no derivative to bias, scale and soft-cap, and no second one. Who names a kernel and asks
for them gets an error. For who named none, the loops give them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import backends, modes, numerics
from jaxgrad.backends import Choice
from jaxgrad.kernels import attention_products, attention_tiles
from jaxgrad.kernels.attention_arguments import OF
from jaxgrad.kernels.attention_tiles import Band, Masks, Terms
from jaxgrad.kernels.tanh import sech2


class Entry(NamedTuple):
    """The entries of a tile of any axes, from what broadcasts to them."""

    visible: Callable[[Band, Masks, Array, Array], Array | None]  # of band, masks of the tile, t, s
    logits: Callable[[Array, Terms, Array | None], tuple[Array, Array | None]]
    slope: Callable[[Array], Array]  # of u, what z̄ is multiplied by where there is a soft-cap


def _logits(products: Array, terms: Any, where: Array | None) -> tuple[Array, Array | None]:
    """z and u from ⟨q, k⟩, the terms of the tile, and which entries are visible."""
    return attention_products.of_scaled(products * terms.scale, terms, where)


ENTRY = Entry(attention_tiles.visible, _logits, sech2)


def implemented(
    mode: str, implementation: Any, q: Array, k: Array, v: Array, terms: Terms, masks: Masks
) -> tuple[Choice, tuple[Array, Array, Array, Terms, Masks]]:
    """What runs a call, and the arguments as that takes them."""
    best = backends.preferred(OF)
    name = best.name if implementation is None and best is not None else implementation
    obstacle = None
    if name in backends.OTHERS[OF]:
        obstacle = _obstacle(name, mode, q, k, v, terms, masks)
    if implementation is None and numerics.is_wide(q):
        obstacle = obstacle or "was timed on 16-bit arrays alone"
    runs = backends.choose(OF, implementation, obstacle)
    if runs.name != "xla" and runs.asked:
        refuse = f"{OF}: implementation={runs.name!r} has no gradient for bias, scale and "
        terms = modes.refusing(lambda terms: terms, refuse + "logits_soft_cap; 'xla' has")(terms)
    return runs, (q, k, v, terms, masks)


def _obstacle(name, mode, q, k, v, terms, masks):
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if mode != "reverse":
        return "has a backward rule alone"
    if manual:
        return f"runs outside of shard_map alone, got axes {manual}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "takes no array of size 0"
    try:
        return _backend(name)[0].obstacle(q, k, v, terms, masks)
    except ImportError as error:
        return f"needs another version of JAX: {error}"


def forward(runs: Choice, band: Band, loops: Callable[..., Any]) -> Callable[..., Any]:
    """What gives output, maximum and excess: ``loops``, or the kernel that ``runs`` names."""
    if runs.name == "xla":
        return loops
    backend, interpret = _backend(runs.name)

    def kernel(*given):
        return backend.forward(ENTRY, band, *given, interpret)

    return _instead(runs, kernel, lambda *given: tuple(loops(*given)))


def backward(runs: Choice, band: Band, loops: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the cotangents of query, key, value and terms."""
    if runs.name == "xla":
        return loops
    backend, interpret = _backend(runs.name)

    def kernel(q, k, v, terms, masks, o_bar, mean, m, excess):
        m = jnp.where(excess == -1, jnp.inf, m)
        given = (q, k, v, terms, masks, o_bar, mean, m, excess)
        bars = backend.backward(ENTRY, band, *given, interpret)
        return tuple(map(numerics.narrow, bars, (q, k, v)))

    def run(*given):
        # Where nobody asks for the last, nothing of these loops is left.
        rest = jax.tree.map(jnp.zeros_like, given[3]) if runs.asked else loops(*given)[3]
        return *_instead(runs, kernel, lambda *given: loops(*given)[:3])(*given), rest

    return run


def _backend(name) -> tuple[Any, bool]:
    if name.startswith("pallas_gpu"):
        from jaxgrad.backends.pallas_gpu import attention as backend
    else:
        from jaxgrad.backends.pallas_tpu import attention as backend
    return backend, name.endswith("interpret")


def _instead(runs, kernel, loops):
    """``kernel``. If nobody named it, ``loops`` have its derivatives and all other platforms."""
    if runs.asked:
        return modes.refusing(kernel, f"{OF}: a second derivative needs implementation='xla'")
    f = jax.custom_jvp(_where_it_runs(kernel, loops))
    f.defjvp(lambda primals, tangents: jax.jvp(loops, primals, tangents))
    return f


def _where_it_runs(kernel, loops):
    return lambda *given: lax.platform_dependent(*given, cuda=kernel, default=loops)
