"""Standard output and error that are closed, full, in another encoding, or whose reader has gone: told, or borne."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vlmquant.errors import UsageError, VlmquantError


def prepare() -> None:
    """Make the streams of a process of ours fit for any text. UsageError where there is no standard output.

    A closed descriptor is opened on nothing, or a file of ours would get its number, and what libraries print.
    """
    has_output = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not has_output:
        raise UsageError("standard output is closed, so no result can be printed; send it to a file or to /dev/null")


@contextmanager
def printing() -> Iterator[None]:
    """What prints results: an error that says so where they cannot be written, a quiet end where nobody reads on."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if error.errno == errno.EPIPE:
            raise SystemExit(VlmquantError.exit_code) from error
        raise VlmquantError(f"standard output: cannot be written: {error.strerror}") from error


def flush() -> None:
    """What is still waiting to be printed, libraries' words included."""
    with printing():
        pass


def silence(stream: Any) -> None:
    """Send a stream to nothing from now on, what it still holds included."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


class Stderr:
    """Standard error as it is at the time; where it cannot be written to, work goes on without it."""

    def write(self, text: str) -> int:
        with self._borne() as stream:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._borne() as stream:
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    @contextmanager
    def _borne(self) -> Iterator[Any]:
        stream = self._stream()
        try:
            yield stream
        except OSError:
            silence(stream)

    @staticmethod
    def _stream() -> Any:
        stream = io.StringIO() if sys.stderr is None else sys.stderr
        return getattr(stream, "rich_proxied_file", stream)  # a live bar puts itself in stderr's place
