"""Pictures of a race; lines are told apart by their dashes and marks, so grey paper will do."""

from collections.abc import Sequence
from typing import Any

from jaxgrad.bench import report
from jaxgrad.bench.subjects import OURS

AXES = {
    "classes": ("vocabulary (classes)", "Loss and gradients: 2048 tokens, 256 features"),
    "length": ("sequence length (tokens)", "Attention and gradients: 8 heads, 64 features"),
}
OUR_LINES = ({"marker": "o"}, {"marker": "s", "linestyle": "--"})
THEIR_LINES = (
    {"marker": "^", "linestyle": ":"},
    {"marker": "D", "linestyle": "-."},
    {"marker": "v", "linestyle": (0, (1, 3))},
)
DTYPES = {"float32": "black", "bfloat16": "white", "float16": "0.6"}
LINE, FRAME, MEMORY = 0.2, 1.3, 3.8
"""Heights in inches: of a line of ratios, of what is around them, of the memory."""


def draw(results: dict[str, Any]) -> Any:
    """One figure: memory over vocabulary and length, if it was taken, and the ratios of times.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows, swept = [row for row in results["rows"] if row["ratios"]], bool(results["memory"])
    heights = [MEMORY] * swept + [height(rows)]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if swept:
        memory(parts[0], results)
    ratios(parts[-1], rows)
    return figure


def memory(figure: Any, results: dict[str, Any]) -> None:
    """Temporary memory over the size of an axis, a line each contender."""
    for axes, axis in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
        series = _series(results, axis)
        ours = [name for name in series if name.startswith(OURS)]
        theirs = [name for name in series if name not in ours]
        for names, lines, color in (ours, OUR_LINES, "black"), (theirs, THEIR_LINES, "0.5"):
            for name, line in zip(names, lines, strict=False):
                axes.plot(*zip(*series[name], strict=True), label=name, color=color, **line)
        label, title = AXES[axis]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({size for points in series.values() for size, _ in points})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        axes.set(xlabel=label, ylabel="temporary memory (MiB)")
        axes.set_title(title, fontsize="medium")
        if series:
            axes.legend(frameon=False, fontsize="small")
        _bare(axes)


def ratios(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Their time over ours: medians and quartiles, a line for each kernel, shape and peer."""
    axes, labels, told = figure.subplots(), _labels(rows), set()
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    for row in rows:
        for peer, (low, median, high) in row["ratios"].items():
            dtype = row["dtype"]
            shift = 0.34 * (dtypes.index(dtype) - (len(dtypes) - 1) / 2)
            axes.errorbar(
                median,
                labels[_label(row, peer)] + shift,
                xerr=[[max(median - low, 0)], [max(high - median, 0)]],
                label="" if dtype in told else dtype,
                fmt="o",
                color="black",
                markerfacecolor=DTYPES[dtype],
                markersize=4,
                elinewidth=1,
            )
            told.add(dtype)
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(list(labels.values()), list(labels), fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set(xlabel="their time / jaxgrad's (right of 1, jaxgrad is faster; lines: quartiles)")
    figure.legend(loc="outside upper right", ncols=len(dtypes), frameon=False, fontsize="small")
    _bare(axes)


def height(rows: Sequence[dict[str, Any]]) -> float:
    """What ``ratios`` takes, in inches."""
    return FRAME + LINE * len(_labels(rows))


def _series(results, axis) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in results["memory"]:
        for name, temp in entry["temps"].items() if entry["axis"] == axis else ():
            variant = f", {entry['variant']}" if name == OURS and entry["variant"] else ""
            series.setdefault(name + variant, []).append((entry["size"], temp / 2**20))
    return {name: sorted(points) for name, points in series.items()}


def _labels(rows) -> dict[str, int]:
    labels = dict.fromkeys(_label(row, peer) for row in rows for peer in row["ratios"])
    return {label: i for i, label in enumerate(labels)}


def _label(row, peer):
    name = report.name_of(row).replace("softmax_cross_entropy", "softmax_CE")
    return f"{name} {report.shape_of(row)} {row['what']}, {peer}"


def _bare(axes):
    axes.spines[["top", "right"]].set_visible(False)
