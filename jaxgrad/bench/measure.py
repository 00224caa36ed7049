"""What a row of the accuracy table is, and how its errors are measured."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad
from jaxgrad.bench.truth import TRUTH, numbers
from jaxgrad.testing import errors_in_ulps

ROWS, CLASSES = 32, 8
"""Of most points: a shape more is a compilation more."""

DENSE, INTEGER = "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
FUSED = "linear_softmax_cross_entropy"
WITHOUT_RULE = ("softmax_vjp", "softmax_jacobian")
Results = tuple[np.ndarray, ...]
"""A value, and the gradients to the floating arguments."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A kernel, its arguments, and the cotangent of its value.

    Floating arguments are float64 here, and rounded to the dtype under test before use.
    """

    kernel: str
    args: tuple[np.ndarray, ...]
    y_bar: np.ndarray
    where: np.ndarray | None = None
    ignore_index: int | None = None
    due: Results | None = None  # None: as TRUTH has it


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One line of the table: the largest error among some entries of a value or of gradients."""

    point: Point
    quantity: str
    dtype: str
    regime: str
    bar: float
    unit: str
    outputs: tuple[int, ...] = (0,)
    entries: Any = ...

    @property
    def kernel(self) -> str:
        """The function's public name."""
        return self.point.kernel

    @property
    def name(self) -> str:
        """Unique among all rows."""
        return f"{self.kernel}, {self.quantity}, {self.dtype}, {self.regime}"

    def error(self, results: Results) -> float:
        """Of what :func:`ours` or :func:`peers` returned."""
        due, of = truth(self.point, self.dtype), UNITS[self.unit]
        errors = [np.ravel(of(results[i], due[i])[self.entries]) for i in self.outputs]
        return float((np.sum if of is _wrong else np.max)(np.concatenate(errors)))


def _relative(got, want, axis):
    """|got - want| against the largest entry along ``axis``; along (), against itself."""
    with np.errstate(all="ignore"):
        errors = np.abs(_exact(got) - want) / np.abs(want).max(axis, keepdims=True)
    errors = np.where(_exact(got) == want, 0, errors).astype(np.float64)
    return np.where(np.isnan(errors), np.inf, errors)


def _wrong(got, want):
    """Which entries differ by more than rounding."""
    errors = errors_in_ulps(got, want, -1 if got.ndim == 2 else ())
    return errors > (1 if jnp.finfo(got.dtype).bits == 16 else 8)


UNITS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "wrong": _wrong,
    "absolute": lambda got, want: np.abs(_exact(got) - want),
    "relative": functools.partial(_relative, axis=()),
    "of the row": functools.partial(_relative, axis=-1),
    "of the norm": lambda a, b: np.array(np.linalg.norm(_exact(a) - b) / np.linalg.norm(b)),
    "ulp": functools.partial(errors_in_ulps, axis=()),
    "ulp of the row": functools.partial(errors_in_ulps, axis=-1),
}


@functools.cache
def truth(point: Point, dtype: str) -> Results:
    """Value and gradients in higher precision."""
    if point.due is not None:
        return point.due
    n = numbers(dtype)
    assert n is not None, dtype
    args = (n.array(_exact(a)) if _is_floating(a) else a for a in _rounded(point, dtype))
    with np.errstate(all="ignore"):
        return TRUTH[point.kernel](n, n.array(point.y_bar), *args)


@functools.cache
def ours(point: Point, dtype: str) -> Results:
    """Value and gradients of jaxgrad's kernel."""
    return _evaluate(_kernels()[point.kernel], point, dtype)


@functools.cache
def peers(point: Point, dtype: str) -> Results | None:
    """Those of jax.nn, jax.numpy or optax; None for what they lack, and for masks, to save time."""
    lacking = point.where is not None or point.ignore_index is not None
    peer = None if lacking else _peers().get(point.kernel)
    return None if peer is None else _evaluate(peer, point, dtype)


def _evaluate(function, point, dtype):
    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        derive = _derive(function, point.ignore_index, point.kernel not in WITHOUT_RULE)
        return jax.device_get(derive(point.y_bar, _rounded(point, dtype), point.where))


@functools.cache
def _derive(function, ignore_index, gradients):
    @jax.jit
    def derive(y_bar, args, where):
        options = {"where": where, "ignore_index": ignore_index}
        call = functools.partial(function, **{k: v for k, v in options.items() if v is not None})
        if not gradients:
            return (call(*args),)
        constants = [a for a in args if not _is_floating(a)]
        y, vjp = jax.vjp(lambda *x: call(*x, *constants), *filter(_is_floating, args))
        return y, *vjp(y_bar.astype(y.dtype))

    return derive


def _rounded(point, dtype):
    return tuple(a.astype(jnp.dtype(dtype)) if _is_floating(a) else a for a in point.args)


def _is_floating(a):
    return jnp.issubdtype(a.dtype, jnp.floating)


def _exact(a):
    return a.astype(np.float64)


@functools.cache
def _kernels():
    return {name: getattr(jaxgrad, name) for name in TRUTH} | {
        "logsumexp": functools.partial(jaxgrad.logsumexp, axis=-1),
        "softmax_vjp": lambda x, y_bar: jaxgrad.softmax_vjp(jaxgrad.softmax(x), y_bar),
        FUSED: lambda x, w, bias, labels: jaxgrad.linear_softmax_cross_entropy(x, w, labels, bias),
    }


@functools.cache
def _peers():
    functions = {
        "softmax": jax.nn.softmax,
        "softmax_vjp": lambda x, y_bar: jax.vjp(jax.nn.softmax, x)[1](y_bar)[0],
        "softmax_jacobian": jax.vmap(jax.jacrev(jax.nn.softmax)),
        "log_softmax": jax.nn.log_softmax,
        "logsumexp": functools.partial(jax.nn.logsumexp, axis=-1),
        "tanh": jnp.tanh,
        "soft_cap": lambda x, cap: cap * jnp.tanh(x / cap),
        "cross_entropy": lambda z, t: -jax.scipy.special.xlogy(t, z).sum(-1),
    }
    try:
        import optax
    except ImportError:
        return functions
    integer = optax.softmax_cross_entropy_with_integer_labels
    return functions | {
        DENSE: optax.softmax_cross_entropy,
        INTEGER: integer,
        FUSED: lambda x, w, bias, labels: integer(x @ w + bias, labels),
    }
