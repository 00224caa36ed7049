"""Makes the pages of benchmarks, their pictures and the numbers of the README from JSON files.

    python -m jaxgrad bench --json notebooks/06_benchmarks.json && python notebooks/publish.py

Nothing is typed by hand, and a test compares what is stored with what this makes.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxgrad.bench import report
from jaxgrad.bench.subjects import OURS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- made by notebooks/publish.py -->\n).*?(?=<!-- end -->)", re.DOTALL)

FUSED, INTEGER = "linear_softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
PLAIN, ATTENTION = "x @ w, optax", "dot_product_attention"
CPU, GPU = "06_benchmarks", "06_benchmarks_gpu"


class Headline(NamedTuple):
    """A row of the README, at the largest shape that was raced."""

    told: str
    kernel: str
    variant: str
    dtype: str
    what: str
    peer: str


HEADLINES = {
    CPU: (
        Headline("fused head, `mean`", FUSED, "mean", "float32", "gradient", PLAIN),
        Headline("fused head, `mean`", FUSED, "mean", "bfloat16", "gradient", PLAIN),
        Headline("fused head, least memory", FUSED, "low memory", "float32", "gradient", PLAIN),
        Headline("causal attention", ATTENTION, "causal", "float32", "gradient", "jax.nn"),
        Headline("integer cross-entropy", INTEGER, "", "bfloat16", "gradient", "optax"),
        Headline(
            "soft-capped cross-entropy", INTEGER, "soft-capped", "float32", "forward", "optax"
        ),
        Headline("soft-max", "softmax", "", "bfloat16", "gradient", "jax.nn"),
        Headline("soft-max", "softmax", "", "float32", "gradient", "jax.nn"),
    ),
    GPU: (
        Headline("fused head", FUSED, "mean", "bfloat16", "gradient", PLAIN),
        Headline("attention", ATTENTION, "", "bfloat16", "gradient", "jax.nn"),
        Headline("attention", ATTENTION, "", "bfloat16", "gradient", "jax.nn, cuDNN"),
        Headline("integer cross-entropy", INTEGER, "", "bfloat16", "gradient", "optax"),
        Headline("soft-max", "softmax", "", "bfloat16", "gradient", "jax.nn"),
    ),
}


def results_of(name: str) -> report.Results:
    """The stored results of a machine."""
    return report.read(HERE / f"{name}.json")


def readme(cpu: report.Results, gpu: report.Results) -> str:
    """The block of the README."""
    return "\n".join(
        [
            "Value and gradients (of the soft-capped loss the value alone), each at the largest "
            "shape measured. In brackets the quartiles of the rounds; *temp* is memory beside "
            f"arguments and results. On {_machine(cpu)}; one program against itself was "
            f"{_noise(cpu)}. All rows, with those that are slower: "
            f"[benchmarks](notebooks/{CPU}.md).",
            "",
            *_headlines(cpu, CPU),
            "",
            f"![Temporary memory over vocabulary and sequence length](notebooks/{CPU}_memory.png)",
            "",
            f"On {_machine(gpu)}; one program against itself was {_noise(gpu)}; "
            f"[all rows](notebooks/{GPU}.md):",
            "",
            *_headlines(gpu, GPU),
            "",
            "To reproduce a row on your device, name its kernel, dtype and shape, for the first:",
            "",
            "```sh",
            _command(cpu, HEADLINES[CPU][0]),
            "```",
            "",
        ]
    )


def _headlines(results, name) -> Iterator[str]:
    head = ("", "shape", "dtype", "beside", "times as fast", "temp, MiB", "theirs")
    return _table(head, filter(None, (_headline(results, line) for line in HEADLINES[name])))


def page(results: report.Results, name: str) -> str:
    """The whole of a page."""
    return "\n".join(_page(results, name)) + "\n"


def _page(results, name) -> Iterator[str]:
    where = " on a GPU" if name == GPU else ""
    yield from (f"# Benchmarks{where}", "", f"Measured on {_machine(results)}, by", "")
    yield from ("```sh", results["command"], "```", "")
    if results.get("interrupted"):
        yield from ("The run was ended early: the last rows of this command are missing.", "")
    yield "Of each row the contenders take turns in one process, compiled beforehand."
    yield from ("", *(f"- {line}" for line in report.legend(results)), "")
    bars = [bar for row in results["rows"] for bar in row["bars"]]
    if bars:
        met = sum(bar["met"] for bar in bars)
        yield from (f"{met} of {len(bars)} bars are met; the others say NO below.", "")
    if results["memory"]:
        yield f"![Temporary memory over vocabulary and sequence length]({name}_memory.png)"
        yield ""
    yield f"![Times beside those of other libraries, at the largest shapes]({name}_times.png)"
    yield from ("", "## Accuracy", "")
    yield "The largest error of each contender over all rows below, in units in the last place."
    yield from ("", *_accuracy(results["rows"]))
    sections: dict[str, list[Any]] = {}
    for row in results["rows"]:
        sections.setdefault(report.name_of(row), []).append(row)
    for kernel, rows in sections.items():
        lines = [[*map(_escape, line)] for row in rows for line in report.cells_of(row)]
        yield from ("", f"## {kernel}", "", *_table(report.COLUMNS, lines))
    peaks = list(_peaks(results["rows"]))
    if peaks:
        yield from ("", "## Peak memory of a fresh process", "")
        yield "It makes the arguments, compiles, and calls once; in MiB, all that it holds."
        yield from ("", *_table(("kernel", "shape", OURS, "beside"), peaks))


def _machine(results):
    of, versions = results["machine"], results["versions"]
    where = f"{of['cores']} cores of {of['processor']}"
    where = where if of["platform"] == "cpu" else f"one {of['device']}"
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("jax", "optax", "torch") if name in versions
    )
    return f"{where} ({of['system']}), {libraries}"


def _noise(results):
    return " and ".join(
        f"{median:.2f} ({low:.2f}–{high:.2f})"
        for low, median, high in results["noise"]["same_vs_same"]
    )


def _headline(results, line: Headline) -> tuple[str, ...] | None:
    row = _largest(results, line)
    if row is None or line.peer not in row["ratios"]:
        return None
    low, median, high = row["ratios"][line.peer]
    temps = (row["contenders"][name]["temp_bytes"] for name in (OURS, line.peer))
    return (
        line.told,
        report.shape_of(row),
        line.dtype,
        f"`{line.peer}`",
        f"**{median:.2f}** ({low:.2f}–{high:.2f})",
        *map(report.mebibytes, temps),
    )


def _largest(results, line):
    key = line.kernel, line.variant, line.dtype, line.what
    fields = ("kernel", "variant", "dtype", "what")
    rows = [row for row in results["rows"] if tuple(row[field] for field in fields) == key]
    return max(rows, key=lambda row: math.prod(row["shape"]), default=None)


def _command(results, line):
    row = _largest(results, line)
    shape = ",".join(map(str, row["shape"]))
    return f"python -m jaxgrad bench {line.kernel} --dtype {line.dtype} --shape {shape}"


def _accuracy(rows) -> Iterator[str]:
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        errors = worst.setdefault((report.name_of(row), row["dtype"]), {})
        for name, entry in row["contenders"].items():
            if (error := entry.get("error_ulps")) is not None:
                errors[name] = max(errors.get(name, 0.0), error)
    lines = (
        (*key, report.ulps(errors.pop(OURS, None)), _each(errors, report.ulps))
        for key, errors in worst.items()
    )
    yield from _table(("kernel", "dtype", OURS, "beside"), lines)


def _peaks(rows) -> Iterator[tuple[str, ...]]:
    for row in rows:
        entries = row["contenders"].items()
        peaks = {name: entry["peak_bytes"] for name, entry in entries if entry.get("peak_bytes")}
        if OURS in peaks:
            ours = report.mebibytes(peaks.pop(OURS))
            shape = report.shape_of(row)
            yield report.name_of(row), shape, ours, _each(peaks, report.mebibytes)


def _each(numbers, told):
    return ", ".join(f"{name} {told(number)}" for name, number in numbers.items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = tuple(head)
    for line in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(line)} |"


def _escape(cell):
    return cell.replace("<", "&lt;")


def main() -> None:
    """Writes all of it."""
    text = README.read_text(encoding="utf-8")
    block = readme(*map(results_of, (CPU, GPU)))
    README.write_text(BLOCK.sub(lambda _: block, text), encoding="utf-8")
    for name in (CPU, GPU):
        results = results_of(name)
        (HERE / f"{name}.md").write_text(page(results, name), encoding="utf-8")
        _draw(results, name)


def _draw(results, name):
    from matplotlib.figure import Figure

    from jaxgrad.bench import figures

    if results["memory"]:
        figure = Figure(figsize=(10, figures.MEMORY), layout="constrained")
        figures.memory(figure, results)
        figure.savefig(HERE / f"{name}_memory.png", dpi=120)
    largest = {}
    for row in results["rows"]:
        if row["what"] == "gradient" and row["ratios"]:
            key = report.name_of(row), row["dtype"]
            largest[key] = max(row, largest.get(key, row), key=lambda row: math.prod(row["shape"]))
    shown = list(largest.values())
    figure = Figure(figsize=(10, figures.height(shown)), layout="constrained")
    figures.ratios(figure, shown)
    figure.savefig(HERE / f"{name}_times.png", dpi=120)


if __name__ == "__main__":
    main()
