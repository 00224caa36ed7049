"""Which implementation runs a kernel: decided here and nowhere else.

====================  ==============================================================================
xla                   plain JAX, for any device; alone in having every option and every derivative
pallas_tpu            Pallas, for TPU
pallas_interpret      the kernel of ``pallas_tpu`` on any device, slowly, to see what it computes
pallas_gpu            Pallas, by way of Triton, for GPU
pallas_gpu_interpret  the kernel of ``pallas_gpu``, likewise
====================  ==============================================================================

Nothing is chosen unasked that was not measured to be better on that device. What is asked for by
name is what runs, or an error tells why it cannot: nothing else takes its place.
"""

from typing import Any, Literal, NamedTuple, cast

import jax

Implementation = Literal[
    "xla", "pallas_tpu", "pallas_interpret", "pallas_gpu", "pallas_gpu_interpret"
]

# What each function has besides "xla".
OTHERS: dict[str, tuple[Implementation, ...]] = {
    "linear_softmax_cross_entropy": ("pallas_tpu", "pallas_interpret"),
    "linear_log_probs": ("pallas_tpu", "pallas_interpret"),
    "dot_product_attention": (
        "pallas_tpu",
        "pallas_interpret",
        "pallas_gpu",
        "pallas_gpu_interpret",
    ),
}

# The platform that one needs, and the other one that shows anywhere what it computes.
NEEDS = {"pallas_tpu": ("tpu", "pallas_interpret"), "pallas_gpu": ("gpu", "pallas_gpu_interpret")}


class Choice(NamedTuple):
    """What runs, and why."""

    name: Implementation
    reason: str


def choose(of: str, implementation: Any = None, obstacle: str | None = None) -> Choice:
    """The implementation that runs a call.

    Args:
      of: The function, as errors name it.
      implementation: What the caller asks for; None to choose.
      obstacle: Why this call can run as ``"xla"`` alone, None if it is not so.

    Raises:
      ValueError: There is no such implementation of ``of``.
      NotImplementedError: There is, and it cannot run this call here.
    """
    others = OTHERS.get(of, ())
    if implementation is None:
        return Choice("xla", _why_xla(others))
    if not isinstance(implementation, str) or implementation not in ("xla", *others):
        names = " or ".join(repr(name) for name in (None, "xla", *others))
        raise ValueError(f"{of}: implementation must be {names}, got {implementation!r}")
    needed, shown_by = NEEDS.get(implementation, (None, None))
    if needed is not None and platform() != needed:
        obstacle = (
            f"needs a {needed.upper()}, got {platform()}; {shown_by!r} runs it anywhere, slowly"
        )
    if implementation != "xla" and obstacle is not None:
        raise NotImplementedError(f"{of}: implementation={implementation!r} {obstacle}")
    return Choice(cast(Implementation, implementation), "asked for")


def platform() -> str:
    """What programs are traced for: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    It is the platform of the mesh in use, which a program that is compiled for an absent device has
    to name (by ``jax.sharding.use_abstract_mesh``), else JAX's default.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def _why_xla(others):
    if not others:
        return "there is no other"
    here = [name for name in others if NEEDS.get(name, [None])[0] == platform()]
    if not here:
        return f"no other runs on {platform()}"
    return f"no other was measured to be faster; implementation={here[0]!r} tries one"
