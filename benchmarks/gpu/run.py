"""Are the CUDA kernels right on this GPU, and how fast are they? One command, offline, eight minutes at most.

    python benchmarks/gpu/run.py [--seconds 480] [--sections correct,ceilings,...] [--shapes S,8K] [--tokens 1,16]
                                 [--sweep] [--out FILE] [--dry-run]

Needs a CUDA build of torch (which brings NVRTC) and cuda-bindings; nothing of vlmquant need be installed. Sections run
in order of value, and the results are written after each row, so that a stopped run loses nothing. README.md beside
this file says how to read them. --dry-run goes through all of it on the CPU with tiny sizes and our operators' CPU
implementation; its times mean nothing.
"""

import argparse
import ctypes
import datetime
import functools
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from vlmquant.errors import KernelError  # noqa: E402
from vlmquant.grid import Grid, QuantizedWeight, minmax_grid, quantize_nearest  # noqa: E402
from vlmquant.kernels import fp8_cuda  # noqa: E402
from vlmquant.kernels.cuda import build, dispatch, launch, ops, rounding, tune  # noqa: E402
from vlmquant.kernels.cuda.catalog import ENTRIES, ROUND_COLUMNS  # noqa: E402
from vlmquant.kernels.cuda.dispatch import Choice, Plan, Problem, plan  # noqa: E402
from vlmquant.kernels.cuda.dispatch_int8 import Int8Problem, choose_int8, hopper_plan  # noqa: E402
from vlmquant.kernels.cuda.timing import Call, Chain, chain, layers_for, race  # noqa: E402
from vlmquant.kernels.form import form_of  # noqa: E402
from vlmquant.kernels.reference import ACTIVATIONS, activation_codes, round_fp8  # noqa: E402
from vlmquant.linear import FollowingActivation, QuantLinear, can_share, share  # noqa: E402
from vlmquant.packing import W8_TILE, order_vq4, pack_vq4, pack_w8, vq4_shape  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = ("correct", "ceilings", "rounding", "table", "decode", "vision")
SECONDS = 480
GROUP_SIZE = 128
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

ERRORS = {"bf16": 2.5e-3, "f16": 3e-4}
"""Relative error (Frobenius) against float64: the weight and the output are each rounded once, sums are float32."""
LOADED_ERRORS = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""A bias and an activation after the product are rounded once more each."""
SCATTER = 3.0
"""Few outputs may be this many times their standard error, 1 / sqrt(outputs), worse than many."""
REPEATS = 3
"""Runs of a correctness case that must agree bit for bit."""

SHAPES = {"S": (4096, 4096), "8K": (8192, 8192), "L": (14336, 4096), "X": (28672, 8192)}
"""Rows and columns of the table's weights."""
TOKENS = (1, 16, 64, 256, 8, 32, 128, 1024, 4, 24, 48, 512, 2, 2048, 4096)
"""The most telling first."""
INT4PACK_TOKENS = 16
"""torch's own int4 product falls behind everything above."""


@dataclass(frozen=True)
class Sizes:
    """What --dry-run makes small."""

    shapes: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    rounds: int
    layers: Callable[[int], int]
    decoder: "Decoder"
    decode_steps: int
    blocks: dict[str, "Block"]
    image_tokens: tuple[int, ...]
    linears: tuple[tuple[int, int], ...]
    """Rows and columns of linears whose columns GPTQ rounds."""
    square: int
    """Side of the matrices that show the tensor cores' ceiling."""


@dataclass(frozen=True)
class Decoder:
    """The language model of a 7B vision-language model (these are Qwen2.5-VL-7B's sizes), with random weights."""

    hidden: int = 3584
    heads: int = 28
    key_heads: int = 4
    head_size: int = 128
    intermediate: int = 18944
    layers: int = 28
    vocabulary: int = 152064
    context: int = 1024
    """Tokens in the cache: an image and a question."""


@dataclass(frozen=True)
class Block:
    """A vision transformer's block: width and the width of its MLP."""

    hidden: int
    intermediate: int
    heads: int
    blocks: int = 8
    """Distinct blocks that follow each other."""


FULL = Sizes(
    shapes=SHAPES,
    tokens=TOKENS,
    rounds=9,
    layers=layers_for,
    decoder=Decoder(),
    decode_steps=32,
    blocks={"SigLIP-SO400M": Block(1152, 4304, 16), "Qwen2.5-VL": Block(1280, 3420, 16)},
    image_tokens=(1024, 4096),
    linears=((18944, 3584), (3584, 18944)),
    square=8192,
)
DRY = Sizes(
    shapes={"S": (256, 512), "odd": (192, 384)},
    tokens=(1, 40),
    rounds=2,
    layers=lambda size: 2,
    decoder=Decoder(hidden=256, heads=2, key_heads=1, intermediate=512, layers=2, vocabulary=512, context=16),
    decode_steps=2,
    blocks={"tiny": Block(128, 256, 4, blocks=2)},
    image_tokens=(64,),
    linears=((40, 300),),
    square=128,
)


@dataclass
class Run:
    """The results so far, and the time left."""

    device: torch.device
    sizes: Sizes
    deadline: float
    out: Path
    sweep: bool
    results: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out)

    def time_is_up(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.results.setdefault("left_out", []).append(what)
        self.save()
        return True


# ---- Weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A packed weight, and its float64 value where it is asked for."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    group_size: int
    dense: Tensor | None = None


def random_weight(
    rows: int, columns: int, group_size: int, symmetric: bool, dtype: str, device: torch.device
) -> Weight:
    """With its float64 value, for checks."""
    packed = vq4_shape(rows, columns, group_size)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    zeros = None if symmetric else torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device=device)
    scales = (torch.rand(rows, groups, device=device) * 0.015 + 0.005).to(DTYPES[dtype])
    offset = 8.0 if zeros is None else zeros.double().repeat_interleave(group_size, 1)[:, :columns]
    dense = (codes.double() - offset) * scales.double().repeat_interleave(group_size, 1)[:, :columns]
    return Weight(
        pack_vq4(codes, zeros, bits=4, group_size=group_size),
        order_vq4(scales, packed, padding=0),
        None if zeros is None else order_vq4(zeros, packed, padding=8),
        rows,
        packed.group_size,
        dense,
    )


def quick_weights(rows: int, columns: int, count: int, dtype: str, device: torch.device) -> list[Weight]:
    """Distinct weights whose codes nobody looks at, for timing."""
    made = tune.random_weights(Problem(1, rows, columns, GROUP_SIZE, True, dtype), device, count)
    return [Weight(codes, scales, None, rows, GROUP_SIZE) for codes, scales in made]


def product(inputs: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """As vlmquant multiplies it."""
    found: Tensor = torch.ops.vlmquant.w4_linear(
        inputs, weight.codes, weight.scales, weight.zeros, bias, weight.rows, weight.group_size
    )
    return found


# ---- Correctness -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A problem, and the variant to run it with; None for the one that dispatch chooses."""

    tokens: int
    rows: int
    columns: int
    group_size: int
    symmetric: bool = True
    dtype: str = "bf16"
    choice: Choice | None = None


def cases() -> Iterator[Case]:
    """Odd tokens, every group size, both dtypes, rows and columns that are no multiples of a kernel's tile."""
    skinny, ring, double = Choice("skinny"), Choice("skinny_hopper", ring_kib=110), Choice("skinny_hopper", 2, 76)
    small = [
        (1, 256, 1024, 128, True, "bf16"),
        (3, 192, 1088, 64, True, "bf16"),
        (7, 128, 512, 32, False, "f16"),
        (13, 256, 1024, 128, False, "bf16"),
        (16, 320, 640, 640, True, "f16"),
        (5, 256, 2048, 32, True, "bf16"),
        (8, 100, 200, 64, True, "f16"),
        (29, 4096, 4096, 128, True, "bf16"),
        (19, 320, 1088, 64, False, "bf16"),
        (27, 192, 1024, 32, True, "f16"),
        (31, 256, 1024, 128, False, "f16"),
    ]
    for problem in small:
        for choice in (None, skinny, ring, double):
            yield Case(*problem, choice)
    wide = [
        (17, 192, 1088, 64, True, "bf16"),
        (29, 4096, 4096, 128, True, "bf16"),
        (32, 256, 1024, 128, False, "f16"),
        (33, 320, 640, 640, True, "f16"),
        (40, 200, 1024, 32, False, "bf16"),
        (48, 28672, 8192, 128, True, "bf16"),
        (47, 4096, 14336, 64, False, "f16"),
    ]
    for problem in wide:
        for blocks in (1, 2):
            yield Case(*problem, Choice("skinny_wide_hopper", blocks, 110))
    for choice in (None, Choice("gemm")):
        yield Case(64, 256, 512, 128, True, "f16", choice)
        yield Case(50, 256, 512, 64, True, "bf16", choice)
        yield Case(130, 256, 512, 128, False, "bf16", choice)
        yield Case(70, 192, 320, 32, False, "f16", choice)
    for problem in ((5, 256, 512, 128, True, "bf16"), (9, 128, 640, 32, False, "f16"), (9, 128, 640, 64, True, "f16")):
        yield Case(*problem, Choice("dequantize"))
    tiles = [
        (17, 256, 1088, 64, True, "bf16", 32, 2),
        (33, 256, 1024, 128, True, "bf16", 64, 2),
        (64, 128, 512, 128, True, "bf16", 64, 4),
        (90, 128, 576, 32, True, "f16", 64, 2),
        (130, 128, 512, 32, False, "f16", 64, 4),
        (70, 256, 640, 640, True, "f16", 128, 2),
        (200, 320, 512, 128, True, "bf16", 128, 4),
        (65, 192, 1088, 64, False, "f16", 128, 4),
        (300, 256, 256, 128, True, "bf16", 256, 2),
        (257, 4096, 4096, 128, True, "bf16", 256, 2),
        (1025, 14336, 4096, 128, True, "bf16", 256, 2),
        (65, 28672, 8192, 128, True, "bf16", 128, 4),
    ]
    for *tile, tokens, warpgroups in tiles:
        for grid in ("sms", "even"):
            yield Case(*tile, Choice("gemm_hopper", tile_tokens=tokens, warpgroups=warpgroups, grid=grid))
    yield Case(16, 28672, 8192, 128, True, "bf16")
    yield Case(1, 28672, 8192, 128, False, "f16")
    yield Case(15, 4096, 14336, 64, False, "f16")


def check_correctness(run: Run) -> None:
    """Every case against float64, with poisoned outputs and sums, bit for bit the same three times."""
    rows: list[dict[str, Any]] = []
    run.results["correct"] = {"passed": 0, "failed": 0, "skipped": 0, "cases": rows}
    if run.device.type == "cuda":
        compile_all(run.device)
    for case in cases():
        if run.device.type != "cuda" and case.rows * case.columns > 1 << 21:
            continue
        if run.time_is_up(f"correct from {case}"):
            break
        outcome, detail = check_case(case, run.device)
        run.results["correct"][outcome] += 1
        rows.append({**asdict(case), "outcome": outcome, "detail": detail})
        if outcome != "passed":
            print(f"  {outcome}: {case}: {detail}", flush=True)
    for case_int8 in int8_cases():
        if run.device.type != "cuda" and case_int8.tokens * case_int8.rows * case_int8.columns > 1 << 28:
            continue
        if run.time_is_up(f"correct from {case_int8}"):
            break
        outcome, detail = check_int8_case(case_int8, run.device)
        run.results["correct"][outcome] += 1
        rows.append({**asdict(case_int8), "outcome": outcome, "detail": detail})
        if outcome != "passed":
            print(f"  {outcome}: {case_int8}: {detail}", flush=True)
    for rounded in rounding_cases():
        if run.time_is_up(f"correct from {rounded}"):
            break
        outcome, detail = check_rounding(rounded, run.device)
        run.results["correct"][outcome] += 1
        rows.append({**asdict(rounded), "outcome": outcome, "detail": detail})
        if outcome != "passed":
            print(f"  {outcome}: {rounded}: {detail}", flush=True)
    for name, dtype in itertools.product(LOADED, DTYPES):
        if run.time_is_up(f"correct from {name} {dtype}"):
            break
        outcome, detail = check_loaded(name, DTYPES[dtype], run.device)
        run.results["correct"][outcome] += 1
        rows.append({"loaded": name, "dtype": dtype, "outcome": outcome, "detail": detail})
        if outcome != "passed":
            print(f"  {outcome}: {name} {dtype}: {detail}", flush=True)
    run.save()
    counts = run.results["correct"]
    print(f"correctness: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")


@dataclass(frozen=True)
class Int8Case:
    """Inputs rounded to int8 per token, times an int8 weight."""

    tokens: int
    rows: int
    columns: int
    activation: str = ""
    dtype: str = "bf16"
    tile: tuple[int, int] | None = None
    """Of w8_gemm_hopper: rows, and blocks of a cluster; None for what dispatch chooses."""
    clusters: int = 0
    """Over which the first split_tiles tiles are cut."""
    split_tiles: int = 0


def int8_cases() -> Iterator[Int8Case]:
    for tokens in (1, 31, 64, 65, 200, 729):
        yield Int8Case(tokens, 300, 500, "gelu_tanh")
        yield Int8Case(tokens, 1152, 1152, dtype="f16")
    for activation in ACTIVATIONS:
        yield Int8Case(130, 4304, 1152, activation)
    yield Int8Case(1025, 1280, 3420)
    yield Int8Case(4096, 3840, 1280)
    yield Int8Case(512, 1152, 4304)  # on an H100, dispatch cuts its tiles
    cut = [
        (200, 300, 1000, "gelu", "bf16", (128, 1), 4, 6),  # two for every second tile
        (77, 131, 1100, "gelu", "bf16", (128, 1), 5, 2),  # three for a tile
        (257, 77, 700, "quick_gelu", "f16", (128, 2), 3, 2),
        (100, 150, 650, "", "bf16", (160, 2), 8, 1),  # six for a tile, two pairs without work
        (300, 400, 300, "gelu_tanh", "bf16", (192, 2), 2, 3),  # whole tiles after the cut ones
        (130, 520, 500, "", "f16", (256, 2), 2, 3),
        (520, 500, 650, "", "bf16", (96, 4), 4, 9),  # two or three quads for a tile
        (1024, 1152, 4304, "", "bf16", (96, 2), 66, 48),
        (1024, 1152, 4304, "", "bf16", (160, 4), 32, 16),
        (1024, 1152, 4304, "", "f16", (256, 2), 60, 20),
        (4096, 4304, 1152, "gelu_tanh", "bf16", (224, 2), 66, 122),
    ]
    for case in cut:
        yield Int8Case(*case)


def check_int8_case(case: Int8Case, device: torch.device) -> tuple[str, Any]:
    """As check_case: against float64, and the same bits each time."""
    dtype = DTYPES[case.dtype]
    codes, scales = activation_codes(torch.randn(case.rows, case.columns, device=device) * 0.02)
    inputs, bias = (
        torch.randn(case.tokens, case.columns, device=device).to(dtype),
        torch.randn(case.rows, device=device),
    )
    bias = bias.to(dtype)
    input_codes, input_scales = activation_codes(inputs)
    exact = (input_codes.double() @ codes.double().T) * input_scales.double() * scales.double().T + bias.double()
    exact = ACTIVATIONS[case.activation](exact)
    operands = inputs, pack_w8(codes), scales.flatten(), bias
    try:
        start = int8_starter(case, *operands, device)
        if isinstance(start, str):
            return "skipped", start
        found = [start() for _ in range(REPEATS)]
        found.append(ops.w8_linear(*operands, activation=case.activation))
    except (KernelError, RuntimeError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    allowed = ERRORS[case.dtype] * (1 + SCATTER / exact.numel() ** 0.5)
    relative = ((found[0].double() - exact).norm() / exact.norm()).item()
    if not relative < allowed:
        return "failed", f"relative error {relative:.2e}, allowed {allowed:.2e}"
    if not all(torch.equal(found[0], other) for other in found[1:]):
        return "failed", "the same product differs from run to run, or with the way that tiles are cut"
    if semaphores_left(device):
        return "failed", "semaphores are not back at zero"
    return "passed", relative


@dataclass(frozen=True)
class RoundingCase:
    """A block of columns that GPTQ rounds."""

    rows: int
    columns: int
    grid: str
    """A name of ROUNDING_GRIDS."""


ROUNDING_GRIDS = {
    "w4": Grid(4, GROUP_SIZE, torch.bfloat16),
    "w3 asymmetric": Grid(3, GROUP_SIZE, torch.bfloat16, symmetric=False),
    "w8": Grid(8, GROUP_SIZE, torch.bfloat16),
    "e2m1": Grid(4, GROUP_SIZE, torch.float32, kind="float"),
    "e4m3": Grid(8, GROUP_SIZE, torch.float32, kind="float"),
}


def rounding_cases() -> Iterator[RoundingCase]:
    for grid in ROUNDING_GRIDS:
        for rows, columns in ((1, 1), (63, 37), (130, ROUND_COLUMNS), (4096, ROUND_COLUMNS)):
            yield RoundingCase(rows, columns, grid)


def check_rounding(case: RoundingCase, device: torch.device) -> tuple[str, Any]:
    """Against torch's loop, bit for bit: few multiples of a power of two in each sum, so that none is ever rounded."""
    grid, (columns, rows) = ROUNDING_GRIDS[case.grid], (case.columns, case.rows)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, device=device).float()

    target = whole(-512, 512, columns, rows) / 256
    wanted = target + whole(-256, 256, columns, rows) / 256
    few = torch.rand(columns, columns, device=device).argsort(1).argsort(1) < 4
    feedback = (whole(-4, 4, columns, columns) / 4).where(few, 0)
    scales = torch.exp2(whole(-3, -1, 2, rows)) * (whole(0, 1, 2, rows) * 2 - 1)
    zeros = None if grid.symmetric else whole(0, 2**grid.bits - 1, 2, rows)
    group_of = torch.randint(2, (columns,), device=device)
    found = []
    try:
        for loop in [round_block(device)] * REPEATS + [rounding.by_torch]:
            left, values, errors = (
                wanted.clone(),
                torch.full_like(target, torch.nan),
                torch.full_like(target, torch.nan),
            )
            loop(left, target, values, errors, feedback, scales, zeros, group_of, grid)
            found.append((values, errors, left))
    except (KernelError, RuntimeError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    for name, *each, expected in zip(("values", "errors", "what is left"), *found, strict=True):
        if not all(torch.equal(one, expected) for one in each):
            return "failed", f"{name}: other bits than torch's, up to {(each[0] - expected).abs().max().item():.2e} off"
    return "passed", 0.0


def round_block(device: torch.device) -> Callable[..., None]:
    """What rounds a block of columns here."""
    return rounding.round_block if device.type == "cuda" else rounding.by_torch


class Rounding(NamedTuple):
    """What a linear asks of a recipe's scheme."""

    activations: str


class LoadedBlock(nn.Module):
    """Linears as loading leaves them: query, key and value in one product, and a linear with its activation."""

    def __init__(self, grid: Grid, inputs: str) -> None:
        super().__init__()
        scheme, columns, dtype, symmetric = Rounding(inputs), 640, grid.scale_dtype, grid.symmetric

        def linear(rows: int, activation: str = "") -> QuantLinear:
            bits = grid.bits if grid.kind == "int" else grid.bits - 1  # positive, and never NaN
            codes = torch.randint(1, (1 << bits) - 1, (rows, columns), dtype=torch.uint8)
            groups = -(-columns // grid.group_size)
            scales = (torch.rand(rows, groups) * 0.01 + 0.01).to(dtype).float()
            zeros = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8)
            weight = QuantizedWeight(codes, scales, zeros, grid)
            return QuantLinear(weight, scheme, torch.randn(rows), dtype=dtype, activation=activation)

        self.q_proj, self.k_proj, self.v_proj, self.fc1 = linear(320), linear(64), linear(72), linear(200, "gelu_tanh")
        assert can_share(self.together())
        share(self.together())
        self.activation = FollowingActivation(nn.GELU("tanh"), self, "fc1")
        self.to(dtype)

    def together(self) -> list[QuantLinear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([*(one(inputs) for one in self.together()), self.activation(self.fc1(inputs))], dim=-1)

    def exact(self, inputs: Tensor) -> Tensor:
        """float64, from the codes."""
        values = inputs.double()
        if self.fc1.form.int8_inputs:
            codes, scales = activation_codes(inputs)
            values = codes.double() * scales.double()
        elif self.fc1.form.inputs == "dynamic-fp8":
            values = round_fp8(inputs.float()).double()
        found = []
        for one in (*self.together(), self.fc1):
            assert one.bias is not None
            found.append(values @ one.dequantize().double().T + one.bias.double())
        return torch.cat([*found[:-1], ACTIVATIONS["gelu_tanh"](found[-1])], dim=-1)


LOADED: dict[str, tuple[Callable[[torch.dtype], Grid], str]] = {
    "4 bits": (lambda dtype: Grid(4, 128, dtype), "none"),
    "4 bits asymmetric": (lambda dtype: Grid(4, 64, dtype, symmetric=False), "none"),
    "int8": (lambda dtype: Grid(8, 640, dtype), "dynamic-int8"),
    "fp8": (lambda dtype: Grid(8, 640, dtype, kind="float"), "dynamic-fp8"),
}
"""The grid for scales in a dtype, and what inputs are rounded to."""


def check_loaded(name: str, dtype: torch.dtype, device: torch.device) -> tuple[str, Any]:
    """A block made on the CPU and moved: right, the same from a CUDA graph, and with the same codes when it is back."""
    torch.manual_seed(0)
    try:
        grid, of_inputs = LOADED[name]
        block, inputs = LoadedBlock(grid(dtype), of_inputs), torch.randn(24, 640).to(dtype)
        with torch.inference_mode():
            exact, before = block.exact(inputs), [one.to_weight().codes for one in block.together()]
            block.to(device)
            inputs = inputs.to(device)
            found = block(inputs)
            replayed = found.clone()
            if device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    replayed = block(inputs)
                replayed.zero_()
                graph.replay()
            relative = ((found.cpu().double() - exact).norm() / exact.norm()).item()
            same, left = torch.equal(found, replayed), semaphores_left(device)
            after = [one.to_weight().codes for one in block.to("cpu").together()]
    except (KernelError, RuntimeError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    allowed = LOADED_ERRORS[dtype]
    if not relative < allowed:
        return "failed", f"relative error {relative:.2e}, allowed {allowed:.2e}"
    if not same:
        return "failed", "a CUDA graph gives other bits"
    if left:
        return "failed", "semaphores are not back at zero"
    if not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
        return "failed", "the codes are others after the way to the GPU and back"
    return "passed", relative


def int8_starter(
    case: Int8Case, inputs: Tensor, codes: Tensor, scales: Tensor, bias: Tensor, device: torch.device
) -> Callable[[], Tensor] | str:
    """As starter."""
    if case.tile is None or device.type != "cuda":
        return lambda: ops.w8_linear(inputs, codes, scales, bias, activation=case.activation)
    kept = launch.device(device.index)
    problem = Int8Problem(case.tokens, case.rows, codes.shape[1], case.dtype, case.activation)
    multiply = hopper_plan(problem, kept.gpu, *case.tile, case.clusters, case.split_tiles)
    if isinstance(multiply, str):
        return multiply
    ready = ops.make_w8(kept, problem, case.columns, choose_int8(problem, kept.gpu)[0], multiply)

    def start() -> Tensor:
        outputs = inputs.new_full((case.tokens, case.rows), float("nan"))
        kept.workspace(torch.cuda.current_stream().cuda_stream)[0].fill_(float("nan"))
        ops.start_w8(kept, ready, inputs, codes, scales, bias, outputs)
        torch.cuda.synchronize()
        return outputs

    return start


def semaphores_left(device: torch.device) -> bool:
    """Whether a kernel left a semaphore of the current stream behind."""
    if device.type != "cuda":
        return False
    _, semaphores = launch.device(device.index).workspace(torch.cuda.current_stream(device).cuda_stream)
    return bool(semaphores.any())


def compile_all(device: torch.device) -> None:
    """What the cases run, compiled side by side."""
    kept = launch.device(device.index)
    found = set()
    for case in cases():
        packed = vq4_shape(case.rows, case.columns, case.group_size)
        problem = Problem(case.tokens, packed.rows, packed.columns, packed.group_size, case.symmetric, case.dtype)
        planned = dispatch.choose(problem, kept.gpu) if case.choice is None else plan(problem, kept.gpu, case.choice)
        if isinstance(planned, Plan):
            found.add(ENTRIES[planned.entry])
    for case_int8 in int8_cases():
        columns = case_int8.columns + -case_int8.columns % W8_TILE
        known = Int8Problem(case_int8.tokens, case_int8.rows, columns, case_int8.dtype, case_int8.activation)
        found |= {ENTRIES[planned.entry] for planned in choose_int8(known, kept.gpu)}
        if case_int8.tile is not None:
            asked = hopper_plan(known, kept.gpu, *case_int8.tile, case_int8.clusters, case_int8.split_tiles)
            if isinstance(asked, Plan):
                found.add(ENTRIES[asked.entry])
    kept.prepare(found | {rounding.entry_of(grid) for grid in ROUNDING_GRIDS.values()})


def check_case(case: Case, device: torch.device) -> tuple[str, Any]:
    """passed with its error, failed or skipped with the reason."""
    weight = random_weight(case.rows, case.columns, case.group_size, case.symmetric, case.dtype, device)
    assert weight.dense is not None
    inputs = torch.randn(case.tokens, case.columns, device=device).to(DTYPES[case.dtype])
    exact = inputs.double() @ weight.dense.T
    try:
        start = starter(case, weight, inputs, device)
        if isinstance(start, str):
            return "skipped", start
        found = [start() for _ in range(REPEATS)]
    except (KernelError, RuntimeError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    allowed = ERRORS[case.dtype] * (1 + SCATTER / exact.numel() ** 0.5)
    relative = ((found[0].double() - exact).norm() / exact.norm()).item()
    if not relative < allowed:
        return "failed", f"relative error {relative:.2e}, allowed {allowed:.2e}"
    if not all(torch.equal(found[0], other) for other in found[1:]):
        return "failed", "the same product differs from run to run"
    if semaphores_left(device):
        return "failed", "semaphores are not back at zero"
    return "passed", relative


def starter(case: Case, weight: Weight, inputs: Tensor, device: torch.device) -> Callable[[], Tensor] | str:
    """A product by the case's variant, with all that it writes poisoned before; or why there is no such variant."""
    if case.choice is None or device.type != "cuda":
        return lambda: product(inputs, weight)
    kept = launch.device(device.index)
    packed = vq4_shape(case.rows, case.columns, case.group_size)
    problem = Problem(case.tokens, packed.rows, packed.columns, packed.group_size, case.symmetric, case.dtype)
    planned = plan(problem, kept.gpu, case.choice)
    if isinstance(planned, str):
        return planned
    ready = ops.make_launch(kept, planned, problem)
    ready_inputs = ops.aligned(inputs, packed.columns)

    def start() -> Tensor:
        outputs = inputs.new_full((case.tokens, packed.rows), float("nan"))
        sums, _ = kept.workspace(torch.cuda.current_stream().cuda_stream)
        sums.fill_(float("nan"))
        ops.start_w4(kept, ready, ready_inputs, weight.codes, weight.scales, weight.zeros, outputs)
        torch.cuda.synchronize()
        return outputs[:, : case.rows]

    return start


# ---- Ceilings --------------------------------------------------------------------------------------------------------


def measure_ceilings(run: Run) -> None:
    """What no kernel can beat: reading memory, the library's bf16 product, an empty kernel."""
    device, side = run.device, run.sizes.square
    left = torch.randn(side, side, device=device).to(torch.bfloat16)
    out = torch.empty_like(left)
    found: dict[str, Any] = {}
    run.results["ceilings"] = found
    time_us = race({"": once(lambda: torch.mm(left, left.T, out=out))}, 11, device)[""].median
    found["bf16_tflop_per_s"] = 2 * side**3 / time_us / 1e6
    if device.type == "cuda":
        found |= memory_ceilings(run)
    run.save()
    print("ceilings: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


def memory_ceilings(run: Run) -> dict[str, float]:
    device = run.device
    source = torch.randint(0, 2**30, (1 << 29,), dtype=torch.int32, device=device)  # 2 GiB
    target = torch.empty_like(source)
    time_us = race({"": once(functools.partial(target.copy_, source))}, 11, device)[""].median
    found = {"copy_tb_per_s": 2 * source.nbytes / time_us / 1e6}
    del target
    probes = Probes(device)
    sums = torch.zeros(1024, dtype=torch.int32, device=device)
    for name, size in (("2gb", 2 << 30), ("121mb", 121 << 20), ("34mb", 34 << 20), ("8.7mb", 8_704_000)):
        count = max(1, min(60, (1 << 30) // size))
        calls = [
            functools.partial(probes.read, source.data_ptr() + i * size, sums.data_ptr(), size // 16)
            for i in range(count)
        ]
        time_us = race({"": chain(calls, size, device)}, 9, device)[""].median
        found[f"read_{name}_tb_per_s"] = size / time_us / 1e6
    for name, dependent in (("empty_kernel_us", False), ("empty_kernel_dependent_us", True)):
        starts: list[Call] = [functools.partial(probes.empty, dependent)] * 100
        found[name] = race({"": chain(starts, 1 << 22, device)}, 9, device)[""].median
    return found


class Probes:
    """The two kernels of probe.cu."""

    def __init__(self, device: torch.device) -> None:
        self.driver = launch._driver()
        self.kept = launch.device(device.index)
        self.kept.prepare([])
        text = (Path(__file__).parent / "probe.cu").read_text()
        code, _ = build.compile_program(build.Program("probes", text, (), self.kept.gpu.arch))
        self.code = code
        torch.cuda.synchronize(device)
        self.module = launch._check(self.driver.cuModuleLoadData(code), "probes")
        self.functions = {
            name: launch._check(self.driver.cuModuleGetFunction(self.module, name.encode()), name)
            for name in ("read_probe", "empty_probe")
        }
        self.sms = self.kept.gpu.sms

    def read(self, data: int, sums: int, count: int) -> None:
        """Read count * 16 bytes at an address."""
        self._start("read_probe", 4 * self.sms, 512, False, (data, sums, count), (8, 8, 4))

    def empty(self, dependent: bool) -> None:
        self._start("empty_probe", self.sms, 128, dependent, (), ())

    def _start(
        self, name: str, blocks: int, threads: int, dependent: bool, values: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        kinds = {8: ctypes.c_void_p, 4: ctypes.c_int}
        cells = [kinds[size](value) for value, size in zip(values, sizes, strict=True)]
        addresses = (ctypes.c_void_p * max(1, len(cells)))(*map(ctypes.addressof, cells))
        config = self.driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.hStream = self.driver.CUstream(torch.cuda.current_stream().cuda_stream)
        if dependent:
            attribute = self.driver.CUlaunchAttribute()
            attribute.id = self.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        result = self.driver.cuLaunchKernelEx(config, self.functions[name], ctypes.addressof(addresses), 0)
        launch._check(result, name)


def once(call: Call) -> Chain:
    return Chain(call, 1)


# ---- GPTQ's columns --------------------------------------------------------------------------------------------------


def measure_rounding(run: Run) -> None:
    """All columns of a linear, as GPTQ rounds them: by the kernel, by torch, and the products between blocks alone."""
    rows: list[dict[str, Any]] = []
    run.results["rounding"] = rows
    for shape in run.sizes.linears:
        if run.time_is_up(f"rounding from {shape}"):
            return
        rows.append(rounding_row(*shape, run.device))
        run.save()
        seconds = {name: min(each) for name, each in rows[-1]["seconds"].items()}
        print(
            f"rounding {shape[0]} x {shape[1]}: "
            + ", ".join(f"{name} {1e3 * best:.1f} ms" for name, best in seconds.items())
            + f"; {rows[-1]['equal_rows']:.2%} of the rows have the same codes",
            flush=True,
        )


def rounding_row(rows: int, columns: int, device: torch.device) -> dict[str, Any]:
    """In groups of 128, with a feedback of random numbers whose errors stay of one size."""
    grid = ROUNDING_GRIDS["w4"]
    weight = torch.randn(columns, rows, device=device) * 0.05
    feedback = torch.randn(columns, columns, device=device).div_(columns**0.5)
    group_of = torch.arange(columns, device=device) // grid.group_size
    scales = torch.full((-(-columns // grid.group_size), rows), 0.02, device=device)
    values, errors = torch.empty_like(weight), torch.zeros_like(weight)

    def all_columns(loop: Callable[..., None] | None, count: int) -> None:
        for start in range(0, count, ROUND_COLUMNS):
            here = slice(start, min(start + ROUND_COLUMNS, count))
            wanted = torch.addmm(weight[here], feedback[here, :start], errors[:start])
            if loop is not None:
                block = feedback[here, here]
                loop(wanted, weight[here], values[here], errors[here], block, scales, None, group_of[here], grid)

    ways = {"products": None, "kernel": round_block(device), "torch": rounding.by_torch}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Tensor] = {}
    for loop in ways.values():
        all_columns(loop, 2 * ROUND_COLUMNS)
    for name, loop in list(ways.items()) * REPEATS:
        _wait(device)
        start = time.perf_counter()
        all_columns(loop, columns)
        _wait(device)
        seconds[name].append(time.perf_counter() - start)
        found[name] = values.to(torch.int8)
    equal = (found["kernel"] == found["torch"]).all(0).float().mean().item()
    return {"rows": rows, "columns": columns, "seconds": seconds, "equal_rows": equal}


# ---- The table -------------------------------------------------------------------------------------------------------


def measure_table(run: Run) -> None:
    """Every shape and number of tokens: ours against bf16 and against whatever else is installed."""
    rows: list[dict[str, Any]] = []
    run.results["table"] = rows
    peers = available_peers(run)
    prepared = {name: prepare_shape(shape, run, peers) for name, shape in run.sizes.shapes.items()}
    print(table_head(peers))
    for tokens in run.sizes.tokens:
        for name, shape in run.sizes.shapes.items():
            if run.time_is_up(f"table from {name} with {tokens} tokens"):
                return
            row = table_row(run, name, shape, tokens, prepared[name], peers)
            rows.append(row)
            run.save()
            print(table_line(row, peers), flush=True)


@dataclass(frozen=True)
class Prepared:
    """The weights of a shape, for every candidate."""

    ours: list[Weight]
    bf16: list[Tensor]
    peers: dict[str, list[Any]]


Peer = tuple[Callable[[int, int, int, torch.device], list[Any]], Callable[[Tensor, Any], Call], int]
"""Makes weights (rows, columns, count, device); makes a call of inputs and a weight; most tokens worth a try."""


def int4pack_weights(rows: int, columns: int, count: int, device: torch.device) -> list[Any]:
    scales = torch.rand(columns // GROUP_SIZE, rows, 2, device=device).to(torch.bfloat16) * 0.01
    packed = torch.randint(0, 255, (rows, columns // 2), dtype=torch.uint8, device=device)
    return [(torch.ops.aten._convert_weight_to_int4pack(packed, 8), scales) for _ in range(count)]


def int4pack_call(inputs: Tensor, weight: Any) -> Call:
    return lambda: torch.ops.aten._weight_int4pack_mm(inputs, weight[0], GROUP_SIZE, weight[1])


def bitsandbytes_weights(rows: int, columns: int, count: int, device: torch.device) -> list[Any]:
    from bitsandbytes import functional

    dense = torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02
    return [functional.quantize_4bit(dense, blocksize=64, quant_type="nf4") for _ in range(count)]


def bitsandbytes_call(inputs: Tensor, weight: Any) -> Call:
    import bitsandbytes

    return lambda: bitsandbytes.matmul_4bit(inputs, weight[0].t(), quant_state=weight[1])


def gemlite_weights(rows: int, columns: int, count: int, device: torch.device) -> list[Any]:
    from gemlite.core import DType, GemLiteLinear

    made = []
    for _ in range(count):
        layer = GemLiteLinear(4, GROUP_SIZE, columns, rows, input_dtype=DType.BF16, output_dtype=DType.BF16)
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
        scales = (torch.rand(rows * columns // GROUP_SIZE, 1, device=device) * 0.01).to(torch.bfloat16)
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        made.append(layer)
    return made


def gemlite_call(inputs: Tensor, weight: Any) -> Call:
    return lambda: weight(inputs)


def marlin_weights(rows: int, columns: int, count: int, device: torch.device) -> list[Any]:
    """vLLM's kernel: its own packing of random words, scales, and a workspace."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    made = []
    for _ in range(count):
        words = torch.randint(-(2**31), 2**31 - 1, (columns // 16, rows * 2), dtype=torch.int32, device=device)
        scales = (torch.rand(columns // GROUP_SIZE, rows, device=device) * 0.01).to(torch.bfloat16)
        made.append((words, scales, marlin_utils.marlin_make_workspace_new(device), rows, columns))
    return made


def marlin_call(inputs: Tensor, weight: Any) -> Call:
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    words, scales, workspace, rows, columns = weight
    empty = torch.empty(0, dtype=torch.int32, device=inputs.device)
    return lambda: marlin_utils.apply_gptq_marlin_linear(
        inputs,
        words,
        scales,
        empty,
        empty,
        empty,
        workspace,
        scalar_types.uint4b8,
        output_size_per_partition=rows,
        input_size_per_partition=columns,
        is_k_full=True,
    )


PEERS: dict[str, Peer] = {
    "int4pack": (int4pack_weights, int4pack_call, INT4PACK_TOKENS),
    "marlin": (marlin_weights, marlin_call, 4096),
    "gemlite": (gemlite_weights, gemlite_call, 4096),
    "bitsandbytes": (bitsandbytes_weights, bitsandbytes_call, 256),
}
"""Other people's kernels, where installed. bitsandbytes is NF4 in blocks of 64, the others int4 in groups of 128."""


def available_peers(run: Run) -> dict[str, Peer]:
    """Those that work here; why the others do not goes into the results."""
    reasons: dict[str, str] = {}
    found: dict[str, Peer] = {}
    for name, peer in PEERS.items():
        if run.device.type != "cuda":
            reasons[name] = "needs CUDA"
            continue
        try:
            weight = peer[0](256, 1024, 1, run.device)[0]
            peer[1](torch.zeros(1, 1024, device=run.device, dtype=torch.bfloat16), weight)()
            torch.cuda.synchronize()
            found[name] = peer
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    run.results["peers_left_out"] = reasons
    for name, reason in reasons.items():
        print(f"  without {name}: {reason}")
    return found


def prepare_shape(shape: tuple[int, int], run: Run, peers: dict[str, Peer]) -> Prepared:
    rows, columns = shape
    count = run.sizes.layers(rows * columns // 2)
    dense = [
        (torch.randn(rows, columns, device=run.device) * 0.02).to(torch.bfloat16)
        for _ in range(min(count, run.sizes.layers(rows * columns * 2)))
    ]
    made = {name: peer[0](rows, columns, count, run.device) for name, peer in peers.items()}
    return Prepared(quick_weights(rows, columns, count, "bf16", run.device), dense, made)


def table_row(
    run: Run, name: str, shape: tuple[int, int], tokens: int, prepared: Prepared, peers: dict[str, Peer]
) -> dict[str, Any]:
    rows, columns = shape
    packed_bytes = rows * columns // 2 + rows * columns // GROUP_SIZE * 2
    inputs = torch.randn(tokens, columns, device=run.device).to(torch.bfloat16)
    outputs = inputs.new_empty(tokens, rows)
    chains = {
        "bf16": chain(
            [functools.partial(torch.mm, inputs, weight.T, out=outputs) for weight in prepared.bf16],
            rows * columns * 2,
            run.device,
        ),
        "ours": chain(
            [functools.partial(product, inputs, weight) for weight in prepared.ours], packed_bytes, run.device
        ),
    }
    for peer, (_, call, most) in peers.items():
        if tokens <= most:
            chains[peer] = chain([call(inputs, weight) for weight in prepared.peers[peer]], packed_bytes, run.device)
    variants: dict[str, Choice] = {}
    if run.sweep and run.device.type == "cuda":
        variants = add_variants(chains, shape, tokens, prepared, inputs, outputs)
    rounds = run.sizes.rounds if tokens <= 512 else max(1, run.sizes.rounds // 2 + 1)
    times = race(chains, rounds, run.device)
    row: dict[str, Any] = {"shape": name, "rows": rows, "columns": columns, "tokens": tokens}
    row["kernel"] = chosen_kernel(run, shape, tokens)
    row["us"] = {one: asdict(times[one]) for one in times if one not in variants}
    ours = times["ours"].median
    row["times_bf16"] = times["bf16"].median / ours
    row["tb_per_s"] = packed_bytes / ours / 1e6
    row["tflop_per_s"] = 2 * tokens * rows * columns / ours / 1e6
    row["of_roof"] = roof_us(run, packed_bytes + 2 * tokens * (rows + columns), 2 * tokens * rows * columns) / ours
    if variants:
        row["variants"] = {one: {**asdict(choice), "us": times[one].median} for one, choice in variants.items()}
    return row


def add_variants(
    chains: dict[str, Chain], shape: tuple[int, int], tokens: int, prepared: Prepared, inputs: Tensor, outputs: Tensor
) -> dict[str, Choice]:
    """Every variant of our kernels that can run this, by name."""
    kept = launch.device(inputs.device.index)
    problem = Problem(tokens, *shape, GROUP_SIZE, True, "bf16")
    found = {}
    for number, choice in enumerate(tune.candidates(problem, kept.gpu)):
        planned = plan(problem, kept.gpu, choice)
        assert isinstance(planned, Plan)
        start = tune.starter(kept, planned, problem, inputs, outputs)
        name = f"variant {number}"
        calls = [start((weight.codes, weight.scales)) for weight in prepared.ours]
        chains[name] = chain(calls, shape[0] * shape[1] // 2, inputs.device)
        found[name] = choice
    return found


def chosen_kernel(run: Run, shape: tuple[int, int], tokens: int) -> str:
    if run.device.type != "cuda":
        return "expanded by torch"
    return dispatch.choose(Problem(tokens, *shape, GROUP_SIZE, True, "bf16"), launch.device(run.device.index).gpu).entry


def roof_us(run: Run, moved_bytes: int, operations: int) -> float:
    """Microseconds that physics wants, by the ceilings measured in this run."""
    ceilings = run.results.get("ceilings", {})
    read, compute = ceilings.get("read_2gb_tb_per_s"), ceilings.get("bf16_tflop_per_s")
    return max(moved_bytes / read / 1e6 if read else 0.0, operations / compute / 1e6 if compute else 0.0)


def table_head(peers: dict[str, Peer]) -> str:
    others = "".join(f" {peer[:12]:>12}" for peer in peers)
    ours = f"{'ours us':>9} {'spread':>13} {'x bf16':>7} {'of roof':>7}  kernel"
    return f"{'shape':>6} {'tokens':>6} {'bf16 us':>9}{others} {ours}"


def table_line(row: dict[str, Any], peers: dict[str, Peer]) -> str:
    us = row["us"]
    others = "".join(f" {us[peer]['median']:>12.2f}" if peer in us else f" {'-':>12}" for peer in peers)
    ours = us["ours"]
    spread = f"{ours['low']:.1f}-{ours['high']:.1f}"
    line = f"{row['shape']:>6} {row['tokens']:>6} {us['bf16']['median']:>9.2f}{others} {ours['median']:>9.2f}"
    line += f" {spread:>13} {row['times_bf16']:>7.2f} {row['of_roof']:>6.0%}  {row['kernel']}"
    for variant in sorted(row.get("variants", {}).values(), key=lambda one: one["us"])[:4]:
        line += f"\n{'':>14}{variant['us']:.2f} us: { ({k: v for k, v in variant.items() if k != 'us' and v}) }"
    return line


# ---- Decoding --------------------------------------------------------------------------------------------------------


class TextModel(nn.Module):
    """One decoding step of a language model with grouped-query attention and a fixed-size cache, batch 1."""

    def __init__(self, sizes: Decoder, packed: bool, device: torch.device) -> None:
        super().__init__()
        self.sizes = sizes
        width, wide = sizes.hidden, (sizes.heads + 2 * sizes.key_heads) * sizes.head_size
        shapes = {"qkv": (wide, width), "out": (width, sizes.heads * sizes.head_size)}
        shapes |= {"gate_up": (2 * sizes.intermediate, width), "down": (width, sizes.intermediate)}
        self.layers: list[dict[str, Any]] = []
        dtype = torch.bfloat16
        for _ in range(sizes.layers):
            layer: dict[str, Any] = {}
            for name, (rows, columns) in shapes.items():
                if packed:
                    layer[name] = quick_weights(rows, columns, 1, "bf16", device)[0]
                else:
                    layer[name] = torch.randn(rows, columns, device=device, dtype=dtype) * 0.02
            cache = (1, sizes.key_heads, sizes.context, sizes.head_size)
            layer["keys"], layer["values"] = (torch.randn(cache, device=device, dtype=dtype) for _ in range(2))
            layer["norms"] = [torch.ones(width, device=device, dtype=dtype) for _ in range(2)]
            self.layers.append(layer)
        self.norm = torch.ones(width, device=device, dtype=dtype)
        self.embedding = torch.randn(sizes.vocabulary, width, device=device, dtype=dtype) * 0.02
        self.head = torch.randn(sizes.vocabulary, width, device=device, dtype=dtype) * 0.02
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.place = torch.full((1,), sizes.context - 1, dtype=torch.long, device=device)
        angles = torch.rand(1, 1, 1, sizes.head_size // 2, device=device)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def step(self) -> Tensor:
        """The next token, chosen greedily, and put where the following step reads it."""
        hidden = self.embedding[self.token]
        for layer in self.layers:
            hidden = hidden + self._attention(
                nn.functional.rms_norm(hidden, hidden.shape[-1:], layer["norms"][0]), layer
            )
            normed = nn.functional.rms_norm(hidden, hidden.shape[-1:], layer["norms"][1])
            gate, up = _linear(normed, layer["gate_up"]).chunk(2, dim=-1)
            hidden = hidden + _linear(nn.functional.silu(gate) * up, layer["down"])
        normed = nn.functional.rms_norm(hidden, hidden.shape[-1:], self.norm)
        self.token.copy_(nn.functional.linear(normed, self.head).argmax(-1))
        return self.token

    def _attention(self, hidden: Tensor, layer: dict[str, Any]) -> Tensor:
        sizes = self.sizes
        parts = _linear(hidden, layer["qkv"]).view(1, 1, -1, sizes.head_size).transpose(1, 2)
        queries, keys, values = parts.split([sizes.heads, sizes.key_heads, sizes.key_heads], dim=1)
        layer["keys"].index_copy_(2, self.place, self._turned(keys))
        layer["values"].index_copy_(2, self.place, values)
        mixed = nn.functional.scaled_dot_product_attention(
            self._turned(queries), layer["keys"], layer["values"], enable_gqa=True
        )
        return _linear(mixed.transpose(1, 2).reshape(1, -1), layer["out"])

    def _turned(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


def _linear(inputs: Tensor, weight: Any) -> Tensor:
    return product(inputs, weight) if isinstance(weight, Weight) else nn.functional.linear(inputs, weight)


def measure_decoding(run: Run) -> None:
    """Tokens per second at batch 1, packed against bf16, each with and without a CUDA graph of the step."""
    found: dict[str, Any] = {"model": asdict(run.sizes.decoder), "tokens_per_s": {}, "weight_bytes": {}}
    run.results["decode"] = found
    for kind in ("packed", "bf16"):
        if run.time_is_up(f"decode in {kind}"):
            return
        model = TextModel(run.sizes.decoder, kind == "packed", run.device)
        found["weight_bytes"][kind] = sum(_nbytes(layer[name]) for layer in model.layers for name in _linears(layer))
        with torch.inference_mode():
            found["tokens_per_s"][kind] = decode_rate(model.step, run)
            if run.device.type == "cuda":
                model.step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    model.step()
                found["tokens_per_s"][f"{kind}, graph"] = decode_rate(graph.replay, run)
                del graph
        del model
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        run.save()
    rates = found["tokens_per_s"]
    for suffix in ("", ", graph"):
        if f"packed{suffix}" in rates:
            found[f"times_bf16{suffix}"] = rates[f"packed{suffix}"]["median"] / rates[f"bf16{suffix}"]["median"]
    run.save()
    print("decode: " + ", ".join(f"{kind} {rate['median']:.1f} tokens/s" for kind, rate in rates.items()))


def _linears(layer: dict[str, Any]) -> list[str]:
    return [name for name in layer if name in ("qkv", "out", "gate_up", "down")]


def _nbytes(weight: Any) -> int:
    return weight.codes.nbytes + weight.scales.nbytes if isinstance(weight, Weight) else int(weight.nbytes)


def decode_rate(step: Call, run: Run) -> dict[str, float]:
    """Tokens per second over several runs of decode_steps."""
    rates = []
    for _ in range(4):
        _wait(run.device)
        start = time.perf_counter()
        for _ in range(run.sizes.decode_steps):
            step()
        _wait(run.device)
        rates.append(run.sizes.decode_steps / (time.perf_counter() - start))
    rates = rates[1:]
    return {"median": sorted(rates)[1], "low": min(rates), "high": max(rates)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- Vision ----------------------------------------------------------------------------------------------------------


def measure_vision(run: Run) -> None:
    """Vision transformer blocks and their linears in INT8 and FP8, quantizing the inputs included, against bf16."""
    rows: list[dict[str, Any]] = []
    run.results["vision"] = rows
    for name, block in run.sizes.blocks.items():
        for tokens in run.sizes.image_tokens:
            if run.time_is_up(f"vision from {name} with {tokens} tokens"):
                return
            rows.append(vision_row(run, name, block, tokens))
            run.save()
            row = rows[-1]
            print(
                f"vision: {name}, {tokens} tokens, a block: bf16 {row['us']['bf16']['median']:.0f} us; "
                + "; ".join(
                    f"{kind} {row['us'][kind]['median']:.0f} us, {row['times_bf16'][kind]:.2f}x, linears alone "
                    f"{row['linears_times_bf16'][kind]:.2f}x"
                    for kind in row["times_bf16"]
                )
            )


def vision_kinds(device: torch.device) -> tuple[str, ...]:
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= fp8_cuda.LEAST_CAPABILITY
    return ("bf16", "int8", *(["fp8"] if fp8 else []))


def vision_row(run: Run, name: str, block: Block, tokens: int) -> dict[str, Any]:
    width, device, kinds = block.hidden, run.device, vision_kinds(run.device)
    shapes = {"qkv": (3 * width, width), "out": (width, width)}
    shapes |= {"up": (block.intermediate, width), "down": (width, block.intermediate)}
    weights = []
    for _ in range(block.blocks):
        made: dict[str, Any] = {}
        for part, (rows, columns) in shapes.items():
            dense = (torch.randn(rows, columns, device=device) * 0.02).to(torch.bfloat16)
            codes, scales = activation_codes(dense)
            made[part] = {"bf16": dense, "int8": (pack_w8(codes), scales.flatten())}
            if "fp8" in kinds:
                grid = Grid(8, columns, torch.bfloat16, kind="float")
                weight = quantize_nearest(dense, *minmax_grid(dense, grid), grid)
                made[part]["fp8"] = (fp8_cuda.hold(weight), form_of(weight, "dynamic-fp8"))
        weights.append(made)
    hidden = torch.randn(tokens, width, device=device).to(torch.bfloat16)
    wide = torch.randn(tokens, block.intermediate, device=device).to(torch.bfloat16)
    nbytes = sum(rows * columns for rows, columns in shapes.values())
    whole = {
        kind: chain([functools.partial(vision_block, hidden, made, kind, block) for made in weights], nbytes, device)
        for kind in kinds
    }
    alone = {
        kind: chain(
            [
                functools.partial(vision_linear, wide if part == "down" else hidden, made[part], kind)
                for made in weights
                for part in shapes
            ],
            nbytes // len(shapes),
            device,
        )
        for kind in kinds
    }
    blocks, linears = race(whole, run.sizes.rounds, device), race(alone, run.sizes.rounds, device)
    each = {}
    for part, activation in (*((part, "") for part in shapes), ("up", "gelu_tanh")):
        inputs, chains = wide if part == "down" else hidden, {}
        for kind in kinds:
            calls = [functools.partial(vision_linear, inputs, made[part], kind, activation) for made in weights]
            chains[kind] = chain(calls, shapes[part][0] * shapes[part][1], device)
        times = race(chains, run.sizes.rounds, device)
        each[f"{part} and GELU" if activation else part] = {kind: asdict(time) for kind, time in times.items()}
    return {
        "model": name,
        "tokens": tokens,
        "us": {kind: asdict(time) for kind, time in blocks.items()},
        "linears_us": {kind: asdict(time) for kind, time in linears.items()},
        "each_us": each,
        "times_bf16": {kind: blocks["bf16"].median / blocks[kind].median for kind in kinds[1:]},
        "linears_times_bf16": {kind: linears["bf16"].median / linears[kind].median for kind in kinds[1:]},
    }


def vision_block(hidden: Tensor, weights: dict[str, Any], kind: str, block: Block) -> Tensor:
    """Attention and MLP with their norms, as a vision transformer has them."""
    normed = nn.functional.layer_norm(hidden, hidden.shape[-1:])
    parts = vision_linear(normed, weights["qkv"], kind).view(len(hidden), 3, block.heads, -1).permute(1, 2, 0, 3)
    mixed = nn.functional.scaled_dot_product_attention(*(part[None] for part in parts))[0]
    hidden = hidden + vision_linear(mixed.transpose(0, 1).reshape(hidden.shape), weights["out"], kind)
    normed = nn.functional.layer_norm(hidden, hidden.shape[-1:])
    up = vision_linear(normed, weights["up"], kind, "gelu_tanh")
    return hidden + vision_linear(up, weights["down"], kind)


def vision_linear(inputs: Tensor, weight: dict[str, Any], kind: str, activation: str = "") -> Tensor:
    """As a vision encoder's linear, and the activation behind it."""
    if kind == "int8":
        return ops.w8_linear(inputs, *weight["int8"], activation=activation)
    if kind == "fp8":
        return ACTIVATIONS[activation](fp8_cuda.matmul(inputs, *weight["fp8"]))
    return ACTIVATIONS[activation](nn.functional.linear(inputs, weight["bf16"]))


# ---- The command -----------------------------------------------------------------------------------------------------

MEASURE: dict[str, Callable[[Run], None]] = {
    "correct": check_correctness,
    "ceilings": measure_ceilings,
    "rounding": measure_rounding,
    "table": measure_table,
    "decode": measure_decoding,
    "vision": measure_vision,
}


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": sys.argv[1:],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "device": "CPU: a dry run, its times mean nothing",
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {
            "device": facts.name,
            "sms": facts.multi_processor_count,
            "memory_bytes": facts.total_memory,
            "driver": launch._check(launch._driver().cuDriverGetVersion(), "driver version"),
            "nvrtc": ".".join(map(str, build.nvrtc_version())),
            "arch": launch.device(device.index).gpu.arch,
        }
    return found


def commit() -> str:
    """Of the sources, where git can say."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="stop before this long")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, in order")
    parser.add_argument("--shapes", help="of the table, such as S,8K")
    parser.add_argument("--tokens", help="of the table, such as 1,16")
    parser.add_argument("--sweep", action="store_true", help="time every variant of our kernels too")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    found = parser.parse_args(words)
    unknown = [name for name in found.sections.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return found


def main(words: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if a product was wrong or there is no GPU."""
    asked = arguments(words)
    sizes = DRY if asked.dry_run else FULL
    if asked.shapes or asked.tokens:
        shapes = {name: sizes.shapes[name] for name in (asked.shapes or ",".join(sizes.shapes)).split(",")}
        tokens = tuple(map(int, asked.tokens.split(","))) if asked.tokens else sizes.tokens
        sizes = Sizes(**{**sizes.__dict__, "shapes": shapes, "tokens": tokens})
    if asked.dry_run:
        device = torch.device("cpu")
    else:
        try:
            device = tune.require_cuda()
        except KernelError as error:
            print(f"no benchmark: {error}; --dry-run goes through it without one", file=sys.stderr)
            return 1
    torch.manual_seed(0)
    about = machine(device)
    name = "".join(c if c.isalnum() else "_" for c in about["device"].lower())
    out = asked.out or (Path("dry-run.json") if asked.dry_run else RESULTS / f"gpu_{name}_{about['date'][:10]}.json")
    run = Run(device, sizes, time.monotonic() + asked.seconds, out, asked.sweep, {"machine": about})
    print(f"{about['device']}, torch {about['torch']}, commit {about['commit']}")
    for section in asked.sections.split(","):
        if run.time_is_up(section):
            continue
        start = time.monotonic()
        with torch.inference_mode():
            MEASURE[section](run)
        run.results.setdefault("seconds", {})[section] = round(time.monotonic() - start, 1)
        run.save()
    for what in run.results.get("left_out", []):
        print(f"  left out for want of time: {what}")
    print(f"wrote {run.out}")
    return 1 if run.results.get("correct", {}).get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
