"""Soft-max: its residuals, its Jacobian, and the accuracy of its product with a cotangent."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import as_double, as_dtype, logits, weights

from jaxgrad import softmax, softmax_jacobian, softmax_vjp

X = logits(np.random.default_rng(0), (3, 5))


def residuals(x, **options):
    return jax.tree.leaves(jax.vjp(lambda x: softmax(x, **options), x)[1])


def test_the_output_is_the_only_residual():
    x = jnp.asarray(X, "float32")
    (kept,) = residuals(x)
    np.testing.assert_array_equal(kept, softmax(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_keeps_its_input_and_two_numbers_per_row(dtype):
    kept = residuals(jnp.asarray(X, dtype))
    shapes = sorted((z.shape, str(z.dtype)) for z in kept)
    assert shapes == [((3, 1), "float32"), ((3, 1), "float32"), ((3, 5), dtype)]


@pytest.mark.parametrize("gap", [10.0, 15.0, 20.0])
def test_gradient_of_the_winner_keeps_its_digits(gap):
    x = np.array([gap, 0.0, -1.0, 0.5])
    winner = np.array([1.0, 0.0, 0.0, 0.0])
    (x_bar,) = jax.vjp(softmax, jnp.asarray(x, "float32"))[1](jnp.asarray(winner, "float32"))
    expected = oracles.derivative(oracles.softmax, (x,), 0, winner)
    np.testing.assert_allclose(x_bar, expected, rtol=1e-6)


def test_gradient_of_a_constant_cotangent_is_nothing():
    x = jnp.asarray(logits(np.random.default_rng(1), (100, 30)), "float32")
    (x_bar,) = jax.vjp(softmax, x)[1](jnp.full(x.shape, 0.7, "float32"))
    assert np.abs(x_bar).max() < float(jnp.finfo("float32").eps) ** 2 * 16


def test_float16_sums_more_classes_than_it_can_count():
    y = np.asarray(softmax(jnp.zeros(70_000, "float16")))
    np.testing.assert_array_equal(y, np.float16(1 / 70_000))


def test_common_offset_costs_no_digits():
    x = np.round(X * 64) / 64  # what a float32 near 1e4 can hold exactly
    near, far = (softmax(jnp.asarray(x + offset, "float32")) for offset in (0.0, 1e4))
    np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vjp_is_that_of_soft_max(dtype):
    x = jnp.asarray(X, dtype)
    y_bar = jnp.asarray(weights(X.shape), dtype)
    y, pull = jax.vjp(softmax, x)
    found = softmax_vjp(y, y_bar)
    assert found.dtype == y.dtype
    rtol = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*map(as_double, (found, pull(y_bar)[0])), rtol, atol=rtol)


def test_vjp_pushes_tangents_forward_too():
    x, x_dot = (jnp.asarray(z, "float32") for z in (X, weights(X.shape)))
    _, y_dot = jax.jvp(jax.nn.softmax, (x,), (x_dot,))
    np.testing.assert_allclose(softmax_vjp(softmax(x), x_dot), y_dot, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("axis", [0, -1, (0, 1), None])
def test_vjp_along_axes(axis):
    x, y_bar = jnp.asarray(X, "float32"), jnp.asarray(weights(X.shape), "float32")
    y, pull = jax.vjp(lambda x: softmax(x, axis), x)
    np.testing.assert_allclose(softmax_vjp(y, y_bar, axis), pull(y_bar)[0], rtol=1e-5, atol=1e-7)


def test_second_order_through_the_vjp(x64):
    """As a function of x, softmax_vjp(softmax(x), v) is J v: its derivative is that of J."""
    x, v = jnp.asarray(X), jnp.asarray(weights(X.shape))
    ours = lambda x: jnp.vdot(softmax_vjp(softmax(x), v), v)
    theirs = lambda x: jnp.vdot(jax.jvp(jax.nn.softmax, (x,), (v,))[1], v)
    found, expected = jax.jit(lambda x: (jax.grad(ours)(x), jax.grad(theirs)(x)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jacobian_is_symmetric_and_its_rows_sum_to_zero(dtype):
    jacobian = as_double(softmax_jacobian(as_dtype(X, dtype)))
    np.testing.assert_array_equal(jacobian, jacobian.swapaxes(-1, -2))
    assert np.abs(jacobian.sum(-1)).max() < 2 * float(jnp.finfo(dtype).eps)
    assert (np.diagonal(jacobian, axis1=-2, axis2=-1) > 0).all()


def test_jacobian_along_another_axis():
    x = jnp.asarray(X, "float32")
    expected = jax.jit(jax.vmap(jax.jacrev(softmax), in_axes=1))(x)
    np.testing.assert_allclose(softmax_jacobian(x, 0), expected, rtol=1e-5, atol=1e-7)


def test_jacobian_of_an_empty_row_is_zero():
    np.testing.assert_array_equal(softmax_jacobian(jnp.full((2, 3), -jnp.inf)), np.zeros((2, 3, 3)))


def test_forward_holds_no_second_array_in_bfloat16():
    """On the CPU; other platforms fuse the widened copy away by themselves."""
    if jax.default_backend() != "cpu":
        pytest.skip("the memory of the CPU backend")
    x = jax.ShapeDtypeStruct((64, 4096), "bfloat16")
    memory = jax.jit(softmax).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 4 * 64 * 4096
