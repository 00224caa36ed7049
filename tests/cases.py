"""The table of kernels: whoever tests a property of all of them parametrises over ``KERNELS``.

A new kernel is one more row. Its twin in ``oracles`` and its peer in JAX or optax have its name and
the names of its arguments.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles

import jaxgrad

DTYPES = ("float16", "bfloat16", "float32", "float64")
PEERS = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": jax.nn.logsumexp,
    "tanh": jnp.tanh,
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": optax.softmax_cross_entropy_with_integer_labels,
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Kernel:
    """A kernel with some of its options bound, as a function of its array arguments in order."""

    name: str
    makers: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Any]]
    wrt: tuple[int, ...]
    options: dict[str, Any]

    def __repr__(self):
        short = self.name.replace("_with_integer_labels", "_integer")
        extras = [name for name in (*self.makers, *self.options) if name not in _PLAIN]
        return "-".join((short, *extras)).replace("-".join(_RULE), "rule")

    def function(self, *args):
        return self._call(getattr(jaxgrad, self.name), args)

    def twin(self, *args):
        return self._call(getattr(oracles, self.name), args)

    @property
    def peer(self):
        return functools.partial(self._call, PEERS[self.name])

    @property
    def is_loss(self):
        return self.name.endswith(("cross_entropy", "labels"))

    def _call(self, function, args):
        return function(**dict(zip(self.makers, args, strict=True)), **self.options)

    def arguments(self, dtype="float64", shape=(3, 5)):
        """Arguments for logits of ``shape``: the same for every dtype but for rounding."""
        rng = np.random.default_rng(zlib.crc32(repr((self.name, shape)).encode()))
        return tuple(as_dtype(make(rng, shape), dtype) for make in self.makers.values())


_PLAIN = ("x", "a", "y", "y_bar", "cap", "probs", "logits", "labels", "axis")


def as_dtype(x, dtype):
    """``x`` in ``dtype`` where it is floating, as it is where not."""
    x = np.asarray(x)
    return x.astype(jnp.dtype(dtype)) if x.dtype == np.float64 else x


def as_double(x):
    """The same numbers in float64."""
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def logits(rng, shape):
    return 3 * rng.standard_normal(shape)


def mask(rng, shape):
    where = rng.random(shape) < 0.5
    where[..., ::2] = True
    return where


def distribution(rng, shape):
    weights = rng.uniform(0.2, 1.0, shape)
    return weights / weights.sum(-1, keepdims=True)


def indices(rng, shape):  # of classes that no mask hides
    return 2 * rng.integers(0, (shape[-1] + 1) // 2, shape[:-1])


def factors(rng, shape):
    return rng.uniform(0.5, 1.5, shape)


def scalar(value):
    return lambda rng, shape: np.float64(value)


def weights(shape):
    """Cotangents no two of which are alike."""
    return np.random.default_rng(0).uniform(0.5, 1.5, shape)


_RULE = {
    "label_smoothing": scalar(0.1),
    "z_loss": scalar(0.01),
    "temperature": scalar(0.7),
    "logit_soft_cap": scalar(5.0),
}
_PROBS = {"probs": distribution, "labels": distribution}
_DENSE = {"logits": logits, "labels": distribution}
_INTEGER = {"logits": logits, "labels": indices}
_integer = "softmax_cross_entropy_with_integer_labels"

KERNELS = (
    Kernel("softmax", {"x": logits}, (0,), {}),
    Kernel("softmax", {"x": logits, "where": mask}, (0,), {}),
    Kernel("softmax_jacobian", {"x": logits}, (0,), {}),
    Kernel("softmax_vjp", {"y": distribution, "y_bar": logits}, (1,), {}),
    Kernel("log_softmax", {"x": logits}, (0,), {}),
    Kernel("logsumexp", {"a": logits}, (0,), {"axis": -1}),
    Kernel("logsumexp", {"a": logits, "b": factors, "where": mask}, (0, 1), {"axis": -1}),
    Kernel("tanh", {"x": logits}, (0,), {}),
    Kernel("soft_cap", {"x": logits, "cap": scalar(2.0)}, (0, 1), {}),
    Kernel("cross_entropy", _PROBS | {"where": mask}, (0, 1), {}),
    Kernel("softmax_cross_entropy", _DENSE, (0, 1), {}),
    Kernel("softmax_cross_entropy", _DENSE | {"where": mask} | _RULE, (0, 1, 3, 4, 5, 6), {}),
    Kernel(_integer, _INTEGER, (0,), {}),
    Kernel(_integer, _INTEGER | {"where": mask} | _RULE, (0, 3, 4, 5, 6), {"ignore_index": 2}),
)
