"""The loss curves as a picture; they are told apart by line and mark, so grey paper will do."""

from pathlib import Path
from statistics import fmean
from typing import Any

MOST_POINTS = 200


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws both loss curves, and their difference, to a PNG file.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ours, plain = (run["losses"] for run in report["runs"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, difference = figure.subplots(1, 2)

    every = -(-report["steps"] // MOST_POINTS)
    starts = range(0, report["steps"], every)
    lines = ({"color": "0.7", "linewidth": 5}, {"color": "black", "linestyle": "--"})
    for run, line in zip(report["runs"], lines, strict=True):
        means = [fmean(run["losses"][start : start + every]) for start in starts]
        curves.plot([start + 1 for start in starts], means, label=run["name"], **line)
    title = "Training loss" if every == 1 else f"Training loss, mean of every {every} steps"
    curves.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    curves.legend(frameon=False)

    gaps = [abs(a - b) for a, b in zip(ours, plain, strict=True)]
    difference.plot(range(1, len(gaps) + 1), gaps, "k.", markersize=3)
    difference.set(
        title="Distance between the two curves",
        xlabel="step",
        ylabel="absolute difference (nats per token)",
    )
    difference.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (curves, difference):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
