"""The logarithm of soft-max: the digits of the class that wins, and what the rule keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import logits, weights

from jaxgrad import log_softmax, softmax

X = jnp.asarray(logits(np.random.default_rng(0), (3, 5)), "float32")


@pytest.mark.parametrize("gap", [10.0, 15.0, 20.0, 40.0])
def test_the_winner_keeps_its_digits(gap):
    x, first = np.array([gap, 0.0, -1.0, 0.5]), np.array([1.0, 0.0, 0.0, 0.0])
    y, pull = jax.vjp(log_softmax, jnp.asarray(x, "float32"))
    np.testing.assert_allclose(y, oracles.in_50_digits(oracles.log_softmax, x), rtol=1e-6)
    expected = oracles.derivative(oracles.log_softmax, (x,), 0, first)
    np.testing.assert_allclose(pull(jnp.asarray(first, "float32"))[0], expected, rtol=1e-6)


def test_gradient_sums_to_zero():
    (x_bar,) = jax.vjp(log_softmax, X)[1](jnp.asarray(weights(X.shape), "float32"))
    assert np.abs(x_bar.sum(-1)).max() < 1e-6


def test_is_the_logarithm():
    np.testing.assert_allclose(jnp.exp(log_softmax(X)), softmax(X), rtol=2e-6)
    assert (log_softmax(X) <= 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_residuals_are_the_input_and_two_numbers_per_row(dtype):
    kept = jax.tree.leaves(jax.vjp(log_softmax, X.astype(dtype))[1])
    shapes = sorted((z.shape, str(z.dtype)) for z in kept)
    assert shapes == [((3, 1), "float32"), ((3, 1), "float32"), ((3, 5), dtype)]
