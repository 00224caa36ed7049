"""What holds for any numbers, shape and axis: hypothesis looks for those where it does not."""

import functools
import math

import jax
import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxgrad

# Few, since each is compiled; with every kind of axis, a row of one class, and an empty batch.
PLACES = [((5,), -1), ((3, 4), 0), ((2, 3, 2), (0, -1)), ((4, 1), 1), ((0, 3), -1), ((2, 2), None)]
# The difference of two of these is exact, or so large that its exponential is 0: elsewhere what is
# next to 0 feels the rounding of the difference, which is not the kernel's to mend.
NEAR = st.integers(-80, 80).map(lambda i: i / 4)
HUGE = st.floats(1e3, 2.0**127, width=32) | st.floats(-(2.0**127), -1e3, width=32)


@st.composite
def logits(draw):
    """A float32 array of numbers of one kind or of several, and the axes of its rows."""
    shape, axis = draw(st.sampled_from(PLACES))
    kind = draw(st.sampled_from([NEAR, HUGE, NEAR | HUGE | st.just(-np.inf)]))
    return draw(hnp.arrays(np.float32, shape, elements=kind)), axis


def rows(x, axis):
    """``x`` in float64, its rows along the last of two axes."""
    axis = tuple(range(x.ndim)) if axis is None else np.atleast_1d(axis)
    x = np.moveaxis(np.asarray(x, float), axis, range(-len(axis), 0))
    return x.reshape(-1, math.prod(x.shape[x.ndim - len(axis) :]))


def log_softmax(x):
    """Rows of float64, and their probabilities; what is next to 0 by the sum of the others."""
    order = x.argsort(-1)[:, ::-1]
    m = np.take_along_axis(x, order[:, :1], -1)
    empty = m == -np.inf
    below = x - np.where(empty, 0, m)
    excess = np.exp(np.take_along_axis(below, order[:, 1:], -1)).sum(-1, keepdims=True)
    y = np.where(empty, -np.inf, below - np.log1p(excess))
    return y, np.exp(y)


@functools.partial(jax.jit, static_argnums=(0, 1))
def pulled(f, axis, y_bar, x, *rest):
    y, pull = jax.vjp(lambda x: f(x, *rest, axis=axis), x)
    return y, pull(y_bar)[0]


def cotangent(shape):
    """No two entries alike."""
    return np.resize(np.float32([1.5, -0.75, 0.5, 1.25, -2.0, 0.875, 3.0]), shape)


def close(actual, expected, eps, **relative_to):
    assert oracles.error(np.float32(actual), expected, **relative_to) <= eps


@given(logits())
def test_softmax(given):
    x, axis = given
    y_bar = cotangent(x.shape)
    y, x_bar = (rows(z, axis) for z in pulled(jaxgrad.softmax, axis, y_bar, x))
    _, p = log_softmax(rows(x, axis))
    y_bar = rows(y_bar, axis)
    close(y, p, 4, axis=-1)
    close(x_bar, p * (y_bar - (p * y_bar).sum(-1, keepdims=True)), 4, axis=-1, least=1.0)


@given(logits())
def test_log_softmax(given):
    x, axis = given
    y_bar = cotangent(x.shape)
    y, x_bar = (rows(z, axis) for z in pulled(jaxgrad.log_softmax, axis, y_bar, x))
    expected, p = log_softmax(rows(x, axis))
    y_bar = rows(y_bar, axis) * (expected > -np.inf).any(-1, keepdims=True)
    close(y, expected, 4)
    close(x_bar, y_bar - p * y_bar.sum(-1, keepdims=True), 8, axis=-1, least=1.0)


@given(logits())
def test_logsumexp(given):
    x, axis = given
    one_a_row = jax.eval_shape(lambda x: jaxgrad.logsumexp(x, axis), x)
    y_bar = cotangent(one_a_row.shape)
    y, x_bar = pulled(jaxgrad.logsumexp, axis, y_bar, x)
    x = rows(x, axis)
    log_p, p = log_softmax(x)
    m = x.max(-1)
    expected = m - np.where(m == -np.inf, 0, log_p.max(-1))
    close(y.reshape(-1), expected, 4, least=1.0)
    close(rows(x_bar, axis), p * y_bar.reshape(-1, 1), 4, axis=-1)


@given(logits(), st.data())
def test_both_cross_entropies(given, data):
    x, axis = given
    axis = -1 if axis is None else axis
    axes = np.atleast_1d(axis) % x.ndim
    shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    classes = math.prod(np.take(x.shape, axes))
    labels = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, classes - 1)))
    l_bar = cotangent(shape)
    loss, x_bar = pulled(jaxgrad.softmax_cross_entropy_with_integer_labels, axis, l_bar, x, labels)
    log_p, p = log_softmax(rows(x, axis))
    hit = np.arange(classes) == labels.reshape(-1, 1)
    close(loss.reshape(-1), -log_p[hit], 4)
    some = (log_p > -np.inf).any(-1, keepdims=True)
    expected = np.where(hit, np.expm1(log_p), p) * l_bar.reshape(-1, 1) * some
    close(rows(x_bar, axis), expected, 4, axis=-1, least=1e-30)

    dense = np.moveaxis(
        hit.reshape(*shape, *np.take(x.shape, axes)).astype(np.float32),
        range(-len(axes), 0),
        axes,
    )
    also = pulled(jaxgrad.softmax_cross_entropy, axis, l_bar, x, dense)
    close(np.reshape(also[0], -1), -log_p[hit], 4)
    close(rows(also[1], axis), expected, 4, axis=-1, least=1e-30)


def tanh(x, axis):
    return jaxgrad.tanh(x)


# From 43.6 to 44.4 sech² is a normal number, and exp -2|x| one of those that XLA's CPU flushes.
SECH = st.floats(-50, 50, width=32).filter(lambda x: not 43.6 < abs(x) < 44.4)


@given(hnp.arrays(np.float32, (5,), elements=SECH | HUGE))
def test_tanh(x):
    y, x_bar = pulled(tanh, None, cotangent(x.shape), x)
    e = np.exp(-2 * np.abs(np.float64(x)))
    close(y, np.tanh(np.float64(x)), 4)
    close(x_bar, cotangent(x.shape) * 4 * e / (1 + e) ** 2, 4)
