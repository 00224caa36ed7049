"""A problem for the fused heads of the backends, and its truth in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def problem(rng, t, d, v, dtype=jnp.float32):
    """x, w, bias, labels, and a cotangent of the losses."""
    k = jax.random.split(rng, 5)
    x, w, bias = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(k, ((t, d), (d, v), (v,)), strict=False)
    )
    labels = jax.random.randint(k[3], (t,), 0, v)
    return x, w, bias, labels, jax.random.uniform(k[4], (t,), jnp.float32)


def truth(x, w, bias, labels, bar, lse_bar=0.0, h_bar=0.0, eps=0.0, zeta=0.0, temp=1.0, cap=None):
    """Losses, lse, entropy and the gradients of x, w and bias, by the textbook's formulas."""
    x, w, bias, bar = (np.asarray(a, np.float64) for a in (x, w, bias, bar))
    bar, logits, v = bar[:, None], x @ w + bias, w.shape[1]
    tanh = np.tanh(logits / cap) if cap else 0.0
    z = (cap * tanh if cap else logits) / temp
    lse = np.logaddexp.reduce(z, axis=1, keepdims=True)
    p = np.exp(z - lse)
    q = (1 - eps) * np.eye(v)[np.asarray(labels)] + eps / v
    entropy = lse - (p * z).sum(1, keepdims=True)
    loss = lse - (q * z).sum(1, keepdims=True) + zeta * lse**2
    z_bar = (bar + lse_bar + 2 * zeta * lse * bar) * p - bar * q
    z_bar -= h_bar * p * (z - lse + entropy)
    x_bar = z_bar * (1 - tanh**2) / temp
    rows = (loss, lse, entropy)
    return *(row[:, 0] for row in rows), x_bar @ w.T, x.T @ x_bar, x_bar.sum(0)


def assert_near(actual, expected, bar):
    """Within ``bar`` of the largest entry."""
    for a, e in zip(actual, expected, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == e.shape
        assert np.abs(a - e).max() <= bar * np.abs(e).max()


def with_gradients(f, x, w, bias, bars):
    """What ``f`` returns, and the cotangents of x, w and bias."""

    @jax.jit
    def run(x, w, bias):
        out, back = jax.vjp(f, x, w, bias)
        return out, back(bars)

    return run(x, w, bias)


def assert_every_option(fused, x, w, bias, labels, bar):
    """All options at once, and cotangents of all that has one."""
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": 0.7, "logit_soft_cap": 5.0}

    def rows(x, w, bias):
        loss, aux = fused(x, w, labels, bias, return_aux=True, **options)
        return loss, aux.lse, aux.entropy, aux.argmax

    bars = bar, 2 * bar, 3 * bar, np.zeros(len(x), jax.dtypes.float0)
    (*out, argmax), back = with_gradients(rows, x, w, bias, bars)
    column = np.asarray(bar, np.float64)[:, None]
    expected = truth(x, w, bias, labels, bar, 2 * column, 3 * column, 0.1, 0.01, 0.7, 5.0)
    assert_near((*out, *back), expected, 1e-6)
    logits = np.float64(x) @ np.float64(w) + np.float64(bias)
    np.testing.assert_array_equal(argmax, np.argmax(logits, axis=1))


def assert_tied_in_16_bits(fused, x, w, bias, labels, bar):
    """``w`` as an embedding; gradients in the dtypes of the arguments."""
    f = lambda x, w, bias: fused(x, w, labels, bias, vocab_axis=0)
    loss, (x_bar, w_bar, bias_bar) = with_gradients(f, x, w.T, bias, bar)
    assert {z.dtype for z in (x_bar, w_bar, bias_bar)} == {x.dtype}
    expected = truth(x, w, bias, labels, bar)
    assert_near((loss,), expected[:1], 1e-6)
    assert_near((x_bar, w_bar.T, bias_bar), expected[3:], 4e-3)


def assert_tokens_left_out(fused, x, w, labels, weights):
    """One ignored and one unknown token, under a mean."""
    t, v = len(x), w.shape[1]
    labels = labels.at[3].set(-100).at[5].set(v + 7)
    x = x.at[3].set(jnp.nan)
    f = lambda x, w: fused(x, w, labels, ignore_index=-100, weights=weights, reduction="mean")
    loss, (x_bar, w_bar) = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
    assert jnp.isnan(loss) and jnp.isnan(x_bar[5]).all() and (x_bar[3] == 0).all()
    kept = np.delete(np.arange(t), (3, 5))
    bar = weights[kept] / (weights.sum() - weights[3])
    expected = truth(x[kept], w, np.zeros(v), labels[kept], bar)
    assert_near((x_bar[kept], w_bar), expected[3:5], 1e-6)


def assert_derivatives_refused(fused, x, w, labels):
    """Those to the options, and second ones."""
    loss = lambda x, cap: fused(x, w, labels, logit_soft_cap=cap).sum()
    with pytest.raises(NotImplementedError, match="no gradient for label_smoothing"):
        jax.eval_shape(jax.grad(loss, 1), x, 3.0)
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.eval_shape(jax.grad(lambda x: jax.grad(loss)(x, 3.0).sum()), x)
