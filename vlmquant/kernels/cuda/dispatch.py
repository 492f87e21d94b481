"""Which kernel multiplies, and with what grid: a table from measurements, arithmetic for the rest, never a guess.

`dispatch.json` has rows per architecture in order; the first that matches and can run is taken. Behind the last one
stands `dequantize`, which expands the weight and leaves the product to the library: it always works. An override file
written by `vlmquant tune` goes before the table, for exactly the shapes measured on exactly this GPU.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmquant.cache import cache_home, read_trusted
from vlmquant.errors import KernelError, VlmquantError, shown
from vlmquant.kernels.cuda.build import PTX_ARCH
from vlmquant.kernels.cuda.catalog import (
    BARRIER_BYTES,
    ENTRIES,
    RING_STAGES,
    STAGE_COLUMNS,
    STRIP_ROWS,
    Entry,
    group_kind,
    shared_bytes,
    stage_bytes,
)
from vlmquant.notices import warn_once

TABLE = Path(__file__).parent / "dispatch.json"
PORTABLE = "portable"
"""The table of every architecture without one of its own."""

WORKSPACE_FLOATS = 8 << 20
"""Partial sums of one stream (32 MiB). The largest need on 132 SMs is 17 MiB (gemm_hopper)."""
SEMAPHORES = 1 << 17
"""Counters of one stream."""
MAX_GRID_Y = 65535
SKINNY_SHARED = 96 << 10
"""Most shared memory of a skinny block: what every architecture has (99 KiB on 8.6, 8.9 and 12.0)."""
SKINNY_EDGES = (8, 16, 24, 32, 40, 48)
"""Most tokens of each kind of skinny kernel."""
SKINNY_BLOCKS_PER_SM = 4
SKINNY_UNITS = 8
"""A part of fewer units than this (STAGE_COLUMNS columns each) costs more than it hides."""
SWEEP_TOKENS = 1024
"""Tokens whose tiles share one sweep over the weight in gemm_hopper, so that both stay in L2."""


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on."""

    name: str
    arch: str
    sms: int
    shared_bytes: int
    """Most dynamic shared memory of a block, opted in to."""


@dataclass(frozen=True)
class Problem:
    """A product: inputs (tokens, columns) with a packed weight (rows, columns), padded to STRIP_ROWS."""

    tokens: int
    rows: int
    columns: int
    group_size: int
    symmetric: bool
    dtype: str
    """f16 or bf16, of inputs, scales and outputs."""

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Choice:
    """A kernel and what may be tuned of it."""

    kernel: str
    blocks_per_sm: int = 1
    ring_kib: int = 226
    """Shared memory of a block whose ring of stages fills it."""
    tile_tokens: int = 0
    warpgroups: int = 0
    grid: str = "sms"
    """sms: one block per SM and place; even: `even_grid`."""


@dataclass(frozen=True)
class Plan:
    """A launch, but for its addresses."""

    kernel: str
    entry: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    why: str
    stages: int = 0
    """Of the ring, where there is one."""
    token_box: int = 0
    """Tokens of one copy from the inputs; 0 where the kernel reads them by address."""
    sweep_tiles: int = 0
    """Token tiles that share one sweep over the weight."""
    row_box: int = 0
    """Rows of one copy from an int8 weight; 0 where the kernel reads it by address."""
    split_tiles: int = 0
    """Tiles of an int8 product that are cut over several blocks."""
    dependent: bool = False
    """May start before the kernel ahead of it has ended (programmatic dependent launch)."""


@dataclass(frozen=True)
class Row:
    """A line of a table: `choice` for up to so many tokens, and a weight of up to so many elements or of this shape."""

    choice: Choice
    tokens: int | None = None
    weights: int | None = None
    shape: tuple[int, int] | None = None

    def matches(self, problem: Problem) -> bool:
        return (
            (self.tokens is None or problem.tokens <= self.tokens)
            and (self.weights is None or problem.weights <= self.weights)
            and (self.shape is None or self.shape == (problem.rows, problem.columns))
        )


def choose(problem: Problem, gpu: Gpu, *, tuned: bool = True) -> Plan:
    """The launch for this problem. KernelError if not even dequantizing is possible.

    tuned: by the override file first, if there is one.
    """
    name = _table_name(gpu)
    origins = ((f"tuned for {gpu.name}", overrides(gpu.name) if tuned else ()), (f"table of {name}", table(name)))
    refused = []
    for origin, rows in origins:
        for row in rows:
            if row.matches(problem):
                found = plan(problem, gpu, row.choice, why=origin)
                if isinstance(found, Plan):
                    return found
                refused.append(f"{row.choice.kernel}: {found}")
    why = "; ".join(refused) or f"no row for {problem.tokens} tokens: expanding pays"
    found = plan(problem, gpu, Choice("dequantize"), why=why)
    if isinstance(found, Plan):
        if refused:
            warn_once(f"a weight of {problem.rows}x{problem.columns} is expanded at every call; {why}")
        return found
    raise KernelError(f"{problem}: {found}; hold this weight in another layout")


def entries_for(rows: int, columns: int, group_size: int, symmetric: bool, dtype: str, gpu: Gpu) -> set[str]:
    """Every entry that `choose` may name for a weight, however many tokens come."""
    lines = (*overrides(gpu.name), *table(_table_name(gpu)))
    edges = {row.tokens for row in lines if row.tokens is not None} | set(SKINNY_EDGES)
    counts = {1, *edges, *(edge + 1 for edge in edges)}
    return {choose(Problem(tokens, rows, columns, group_size, symmetric, dtype), gpu).entry for tokens in counts}


def plan(problem: Problem, gpu: Gpu, choice: Choice, *, why: str = "asked for") -> Plan | str:
    """The launch of a kernel for a problem, or why it cannot run."""
    if problem.rows % STRIP_ROWS or problem.columns % STRIP_ROWS:
        return f"rows and columns must be padded to multiples of {STRIP_ROWS}"
    if not group_fits(problem.group_size, problem.columns):
        return f"there is no kernel for groups of {problem.group_size}"
    name = _entry_name(problem, choice)
    entry = ENTRIES.get(name)
    if entry is None:
        return f"there is no {name}"
    assert choice.kernel == "dequantize" or group_kind(problem.group_size, problem.columns) in entry.groups
    if not runs_on(entry.archs, gpu.arch):
        return f"{name} does not run on {gpu.arch}"
    made = PLANNERS[choice.kernel](problem, gpu, choice, entry, why)
    if isinstance(made, Plan) and made.shared_bytes > gpu.shared_bytes:
        return f"needs {made.shared_bytes} bytes of shared memory, the GPU has {gpu.shared_bytes}"
    return made


def group_fits(group_size: int, columns: int) -> bool:
    """Whether kernels have this group size for so many packed columns."""
    return columns % group_size == 0 and group_kind(group_size, columns) is not None


def runs_on(archs: tuple[str, ...], arch: str) -> bool:
    """An exact match; PTX stands for every architecture, so only what also runs on the oldest may become PTX."""
    return ("sm_80" if arch == PTX_ARCH else arch) in archs


def even_grid(tiles: int, blocks: int) -> int:
    """Blocks for so many tiles: whole waves where they fill the GPU well, else all blocks, which share the tiles.

    Measured on an H100: a wave that is 84 % full still wins where there are one or two, 93 % where there are more.
    """
    waves = -(-tiles // blocks)
    grid = -(-tiles // waves)
    return grid if grid >= (0.84 if waves <= 2 else 0.93) * blocks else blocks


def split_count(strips: int, units: int, sms: int) -> int:
    """Into how many parts the columns are cut: until there are SKINNY_BLOCKS_PER_SM, or parts get short."""
    split = 1
    while strips * split < SKINNY_BLOCKS_PER_SM * sms and units // split > SKINNY_UNITS:
        split += 1
    return split


def _entry_name(problem: Problem, choice: Choice) -> str:
    tiles = -(-problem.tokens // 8)
    group = group_kind(problem.group_size, problem.columns)
    middle = {
        "skinny": f"m{1 if tiles <= 1 else 2 if tiles == 2 else 4}_g{group}",
        "skinny_hopper": f"m{tiles}_g{group}",
        "skinny_wide_hopper": f"m{tiles}_g{group}",
        "gemm": f"m64{'_g32' if group == 32 else ''}",
        "gemm_hopper": f"n{choice.tile_tokens}_c{choice.warpgroups}{'_g32' if group == 32 else ''}",
        "dequantize": "",
    }[choice.kernel]
    parts = ("w4", choice.kernel, problem.dtype, middle, "" if problem.symmetric else "asym")
    return "_".join(part for part in parts if part)


def _plan_skinny(problem: Problem, gpu: Gpu, choice: Choice, entry: Entry, why: str) -> Plan | str:
    if problem.tokens > entry.token_tile:
        return f"takes at most {entry.token_tile} tokens"
    strips, units = problem.rows // STRIP_ROWS, -(-problem.columns // STAGE_COLUMNS)

    def shared(splits: int) -> int:
        return shared_bytes(entry, tokens=problem.tokens, columns=problem.columns, splits=splits)

    splits = split_count(strips, units, gpu.sms)
    while shared(splits) > SKINNY_SHARED:
        splits += 1
    if splits > 1 and splits * problem.tokens * problem.rows > WORKSPACE_FLOATS:
        return f"{splits} parts of {problem.tokens} x {problem.rows} sums exceed the workspace"
    if strips > SEMAPHORES:
        return f"{strips} strips exceed the semaphores"
    return Plan("skinny", entry.name, (strips, splits), entry.threads, shared(splits), why)


def _plan_skinny_hopper(problem: Problem, gpu: Gpu, choice: Choice, entry: Entry, why: str) -> Plan | str:
    stages = _stages(choice, entry, problem)
    if stages < 2:
        return f"a ring of {choice.ring_kib} KiB has no room for two stages"
    warps, grid = 8, choice.blocks_per_sm * gpu.sms
    if -(-problem.rows // entry.row_tile) * warps > SEMAPHORES:
        return f"{problem.rows} rows exceed the semaphores"
    if grid * entry.row_tile * entry.token_tile > WORKSPACE_FLOATS:
        return f"{grid} blocks exceed the workspace"
    shared = shared_bytes(entry, group_size=problem.group_size, stages=stages)
    return Plan(
        choice.kernel, entry.name, (grid, 1), entry.threads, shared, why, stages, entry.token_tile, dependent=True
    )


def _plan_gemm(problem: Problem, gpu: Gpu, choice: Choice, entry: Entry, why: str) -> Plan | str:
    grid = (-(-problem.rows // entry.row_tile), -(-problem.tokens // entry.token_tile))
    if grid[1] > MAX_GRID_Y:
        return f"{problem.tokens} tokens exceed the grid"
    return Plan("gemm", entry.name, grid, entry.threads, shared_bytes(entry), why)


def _plan_gemm_hopper(problem: Problem, gpu: Gpu, choice: Choice, entry: Entry, why: str) -> Plan | str:
    stages = _stages(choice, entry, problem)
    if stages < 2:
        return f"a ring of {choice.ring_kib} KiB has no room for two stages"
    blocks = choice.blocks_per_sm * gpu.sms
    tiles = -(-problem.rows // entry.row_tile) * -(-problem.tokens // entry.token_tile)
    grid = even_grid(tiles, blocks) if choice.grid == "even" else blocks
    if grid * entry.row_tile * entry.token_tile > WORKSPACE_FLOATS:
        return f"{grid} blocks exceed the workspace"
    return Plan(
        "gemm_hopper",
        entry.name,
        (grid, 1),
        entry.threads,
        shared_bytes(entry, group_size=problem.group_size, stages=stages),
        why,
        stages,
        entry.token_tile,
        max(1, SWEEP_TOKENS // entry.token_tile),
        dependent=True,
    )


def _plan_dequantize(problem: Problem, gpu: Gpu, choice: Choice, entry: Entry, why: str) -> Plan | str:
    grid = (-(-problem.columns // STAGE_COLUMNS), problem.rows // STRIP_ROWS)
    if grid[1] > MAX_GRID_Y:
        return f"{problem.rows} rows exceed the grid"
    return Plan("dequantize", entry.name, grid, entry.threads, shared_bytes(entry), why)


PLANNERS: dict[str, Callable[[Problem, Gpu, Choice, Entry, str], Plan | str]] = {
    "skinny": _plan_skinny,
    "skinny_hopper": _plan_skinny_hopper,
    "skinny_wide_hopper": _plan_skinny_hopper,
    "gemm": _plan_gemm,
    "gemm_hopper": _plan_gemm_hopper,
    "dequantize": _plan_dequantize,
}


def _stages(choice: Choice, entry: Entry, problem: Problem) -> int:
    room = choice.ring_kib * 1024 - 2 * BARRIER_BYTES
    return min(RING_STAGES, room // stage_bytes(entry, problem.group_size))


def _table_name(gpu: Gpu) -> str:
    return gpu.arch if gpu.arch in _tables() else PORTABLE


@functools.cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return tables


@functools.cache
def table(name: str) -> tuple[Row, ...]:
    return tuple(parse_row(row) for row in _tables()[name]["rows"])


def table_names() -> tuple[str, ...]:
    return tuple(_tables())


def provenance(name: str) -> str:
    """Where the rows of a table come from."""
    return str(_tables()[name]["provenance"])


def parse_row(data: dict[str, Any]) -> Row:
    """KernelError for a key, kernel or value that means nothing."""
    if not isinstance(data, dict) or not isinstance(data.get("kernel"), str):
        raise KernelError(f"a row of a dispatch table names no kernel: {shown(data)}")
    numbers = {key: value for key, value in data.items() if key not in ("kernel", "grid", "shape")}
    shape = data.get("shape")
    values = [*numbers.values(), *(shape if isinstance(shape, list) else [])]
    if not all(type(value) is int and value > 0 for value in values) or (
        shape is not None and not (isinstance(shape, list) and len(shape) == 2)
    ):
        raise KernelError(f"a row of a dispatch table has impossible numbers: {shown(data)}")
    limits = {key: data[key] for key in ("tokens", "weights") if key in data}
    try:
        choice = Choice(**{key: value for key, value in data.items() if key not in (*limits, "shape")})
    except TypeError as error:
        raise KernelError(f"a row of a dispatch table has unknown keys: {shown(data)}") from error
    if choice.kernel not in PLANNERS or choice.grid not in ("sms", "even"):
        raise KernelError(f"a row of a dispatch table asks for {shown(choice.kernel)} on grid {shown(choice.grid)}")
    return Row(choice, shape=None if shape is None else (shape[0], shape[1]), **limits)


def write_row(row: Row) -> dict[str, Any]:
    """The inverse of `parse_row`."""
    limits = {"tokens": row.tokens, "weights": row.weights, "shape": row.shape}
    found = limits | asdict(row.choice)
    return {key: list(value) if key == "shape" else value for key, value in found.items() if value}


def override_path(gpu_name: str) -> Path:
    """Where `vlmquant tune` keeps what it measured on a GPU of this name."""
    return cache_home() / "tune" / f"{re.sub(r'[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


@dataclass(frozen=True)
class _Overrides:
    """What is read of an override file."""

    gpu: str
    rows: list[dict[str, Any]]


@functools.cache
def overrides(gpu_name: str) -> tuple[Row, ...]:
    """The rows of the override file; none if there is none, or if it is not whole."""
    path = override_path(gpu_name)
    if (content := read_trusted(path)) is None:
        return ()
    # Only where there is a file: it needs pydantic, and the kernels run where torch alone is installed.
    from vlmquant.reading import check, parse_json

    try:
        found = check(_Overrides, parse_json(content, where=str(path)), where=str(path))
        if found.gpu != gpu_name:
            raise KernelError(f"{path}: was measured on {shown(found.gpu)}")
        return tuple(parse_row(row) for row in found.rows)
    except VlmquantError as error:
        warn_once(f"{path}: not used ({error}); run `vlmquant tune` again or delete it")
        return ()
