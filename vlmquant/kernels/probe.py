"""What is fast on this machine: measured shortly, never assumed; each answer is kept for the process."""

import functools
import time
from collections.abc import Callable

import torch

ROUNDS = 3
"""Timings of each candidate after one warm-up; the fastest counts, since others only add disturbance."""
MATMUL_SHAPE = (128, 512, 512)
"""Tokens, inputs, outputs of the probe: under a millisecond in float32, and short even where bfloat16 is emulated."""


def fastest_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after a warm-up."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(ROUNDS))


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The faster of float32 and bfloat16 for matmuls on this device, with the thread count as it is now set."""
    return _compute_dtype(torch.device(device), torch.get_num_threads())


@functools.cache
def _compute_dtype(device: torch.device, threads: int) -> torch.dtype:
    tokens, inputs, outputs = MATMUL_SHAPE

    def seconds(dtype: torch.dtype) -> float:
        left = torch.ones(tokens, inputs, dtype=dtype, device=device)
        right = torch.ones(outputs, inputs, dtype=dtype, device=device)
        with torch.no_grad():
            return fastest_seconds(lambda: torch.nn.functional.linear(left, right), device)

    return min((torch.float32, torch.bfloat16), key=seconds)
