"""The peers that kernels are raced with, as far as they are installed."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

PACKAGES = {"optax": "optax", "tokamax": "tokamax", "jax-cce": "jax_cce", "torch": "torch"}
"""What pip calls each of them, and the module it holds."""

CAP = 30.0
"""Of soft-caps."""


@functools.cache
def load(package: str) -> ModuleType | None:
    """The module of a package; None where it is not installed, or cannot be imported."""
    try:
        module = importlib.import_module(PACKAGES[package])
        if package == "tokamax":  # else it takes the command line for its own, at the first call
            importlib.import_module("absl.flags").FLAGS([package])
        return module
    except Exception:  # a broken peer, whatever it raises, must not end the race
        return None


def absent() -> dict[str, str]:
    """The command that would add each peer that is missing."""
    return {name: f"pip install {name}" for name in PACKAGES if load(name) is None}


def losses() -> tuple[Callable | None, ...]:
    """optax's losses: of dense labels, of integer labels, and this with a soft-cap."""
    optax = load("optax")
    if optax is None:
        return None, None, None
    integer = optax.softmax_cross_entropy_with_integer_labels
    return optax.softmax_cross_entropy, integer, lambda x, t: integer(soft_cap(x, CAP), t)


def softmax_vjp(y: Array, y_bar: Array) -> Array:
    """As the textbook has it."""
    return y * (y_bar - (y_bar * y).sum(-1, keepdims=True))


def soft_cap(x: Array, cap: float | Array) -> Array:
    """As the textbook has it."""
    return cap * jnp.tanh(x / cap)


def cross_entropy(z: Array, t: Array) -> Array:
    """As the textbook has it."""
    return -jax.scipy.special.xlogy(t, z).sum(-1)


def heads() -> dict[str, Callable]:
    """Losses of ``(x, w, labels)``: per token where the logits are formed, else their mean."""
    found: dict[str, Callable] = {}
    integer = losses()[1]
    if integer is not None:
        found["x @ w, optax"] = lambda x, w, labels: integer(x @ w, labels)
    if cce := load("jax-cce"):
        found["jax-cce"] = lambda x, w, labels: cce.linear_cross_entropy(x, w.T, labels)
    if tokamax := load("tokamax"):
        found["tokamax"] = lambda x, w, labels: tokamax.linear_softmax_cross_entropy_loss(
            x, labels, w, reduction="mean"
        )
    return found


def log_probs(x: Array, w: Array, labels: Array) -> Array:
    """log p of the labels, the logits formed."""
    return jnp.take_along_axis(jax.nn.log_softmax(x @ w), labels[:, None], -1)[:, 0]


def attention(is_causal: bool) -> dict[str, Callable]:
    """Attention of ``(query, key, value)``."""
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    found = {"jax.nn": plain}
    if jax.default_backend() == "gpu":
        found["jax.nn, cuDNN"] = functools.partial(plain, implementation="cudnn")
    if tokamax := load("tokamax"):
        found["tokamax"] = functools.partial(tokamax.dot_product_attention, is_causal=is_causal)
    return found
