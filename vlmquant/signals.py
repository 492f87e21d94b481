"""SIGINT, SIGTERM and SIGHUP: noted when they come, and obeyed at the next place where stopping leaves nothing half done.

A handler that raises wherever it happens to be can be lost: C code drops the exception while it imports or frees something.
So ours only notes the signal. `check` obeys it, and stands between blocks, stages, batches and files (every step of a progress
bar asks). Where no such place comes within PATIENCE seconds, or the user asks again, the exception is raised on the spot, and
again until the process ends; `held` keeps it out of what must be done as a whole.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0
"""Seconds between a signal and the first time it is obeyed on the spot, and between the times after that."""


class Stopped(SystemExit):
    """A signal asked this process to end; its code is the shell's, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


_received: int | None = None
_holds = 0


def install() -> None:
    """Note the signals from now on; those that this process was started to ignore (nohup, background jobs) stay so.

    To be called by a process of ours, first thing and in its main thread; never by the library.
    """
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    signal.signal(signal.SIGALRM, _again)


def uninstall() -> None:
    """Leave the signals to the system from now on: where only the interpreter's own end is left to be done."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in STOPPING:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)


def received() -> int | None:
    """The number of the signal that asked us to end; None where none did."""
    return _received


def check() -> None:
    """Raise Stopped if a signal has come."""
    if _received is not None:
        raise Stopped(_received)


@contextmanager
def held() -> Iterator[None]:
    """What must be done as a whole: inside, only `check` obeys a signal."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    again = _received is not None
    _received = _received or number
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    if again and not _holds:
        raise Stopped(_received)


def _again(number: int, frame: FrameType | None) -> None:
    if _received is not None and not _holds:
        raise Stopped(_received)
