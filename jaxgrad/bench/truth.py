r"""Value and gradient of every kernel in higher precision: what errors are measured against.

Nearly equal numbers are never subtracted, so that each formula is good to the last digits of the
numbers it is given. With R_i the sum of the others, Σ_{k≠i} exp(x_k - x_i), and m that of max x:

    p_i = 1 / (1 + R_i)                    -log p_i = x_m - x_i + log(1 + R_m)    (1)
    softmax        x̄_i = Σ_k p_i p_k (ȳ_i - ȳ_k)                                  (2)
    log_softmax    x̄_i = Σ_k (ȳ_i p_k - ȳ_k p_i)                                  (3)
    cross-entropy  x̄_i = l̄ Σ_k (p_i t_k - p_k t_i)      t̄_i = -l̄ log p_i          (4)
    soft-cap       c̄   = ȳ (sinh 2u - 2u) / (2 cosh² u)         u = x / c          (5)

Every function takes its numbers, the cotangent and the arguments of its kernel, and returns the
value and the gradients.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MANY = 1000
"""Classes beyond which pairs are too many; float64 has digits to spare for float16."""


class Numbers(NamedTuple):
    """Arithmetic of some precision: how to enter it, and its functions of arrays."""

    name: str
    array: Callable[[Any], np.ndarray]
    exp: Any = np.exp
    log: Any = np.log
    log1p: Any = np.log1p
    tanh: Any = np.tanh


FLOAT64 = Numbers("float64", functools.partial(np.asarray, dtype=np.float64))


@functools.cache
def numbers(dtype: str) -> Numbers | None:
    """Numbers with more digits than ``dtype`` has, or None if there are none here."""
    if dtype != "float64":
        return FLOAT64
    try:
        import mpmath
    except ImportError:
        wider = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps / 100
        entry = functools.partial(np.asarray, dtype=np.longdouble)
        return Numbers("numpy.longdouble", entry) if wider else None
    digits = mpmath.MPContext()
    digits.dps = 50
    names = ("mpf", "exp", "log", "log1p", "tanh")
    return Numbers("mpmath", *(np.frompyfunc(getattr(digits, name), 1, 1) for name in names))


def _softmax(n, y_bar, x):
    p = _p(n, x)
    if x.shape[-1] > MANY:
        return p, p * (y_bar - (p * y_bar).sum(-1, keepdims=True))
    return p, (_i(p) * _k(p) * (_i(y_bar) - _k(y_bar))).sum(-1)  # (2)


def _softmax_vjp(n, _, x, y_bar):  # of y = softmax(x), not rounded
    return (_softmax(n, y_bar, x)[1],)


def _softmax_jacobian(n, _, x):
    p, others = _p(n, x), ~np.eye(x.shape[-1], dtype=bool)
    products = np.where(others, _i(p) * _k(p), 0)
    return (np.where(others, 0, products.sum(-1)[..., None]) - products,)


def _log_softmax(n, y_bar, x):
    return -_minus_log_p(n, x), _pairs(y_bar, _p(n, x))  # (3)


def _logsumexp(n, lse_bar, x):
    lse = x.max(-1) + _minus_log_p(n, x).min(-1)
    return lse, lse_bar[..., None] * _p(n, x)


def _tanh(n, y_bar, x):
    return n.tanh(x), y_bar * _sech2(n, x)


def _soft_cap(n, y_bar, x, cap):
    u = x / cap
    return cap * n.tanh(u), y_bar * _sech2(n, u), y_bar * _cap_slope(n, u)


def _cross_entropy(n, l_bar, z, t):
    l_bar = l_bar[..., None]
    return -(t * n.log(z)).sum(-1), -l_bar * t / z, -l_bar * n.log(z)


def _softmax_cross_entropy(n, l_bar, x, t):
    gap = _minus_log_p(n, x)
    l_bar = l_bar[..., None]
    return (t * gap).sum(-1), l_bar * _pairs(_p(n, x), t), l_bar * gap  # (4)


def _softmax_cross_entropy_with_integer_labels(n, l_bar, x, labels):
    hit = np.arange(x.shape[-1]) == labels[..., None]
    return _softmax_cross_entropy(n, l_bar, x, np.where(hit, n.array(1), n.array(0)))[:2]


def _linear_softmax_cross_entropy(n, l_bar, x, w, bias, labels):
    z = x @ w + bias
    loss, z_bar = _softmax_cross_entropy_with_integer_labels(n, l_bar, z, labels)
    return loss, z_bar @ w.T, x.T @ z_bar, z_bar.sum(0)


def _i(a):
    return a[..., :, None]


def _k(a):
    return a[..., None, :]


def _p(n, x):  # (1)
    if x.shape[-1] > MANY:
        e = n.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    return 1 / n.exp(_k(x) - _i(x)).sum(-1)


def _minus_log_p(n, x):  # (1)
    below = x - x.max(-1, keepdims=True)
    at_top = np.arange(x.shape[-1]) == x.argmax(-1)[..., None]
    return n.log1p(np.where(at_top, 0, n.exp(below)).sum(-1, keepdims=True)) - below


def _pairs(a, b):
    if b.shape[-1] > MANY:
        return a * b.sum(-1, keepdims=True) - b * a.sum(-1, keepdims=True)
    return (_i(a) * _k(b) - _k(a) * _i(b)).sum(-1)


def _sech2(n, u):
    e = n.exp(-2 * abs(u))
    return 4 * e / (1 + e) ** 2


def _cap_slope(n, u):  # (5); near 0 by the series of sinh, whose terms have one sign
    near = abs(u) < 1
    v, w = np.where(near, 2 * u, 0), np.where(near, 1, u)
    series = sum(v ** (2 * k + 1) / float(math.factorial(2 * k + 1)) for k in range(1, 20))
    return np.where(near, series * _sech2(n, v / 2) / 2, n.tanh(w) - w * _sech2(n, w))


TRUTH = {
    "softmax": _softmax,
    "softmax_vjp": _softmax_vjp,
    "softmax_jacobian": _softmax_jacobian,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "tanh": _tanh,
    "soft_cap": _soft_cap,
    "cross_entropy": _cross_entropy,
    "softmax_cross_entropy": _softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": _softmax_cross_entropy_with_integer_labels,
    "linear_softmax_cross_entropy": _linear_softmax_cross_entropy,
}
