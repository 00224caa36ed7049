"""Attention in forward mode: the plain formula's derivatives, by tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import check_every_order, close_to, forwards, mixed, transformed
from numpy.testing import assert_allclose

import jaxgrad
from jaxgrad import forward_mode
from jaxgrad.kernels import attention, attention_tiles

B, T, S, N, K, H = 1, 5, 6, 4, 2, 3
close = functools.partial(
    jax.tree.map, functools.partial(assert_allclose, rtol=1e-10, atol=1e-12, strict=True)
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of which these arrays have several."""
    attention._jit.clear_cache()
    monkeypatch.setattr(attention_tiles, "CPU", attention_tiles.Room(4, 4, area=32))
    yield
    attention._jit.clear_cache()


def plain(query, key, value, bias, scale, cap):
    z = jnp.einsum("btkgh,bskh->bkgts", query.reshape(B, T, K, N // K, H), key) * scale
    z = cap * jnp.tanh(z / cap) + bias.reshape(1, K, N // K, T, S)
    z = jnp.where(jnp.tril(jnp.ones((T, S), bool)), z, -1e4)
    o = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(z), value)
    return o.reshape(query.shape), jax.nn.logsumexp(z, -1).transpose(0, 3, 1, 2).reshape(B, T, N)


def tiled(function, query, key, value, bias, scale, cap):
    options = {"scale": scale, "logits_soft_cap": cap, "is_causal": True}
    return function(query, key, value, bias, **options, return_residual=True)


def test_derivatives_of_both_orders(x64, standard_promotion, unoptimised, small_tiles):
    normal = np.random.default_rng(0).standard_normal
    arrays = [normal(z) for z in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (1, N, T, S))]
    args = tuple(map(jnp.asarray, (*arrays, 0.6, 2.0)))
    dots = jax.tree.map(lambda z: jnp.asarray(normal(z.shape)), args)

    def path(f):
        def along(s):
            o, lse = f(*(a + s * b for a, b in zip(args, dots, strict=True)))
            return jnp.sin(o).sum() + jnp.cos(lse).sum()

        return along

    twin, default = (
        functools.partial(tiled, module.dot_product_attention) for module in (forward_mode, jaxgrad)
    )

    @jax.jit
    def run(s):
        bars = jax.tree.map(lambda z: jnp.ones(z.shape), jax.eval_shape(default, *args))
        gradients = [jax.vjp(f, *args)[1](bars) for f in (twin, default)]
        f = path(twin)
        return forwards(f)(s), mixed(f)(s), forwards(path(plain))(s), gradients

    (y, f, ff), (r, fr, rf), expected, gradients = run(jnp.zeros(()))
    for found in (y, f, ff), (y, r, fr), (y, r, rf):
        close(found, expected)
    close(*gradients)


def test_every_order_and_transformation(x64, standard_promotion, unoptimised):
    """Of one tile, to the third order."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 2)))

    def path(attention):
        def of(s):
            o = attention(x + s, x, x * s, scale=1 + s, is_causal=True)
            return (o * o).sum()

        return of

    def formula(q, k, v, scale, is_causal):
        z = jnp.einsum("tnh,snh->nts", q, k) * scale
        z = jnp.where(jnp.tril(jnp.ones((2, 2), bool)), z, -1e4)
        return jnp.einsum("nts,snh->tnh", jax.nn.softmax(z), v)

    twin = path(forward_mode.dot_product_attention)
    check_every_order(twin, path(formula))
    close_to(*jax.jit(transformed, static_argnums=0)(twin))


def test_the_matrix_is_never_held(unoptimised):
    x = jax.ShapeDtypeStruct((1, 4096, 4, 64), "float32")

    def compiled(function, *args):
        program = jax.jit(function).lower(*args).compile()
        assert "4096,4096" not in program.as_text()
        return program.memory_analysis()

    def pull(module, q, k, v, o_bar):
        return jax.vjp(module.dot_product_attention, q, k, v)[1](o_bar)

    def push(*args):
        return jax.jvp(forward_mode.dot_product_attention, args[:3], args[3:])

    compiled(push, *6 * [x])
    rule, twin = (
        compiled(functools.partial(pull, module), *4 * [x]) for module in (jaxgrad, forward_mode)
    )
    size = lambda m: m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    assert size(twin) <= 1.1 * size(rule)
