"""Every bar of the accuracy table is met, its truth is true, and the command says what it saw."""

import functools
import sys

import numpy as np
import oracles
import pytest

import jaxgrad
from jaxgrad.bench import accuracy, measure, truth
from jaxgrad.bench.accuracy import DTYPES

ROWS = {row.name: row for row in accuracy.rows()}
DENSE, INTEGER = measure.DENSE, measure.INTEGER


@pytest.mark.parametrize("name", ROWS)
def test_bar_is_met(name):
    row = ROWS[name]
    error = row.error(measure.ours(row.point, row.dtype))
    assert error <= row.bar, f"{error:.3g}, bar {row.bar:.3g} {row.unit}"


def test_every_row_has_a_name_of_its_own():
    assert len(ROWS) == len(accuracy.rows())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_kernel_has_rows(dtype):
    kernels = {row.kernel for row in ROWS.values() if row.dtype == dtype}
    fused = {"SparseLabels", "linear_log_probs", measure.FUSED, "dot_product_attention"}
    fused |= {"ring_attention", "sharded"}
    of_narrow_y = {"softmax_vjp"} if dtype in ("float16", "bfloat16") else set()
    assert kernels - fused == set(jaxgrad.__all__) - fused - of_narrow_y


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_peers_miss_what_numerics_says_they_miss(dtype):
    """Else the rows would not measure what they are there for."""
    missed = {
        (row.kernel, row.quantity, row.regime)
        for row in ROWS.values()
        if row.dtype == dtype
        and (theirs := measure.peers(row.point, dtype)) is not None
        and row.error(theirs) > row.bar
    }
    gaps = ("gap 10", "gap 15", "gap 20")
    assert missed >= {
        *(("softmax", "gradient, v = e_winner", gap) for gap in gaps),
        *(("log_softmax", "winning class", gap) for gap in gaps),
        *((loss, "label winning", gap) for loss in (DENSE, INTEGER) for gap in gaps),
        *((loss, "gradient at label", gap) for loss in (DENSE, INTEGER) for gap in gaps),
        *(("tanh", "gradient", regime) for regime in ("|u| < 3", "3 < |u| < 8", "|u| > 8")),
        *(("soft_cap", "gradient", regime) for regime in ("3 < |u| < 8", "|u| > 8")),
        *((INTEGER, "loss", f"offset {offset}") for offset in ("1e3", "1e5")),
        ("logsumexp", "value, gradient", "all -inf"),
        (INTEGER, "value, gradient", "label -1"),
    }


def points():
    rng = np.random.default_rng(1)
    x = np.array([[1.0, -2.0, 0.25, 3.0], [-1.0, 20.0, 0.5, -0.75]])
    t, z = rng.dirichlet(np.ones(4), (2, 2))
    u = np.array([[0.01, -0.3, 0.9, 1.1], [5.0, -12.0, 40.0, 2.0]])
    labels = np.array([2, 1])
    return {
        "softmax": (oracles.softmax, (x,)),
        "log_softmax": (oracles.log_softmax, (x,)),
        "logsumexp": (functools.partial(oracles.logsumexp, axis=-1), (x,)),
        "tanh": (oracles.tanh, (u,)),
        "soft_cap": (oracles.soft_cap, (30 * u, np.full_like(u, 30.0))),
        "cross_entropy": (oracles.cross_entropy, (z, t)),
        DENSE: (oracles.softmax_cross_entropy, (x, t)),
        INTEGER: (oracles.softmax_cross_entropy_with_integer_labels, (x, labels)),
    }


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("digits", ["float64", "numpy.longdouble", "mpmath"])
@pytest.mark.parametrize("kernel", points())
def test_truth_is_true(kernel, digits, monkeypatch):
    if digits == "numpy.longdouble":
        if np.finfo(np.longdouble).eps > 1e-18:
            pytest.skip("longdouble is float64 on this platform")
        without(monkeypatch, "mpmath")
    n = truth.numbers.__wrapped__("float32" if digits == "float64" else "float64")
    assert n.name == digits
    twin, args = points()[kernel]
    y = oracles.in_50_digits(twin, *args)
    y_bar = np.random.default_rng(2).uniform(-2, 2, y.shape)
    at = [i for i, a in enumerate(args) if a.dtype == np.float64]
    due = [y, *(oracles.derivative(twin, args, i, y_bar) for i in at)]
    exact = [n.array(a) if a.dtype == np.float64 else a for a in args]
    found = truth.TRUTH[kernel](n, n.array(y_bar), *exact)
    for got, want in zip(found, due, strict=True):
        rtol = 1e-13 if digits == "float64" else 5e-16
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=rtol, atol=1e-300)


def test_truth_of_the_products_is_true():
    n, x = truth.FLOAT64, np.array([[1.0, -2.0, 0.25, 3.0]])
    y_bar = np.array([[1.0, 0.5, -1.5, 2.0]])
    jacobian = truth.TRUTH["softmax_jacobian"](n, None, x)[0]
    np.testing.assert_allclose(jacobian, oracles.softmax_jacobian(x), rtol=1e-14)
    product = truth.TRUTH["softmax_vjp"](n, None, x, y_bar)[0]
    np.testing.assert_allclose(product, (jacobian @ y_bar[..., None])[..., 0], rtol=1e-14)


def test_truth_of_many_classes_is_that_of_few(monkeypatch):
    x, y_bar = np.random.default_rng(0).standard_normal((2, 3, 50))
    few = truth.TRUTH["softmax"](truth.FLOAT64, y_bar, x)
    loss = truth.TRUTH[DENSE](truth.FLOAT64, y_bar[:, 0], x, np.eye(50)[:3])
    monkeypatch.setattr(truth, "MANY", 10)
    many = truth.TRUTH["softmax"](truth.FLOAT64, y_bar, x)
    many_loss = truth.TRUTH[DENSE](truth.FLOAT64, y_bar[:, 0], x, np.eye(50)[:3])
    for a, b in zip(few + loss, many + many_loss, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
