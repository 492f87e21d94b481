"""What is fast on this machine: measured shortly, never assumed; each answer is kept for the process."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")

ROUNDS = 5
"""Timings of each candidate, at least, after one warm-up; the fastest counts, since others only add disturbance."""
LEAST_SECONDS = 0.01
"""Timings of a candidate go on for this long: another process may hold a core for several milliseconds at a time."""
TURNS = 4
"""Times that each candidate of `fastest`, and for the compute dtype, is timed."""
MATMUL_SHAPE = (128, 512, 512)
"""Tokens, inputs, outputs of the probe: under a millisecond in float32, and short even where bfloat16 is emulated."""
GPU_TIMES = 16
"""A GPU gets a matmul so many times as large along each side, or its launch would be all that is timed."""


def measured(function: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
    """Keep what the function finds out on the CPU, for each number of threads; a constant to torch.compile."""

    @functools.cache
    def kept(threads: int, *asked: Asked.args, **more: Asked.kwargs) -> Answer:
        with torch.device("cpu"):  # whatever the user's default device
            return function(*asked, **more)

    @functools.wraps(function)
    def answer(*asked: Asked.args, **more: Asked.kwargs) -> Answer:
        return kept(torch.get_num_threads(), *asked, **more)  # type: ignore[arg-type]  # all hashable

    constant: Callable[Asked, Answer] = torch.compiler.assume_constant_result(answer)  # type: ignore[no-untyped-call]
    return constant


def seconds(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of the fastest of several runs, after a warm-up."""
    device = torch.device(device)

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    taken: list[float] = []
    while len(taken) < ROUNDS or sum(taken) < LEAST_SECONDS:
        taken.append(once())
    return min(taken)


def fastest(runs: Mapping[str, Callable[[], object]]) -> str:
    """The name of what takes the least time. They take turns, so that no disturbance meets one alone."""
    costs = [{name: seconds(run) for name, run in runs.items()} for _ in range(TURNS)]
    return min(runs, key=lambda name: min(turn[name] for turn in costs))


def most_tokens(fast: Callable[[int], object], other: Callable[[int], object], counts: tuple[int, ...]) -> int:
    """The largest of the rising token counts up to which `fast` takes less time than `other`; 0 if it never does."""
    best = 0
    for tokens in counts:
        if seconds(functools.partial(fast, tokens)) >= seconds(functools.partial(other, tokens)):
            break
        best = tokens
    return best


def compute_dtype(device: torch.device | str, *, least_gain: float = 1.0) -> torch.dtype:
    """bfloat16 if its matmuls are more than `least_gain` times as fast as float32's on this device, else float32.

    Measured once for the thread count as it is now set.
    """
    gain = _gain(torch.bfloat16, torch.device(device), torch.get_num_threads())
    return torch.bfloat16 if gain > least_gain else torch.float32


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 at least twice as fast as float32; no clock is asked.

    In tiles (AMX), or by the dot products of AMD's AVX-512 (benchmarks/results/cpu_layouts_avx512.md); those of Intel's
    take as long as float32's.
    """
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    in_tiles = found.get("amx_tile") and found.get("amx_bf16")
    return bool(in_tiles or (found.get("avx512_bf16") and str(found.get("cpu_name")).startswith("AMD")))


def product_dtype(inputs: Tensor) -> torch.dtype:
    """What to multiply such inputs in: their own dtype, or float32 where the CPU has no fast product for that one."""
    return inputs.dtype if inputs.is_cuda or inputs.dtype.itemsize > 2 or _is_fast(inputs.dtype) else torch.float32


def needs_gradient(inputs: Tensor) -> bool:
    """Whether a product must be one that torch can differentiate."""
    return torch.is_grad_enabled() and inputs.requires_grad


@measured
def _is_fast(dtype: torch.dtype) -> bool:
    return _gain(dtype, torch.device("cpu"), torch.get_num_threads()) > 1


@functools.cache
def _gain(other: torch.dtype, device: torch.device, threads: int) -> float:
    """How many times as fast as float32's are matmuls of another dtype."""
    tokens, inputs, outputs = (side * (GPU_TIMES if device.type == "cuda" else 1) for side in MATMUL_SHAPE)

    def cost(dtype: torch.dtype) -> float:
        left = torch.ones(tokens, inputs, dtype=dtype, device=device)
        right = torch.ones(outputs, inputs, dtype=dtype, device=device)
        with torch.no_grad():
            return seconds(lambda: torch.nn.functional.linear(left, right), device)

    costs = [(cost(torch.float32), cost(other)) for _ in range(TURNS)]
    return min(single for single, _ in costs) / min(one for _, one in costs)
