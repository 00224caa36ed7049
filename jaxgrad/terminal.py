"""What commands show on a terminal: progress on stderr, lines of text on stdout, in colour if any.

Colour and a moving bar take rich; where it is not installed, the text is plain.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator


class InvalidInput(ValueError):
    """Something the user can put right; its message is one line."""


@contextlib.contextmanager
def progress(steps: int, unit: str = "step") -> Iterator[Callable[[int, str], None]]:
    """Yields ``show(done, note)``, to be called after every step."""
    if not sys.stderr.isatty():
        shown = {1, *range(0, steps + 1, max(1, -(-steps // 10))), steps}
        yield lambda done, note: _line(unit, steps, done, note) if done in shown else None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        yield lambda done, note: _line(unit, steps, done, f"{note:40.40}", end="\r")
        print(file=sys.stderr)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=steps)
        yield lambda done, note: bar.update(task, completed=done, description=note)


def writer() -> Callable[[str, str], None]:
    """``write(line, style)``: a line on stdout, in the style of rich that is named, or in none."""
    try:
        from rich.console import Console
    except ImportError:
        return lambda text, style: print(text)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return lambda text, style: console.print(text, style=style)


def _line(unit: str, steps: int, done: int, note: str, end: str = "\n") -> None:
    print(f"{unit} {done}/{steps}  {note}", end=end, file=sys.stderr, flush=True)
