"""What reaches the driver is what the catalog's entries take, with a fake in the driver's place; no GPU needed."""

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")

from tests.kernels.fake_cuda import A100, H100, STATIC_SHARED, STREAM, FakeDriver, encoded, install
from tests.kernels.test_layouts import packed, tokens
from vlmquant.errors import KernelError
from vlmquant.kernels import vq4
from vlmquant.kernels.cuda import build, launch, ops
from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.kernels.cuda.dispatch import Choice, Gpu, Plan, Problem, choose, plan
from vlmquant.packing import vq4_shape

CHOICES = [
    Choice("skinny"),
    Choice("gemm"),
    Choice("dequantize"),
    Choice("skinny_hopper", ring_kib=110),
    Choice("skinny_hopper", blocks_per_sm=2, ring_kib=76),
    Choice("skinny_wide_hopper", blocks_per_sm=2, ring_kib=110),
    Choice("gemm_hopper", tile_tokens=64, warpgroups=4),
    Choice("gemm_hopper", tile_tokens=256, warpgroups=2, grid="even"),
]


def weight(symmetric: bool = True, rows: int = 256, columns: int = 512, group: int = 128) -> dict[str, Tensor]:
    return vq4.hold(packed(rows, columns, 4, group, symmetric, torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_arguments_arrive_in_the_order_of_the_catalog(
    choice: Choice, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, device = install(monkeypatch, H100)
    held, inputs = weight(symmetric), tokens(20, 512, torch.bfloat16)
    outputs = inputs.new_empty(20, 256)
    problem = Problem(20, 256, 512, 128, symmetric, "bf16")
    planned = plan(problem, H100, choice)
    assert isinstance(planned, Plan)
    ready = ops.make_launch(device, planned, problem)
    ops.start_w4(device, ready, inputs, held["codes"], held["scales"], held.get("zeros"), outputs)
    (started,) = fake.started
    entry = ENTRIES[started.entry]
    assert started.entry == planned.entry
    assert list(started.values) == [name for name, _ in entry.arguments]
    expected = {
        "codes": held["codes"].data_ptr(),
        "scales": held["scales"].data_ptr(),
        "zeros": 0 if symmetric else held["zeros"].data_ptr(),
        "inputs": encoded(fake.maps[0]) if planned.token_box else inputs.data_ptr(),
        "outputs": outputs.data_ptr(),
        "tokens": 20,
        "rows": 256,
        "columns": 512,
        "group_size": 128,
        "stages": planned.stages,
        "sweep_tiles": planned.sweep_tiles,
        "first_strip": 0,
    }
    if "workspace" in started.values:
        sums, semaphores = device.workspaces[STREAM]
        expected |= {"workspace": sums.data_ptr(), "semaphores": semaphores.data_ptr()}
    found = dict(started.values)
    if "dense" in found:
        assert found.pop("dense") != 0
    assert found == {name: expected[name] for name in found}
    assert started.grid == (*planned.grid, 1)
    assert started.threads == (entry.threads, 1, 1)
    assert started.shared_bytes == planned.shared_bytes
    assert started.stream == STREAM
    assert started.dependent == ("hopper" in choice.kernel)
    assert fake.shared_limits == {started.entry: H100.shared_bytes - STATIC_SHARED}


def test_tensor_map_describes_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    inputs = tokens(20, 512, torch.bfloat16)
    device.tensor_map(inputs, 24)
    assert fake.maps == [
        {
            "kind": "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
            "rank": 2,
            "address": inputs.data_ptr(),
            "sizes": [512, 20],
            "strides": [1024],
            "box": [64, 24],
            "steps": [1, 1],
            "modes": (
                "CU_TENSOR_MAP_INTERLEAVE_NONE",
                "CU_TENSOR_MAP_SWIZZLE_128B",
                "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
                "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
            ),
        }
    ]
    device.tensor_map(inputs.to(torch.float16), 8)
    assert fake.maps[1]["kind"] == "CU_TENSOR_MAP_DATA_TYPE_FLOAT16"


def test_tensor_map_is_encoded_once_for_a_buffer_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    inputs = tokens(20, 512, torch.bfloat16)
    first = device.tensor_map(inputs, 24)
    assert device.tensor_map(inputs, 24) is first
    assert len(fake.maps) == 1
    for other, box in [(inputs[:8], 24), (inputs, 32), (inputs[4:], 24), (inputs.view(40, 256), 24)]:
        device.tensor_map(other, box)
    assert len(fake.maps) == 5
    monkeypatch.setattr(launch, "MAPS_KEPT", 5)
    device.tensor_map(inputs[6:], 24)
    assert len(device.maps) == 1


def test_a_map_outlives_its_place_in_the_table_while_a_launch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    held = weight()
    monkeypatch.setattr(launch, "MAPS_KEPT", 1)
    for count in range(1, 5):
        inputs = tokens(count, 512, torch.bfloat16)
        ops._run_w4(device, inputs, held["codes"], held["scales"], None, None, 256, 128)
        assert fake.started[-1].values["inputs"] == encoded(fake.maps[-1])
        assert fake.maps[-1]["sizes"] == [512, count]


def test_a_kernel_is_loaded_once_and_a_launch_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    held, inputs = weight(), tokens(4, 512, torch.bfloat16)
    for _ in range(3):
        ops._run_w4(device, inputs, held["codes"], held["scales"], None, None, 256, 128)
    assert len(fake.loaded) == 1
    assert len(fake.started) == 3
    assert len(device.ready) == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(4096, 4096, 128), (28672, 8192, 64), (1088, 1152, 32)])
@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.arch)
def test_all_that_a_weight_may_run_is_loaded_when_it_is_held(
    gpu: Gpu, rows: int, columns: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, device = install(monkeypatch, gpu)
    monkeypatch.setattr(launch, "device", lambda index: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    ops.prepare_w4(torch.device("cuda", 0), rows, columns, group, symmetric, "bf16")
    for count in range(1, 1200):
        problem = Problem(count, rows, columns, group, symmetric, "bf16")
        assert choose(problem, gpu).entry in device.functions
    assert len(device.spares) == launch.SPARE_WORKSPACES


def test_nothing_is_loaded_or_made_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    held = weight()

    def run(count: int) -> None:
        inputs = tokens(count, 512, torch.bfloat16)
        ops._run_w4(device, inputs, held["codes"], held["scales"], None, None, 256, 128)

    run(1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    loaded = len(fake.loaded)
    run(2)  # the same entry for another number of tokens
    with pytest.raises(KernelError, match=r"n32_c2: not loaded before a CUDA graph was captured; run the model once"):
        run(20)
    assert len(fake.loaded) == loaded
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    run(20)  # the refusal is not remembered


def test_each_stream_keeps_one_zeroed_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = install(monkeypatch, H100)
    sums, semaphores = device.workspace(7)
    assert device.workspace(7)[0] is sums
    assert device.workspace(8)[0] is not sums
    assert not sums.any()
    assert not semaphores.any()
    assert len(semaphores) == launch.SEMAPHORES
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    spares = [device.workspace(stream) for stream in range(20, 20 + launch.SPARE_WORKSPACES)]
    assert len({spare[0].data_ptr() for spare in spares}) == launch.SPARE_WORKSPACES
    with pytest.raises(KernelError, match="run the model once on each before capturing"):
        device.workspace(99)
    assert device.workspace(20)[0] is spares[0][0]


@pytest.mark.parametrize(
    ("rows", "columns", "group", "count"),
    [(100, 200, 128, 5), (64, 100, 128, 3), (70, 1088, 64, 2), (130, 96, 32, 9)],
)
def test_odd_sizes_reach_the_kernel_padded(
    rows: int, columns: int, group: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = packed(rows, columns, 4, group, True, torch.bfloat16)
    held, size = vq4.hold(made), vq4_shape(rows, columns, group)
    seen: list[Tensor] = []
    fake, device = install(monkeypatch, A100)
    start = ops.start_w4

    def look(*arguments: object) -> None:
        seen.append(arguments[2])  # type: ignore[arg-type]
        start(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "start_w4", look)
    inputs = tokens(count, columns, torch.bfloat16)
    found = ops._run_w4(device, inputs, held["codes"], held["scales"], None, None, rows, size.group_size)
    assert found.shape == (count, rows)
    assert found.is_contiguous()
    values = fake.started[0].values
    assert (values["tokens"], values["rows"], values["columns"]) == (count, size.rows, size.columns)
    assert torch.equal(seen[0][:, :columns], inputs)
    assert not seen[0][:, columns:].any()
    assert seen[0].shape == (count, size.columns)


def test_inputs_are_aligned_and_in_one_piece() -> None:
    wide = tokens(4, 264, torch.bfloat16)
    for inputs in (wide[:, 3:259], wide[:, 8:], wide.flatten()[1 : 1 + 4 * 256].view(4, 256)):
        found = ops.aligned(inputs, 256)
        assert found.is_contiguous()
        assert found.data_ptr() % launch.ALIGNMENT == 0
        assert torch.equal(found, inputs)
    whole = tokens(4, 256, torch.bfloat16)
    assert ops.aligned(whole, 256).data_ptr() == whole.data_ptr()


def test_no_tokens_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, H100)
    held = weight()
    empty = torch.empty(0, 512, dtype=torch.bfloat16)
    assert ops._run_w4(device, empty, held["codes"], held["scales"], None, None, 256, 128).shape == (0, 256)
    assert fake.started == []


def test_threads_do_not_mix_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, A100)
    problem = Problem(4, 256, 512, 128, True, "bf16")
    planned = plan(problem, A100, Choice("gemm"))
    assert isinstance(planned, Plan)
    ready = ops.make_launch(device, planned, problem)
    begin = threading.Barrier(4)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can

    def work(number: int) -> None:
        begin.wait()
        for _ in range(200):
            ready.start(number, {"inputs": number * 1000, "outputs": number * 1000 + 1})

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(1, 5)))
    finally:
        sys.setswitchinterval(before)
    assert len(fake.started) == 800
    for started in fake.started:
        assert started.values["inputs"] == started.stream * 1000
        assert started.values["outputs"] == started.stream * 1000 + 1


def test_a_thread_without_a_context_gets_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, A100)
    held = weight()
    inputs = tokens(4, 512, torch.bfloat16)
    ops._run_w4(device, inputs, held["codes"], held["scales"], None, None, 256, 128)
    fake.failures["cuLaunchKernelEx"] = [launch.INVALID_CONTEXT]
    before = len(fake.contexts)
    ops._run_w4(device, inputs, held["codes"], held["scales"], None, None, 256, 128)
    assert fake.contexts[before:] == ["context 0"]
    assert len(fake.started) == 2


def test_a_failed_launch_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = install(monkeypatch, A100)
    held = weight()
    fake.failures["cuLaunchKernelEx"] = [719]
    with pytest.raises(KernelError, match="w4_skinny_bf16_m1_g128: the CUDA driver says CUDA_ERROR_LAUNCH_FAILED"):
        ops._run_w4(device, tokens(4, 512, torch.bfloat16), held["codes"], held["scales"], None, None, 256, 128)


def test_a_kernel_that_does_not_load_is_replaced_by_expanding(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake, device = install(monkeypatch, A100)
    fake.failures["cuModuleLoadData"] = [218]
    held = weight()
    for _ in range(2):
        ops._run_w4(device, tokens(4, 512, torch.bfloat16), held["codes"], held["scales"], None, None, 256, 128)
    assert [started.entry for started in fake.started] == ["w4_dequantize_bf16"] * 2
    assert caplog.text.count("w4_skinny_bf16_m1_g128 does not run here") == 1
    assert "CUDA_ERROR_INVALID_PTX" in caplog.text


def test_without_any_kernel_torch_expands(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake, device = install(monkeypatch, A100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(launch, "unavailable", lambda index: None)
    monkeypatch.setattr(launch, "device", lambda index: device)

    def refuse(entries: object, arch: str) -> dict[str, bytes]:
        raise KernelError("NVRTC is missing")

    monkeypatch.setattr(build, "load_all", refuse)
    made = packed(256, 512, 4, 128, True, torch.bfloat16)
    held, inputs = vq4.hold(made), tokens(4, 512, torch.bfloat16)
    found = ops.w4_linear_cuda(inputs, held["codes"], held["scales"], None, None, 256, 128)
    expected = torch.nn.functional.linear(inputs, made.dequantize(torch.bfloat16))
    assert torch.equal(found, expected)
    assert "weights are expanded by torch at every call, which is slow: NVRTC is missing" in caplog.text
    assert fake.started == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_expanded_by_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake, device = install(monkeypatch, A100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(launch, "unavailable", lambda index: None)
    monkeypatch.setattr(launch, "device", lambda index: device)
    made = packed(100, 512, 4, 128, False, torch.bfloat16)
    held, inputs = vq4.hold(made), tokens(4, 512, dtype)
    found = ops.w4_linear_cuda(inputs, held["codes"], held["scales"], held["zeros"], None, 100, 128)
    assert torch.equal(found, torch.nn.functional.linear(inputs, made.dequantize(dtype)))
    assert f"no kernel for {dtype} inputs with torch.bfloat16 scales" in caplog.text
    assert fake.started == []


@pytest.mark.parametrize(("capability", "arch", "told"), [((9, 0), "sm_90a", False), ((10, 3), "compute_80", True)])
def test_an_inexact_architecture_is_told(
    capability: tuple[int, int],
    arch: str,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts = SimpleNamespace(
        name="NVIDIA Newer",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=160,
        shared_memory_per_block_optin=227 << 10,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(build, "_compiler", lambda: ((13, 0), (80, 90, 100, 103)))
    assert launch._gpu(0) == Gpu("NVIDIA Newer", arch, 160, 227 << 10)
    assert ("NVIDIA Newer: no kernels are made for compute capability 10.3" in caplog.text) == told


def test_why_kernels_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.unavailable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.unavailable(0) == "torch finds no CUDA device"
    launch.unavailable.cache_clear()
    launch.device.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def old(index: int) -> Gpu:
        raise KernelError("compute capability 7.5: the CUDA kernels need 8.0 or newer")

    monkeypatch.setattr(launch, "_gpu", old)
    assert "7.5" in str(launch.unavailable(0))
    launch.unavailable.cache_clear()
    launch.device.cache_clear()


def test_the_fake_reads_what_ctypes_wrote() -> None:
    """The fake takes addresses apart by the catalog; this says that it would notice a wrong place."""
    entry = ENTRIES["w4_dequantize_bf16"]
    block = launch.Arguments(entry)
    block.write({"codes": 1 << 40, "rows": 7, "first_strip": -1})
    assert [cell.value for cell in block.cells] == [1 << 40, None, None, None, 7, 0, 0, -1]
    assert isinstance(FakeDriver().CUresult(0).value, int)
