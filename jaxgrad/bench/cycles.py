"""How long a program compiled for a TPU takes by the compiler's own count.

The text of the program gives ``estimated_cycles`` for what XLA compiles itself. Those of a loop's
body count as often as the loop runs, and of the branches of a conditional the longest counts. What
XLA does not compile, a Mosaic kernel, carries no such number; of that, the instruction words count.
"""

import re
from collections import Counter
from collections.abc import Iterator

CLOCK_GHZ = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}  # of a TPU

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_WORD = re.compile(r"^ *(?:0x[0-9a-f]+|0) *(\w*) *: *(>*) *(\{ .*)$", re.MULTILINE)
_EXIT = re.compile(r"totalorder %\w+, (\d+) /\* loop exit test")
_KERNEL = re.compile(r'^ *(?:ROOT )?%?([\w.-]+) = .*custom_call_target="tpu_custom_call"')


def estimate(text: str) -> tuple[int, Counter[str]]:
    """Cycles of what XLA compiled of a program, and how often it calls which Mosaic kernels."""
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


def _of(lines, name) -> tuple[int, Counter[str]]:
    total, kernels = 0, Counter()
    for line in lines[name]:
        for times, inner in _inside(lines, line):
            cycles, calls = max((_of(lines, one) for one in inner), key=lambda both: both[0])
            total += times * cycles
            kernels.update({kernel: times * n for kernel, n in calls.items()})
        total += sum(map(int, _CYCLES.findall(line)))
        if kernel := _KERNEL.match(line):
            kernels[kernel[1]] += 1
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


def bundles(text: str) -> int:
    """Instruction words that a kernel issues, by the text of its last pass: a cycle each, no waits.

    Those of a loop count as often as it runs, as if no step skipped what it may skip.
    """
    loops = [[0, 1]]  # words so far, and how often they run: of the kernel, and of loops in loops
    for word in _WORD.finditer(text):
        label, depth, rest = word.groups()
        while len(loops) > len(depth) + 1:
            _close(loops)
        if label == "LB":
            loops.append([0, 1])
        loops[-1][0] += 1
        if trips := _EXIT.search(rest):
            loops[-1][1] = int(trips[1])
    while len(loops) > 1:
        _close(loops)
    return loops[0][0]


def _close(loops):
    words, trips = loops.pop()
    loops[-1][0] += words * trips
