"""The INT8 kernels, run by the emulator from their CUDA sources: codes bit for bit, products against exact integers."""

import functools
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import emulator
from tests.emulator import Change, Counters, Emulator, TensorMap, guarded, load
from tests.kernels.emulated import DTYPES, SEEDS, outcome, quick_first
from vlmquant.kernels.cuda.catalog import ACTIVATIONS, ENTRIES, Entry, shared_bytes
from vlmquant.kernels.reference import activation_codes
from vlmquant.packing import pack_w8

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)

ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8}
"""Half a unit in the last place of the output's dtype, relative to it: what an output may be off, and FLOAT_ERROR."""
FLOAT_ERROR = 1e-6
"""Of the largest of an output's terms: its sum, scales, bias and activation are float32."""
MULTIPLE = 16
"""Packed columns are a multiple of this."""
EXACT = {
    "": lambda x: x,
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


# ---- quantize_rows ---------------------------------------------------------------------------------------------------


def quantized(kernel: Emulator, name: str, inputs: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (tokens, packed columns) and scales (tokens,), from outputs that held 77 and NaN."""
    tokens, columns = inputs.shape
    packed_columns = -(-columns // MULTIPLE) * MULTIPLE
    codes = guarded(torch.full((tokens, packed_columns), 77, dtype=torch.int8))
    scales = guarded(torch.full((tokens,), float("nan")))
    entry = ENTRIES[name]
    kernel.launch(
        name,
        (-(-tokens // entry.token_tile),),
        shared_bytes(entry),
        {
            "inputs": guarded(inputs),
            "codes": codes,
            "scales": scales,
            "tokens": tokens,
            "columns": columns,
            "packed_columns": packed_columns,
        },
        seed=seed,
    )
    return codes, scales


@functools.cache
def quantize_kernels() -> Emulator:
    return load(entry for entry in ENTRIES.values() if entry.family == "quantize_rows")


def check_codes(name: str, inputs: Tensor, seeds: Iterable[int] = SEEDS) -> None:
    expected_codes, expected_scales = activation_codes(inputs)
    for seed in seeds:
        codes, scales = quantized(quantize_kernels(), name, inputs, seed)
        assert torch.equal(scales, expected_scales.flatten())
        assert torch.equal(codes[:, : inputs.shape[1]], expected_codes)
        assert not codes[:, inputs.shape[1] :].any()


QUANTIZE = [name for name, entry in ENTRIES.items() if entry.family == "quantize_rows"]


@pytest.mark.parametrize("columns", [1, 7, 20, 100, 1152, 2054, 3420])
@pytest.mark.parametrize("name", QUANTIZE)
def test_codes_and_scales_are_those_of_the_reference(name: str, columns: int) -> None:
    """Rows of every alignment, and of more columns than a warp keeps; magnitudes over the whole range of the dtype."""
    random = torch.Generator().manual_seed(columns)
    exponents = torch.linspace(-16, 12, 11)[:, None]  # of 2; f16 has little more
    inputs = (torch.randn(11, columns, generator=random) * 2**exponents).to(DTYPES[ENTRIES[name].dtype])
    inputs[3] = 0
    inputs[4] = -inputs[4].abs()
    check_codes(name, inputs)


def test_rows_longer_than_registers() -> None:
    inputs = torch.randn(2, 16500, generator=torch.Generator().manual_seed(0))
    inputs[0, 16499], inputs[1, 16400] = 9, -9  # the largest is in what is read again
    check_codes("quantize_rows_bf16_w8", inputs.bfloat16())
    check_codes("quantize_rows_f16_w1", inputs.half()[:, :2500].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_even_code(dtype: str) -> None:
    """A largest magnitude of 127.5 makes the scale 1, so halves are ties; and the largest itself is one."""
    halves = torch.arange(-255, 256) / 2
    inputs = torch.stack([halves, halves * 4, -halves / 64]).to(DTYPES[dtype])
    check_codes(f"quantize_rows_{dtype}_w1", inputs)
    codes, scales = quantized(quantize_kernels(), f"quantize_rows_{dtype}_w1", inputs[:1])
    assert scales.tolist() == [1.0]
    by_value = dict(zip(inputs[0].tolist(), codes[0].tolist(), strict=False))
    assert [by_value[v] for v in (-127.5, -2.5, -1.5, 0.5, 1.5, 2.5, 127.0, 127.5)] == [-128, -2, -2, 0, 2, 2, 127, 127]


def test_smallest_and_largest_numbers() -> None:
    tiny, large = 1e-38, 3.3e38
    inputs = torch.tensor([[tiny, -tiny, 0, 0], [1e-10, -3e-11, 1e-12, 0], [large, -large, 1e30, 1.0]]).bfloat16()
    check_codes("quantize_rows_bf16_w1", inputs)
    subnormal = torch.tensor([[6e-8, -1.2e-7, 5.9e-5, 0], [65504.0, -65504, 255, 1]]).half()
    check_codes("quantize_rows_f16_w8", subnormal)


def test_nan_and_infinity_reach_the_scale() -> None:
    """So that no output of the token is finite, as without quantization."""
    inputs = torch.ones(3, 40, dtype=torch.float16)
    inputs[1, 17], inputs[2, 3] = float("nan"), float("-inf")
    for name in ("quantize_rows_f16_w1", "quantize_rows_hopper_f16_w8"):
        _, scales = quantized(quantize_kernels(), name, inputs)
        assert scales.isnan().tolist() == [False, True, False]
        assert scales.isinf().tolist() == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_quotient_of_a_magnitude(dtype: str) -> None:
    """All 16-bit values up to the largest of their row, for many largest ones: division is exactly rounded."""
    values = torch.arange(0, 32768, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    values = values[values.isfinite() & (values.float() < 1e30)]
    for largest in range(1000, len(values), 517):
        check_codes(f"quantize_rows_{dtype}_w8", values[: largest + 1][None].contiguous(), seeds=(0,))


# ---- Products --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A launch of a product; blocks and stages are for w8_gemm_hopper."""

    name: str
    tokens: int
    rows: int
    columns: int
    bias: bool = True
    blocks: int = 2
    stages: int = 3
    sweep_tiles: int = 8
    split_tiles: int = 0

    @property
    def entry(self) -> Entry:
        return ENTRIES[self.name]

    def sharers(self) -> list[int]:
        """How many clusters have units of each cut tile."""
        units = -(-self.columns // 128)
        shares = np.array_split(np.arange(self.split_tiles * units) // units, self.blocks // self.entry.cluster)
        return [sum(tile in share for share in shares) for tile in range(self.split_tiles)]

    def __str__(self) -> str:
        cut = f"-{self.split_tiles}-over-{self.blocks}" if self.split_tiles else ""
        return f"{self.name}-{self.tokens}x{self.rows}x{self.columns}{cut}"


@dataclass(frozen=True)
class Operands:
    """What a product multiplies, packed; in guarded memory."""

    input_codes: Tensor
    codes: Tensor
    input_scales: Tensor
    scales: Tensor
    bias: Tensor | None
    expected: Tensor
    """(tokens, rows) float64."""
    allowed: Tensor
    """What each output may be off, likewise."""


@functools.lru_cache(maxsize=32)
def operands_of(product: Product) -> Operands:
    """All codes from -128 to 127. Scales make most outputs about 1, where activations bend."""
    random = torch.Generator().manual_seed(product.tokens + product.rows + product.columns)
    dtype = DTYPES[product.entry.dtype]

    def codes(lines: int) -> Tensor:
        return torch.randint(-128, 128, (lines, product.columns), generator=random, dtype=torch.int8)

    left, right = codes(product.tokens), codes(product.rows)
    packed = pack_w8(right)
    input_scales = (torch.rand(product.tokens, generator=random) + 0.1) / product.columns**0.5
    scales = (torch.rand(product.rows, generator=random) + 0.1) / 2000
    bias = torch.randn(product.rows, generator=random).to(dtype) if product.bias else None
    scaled = (left.long() @ right.long().T).double() * input_scales.double()[:, None] * scales.double()
    plain = scaled if bias is None else scaled + bias.double()
    expected = EXACT[product.entry.activation](plain)
    terms = scaled.abs() + (0 if bias is None else bias.double().abs())
    return Operands(
        guarded(torch.nn.functional.pad(left, (0, packed.shape[1] - product.columns))),
        guarded(packed),
        guarded(input_scales),
        guarded(scales),
        None if bias is None else guarded(bias),
        expected,
        ROUNDING[product.entry.dtype] * expected.abs() + FLOAT_ERROR * terms + torch.finfo(dtype).smallest_normal,
    )


def multiply(kernel: Emulator, product: Product, seed: int = 0) -> tuple[Tensor, Counters]:
    """(tokens, rows), from outputs that held NaN and sums that were anything; the semaphores must be zero after."""
    entry, given, cluster = product.entry, operands_of(product), product.entry.cluster
    outputs = guarded(torch.full((product.tokens, product.rows), float("nan"), dtype=DTYPES[entry.dtype]))
    sums = guarded(torch.full((product.blocks * 128 * entry.row_tile,), 0x5A5A5A5A, dtype=torch.int32))
    semaphores = guarded(torch.zeros(max(1, product.split_tiles) * cluster * 8, dtype=torch.int32))
    arguments: dict[str, Tensor | TensorMap | int | None] = {
        "input_codes": given.input_codes,
        "input_scales": given.input_scales,
        "codes": given.codes,
        "scales": given.scales,
        "bias": given.bias,
        "outputs": outputs,
        "tokens": product.tokens,
        "rows": product.rows,
        "columns": given.codes.shape[1],
        "stages": product.stages,
        "sweep_tiles": product.sweep_tiles,
        "split_tiles": product.split_tiles,
        "workspace": sums,
        "semaphores": semaphores,
    }
    grid: tuple[int, ...] = (-(-product.rows // entry.row_tile), -(-product.tokens // entry.token_tile))
    if entry.family == "w8_gemm_hopper":
        grid = (product.blocks,)
        arguments["input_codes"] = TensorMap(given.input_codes.view(torch.int16), 64 if cluster == 4 else 128)
        arguments["codes"] = TensorMap(given.codes.view(torch.int16), entry.row_tile // (2 if cluster > 1 else 1))
    passed = {name: arguments[name] for name, _ in entry.arguments}
    counters = kernel.launch(product.name, grid, shared_bytes(entry, stages=product.stages), passed, seed=seed)
    assert not semaphores.any(), "a semaphore is not back at zero"
    return outputs, counters


def wrong(outputs: Tensor, product: Product) -> int:
    """How many outputs are further off than rounding explains (or NaN)."""
    given = operands_of(product)
    return int((~((outputs.double() - given.expected).abs() <= given.allowed)).sum())


def check(kernel: Emulator, product: Product, seeds: Iterable[int] = SEEDS) -> Tensor:
    results = [multiply(kernel, product, seed) for seed in seeds]
    assert wrong(results[0][0], product) == 0
    for outputs, counters in results:
        assert torch.equal(outputs, results[0][0])
        assert counters.bank_conflicts == 0
    return results[0][0]


PRODUCTS = [
    Product("w8_gemm_bf16_t32", 5, 70, 100),
    Product("w8_gemm_f16_t32_gelu", 33, 129, 33, bias=False),
    Product("w8_gemm_bf16_t64_quick_gelu", 65, 256, 640),
    Product("w8_gemm_f16_t128", 1, 1, 1),
    Product("w8_gemm_bf16_t128_gelu_tanh", 130, 131, 272),
    Product("w8_gemm_f16_t128", 129, 136, 500, bias=False),
    Product("w8_gemm_hopper_bf16_n64", 130, 131, 400),
    Product("w8_gemm_hopper_f16_n64", 1, 1, 1, blocks=3),
    Product("w8_gemm_hopper_bf16_n128_gelu", 100, 300, 1000, bias=False, stages=2),
    Product("w8_gemm_hopper_f16_n128_pair_quick_gelu", 300, 130, 77, blocks=4, sweep_tiles=1),
    Product("w8_gemm_hopper_f16_n96_pair", 130, 100, 280),
    Product("w8_gemm_hopper_bf16_n160_pair", 200, 336, 150, stages=2),
    Product("w8_gemm_hopper_bf16_n192_pair_gelu_tanh", 600, 200, 300, blocks=4, stages=2, sweep_tiles=2),
    Product("w8_gemm_hopper_f16_n224_pair", 257, 230, 270, bias=False, stages=2),
    Product("w8_gemm_hopper_f16_n256_pair", 130, 520, 500, blocks=4, stages=4),
    Product("w8_gemm_hopper_f16_n256_pair", 7, 24, 1152, stages=2),
    Product("w8_gemm_hopper_bf16_n96_quad", 300, 400, 450, blocks=8, stages=2),
    Product("w8_gemm_hopper_f16_n128_quad_gelu", 70, 100, 600, blocks=4),
]


CUT_PRODUCTS = [
    Product("w8_gemm_hopper_bf16_n128_gelu", 200, 300, 1000, bias=False, blocks=4, stages=2, split_tiles=6),
    Product("w8_gemm_hopper_bf16_n128_gelu", 77, 131, 1100, blocks=5, split_tiles=2),
    Product("w8_gemm_hopper_f16_n128_pair_quick_gelu", 257, 77, 700, blocks=6, split_tiles=2),
    Product("w8_gemm_hopper_bf16_n160_pair", 100, 150, 650, blocks=16, split_tiles=1),
    Product("w8_gemm_hopper_bf16_n192_pair_gelu_tanh", 300, 400, 300, blocks=4, stages=2, split_tiles=3),
    Product("w8_gemm_hopper_f16_n256_pair", 130, 520, 500, blocks=4, stages=4, split_tiles=3),
    Product("w8_gemm_hopper_bf16_n96_quad", 520, 100, 450, blocks=16, split_tiles=3),
    Product("w8_gemm_hopper_f16_n128_quad_gelu", 129, 257, 400, blocks=12, stages=2, split_tiles=2),
]


@functools.cache
def kernels_of(names: tuple[str, ...]) -> Emulator:
    return load(ENTRIES[name] for name in names)


def kernel_for(product: Product) -> Emulator:
    """One library for the family's members in PRODUCTS."""
    family = product.entry.family
    return kernels_of(tuple(sorted({one.name for one in PRODUCTS if one.entry.family == family})))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_product_is_that_of_integers(product: Product) -> None:
    """Every output within rounding of float64, with the same bits whatever the order of warps and blocks."""
    check(kernel_for(product), product)


@pytest.mark.parametrize("product", CUT_PRODUCTS, ids=str)
def test_cut_tiles_give_the_bits_of_whole_ones(product: Product) -> None:
    kernel = kernel_for(product)
    whole, _ = multiply(kernel, replace(product, split_tiles=0))
    assert torch.equal(check(kernel, product), whole)


def test_tiles_are_cut_in_every_way() -> None:
    """By none, two, three and more blocks; with whole tiles after them, and with blocks that get nothing."""
    assert {count for product in CUT_PRODUCTS for count in product.sharers()} >= {1, 2, 3, 6}
    assert {product.entry.activation for product in CUT_PRODUCTS} == set(ACTIVATIONS)
    assert {product.entry.dtype for product in CUT_PRODUCTS} == set(DTYPES)
    assert {product.entry.cluster for product in CUT_PRODUCTS} == {1, 2, 4}


def test_every_activation_is_run() -> None:
    for family in ("w8_gemm", "w8_gemm_hopper"):
        assert {p.entry.activation for p in PRODUCTS if p.entry.family == family} == set(ACTIVATIONS) == set(EXACT)


def test_the_largest_sums_do_not_overflow() -> None:
    """-128 * -128 over 17024 columns is 278921216, exact in int32 and rounded once to float32."""
    product = Product("w8_gemm_bf16_t32", 5, 70, 100)
    columns, outputs = 17024, torch.full((5, 70), float("nan"), dtype=torch.bfloat16)
    codes = torch.full((70, columns), -128, dtype=torch.int8)
    arguments = {
        "input_codes": codes[:5].contiguous(),
        "input_scales": torch.ones(5),
        "codes": pack_w8(codes),
        "scales": torch.ones(70) / 16384 / columns,
        "bias": None,
        "outputs": outputs,
        "tokens": 5,
        "rows": 70,
        "columns": columns,
    }
    kernel_for(product).launch(product.name, (1, 1), shared_bytes(product.entry), arguments)
    assert torch.equal(outputs, torch.ones_like(outputs))


@functools.cache
def all_products() -> dict[str, Emulator]:
    return {f: load(e for e in ENTRIES.values() if e.family == f) for f in ("w8_gemm", "w8_gemm_hopper")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.family.startswith("w8_gemm")])
def test_every_kernel(name: str) -> None:
    """Below, at and above a tile, in both directions, with and without bias; tiles whole and cut."""
    entry = ENTRIES[name]
    shapes = itertools.product((1, entry.token_tile, entry.token_tile + 1), (entry.row_tile - 8, entry.row_tile + 3))
    for number, (tokens, rows) in enumerate(shapes):
        product = Product(
            name, tokens, rows, (200, 257)[number % 2], bias=number % 3 > 0, blocks=(1, 2)[number % 2] * entry.cluster
        )
        check(all_products()[entry.family], product, seeds=(number,))
        if entry.family == "w8_gemm_hopper" and entry.row_tile > 64:
            cut = replace(product, blocks=3 * entry.cluster, split_tiles=1)
            check(all_products()[entry.family], cut, seeds=(number,))


# ---- Injected bugs ---------------------------------------------------------------------------------------------------

GEMM = Product("w8_gemm_bf16_t64_quick_gelu", 65, 256, 640)
HOPPER = Product("w8_gemm_hopper_bf16_n64", 130, 131, 400, stages=2)
PAIR = Product("w8_gemm_hopper_f16_n128_pair_quick_gelu", 300, 130, 700, stages=2)
QUAD = Product("w8_gemm_hopper_bf16_n96_quad", 300, 300, 700, blocks=4, stages=2)
CUT = Product("w8_gemm_hopper_bf16_n128_gelu", 77, 131, 1100, blocks=5, stages=2, split_tiles=2)
CUT_PAIR = Product("w8_gemm_hopper_f16_n128_pair_quick_gelu", 300, 130, 700, blocks=10, stages=2, split_tiles=4)
QUANTIZE_LONG = "quantize_rows_f16_w8"

# What the bug is: the change, the product (or quantize_rows) that runs, and a pattern of what is seen.
MUTATIONS: dict[str, tuple[Change, Product | str, str]] = {
    "quantize: no barrier before the warps' largest are read": (
        Change("quantize_rows.cu", "sync_block();", ""),
        *(QUANTIZE_LONG, "wrong"),
    ),
    "quantize: the quotient is not corrected": (
        Change(
            "quantize_rows.cu",
            "  quotient = multiply_add(multiply_add(-quotient, scale, value), inverse, quotient);\n",
            "",
        ),
        *(QUANTIZE_LONG, "wrong"),
    ),
    "quantize: columns past the end": (
        Change("quantize_rows.cu", "column + 8 <= columns", "column <= columns"),
        *(QUANTIZE_LONG, "wrong|access outside of memory"),
    ),
    "quantize: the largest code is 128": (
        Change("quantize_rows.cu", "quotient < 127.f ? quotient : 127.f", "quotient"),
        *(QUANTIZE_LONG, "wrong"),
    ),
    "gemm: no barrier after waiting for a stage": (
        Change("w8_gemm.cu", "sync_block();", ""),
        *(GEMM, "wrong"),
    ),
    "gemm: a stage is read one copy too early": (
        Change("w8_gemm.cu", "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
        *(GEMM, "wrong"),
    ),
    "gemm: no swizzle, right but slow": (
        Change("w8_gemm.cu", "(chunk ^ (line / 2 % 4))", "chunk"),
        *(GEMM, "[1-9][0-9]* bank conflicts"),
    ),
    "gemm: rows past the last are read": (
        Change("w8_gemm.cu", "index < (is_input ? tokens : packed_rows)", "(is_input || index < packed_rows)"),
        *(GEMM, "access outside of memory|wrong"),
    ),
    "gemm: the halves of operand b are swapped": (
        Change("w8_gemm.cu", "lane / 8 % 2", "1 - lane / 8 % 2"),
        *(GEMM, "wrong"),
    ),
    "epilogue: the scale of another token": (
        Change("int8.cuh", "to.input_scales[token + 8 * i]", "to.input_scales[token]"),
        *(GEMM, "wrong"),
    ),
    "epilogue: the scale of another row": (
        Change("int8.cuh", "(to.scales + row + 4 * i)", "(to.scales + row)"),
        *(GEMM, "wrong"),
    ),
    "epilogue: tokens past the last are stored": (
        Change("int8.cuh", "    if (token < to.tokens) {", "    {"),
        *(GEMM, "access outside of memory"),
    ),
    "epilogue: rows as if not in groups' order": (
        Change("int8.cuh", "group_row + lane % 4 * 8", "group_row + lane % 4 * 2"),
        *(GEMM, "wrong"),
    ),
    "hopper: a stage is released while wgmma reads it": (
        Change("w8_gemm_hopper.cu", "if (unit > work.unit) release(previous);", "release(stage);"),
        *(HOPPER, "more arrivals than the mbarrier was initialised for|wrong|deadlock"),
    ),
    "hopper: the sums are used before wgmma has ended": (
        Change("w8_gemm_hopper.cu", "wgmma_wait<0>();\n      release", "release"),
        *(HOPPER, "wrong|wgmma under way"),
    ),
    "hopper: no fence": (
        Change("w8_gemm_hopper.cu", "wgmma_fence();", ""),
        *(HOPPER, r"no wgmma_fence since the last commit at wgmma \(w8_gemm_hopper.cu"),
    ),
    "hopper: one k-step too far": (
        Change("w8_gemm_hopper.cu", "b + step * 2)", "b + step)"),
        *(HOPPER, "wrong"),
    ),
    "hopper: the producer overwrites stages in use": (
        Change("w8_gemm_hopper.cu", "mbarrier_wait(empty + stage, phase);", ""),
        *(HOPPER, "more arrivals than the mbarrier was initialised for|wrong"),
    ),
    "hopper: inputs are read before the kernel ahead has ended": (
        Change("w8_gemm_hopper.cu", "dependency_wait();\n      for", "for"),
        *(HOPPER, r"before dependency_wait.* at tma_load_inputs \(w8_gemm_hopper.cu"),
    ),
    "pair: barriers are used before the other block has made its own": (
        Change(
            "w8_gemm_hopper.cu",
            "if (BLOCKS > 1) {\n    sync_cluster();\n  } else {\n    sync_block();\n  }",
            "sync_block();",
        ),
        *(PAIR, "mbarrier used before mbarrier_init"),
    ),
    "pair: a block ends while the other may still arrive": (
        Change("w8_gemm_hopper.cu", "if (BLOCKS > 1) sync_cluster();  //", "//"),
        *(PAIR, "another block of the cluster has ended"),
    ),
    "pair: a stage is released to its own producer only": (
        Change(
            "w8_gemm_hopper.cu", "mbarrier_arrive_cluster(empty + stage, rank ^ lane)", "mbarrier_arrive(empty + stage)"
        ),
        *(PAIR, "wrong|more arrivals|deadlock"),
    ),
    "pair: both blocks copy the same half": (
        Change("w8_gemm_hopper.cu", "first_row + token_rank * SHARE", "first_row"),
        *(PAIR, "wrong"),
    ),
    "quad: inputs go to the blocks with the same rows": (
        Change("w8_gemm_hopper.cu", "(uint16_t)(5 << token_rank)", "(uint16_t)(3 << 2 * row_rank)"),
        *(QUAD, "wrong|deadlock"),
    ),
    "quad: the weight goes to the first two blocks": (
        Change("w8_gemm_hopper.cu", "(uint16_t)(3 << 2 * row_rank)", "(uint16_t)3"),
        *(QUAD, "wrong|deadlock"),
    ),
    "quad: both blocks copy the same tokens": (
        Change("w8_gemm_hopper.cu", "first_token + row_rank * SHARE", "first_token"),
        *(QUAD, "wrong"),
    ),
    "quad: a stage is released to the wrong blocks": (
        Change("w8_gemm_hopper.cu", "empty + stage, rank ^ lane)", "empty + stage, (rank + lane) % BLOCKS)"),
        *(QUAD, "wrong|more arrivals|deadlock"),
    ),
    "quad: inputs are copied before the kernel ahead has ended": (
        Change("w8_gemm_hopper.cu", "dependency_wait();\n      for", "for"),
        *(QUAD, r"before dependency_wait.* at tma_load_inputs \(w8_gemm_hopper.cu"),
    ),
    "cut: a block does not post its sums": (
        Change("w8_gemm_hopper.cu", "if (lane == 0) semaphore_post(semaphore);", ""),
        *(CUT, r"deadlock; .* at semaphore_wait \(w8_gemm_hopper.cu|deadlock: block"),
    ),
    "cut: the owner does not wait for the others' sums": (
        Change("w8_gemm_hopper.cu", "semaphore_wait(semaphore, (uint32_t)(last_sharer - owner));", "*semaphore = 0;"),
        *(CUT, "wrong|semaphore"),
    ),
    "cut: the owner waits for one block too few": (
        Change("w8_gemm_hopper.cu", "(uint32_t)(last_sharer - owner)", "(uint32_t)(last_sharer - owner - 1)"),
        *(CUT, "wrong|semaphore|deadlock"),
    ),
    "cut: the sums of the last sharer are not added": (
        Change("w8_gemm_hopper.cu", "c <= last_sharer", "c < last_sharer"),
        *(CUT, "wrong"),
    ),
    "cut: sums are read from another fragment": (
        Change(
            "w8_gemm_hopper.cu",
            "load_from_l2(parts + ((size_t)c * BLOCKS * WARPS * FRAGMENTS + i) * 32)",
            "load_from_l2(parts + ((size_t)c * BLOCKS * WARPS * FRAGMENTS + (i ^ 1)) * 32)",
        ),
        *(CUT, "wrong"),
    ),
    "cut: all lanes write to one place": (
        Change("w8_gemm_hopper.cu", "FRAGMENTS * 32 + lane;", "FRAGMENTS * 32;"),
        *(CUT, "wrong"),
    ),
    "cut: a semaphore is not set back": (
        Change("emulator_hopper.h", "*semaphore = 0;", ""),
        *(CUT, "a semaphore is not back at zero"),
    ),
    "cut: blocks wait for later ones": (
        Change("w8_gemm_hopper.cu", "clusters - 1 - (int)blockIdx.x / BLOCKS", "(int)blockIdx.x / BLOCKS"),
        *(CUT, "deadlock: block 0 waits for a block"),
    ),
    "cut: pairs wait for later ones": (
        Change("w8_gemm_hopper.cu", "clusters - 1 - (int)blockIdx.x / BLOCKS", "(int)blockIdx.x / BLOCKS"),
        *(CUT_PAIR, "deadlock: block [01] waits for a block"),
    ),
    "cut: sums of the tile before stay": (
        Change("w8_gemm_hopper.cu", "VQ_UNROLL for (int i = 0; i < ROWS / 2; ++i) sums[i] = 0;", ""),
        *(CUT, "wrong"),
    ),
    "cut: the first unit after a cut is left out": (
        Change("w8_gemm_hopper.cu", "share ? begin - tile * units : 0", "share ? begin - tile * units + 1 : 0"),
        *(CUT, "wrong|deadlock|more arrivals"),
    ),
    "cut: the blocks of a pair write to one place": (
        Change("w8_gemm_hopper.cu", "(rank * WARPS + warp) * FRAGMENTS", "warp * FRAGMENTS"),
        *(CUT_PAIR, "wrong"),
    ),
    "cut: the blocks of a pair share their semaphores": (
        Change("w8_gemm_hopper.cu", "(work.tile * BLOCKS + rank) * WARPS", "(work.tile * BLOCKS) * WARPS"),
        *(CUT_PAIR, "wrong|semaphore|deadlock"),
    ),
}
QUICK = {
    "quantize: the quotient is not corrected",
    "gemm: a stage is read one copy too early",
    "epilogue: the scale of another token",
    "hopper: the producer overwrites stages in use",
    "pair: a stage is released to its own producer only",
    "quad: a stage is released to the wrong blocks",
    "cut: the owner does not wait for the others' sums",
}
"""One of each kind; each costs a compilation, so the others are slow."""


def seen_of(subject: Product | str, change: Change | None = None) -> str:
    name = subject if isinstance(subject, str) else subject.name
    kernel = load([ENTRIES[name]], change)
    inputs = torch.randn(40, 3420, generator=torch.Generator().manual_seed(1)).to(DTYPES[ENTRIES[name].dtype])
    expected_codes, expected_scales = activation_codes(inputs)

    def launch(seed: int) -> tuple[Tensor, bool, int]:
        if isinstance(subject, str):
            codes, scales = quantized(kernel, name, inputs, seed)
            right = torch.equal(codes[:, :3420], expected_codes) and torch.equal(scales, expected_scales.flatten())
            return codes, right, 0
        outputs, counters = multiply(kernel, subject, seed)
        return outputs, not wrong(outputs, subject), counters.bank_conflicts

    return outcome(launch)


@pytest.mark.parametrize(
    "subject",
    [QUANTIZE_LONG, GEMM, HOPPER, PAIR, CUT, *(pytest.param(one, marks=pytest.mark.slow) for one in (QUAD, CUT_PAIR))],
    ids=str,
)
def test_unchanged_kernel_is_right(subject: Product | str) -> None:
    assert seen_of(subject) == "right"


@pytest.mark.parametrize("name", quick_first(MUTATIONS, QUICK))
def test_bug_is_seen(name: str) -> None:
    change, subject, seen = MUTATIONS[name]
    assert re.search(seen, seen_of(subject, change))
