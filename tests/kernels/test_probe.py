"""The probe picks what is faster, and asks once."""

import time

import pytest
import torch

from vlmquant import pipeline
from vlmquant.kernels import probe


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16], ids=str)
def test_the_faster_dtype_wins_and_is_remembered(slow: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(inputs.dtype)
        time.sleep(0.005 if inputs.dtype == slow else 0.0)
        return inputs

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    probe._gain.cache_clear()
    try:
        other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[slow]
        assert probe.compute_dtype("cpu") == other
        count = len(calls)
        assert probe.compute_dtype(torch.device("cpu")) == other
        assert len(calls) == count
        assert probe.compute_dtype("cpu", least_gain=1e9) == torch.float32
        assert probe.compute_dtype("cpu", least_gain=0.0) == torch.bfloat16
    finally:
        probe._gain.cache_clear()


def test_most_tokens_stops_where_the_other_is_faster() -> None:
    def costs(seconds: dict[int, float]):
        return lambda count: time.sleep(seconds[count])

    fast, other = costs({1: 0.0, 4: 0.0, 16: 0.01}), costs({1: 0.005, 4: 0.005, 16: 0.005})
    assert probe.most_tokens(fast, other, (1, 4, 16)) == 4
    assert probe.most_tokens(other, fast, (1, 4)) == 0


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ({"amx_tile": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, torch.float32),  # no faster than float32
        ({"amx_tile": True, "amx_bf16": False, "avx512_bf16": True}, torch.float32),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        ({}, torch.float32),
        (None, torch.float32),  # torch's before 2.11 tell nothing
    ],
)
def test_calibration_goes_by_what_the_cpu_is_and_by_no_clock(
    found: dict[str, bool] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "compute_dtype", lambda device: pytest.fail("a clock was asked"))
    if found is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert pipeline.calibration_dtype("cpu") == dtype
