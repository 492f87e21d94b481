"""Every CUDA kernel as data: where its source is, how it is instantiated, which problems it takes, what it is passed.

A source in `sources/` ends with a macro that makes an entry point of a name and template arguments. An `Entry` holds
that call, so any selection of kernels is one short program: see `program`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "sources"
PORTABLE = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")
"""Architectures that the portable kernels are compiled for; their PTX serves later ones."""
HOPPER = ("sm_90a",)
"""The only architecture with wgmma: its code runs on no later one."""
DTYPES = ("f16", "bf16")
SKINNY_TOKENS = 32
"""Most tokens of skinny and skinny_hopper."""
SKINNY_WIDE_TOKENS = range(17, 49)
"""Tokens that skinny_wide_hopper takes."""

STRIP_ROWS = 64
"""Rows, and columns, of a tile of packed codes (see vlmquant.packing)."""
STAGE_COLUMNS = 128
"""Columns that one stage of a Hopper ring holds: two tiles."""
BARRIER_BYTES = 1024
"""Barriers before the ring; and as much again, since dynamic shared memory need not begin at a multiple of 1024."""
RING_STAGES = 32
"""Most stages of a ring: the barriers have room for no more."""

WEIGHT = (("codes", "pointer"), ("scales", "pointer"), ("zeros", "pointer"))
SHAPE = (("tokens", "int"), ("rows", "int"), ("columns", "int"), ("group_size", "int"))
PARTIAL = (("workspace", "pointer"), ("semaphores", "pointer"))
RING = (("inputs", "tensor_map"), *WEIGHT, ("outputs", "pointer"), *PARTIAL, *SHAPE, ("stages", "int"))

ACTIVATIONS = {"": "vq::PLAIN", "gelu": "vq::GELU", "gelu_tanh": "vq::GELU_TANH", "quick_gelu": "vq::QUICK_GELU"}
"""What int8 products may do to their outputs last (nothing, if empty), and its name in int8.cuh."""
QUANTIZE_WARPS = (1, 8)
"""Warps that share a token in quantize_rows."""
W8_STAGES = {32: 5, 64: 4, 128: 3}
"""Stages of w8_gemm's ring, by the tokens of a tile."""
W8_HOPPER_TILES = ((64, 1), (128, 1), *((rows, blocks) for blocks in (2, 4) for rows in range(96, 257, 32)))
"""Rows of a block's tile in w8_gemm_hopper, and the blocks of a cluster."""
CLUSTERS = {1: ("", "VQ_KERNEL_RESIDENT"), 2: ("_pair", "VQ_KERNEL_PAIRS"), 4: ("_quad", "VQ_KERNEL_QUADS")}
"""How kernels of clusters of so many blocks are called, and the head they have."""
ROUND_COLUMNS, ROUND_ROWS, ROUND_STEP = 128, 64, 16
"""Columns that round_block takes at most, rows of its blocks, and columns that wait in registers."""

ARGUMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "skinny": (*WEIGHT, ("inputs", "pointer"), ("outputs", "pointer"), *PARTIAL, *SHAPE),
    "skinny_hopper": RING,
    "skinny_wide_hopper": RING,
    "gemm": (*WEIGHT, ("inputs", "pointer"), ("outputs", "pointer"), *SHAPE),
    "gemm_hopper": (*RING, ("sweep_tiles", "int")),
    "dequantize": (*WEIGHT, ("dense", "pointer"), *SHAPE[1:], ("first_strip", "int")),
    "quantize_rows": (
        *(("inputs", "pointer"), ("codes", "pointer"), ("scales", "pointer")),
        *(("tokens", "int"), ("columns", "int"), ("packed_columns", "int")),
    ),
    "w8_gemm": (
        *(("input_codes", "pointer"), ("input_scales", "pointer"), ("codes", "pointer"), ("scales", "pointer")),
        *(("bias", "pointer"), ("outputs", "pointer"), *SHAPE[:3]),
    ),
    "w8_gemm_hopper": (
        *(("input_codes", "tensor_map"), ("codes", "tensor_map"), ("input_scales", "pointer"), ("scales", "pointer")),
        *(("bias", "pointer"), ("outputs", "pointer"), *PARTIAL, *SHAPE[:3]),
        *(("stages", "int"), ("sweep_tiles", "int"), ("split_tiles", "int")),
    ),
    "round_block": (
        *(("wanted", "pointer"), ("target", "pointer"), ("values", "pointer"), ("errors", "pointer")),
        *(("feedback", "pointer"), ("scales", "pointer"), ("zeros", "pointer"), ("group_of", "pointer")),
        *(("rows", "int"), ("columns", "int"), ("feedback_stride", "int"), ("bits", "int")),
    ),
}
"""Name and kind of each argument, in order. A tensor map is the 128 bytes themselves; what each means is said in the
source. Semaphores are zero before and after a launch; the workspace may hold anything."""


@dataclass(frozen=True)
class Entry:
    """One kernel. Fields that a family has no use for are 0."""

    name: str
    family: str
    """Its source without the ending, and its key in ARGUMENTS."""
    instance: str
    """The macro call that makes it."""
    archs: tuple[str, ...]
    dtype: str
    """f16 or bf16: of inputs, outputs and scales. f32: of all that round_block reads."""
    symmetric: bool
    threads: int
    """Of a block."""
    token_tile: int = 0
    """Tokens of a tile; for the skinny kernels the most tokens of a launch."""
    row_tile: int = STRIP_ROWS
    """Rows of a tile; the weight's rows need only be a multiple of STRIP_ROWS."""
    groups: tuple[int, ...] = (32, 64, 128)
    """The kinds of group that it takes, see `group_kind`; none if its weight has no groups."""
    activation: str = ""
    """What its outputs go through last, of ACTIVATIONS."""
    cluster: int = 1
    """Neighbouring blocks that work together; the grid must be a multiple."""

    @property
    def source(self) -> Path:
        return SOURCES / f"{self.family}.cu"

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        return ARGUMENTS[self.family]


def group_kind(group_size: int, columns: int) -> int | None:
    """32 and 64 for these sizes, 128 for a multiple of 128 or one group for all (packed) columns; None: no kernel."""
    if group_size in (32, 64):
        return group_size
    return 128 if group_size % 128 == 0 or group_size == columns else None


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _suffix(symmetric: bool) -> str:
    return "" if symmetric else "_asym"


def _gemm_groups(group: int) -> tuple[int, ...]:
    """The gemm kernels come in two kinds: for groups of 32, and for all others."""
    return (32,) if group == 32 else (64, 128)


def activation_ending(activation: str) -> str:
    return activation and f"_{activation}"


def _skinny(dtype: str, tiles: int, group: int, symmetric: bool) -> Entry:
    name = f"w4_skinny_{dtype}_m{tiles}_g{group}{_suffix(symmetric)}"
    instance = f"VQ_SKINNY({name}, vq::{dtype}, {tiles}, {group}, {_flag(not symmetric)})"
    return Entry(name, "skinny", instance, PORTABLE, dtype, symmetric, 256, 8 * tiles, 64, (group,))


def _skinny_hopper(dtype: str, tiles: int, group: int, symmetric: bool) -> Entry:
    name = f"w4_skinny_hopper_{dtype}_m{tiles}_g{group}{_suffix(symmetric)}"
    instance = f"VQ_SKINNY_HOPPER({name}, vq::{dtype}, {tiles}, {group}, {_flag(not symmetric)})"
    return Entry(name, "skinny_hopper", instance, HOPPER, dtype, symmetric, 288, 8 * tiles, 256, (group,))


def _skinny_wide_hopper(dtype: str, tiles: int, group: int, symmetric: bool) -> Entry:
    name = f"w4_skinny_wide_hopper_{dtype}_m{tiles}_g{group}{_suffix(symmetric)}"
    instance = f"VQ_SKINNY_WIDE_HOPPER({name}, vq::{dtype}, {tiles}, {group}, {_flag(not symmetric)})"
    return Entry(name, "skinny_wide_hopper", instance, HOPPER, dtype, symmetric, 256, 8 * tiles, 256, (group,))


def _gemm(dtype: str, group: int, symmetric: bool) -> Entry:
    name = f"w4_gemm_{dtype}_m64{'_g32' if group == 32 else ''}{_suffix(symmetric)}"
    instance = f"VQ_GEMM({name}, vq::{dtype}, {_flag(group == 32)}, {_flag(not symmetric)})"
    return Entry(name, "gemm", instance, PORTABLE, dtype, symmetric, 256, 64, 128, _gemm_groups(group))


def _gemm_hopper(dtype: str, tokens: int, warpgroups: int, group: int, symmetric: bool) -> Entry:
    name = f"w4_gemm_hopper_{dtype}_n{tokens}_c{warpgroups}{'_g32' if group == 32 else ''}{_suffix(symmetric)}"
    instance = (
        f"VQ_GEMM_HOPPER({name}, vq::{dtype}, {tokens}, {warpgroups}, {_flag(group == 32)}, {_flag(not symmetric)})"
    )
    threads, groups = 128 * (warpgroups + 1), _gemm_groups(group)
    return Entry(name, "gemm_hopper", instance, HOPPER, dtype, symmetric, threads, tokens, 64 * warpgroups, groups)


def _dequantize(dtype: str, symmetric: bool) -> Entry:
    name = f"w4_dequantize_{dtype}{_suffix(symmetric)}"
    instance = f"VQ_DEQUANTIZE({name}, vq::{dtype}, {_flag(not symmetric)})"
    return Entry(name, "dequantize", instance, PORTABLE, dtype, symmetric, 256)


def _quantize_rows(dtype: str, warps: int, hopper: bool) -> Entry:
    name = f"quantize_rows{'_hopper' if hopper else ''}_{dtype}_w{warps}"
    instance = f"VQ_QUANTIZE_ROWS({name}, vq::{dtype}, {warps}, {_flag(hopper)})"
    archs = HOPPER if hopper else PORTABLE
    return Entry(name, "quantize_rows", instance, archs, dtype, True, 256, 8 // warps, groups=())


def _w8_gemm(dtype: str, tokens: int, activation: str) -> Entry:
    name = f"w8_gemm_{dtype}_t{tokens}{activation_ending(activation)}"
    instance = f"VQ_W8_GEMM({name}, vq::{dtype}, {tokens}, {ACTIVATIONS[activation]})"
    return Entry(name, "w8_gemm", instance, PORTABLE, dtype, True, 256, tokens, 128, (), activation)


def _w8_gemm_hopper(dtype: str, rows: int, cluster: int, activation: str) -> Entry:
    ending, head = CLUSTERS[cluster]
    name = f"w8_gemm_hopper_{dtype}_n{rows}{ending}{activation_ending(activation)}"
    instance = f"VQ_W8_GEMM_HOPPER({name}, vq::{dtype}, {head}, {rows}, {cluster}, {ACTIVATIONS[activation]})"
    return Entry(name, "w8_gemm_hopper", instance, HOPPER, dtype, True, 384, 128, rows, (), activation, cluster)


def _round_block(kind: str, symmetric: bool) -> Entry:
    name = f"round_block_{kind}{_suffix(symmetric)}"
    instance = f"VQ_ROUND_BLOCK({name}, {_flag(kind == 'int')}, {_flag(not symmetric)})"
    return Entry(name, "round_block", instance, PORTABLE, "f32", symmetric, ROUND_ROWS, row_tile=ROUND_ROWS, groups=())


def _all() -> Iterable[Entry]:
    for dtype in DTYPES:
        for symmetric in (True, False):
            for group in (32, 64, 128):
                for tiles in (1, 2, 4):
                    yield _skinny(dtype, tiles, group, symmetric)
                for tiles in (1, 2, 3, 4):
                    yield _skinny_hopper(dtype, tiles, group, symmetric)
                for tiles in (3, 4, 5, 6):
                    yield _skinny_wide_hopper(dtype, tiles, group, symmetric)
            for group in (32, 64):
                yield _gemm(dtype, group, symmetric)
                for tokens, warpgroups in ((32, 2), (64, 2), (64, 4), (128, 2), (128, 4), (256, 2)):
                    yield _gemm_hopper(dtype, tokens, warpgroups, group, symmetric)
            yield _dequantize(dtype, symmetric)
        for warps in QUANTIZE_WARPS:
            yield _quantize_rows(dtype, warps, hopper=False)
            yield _quantize_rows(dtype, warps, hopper=True)
        for activation in ACTIVATIONS:
            for tokens in W8_STAGES:
                yield _w8_gemm(dtype, tokens, activation)
            for rows, cluster in W8_HOPPER_TILES:
                yield _w8_gemm_hopper(dtype, rows, cluster, activation)
    for kind, symmetric in (("int", True), ("int", False), ("float", True)):
        yield _round_block(kind, symmetric)


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _all()}


def program(entries: Iterable[Entry]) -> str:
    """CUDA C++ text that defines these kernels, all of one family; SOURCES is its include directory."""
    chosen = list(entries)
    (family,) = {entry.family for entry in chosen}
    return "\n".join([f'#include "{family}.cu"', *(entry.instance for entry in chosen), ""])


def stage_bytes(entry: Entry, group_size: int) -> int:
    """Bytes of one stage of a Hopper kernel's ring: inputs, codes, scales and zeros of STAGE_COLUMNS columns."""
    strips = entry.row_tile // STRIP_ROWS
    groups = 1 if group_size >= STAGE_COLUMNS else STAGE_COLUMNS // group_size
    used = 2 * 128 * entry.token_tile + strips * (2 * 2048 + groups * (128 if entry.symmetric else 192))
    return -(-used // 1024) * 1024


def shared_bytes(
    entry: Entry, *, tokens: int = 0, columns: int = 0, splits: int = 1, group_size: int = 0, stages: int = 0
) -> int:
    """Dynamic shared memory of a launch.

    skinny: tokens, columns and splits (blocks that share a strip). Hopper kernels: stages; group_size, if 4-bit.
    """
    if entry.family == "skinny":
        units = -(-columns // STAGE_COLUMNS)
        row = -(-units // splits) * STAGE_COLUMNS + 8  # a token's slice; 8 more keep rows off each other's banks
        return max(tokens * row * 2, 2 * STRIP_ROWS * entry.token_tile * 4)
    if entry.family == "gemm":
        return 4 * (entry.token_tile * 128 + 2 * 2048)
    if entry.family == "dequantize":
        return 8 * 16 * 144
    if entry.family == "quantize_rows":
        return 8 * 4
    if entry.family == "round_block":
        return 4 * ROUND_COLUMNS * (ROUND_ROWS + ROUND_STEP)
    if entry.family == "w8_gemm":
        return W8_STAGES[entry.token_tile] * (entry.token_tile + entry.row_tile) * 64
    if entry.family == "w8_gemm_hopper":
        return 2 * BARRIER_BYTES + stages * (entry.token_tile + entry.row_tile) * STAGE_COLUMNS
    return 2 * BARRIER_BYTES + stages * stage_bytes(entry, group_size)
