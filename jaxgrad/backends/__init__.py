"""Which implementation runs a kernel: decided here and nowhere else.

====================  ==============================================================================
xla                   plain JAX, for any device; alone in having every option and every derivative
pallas_tpu            Pallas, for TPU
pallas_gpu            Pallas Triton, for GPU
pallas_interpret      the kernel of ``pallas_tpu`` on any device, slowly, to see what it computes
pallas_gpu_interpret  that of ``pallas_gpu``
====================  ==============================================================================

Nothing is chosen unasked that was not measured to be better on that device. What is asked for by
name is what runs, or an error tells why it cannot: nothing else takes its place.
"""

from typing import Any, Literal, NamedTuple, cast

import jax

Implementation = Literal[
    "xla", "pallas_tpu", "pallas_gpu", "pallas_interpret", "pallas_gpu_interpret"
]
_EVERY: tuple[Implementation, ...] = (
    "pallas_tpu",
    "pallas_gpu",
    "pallas_interpret",
    "pallas_gpu_interpret",
)

# What each function has besides "xla".
OTHERS: dict[str, tuple[Implementation, ...]] = {
    "linear_softmax_cross_entropy": _EVERY,
    "linear_log_probs": _EVERY,
    "dot_product_attention": _EVERY,
}


class Device(NamedTuple):
    """What a kernel was written for, and what runs it anywhere."""

    platform: str
    interpreter: Implementation


DEVICES: dict[str, Device] = {
    "pallas_tpu": Device("tpu", "pallas_interpret"),
    "pallas_gpu": Device("gpu", "pallas_gpu_interpret"),
}


class Choice(NamedTuple):
    """What runs, and why."""

    name: Implementation
    reason: str

    @property
    def asked(self) -> bool:
        """Whether it was asked for by name."""
        return self.reason == _ASKED


_ASKED = "asked for"

# What runs unasked in place of "xla": of which function, on which device, and why.
MEASURED: dict[tuple[str, str], Choice] = {
    ("dot_product_attention", "NVIDIA H100"): Choice(
        "pallas_gpu",
        "measured on an H100: value and gradients for B 2, T 4096, N 16, H 128, causal, bfloat16, "
        "take 1.9 ms and 2 MiB; 9.4 ms and 5121 MiB by jax.nn's 'xla'; 1.2 ms by its 'cudnn'",
    ),
}


def choose(of: str, implementation: Any = None, obstacle: str | None = None) -> Choice:
    """The implementation that runs a call.

    Args:
      of: The function, as errors name it.
      implementation: What the caller asks for; None to choose.
      obstacle: Why what is asked for, or :func:`preferred`, cannot run the call; None if it can.

    Raises:
      ValueError: There is no such implementation of ``of``.
      NotImplementedError: There is, and it cannot run this call here.
    """
    others = OTHERS.get(of, ())
    if implementation is None:
        best = preferred(of)
        if best is None or obstacle is None:
            return best or Choice("xla", _why_xla(of))
        return Choice("xla", f"{best.name!r} {obstacle}")
    if not isinstance(implementation, str) or implementation not in ("xla", *others):
        names = " or ".join(repr(name) for name in (None, "xla", *others))
        raise ValueError(f"{of}: implementation must be {names}, got {implementation!r}")
    made_for = DEVICES.get(implementation)
    if made_for is not None and platform() != made_for.platform:
        obstacle = (
            f"needs a {made_for.platform.upper()}, got {platform()}; "
            f"{made_for.interpreter!r} runs it anywhere, slowly"
        )
    if implementation != "xla" and obstacle is not None:
        raise NotImplementedError(f"{of}: implementation={implementation!r} {obstacle}")
    return Choice(cast(Implementation, implementation), _ASKED)


def made_for_here(of: str) -> list[str]:
    """What a function has besides "xla" that was written for this platform."""
    others = OTHERS.get(of, ())
    return [name for name in others if name in DEVICES and DEVICES[name].platform == platform()]


def preferred(of: str) -> Choice | None:
    """What was measured to be better than "xla" on this device; None: nothing was."""
    here = (best for (name, at), best in MEASURED.items() if name == of and device().startswith(at))
    return next(here, None)


def device() -> str:
    """The device that programs are traced for, and how many there are if they are several."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract.device_kind
    devices = jax.devices()
    return (
        devices[0].device_kind if len(devices) == 1 else f"{len(devices)} {devices[0].device_kind}"
    )


def platform() -> str:
    """What programs are traced for: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    It is the platform of the mesh in use, which a program that is compiled for an absent device has
    to name (by ``jax.sharding.use_abstract_mesh``), else JAX's default.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def _why_xla(of):
    if of not in OTHERS:
        return "there is no other"
    here = made_for_here(of)
    if not here:
        return f"no other runs on {platform()}"
    return f"alone in having every derivative; implementation={here[0]!r} may be faster"
