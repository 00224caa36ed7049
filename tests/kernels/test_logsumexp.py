"""Log-sum-exp: signs and factors, the edges jax.nn has no derivative for, and the residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import as_double, as_dtype, logits

from jaxgrad import logsumexp

A = logits(np.random.default_rng(0), (3, 5))
B = np.array([[1.0, -1.0, 0.0, 2.0, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0], [-3.0, 0.5, 0.25, 0.0, -1.0]])


def f32(x):
    return jnp.asarray(x, "float32")


@pytest.mark.parametrize("where", [None, np.arange(15).reshape(3, 5) % 4 != 1], ids=["", "where"])
def test_value_and_sign_with_factors(where):
    found = logsumexp(f32(A), -1, f32(B), return_sign=True, where=where)
    twin = lambda a, b: oracles.logsumexp(a, -1, b, return_sign=True, where=where)
    expected = oracles.in_50_digits(twin, *map(as_double, (f32(A), f32(B))))
    for y, y_ in zip(found, expected, strict=True):
        assert oracles.error(y, y_, least=1.0) < 4


def test_gradient_to_a_factor_of_zero():
    twin = lambda a, b: oracles.logsumexp(a, -1, b, return_sign=True)[0]
    rows = np.array([0, 2])
    a, b = (as_double(f32(z))[rows] for z in (A, B))
    _, pull = jax.vjp(lambda a, b: logsumexp(a, -1, b, return_sign=True)[0], f32(a), f32(b))
    # Around a factor of 0 the twin leaves the entry out, so its value is continuous there.
    for wrt, found in enumerate(pull(jnp.ones(2))):
        expected = oracles.derivative(twin, (a, b), wrt, np.ones(2))
        assert oracles.error(found, expected, axis=-1) < 16


def test_a_negative_sum_is_nan_without_its_sign():
    assert jnp.isnan(logsumexp(f32([0.0, 1.0]), b=f32([1.0, -1.0])))
    lse, sign = logsumexp(f32([0.0, 1.0]), b=f32([1.0, -1.0]), return_sign=True)
    np.testing.assert_allclose(lse, np.log(np.e - 1), rtol=1e-6)
    assert sign == -1


@pytest.mark.parametrize("order", [jax.grad, lambda f: jax.grad(lambda x: jax.grad(f)(x).sum())])
def test_an_empty_row_has_gradient_zero(order):
    assert logsumexp(jnp.full(3, -jnp.inf)) == -jnp.inf
    np.testing.assert_array_equal(order(logsumexp)(jnp.full(3, -jnp.inf)), np.zeros(3))


@pytest.mark.parametrize("shape, axis", [((0,), None), ((2, 0), -1), ((0, 3), 0)])
def test_an_empty_axis_is_minus_infinity(shape, axis):
    lse = logsumexp(jnp.zeros(shape), axis)
    assert lse.shape == np.zeros(shape).sum(axis).shape
    assert (lse == -jnp.inf).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_is_rounded_once(dtype):
    a = as_dtype(A + 30.0, dtype)
    found = logsumexp(a, -1)
    assert found.dtype == dtype
    twin = lambda a: oracles.logsumexp(a, -1)
    assert oracles.error(found, oracles.in_50_digits(twin, as_double(a))) <= 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_residuals_are_the_input_and_two_numbers_per_row(dtype):
    kept = jax.tree.leaves(jax.vjp(lambda a: logsumexp(a, -1), jnp.asarray(A, dtype))[1])
    shapes = sorted((z.shape, str(z.dtype)) for z in kept)
    assert shapes == [((3, 1), "float32"), ((3, 1), "float32"), ((3, 5), dtype)]
