"""Pictures of a race; lines are told apart by their dashes and marks, so grey paper will do."""

from collections.abc import Sequence
from typing import Any

from jaxgrad.bench import report
from jaxgrad.bench.subjects import OURS

LINES = (
    {"color": "black", "marker": "o"},
    {"color": "0.45", "marker": "s", "linestyle": "--"},
    {"color": "0.45", "marker": "^", "linestyle": ":"},
    {"color": "0.7", "marker": "D", "linestyle": "-."},
    {"color": "black", "marker": "v", "linestyle": (0, (1, 3))},
)
SIZES = {"classes": "vocabulary (classes)", "length": "sequence length (tokens)"}


def draw(results: dict[str, Any]) -> Any:
    """One figure: memory over vocabulary, over length, and the ratios of times.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["ratios"]]
    swept = [axis for axis in SIZES if any(e["axis"] == axis for e in results["memory"])]
    height = 2.0 + 0.19 * lines(rows) + (3.6 if swept else 0)
    figure = Figure(figsize=(10, height), layout="constrained")
    heights = [3.6, height] if swept else [height]
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, axis in enumerate(swept):
        memory(figure.add_subplot(grid[0, column]), results, axis)
    ratios(figure.add_subplot(grid[-1, :]), rows)
    return figure


def memory(axes: Any, results: dict[str, Any], axis: str) -> None:
    """Temporary memory over the size of an axis, a line each contender."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in results["memory"]:
        if entry["axis"] != axis or entry["kernel"] == "linear_log_probs":
            continue
        for name, temp in entry["temps"].items():
            label = f"{name}, {entry['variant']}" if name == OURS and entry["variant"] else name
            series.setdefault(label, []).append((entry["size"], temp / 2**20))
    for (label, points), line in zip(sorted(series.items()), LINES, strict=False):
        sizes, temps = zip(*sorted(set(points)), strict=True)
        axes.plot(sizes, temps, label=label, markersize=5, **line)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({entry["size"] for entry in results["memory"] if entry["axis"] == axis})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axes.set(xlabel=SIZES[axis], ylabel="temporary memory (MiB)", title=_TITLES[axis])
    axes.legend(frameon=False, fontsize="small")
    _bare(axes)


def ratios(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Their time over ours, with quartiles; float32 filled, bfloat16 open."""
    labels = _bars_of(rows)
    for row in rows:
        for peer, (low, median, high) in row["ratios"].items():
            y = labels[_label(row, peer)]
            face = "black" if row["dtype"] == "float32" else "white"
            offset = -0.17 if row["dtype"] == "float32" else 0.17
            axes.errorbar(
                median,
                y + offset,
                xerr=[[max(median - low, 0)], [max(high - median, 0)]],
                fmt="o",
                color="black",
                markerfacecolor=face,
                markersize=4,
                elinewidth=1,
            )
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(list(labels.values()), list(labels), fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    title = "Times: right of 1, jaxgrad is faster (● float32, ○ other dtypes; bars: quartiles)"
    axes.set(xlabel="their time / jaxgrad's time", title=title)
    _bare(axes)


_TITLES = {
    "classes": "Loss and gradients of a head, 2048 tokens of 256 features",
    "length": "Attention and its gradients, 8 heads of 64 features",
}


def lines(rows: Sequence[dict[str, Any]]) -> int:
    """How many lines ``ratios`` draws."""
    return len(_bars_of(rows))


def _bars_of(rows) -> dict[str, int]:
    labels = dict.fromkeys(_label(row, peer) for row in rows for peer in row["ratios"])
    return {label: i for i, label in enumerate(labels)}


def _label(row, peer):
    name = report.name_of(row).replace("softmax_cross_entropy", "softmax_CE")
    return f"{name} {report.shape_of(row)} {row['what']}, {peer}"


def _bare(axes):
    axes.spines[["top", "right"]].set_visible(False)
