"""`python -m vlmquant.evaluation.worker DESCRIPTOR`: the process in which score_model has a model scored.

The request comes as a line of JSON on standard input, which stays open as long as the process that asks; the answer
goes to the descriptor.
"""

import json
import os
import signal
import sys
import threading

from vlmquant import signals
from vlmquant.limits import end_with_parent


def main(answers: int) -> None:
    """Read the request, score, write the answer. Before the heavy imports: ends when it is asked to, or left alone."""
    signals.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPPING)
    end_with_parent()
    request = sys.stdin.buffer.readline()
    if not request.endswith(b"\n"):
        return
    threading.Thread(target=_end_with_input, daemon=True).start()

    from transformers.utils import logging

    from vlmquant.evaluation.scoring import answer_request

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    answer = answer_request(json.loads(request))
    with os.fdopen(answers, "wb") as stream:
        stream.write(json.dumps(answer).encode())


def _end_with_input() -> None:
    """End the process when standard input does: whoever asked is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*signals.STOPPING, signal.SIGALRM, signal.SIGPROF})
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
