"""The Pallas kernels of attention for TPU, in Pallas's interpreters, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxgrad import dot_product_attention
from jaxgrad.backends.pallas_tpu import attention, attention_plan
from jaxgrad.kernels import attention_arguments, attention_pallas

pytestmark = pytest.mark.usefixtures("unoptimised")

B, T, S = 2, 150, 200  # ragged: two blocks of queries, two of keys
interpreted = functools.partial(
    dot_product_attention, implementation="pallas_interpret", return_residual=True
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_plan, "LARGEST", (128, 128))


def problem(rng, heads, key_heads, width, depth, dtype=jnp.float32, t=T, s=S):
    """Query, key, value, and the cotangents of output and log-sum-exp."""
    shapes = (B, t, heads, width), (B, s, key_heads, width), (B, s, key_heads, depth)
    shapes += (B, t, heads, depth), (B, t, heads)
    q, k, v, o_bar, l_bar = map(jax.random.normal, jax.random.split(rng, 5), shapes)
    return tuple(x.astype(dtype) for x in (q, k, v, o_bar)) + (l_bar,)


def truth(q, k, v, o_bar, l_bar, seen, cap=None):
    """Output, log-sum-exp, and the gradients of q, k and v, by the textbook's formulas."""
    group = q.shape[2] // k.shape[2]
    q, k, v, o_bar, l_bar = (np.asarray(x, np.float64) for x in (q, k, v, o_bar, l_bar))
    k_, v_ = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scale = q.shape[3] ** -0.5
    tanh = np.tanh(np.einsum("btnh,bsnh->bnts", q, k_) * scale / (cap or 1))
    z = np.einsum("btnh,bsnh->bnts", q, k_) * scale if cap is None else cap * tanh
    z = np.where(seen[:, None], z, -np.inf)
    lse = np.logaddexp.reduce(z, 3, keepdims=True)
    p = np.exp(z - np.where(lse == -np.inf, 0, lse))
    p_bar = np.einsum("btnd,bsnd->bnts", o_bar, v_)
    mean = (p * p_bar).sum(3, keepdims=True) - l_bar.transpose(0, 2, 1)[..., None]
    z_bar = p * (p_bar - mean) * (1 if cap is None else 1 - tanh**2) * scale
    summed = lambda x: x.reshape(*k.shape[:3], group, -1).sum(3)
    return (
        np.einsum("bnts,bsnd->btnd", p, v_),
        lse[..., 0].transpose(0, 2, 1),
        np.einsum("bnts,bsnh->btnh", z_bar, k_),
        summed(np.einsum("bnts,btnh->bsnh", z_bar, q)),
        summed(np.einsum("bnts,btnd->bsnd", p, o_bar)),
    )


def with_gradients(f, q, k, v, *bars):
    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(f, q, k, v)
        return *out, *back(bars)

    return run(q, k, v)


def assert_near(actual, expected, bars):
    for a, e, bar in zip(actual, expected, bars, strict=True):
        a, finite = np.asarray(a, np.float64), np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        assert np.abs(a - e)[finite].max() <= bar * np.abs(e[finite]).max()


def test_window_lengths_groups_and_a_soft_cap(rng):
    given = problem(rng, heads=4, key_heads=2, width=16, depth=24)
    lengths = {"query_seq_lengths": np.array([T, 9]), "key_value_seq_lengths": np.array([187, 0])}
    options = {"local_window_size": (140, 20), "logits_soft_cap": 2.0}
    t, s = np.arange(T)[:, None], np.arange(S)
    seen = (t - 140 <= s) & (s <= t + 20)
    seen = np.stack([seen & (t < n) & (s < m) for n, m in zip(*lengths.values(), strict=True)])
    out = with_gradients(functools.partial(interpreted, **lengths, **options), *given)
    assert_near(out, truth(*given, seen, 2.0), [1e-6] * 5)


def test_bfloat16_causal_segments(rng):
    given = problem(rng, heads=1, key_heads=1, width=16, depth=16, dtype=jnp.bfloat16, s=T)
    ids = np.stack([np.arange(T) // 60, np.arange(T) // 149])
    seen = np.tri(T, dtype=bool) & (ids[:, :, None] == ids[:, None, :])
    f = functools.partial(interpreted, is_causal=True, segment_ids=ids)
    out = with_gradients(f, *given)
    assert [x.dtype for x in out] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    assert_near(out, truth(*given, seen), [4e-3, 1e-6, *[4e-3] * 3])


def test_keys_in_stretches_where_their_gradients_are_too_large(rng, monkeypatch):
    monkeypatch.setattr(attention_plan, "usable", lambda: 2**20)
    given = problem(rng, heads=2, key_heads=1, width=8, depth=8, t=128, s=300)
    plan = attention_plan.backward(attention_plan.Plan(B, 1, 2, 128, 300, 8, 8, 4, None, 0))
    assert plan.grid == (B, 1, 3, 2, 1, 1)
    out = with_gradients(functools.partial(interpreted, is_causal=True), *given)
    assert_near(out, truth(*given, np.tri(128, 300, dtype=bool)[None]), [1e-6] * 5)
