"""`python -m vlmquant.evaluation.worker DESCRIPTOR`: the process that holds a model and answers for it.

Requests come as lines of JSON on standard input, which stays open as long as the process that asks; each answer goes to
the descriptor, as a line too. Between them the process sleeps.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO

from vlmquant import progress, signals
from vlmquant.evaluation.process import TOLD_BY_WORKERS
from vlmquant.limits import end_with_parent


def main(answers: int) -> None:
    """Answer requests until there are no more. Before the heavy imports: ends when it is asked to, or left alone."""
    signals.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPPING)
    end_with_parent()
    stdin = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115  # not sys.stdin, which the end would wait for
    first = stdin.readline()
    if not first.endswith(b"\n"):
        return
    requests: queue.Queue[bytes] = queue.Queue()
    requests.put(first)
    threading.Thread(target=_listen, args=(stdin, requests), daemon=True).start()

    answering: Callable[[Any], Any] | None = None
    with os.fdopen(answers, "wb") as stream:
        while True:
            request = json.loads(requests.get())
            with _told(request):
                answering = answering or _ready()
                answer = answering(request)
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()
            requests.task_done()


def _ready() -> Callable[[Any], Any]:
    """After the heavy imports."""
    from transformers.utils import logging

    from vlmquant.evaluation.scoring import Answering

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Answering()


def _told(request: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Around the answer to a request of those that `remote` leaves to us to tell of."""
    what = next(iter(request))
    if what == "load":
        progress.speak_of(request[what]["label"])
    return progress.working(what) if what in TOLD_BY_WORKERS else nullcontext()


def _listen(stdin: BinaryIO, requests: "queue.Queue[bytes]") -> None:
    """Take in requests, and end the process with standard input: whoever asked wants no more, or is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*signals.STOPPING, signal.SIGALRM, signal.SIGPROF})
    while (line := stdin.readline()).endswith(b"\n"):
        requests.put(line)
    if requests.unfinished_tasks:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
