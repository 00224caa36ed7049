"""A twin of every kernel: its textbook formula, in float64 or in as many digits as are asked for.

A twin takes and returns NumPy arrays. Of float64 they compute in float64; of mpmath's numbers (see
``exact``) in ``mp.dps`` digits, where -inf is played by a number far below all others, so that
derivatives can be taken as differences on both sides of any point. No twin knows a derivative.
"""

import jax.numpy as jnp
import mpmath
import numpy as np

mp = mpmath.MPContext()
mp.dps = 150


def _far():  # at 150 digits -1e60, beyond every float32
    return -(mp.mpf(10) ** (2 * mp.dps // 5))


def _each(of_one, otype=object):
    of_all = np.vectorize(of_one, otypes=[otype])
    return np.errstate(all="ignore")(lambda x: of_all(x))


exact = _each(lambda x: _far() if x == -np.inf else mp.mpf(float(x)))
# To the nearest float64, and to ±inf what grew out of -inf.
rounded = _each(lambda x: float(mp.sign(x) * mp.inf if abs(x) > -_far() / 1000 else x), float)


def in_50_digits(twin, *args):
    """The twin at ``mp.dps`` digits, of which at least 50 are right, from and to float64."""
    return _map(rounded, twin(*map(_exact, args)))


def derivative(twin, args, wrt, cotangent):
    """Of ⟨cotangent, twin(*args)⟩ to ``args[wrt]``, in 50 digits.

    An argument of two axes is moved in all its rows at once: they must not depend on each other.
    """
    args = list(map(_exact, args))
    return rounded(_differences(twin, args, wrt, exact(cotangent)))


@np.errstate(all="ignore")
def second_derivative(twin, args, wrt, cotangent, tangent):
    """Of the above along ``tangent``, in 50 digits: a Hessian-vector product."""
    args, cotangent, h = list(map(_exact, args)), exact(cotangent), _step()
    up, down = ([*args[:wrt], args[wrt] + s * exact(tangent), *args[wrt + 1 :]] for s in (h, -h))
    ends = (_differences(twin, moved, wrt, cotangent) for moved in (up, down))
    return rounded((next(ends) - next(ends)) / (2 * h))


@np.errstate(all="ignore")
def _differences(twin, args, wrt, cotangent):
    x, h = args[wrt], _step()
    slope = np.empty(x.shape, object)
    rows = x.shape[:-1] if x.ndim > 1 else ()
    for i in np.ndindex(x.shape[len(rows) :]):
        ends = []
        for s in (h, -h):
            moved = x.copy()
            moved[..., *i] += s
            y = cotangent * twin(*args[:wrt], moved, *args[wrt + 1 :])
            ends.append(y.reshape(*rows, -1).sum(-1) if isinstance(y, np.ndarray) else y)
        slope[..., *i] = (ends[0] - ends[1]) / (2 * h)
    return slope


@np.errstate(all="ignore")
def error(actual, expected, axis=(), least=0.0):
    """The largest error in eps of the dtype of ``actual``, relative to the largest entry of a row.

    A row is what lies along ``axis``; without one, each entry stands for itself. Infinities and
    NaN must be where they are expected. A subnormal number may be flushed to 0, as XLA does.

    ``least`` is what an error is relative to in rows that are smaller.
    """
    info = jnp.finfo(actual.dtype)
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape
    beyond = np.abs(expected) > float(info.max) * (1 + float(info.eps) / 4)
    expected = np.where(beyond, np.copysign(np.inf, expected), expected)
    size = np.where(np.isfinite(expected), np.abs(expected), 0)
    size = np.maximum(size.max(axis, keepdims=True, initial=least), float(info.tiny))
    apart = np.abs(actual - expected) / size
    flushed = (np.abs(expected) < float(info.tiny)) & (np.abs(actual) <= float(info.tiny))
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected)) | flushed
    apart = np.where(same, 0, np.where(np.isnan(apart), np.inf, apart))
    return apart.max(initial=0) / float(info.eps)


def _step():
    return mp.mpf(10) ** -(mp.dps // 6)


def _exact(x):
    x = np.asarray(x)
    return exact(x) if x.dtype == float else x


def _map(f, y):
    return tuple(map(f, y)) if isinstance(y, tuple) else f(y)


def _elementwise(of_floats, of_mp):
    of_mp = _each(of_mp)

    def function(x):
        x = np.asarray(x)
        return of_mp(x) if x.dtype == object else of_floats(x)

    return function


# No float is as small as exp(-1e6), and the far number would need all its digits.
_exp = _elementwise(np.exp, lambda x: mp.zero if x < -1e6 else mp.exp(x))
_log = _elementwise(np.log, lambda x: mp.log(x) if x > 0 else (_far() if x == 0 else mp.nan))
_tanh = _elementwise(np.tanh, lambda x: mp.sign(x) if abs(x) > 1e6 else mp.tanh(x))


def _minus_inf(x):
    return _far() if x.dtype == object else -np.inf


def _masked(x, where):
    return x if where is None else np.where(where, x, _minus_inf(x))


def _top(x, axis):
    """The maximum of a row, and whether nothing in it is above -inf."""
    top = x.max(axis, keepdims=True, initial=_minus_inf(x))
    top = np.where((x != x).any(axis, keepdims=True), np.nan, top)
    return top, top <= _minus_inf(x) / 2


def _of_rows(where, x, axis):
    """A mask in the rank of x; of another rank, it stands for whole rows."""
    if where is None:
        return np.ones(x.shape, bool)
    if np.ndim(where) != x.ndim:
        where = np.expand_dims(where, axis)
    return np.broadcast_to(where, x.shape)


def _product(q, y):  # 0 · inf counts 0
    return np.where(q == 0, 0, q * y)


@np.errstate(all="ignore")
def softmax(x, axis=-1, where=None):
    x = _masked(x, where)
    top, empty = _top(x, axis)
    e = _exp(x - top)
    return np.where(empty, 0, e / e.sum(axis, keepdims=True))


def softmax_vjp(y, y_bar, axis=-1):
    return y * (y_bar - (y * y_bar).sum(axis, keepdims=True))


def softmax_jacobian(x):
    y = softmax(x)
    return y[..., :, None] * np.eye(x.shape[-1]) - y[..., :, None] * y[..., None, :]


@np.errstate(all="ignore")
def log_softmax(x, axis=-1, where=None):
    x = _masked(x, where)
    top, empty = _top(x, axis)
    y = (x - top) - _log(_exp(x - top).sum(axis, keepdims=True))
    y = np.where(empty, _minus_inf(x), y)
    return y if where is None else np.where(where, y, _minus_inf(x))


@np.errstate(all="ignore")
def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False, where=None):
    a, b = np.broadcast_arrays(a, 1.0 if b is None else b)
    axis = tuple(range(a.ndim)) if axis is None else axis
    valid = b != 0 if where is None else (b != 0) & where
    a = _masked(a, valid)
    top, empty = _top(a, axis)
    terms = np.where(top == np.inf, a == top, _exp(a - top))
    total = np.where(valid, b * terms, 0).sum(axis, keepdims=True)
    gone = empty | (total == 0)
    lse = np.where(gone, _minus_inf(a), top + _log(np.where(gone, 1, abs(total))))
    sign = np.where(gone, 0.0, np.where(total > 0, 1.0, -1.0))
    if not return_sign:
        lse = np.where(sign < 0, np.nan, lse)
    if not keepdims:
        lse, sign = lse.squeeze(axis), sign.squeeze(axis)
    return (lse, sign) if return_sign else lse


def tanh(x):
    return _tanh(x)


def soft_cap(x, cap):
    return cap * _tanh(x / cap)


@np.errstate(all="ignore")
def cross_entropy(probs, labels, axis=-1, where=None):
    probs, labels = np.broadcast_arrays(probs, labels)
    where = _of_rows(where, probs, axis)
    return np.where(where, _product(labels, -_log(probs)), 0).sum(axis)


def _distances(x, axis, where, temperature, logit_soft_cap):
    """-log p, lse, and which rows are empty."""
    z = x if logit_soft_cap is None else soft_cap(x, logit_soft_cap)
    z = _masked(z / temperature, where)
    top, empty = _top(z, axis)
    log_sum = _log(_exp(z - top).sum(axis, keepdims=True))
    return np.where(empty, -_minus_inf(z), log_sum - (z - top)), top + log_sum, empty


@np.errstate(all="ignore")
def softmax_cross_entropy(
    logits, labels, axis=-1, where=None,
    label_smoothing=0, z_loss=0, temperature=1, logit_soft_cap=None,
):  # fmt: skip
    x, t = np.broadcast_arrays(logits, labels)
    where = _of_rows(where, x, axis)
    distance, lse, empty = _distances(x, axis, where, temperature, logit_soft_cap)
    t = np.where(where, t, 0)
    share = t.sum(axis, keepdims=True) / np.maximum(where.sum(axis, keepdims=True), 1)
    q = (1 - label_smoothing) * t + label_smoothing * share * where
    z_term = np.where(empty, 0, z_loss * lse**2).squeeze(axis)
    return _product(q, distance).sum(axis) + z_term


@np.errstate(all="ignore")
def softmax_cross_entropy_with_integer_labels(
    logits, labels, axis=-1, where=None,
    label_smoothing=0, z_loss=0, temperature=1, logit_soft_cap=None, ignore_index=None,
):  # fmt: skip
    axes = axis if isinstance(axis, tuple) else (axis,)
    where = _of_rows(where, logits, axis)
    rows = np.delete(logits.shape, axes)
    x, where = (np.moveaxis(z, axes, range(-len(axes), 0)).reshape(*rows, -1)
                for z in (logits, where))  # fmt: skip
    distance, lse, empty = _distances(x, -1, where, temperature, logit_soft_cap)
    known = (labels >= 0) & (labels < x.shape[-1])
    at_label = np.take_along_axis(distance, np.where(known, labels, 0)[..., None], -1)[..., 0]
    spread = np.where(where, distance, 0).sum(-1) / np.maximum(where.sum(-1), 1)
    loss = _product(1 - label_smoothing, at_label) + _product(label_smoothing, spread)
    loss = np.where(known, loss + np.where(empty, 0, z_loss * lse**2)[..., 0], np.nan)
    return np.where(where.any(-1) & (labels != ignore_index), loss, 0)
