"""``python -m jaxgrad check``: how exact every rule is on this device, beside jax.nn and optax."""

import concurrent.futures
import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import jax

import jaxgrad
from jaxgrad.bench import edges, regimes
from jaxgrad.bench.measure import Row, ours, peers
from jaxgrad.bench.table import Result, show
from jaxgrad.bench.truth import TRUTH, numbers

DTYPES = ("float32", "float64", "bfloat16", "float16")


def check(
    *,
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    json: str | os.PathLike | None = None,
) -> int:
    """Measure every rule on JAX's default device, and print its errors beside their bars.

    Args:
      kernels: Names of functions; None for all.
      dtypes: Some of ``DTYPES``; None for all. float64 takes numbers of more digits, those of
        mpmath or a wide ``numpy.longdouble``, and is left out where there are none.
      json: A file to write the rows to as well. An infinite error is null there, and so is all of
        a peer that does not exist.

    Returns:
      0 if every bar is met, 1 if one is missed, 2 if an argument cannot be used.
    """
    judges = {dtype: numbers(dtype) for dtype in dtypes or DTYPES if dtype in DTYPES}
    try:
        _check_names("kernel", kernels, TRUTH)
        _check_names("dtype", dtypes, DTYPES)
        chosen = rows([dtype for dtype in judges if judges[dtype]], kernels)
        if not chosen:
            raise ValueError("nothing to check: these kernels have no bars in these dtypes")
        if json is not None:
            Path(json).touch()
    except (ValueError, OSError) as error:
        return _refuse(error)
    device = jax.devices()[0]
    print(f"jaxgrad {jaxgrad.__version__}, jax {jax.__version__} on {device.device_kind}")
    for dtype, judge in judges.items():
        told = f"errors against {judge.name}" if judge else "left out: it takes mpmath"
        print(f"  {dtype}: {told}")
    results = measure(chosen)
    show(results)
    try:
        if json is not None:
            Path(json).write_text(_as_json(results, device), encoding="utf-8")
    except OSError as error:
        return _refuse(error)
    return 0 if all(result.met for result in results) else 1


def rows(dtypes: Iterable[str] = DTYPES, kernels: Sequence[str] | None = None) -> list[Row]:
    """The rows of some dtypes and kernels, kernel by kernel, dtype by dtype."""
    found = [row for dtype in dtypes for part in (regimes, edges) for row in part.rows(dtype)]
    order = list(TRUTH)
    return sorted(
        (row for row in found if kernels is None or row.kernel in kernels),
        key=lambda row: order.index(row.kernel),
    )


def measure(rows: Sequence[Row]) -> list[Result]:
    """The results of rows, in their order; kernels are compiled side by side."""
    groups = [list(g) for _, g in itertools.groupby(rows, lambda row: (row.kernel, row.dtype))]
    results = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in pool.map(_measure_group, groups):
            results.extend(group)
            if sys.stderr.isatty():
                print(f"\r{len(results)}/{len(rows)}", end="\r", file=sys.stderr, flush=True)
    return results


def _measure_group(group):
    return [_measure(row) for row in group]


def _measure(row):
    try:
        theirs = peers(row.point, row.dtype)
    except Exception:  # what this device cannot do is the peer's affair
        theirs = None
    peer = None if theirs is None else row.error(theirs)
    try:
        return Result(row, row.error(ours(row.point, row.dtype)), peer)
    except Exception as error:  # a rule that raises misses its bar
        return Result(row, math.inf, peer, f"{type(error).__name__}: {error}")


def _check_names(kind, names, known):
    for name in names or ():
        if name not in known:
            raise ValueError(f"no {kind} {name!r} to check: there are {', '.join(known)}")


def _refuse(error):
    print(f"jaxgrad: error: {error}", file=sys.stderr)
    return 2


def _as_json(results: Sequence[Result], device: Any) -> str:
    def number(x):
        return x if x is not None and math.isfinite(x) else None

    def record(result):
        row, peer = result.row, result.peer
        return {
            "kernel": row.kernel,
            "quantity": row.quantity,
            "dtype": row.dtype,
            "regime": row.regime,
            "error": number(result.error),
            "peer_error": number(peer),
            "bar": row.bar,
            "unit": row.unit,
            "met": result.met,
            "peer_met": None if peer is None else peer <= row.bar,
        }

    versions = {"jaxgrad": jaxgrad.__version__, "jax": jax.__version__}
    report = versions | {"device": device.device_kind, "rows": list(map(record, results))}
    return dumps(report, indent=1, allow_nan=False)
