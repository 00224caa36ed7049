"""What a user can set in the training run."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
    """The defaults take about a minute on two cores.

    ``context`` is what is asked for: a short text gives a shorter one.
    """

    steps: int = 800
    batch: int = 8
    context: int = 32
    dim: int = 128
    seed: int = 0
    dtype: str = "float32"
    text: Path | None = None
    out: Path = Path("jaxgrad-train")
    mesh: str | None = None
    coordinator: str | None = None
    processes: int = 1
    process: int = 0
