"""What a program holds in memory: by the compiler's account, and by that of the system.

``memory_analysis`` is exact for what XLA plans and knows no scratch of its libraries; the peak of a
process of its own is what a user pays. The process calls one program once, on fresh arguments.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxgrad.bench import race, subjects
from jaxgrad.bench.measure import FUSED
from jaxgrad.bench.race import Case
from jaxgrad.bench.subjects import LOW_MEMORY, OURS, Shape, Subject
from jaxgrad.machine import peak_resident_bytes

VOCABULARIES = tuple(2**k for k in range(13, 19))
LENGTHS = tuple(2**k for k in range(9, 14))
AT_EACH_VOCABULARY, AT_EACH_LENGTH = (2048, 256), (8, 64)
TIMEOUT = 300


def peak(case: Case, contender: str) -> int | None:
    """The peak of a fresh process: of the device's memory, or on a CPU of the resident set."""
    wanted = [case.subject.name, case.dtype, case.what, contender, *map(str, case.shape)]
    command = [sys.executable, "-m", "jaxgrad.bench.memory", json.dumps(wanted)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(ended.stdout) if ended.returncode == 0 else None


def sweep(quick: bool) -> Iterator[tuple[str, Subject, int, Callable[[], dict[str, int]]]]:
    """What to compile: the axis, the subject, its size there, and how to get temp bytes of each."""
    every = 2 if quick else 1
    for subject in subjects.subjects():
        if subject.kernel == FUSED:
            for v in VOCABULARIES[::-every]:
                yield "classes", subject, v, _temps(subject, (*AT_EACH_VOCABULARY, v))
        if subject.name == "dot_product_attention":
            for t in LENGTHS[::-every]:
                yield "length", subject, t, _temps(subject, (1, t, *AT_EACH_LENGTH))


def _temps(subject: Subject, shape: Shape):
    wanted = subject.contenders
    if subject.variant == LOW_MEMORY:  # its peers are those of the other schedule
        wanted = {OURS: subject.ours}

    def temps() -> dict[str, int]:
        found = {name: _temp(subject, f, shape) for name, f in wanted.items() if name != "torch"}
        return {name: temp for name, temp in found.items() if temp is not None}

    return temps


def _temp(subject, function, shape):
    args = race.structs(Case(subject, "float32", shape, "gradient"))
    try:
        compiled, _ = race.compile(subject.program(function, "gradient"), args)
    except Exception:  # a peer that cannot be compiled has no temp
        return None
    memory = compiled.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def _main(wanted: str) -> None:
    name, dtype, what, contender, *shape = json.loads(wanted)
    subject = next(s for s in subjects.subjects() if s.name == name)
    case = Case(subject, dtype, tuple(map(int, shape)), what)
    race.prepare(case, subject.contenders[contender], race.arguments(case)).call()
    stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    print(json.dumps(stats.get("peak_bytes_in_use", peak_resident_bytes())))


if __name__ == "__main__":
    _main(sys.argv[1])
