"""torch's CPU threads: how many, and how they wait for each other."""

import os

from vlmquant.errors import UsageError, shown

MAX_THREADS = 1024
"""As many as the largest machines have cores; with some ten thousand torch crashes."""

QUIET_WAIT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of a process whose threads sleep while they wait; a user's own setting goes before it.

All our work is long rows of short parallel steps. Threads that spin between them, OpenMP's default, burn as much CPU
time again, and where other work holds a core they make every step wait for it.
"""


def wait_without_spinning() -> None:
    """Have this process's threads sleep while they wait; to be called before torch is imported."""
    for name, value in QUIET_WAIT.items():
        os.environ.setdefault(name, value)


def check_threads(threads: int) -> None:
    """UsageError for a number that torch does not take, or dies of."""
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {shown(threads)}; it must be between 1 and {MAX_THREADS}")


def set_threads(threads: int | None) -> None:
    """Let torch use this many CPU threads; None leaves its own choice."""
    if threads is not None:
        check_threads(threads)
        import torch

        torch.set_num_threads(threads)
