"""INT8 on CUDA without a GPU: every problem gets kernels that exist and fit, and the emulator runs what is launched."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")

from tests import emulator
from tests.kernels.fake_cuda import A100, AMPERE, H100, HOPPER, STREAM, emulate, encoded, install
from tests.kernels.test_int8_cuda import EXACT_ACTIVATIONS, exact
from tests.kernels.test_layouts import packed, relative, tokens
from vlmquant.errors import KernelError
from vlmquant.kernels import int8_cuda, reference
from vlmquant.kernels.cuda import build, launch, ops
from vlmquant.kernels.cuda.catalog import ACTIVATIONS, ENTRIES
from vlmquant.kernels.cuda.dispatch import Gpu, Plan
from vlmquant.kernels.cuda.dispatch_int8 import OUTPUT_CLOCKS, Int8Problem, choose_int8, int8_entries

GPUS = [H100, A100, HOPPER, AMPERE, Gpu("consumer", "sm_89", 58, 99 << 10), Gpu("new", build.PTX_ARCH, 170, 99 << 10)]
SHAPES = [(64, 64), (3420, 1280), (3456, 1152), (1152, 4352), (16384, 4096)]
TOKENS = [1, 16, 33, 64, 65, 129, 729, 1024, 4096, 30000]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"{gpu.arch}-{gpu.sms}")
def test_every_problem_has_kernels_that_exist_and_fit(gpu: Gpu) -> None:
    for count, (rows, columns), dtype, activation in itertools.product(TOKENS, SHAPES, ("f16", "bf16"), ACTIVATIONS):
        plans = choose_int8(Int8Problem(count, rows, columns, dtype, activation), gpu)
        for plan in plans:
            entry = ENTRIES[plan.entry]
            assert ("sm_80" if gpu.arch == build.PTX_ARCH else gpu.arch) in entry.archs
            assert entry.dtype == dtype
            assert plan.shared_bytes <= gpu.shared_bytes
            assert plan.threads == entry.threads
            assert plan.grid[0] > 0
            assert plan.grid[0] % entry.cluster == 0
            assert 0 < plan.grid[1] < 2**16
        quantize, multiply = (ENTRIES[plan.entry] for plan in plans)
        assert quantize.family == "quantize_rows"
        assert plans[0].grid[0] * quantize.token_tile >= count
        assert multiply.activation == activation
        if plans[1].token_box:
            assert plans[1].row_box == multiply.row_tile // (2 if multiply.cluster > 1 else 1)
            assert plans[1].token_box == 128 // (2 if multiply.cluster > 2 else 1)
            assert 2 <= plans[1].stages <= 32
            check_cut(plans[1], rows, count, columns)
        else:
            assert plans[1].grid[0] * 128 >= rows
            assert plans[1].grid[1] * multiply.token_tile >= count


def check_cut(plan: Plan, rows: int, count: int, columns: int) -> None:
    """Cut tiles exist, every block has a part of them, and sums and semaphores have room."""
    entry = ENTRIES[plan.entry]
    cluster = entry.cluster
    tiles = -(-rows // (entry.row_tile * (2 if cluster > 2 else 1))) * -(-count // (128 * (2 if cluster > 1 else 1)))
    assert 0 <= plan.split_tiles <= tiles
    assert plan.grid[0] <= tiles * cluster or plan.split_tiles == tiles
    if plan.split_tiles:
        assert entry.row_tile > 64
        assert plan.split_tiles * -(-columns // 128) * cluster >= plan.grid[0]
        assert plan.grid[0] * 128 * entry.row_tile <= launch.WORKSPACE_FLOATS
        assert plan.split_tiles * cluster * 8 <= launch.SEMAPHORES


def test_tiles_are_cut_where_that_is_faster() -> None:
    """Few tiles with many columns; none where whole tiles fill the GPU, or columns are few."""

    def split(tokens: int, rows: int, columns: int) -> int:
        return choose_int8(Int8Problem(tokens, rows, columns, "bf16", ""), H100)[1].split_tiles

    assert split(512, 1152, 4352) > 0
    assert split(128, 1152, 16384) > 0
    assert split(1024, 1152, 1152) == 0
    assert split(2048, 66 // 8 * 256, 16384) == 0


def test_activations_are_those_of_the_catalog() -> None:
    assert list(reference.ACTIVATIONS) == list(ACTIVATIONS) == list(OUTPUT_CLOCKS)


def test_wgmma_runs_on_its_architecture_alone() -> None:
    problem = Int8Problem(4096, 3456, 1152, "bf16", "")
    for gpu in GPUS:
        quantize, multiply = choose_int8(problem, gpu)
        assert ("hopper" in multiply.entry) == (gpu.arch == "sm_90a")
        assert ("hopper" in quantize.entry) == (gpu.arch == "sm_90a")


def test_large_problems_take_large_tiles() -> None:
    problem = Int8Problem(16384, 16384, 4096, "bf16", "")
    assert ENTRIES[choose_int8(problem, H100)[1].entry].row_tile >= 192
    assert "_t128" in choose_int8(problem, A100)[1].entry
    assert "_t32" in choose_int8(Int8Problem(8, 4096, 4096, "bf16", ""), H100)[1].entry


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.arch)
def test_what_is_loaded_before_covers_common_numbers_of_tokens(gpu: Gpu) -> None:
    loaded = int8_entries(3456, 1152, "bf16", "", gpu)
    for count in range(1, 4097):
        assert {plan.entry for plan in choose_int8(Int8Problem(count, 3456, 1152, "bf16", ""), gpu)} <= loaded


def test_columns_that_no_kernel_takes_are_an_error() -> None:
    with pytest.raises(KernelError, match="packed columns must be a multiple of 16"):
        choose_int8(Int8Problem(4, 64, 100, "bf16", ""), H100)


def test_arguments_arrive_in_the_order_of_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    held = int8_cuda.hold(packed(300, 500, 8, 500, True, torch.bfloat16))
    inputs, bias = tokens(200, 500, torch.bfloat16), torch.ones(300, dtype=torch.bfloat16)
    ops._run_w8(device, inputs, held["codes"], held["scales"], bias, "gelu")
    quantize, multiply = fake.started
    columns = held["codes"].shape[1]
    assert [quantize.values[name] for name in ("tokens", "columns", "packed_columns")] == [200, 500, columns]
    assert quantize.values["inputs"] == inputs.data_ptr()
    input_map, weight_map = fake.maps
    assert input_map["address"] == quantize.values["codes"]
    assert weight_map["address"] == held["codes"].data_ptr()
    assert input_map["kind"] == weight_map["kind"] == "CU_TENSOR_MAP_DATA_TYPE_UINT16"
    assert (input_map["sizes"], input_map["strides"]) == ([columns // 2, 200], [columns])
    assert input_map["box"] == [64, 128]
    values = dict(multiply.values)
    assert values["input_codes"] == encoded(input_map)
    assert values["codes"] == encoded(weight_map)
    assert values["input_scales"] == quantize.values["scales"]
    assert values["scales"] == held["scales"].data_ptr()
    assert values["bias"] == bias.data_ptr()
    assert [values[name] for name in ("tokens", "rows", "columns")] == [200, 300, columns]
    sums, semaphores = device.workspaces[STREAM]
    assert (values["workspace"], values["semaphores"]) == (sums.data_ptr(), semaphores.data_ptr())
    assert values["split_tiles"] == choose_int8(Int8Problem(200, 300, columns, "bf16", "gelu"), H100)[1].split_tiles
    assert multiply.dependent
    assert quantize.dependent
    assert multiply.entry.endswith("_gelu")


CASES = [
    (HOPPER, 9, 70, 100, torch.bfloat16, ""),
    (HOPPER, 200, 150, 200, torch.float16, "gelu"),
    (AMPERE, 40, 130, 96, torch.bfloat16, "quick_gelu"),
]


@pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_of_the_operator_is_that_of_float64(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, count, rows, columns, dtype, activation = case
    fake, _ = emulate(monkeypatch, gpu)
    weight, inputs = packed(rows, columns, 8, columns, True, torch.bfloat16), tokens(count, columns, dtype)
    held, bias = int8_cuda.hold(weight), torch.linspace(-1, 1, rows).to(dtype)
    found: list[Tensor] = [
        ops.w8_linear_cuda(inputs, held["codes"], held["scales"], bias, activation) for _ in range(2)
    ]
    plain = exact(inputs, weight.dequantize()) + bias.double()
    expected = EXACT_ACTIVATIONS[activation](plain)
    assert relative(found[0], expected) < {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}[dtype]
    assert torch.equal(found[0], found[1])
    assert len(fake.started) == 4


def test_float32_inputs_are_put_together_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake, _ = emulate(monkeypatch, HOPPER)
    weight, inputs = packed(70, 100, 8, 100, True, torch.bfloat16), tokens(20, 100, torch.float32)
    held = int8_cuda.hold(weight)
    found = ops.w8_linear_cuda(inputs, held["codes"], held["scales"])
    assert relative(found, exact(inputs, weight.dequantize())) < 2e-6
    assert fake.started == []
    assert "no kernel for torch.float32 inputs" in caplog.text
