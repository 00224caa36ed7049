"""``python -m jaxgrad bench``: time, memory and accuracy of every kernel beside its peers."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax

import jaxgrad
from jaxgrad import machine
from jaxgrad.bench import memory, peers, race, report
from jaxgrad.bench.bars import is_held, verdicts
from jaxgrad.bench.errors import error_in_ulps
from jaxgrad.bench.race import Case
from jaxgrad.bench.subjects import HEAD, HEADS, OURS, Shape, subjects
from jaxgrad.terminal import InvalidInput, progress

DTYPES = ("float32", "bfloat16")
SECONDS, QUICK_SECONDS = 0.8, 0.5
"""How long the contenders of one row run."""

PATIENCE = 30.0
"""Seconds of a first call beyond which a peer is raced no more: it would outlast all others."""

Stage = tuple[str, Callable[[], None]]


def bench(
    *,
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    shapes: Sequence[Shape] | None = None,
    quick: bool = False,
    json: str | os.PathLike | None = None,
    plot: str | os.PathLike | None = None,
    compare: str | os.PathLike | None = None,
) -> int:
    """Race the kernels on JAX's default device, and print a table.

    Args:
      kernels: Names of functions; None for all.
      dtypes: float32, bfloat16, float16; None for the first two.
      shapes: Each for the kernels that take shapes of its rank; None for a choice of all ranks.
      quick: One shape a kernel, fewer rounds, bfloat16 where it has a bar, and fresh processes for
        jaxgrad and one peer.
      json: A file for the results.
      plot: A file for a picture of them.
      compare: The results of an earlier run; what has changed is printed.

    Returns:
      0; 130 if it was interrupted, with a table of what there is.

    Raises:
      InvalidInput: An argument cannot be used.
    """
    chosen = cases(kernels, dtypes, shapes, quick)
    old = report.read(compare) if compare is not None else None
    for path in (json, plot):
        report.check_writable(path)
    results: dict[str, Any] = {"rows": [], "memory": [], "peaks": {}, "given_up": {}}
    results["command"] = _command(kernels, dtypes, shapes, quick)
    results["noise"] = {"same_vs_same": [], "load_average": []}
    start, interrupted = time.perf_counter(), False
    todo = list(_stages(results, chosen, quick, whole=not (kernels or shapes)))
    with _without_compilation_cache(), progress(len(todo), "part") as show:
        try:
            for done, (name, stage) in enumerate(todo):
                show(done, name)
                stage()
        except KeyboardInterrupt:
            interrupted = True
    del results["peaks"], results["given_up"]
    results["interrupted"] = interrupted
    results["seconds"] = round(time.perf_counter() - start)
    report.show(results)
    if old is not None:
        report.show_changes(old, results)
    report.write(results, json, plot)
    return 130 if interrupted else 0


def cases(
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    shapes: Sequence[Shape] | None = None,
    quick: bool = False,
) -> list[Case]:
    """The rows of the table to be.

    Raises:
      InvalidInput: There are none, or none of one of the names.
    """
    known = subjects()
    names = list(dict.fromkeys(subject.kernel for subject in known))
    for name in kernels or ():
        if name not in names:
            raise InvalidInput(f"no kernel {name!r} to race: there are {', '.join(names)}")
    found = []
    for subject in known:
        if kernels and subject.kernel not in kernels:
            continue
        family = subject.family
        own = (family.quick,) if quick else family.shapes
        if shapes:
            own = [shape for shape in shapes if len(shape) == len(family.quick)]
        for dtype, shape, what in product(dtypes or DTYPES, own, subject.passes):
            case = Case(subject, dtype, tuple(shape), what)
            if shapes or _is_chosen(case, quick, bool(dtypes)):
                found.append(case)
    if not found:
        raise InvalidInput("nothing to race: these kernels take no shape of this rank")
    return found


def _is_chosen(case: Case, quick: bool, dtype_is_asked_for: bool) -> bool:
    """What has a bar; else a forward at one shape, and no 16-bit numbers in a quick run."""
    if is_held(case.subject.kernel, case.subject.variant, case.dtype, case.what):
        return True
    is_last = case.what == case.subject.passes[-1]
    if quick:
        return is_last and (dtype_is_asked_for or case.dtype == "float32")
    return is_last or case.shape == case.subject.family.quick


def measure(case: Case, seconds: float, given_up: Container[str] = ()) -> dict[str, Any]:
    """One row, as JSON has it, without the peers that were given up."""
    args = race.arguments(case)
    contenders: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, function in case.subject.contenders.items():
        if name in given_up:
            continue
        try:
            entrant = race.prepare(case, function, args)
            start = time.perf_counter()
            found = entrant.call()
            if (took := time.perf_counter() - start) > PATIENCE and name != OURS:
                raise TimeoutError(f"a call takes {took:.0f} s")
            error = error_in_ulps(case, args, found)
        except Exception as raised:  # a peer that cannot run here drops out of this race
            if name == OURS:
                raise
            contenders[name] = {"failed": f"{type(raised).__name__}: {str(raised)[:80]}"}
            continue
        calls[name] = entrant.call
        contenders[name] = {
            "compile_seconds": entrant.compile_seconds,
            "temp_bytes": entrant.temp_bytes,
            "error_ulps": error,
        }
    times = race.run(calls, seconds)
    for name, series in times.items():
        contenders[name]["seconds"] = race.middle(series)
    ratios = {name: race.ratio(times[name], times[OURS]) for name in times if name != OURS}
    return {
        "kernel": case.subject.kernel,
        "variant": case.subject.variant,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "what": case.what,
        "contenders": contenders,
        "ratios": {name: list(ratio) for name, ratio in ratios.items()},
    }


def _command(kernels, dtypes, shapes, quick) -> str:
    words = [*(kernels or ()), *(f"--dtype {dtype}" for dtype in dtypes or ())]
    words += [f"--shape {','.join(map(str, shape))}" for shape in shapes or ()]
    return " ".join(["python -m jaxgrad bench", *words, *["--quick"] * quick])


def _stages(results, chosen, quick, whole) -> Iterator[Stage]:
    """All there is to do, by name; each stage adds to ``results``.

    The fresh processes come first, while this one holds no device: some can be held but once.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    for case in _whose_peak(chosen, quick):
        for name in list(case.subject.contenders)[: 2 if quick else None]:
            yield f"peak of {case.name}", partial(_take_peak, results, case, name)
    yield "the machine", partial(_take_header, results, chosen)
    yield "the noise", partial(_take_noise, results, seconds)
    for case in chosen:
        yield case.name, partial(_take_row, results, case, seconds)
    for axis, subject, size, temps in memory.sweep(quick) if whole else ():
        yield f"memory of {size} {axis}", partial(_take_temps, results, axis, subject, size, temps)
    yield "the noise", partial(_take_noise, results, seconds)


def _take_peak(results, case, contender):
    peak = memory.peak(case, contender)
    results["peaks"].setdefault(case.name, {})[contender] = peak


def _take_row(results, case, seconds):
    given_up = results["given_up"].setdefault((case.subject.name, case.dtype), set())
    row = measure(case, seconds, given_up)
    given_up |= {name for name, entry in row["contenders"].items() if "failed" in entry}
    for name, peak in results["peaks"].pop(case.name, {}).items():
        row["contenders"].get(name, {})["peak_bytes"] = peak
    on_cpu = results["machine"]["platform"] == "cpu"
    row["bars"] = [verdict._asdict() for verdict in verdicts(row)] if on_cpu else []
    results["rows"].append(row)
    jax.clear_caches()


def _take_temps(results, axis, subject, size, temps):
    entry = {"axis": axis, "kernel": subject.kernel, "variant": subject.variant, "size": size}
    results["memory"].append(entry | {"temps": temps()})


def _take_noise(results, seconds):
    results["noise"]["same_vs_same"].append(list(race.noise(seconds)))
    results["noise"]["load_average"].append(machine.load_average())


def _whose_peak(chosen, quick):
    """Those at the shape of a quick run, and the largest head."""
    for case in chosen:
        family = case.subject.family
        if quick and family is not HEAD and family is not HEADS:
            continue
        largest = family.shapes[-1] if family is HEAD else family.quick
        if (case.dtype, case.what) == ("float32", "gradient") and case.shape in (
            family.quick,
            largest,
        ):
            yield case


def _take_header(results, chosen):
    device = jax.devices()[0]
    raced = {name for case in chosen for name in case.subject.contenders}
    installed = {name: machine.version(name) for name in ("jax", "jaxlib", *peers.PACKAGES)}
    results["versions"] = {"jaxgrad": jaxgrad.__version__, "python": platform.python_version()} | {
        name: version for name, version in installed.items() if version
    }
    results["machine"] = {
        "platform": device.platform,
        "device": device.device_kind,
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory_bytes(device),
        "system": f"{platform.system()} {platform.machine()}",
    }
    results["absent"] = {name: how for name, how in peers.absent().items() if name not in raced}


@contextlib.contextmanager
def _without_compilation_cache():
    """So that a compilation is one."""
    was = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
