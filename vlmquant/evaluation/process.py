"""A process in which a model is held and scored, from outside: started, asked, and ended when we end."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from vlmquant import signals
from vlmquant.threads import cpu_environment

COMMAND: tuple[str, ...] = ("-P", "-m", "vlmquant.evaluation.worker")
TOLD_BY_WORKERS = ("load", "score")
"""Requests of which the worker tells how far it is; of the others, which take turns, whoever asks does."""
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 3.0
"""Between the asking and the killing of a worker that is no longer wanted."""


class Worker:
    """A process that answers requests, one at a time, and sleeps in between; a context manager that ends it.

    files: open descriptors that it shares. However this process ends, the worker does not outlive it: its standard
    input is a pipe from here.
    """

    def __init__(self, files: Sequence[int] = ()) -> None:
        self._answers, answer_end = os.pipe()
        self._asked = False
        command = [sys.executable, *COMMAND, str(answer_end)]
        path = os.pathsep.join(filter(None, sys.path))  # the same modules as here, wherever we were started
        environment = cpu_environment(os.environ) | {"PYTHONPATH": path}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)  # the worker unblocks them
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=(answer_end, *files), env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(answer_end)

    def ask(self, request: Mapping[str, Any]) -> bytes:
        """What it answers to a request, a line of JSON; b"" where it ended instead."""
        assert self._process.stdin is not None
        self._asked = True
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self._process.stdin.flush()
        received = bytearray()
        while not received.endswith(b"\n"):  # nothing comes unasked, and JSON has no line ends inside
            ready, _, _ = select.select([self._answers], [], [], POLL_SECONDS)
            signals.check()
            if ready:
                part = os.read(self._answers, 1 << 20)
                if not part:
                    return b""
                received += part
            elif self._process.poll() is not None:
                return b""
        self._asked = False
        return bytes(received)

    def status(self) -> int:
        """The exit status of one that ended, negative if a signal ended it."""
        return self._process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._answers)
        if self._asked and self._process.poll() is None:
            self._process.terminate()
        else:
            _close(self._process)  # which ends one that has nothing to do
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _close(self._process)


def _close(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
