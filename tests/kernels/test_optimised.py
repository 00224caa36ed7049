"""Products as XLA's optimiser leaves them, small ones too, which most tests compile without it.

XLA's CPU has aborted, or failed at run time, where it folded a transpose into a product of 16 bits
or of a batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import dot_product_attention, linear_softmax_cross_entropy

DTYPES = pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))


def _draw(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _agree(f, args, dtype):
    """A gradient, mapped over a batch of two and one by one, with and without an outer jit."""
    gradient = jax.grad(lambda *z: f(*z).astype(jnp.float32).sum(), tuple(range(len(args))))
    batch = [jnp.stack([z, -z]) for z in args]
    one_by_one = jax.tree.map(
        lambda *z: jnp.stack(z), *(gradient(*z) for z in zip(*batch, strict=True))
    )
    for mapped in (jax.vmap(gradient), jax.jit(jax.vmap(gradient))):
        for got, want in zip(mapped(*batch), one_by_one, strict=True):
            bound = 4 * float(jnp.finfo(dtype).eps) * max(1, float(jnp.abs(want).max()))
            np.testing.assert_allclose(np.float64(got), np.float64(want), atol=bound)


@DTYPES
@pytest.mark.parametrize("vocab_axis", (0, 1))
@pytest.mark.parametrize("reduction", (None, "mean"))
@pytest.mark.parametrize("t, d, v", ((3, 5, 7), (33, 17, 65)))
def test_head(t, d, v, reduction, vocab_axis, dtype):
    args = _draw(dtype, (t, d), (d, v) if vocab_axis else (v, d))
    options = {"vocab_axis": vocab_axis, "reduction": reduction}
    labels = jnp.arange(t) % v
    _agree(lambda x, w: linear_softmax_cross_entropy(x, w, labels, **options), args, dtype)


@DTYPES
@pytest.mark.parametrize("t, s, heads, h", ((3, 5, 1, 4), (33, 65, 2, 16)))
def test_attention(t, s, heads, h, dtype):
    args = _draw(dtype, (t, 2, h), (s, heads, h), (s, heads, h))
    _agree(lambda *z: dot_product_attention(*z, is_causal=True), args, dtype)
