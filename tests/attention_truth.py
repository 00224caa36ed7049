"""Attention and its derivatives by the textbook's formulas, with the whole matrix, in float64."""

import jax
import numpy as np


def truth(q, k, v, o_bar, l_bar, seen=None, cap=None, bias=0.0, scale=None):
    """Output, log-sum-exp, gradients of q, k and v; ``seen`` is bool[B | 1, N | 1, T, S]."""
    group = q.shape[2] // k.shape[2]
    q, k, v, o_bar, l_bar, bias = (np.asarray(x, np.float64) for x in (q, k, v, o_bar, l_bar, bias))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k_, v_ = np.repeat(k, group, 2), np.repeat(v, group, 2)
    z = np.einsum("btnh,bsnh->bnts", q, k_) * scale
    tanh = np.tanh(z / cap) if cap else 0.0
    z = (cap * tanh if cap else z) + bias
    z = np.where(True if seen is None else seen, z, -np.inf)
    lse = np.logaddexp.reduce(z, 3, keepdims=True)
    p = np.exp(z - np.where(lse == -np.inf, 0, lse))
    p_bar = np.einsum("btnd,bsnd->bnts", o_bar, v_)
    mean = (p * p_bar).sum(3, keepdims=True) - l_bar.transpose(0, 2, 1)[..., None]
    z_bar = p * (p_bar - mean) * (1 - tanh**2) * scale
    summed = lambda x: x.reshape(*k.shape[:3], group, -1).sum(3)
    return (
        np.einsum("bnts,bsnd->btnd", p, v_),
        lse[..., 0].transpose(0, 2, 1),
        np.einsum("bnts,bsnh->btnh", z_bar, k_),
        summed(np.einsum("bnts,btnh->bsnh", z_bar, q)),
        summed(np.einsum("bnts,btnd->bsnd", p, o_bar)),
    )


def problem(rng, dtype="float32", b=2, t=37, s=37, n=4, k=2, h=16, d=16):
    """Query, key, value, and the cotangents of output and log-sum-exp."""
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, d), (b, t, n, d), (b, t, n))
    *arrays, l_bar = map(jax.random.normal, jax.random.split(rng, 5), shapes)
    return *(x.astype(dtype) for x in arrays), l_bar


def with_gradients(f, q, k, v, *bars):
    """What :func:`truth` gives, of ``f``, which returns output and log-sum-exp."""

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(f, q, k, v)
        return *out, *back(bars)

    return run(q, k, v)


def assert_near(actual, expected, bar):
    """``bar`` is relative to the largest entry; that of the log-sum-exp, in float32, is 1e-6."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, finite = np.asarray(a, np.float64), np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        error = np.abs(a[finite] - e[finite]).max() / np.abs(e[finite]).max()
        assert error <= (1e-6 if i == 1 else bar), (i, error)
