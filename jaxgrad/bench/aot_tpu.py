"""The compiler for TPU, of the package libtpu, and what it tells of a program."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from jaxgrad import machine
from jaxgrad.bench import cycles
from jaxgrad.terminal import InvalidInput

IMPLEMENTATION = "pallas_tpu"
TARGETS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
COLUMNS = ("XLA, ms", "Mosaic, ms")
CAVEAT = """\
ms: cycles at the clock of the chip, without waits for memory. XLA: the compiler's estimate of what
it compiles itself, loops as often as they run, of branches the longest: tiles of attention that
causality hides count. Mosaic: the words that the Pallas kernels issue, without waits for products,
as if each step of a grid did all that any does: hidden tiles count here too. Whether one core of a
v4 or v5p is meant, or both, it does not tell."""
DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


def device(target: str) -> Any:
    """A device of that kind, as the compiler knows it."""
    from jax.experimental import topologies

    if machine.version("libtpu") is None:
        raise InvalidInput(
            f"aot: --target {target} needs the compiler of pip install 'jaxgrad[aot-tpu]'"
        )
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for a TPU
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={_dump().name} {DUMP}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no chip from another program
    }
    name = TARGETS[target]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


def options(dump: Path) -> dict[str, Any]:
    """None for a program: libtpu is asked once, as it is loaded."""
    del dump
    return {}


def told(target: str, program: str, dump: Path) -> tuple[str, ...]:
    """Milliseconds of XLA and of Mosaic, where the clock of ``target`` is known."""
    del dump
    count, calls = cycles.estimate(program)
    words = [times * _words(kernel) for kernel, times in calls.items()]
    clock = cycles.CLOCK_GHZ.get(target)
    ms = lambda count: "" if clock is None else _rounded(count / clock / 1e6)
    return ms(count), ms(sum(words)) if all(words) else "not told"


def _rounded(ms):
    return f"{ms:.1f}" if ms == 0 or ms >= 1 else f"{ms:.2g}"


@functools.cache
def _dump() -> tempfile.TemporaryDirectory:
    """Where the compiler tells what it makes."""
    return tempfile.TemporaryDirectory()


def _words(kernel):
    paths = sorted(Path(_dump().name).glob(f"*-{kernel}-*bundles.txt"))  # by their time
    texts = [path.read_text(encoding="utf-8") for path in paths if "analysis" not in path.name]
    return cycles.bundles(texts[-1]) if texts else 0
