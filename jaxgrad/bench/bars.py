"""What the kernels are held to, in time and temporary memory, on a CPU.

A bar on time is the least that a peer's time must be, over jaxgrad's; a bar on memory is the most
that jaxgrad may take beside its arguments and results. The numbers are of two x86-64 cores: with
more of them, or on another platform, they say what to look at, not what is wrong.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxgrad.bench.measure import DENSE, FUSED, INTEGER
from jaxgrad.bench.subjects import CAPPED, LOW_MEMORY, MEAN, NOT_JITTED, OURS, Shape

Record = dict[str, Any]
"""A row of the results, as JSON has it."""

MIB = 2**20
PLAIN_HEAD = "x @ w, optax"


class Verdict(NamedTuple):
    """A bar, in words, and whether it is met; ``peer`` is None for a bar on memory."""

    asks: str
    peer: str | None
    met: bool


def verdicts(record: Record) -> list[Verdict]:
    """Of all bars on a row."""
    shape, found = tuple(record["shape"]), []
    key = record["kernel"], record["variant"], record["what"]
    for bar in _SPEED:
        ratio = record["ratios"].get(bar.peer)
        if ratio and key in bar.keys and record["dtype"] in bar.dtypes and bar.at(shape):
            found.append(Verdict(f"≥ {bar.least:.3g}", bar.peer, ratio[1] >= bar.least))
    temp = record["contenders"][OURS].get("temp_bytes")
    if temp is not None:
        for asks, most in _memory(key, record, shape):
            found.append(Verdict(asks, None, temp <= most))
    return found


def is_held(kernel: str, variant: str, dtype: str, what: str) -> bool:
    """Whether there is a bar on the time of a use of a kernel, at some shape."""
    return any((kernel, variant, what) in bar.keys and dtype in bar.dtypes for bar in _SPEED)


class _Speed(NamedTuple):
    keys: tuple[tuple[str, str, str], ...]
    dtypes: tuple[str, ...]
    peer: str
    least: float
    at: Callable[[Shape], bool] = lambda shape: True


def _large(shape: Shape) -> bool:
    return math.prod(shape) >= 2**24


def _long(shape: Shape) -> bool:
    return shape[1] >= 2048


def _wide(shape: Shape) -> bool:
    return shape[2] >= 2**15


def _gradients(*kernels: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((kernel, "", "gradient") for kernel in kernels)


_F32, _BF16 = ("float32",), ("bfloat16",)
_NN = _gradients("softmax", "log_softmax", "logsumexp")
_CAPPED = (INTEGER, CAPPED)
_FUSED = ((FUSED, MEAN, "gradient"),)
_ATTENTION = "dot_product_attention"
_SPEED = (
    _Speed(_NN, _F32, "jax.nn", 0.95),
    _Speed(_gradients("tanh"), _F32, "jax.numpy", 0.95),
    _Speed(_gradients(INTEGER), _F32, "optax", 0.95),
    _Speed(_NN[:2], _BF16, "jax.nn", 1.4, _large),
    _Speed(_gradients(INTEGER), _BF16, "optax", 2.0, _large),
    _Speed(_gradients(DENSE), _F32, "optax", 1.4, _large),
    _Speed(((*_CAPPED, "forward"),), _F32, "optax", 2.5, _large),
    _Speed(((*_CAPPED, "gradient"),), _F32, "optax", 1.1, _large),
    _Speed((("softmax", NOT_JITTED, "forward"),), _F32 + _BF16, "jax.jit", 1 / 1.2),
    _Speed(_FUSED, _F32, PLAIN_HEAD, 1.15, lambda shape: shape[1] == 256 and _wide(shape)),
    _Speed(_FUSED, _F32, PLAIN_HEAD, 1.0, lambda shape: shape[1] == 768),
    _Speed(_FUSED, _BF16, PLAIN_HEAD, 1.5, _wide),
    _Speed(_FUSED, _F32, "jax-cce", 1.25, _wide),
    _Speed(_FUSED, _BF16, "jax-cce", 1.8, _wide),
    _Speed(((FUSED, LOW_MEMORY, "gradient"),), _F32, PLAIN_HEAD, 0.8, lambda shape: shape[2] > 1e5),
    _Speed(((_ATTENTION, "", "forward"),), _F32 + _BF16, "jax.nn", 3.0, _long),
    _Speed(((_ATTENTION, "", "gradient"),), _F32 + _BF16, "jax.nn", 2.0, _long),
    _Speed(((_ATTENTION, "causal", "gradient"),), _F32 + _BF16, "jax.nn", 4.0, _long),
)


def _memory(key, record: Record, shape: Shape) -> Iterator[tuple[str, float]]:
    """Bars on temporary memory: in words, and the most bytes."""
    dtype, large = record["dtype"], _large(shape)
    logits = math.prod(shape) * (2 if dtype == "bfloat16" else 4)
    temps = {name: entry.get("temp_bytes") for name, entry in record["contenders"].items()}
    theirs = [temp for name, temp in temps.items() if name != OURS and temp is not None]
    if dtype == "float32" and key in _NN + _gradients("tanh", INTEGER) and theirs:
        slack = 64 * shape[0] + 4096  # a few numbers a row
        yield "temp ≤ theirs", min(theirs) + slack
    without = _NN[:2] if dtype == "bfloat16" else _gradients(DENSE)
    if large and key in without:
        yield "temp < the logits", logits - 1
    if large and dtype == "bfloat16" and key == (INTEGER, "", "gradient"):
        yield "temp ≤ 1 MiB", MIB
    if key == (FUSED, LOW_MEMORY, "gradient") and shape[2] > 1e5:
        most = 25 if dtype == "float32" else 60
        yield f"temp ≤ {most} MiB", most * MIB
    if key[0] == _ATTENTION and key[2] == "gradient" and _long(shape) and theirs:
        yield "temp ≤ theirs / 15", temps["jax.nn"] / 15
