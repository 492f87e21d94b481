"""What `vlmquant doctor` says, with GPUs that are not there."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmquant import doctor
from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import build, dispatch, launch
from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.kernels.cuda.dispatch import Gpu


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    dispatch.overrides.cache_clear()


def with_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, problem: str | None = None) -> str:
    facts = SimpleNamespace(name="NVIDIA Test", major=9, minor=0, multi_processor_count=132, total_memory=1 << 36)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(launch, "unavailable", lambda index: problem)
    monkeypatch.setattr(launch, "device", lambda index: SimpleNamespace(gpu=gpu))
    monkeypatch.setattr(build, "_compiler", lambda: ((13, 0), (80, 90)))
    return "\n".join(doctor.lines(doctor.examine()))


def test_without_a_gpu_it_says_what_the_cpu_does() -> None:
    found = doctor.examine()
    text = "\n".join(doctor.lines(found))
    assert found["gpus"] == []
    assert "GPU: torch finds none, so packed weights are multiplied on the CPU" in text
    layouts = found["cpu"]["layouts"]
    assert f"holds 4-bit weights as {layouts['float32']} for float32, {layouts['bfloat16']} for bfloat16" in text
    assert layouts["float32"] == "bag4"
    assert layouts["bfloat16"] in ("int4", "bag4")  # whichever is faster here
    assert found["cache"]["kernels"] == 0


def test_kernels_are_listed_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA Test", "sm_90a", 132, 227 << 10)
    text = with_gpu(monkeypatch, gpu)
    assert "compiled for sm_90a\n" in text
    assert "1 tokens: w4_skinny_hopper_bf16_m1_g128 (table of sm_90a; compiled at first use)" in text
    assert "256 tokens: w4_gemm_hopper_bf16_n128_c2" in text
    assert "benchmarks/results/gpu_prototypes_h100.json" in text
    assert "override file: 0 rows" in text
    assert re.search(
        r"1024 tokens: w8_gemm_hopper_bf16_\w+ \(by arithmetic, not measured; compiled at first use\)", text
    )


def test_an_inexact_match_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = with_gpu(monkeypatch, Gpu("NVIDIA Test", build.PTX_ARCH, 132, 227 << 10))
    assert "compiled for compute_80 (PTX, no exact match" in text
    assert "Not measured on the architectures it serves" in text


def test_why_our_kernels_do_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = with_gpu(monkeypatch, None, "compute capability 7.5: the CUDA kernels need 8.0 or newer")
    assert "our kernels do not run: compute capability 7.5" in text
    assert "torch expands weights at every call" in text


def test_what_is_compiled_and_what_is_damaged_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA Test", "sm_90a", 132, 227 << 10)
    monkeypatch.setattr(build, "_compiler", lambda: ((13, 0), (80, 90)))
    entry = ENTRIES["w4_skinny_hopper_bf16_m1_g128"]
    path = build.cache_path(build.program(entry, "sm_90a"))
    build.write_cached(path, b"machine code")
    (path.parent / "other-sm_80.cubin").write_bytes(b"half a file")
    text = with_gpu(monkeypatch, gpu)
    assert "1 tokens: w4_skinny_hopper_bf16_m1_g128 (table of sm_90a; compiled)" in text
    assert "2 kernels" in text
    assert "1 of them damaged" in text


def test_a_missing_nvrtc_is_a_line_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> object:
        raise KernelError("NVRTC cannot be loaded: no such file; install nvidia-cuda-nvrtc")

    monkeypatch.setattr(build, "_compiler", missing)
    assert "NVRTC: NVRTC cannot be loaded" in "\n".join(doctor.lines(doctor.examine()))


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file", "is no folder"),
        ("file/below", "Not a directory"),
        ("/proc/vlmquant", "No such file"),
        ("/dev/null", "is no folder"),
        ("open", "can be written to by other users"),
        ("holder", "can be written to by other users"),
        ("dangling", "No such file"),
    ],
)
def test_a_cache_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, why: str
) -> None:
    """Whoever asks: root may write to any folder by its bits, but not to these."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "holder" / "kernels").mkdir(parents=True)
    (tmp_path / "holder" / "kernels").chmod(0o770)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv(build.CACHE, str(tmp_path / place))
    found = doctor.examine()
    assert not found["cache"]["writable"]
    assert why in found["cache"]["problem"]
    assert "CANNOT be written to" in "\n".join(doctor.lines(found))


def test_a_cache_that_can_be_written_to_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path / "new" / "cache"))
    assert doctor.examine()["cache"]["writable"]
    assert list(tmp_path.iterdir()) == []


def test_pipes_and_links_in_the_cache_are_damaged_and_not_waited_for(tmp_path: Path) -> None:
    kernels = tmp_path / "cache" / "kernels"
    kernels.mkdir(parents=True, mode=0o700)
    os.mkfifo(kernels / "a.cubin")
    (kernels / "b.cubin").symlink_to("/dev/zero")
    found = doctor.examine()["cache"]
    assert (found["kernels"], found["damaged"]) == (2, 2)


def test_loops_that_cannot_be_compiled_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no loops can be compiled" not in "\n".join(doctor.lines(doctor.examine()))
    monkeypatch.setattr(doctor.compiled, "unavailable", lambda: "numba does not work here")
    assert "no loops can be compiled (numba does not work here)" in "\n".join(doctor.lines(doctor.examine()))
