"""The command ``check``: its table, its JSON, its exit code, and what it does without extras."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxgrad
from jaxgrad.bench import accuracy, measure, truth
from jaxgrad.bench.accuracy import check


@pytest.fixture(autouse=True)
def uncached():
    """A fixture may change what the kernels, the peers and the numbers are."""
    cached = (measure._kernels, measure._peers, truth.numbers)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def plant(monkeypatch, name, function):
    monkeypatch.setattr(jaxgrad, name, function)


def test_met(capsys, tmp_path):
    path = tmp_path / "accuracy.json"
    assert check(kernels=["tanh"], dtypes=["float32", "bfloat16"], json=path) == 0
    out = capsys.readouterr().out
    assert "float32: errors against float64" in out
    assert "\ntanh\n" in out
    assert "20 of 20 bars are met." in out
    assert "missed" not in out
    report = json.loads(path.read_text())
    assert report["jax"] == jax.__version__
    assert len(report["rows"]) == 20
    (row,) = (
        row
        for row in report["rows"]
        if (row["quantity"], row["dtype"], row["regime"]) == ("gradient", "float32", "|u| > 8")
    )
    assert row["met"]
    assert not row["peer_met"]
    assert 0 < row["error"] <= row["bar"] == 4e-7 < row["peer_error"]


def test_missed(capsys, monkeypatch):
    plant(monkeypatch, "tanh", jnp.tanh)
    assert check(kernels=["tanh"], dtypes=["float32"]) == 1
    out = capsys.readouterr().out
    assert "missed: tanh, gradient, float32, |u| > 8: 1.00e+00, bar 4e-07 relative\n" in out
    assert "7 of 10 bars are met." in out


def test_raising_is_missing(capsys, monkeypatch, tmp_path):
    def no_rule(z, t):
        raise NotImplementedError("no such device")

    plant(monkeypatch, "cross_entropy", no_rule)
    path = tmp_path / "accuracy.json"
    assert check(kernels=["cross_entropy"], dtypes=["float16"], json=path) == 1
    out = capsys.readouterr().out
    assert "cross_entropy, value, float16, any: raised NotImplementedError: no such device" in out
    rows = json.loads(path.read_text())["rows"]
    assert {row["error"] for row in rows} == {None}


@pytest.mark.parametrize("missing", ["rich", "optax", "mpmath"])
def test_without_an_extra(missing, capsys, monkeypatch):
    dense = measure.DENSE
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert check(kernels=[dense], dtypes=["float64"]) in (0, 1)
    out = capsys.readouterr().out
    judge = "numpy.longdouble" if missing == "mpmath" else "mpmath"
    assert f"float64: errors against {judge}\n" in out
    (line,) = (line for line in out.splitlines() if "all -inf" in line)
    assert line.split("all -inf")[1].split() == [
        *("0", "wrong"), *(() if missing == "optax" else ("9", "wrong")), *("0", "wrong"), "yes"
    ]  # fmt: skip


def test_without_more_digits_than_float64(capsys, monkeypatch):
    monkeypatch.setattr(
        accuracy, "numbers", lambda dtype: None if dtype == "float64" else truth.FLOAT64
    )
    assert check(kernels=["tanh"], dtypes=["float64", "float32"]) == 0
    assert "float64: left out: it takes mpmath\n" in capsys.readouterr().out
    assert check(kernels=["tanh"], dtypes=["float64"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernels": ["sofmax"]}, "no kernel 'sofmax' to check: there are softmax, "),
        ({"dtypes": ["int8"]}, "no dtype 'int8' to check: there are float32, "),
        ({"kernels": ["softmax_vjp"], "dtypes": ["float16"]}, "nothing to check"),
        ({"json": "no/such/folder/x.json"}, "No such file or directory"),
    ],
)
def test_bad_argument(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert check(**arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxgrad: error: ")
    assert message in captured.err
