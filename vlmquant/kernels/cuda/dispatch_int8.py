"""Which kernels round inputs to int8 and multiply them. By arithmetic alone: none of it was measured yet.

Outputs do not depend on the choice: sums are exact integers.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from vlmquant.errors import KernelError
from vlmquant.kernels.cuda.catalog import (
    BARRIER_BYTES,
    CLUSTERS,
    ENTRIES,
    RING_STAGES,
    STAGE_COLUMNS,
    W8_HOPPER_TILES,
    W8_STAGES,
    Entry,
    activation_ending,
    shared_bytes,
)
from vlmquant.kernels.cuda.dispatch import MAX_GRID_Y, SWEEP_TOKENS, WORKSPACE_FLOATS, Gpu, Plan, runs_on

MULTIPLE = 16
"""Packed columns are a multiple of this."""
KEPT_COLUMNS = 2048
"""Columns that one warp of quantize_rows keeps in registers; longer rows are shared by eight."""
RING_KIB = {1: 226, 2: 110}
"""Shared memory of a block, by the blocks on an SM."""
FEW_TOKENS = 64
"""Up to here the weight is read once and little is computed: tiles of 128 tokens would be mostly empty."""
PRODUCT_CLOCKS = 4
"""Of an SM's tensor cores, for a row of a unit: 128 tokens x 128 columns at 4096 products a clock."""
OUTPUT_CLOCKS = {"": 6, "gelu": 23, "gelu_tanh": 16, "quick_gelu": 16}
"""From 128 sums, of a row of a tile, to outputs: instructions in the machine code, or an exponential and a division for
each at 16 lanes a clock."""
L2_BYTES, SM_BYTES = 3700, 64
"""A clock: what L2 gives to all SMs together (6 TB/s), and what one SM takes. Guesses; if L2 gives 5000, the most that
it could, an encoder's linears take at most 5 % longer than by other launches. See benchmarks/gpu/LOG.md."""
POST_CLOCKS = 1500
"""From the last store of a block's sums until the block that adds them has its first ones."""
UNMEASURED = "by arithmetic, not measured"
COMMON_TOKENS = (1, 33, *range(65, 8193, 64))
"""Numbers of tokens whose kernels are loaded before they are needed."""


@dataclass(frozen=True)
class Int8Problem:
    """Inputs (tokens, columns) rounded per token, times int8 codes (rows, packed columns)."""

    tokens: int
    rows: int
    columns: int
    """Packed."""
    dtype: str
    """f16 or bf16, of inputs and outputs."""
    activation: str
    """A name of the catalog's ACTIVATIONS; empty for none."""


def choose_int8(problem: Int8Problem, gpu: Gpu) -> tuple[Plan, Plan]:
    """The launches that quantize the inputs and multiply them. KernelError if there are none."""
    if problem.columns % MULTIPLE:
        raise KernelError(f"{problem}: packed columns must be a multiple of {MULTIPLE}")
    plans = [_gemm(problem, gpu)] if problem.tokens <= FEW_TOKENS else _hopper(problem, gpu) or [_gemm(problem, gpu)]
    multiply = plans[0]
    if multiply.grid[1] > MAX_GRID_Y:
        raise KernelError(f"{problem}: {problem.tokens} tokens exceed the grid")
    return _quantize(problem, gpu), multiply


@functools.cache
def int8_entries(rows: int, columns: int, dtype: str, activation: str, gpu: Gpu) -> frozenset[str]:
    """Every entry that `choose_int8` names for a weight and COMMON_TOKENS."""
    problems = [Int8Problem(tokens, rows, columns, dtype, activation) for tokens in COMMON_TOKENS]
    return frozenset(plan.entry for problem in problems for plan in choose_int8(problem, gpu))


def _quantize(problem: Int8Problem, gpu: Gpu) -> Plan:
    hopper = "_hopper" if gpu.arch == "sm_90a" else ""
    many = problem.tokens >= 8 * gpu.sms  # enough blocks with a warp for each token
    warps = 1 if problem.columns <= KEPT_COLUMNS and many else 8
    entry = _entry(f"quantize_rows{hopper}_{problem.dtype}_w{warps}", gpu)
    grid = (-(-problem.tokens // entry.token_tile), 1)
    return Plan("quantize_rows", entry.name, grid, entry.threads, shared_bytes(entry), "", dependent=bool(hopper))


def _gemm(problem: Int8Problem, gpu: Gpu) -> Plan:
    """Of the tiles that the tokens fill, the largest that still gives every SM a block."""
    fitting = [tile for tile in W8_STAGES if tile < 2 * problem.tokens] or [min(W8_STAGES)]

    def blocks(tile: int) -> int:
        return -(-problem.tokens // tile) * -(-problem.rows // 128)

    full = [tile for tile in fitting if blocks(tile) >= gpu.sms]
    tile = max(full) if full else min(fitting) if problem.tokens > FEW_TOKENS else max(fitting)
    entry = _entry(f"w8_gemm_{problem.dtype}_t{tile}{activation_ending(problem.activation)}", gpu)
    grid = (-(-problem.rows // entry.row_tile), -(-problem.tokens // entry.token_tile))
    return Plan("w8_gemm", entry.name, grid, entry.threads, shared_bytes(entry), UNMEASURED)


def _hopper(problem: Int8Problem, gpu: Gpu) -> list[Plan]:
    """The plans of all tiles, the one first that should be done first; none on other architectures."""
    units, found = -(-problem.columns // STAGE_COLUMNS), []
    for rows, cluster in W8_HOPPER_TILES:
        tiles, places = _tiles(problem, rows, cluster), _places(gpu, rows, cluster)
        for clusters, split_tiles in _schedules(tiles, units, places):
            plan = hopper_plan(problem, gpu, rows, cluster, clusters, split_tiles)
            if isinstance(plan, Plan):
                found.append((clocks(problem, gpu, plan), plan))
    # Of equals the one that asks less of L2.
    return [plan for _, plan in sorted(found, key=lambda one: (one[0], one[1].token_box + one[1].row_box))]


def hopper_plan(problem: Int8Problem, gpu: Gpu, rows: int, cluster: int, clusters: int, split_tiles: int) -> Plan | str:
    """w8_gemm_hopper with so many rows for each block of a cluster, and with the first tiles cut over so many clusters.

    Or why it cannot run.
    """
    name = f"w8_gemm_hopper_{problem.dtype}_n{rows}{CLUSTERS[cluster][0]}{activation_ending(problem.activation)}"
    entry = ENTRIES.get(name)
    if entry is None:
        raise KernelError(f"there is no {name}")
    if not runs_on(entry.archs, gpu.arch):
        return f"{name} does not run on {gpu.arch}"
    blocks, (token_blocks, row_blocks) = clusters * cluster, _shape(cluster)
    if split_tiles and rows == 64:
        return "tiles of 64 rows are not cut"
    if split_tiles and blocks * entry.token_tile * rows > WORKSPACE_FLOATS:
        return f"{blocks} blocks exceed the workspace"
    stage = (entry.token_tile + rows) * STAGE_COLUMNS
    stages = min(RING_STAGES, (RING_KIB[_resident(rows)] * 1024 - 2 * BARRIER_BYTES) // stage)
    shared = shared_bytes(entry, stages=stages)
    if shared > gpu.shared_bytes:
        return f"needs {shared} bytes of shared memory, the GPU has {gpu.shared_bytes}"
    return Plan(
        "w8_gemm_hopper",
        entry.name,
        (blocks, 1),
        entry.threads,
        shared,
        UNMEASURED,
        stages,
        entry.token_tile // row_blocks,
        max(1, SWEEP_TOKENS // (entry.token_tile * token_blocks)),
        rows // token_blocks,
        split_tiles,
        dependent=True,
    )


def _shape(cluster: int) -> tuple[int, int]:
    """Blocks of a cluster along tokens and along rows; what they share is copied by each in equal parts."""
    return {1: (1, 1), 2: (2, 1), 4: (2, 2)}[cluster]


def _resident(rows: int) -> int:
    """Blocks that fit an SM."""
    return 2 if rows == 64 else 1


def _places(gpu: Gpu, rows: int, cluster: int) -> int:
    """Clusters that run at once. One of four lies in a GPC, of whose 16 or 18 SMs it leaves what is over."""
    return gpu.sms // 16 * 4 if cluster == 4 and gpu.sms >= 16 else _resident(rows) * gpu.sms // cluster


def _tiles(problem: Int8Problem, rows: int, cluster: int) -> int:
    """Of a cluster."""
    token_blocks, row_blocks = _shape(cluster)
    return -(-problem.rows // (rows * row_blocks)) * -(-problem.tokens // (128 * token_blocks))


def _schedules(tiles: int, units: int, places: int) -> Iterator[tuple[int, int]]:
    """Clusters, and how many tiles are cut evenly over them.

    None, so that tiles come in whole waves; all, into equal parts; or those of the last two waves, the last of which is
    not full.
    """
    yield -(-tiles // -(-tiles // places)), 0
    for parts in range(2, min(places // tiles, units) + 1):
        yield parts * tiles, tiles
    if tiles % places and places <= tiles * units:
        yield places, tiles if tiles < places else tiles % places + places


def clocks(problem: Int8Problem, gpu: Gpu, plan: Plan, *, l2_bytes: int = L2_BYTES) -> float:
    """How long a launch of w8_gemm_hopper takes from the first stage on.

    A unit takes the longer of its products and its way from L2, where a cluster reads once what several need. A block
    that cuts tiles writes the sums of one that it did not begin, and reads those of all the others for one that it did.
    """
    entry, (grid, _) = ENTRIES[plan.entry], plan.grid
    rows, units = entry.row_tile, -(-problem.columns // STAGE_COLUMNS)
    tiles, clusters = _tiles(problem, rows, entry.cluster), grid // entry.cluster
    resident = -(-grid // gpu.sms)
    rate = min(SM_BYTES, l2_bytes / min(grid, gpu.sms)) / resident
    unit = max(PRODUCT_CLOCKS * rows * resident, (plan.token_box + plan.row_box) * STAGE_COLUMNS / rate)
    finish = OUTPUT_CLOCKS[problem.activation] * rows * resident
    whole = -(-(tiles - plan.split_tiles) // clusters) * (units * unit + finish)
    if not plan.split_tiles:
        return whole
    share, more = divmod(plan.split_tiles * units, clusters)
    even = more == 0 and units % share == 0
    sharers = units // share if even else (units - 2) // share + 2  # of a tile, at most
    sums = 4 * entry.token_tile * rows / rate
    return (
        whole + (share + (more > 0)) * unit + sharers * sums + POST_CLOCKS + -(-plan.split_tiles // clusters) * finish
    )


def _entry(name: str, gpu: Gpu) -> Entry:
    entry = ENTRIES.get(name)
    if entry is None:
        raise KernelError(f"there is no {name}")
    if not runs_on(entry.archs, gpu.arch):
        raise KernelError(f"{name} does not run on {gpu.arch}")
    return entry
