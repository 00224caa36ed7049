"""The accuracy table on the screen: in colour where rich is installed, else in plain text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxgrad.bench.measure import Row
from jaxgrad.terminal import writer

COLUMNS = ("quantity", "dtype", "regime", "jaxgrad", "peer", "bar", "met")


class Result(NamedTuple):
    """A row, the error of jaxgrad and that of its peer, if there is one."""

    row: Row
    error: float
    peer: float | None
    raised: str | None = None

    @property
    def met(self) -> bool:
        """Whether jaxgrad meets the bar."""
        return self.error <= self.row.bar


def show(results: Sequence[Result]) -> None:
    """Print the table kernel by kernel, then what is missed, and how many bars are met."""
    write = writer()
    sections = {kernel: list(_lines(results, kernel)) for kernel in _kernels(results)}
    cells = [COLUMNS, *(line for lines in sections.values() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def text(line):
        return "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip()

    write(f"\n{text(COLUMNS)}", "bold")
    for kernel, lines in sections.items():
        write(f"\n{kernel}", "bold")
        for line in lines:
            write(text(line), "red" if line[-1] == "NO" else "")
    missed = [result for result in results if not result.met]
    write("", "")
    for row, error, _, raised in missed:
        how = f"raised {raised}" if raised else f"{_number(error, row.unit)}, bar {_bar(row)}"
        write(f"missed: {row.name}: {how}", "red")
    peers = [result for result in results if result.peer is not None]
    write(f"{len(results) - len(missed)} of {len(results)} bars are met.", "bold")
    theirs = sum(result.peer <= result.row.bar for result in peers if result.peer is not None)
    write(f"jax.nn, jax.numpy and optax would meet {theirs} of the {len(peers)} of theirs.", "")


def _kernels(results):
    return dict.fromkeys(result.row.kernel for result in results)


def _lines(results, kernel) -> Iterator[tuple[str, ...]]:
    """The cells of one kernel; lines that differ in their dtype alone are one."""
    lines: dict[tuple[str, str], dict[tuple[str, ...], list[str]]] = {}
    for row, error, peer, *_ in (result for result in results if result.row.kernel == kernel):
        regime = lines.setdefault((row.quantity, row.regime), {})
        theirs = "" if peer is None else _number(peer, row.unit)
        met = "yes" if error <= row.bar else "NO"
        regime.setdefault((_number(error, row.unit), theirs, _bar(row), met), []).append(row.dtype)
    for (quantity, regime), of_numbers in lines.items():
        for numbers, dtypes in of_numbers.items():
            yield quantity, "all" if len(dtypes) == 4 else " ".join(dtypes), regime, *numbers


def _number(error, unit):
    if unit == "wrong":
        return f"{error:.0f} wrong"
    return f"{error:.2g}" if unit.startswith("ulp") else f"{error:.2e}"


def _bar(row):
    return f"{row.bar:.2g} {row.unit}"
