"""Timing of short kernels: CUDA graphs over distinct layers, candidates taking turns, medians.

A layer's weight must come from memory, as it does in a model: the calls of a candidate go through weights of at least
COLD_BYTES together, more than any L2 holds. A graph leaves nothing of Python or the driver between the kernels.
Without a GPU the same code runs with a clock around plain calls, so that it can be tested.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COLD_BYTES = 256 << 20
GRAPH_BYTES = 400_000_000
"""Bytes of weights that one replay reads at least, so that its start and end do not count."""
WARM_SECONDS = 0.02
"""Copies before the first round: clocks rise and the memory wakes up."""
WARM_ROUNDS = 2

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds per layer."""

    median: float
    low: float
    """A quarter of the rounds took less."""
    high: float
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> "Timing":
        if len(values) < 4:
            return Timing(statistics.median(values), min(values), max(values), len(values))
        low, middle, high = statistics.quantiles(values, n=4)
        return Timing(middle, low, high, len(values))


@dataclass(frozen=True)
class Chain:
    """Calls that follow each other on one stream, as often as `layers` says."""

    replay: Call
    layers: int


def layers_for(layer_bytes: int) -> int:
    """How many distinct weights of this size push each other out of every cache."""
    return max(3, -(-COLD_BYTES // layer_bytes))


def chain(calls: Sequence[Call], layer_bytes: int, device: torch.device) -> Chain:
    """The calls, captured into a CUDA graph after one run of each; repeated until GRAPH_BYTES are read."""
    if device.type != "cuda":

        def replay() -> None:
            for call in calls:
                call()

        return Chain(replay, len(calls))
    repeats = max(1, GRAPH_BYTES // (layer_bytes * len(calls)))
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return Chain(graph.replay, repeats * len(calls))


def race(chains: dict[str, Chain], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time the chains in turns, so that clocks and temperature are the same for all."""
    taken: dict[str, list[float]] = {name: [] for name in chains}
    _warm_up(device)
    for number in range(rounds + WARM_ROUNDS):
        for name, microseconds in _one_round(chains, device).items():
            if number >= WARM_ROUNDS:
                taken[name].append(microseconds)
    return {name: Timing.of(values) for name, values in taken.items()}


def _one_round(chains: dict[str, Chain], device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        found = {}
        for name, one in chains.items():
            start = time.perf_counter()
            one.replay()
            found[name] = (time.perf_counter() - start) * 1e6 / one.layers
        return found
    events: dict[str, tuple[Any, Any]] = {}
    make_event: Any = torch.cuda.Event
    for name, one in chains.items():
        events[name] = make_event(enable_timing=True), make_event(enable_timing=True)
        events[name][0].record()
        one.replay()
        events[name][1].record()
    torch.cuda.synchronize(device)
    return {name: start.elapsed_time(end) * 1e3 / chains[name].layers for name, (start, end) in events.items()}


def _warm_up(device: torch.device) -> None:
    if device.type != "cuda":
        return
    source = torch.empty(1 << 27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        target.copy_(source)
        torch.cuda.synchronize(device)
