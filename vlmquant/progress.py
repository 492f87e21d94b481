"""Progress bars on stderr, so that stdout holds results only."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmquant import signals
from vlmquant.streams import Stderr

stderr = Console(file=Stderr())  # type: ignore[arg-type]  # all that rich asks of a file


class Bar:
    """One bar; `step` moves it on and may change its label, and ends the work here if a signal asked for it."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total)

    def step(self, label: str | None = None, *, by: int = 1) -> None:
        self._progress.update(self._task, advance=by)
        if label is not None:
            self._progress.update(self._task, description=label)
        signals.check()


@contextmanager
def bar(label: str, total: int, *, visible: bool = True) -> Iterator[Bar]:
    """A bar of `total` steps with elapsed and remaining time; plain final line where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=stderr.is_terminal, disable=not visible) as progress:
        yield Bar(progress, label, total)
