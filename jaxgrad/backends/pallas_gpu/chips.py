"""The chips that the sizes of blocks are for."""

from jaxgrad import backends

HOPPER = ("H100", "H200", "H800")  # one processor, which they differ in the number of


def is_hopper() -> bool:
    """Whether programs are traced for an H100, where sizes were timed, or for its like."""
    return any(name in backends.device() for name in HOPPER)
