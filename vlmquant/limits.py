"""Limits of time and memory on what strangers' files make us do: build their config, render their templates."""

import ctypes
import errno
import os
import pickle
import resource
import select
import signal
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vlmquant.errors import VlmquantError, first_line
from vlmquant.signals import STOPPING

STATM = Path("/proc/self/statm")
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to map segment",
    "ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a primitive",
)
"""How torch, the libraries below it and the loader of libraries say so."""
LENGTH = struct.Struct("<Q")


class OverLimitError(Exception):
    """It took more time or memory than it may; the message says which, for the caller to say of what."""


class _OverTime(BaseException):
    """Not an Exception, so that what is limited does not catch it by the way."""


@contextmanager
def limited(*, seconds: float, more_bytes: int) -> Iterator[None]:
    """Python code that may take so many CPU seconds and so much more address space than there is now.

    OverLimitError where it takes more; MemoryError where the process itself may not take that much. Between bytecodes
    only: one call into C that never ends is not ended by this, see Confined. Outside the main thread, and on systems
    without the means, a limit is not set.
    """
    timed = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _limit(more_bytes)
    before = signal.signal(signal.SIGPROF, _out_of_time) if timed else None
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if timed:
            signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
        yield
    except _OverTime as error:
        raise OverLimitError(f"takes more than {seconds:g} s") from error
    except (MemoryError, RuntimeError) as error:
        if limit is None or not is_allocation_failure(error):
            raise
        raise OverLimitError(f"takes more than {more_bytes / 2**20:,.0f} MiB of memory") from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise _OverTime


def is_allocation_failure(error: BaseException) -> bool:
    """Whether memory ran out, also as torch says it (a RuntimeError on the CPU, a class of its own on a GPU)."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError | ImportError | OSError) and any(words in text for words in OUT_OF_MEMORY))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def memory_ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    return error is not None and (is_allocation_failure(error) or memory_ran_out(error.__cause__))


def _limit(more_bytes: int) -> int | None:
    """The address space of a process that may take so much more than now; None where that cannot be set, or the limit
    that it has is lower."""
    if not STATM.exists():
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + more_bytes
    return limit if soft == resource.RLIM_INFINITY or limit < soft else None


def _address_space() -> int:
    return int(STATM.read_text().split()[0]) * resource.getpagesize()


class Confined:
    """A function that runs in a child process of its own, forked when it is first called and kept for the next calls.

    Whatever it does there, this process goes on: each call gets `seconds` of wall time and `more_bytes` of address
    space. Arguments and results are pickled. Raises what the function raises, OverLimitError, or MemoryError where this
    process itself may not take that much; then the next call forks anew.
    """

    def __init__(self, function: Callable[..., Any], *, seconds: float, more_bytes: int) -> None:
        self._function, self._seconds, self._more_bytes = function, seconds, more_bytes
        self._child: int | None = None
        self._owner = 0
        self._requests = self._answers = -1
        self._end: Callable[[], None] | None = None
        self._limit: int | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._child is None or self._owner != os.getpid():
            self._start()
        try:
            _send(self._requests, pickle.dumps(arguments))
            answer = _receive(self._answers, time.monotonic() + self._seconds)
        except TimeoutError as error:
            self.close()
            raise OverLimitError(f"takes more than {self._seconds:g} s") from error
        except (EOFError, BrokenPipeError) as error:  # it could not even say that memory ran out
            self.close()
            raise self._out_of_memory() from error
        except BaseException:  # an answer may be under way that the next call must not take for its own
            self.close()
            raise
        worked, value = pickle.loads(answer)
        if worked:
            return value
        if isinstance(value, MemoryError):
            raise self._out_of_memory() from value
        raise value

    def _out_of_memory(self) -> Exception:
        if self._limit is None:
            return MemoryError("in a child process")
        return OverLimitError(f"takes more than {self._more_bytes / 2**20:,.0f} MiB of memory")

    def _start(self) -> None:
        request_end, self._requests = os.pipe()
        self._answers, answer_end = os.pipe()
        self._owner = os.getpid()
        self._limit = _limit(self._more_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forks beside threads: the child uses none of theirs
            self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._requests)
                os.close(self._answers)
                self._serve(request_end, answer_end)
            finally:
                os._exit(0)
        os.close(request_end)
        os.close(answer_end)
        # Also where the interpreter ends, before what it would take is gone.
        self._end = weakref.finalize(self, _end, self._owner, self._child, (self._requests, self._answers))

    def _serve(self, requests: int, answers: int) -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)  # the parent decides
        signal.setitimer(signal.ITIMER_REAL, 0)
        end_with_parent()
        if self._limit is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (self._limit, hard))
        while True:
            try:
                arguments = pickle.loads(_receive(requests, None))
            except EOFError:
                return
            answer: tuple[bool, Any]
            try:
                answer = (True, self._function(*arguments))
            except BaseException as error:
                answer = (False, error)
            try:
                _send(answers, pickle.dumps(answer))
            except MemoryError:
                _send(answers, pickle.dumps((False, MemoryError())))
            except Exception:  # an exception that cannot be pickled: its words
                _send(
                    answers,
                    pickle.dumps((False, VlmquantError(f"{type(answer[1]).__name__}: {first_line(answer[1])}"))),
                )

    def close(self) -> None:
        """End the child."""
        if self._end is not None:
            self._end()
        self._child = self._end = None


def _end(owner: int, child: int, descriptors: Iterable[int]) -> None:
    """End a child process, in the process that started it."""
    if owner != os.getpid():
        return
    for descriptor in descriptors:
        os.close(descriptor)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)


def end_with_parent() -> None:
    """Have the system end this process with the one (its thread, exactly) that started it; Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _send(descriptor: int, content: bytes) -> None:
    view = memoryview(LENGTH.pack(len(content)) + content)
    while view:
        view = view[os.write(descriptor, view) :]


def _receive(descriptor: int, deadline: float | None) -> bytes:
    """A message of _send. EOFError at the end of the pipe, TimeoutError past the deadline."""

    def exactly(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                    raise TimeoutError
            part = os.read(descriptor, min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    return exactly(LENGTH.unpack(exactly(LENGTH.size))[0])
