"""Progress on stderr, so that stdout holds results only: bars in a terminal, plain lines where there is none."""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vlmquant import notices, signals
from vlmquant.errors import shown
from vlmquant.streams import Stderr

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL = 30.0
"""Seconds between two plain lines: systems that run jobs end those that are silent for minutes."""


class _Told(Stderr):
    """Standard error for what is no error."""

    def write(self, text: str) -> int:
        return len(text) if notices.is_quiet() else super().write(text)


@functools.cache
def _console() -> "Console":
    from rich.console import Console

    return Console(file=_Told())  # type: ignore[arg-type]  # all that rich asks of a file


class _AtFirstUse:
    """A console that is made, and rich imported, at its first use: most commands have nothing to say there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_console(), name)


stderr = cast("Console", _AtFirstUse())


def in_terminal() -> bool:
    """Whether stderr is a terminal that can be drawn on, whatever FORCE_COLOR says of colours in logs."""
    try:
        return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


@dataclass
class Task:
    """Something that takes time. total: 0 where it is not known."""

    label: str
    total: int
    started: float
    done: int = 0

    def line(self, now: float) -> str:
        """ "quantize: 3/24, 2 min 10 s, about 15 min left"."""
        passed = now - self.started
        parts = [f"{shown(self.label)}: " + (f"{self.done}/{self.total}" if self.total else "at work")]
        parts.append(duration(passed))
        if 0 < self.done < self.total:
            parts.append(f"about {duration(passed / self.done * (self.total - self.done))} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """45 s, 2 min 10 s, 15 min, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600 and whole % 60:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


class Log:
    """Plain lines of what is done now: one at least every INTERVAL seconds, and one when something is finished."""

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._tasks: list[Task] = []
        self._silent = 0
        self._last = 0.0
        self._lock = threading.Lock()

    def begin(self, label: str, total: int = 0) -> Task:
        now = self._clock()
        with self._lock:
            if not self._tasks:
                self._last = now
            self._tasks.append(task := Task(label, total, now))
        return task

    def end(self, task: Task, *, tell: bool) -> None:
        with self._lock:
            self._tasks.remove(task)
        if tell:
            self._tell(task)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """No line of what is begun already, as somebody else tells of the work meanwhile."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1
            self._last = self._clock()

    def tick(self) -> float:
        """Write a line if it is time to; returns the seconds until it is."""
        with self._lock:
            task = self._tasks[-1] if self._tasks else None
        if task is not None and not self._silent and self._clock() - self._last >= INTERVAL:
            self._tell(task)
        return max(INTERVAL - (self._clock() - self._last), 0.1)

    def _tell(self, task: Task) -> None:
        self._last = self._clock()
        self._write(task.line(self._last) + "\n")


def _write(text: str) -> None:
    told = _Told()
    told.write(text)
    told.flush()


log = Log(_write)
_subject = ""


def speak_of(subject: str) -> None:
    """From now on all that this process does is told of as work on this."""
    global _subject
    _subject = subject


def _named(label: str) -> str:
    return f"{_subject}: {label}" if _subject else label


def told_elsewhere() -> AbstractContextManager[None]:
    """Around what another process does and tells of: one of the two speaks at a time."""
    return log.silent()


class Bar:
    """`step` moves it on and may change its label, and ends the work here if a signal asked for it."""

    def __init__(self, move: Callable[[str | None, int], None]) -> None:
        self._move = move

    def step(self, label: str | None = None, *, by: int = 1) -> None:
        self._move(label, by)
        signals.check()


@contextmanager
def bar(label: str, total: int, *, visible: bool = True) -> Iterator[Bar]:
    """A bar of `total` steps with elapsed and remaining time; lines of the same where stderr is no terminal."""
    if not visible or notices.is_quiet():
        yield Bar(lambda label, by: None)
    elif in_terminal():
        with _drawn(label, total) as drawn:
            yield drawn
    else:
        with _logged(label, total) as logged:
            yield logged


@contextmanager
def _drawn(label: str, total: int) -> Iterator[Bar]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task(_named(label), total=total)

        def move(label: str | None, by: int) -> None:
            progress.update(task, advance=by)
            if label is not None:
                progress.update(task, description=_named(label))

        yield Bar(move)


@contextmanager
def _logged(label: str, total: int) -> Iterator[Bar]:
    task = log.begin(_named(label), total)

    def move(label: str | None, by: int) -> None:
        task.done += by
        task.label = task.label if label is None else _named(label)
        log.tick()

    with _beating():
        try:
            yield Bar(move)
        finally:
            log.end(task, tell=True)


@contextmanager
def working(label: str) -> Iterator[None]:
    """Around work of which some has no bar: where stderr is no terminal, a line of it every INTERVAL seconds."""
    if in_terminal() or notices.is_quiet():
        yield
        return
    task = log.begin(_named(label))
    with _beating():
        try:
            yield
        finally:
            log.end(task, tell=False)


_beats = 0


@contextmanager
def _beating() -> Iterator[None]:
    """Lines come from a thread of their own, as one step may take longer than INTERVAL."""
    global _beats
    _beats += 1
    if _beats > 1:
        try:
            yield
        finally:
            _beats -= 1
        return
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(over,), name="progress", daemon=True)
    beat.start()
    try:
        yield
    finally:
        _beats -= 1
        over.set()


def _beat(over: threading.Event) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {*signals.STOPPING, signal.SIGALRM, signal.SIGPROF})  # the main thread's
    while not over.wait(log.tick()):
        pass
