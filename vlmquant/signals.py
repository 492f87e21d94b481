"""SIGINT, SIGTERM and SIGHUP: noted when they come, obeyed at the next place where stopping leaves nothing half done.

A handler that raises wherever it happens to be can be lost: C code drops the exception while it imports or frees
something. So ours only notes the signal. `check` obeys it, and stands between blocks, stages, batches and files (every
step of a progress bar asks). Where no such place comes within PATIENCE seconds, or the user asks again, the exception
is raised on the spot; `held` keeps it out of what must be done as a whole. Not inside an import: C++ code that calls
Python while a library loads ends the process with a dump, so there the process ends by itself, as nothing has begun.

While the exception is on its way out it is not raised once more, so that what it ends can clean up. Where somebody
swallowed it, it is gone, and raised again at the next place, or after PATIENCE. The end of the process says the signal
in any case: see `__main__`.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from weakref import ReferenceType, ref

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0
"""Seconds between a signal and the first time it is obeyed on the spot, and between the times after that."""
IMPORTS = "<frozen importlib._bootstrap>"
"""Where the code stands that runs a module when it is imported."""
CLEANING_UP = 10.0
"""Seconds after which an exception that still exists is no longer taken to be on its way out: somebody kept it."""


class Stopped(SystemExit):
    """A signal asked this process to end; its code is the shell's, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


_received: int | None = None
_holds = 0
_last: ReferenceType[Stopped] | None = None
_last_time = 0.0


def install() -> None:
    """Note the signals from now on; those that this process was started to ignore (nohup, background jobs) stay so.

    To be called by a process of ours, first thing and in its main thread; never by the library.
    """
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    signal.signal(signal.SIGALRM, _again)


def uninstall() -> None:
    """Leave the signals to the system from now on: where only the interpreter's own end is left to be done.

    Each that comes is either noted before this returns, or ends the process by itself.
    """
    global _holds
    _holds += 1
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # no handler is changed while a signal waits for it
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in STOPPING:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _holds -= 1


def received() -> int | None:
    """The number of the signal that asked us to end; None where none did."""
    return _received


def check() -> None:
    """Raise Stopped if a signal has come, and it is not already on its way out."""
    if _received is not None and not _on_its_way():
        raise _stopped(_received)


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
    if again:
        _again(number, frame)


def _again(number: int, frame: FrameType | None) -> None:
    if _received is None or _holds or _on_its_way():
        return
    if _importing(frame):
        os._exit(128 + _received)
    raise _stopped(_received)


def _importing(frame: FrameType | None) -> bool:
    """Whether the code that a signal found running is a module that is being imported, or what it calls."""
    while frame is not None and frame.f_code.co_filename != IMPORTS:
        frame = frame.f_back
    return frame is not None


def _stopped(number: int) -> Stopped:
    global _last, _last_time
    stopped = Stopped(number)
    _last, _last_time = ref(stopped), time.monotonic()
    return stopped


def _on_its_way() -> bool:
    """Whether the last exception still exists: with-blocks and finally-clauses run, or a caller is about to see it."""
    return _last is not None and _last() is not None and time.monotonic() - _last_time < CLEANING_UP
