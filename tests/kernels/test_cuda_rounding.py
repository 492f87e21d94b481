"""When GPTQ's columns are rounded by the kernel, and what reaches the driver then; a fake stands in its place."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")

from tests.kernels.fake_cuda import A100, H100, STREAM, FakeDriver, install
from vlmquant.algorithms import gptq
from vlmquant.errors import KernelError
from vlmquant.grid import Grid
from vlmquant.kernels.cuda import build, launch, rounding

INTEGERS = Grid(4, 128, torch.bfloat16)
ASYMMETRIC = Grid(3, 128, torch.bfloat16, symmetric=False)
FP8 = Grid(8, 128, torch.float32, kind="float")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_refused_yet() -> None:
    rounding._refusal.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeDriver, launch.Device]:
    """An A100, as far as anybody can tell."""
    fake, device = install(monkeypatch, A100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # what the CPU's device index is
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "unavailable", lambda index: None)
    monkeypatch.setattr(launch, "device", lambda index: device)
    return fake, device


def block(grid: Grid, columns: int, rows: int) -> dict[str, Tensor | Grid | None]:
    names = ("wanted", "target", "values", "errors")
    whole = torch.zeros(512, 512)
    return {
        **{name: torch.zeros(columns, rows) for name in names},
        "feedback": whole[100 : 100 + columns, 100 : 100 + columns],
        "scales": torch.ones(4, rows),
        "zeros": None if grid.symmetric else torch.zeros(4, rows),
        "group_of": torch.zeros(columns, dtype=torch.int64),
        "grid": grid,
    }


@pytest.mark.parametrize(
    ("grid", "entry"),
    [(INTEGERS, "round_block_int"), (ASYMMETRIC, "round_block_int_asym"), (FP8, "round_block_float")],
    ids=str,
)
def test_what_reaches_the_driver(grid: Grid, entry: str, fake: tuple[FakeDriver, launch.Device]) -> None:
    driver, _ = fake
    given = block(grid, 37, 130)
    rounding.round_block(**given)
    (started,) = driver.started
    pointers = {
        name: 0 if value is None else value.data_ptr() for name, value in given.items() if not isinstance(value, Grid)
    }
    numbers = {"rows": 130, "columns": 37, "feedback_stride": 512, "bits": grid.bits}
    assert started.entry == entry
    assert started.values == pointers | numbers
    assert (started.grid, started.threads) == ((3, 1, 1), (64, 1, 1))
    assert started.shared_bytes == 40 << 10
    assert started.stream == STREAM
    assert not started.dependent


def test_a_launch_is_made_once_for_a_number_of_rows(fake: tuple[FakeDriver, launch.Device]) -> None:
    driver, device = fake
    for columns, rows in ((128, 64), (5, 64), (128, 65)):
        rounding.round_block(**block(INTEGERS, columns, rows))
    assert len(driver.loaded) == 1
    assert [started.grid[0] for started in driver.started] == [1, 1, 2]
    assert len(device.ready) == 2
    assert not device.spares, "it needs no workspace"


def test_more_columns_than_the_kernel_takes_are_a_bug(fake: tuple[FakeDriver, launch.Device]) -> None:
    with pytest.raises(AssertionError, match="129"):
        rounding.round_block(**block(INTEGERS, 129, 64))


def test_a_gpu_has_the_kernel_and_other_devices_do_not(
    fake: tuple[FakeDriver, launch.Device], caplog: pytest.LogCaptureFixture
) -> None:
    for grid in (INTEGERS, ASYMMETRIC, FP8):
        assert rounding.fits(GPU, grid)
        assert not rounding.fits(torch.device("cpu"), grid)
        assert not rounding.fits(torch.device("mps"), grid)
    assert sorted(fake[1].functions) == ["round_block_float", "round_block_int", "round_block_int_asym"]
    assert caplog.text == ""


def test_gptq_takes_the_kernel_on_a_gpu(fake: tuple[FakeDriver, launch.Device]) -> None:
    assert gptq._loop(SimpleNamespace(device=GPU), INTEGERS) is rounding.round_block


@pytest.mark.parametrize("how", ["no bindings", "does not compile"])
def test_without_the_kernel_torch_rounds_and_it_is_said_once(
    how: str,
    fake: tuple[FakeDriver, launch.Device],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[int] = []

    def fail(*arguments: object) -> None:
        tries.append(1)
        raise KernelError("NVRTC refuses it")

    if how == "no bindings":
        monkeypatch.setattr(launch, "unavailable", lambda index: "the CUDA kernels need cuda-bindings")
    else:
        monkeypatch.setattr(build, "load_all", fail)
    for _ in range(3):
        assert gptq._loop(SimpleNamespace(device=GPU), INTEGERS) is rounding.by_torch
    why = "need cuda-bindings" if how == "no bindings" else "NVRTC refuses it"
    assert caplog.text.count("GPTQ's columns are rounded by torch, which is slow: ") == 1
    assert why in caplog.text
    assert len(tries) <= 1, "it is not compiled again for every weight"


def test_spare_workspaces_are_made_for_kernels_that_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = install(monkeypatch, H100)
    device.prepare([launch.ENTRIES["round_block_int"], launch.ENTRIES["w4_gemm_f16_m64"]])
    assert not device.spares
    device.prepare([launch.ENTRIES["w4_skinny_f16_m1_g128"]])
    assert len(device.spares) == launch.SPARE_WORKSPACES
