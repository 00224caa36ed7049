"""A progress bar on stderr: rich's on a terminal where rich is installed, else plain lines."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[int, float], None]]:
    """Yields ``show(done, loss)``, to be called after every step."""
    if not sys.stderr.isatty():
        shown = {1, *range(0, steps + 1, -(-steps // 10)), steps}
        yield lambda done, loss: _line(steps, done, loss) if done in shown else None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        yield lambda done, loss: _line(steps, done, loss, end="\r")
        print(file=sys.stderr)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=steps)
        yield lambda done, loss: bar.update(task, completed=done, description=f"loss {loss:.3f}")


def _line(steps: int, done: int, loss: float, end: str = "\n") -> None:
    print(f"step {done}/{steps}  loss {loss:.3f}", end=end, file=sys.stderr, flush=True)
