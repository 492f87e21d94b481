"""Where it is computed: what `auto` stands for, what is refused, and that it is said first."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vlmquant
from tests.small_set import write_small_set
from vlmquant import devices
from vlmquant.devices import find_device, tell_device
from vlmquant.errors import UsageError
from vlmquant.evaluation.settings import Settings
from vlmquant.ranks import join

Run = Callable[..., tuple[int, str, str]]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


@without_gpu
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert find_device() == find_device("auto") == find_device(Settings().device) == "cpu"
    with join() as alone:
        assert alone.device == "cpu"


def test_with_a_gpu_auto_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda size, device: tried.append(device) or torch.zeros(size))
    assert find_device() == "cuda"
    assert tried == ["cuda"]


def test_a_gpu_that_does_not_compute_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ones(size: int, device: str) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    with caplog.at_level(logging.WARNING, logger="vlmquant"):
        assert find_device() == "cpu"
    assert "the GPU cannot be used (no kernel image is available): the CPU computes" in caplog.text


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused_with_what_there_is(device: str, tiny_llava: Path) -> None:
    message = rf"^device {device}: cannot be used here \(torch finds no CUDA device\); there is cpu: name one of these"
    for call in (find_device, lambda name: vlmquant.load(tiny_llava, device=name)):
        with pytest.raises(UsageError, match=message):
            call(device)
    with pytest.raises(UsageError, match=message):
        vlmquant.quantize(tiny_llava, "rtn-w4", "out", device=device)
    with pytest.raises(UsageError, match=message):
        vlmquant.evaluate(tiny_llava, [], "data", settings=Settings(device=device))


def test_what_there_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    with pytest.raises(UsageError, match=r"there is cpu, cuda:0 \(Card 0\), cuda:1 \(Card 1\): name one"):
        find_device("abacus")


@pytest.mark.parametrize("command", ["quantize", "eval", "compare"])
def test_every_command_that_computes_says_first_where(
    command: str, run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is on stderr the first line, whatever ends the command after it."""
    data = write_small_set(tmp_path / "data", pairs=1)
    words = {
        "quantize": ("quantize", tiny_llava, "-r", "rtn-w4", "-o", tmp_path / "out"),
        "eval": ("eval", tiny_llava, "--reference", tmp_path / "none", "-d", data, "-o", tmp_path / "r.json"),
        "compare": ("compare", tmp_path / "none", tiny_llava, "-d", data),
    }[command]
    tell_device.cache_clear()
    assert run(*words, "--device", "cpu")[2].splitlines()[0] == "device: cpu"
    monkeypatch.setattr(devices, "_why_not", lambda device: "it is broken")
    code, _, err = run(*words, "--device", "cuda:3")
    assert code == 2
    assert err.startswith("vlmquant: device cuda:3: cannot be used here (it is broken); there is cpu")
