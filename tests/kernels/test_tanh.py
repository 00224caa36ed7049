"""tanh and soft-cap: derivatives that keep their digits in saturation, and at both ends."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import DTYPES, as_double, as_dtype

from jaxgrad import soft_cap, tanh
from jaxgrad.kernels.tanh import _remainder

# Where sech² is representable: 1e-37 in float32 at 43.
REACH = {"float16": 5.0, "bfloat16": 43.0, "float32": 43.0, "float64": 350.0}


def sweep(dtype, scale=1.0):
    x = np.concatenate([np.linspace(0.0, 4.0, 41), np.linspace(4.5, REACH[dtype], 25)])
    return as_dtype(scale * np.concatenate([x, -x]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_wherever_it_is_representable(dtype):
    x = sweep(dtype)
    with jax.enable_x64(dtype == "float64"), oracles.mp.workdps(900):
        (found,) = jax.vjp(tanh, jnp.asarray(x))[1](jnp.ones(x.shape, dtype))
        expected = oracles.derivative(oracles.tanh, (as_double(x)[:, None],), 0, 1.0)[:, 0]
    assert oracles.error(found, expected) < (3.5 if jnp.finfo(dtype).bits > 16 else 0.51)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_soft_cap(dtype):
    x, cap = sweep(dtype, 2.0), as_dtype(np.full((len(sweep(dtype)), 1), 2.0), dtype)
    x = x[np.isfinite(x)]
    with jax.enable_x64(dtype == "float64"), oracles.mp.workdps(900):
        _, pull = jax.vjp(soft_cap, jnp.asarray(x)[:, None], jnp.asarray(cap))
        found = pull(jnp.ones((len(x), 1), dtype))
        args = as_double(x)[:, None], as_double(cap)
        expected = [oracles.derivative(oracles.soft_cap, args, wrt, 1.0) for wrt in (0, 1)]
    # To cap, tanh u - u sech² u loses most where its series ends.
    for x_bar, x_bar_, bar in zip(found, expected, (4.0, 8.0), strict=True):
        assert oracles.error(x_bar, x_bar_) < (bar if jnp.finfo(dtype).bits > 16 else 0.51)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ends(dtype):
    x = as_dtype(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0]), dtype)
    with jax.enable_x64(dtype == "float64"):
        x, cap = jnp.asarray(x), jnp.asarray(as_dtype(np.full(5, 3.0), dtype))
        np.testing.assert_array_equal(tanh(x).astype(float), [1, -1, np.nan, 0, 0])
        (x_bar,) = jax.vjp(tanh, x)[1](jnp.ones_like(x))
        np.testing.assert_array_equal(x_bar.astype(float), [0, 0, np.nan, 1, 1])
        y, pull = jax.vjp(soft_cap, x, cap)
        np.testing.assert_array_equal(y.astype(float), [3, -3, np.nan, 0, 0])
        x_bar, cap_bar = pull(jnp.ones_like(x))
        np.testing.assert_array_equal(x_bar.astype(float), [0, 0, np.nan, 1, 1])
        np.testing.assert_array_equal(cap_bar.astype(float), [1, -1, np.nan, 0, 0])


def test_higher_orders_at_zero():
    """Of odd functions: |x| must leave no trace."""
    first, second, third = (f := jax.grad(tanh)), (f := jax.grad(f)), jax.grad(f)
    of_cap = jax.grad(jax.grad(lambda x: soft_cap(x, 2.0)))
    found = jax.jit(lambda x: [f(x) for f in (first, second, third, of_cap)])(0.0)
    assert found == [1.0, 0.0, -2.0, 0.0]


def test_a_cap_for_every_column():
    x, cap = np.linspace(-3.0, 2.0, 6, dtype="float32").reshape(3, 2), np.float32([1, 2])
    np.testing.assert_allclose(soft_cap(x, cap), cap * np.tanh(x / cap), rtol=1e-6)
    slope = jax.jit(jax.grad(lambda x, cap: soft_cap(x, cap).sum(), 1))
    np.testing.assert_allclose(slope(x, cap), [slope(x[:, i], cap[i]) for i in range(2)], rtol=1e-6)


def test_residuals():
    x = jnp.linspace(-1.0, 1.0, 5)
    (kept,) = jax.tree.leaves(jax.vjp(tanh, x)[1])
    np.testing.assert_array_equal(kept, x)
    kept = jax.tree.leaves(jax.vjp(lambda x: soft_cap(x, 3.0), x)[1])
    assert sorted(z.size for z in kept) == [1, 5]


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_what_rounding_takes_from_the_quotient_needs_no_fused_multiply_add(dtype):
    """Not jitted, every product is rounded, as on a GPU; fused ones are exact whatever is split."""
    x = as_dtype(np.random.default_rng(0).uniform(200, 9000, 64), dtype)
    with jax.enable_x64(dtype == "float64"):
        u, cap = jnp.asarray(x) / np.asarray(29.7, dtype), jnp.asarray(29.7, dtype)
        found = _remainder(jnp.asarray(x), u, cap)
    c = Fraction(float(cap))
    due = [float(Fraction(float(a)) / c - Fraction(float(b))) for a, b in zip(x, u, strict=True)]
    np.testing.assert_allclose(found, due, rtol=1e-6)
