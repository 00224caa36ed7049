"""Bad input: the error names the call, the argument, what was needed and what came."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad

X = np.zeros((4, 3), np.float32)
COMPLEX = np.zeros((4, 3), np.complex64)
INDEX = np.zeros(4, np.int32)
ROW = np.ones(4, bool)
dense = jaxgrad.softmax_cross_entropy
integer = jaxgrad.softmax_cross_entropy_with_integer_labels

# What each call is given, and what its error quotes.
CASES = [
    (lambda: jaxgrad.softmax(COMPLEX), TypeError, "softmax: x", "complex64[4, 3]"),
    (lambda: jaxgrad.softmax(X, 2), ValueError, "softmax: axis", "[-2, 2)", "float32[4, 3]", "2"),
    (lambda: jaxgrad.softmax(X, -3), ValueError, "softmax: axis", "[-2, 2)", "-3"),
    (lambda: jaxgrad.softmax(X, (0, -2)), ValueError, "softmax: axis", "twice", "(0, -2)"),
    (lambda: jaxgrad.softmax(X[0, 0]), ValueError, "softmax: axis", "float32[]", "-1"),
    (lambda: jaxgrad.softmax(X, where=X), TypeError, "softmax: where", "bool", "float32[4, 3]"),
    (
        lambda: jaxgrad.softmax(X, where=np.ones((3, 4), bool)),
        ValueError,
        "softmax: where",
        "float32[4, 3]",
        "bool[3, 4]",
    ),
    (
        lambda: jaxgrad.softmax(X, where=np.ones((2, 4, 3), bool)),
        ValueError,
        "softmax: where",
        "bool[2, 4, 3]",
    ),
    (
        lambda: jaxgrad.softmax_vjp(X, X.T),
        ValueError,
        "softmax_vjp: y_bar",
        "float32[4, 3]",
        "float32[3, 4]",
    ),
    (lambda: jaxgrad.softmax_vjp(COMPLEX, X), TypeError, "softmax_vjp: y ", "complex64[4, 3]"),
    (lambda: jaxgrad.softmax_vjp(X, COMPLEX), TypeError, "softmax_vjp: y_bar", "complex64"),
    (lambda: jaxgrad.softmax_vjp(X, X, 2), ValueError, "softmax_vjp: axis", "y", "2"),
    (lambda: jaxgrad.softmax_jacobian(COMPLEX), TypeError, "softmax_jacobian: x", "complex64"),
    (lambda: jaxgrad.softmax_jacobian(X, 5), ValueError, "softmax_jacobian: axis", "5"),
    (lambda: jaxgrad.log_softmax(COMPLEX), TypeError, "log_softmax: x", "complex64[4, 3]"),
    (lambda: jaxgrad.log_softmax(X, 2), ValueError, "log_softmax: axis", "[-2, 2)", "2"),
    (lambda: jaxgrad.log_softmax(X, where=INDEX), TypeError, "log_softmax: where", "int32[4]"),
    (lambda: jaxgrad.logsumexp(X, 2), ValueError, "logsumexp: axis", "a of", "[-2, 2)", "2"),
    (lambda: jaxgrad.logsumexp(X, (1, 1)), ValueError, "logsumexp: axis", "twice", "(1, 1)"),
    (lambda: jaxgrad.logsumexp(X, b=X.T), ValueError, "logsumexp: b", "float32[3, 4]"),
    (lambda: jaxgrad.logsumexp(X, where=ROW), ValueError, "logsumexp: where", "bool[4]"),
    (lambda: jaxgrad.soft_cap(X, 0.0), ValueError, "soft_cap: cap", "above 0", "0.0"),
    (lambda: jaxgrad.soft_cap(X, -1), ValueError, "soft_cap: cap", "above 0", "-1"),
    (lambda: jaxgrad.soft_cap(X, np.nan), ValueError, "soft_cap: cap", "above 0", "nan"),
    (lambda: jaxgrad.soft_cap(X, np.ones(4)), ValueError, "soft_cap: cap", "[4, 3]", "[4]"),
    (lambda: jaxgrad.soft_cap(X, np.ones((2, 4, 3))), ValueError, "soft_cap: cap", "[2, 4, 3]"),
    (lambda: jaxgrad.soft_cap(COMPLEX, 1.0), TypeError, "soft_cap: x", "complex64[4, 3]"),
    (lambda: jaxgrad.soft_cap(X, 1j), TypeError, "soft_cap: cap", "complex64[]"),
    (lambda: jaxgrad.cross_entropy(COMPLEX, X), TypeError, "cross_entropy: probs", "complex64"),
    (lambda: jaxgrad.cross_entropy(X, COMPLEX), TypeError, "cross_entropy: labels", "complex64"),
    (
        lambda: jaxgrad.cross_entropy(X, X.T),
        ValueError,
        "cross_entropy: labels",
        "float32[4, 3]",
        "float32[3, 4]",
    ),
    (lambda: jaxgrad.cross_entropy(X, X, 2), ValueError, "cross_entropy: axis", "probs", "2"),
    (lambda: jaxgrad.cross_entropy(X, X, where=X), TypeError, "cross_entropy: where", "float32"),
    (lambda: jaxgrad.cross_entropy(X, X, where=ROW[:3]), ValueError, "cross_entropy: where"),
    (lambda: dense(COMPLEX, X), TypeError, "softmax_cross_entropy: logits", "complex64"),
    (lambda: dense(X, COMPLEX), TypeError, "softmax_cross_entropy: labels", "complex64"),
    (
        lambda: dense(X, X.T),
        ValueError,
        "softmax_cross_entropy: labels",
        "float32[4, 3]",
        "float32[3, 4]",
    ),
    (lambda: dense(X, X, 2), ValueError, "softmax_cross_entropy: axis", "logits", "2"),
    (lambda: dense(X, X, where=X), TypeError, "softmax_cross_entropy: where", "float32[4, 3]"),
    (lambda: dense(X, X, where=ROW[:3]), ValueError, "softmax_cross_entropy: where", "bool"),
    (
        lambda: dense(X[None], X, where=ROW),
        ValueError,
        "softmax_cross_entropy: where",
        "float32[1, 4, 3]",
        "bool[4]",
    ),
    (
        lambda: dense(X, X, label_smoothing=1.5),
        ValueError,
        "softmax_cross_entropy: label_smoothing",
        "[0, 1]",
        "1.5",
    ),
    (lambda: dense(X, X, label_smoothing=-0.1), ValueError, "label_smoothing", "-0.1"),
    (lambda: dense(X, X, label_smoothing=np.nan), ValueError, "label_smoothing", "nan"),
    (lambda: dense(X, X, label_smoothing=np.float32(2)), ValueError, "label_smoothing", "2.0"),
    (lambda: dense(X, X, temperature=0), ValueError, "temperature", "above 0", "0"),
    (lambda: dense(X, X, temperature=-0.5), ValueError, "temperature", "above 0", "-0.5"),
    (lambda: dense(X, X, temperature=np.float32(-2)), ValueError, "temperature", "-2.0"),
    (lambda: dense(X, X, logit_soft_cap=0), ValueError, "logit_soft_cap", "above 0", "0"),
    (lambda: dense(X, X, logit_soft_cap=-30.0), ValueError, "logit_soft_cap", "-30.0"),
    (lambda: dense(X, X, temperature=np.ones(4)), ValueError, "temperature", "scalar", "[4]"),
    (lambda: dense(X, X, z_loss=X), ValueError, "z_loss", "scalar", "float32[4, 3]"),
    (lambda: dense(X, X, z_loss=1j), TypeError, "softmax_cross_entropy: z_loss", "complex"),
    (
        lambda: integer(X, INDEX.astype(np.float32)),
        TypeError,
        "softmax_cross_entropy_with_integer_labels: labels",
        "integer",
        "float32[4]",
    ),
    (lambda: integer(X, ROW), TypeError, "labels", "integer", "bool[4]"),
    (lambda: integer(COMPLEX, INDEX), TypeError, "integer_labels: logits", "complex64[4, 3]"),
    (
        lambda: integer(X, X.astype(np.int32)),
        ValueError,
        "integer_labels: labels",
        "int[4]",
        "float32[4, 3]",
        "int32[4, 3]",
    ),
    (lambda: integer(X, INDEX[:3]), ValueError, "labels", "int[4]", "axis -1", "int32[3]"),
    (lambda: integer(X, INDEX[0]), ValueError, "labels", "int[4]", "int32[]"),
    (lambda: integer(X, INDEX, 2), ValueError, "integer_labels: axis", "[-2, 2)", "2"),
    (lambda: integer(X, INDEX, (1, 1)), ValueError, "integer_labels: axis", "twice"),
    (lambda: integer(X, INDEX, where=ROW[:3]), ValueError, "integer_labels: where", "bool"),
    (lambda: integer(X[None], INDEX[None], where=ROW), ValueError, "integer_labels: where"),
    (lambda: integer(X, INDEX, where=X), TypeError, "integer_labels: where", "float32[4, 3]"),
    (lambda: integer(X, INDEX, label_smoothing=2), ValueError, "label_smoothing", "[0, 1]", "2"),
    (lambda: integer(X, INDEX, temperature=0.0), ValueError, "temperature", "above 0", "0.0"),
    (lambda: integer(X, INDEX, logit_soft_cap=-1.0), ValueError, "logit_soft_cap", "-1.0"),
    (lambda: integer(X, INDEX, ignore_index=0.5), TypeError, "ignore_index", "0.5"),
]


@pytest.mark.parametrize("at", range(len(CASES)))
def test_bad_input(at):
    call, kind, *quotes = CASES[at]
    with pytest.raises(kind) as raised:
        call()
    text = str(raised.value)
    assert re.match(r"\w+: \w+ ", text)
    for quote in quotes:
        assert quote in text


def test_under_jit_the_errors_are_the_same():
    for call, kind, *quotes in CASES:
        with pytest.raises(kind, match=re.escape(quotes[0])):
            jax.jit(call)()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_traced_options_cannot_be_checked(value):
    """They give what their formula gives: no error, and NaN where it is not defined."""
    loss = jax.jit(lambda c: dense(X, X + 1 / 3, logit_soft_cap=c))(value)
    assert loss.shape == (4,)
    assert jnp.all(jnp.isnan(loss) | (loss > 0))
