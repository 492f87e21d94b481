"""Problems for the emulated W4 kernels: a random weight, packed, and its product in float64; and how bugs are seen."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.emulator import Counters, Emulator, EmulatorError, TensorMap, guarded
from vlmquant.kernels.cuda.catalog import ENTRIES, Entry, group_kind, shared_bytes
from vlmquant.packing import VQ4_TILE, VQ4Shape, order_vq4, pack_vq4, vq4_shape

SEEDS = (0, 1, 2)
"""0 runs blocks and warps in order, and shared memory begins at a multiple of 1024 bytes; others shuffle."""
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
RELATIVE_ERROR = {"f16": 3e-4, "bf16": 2.5e-3}
"""Frobenius, against float64: what it costs to round the weight and the output to this dtype, sums being float32."""


@dataclass(frozen=True)
class Problem:
    """A weight (rows, columns) in groups of group_size columns (0: one group), and inputs (tokens, columns) for it."""

    tokens: int
    rows: int
    columns: int
    group_size: int = 128
    symmetric: bool = True
    dtype: str = "bf16"
    bits: int = 4

    @property
    def packed(self) -> VQ4Shape:
        return vq4_shape(self.rows, self.columns, self.group_size or self.columns)

    @property
    def suffix(self) -> str:
        return "" if self.symmetric else "_asym"


@dataclass(frozen=True)
class How:
    """A launch: kernel family, blocks (those that share a strip for `skinny`), and what the family needs besides."""

    family: str
    blocks: int = 1
    stages: int = 3
    token_tile: int = 0
    warpgroups: int = 2
    sweep_tiles: int = 8


@dataclass(frozen=True)
class Data:
    """Tensors of a problem; those that a kernel reads lie in guarded memory."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    inputs: Tensor
    padded_inputs: Tensor
    weight: Tensor
    """(rows, columns) float64."""
    expected: Tensor
    """(tokens, rows) float64."""


@dataclass(frozen=True)
class Result:
    outputs: Tensor
    """(tokens, packed rows)."""
    dense: Tensor
    """(packed rows, packed columns), what `dequantize` wrote."""
    counters: Counters
    problem: Problem

    def error(self) -> float:
        """Relative, in the Frobenius norm; nan if any output is."""
        exact = data_of(self.problem).expected
        found = self.outputs[:, : self.problem.rows].double()
        return ((found - exact).norm() / exact.norm()).item()


def largest_error(problem: Problem) -> float:
    """RELATIVE_ERROR, and more where few outputs estimate it: over n of them it varies by about 1 / sqrt(n)."""
    return RELATIVE_ERROR[problem.dtype] * (1 + 3 / math.sqrt(problem.tokens * problem.rows))


@functools.lru_cache(maxsize=32)
def data_of(problem: Problem) -> Data:
    """A seeded random instance. Its zeros are the middle code or, if asymmetric, any."""
    random = torch.Generator().manual_seed(problem.tokens + problem.rows + problem.columns)
    packed, groups = problem.packed, -(-problem.columns // (problem.group_size or problem.columns))
    codes = torch.randint(0, 2**problem.bits, (problem.rows, problem.columns), dtype=torch.uint8, generator=random)
    zeros = None
    if not problem.symmetric:
        zeros = torch.randint(0, 2**problem.bits, (problem.rows, groups), dtype=torch.uint8, generator=random)
    dtype = DTYPES[problem.dtype]
    signs = torch.randint(2, (problem.rows, groups), generator=random) * 2 - 1  # a scale may be below 0
    scales = ((torch.rand(problem.rows, groups, generator=random) * 0.015 + 0.005) * signs).to(dtype)
    inputs = torch.randn(problem.tokens, problem.columns, generator=random).to(dtype)

    group_of = torch.arange(problem.columns) // packed.group_size
    middle = torch.full_like(scales, 2 ** (problem.bits - 1)) if zeros is None else zeros
    weight = (codes.double() - middle.double()[:, group_of]) * scales.double()[:, group_of]
    return Data(
        words=guarded(pack_vq4(codes, zeros, bits=problem.bits, group_size=packed.group_size)),
        scales=guarded(order_vq4(scales, packed, padding=0)),
        zeros=None if zeros is None else guarded(order_vq4(zeros, packed, padding=8)),
        inputs=guarded(inputs),
        padded_inputs=guarded(torch.nn.functional.pad(inputs, (0, packed.columns - problem.columns))),
        weight=weight,
        expected=inputs.double() @ weight.T,
    )


def entry_of(problem: Problem, how: How) -> Entry:
    packed, tiles = problem.packed, -(-problem.tokens // 8)
    kind = group_kind(packed.group_size, packed.columns)
    assert kind is not None, f"no kernel has groups of {packed.group_size}"
    middle = {
        "skinny": f"_m{1 if tiles == 1 else 2 if tiles == 2 else 4}_g{kind}",
        "skinny_hopper": f"_m{tiles}_g{kind}",
        "skinny_wide_hopper": f"_m{tiles}_g{kind}",
        "gemm": f"_m64{'_g32' if kind == 32 else ''}",
        "gemm_hopper": f"_n{how.token_tile}_c{how.warpgroups}{'_g32' if kind == 32 else ''}",
        "dequantize": "",
    }[how.family]
    return ENTRIES[f"w4_{how.family}_{problem.dtype}{middle}{problem.suffix}"]


def run(emulator: Emulator, problem: Problem, how: How, *, seed: int = 0) -> Result:
    """Launches the kernel; outputs and workspace hold NaN before, and the semaphores must be zero after."""
    entry, data, packed = entry_of(problem, how), data_of(problem), problem.packed
    strips, k_blocks = packed.rows // VQ4_TILE, packed.columns // VQ4_TILE
    token_tiles, row_tiles = -(-problem.tokens // max(1, entry.token_tile)), -(-packed.rows // entry.row_tile)
    nan, dtype = float("nan"), DTYPES[problem.dtype]
    outputs = guarded(torch.full((problem.tokens, packed.rows), nan, dtype=dtype))
    dense = guarded(torch.full((packed.rows, packed.columns), nan, dtype=dtype))
    partial = problem.tokens * packed.rows if how.family == "skinny" else entry.token_tile * entry.row_tile
    workspace = guarded(torch.full((how.blocks * max(1, partial),), nan))
    semaphores = guarded(torch.zeros(token_tiles * row_tiles * 16, dtype=torch.int32))  # 16: one for each warp
    mapped = data.inputs if problem.columns % 8 == 0 else data.padded_inputs  # a map needs rows of whole 16 bytes
    grid = {
        "skinny": (strips, how.blocks),
        "gemm": (row_tiles, token_tiles),
        "dequantize": (-(-k_blocks // 2), strips),
    }.get(how.family, (how.blocks,))
    shared = shared_bytes(
        entry,
        tokens=problem.tokens,
        columns=packed.columns,
        splits=how.blocks,
        group_size=packed.group_size,
        stages=how.stages,
    )
    tensor_map = ("inputs", "tensor_map") in entry.arguments
    given: Mapping[str, Tensor | TensorMap | int | None] = {
        "codes": data.words,
        "scales": data.scales,
        "zeros": data.zeros,
        "inputs": TensorMap(mapped, entry.token_tile) if tensor_map else data.padded_inputs,
        "outputs": outputs,
        "dense": dense,
        "workspace": workspace,
        "semaphores": semaphores,
        "tokens": problem.tokens,
        "rows": packed.rows,
        "columns": packed.columns,
        "group_size": packed.group_size,
        "stages": how.stages,
        "sweep_tiles": how.sweep_tiles,
        "first_strip": 0,
    }
    counters = emulator.launch(entry.name, grid, shared, {name: given[name] for name, _ in entry.arguments}, seed=seed)
    assert not semaphores.any(), "a semaphore is not back at zero"
    if how.family == "dequantize":
        outputs = (data.padded_inputs.double() @ dense.double().T).to(dtype)
    return Result(outputs, dense, counters, problem)


def outcome(launch: Callable[[int], tuple[Tensor, bool, int]]) -> str:
    """What is seen over SEEDS, in words; a launch gives its outputs, whether they are right, and bank conflicts."""
    try:
        results = [launch(seed) for seed in SEEDS]
    except (EmulatorError, AssertionError) as error:
        return str(error)
    if not all(right for _, right, _ in results):
        return "wrong"
    outputs, _, conflicts = results[0]
    if not all(torch.equal(other, outputs) for other, _, _ in results):
        return "other bits"
    return f"{conflicts} bank conflicts" if conflicts else "right"


def quick_first(names: Iterable[str], quick: Collection[str]) -> list[object]:
    """Parameters of a test; all but the quick ones are slow."""
    names = list(names)
    assert set(quick) <= set(names)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
