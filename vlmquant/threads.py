"""torch's CPU threads: how many, and how they wait for each other."""

import os

QUIET_WAIT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of a process whose threads sleep while they wait; a user's own setting goes before it.

All our work is long rows of short parallel steps. Threads that spin between them, OpenMP's default, burn as much CPU
time again, and where other work holds a core they make every step wait for it.
"""


def wait_without_spinning() -> None:
    """Have this process's threads sleep while they wait; to be called before torch is imported."""
    for name, value in QUIET_WAIT.items():
        os.environ.setdefault(name, value)


def set_threads(threads: int | None) -> None:
    """Let torch use this many CPU threads; None leaves its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
