"""Products with the curvature, beside the matrices they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxgrad
from jaxgrad.curvature import linear_softmax_cross_entropy_gnvp, softmax_cross_entropy_hvp

normal = np.random.default_rng(0).standard_normal
integer_loss = jaxgrad.softmax_cross_entropy_with_integer_labels


def test_hessian_by_the_logits(x64, unoptimised):
    z, v = jnp.asarray(normal((2, 3, 4)))
    labels = jnp.array([0, 2, 3])
    where = jnp.broadcast_to(jnp.array([True, False, True, True]), z.shape)
    slope = jax.grad(lambda z: integer_loss(z, labels, where=where).sum())
    expected = jax.jit(lambda z: jax.jvp(slope, (z,), (v,))[1])(z)
    assert_allclose(softmax_cross_entropy_hvp(z, v, where=where), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("held", [None, 0, 1, 2])
def test_gauss_newton_product(held, x64, unoptimised):
    x, w, bias = (jnp.asarray(normal(shape)) for shape in ((5, 3), (3, 4), (4,)))
    dots = [jnp.asarray(normal(z.shape)) if i != held else None for i, z in enumerate((x, w, bias))]
    labels, weights = jnp.array([0, -1, 2, 3, 1]), jnp.asarray(normal(5) ** 2)
    options = {"weights": weights, "ignore_index": -1, "z_loss": 0.1, "temperature": 0.7}

    def logits(x, w, bias):
        return x @ w + bias[None]

    def loss(z):
        losses = integer_loss(z, labels, ignore_index=-1, z_loss=0.1, temperature=0.7)
        return (weights * losses).sum()

    @jax.jit
    def both(x, w, bias):
        primals = x, w, bias
        full = [jnp.zeros_like(z) if v is None else v for v, z in zip(dots, primals, strict=True)]
        z, push = jax.linearize(logits, *primals)
        _, curved = jax.jvp(jax.grad(loss), (z,), (push(*full),))
        found = linear_softmax_cross_entropy_gnvp(
            primals, tuple(dots), labels, reduction="sum", chunk_size=(2, 3), **options
        )
        return found, jax.vjp(logits, *primals)[1](curved)

    for i, (ours, truth) in enumerate(zip(*both(x, w, bias), strict=True)):
        if i == held:
            assert ours is None
        else:
            assert_allclose(ours, truth, rtol=1e-12, atol=1e-14)


def test_gauss_newton_product_of_nothing_is_refused():
    x, w, labels = jnp.zeros((2, 3)), jnp.zeros((3, 4)), jnp.zeros(2, jnp.int32)
    for tangents in (None, None), (x,):
        with pytest.raises(ValueError, match="linear_softmax_cross_entropy_gnvp: tangents must be"):
            linear_softmax_cross_entropy_gnvp((x, w), tangents, labels)
