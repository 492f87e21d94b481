"""Inputs that are rounded with the weights: folds and biases against float64, and on a planted outlier."""

import numpy as np
import pytest
import torch

from vlmquant.algorithms import rounded, search
from vlmquant.recipe import SHORT_SCHEMES, ComponentSpec, SearchOptions

W8A8 = SHORT_SCHEMES["w8a8-dynamic"]
BOTH = ComponentSpec(search=SearchOptions(fold=True, correct_bias=True))
NEITHER = ComponentSpec(search=SearchOptions(fold=False, correct_bias=False))
OUTLIER = 200.0
"""Times what other channels hold."""


def norm_stage(make_stage, make_inputs, make_weight, *, scheme=W8A8, options=BOTH, outlier=OUTLIER, **more):
    """Linears behind a norm, one of whose channels is far larger than the others: (stage, what the norm normalizes)."""
    normalized = make_inputs(384, 48, spread=0.3)
    normalized[:, 7] *= outlier
    gain = (make_weight(1, 48, seed=5)[0].abs() * 10 + 0.3).bfloat16()
    weights = {name: make_weight(12, 48, seed=10 + i) for i, name in enumerate("qkv")}
    stage = make_stage(weights, scheme, normalized * gain.float(), gain=gain, options=options, **more)
    return stage, normalized


def int8_inputs(inputs):
    """Float64 inputs (tokens, in) on each token's own grid."""
    scale = np.abs(inputs).max(1, keepdims=True) / 127.5
    return np.clip(np.rint(inputs / scale), -128, 127) * scale


def int8_weight(weight):
    """Float64 weight (out, in) on each row's own grid, its scale as bfloat16 has it."""
    scale = np.abs(weight).max(1, keepdims=True) / 127.5
    scale = torch.from_numpy(scale).bfloat16().double().numpy()
    return np.clip(np.rint(weight / scale), -128, 127) * scale


def output_error(stage, normalized, quantized) -> float:
    """Squared error of what is served, summed over linears: by the norm as it is stored, with int8 inputs."""
    served, total = int8_inputs((normalized * stage.gain.float()).double().numpy()), 0.0
    for name, weight in stage.weights.items():
        wanted = stage.inputs.double().numpy() @ weight.double().numpy().T
        bias = stage.shifts[name].double().numpy() if name in stage.shifts else 0.0
        total += ((served @ quantized[name].dequantize().double().numpy().T + bias - wanted) ** 2).sum()
    return total


def test_no_exponent_is_better(make_stage, make_inputs, make_weight) -> None:
    stage, _ = norm_stage(make_stage, make_inputs, make_weight)
    inputs = stage.inputs.double().numpy()
    weight = torch.cat(list(stage.weights.values())).double().numpy()
    tried = [np.ones(48)]
    for exponent in rounded.EXPONENTS:
        scales = np.abs(inputs).max(0) ** exponent / np.abs(weight).max(0) ** (1 - exponent)
        scales /= np.sqrt(scales.max() * scales.min())
        tried.append(stage.admissible(torch.from_numpy(scales).float()).double().numpy())

    def loss(scales) -> float:
        return ((int8_inputs(inputs / scales) @ int8_weight(weight * scales).T - inputs @ weight.T) ** 2).sum()

    chosen = rounded.fold_scales(stage)
    assert chosen is not None
    assert loss(chosen.double().numpy()) <= min(map(loss, tried)) * 1.001  # float32 candidates may tip a tie
    assert min(map(loss, tried)) < 0.5 * loss(tried[0]), "folding gained nothing, so this proves nothing"


def test_the_fold_keeps_the_function(make_stage, make_inputs, make_weight) -> None:
    stage, normalized = norm_stage(make_stage, make_inputs, make_weight)
    scales = rounded.fold_scales(stage)
    assert (scales != 1).any()
    assert stage.gain.dtype == torch.bfloat16
    for weight in stage.weights.values():
        folded = (normalized * stage.gain.float()).double() @ (weight * scales).double().T
        torch.testing.assert_close(folded, stage.inputs.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fold", "bias", "share"), [(True, False, 0.3), (True, True, 0.3), (False, True, 0.999)])
def test_less_is_lost_on_an_outlier(make_stage, make_inputs, make_weight, fold, bias, share) -> None:
    losses = []
    for options in (NEITHER, ComponentSpec(search=SearchOptions(fold=fold, correct_bias=bias))):
        stage, normalized = norm_stage(make_stage, make_inputs, make_weight, options=options, biased=True)
        losses.append(output_error(stage, normalized, search.quantize_stage(stage)))
    assert losses[1] < share * losses[0]


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static", "fp8-dynamic", "fp8-static"])
def test_the_mean_of_what_is_put_out_is_right(make_stage, make_inputs, make_weight, scheme) -> None:
    stage, _ = norm_stage(make_stage, make_inputs, make_weight, scheme=SHORT_SCHEMES[scheme], biased=True)
    quantized = search.quantize_stage(stage)
    met = stage.rounding(stage.channel_scales)(stage.inputs).double()
    for name, weight in stage.weights.items():
        wanted = (stage.inputs.double() @ weight.double().T).mean(0)
        without = (met @ quantized[name].dequantize().double().T).mean(0)
        assert stage.shifts[name].abs().max() > 0
        torch.testing.assert_close(without + stage.shifts[name].double(), wanted, rtol=1e-4, atol=1e-4)


def test_no_bias_is_made_where_there_is_none(make_stage, make_inputs, make_weight) -> None:
    stage, _ = norm_stage(make_stage, make_inputs, make_weight)
    search.quantize_stage(stage)
    assert stage.shifts == {}


def test_nothing_is_folded_where_nothing_is_gained(make_stage, make_weight) -> None:
    """Inputs and weights of one magnitude each have no channel larger than another."""
    random = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randint(0, 2, (rows, 48), generator=random) * 2.0 - 1 for rows in (64, 12))
    stage = make_stage({"fc1": weight}, W8A8, inputs, gain=torch.ones(48, dtype=torch.bfloat16), options=BOTH)
    assert rounded.fold_scales(stage) is None
    assert stage.channel_scales is None


@pytest.mark.parametrize("scheme", [W8A8, SHORT_SCHEMES["w8a16"]])
def test_switched_off_the_codes_are_plain(make_stage, make_inputs, make_weight, scheme) -> None:
    """And where inputs are not rounded, in any case."""
    options = NEITHER if scheme is W8A8 else BOTH
    stage, _ = norm_stage(make_stage, make_inputs, make_weight, scheme=scheme, options=options, biased=True)
    bare = make_stage(stage.weights, scheme, stage.inputs, options=NEITHER)
    ours, plain = search.quantize_stage(stage), search.quantize_stage(bare)
    assert all(torch.equal(ours[name].codes, plain[name].codes) for name in plain)
    assert stage.channel_scales is None
    assert stage.shifts == {}
