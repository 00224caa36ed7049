"""Times of some functions on the same arguments, taken in turn: A B A B.

A machine speeds up and slows down by the second, and both of a pair feel it. So what is kept is
their ratio, round by round; its median over the rounds, and how far its quartiles lie apart.

What a program leaves behind, pages of memory to be given back, is cleared away when its results are
long there, at the expense of whatever runs next: after 256 MiB, a call of 36 ms took 50. So there
is a pause after each.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad.bench.subjects import NOT_JITTED, Shape, Subject
from jaxgrad.bench.torch_peers import Torch

SHORTEST = 1e-3
"""Seconds below which a clock is not trusted: quicker calls are timed many at once."""
PAUSE, LONGEST_PAUSE = 0.4, 0.25
"""After a call, as a part of its time, and the most in seconds."""
SAME = (512, 8192)
"""The logits of the program that is raced against itself."""


class Case(NamedTuple):
    """What one line of the table is about."""

    subject: Subject
    dtype: str
    shape: Shape
    what: str

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.subject.name} {self.dtype} {list(self.shape)} {self.what}"


class Entrant(NamedTuple):
    """A contender made ready for a case: ``call`` ends when its results are there."""

    call: Callable[[], Any]
    compile_seconds: float | None = None
    temp_bytes: int | None = None


def arguments(case: Case) -> tuple[jax.Array, ...]:
    """What the program of every contender of a case is called with: numbers drawn at random."""
    return jax.jit(functools.partial(_arguments, case))()


def structs(case: Case) -> tuple[Any, ...]:
    """Their shapes and dtypes alone."""
    return jax.eval_shape(functools.partial(_arguments, case))


def _arguments(case):
    args = case.subject.draw(case.shape, case.dtype)
    if case.what == "forward" or case.subject.is_loss:
        return args
    y = jax.eval_shape(case.subject.ours, *args)
    return *args, jax.random.normal(jax.random.key(1, impl="rbg"), y.shape).astype(y.dtype)


def prepare(case: Case, function: Any, args: Sequence[jax.Array]) -> Entrant:
    """A contender compiled, where it is to be compiled."""
    subject = case.subject
    if isinstance(function, Torch):
        return Entrant(function.prepare(args, subject.differentiated, case.what, subject.is_loss))
    program = subject.program(function, case.what)
    if subject.variant == NOT_JITTED:
        return Entrant(lambda: jax.block_until_ready(program(*args)))
    compiled, seconds = compile(program, args)
    memory = compiled.memory_analysis()
    temp = None if memory is None else memory.temp_size_in_bytes
    return Entrant(lambda: jax.block_until_ready(compiled(*args)), seconds, temp)


def compile(program: Callable, args: Sequence[Any]) -> tuple[Any, float]:
    """A program compiled for arguments, or for their shapes; and the seconds that took."""
    start = time.perf_counter()
    compiled = jax.jit(program).lower(*args).compile()
    return compiled, time.perf_counter() - start


def run(
    calls: Mapping[str, Callable[[], Any]], seconds: float, least: int = 3, most: int = 25
) -> dict[str, np.ndarray]:
    """The time of a call in each round, for rounds that fill some seconds."""

    def times(repeats: int) -> list[float]:
        found = []
        for call in calls.values():
            found.append(time_of(call, repeats))
            time.sleep(min(PAUSE * repeats * found[-1], LONGEST_PAUSE))
        return found

    first = times(1)
    repeats = min(1000, math.ceil(SHORTEST / max(min(first), 1e-9)))
    rounds = [first if repeats == 1 else times(repeats)]
    wanted = min(most, max(least, seconds / ((1 + PAUSE) * repeats * sum(rounds[0]))))
    while len(rounds) < wanted:
        rounds.append(times(repeats))
    return dict(zip(calls, np.array(rounds).T, strict=True))


def ratio(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of how many times longer they took."""
    low, middle, high = np.percentile(theirs / ours, (25, 50, 75))
    return float(low), float(middle), float(high)


def middle(times: np.ndarray) -> float:
    """Seconds of a typical round."""
    return float(np.median(times))


def noise(seconds: float = 2.0) -> tuple[float, float, float]:
    """The ratio of a program's times to its own: what it is off 1 by is the machine's doing."""
    x = jax.random.normal(jax.random.key(0, impl="rbg"), SAME)
    compiled, _ = compile(jax.nn.softmax, (x,))

    def call():
        jax.block_until_ready(compiled(x))

    times = run({"once": call, "again": call}, seconds, most=200)
    return ratio(times["again"], times["once"])


def time_of(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
