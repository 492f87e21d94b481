"""How torch works on CPUs in a process: how many threads, how they wait for each other, and what is kept for them."""

import os

from vlmquant.errors import UsageError, shown

MAX_THREADS = 1024
"""As many as the largest machines have cores; with some ten thousand torch crashes."""

CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Environment of a process that computes on CPUs; a user's own setting goes before it.

Threads sleep while they wait: all our work is long rows of short parallel steps. Threads that spin between them,
OpenMP's default, burn as much CPU time again, and where other work holds a core they make every step wait for it.

oneDNN compiles every product for its shape, and keeps 1,024 of them, of up to a megabyte each; torch as many of their
descriptions. A pass has some ten shapes, and the next, of samples of another length, has others.
"""


def prepare_cpu() -> None:
    """Have this process's threads sleep while they wait, and few products kept; to be called before torch is
    imported."""
    for name, value in CPU_ENVIRONMENT.items():
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
