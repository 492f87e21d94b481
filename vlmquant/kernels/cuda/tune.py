"""Measure the kernels' variants on the present GPU, and write what won where dispatch.py looks first."""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmquant
from vlmquant.cache import write_private
from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import dispatch, launch, ops
from vlmquant.kernels.cuda.dispatch import Choice, Gpu, Plan, Problem, Row, plan
from vlmquant.kernels.cuda.timing import Timing, chain, layers_for, race

TOKENS = (8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048)
"""Upper edges of the buckets; each is measured at its edge."""
SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096), (28672, 8192))
"""Rows and columns of the weights measured where none are asked for."""
GROUP_SIZE = 128
ROUNDS = 9
TILES = ((32, 2), (64, 2), (64, 4), (128, 2), (128, 4), (256, 2))
"""Tokens of a tile, and warpgroups."""
MARGIN = 0.02
"""A variant must beat the table's choice by more than repeats differ to take its place."""

Weight = tuple[Tensor, Tensor]
"""Codes and scales."""


def require_cuda() -> torch.device:
    """The present GPU. KernelError if there is none that the kernels run on."""
    reason = launch.unavailable(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if reason is not None:
        raise KernelError(f"nothing to measure: {reason}; run this on the machine with the GPU")
    return torch.device("cuda", torch.cuda.current_device())


def candidates(problem: Problem, gpu: Gpu) -> list[Choice]:
    """Every variant worth a measurement."""
    chosen = [Choice("skinny"), Choice("gemm"), Choice("dequantize")]
    chosen += [
        Choice("skinny_hopper", blocks_per_sm=blocks, ring_kib=ring)
        for blocks, ring in ((1, 76), (1, 110), (2, 76), (2, 110))
    ]
    chosen += [
        Choice("skinny_wide_hopper", blocks_per_sm=blocks, ring_kib=ring)
        for blocks, ring in ((1, 110), (1, 226), (2, 110))
    ]
    for tokens, warpgroups in TILES:
        if tokens // 2 <= max(problem.tokens, 16) and tokens * 16 >= problem.tokens:
            for grid in ("sms", "even"):
                chosen += [
                    Choice("gemm_hopper", ring_kib=ring, tile_tokens=tokens, warpgroups=warpgroups, grid=grid)
                    for ring in ((112, 226) if tokens <= 64 else (226,))
                ]
    return [choice for choice in chosen if isinstance(plan(problem, gpu, choice), Plan)]


def random_weights(problem: Problem, device: torch.device, count: int) -> list[Weight]:
    """Packed weights with random codes; what they are does not change how long they take."""
    dtype = {name: dtype for dtype, name in launch.DTYPE_NAMES.items()}[problem.dtype]
    strips, groups = problem.rows // 64, problem.columns // problem.group_size
    shape = (strips, problem.columns // 64, 4, 32, 4)
    return [
        (
            torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device),
            (torch.rand(strips, groups, 4, 8, 2, device=device) * 0.015 + 0.005).to(dtype),
        )
        for _ in range(count)
    ]


def starter(
    device: launch.Device, planned: Plan, problem: Problem, inputs: Tensor, outputs: Tensor
) -> Callable[[Weight], Callable[[], None]]:
    """Makes a call that starts the plan with a weight."""
    ready = ops.make_launch(device, planned, problem)

    def with_weight(weight: Weight) -> Callable[[], None]:
        return lambda: ops.start_w4(device, ready, inputs, weight[0], weight[1], None, outputs)

    return with_weight


def best(problem: Problem, gpu: Gpu, times: dict[Choice, Timing]) -> Choice:
    """The fastest, or the table's own choice where that is as fast."""
    fastest = min(times, key=lambda choice: times[choice].median)
    present = dispatch.choose(problem, gpu, tuned=False)
    for choice, time in times.items():
        same = plan(problem, gpu, choice, why=present.why) == present
        if same and time.median <= times[fastest].median * (1 + MARGIN):
            return choice
    return fastest


def tune(
    shapes: Sequence[tuple[int, int]], *, dtype: str, step: Callable[[str], None] = lambda text: None
) -> tuple[Path, list[dict[str, Any]]]:
    """Measure; write the override file of this GPU; its path and rows. An older file's other shapes stay in it."""
    place = require_cuda()
    kept = launch.device(place.index)
    for rows, columns in shapes:
        if rows % 64 or columns % GROUP_SIZE:
            raise KernelError(f"{rows}x{columns}: rows must be a multiple of 64 and columns one of {GROUP_SIZE}")
    path = dispatch.override_path(kept.gpu.name)
    older = [row for row in dispatch.overrides(kept.gpu.name) if row.shape not in shapes]
    found: list[Row] = []
    for rows, columns in shapes:
        size = rows * columns // 2
        weights = random_weights(Problem(1, rows, columns, GROUP_SIZE, True, dtype), place, layers_for(size))
        for tokens in TOKENS:
            step(f"{rows}x{columns}, {tokens} tokens")
            problem = Problem(tokens, rows, columns, GROUP_SIZE, True, dtype)
            inputs = torch.randn(tokens, columns, device=place).to(weights[0][1].dtype)
            outputs = inputs.new_empty(tokens, rows)
            chains = {}
            for choice in candidates(problem, kept.gpu):
                planned = plan(problem, kept.gpu, choice)
                assert isinstance(planned, Plan)
                start = starter(kept, planned, problem, inputs, outputs)
                chains[choice] = chain([start(weight) for weight in weights], size, place)
            named = {str(number): one for number, one in enumerate(chains.values())}
            times = dict(zip(chains, race(named, ROUNDS, place).values(), strict=True))
            found.append(Row(best(problem, kept.gpu, times), tokens=tokens, shape=(rows, columns)))
        del weights
        torch.cuda.empty_cache()
    rows_written = [dispatch.write_row(row) for row in (*older, *found)]
    write(path, kept.gpu, rows_written, dtype)
    kept.ready.clear()
    return path, rows_written


def write(path: Path, gpu: Gpu, rows: list[dict[str, Any]], dtype: str) -> None:
    """The override file, whole or not at all."""
    data = {
        "gpu": gpu.name,
        "provenance": f"vlmquant {vlmquant.__version__} tune, {dtype}, groups of {GROUP_SIZE}, symmetric",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    write_private(path, (json.dumps(data, indent=1) + "\n").encode())
    dispatch.overrides.cache_clear()
