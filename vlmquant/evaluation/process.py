"""The process in which a model is scored, from outside: started, waited for, and ended when we end."""

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
from vlmquant.threads import QUIET_WAIT

COMMAND: tuple[str, ...] = ("-P", "-m", "vlmquant.evaluation.worker")
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 3.0
"""Between the asking and the killing of a worker that is no longer wanted."""


def run(request: Mapping[str, Any], *, files: Sequence[int] = ()) -> tuple[bytes, int]:
    """What a worker answers to a request, b"" where it did not; and its exit status, negative if a signal ended it.

    files: open descriptors that the worker shares. However this process ends, the worker does not outlive it: its
    standard input is a pipe from here.
    """
    answers, answer_end = os.pipe()
    command = [sys.executable, *COMMAND, str(answer_end)]
    path = os.pathsep.join(filter(None, sys.path))  # the same modules as here, wherever we were started
    environment = QUIET_WAIT | os.environ | {"PYTHONPATH": path}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)  # the worker unblocks them when it is ready
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(answer_end, *files), env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(answer_end)
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
        answer = _receive(answers, process)
        return answer, process.wait()
    finally:
        os.close(answers)
        _end(process)


def _receive(answers: int, process: "subprocess.Popen[bytes]") -> bytes:
    """All that comes until the pipe or the process ends, obeying signals meanwhile."""
    received = bytearray()
    while True:
        ready, _, _ = select.select([answers], [], [], POLL_SECONDS)
        signals.check()
        if ready:
            part = os.read(answers, 1 << 20)
            if not part:
                return bytes(received)
            received += part
        elif process.poll() is not None:
            return bytes(received)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
