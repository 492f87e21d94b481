"""How torch works on CPUs in a process: how many threads, how they wait for each other, and what is kept for them."""

import os
from collections.abc import Mapping

from vlmquant.errors import UsageError, shown

MAX_THREADS = 1024
"""As many as the largest machines have cores; with some ten thousand torch crashes."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How OpenMP's threads wait for each other: they look for some twenty microseconds whether there is more to do, then
sleep. All our work is long rows of short parallel steps with as short gaps between them, and to wake a thread takes as
long as such a step. Threads that spin for as long as they do by default burn as much CPU time again, and where other
work holds a core they make every step wait for it (benchmarks/results/thread_waiting.md)."""
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""oneDNN compiles every product for its shape, and keeps 1,024 of them, of up to a megabyte each; torch as many of
their descriptions. A pass has some ten shapes, and the next, of samples of another length, has others."""


def cpu_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Environment of a process that computes on CPUs: the user's own, which goes before ours."""
    waiting = {} if WAITING.keys() & own.keys() else WAITING  # a user who says one of them means all
    return {**waiting, **KEPT, **own}


def prepare_cpu() -> None:
    """Give this process `cpu_environment`; to be called before torch is imported."""
    os.environ.update(cpu_environment(os.environ))


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
