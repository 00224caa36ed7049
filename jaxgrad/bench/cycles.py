"""How long a program compiled for a TPU takes by the compiler's own estimate.

The text of the program gives ``estimated_cycles`` for what XLA compiles itself. Those of a loop's
body count as often as the loop runs, and of the branches of a conditional the longest counts. What
XLA does not compile, a Mosaic kernel, carries no such number: it is missing from the sum.
"""

import re
from collections.abc import Iterator

CLOCK_GHZ = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}  # of a TPU

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_KERNEL = 'custom_call_target="tpu_custom_call"'


def estimate(text: str) -> tuple[int, int]:
    """Cycles of what XLA compiled of a program, and how many calls of kernels are not in them."""
    lines, entry = _computations(text)
    return _of(lines, entry)


def _computations(text) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _of(lines, name) -> tuple[int, int]:
    total = kernels = 0
    for line in lines[name]:
        for times, inner in _inside(lines, line):
            cycles, calls = max((_of(lines, one) for one in inner), default=(0, 0))
            total, kernels = total + times * cycles, kernels + times * calls
        total += sum(map(int, _CYCLES.findall(line)))
        kernels += _KERNEL in line
    return total, kernels


def _inside(lines, line) -> Iterator[tuple[int, list[str]]]:
    """What a line runs, as (how often, the computations of which one runs)."""
    called = dict(_CALLED.findall(line))
    if " while(" in line:
        known = _TRIPS.search(line)
        limits = _LIMIT.findall("\n".join(lines[called["condition"]]))
        yield int(known[1]) if known else max(map(int, limits), default=1), [called["body"]]
    elif " conditional(" in line:
        branches = _BRANCHES.search(line)
        names = re.findall(r"[\w.-]+", branches[1]) if branches else list(called.values())[-2:]
        yield 1, names
    elif " call(" in line:
        yield 1, [called["to_apply"]]
