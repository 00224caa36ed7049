"""What jaxgrad would run on: versions, devices, and how each kernel runs there."""

import functools
import platform
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

import jaxgrad
from jaxgrad import backends, machine

OPTIONAL = ("optax", "matplotlib", "rich", "mpmath")

# Sizes that tell the axes of a residual apart: t tokens (rows), d features, v classes, h heads.
_AXES = {5: "t", 3: "d", 7: "v", 2: "h"}
_LOGITS = ShapeDtypeStruct((5, 7), jnp.float32)
_HIDDEN, _HEAD = ShapeDtypeStruct((5, 3), jnp.float32), ShapeDtypeStruct((3, 7), jnp.float32)
_HEADS = ShapeDtypeStruct((5, 2, 3), jnp.float32)
_LABELS = ShapeDtypeStruct((5,), jnp.int32)
_CAP = ShapeDtypeStruct((), jnp.float32)

# What each kernel is asked about: arguments that differ from one array of logits.
ARGUMENTS = {
    "softmax_vjp": (_LOGITS, _LOGITS),
    "soft_cap": (_LOGITS, _CAP),
    "cross_entropy": (_LOGITS, _LOGITS),
    "softmax_cross_entropy": (_LOGITS, _LOGITS),
    "softmax_cross_entropy_with_integer_labels": (_LOGITS, _LABELS),
    "linear_softmax_cross_entropy": (_HIDDEN, _HEAD, _LABELS),
    "linear_log_probs": (_HIDDEN, _HEAD, _LABELS),
    "dot_product_attention": (_HEADS, _HEADS, _HEADS),
}
OPTIONS = {"logsumexp": {"axis": -1}}


def info() -> int:
    """Prints what there is; the exit code is 1 where JAX finds no device."""
    _row("jaxgrad", jaxgrad.__version__)
    _row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("jax", "jaxlib", "numpy", *OPTIONAL):
        _row(package, machine.version(package) or "not installed")
    default = jnp.result_type(float)
    _row("x64", "on" if default == jnp.float64 else "off")
    _row("default dtype", default)
    try:
        for device in jax.devices():
            _row(
                "device", f"{device.id}: {device.platform}, {device.device_kind}, {_memory(device)}"
            )
    except RuntimeError as error:
        _row("device", f"none: {str(error).splitlines()[0]}")
        return 1
    print(f"\n{'kernel':44}{'runs as':10}kept for its backward")
    reasons = {}
    for name in jaxgrad.__all__:
        if not isinstance(kernel := getattr(jaxgrad, name), type):
            choice = backends.choose(name)
            reasons.setdefault(choice, []).append(name)
            print(f"{name:44}{choice.name:10}{', '.join(kept(kernel))}")
    for choice, names in reasons.items():
        few = ", ".join(names) if len(names) < 4 else f"{len(names)} kernels"
        print(f"\n{choice.name}: {choice.reason} ({few})")
    return 0


def kept(kernel: Callable) -> list[str]:
    """What the backward rule of a public kernel keeps, as ``float32[t, v]``."""
    f = functools.partial(kernel, **OPTIONS.get(kernel.__name__, {}))
    arguments = ARGUMENTS.get(kernel.__name__, (_LOGITS,))
    if "custom_vjp_call" not in str(jax.make_jaxpr(f)(*arguments)):
        return ["(no rule of its own: differentiated by JAX)"]
    residuals = jax.eval_shape(lambda *arguments: jax.vjp(f, *arguments)[1], *arguments)
    return [
        f"{leaf.dtype}[{', '.join(_AXES.get(n, str(n)) for n in leaf.shape)}]"
        for leaf in jax.tree.leaves(residuals)
    ]


def _row(label: str, value: object) -> None:
    print(f"{label:15}{value}")


def _memory(device) -> str:
    limit = machine.memory_bytes(device)
    return f"{limit / 2**30:.1f} GiB" if limit else "memory not known"
