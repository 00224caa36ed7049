"""What a race leaves behind: a table on the screen, a JSON file, and what has changed since."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgrad.bench.subjects import OURS
from jaxgrad.terminal import InvalidInput, writer

COLUMNS = (
    *("dtype", "shape", "pass", "jaxgrad", "beside", "ratio", "quartiles"),
    *("temp", "theirs", "ulps", "theirs", "bar", "met"),
)
DIGITS = 4
Results = dict[str, Any]


def check_writable(path: str | os.PathLike | None) -> None:
    """Touches a file that results will be written to.

    Raises:
      InvalidInput: It cannot be written.
    """
    try:
        if path is not None:
            Path(path).touch()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error


def read(path: str | os.PathLike) -> Results:
    """The results of an earlier run.

    Raises:
      InvalidInput: There are none in this file.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError:
        results = None
    if not isinstance(results, dict) or not {"rows", "machine"} <= results.keys():
        raise InvalidInput(f"{path}: holds no results of a race")
    return results


def write(results: Results, path: str | os.PathLike | None, plot: str | os.PathLike | None) -> None:
    """The results, a row a line; and their picture."""
    if path is not None:
        Path(path).write_text(_as_json(results), encoding="utf-8")
    if plot is not None:
        try:
            from jaxgrad.bench import figures

            figures.draw(results).savefig(plot, dpi=150)
        except ImportError:
            print("plot: not drawn: needs matplotlib (pip install matplotlib)")


def show(results: Results) -> None:
    """Prints the table, kernel by kernel; then the noise, who is absent, and which bars are met."""
    write = writer()
    sections: dict[str, list[tuple[str, ...]]] = {}
    for row in results["rows"]:
        sections.setdefault(name_of(row), []).extend(cells_of(row))
    cells = [COLUMNS, *(line for lines in sections.values() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def text(line):
        return "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip()

    if results["rows"]:
        write(f"\n{text(COLUMNS)}", "bold")
    for name, lines in sections.items():
        write(f"\n{name}", "bold")
        for line in lines:
            write(text(line), "red" if "NO" in line[-1] else "")
    for line in _peaks(results):
        write(line, "")
    write("", "")
    for line in legend(results):
        write(line, "")
    bars = [bar for row in results["rows"] for bar in row["bars"]]
    write(f"{sum(bar['met'] for bar in bars)} of {len(bars)} bars are met.", "bold")


def legend(results: Results) -> Iterator[str]:
    """How to read the table, and how far to trust it."""
    yield (
        "ratio: their time over jaxgrad's, the median of rounds run in turn, and its quartiles; "
        "temp: MiB beside arguments and results, as compiled; ulps: largest error, against float64"
    )
    noise = results["noise"]
    for (low, median, high), load in zip(
        noise["same_vs_same"], noise["load_average"], strict=False
    ):
        told = "" if load is None else f", load average {load:.1f}"
        yield f"noise: one program against itself {median:.2f} ({low:.2f} to {high:.2f}){told}"
    for name, command in results.get("absent", {}).items():
        yield f"absent: {name}: {command}"


def show_changes(old: Results, new: Results) -> None:
    """Prints the rows whose ratio left its quartiles, or that take another amount of memory."""
    if old["machine"] != new.get("machine"):
        print("compared with another machine: ratios may differ by that alone")
    before = {key_of(row): row for row in old["rows"]}
    pairs = [(before[key_of(row)], row) for row in new["rows"] if key_of(row) in before]
    changes = [line for pair in pairs for line in _changes(*pair)]
    print(f"{len(pairs)} rows compared, {len(changes)} changes")
    for line in changes:
        print(line)


def key_of(row: Results) -> tuple[Any, ...]:
    """What tells a row from the others."""
    return name_of(row), row["dtype"], tuple(row["shape"]), row["what"]


def name_of(row: Results) -> str:
    """The kernel, and in what use."""
    return f"{row['kernel']} ({row['variant']})" if row["variant"] else row["kernel"]


def shape_of(row: Results) -> str:
    """``512×32768``."""
    return "×".join(map(str, row["shape"]))


def seconds(value: float) -> str:
    """In a unit that suits it."""
    unit, factor = next(
        (pair for pair in (("s", 1.0), ("ms", 1e3)) if value * pair[1] >= 1), ("µs", 1e6)
    )
    return f"{value * factor:.3g} {unit}"


def mebibytes(value: float | None) -> str:
    """In MiB; empty if it is not known."""
    return "" if value is None else f"{value / 2**20:.1f}"


def cells_of(row: Results) -> Iterator[tuple[str, ...]]:
    """The cells of a row, a line for each peer."""
    ours = row["contenders"][OURS]
    head = row["dtype"], shape_of(row), row["what"], seconds(ours["seconds"])
    first = True
    for name, entry in row["contenders"].items():
        if name == OURS:
            continue
        if "failed" in entry:
            yield *head, name, entry["failed"][:40], *[""] * 7
            continue
        low, median, high = row["ratios"][name]
        bars = [bar for bar in row["bars"] if bar["peer"] == name or (first and not bar["peer"])]
        first = False
        yield (
            *head,
            name,
            f"{median:.2f}",
            f"{low:.2f} {high:.2f}",
            mebibytes(ours["temp_bytes"]),
            mebibytes(entry["temp_bytes"]),
            ulps(ours["error_ulps"]),
            ulps(entry["error_ulps"]),
            ", ".join(bar["asks"] for bar in bars),
            ", ".join("yes" if bar["met"] else "NO" for bar in bars),
        )


def _peaks(results) -> Iterator[str]:
    rows = [row for row in results["rows"] if "peak_bytes" in row["contenders"][OURS]]
    if rows:
        yield "\nPeak memory of a fresh process that makes the arguments and calls once, MiB"
    for row in rows:
        peaks = {name: entry.get("peak_bytes") for name, entry in row["contenders"].items()}
        told = ", ".join(f"{name} {mebibytes(peak) or '-'}" for name, peak in peaks.items())
        yield f"  {name_of(row)} {row['dtype']} {shape_of(row)} {row['what']}: {told}"


def ulps(error: float | None) -> str:
    """With two digits; empty if it is not known."""
    return "" if error is None else f"{error:.2g}" if error < 1e4 else f"{error:.0e}"


def _changes(old, new) -> Iterator[str]:
    what = f"{name_of(new)} {new['dtype']} {shape_of(new)} {new['what']}"
    for peer, (low, median, high) in new["ratios"].items():
        if peer not in old["ratios"]:
            continue
        old_low, old_median, old_high = old["ratios"][peer]
        if low > old_high or high < old_low:
            yield f"{what}: {old_median:.2f} → {median:.2f} × as fast as {peer}"
    was, now = (row["contenders"][OURS]["temp_bytes"] for row in (old, new))
    if was is not None and now is not None and abs(now - was) > 0.01 * was:
        yield f"{what}: temp {mebibytes(was)} → {mebibytes(now)} MiB"


def _as_json(results) -> str:
    lists = {name: value for name, value in results.items() if name in ("rows", "memory")}
    parts = [f'"{name}": {_dumps(v)}' for name, v in results.items() if name not in lists]
    for name, entries in lists.items():
        parts.append(f'"{name}": [\n' + ",\n".join(map(_dumps, entries)) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _dumps(value) -> str:
    return json.dumps(_rounded(value), allow_nan=False)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
