"""Cross-entropy of probabilities: what happens where one of them is 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES

from jaxgrad import cross_entropy, softmax, softmax_cross_entropy, softmax_vjp

INF, NAN = np.inf, np.nan
# Probability, label, and then the value and its slopes to either.
EDGES = {
    "ordinary": (0.5, 0.25, -0.25 * np.log(0.5), -0.5, -np.log(0.5)),
    "label 0": (0.5, 0.0, 0.0, 0.0, -np.log(0.5)),
    "both 0": (0.0, 0.0, 0.0, 0.0, INF),
    "both 0, negative": (-0.0, 0.0, 0.0, 0.0, INF),
    "probability 0": (0.0, 0.5, INF, -INF, INF),
    "probability -0": (-0.0, 0.5, INF, -INF, INF),
    "negative": (-0.5, 0.5, NAN, NAN, NAN),
    "NaN": (NAN, 0.5, NAN, NAN, NAN),
    "one": (1.0, 1.0, 0.0, -1.0, 0.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(dtype):
    z, t, value, z_bar, t_bar = np.array(list(EDGES.values())).T
    with jax.enable_x64(dtype == "float64"):
        given = jnp.asarray(z, dtype)[:, None], jnp.asarray(t, dtype)[:, None]
        found, pull = jax.vjp(cross_entropy, *given)
        slopes = [jnp.squeeze(s, 1).astype(float) for s in pull(jnp.ones_like(found))]
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(slopes[0], z_bar, rtol)
    np.testing.assert_allclose(slopes[1], t_bar, rtol)


def test_masked_entries_count_nothing():
    z, t = jnp.array([0.5, NAN, 0.0, 0.5]), jnp.array([0.5, 0.25, 1.0, NAN])
    where = jnp.array([True, False, False, False])
    value, pull = jax.vjp(lambda z, t: cross_entropy(z, t, where=where), z, t)
    np.testing.assert_allclose(value, 0.5 * np.log(2), rtol=1e-6)
    for slope in pull(1.0):
        np.testing.assert_array_equal(slope[1:], np.zeros(3))
    assert cross_entropy(z, t, where=jnp.zeros(4, bool)) == 0


def test_of_a_soft_max_that_underflowed():
    """0 · inf by the chain rule: the path from the logits has no such product."""
    x, t = jnp.array([0.0, 200.0]), jnp.array([1.0, 0.0])
    assert cross_entropy(softmax(x), t) == INF
    assert jnp.isnan(jax.grad(lambda x: cross_entropy(softmax(x), t))(x)).any()
    assert softmax_cross_entropy(x, t) == 200.0
    np.testing.assert_array_equal(jax.grad(softmax_cross_entropy)(x, t), [-1.0, 1.0])


def test_of_a_product_with_the_jacobian():
    """z = y ⊙ (v - ⟨v, y⟩) is 0 exactly where v_i is the mean ⟨v, y⟩."""
    y, v = jnp.array([0.25, 0.5, 0.25]), jnp.array([1.0, 2.0, 3.0])
    z = softmax_vjp(y, v)
    assert z[1] == 0
    assert cross_entropy(jnp.abs(z), jnp.array([0.5, 0.0, 0.5])) == np.float32(np.log(4))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_residuals_are_the_arguments(dtype):
    z, t = jnp.full((3, 4), 0.25, dtype), jnp.full((3, 4), 0.5, "float32")
    kept = jax.tree.leaves(jax.vjp(cross_entropy, z, t)[1])
    assert sorted((z.shape, str(z.dtype)) for z in kept) == [((3, 4), dtype), ((3, 4), "float32")]
