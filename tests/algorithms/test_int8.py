"""INT8: the grid is compressed-tensors' own, and its scales are searched."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

from tests import grids
from vlmquant.algorithms import rtn, search
from vlmquant.recipe import SHORT_SCHEMES

W8A8 = SHORT_SCHEMES["w8a8-dynamic"]
ARGS = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")


def test_minmax_grid_equals_compressed_tensors(make_weight) -> None:
    weight = make_weight(24, 96)
    scales, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), ARGS)
    ours = grids.nearest(weight, W8A8, torch.float32)
    torch.testing.assert_close(ours.scales, scales)


def test_codes_are_those_of_compressed_tensors_on_the_same_scales(make_stage, make_inputs, make_weight) -> None:
    stage = make_stage({"fc1": make_weight(24, 96)}, W8A8, make_inputs(256, 96))
    ours = search.quantize_stage(stage)["fc1"]
    theirs = quantize(stage.weights["fc1"], ours.scales, torch.zeros_like(ours.scales), ARGS, dtype=torch.int8)
    assert torch.equal(ours.codes.int() - 128, theirs.int())
    assert ours.zeros is None
    assert ours.scales.shape == (24, 1)


def test_search_never_loses_to_minmax(make_stage, make_inputs, make_weight) -> None:
    weight = make_weight(24, 96)
    weight[:, 5] *= 3  # one outlier a row, on an input that hardly fires
    inputs = make_inputs(256, 96)
    inputs[:, 5] *= 1e-3
    stage = make_stage({"fc1": weight}, W8A8, inputs)

    def loss(quantized) -> float:
        return ((quantized.dequantize() - weight).abs().pow(3) @ stage.mean_square()).sum().item()

    searched = loss(search.quantize_stage(stage)["fc1"])
    plain = loss(rtn.quantize_weight(weight, stage.grid))
    assert searched < 0.9 * plain


def test_inputs_are_measured_once(make_stage, make_inputs, make_weight, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage({name: make_weight(4, 32) for name in "qkv"}, W8A8, make_inputs(64, 32))
    measured = stage.mean_square()
    calls = []
    monkeypatch.setattr(stage, "mean_square", lambda: calls.append(1) or measured)
    search.quantize_stage(stage)
    assert len(calls) == 1
