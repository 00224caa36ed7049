"""The decisions all kernels share: maximum and excess of a row, merging, masks, 0 · inf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxgrad import numerics

INF, NAN = np.inf, np.nan


@jax.jit
def measure(x):
    m = numerics.row_max(x, -1)
    return m, numerics.row_excess(lambda: numerics.below_max(x, m), -1)


def row(*x):
    return jnp.array([x], "float32")


@pytest.mark.parametrize(
    "x, m, excess",
    [
        ((1.0, 1.0, 1.0), 1.0, 2.0),
        ((20.0, 0.0, 0.0), 20.0, 2 * np.exp(-20.0)),
        ((0.0, 40.0, -INF), 40.0, np.exp(-40.0)),
        ((-INF, 3.0, -INF), 3.0, 0.0),
        ((-INF, -INF, -INF), -INF, -1.0),
        ((), -INF, -1.0),
        ((2.0, 2.0, -INF), 2.0, 1.0),
        ((0.0, -0.69, -0.70), 0.0, np.exp(-0.69) + np.exp(-0.70)),
    ],
)
def test_maximum_and_excess(x, m, excess):
    found = measure(row(*x))
    np.testing.assert_array_equal(found[0], [[m]])
    np.testing.assert_allclose(found[1], [[excess]], rtol=1e-6)


def test_excess_under_vmap_still_branches():
    x = jnp.zeros((2, 3, 4))
    text = jax.jit(jax.vmap(measure)).lower(x).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text


@settings(max_examples=40)
@given(arrays.arrays(np.float32, (1, 6), elements=st.floats(-50, 50, width=32) | st.just(-INF)))
def test_parts_of_a_row_merge(x):
    """Into what the whole row gives, in either order and however empty the parts."""
    whole, parts = measure(x), (measure(x[:, :3]), measure(x[:, 3:]))
    for a, b in (parts, parts[::-1]):
        m, excess = numerics.merge(*a, *b)
        np.testing.assert_array_equal(m, whole[0])
        np.testing.assert_allclose(excess, whole[1], rtol=2e-6, atol=1e-30)


def test_sums_of_exponentials_from_their_excess():
    m, excess = jnp.array([2.0, -INF, INF, 1.0]), jnp.array([1e-12, -1.0, NAN, 1.0])
    np.testing.assert_allclose(
        numerics.log_sum_exp(m, excess), [2.0, -INF, INF, 1 + np.log(2)], rtol=1e-6
    )
    np.testing.assert_allclose(numerics.log_sum(excess)[:2], [1e-12, 0.0], rtol=1e-6)
    np.testing.assert_allclose(numerics.inverse_sum(excess[:2]), [1.0, 0.0])


def test_an_empty_row_has_no_difference_to_its_maximum():
    np.testing.assert_array_equal(
        numerics.below_max(row(-INF, -INF), jnp.array([[-INF]])), [[-INF, -INF]]
    )


def test_zero_times_infinity_counts_zero():
    a, b = jnp.array([0.0, 0.0, 2.0, 0.0]), jnp.array([INF, NAN, 3.0, 4.0])
    np.testing.assert_array_equal(numerics.safe_multiply(a, b), [0, 0, 6, 0])
    slopes = jax.grad(lambda a, b: numerics.safe_multiply(a, b).sum(), (0, 1))(a, b)
    np.testing.assert_array_equal(slopes[1], [0, 0, 2, 0])
    assert np.isfinite(slopes[0][2:]).all()


def test_division_by_zero_counts_zero():
    a, b = jnp.array([1.0, 0.0, 6.0]), jnp.array([0.0, 0.0, 3.0])
    np.testing.assert_array_equal(numerics.safe_divide(a, b), [0, 0, 2])
    np.testing.assert_array_equal(
        jax.grad(lambda b: numerics.safe_divide(a, b).sum())(b), np.float32([0, 0, -2 / 3])
    )


@pytest.mark.parametrize(
    "dtype, wide", [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_widening(dtype, wide):
    x = jnp.ones(3, dtype)
    assert numerics.widen(x).dtype == wide
    assert numerics.narrow(numerics.widen(x), like=x).dtype == dtype


def test_float64_is_not_narrowed(x64):
    assert numerics.widen(jnp.ones(3, "float64")).dtype == "float64"


@pytest.mark.parametrize(
    "axis, axes", [(None, (0, 1, 2)), (-1, (2,)), ((2, 0), None), ((), ()), (np.int64(1), (1,))]
)
def test_axes(axis, axes):
    found = numerics.as_axes(axis, jnp.zeros((2, 3, 4)), of="f")
    assert sorted(found) == sorted(axes if axes is not None else (0, 2))


def test_masked_entries_are_gone():
    where = jnp.array([True, False])
    np.testing.assert_array_equal(numerics.masked(jnp.array([1.0, NAN]), where), [1.0, -INF])
    np.testing.assert_array_equal(numerics.masked(jnp.array([1.0, NAN]), where, 0), [1.0, 0.0])


def test_sum_to_is_the_transpose_of_broadcasting():
    x = jnp.arange(6.0).reshape(2, 3)
    for shape in ((2, 3), (1, 3), (2, 1), (1, 1)):
        _, pull = jax.vjp(lambda y: jnp.broadcast_to(y, (2, 3)), jnp.zeros(shape))
        np.testing.assert_array_equal(numerics.sum_to(x, shape), pull(x)[0])
