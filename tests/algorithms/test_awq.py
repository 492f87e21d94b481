"""AWQ against trying every candidate in float64, and the fold against the original output."""

import numpy as np
import pytest
import torch

from vlmquant.algorithms import awq, gptq, rtn
from vlmquant.algorithms.factor import factorize
from vlmquant.algorithms.folding import finder
from vlmquant.grid import Grid, mid_code
from vlmquant.recipe import AwqOptions, ComponentSpec, GptqOptions, Scheme
from vlmquant.stream import Moments, Rows

W4 = Scheme(bits=4, group_size=16)


def norm_stage(
    make_stage, make_inputs, make_weight, *, dtype=torch.bfloat16, offset=0.0, scheme=W4, names=("gate", "up")
):
    """Linears behind a norm: (stage, what the norm puts out before its gain). Some inputs fire strongly."""
    normalized = make_inputs(384, 48, spread=1.5)
    gain = (make_weight(1, 48, seed=5)[0].abs() * 10 + 0.3 - offset).to(dtype)
    weights = {name: make_weight(12, 48, seed=10 + i) for i, name in enumerate(names)}
    inputs = normalized * (gain.float() + offset)
    return make_stage(weights, scheme, inputs, gain=gain, gain_offset=offset, scale_dtype=dtype), normalized


def rounded(weight, *, bits, group_size, symmetric, shrink=1.0):
    """Plain float64 rounding of (rows, columns) whose columns fill whole groups, on bfloat16 scales."""
    top, rows = 2**bits - 1, len(weight)
    groups = weight.reshape(rows, -1, group_size)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = np.maximum(high, -low) / (top / 2) if symmetric else (high - low) / top
    scale = torch.from_numpy(scale * shrink).bfloat16().double().numpy()[..., None]
    zero = mid_code(bits) if symmetric else np.clip(np.rint(-low[..., None] * shrink / scale), 0, top)
    codes = np.clip(np.rint(groups / scale) + zero, 0, top)
    return ((codes - zero) * scale).reshape(rows, -1)


@pytest.mark.parametrize("scheme", [W4, Scheme(bits=3, group_size=16), Scheme(bits=4, group_size=48, symmetric=False)])
def test_no_ratio_on_the_grid_is_better(make_stage, make_inputs, make_weight, scheme) -> None:
    stage, _ = norm_stage(make_stage, make_inputs, make_weight, scheme=scheme)
    weight = torch.cat(list(stage.weights.values())).double().numpy()
    hessian, strength = stage.hessian().double().numpy(), stage.mean_abs().double().numpy()
    layout = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}

    groups = np.abs(weight).reshape(len(weight), -1, scheme.group_size)
    relative = (groups / groups.max(-1, keepdims=True)).reshape(len(weight), -1).mean(0)
    losses, tried = [], [np.ones(48)]
    for ratio in np.arange(20) / 20:
        scales = np.maximum(strength**ratio / relative ** (1 - ratio), 1e-4)
        scales /= np.sqrt(scales.max() * scales.min())
        tried.append(stage.admissible(torch.from_numpy(scales).float()).double().numpy())
    for scales in tried:
        error = rounded(weight * scales, **layout) / scales - weight
        losses.append(np.trace(error @ hessian @ error.T))

    awq.quantize_stage(stage)
    assert stage.channel_scales is not None
    chosen = stage.channel_scales.double().numpy()
    error = rounded(weight * chosen, **layout) / chosen - weight
    assert np.trace(error @ hessian @ error.T) <= min(losses) * 1.001  # float32 candidates; a tie at a rounding edge
    assert min(losses) < 0.95 * losses[0], "scaling gained nothing, so this proves nothing"


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_clipping_on_the_grid_is_better(make_inputs, make_weight, symmetric) -> None:
    inputs, weight = make_inputs(384, 48), make_weight(6, 48)
    weight[:, ::16] *= 3  # a lone outlier in every group
    hessian = inputs.T @ inputs / len(inputs)
    grid = Grid(3, 16, torch.bfloat16, symmetric)
    ours = awq.quantize_clipped(weight, hessian, grid, clip=True)

    exact, losses = weight.double().numpy(), []

    def group_losses(quantized):
        error = (quantized - exact).reshape(6, 3, 16)
        blocks = np.stack([hessian.double().numpy()[a : a + 16, a : a + 16] for a in (0, 16, 32)])
        return np.einsum("rgi,gij,rgj->rg", error, blocks, error)

    for step in range(20):
        shrink = 1 - 0.5 * step / 20
        losses.append(group_losses(rounded(exact, bits=3, group_size=16, symmetric=symmetric, shrink=shrink)))
    best = np.min(losses, axis=0)
    assert (group_losses(ours.dequantize().double().numpy()) <= best * (1 + 1e-3)).all()
    assert best.sum() < 0.9 * losses[0].sum(), "clipping gained nothing, so this proves nothing"


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.bfloat16, 1.0)])
def test_the_fold_keeps_the_function_as_stored(make_stage, make_inputs, make_weight, dtype, offset) -> None:
    stage, normalized = norm_stage(make_stage, make_inputs, make_weight, dtype=dtype, offset=offset)
    original = {name: stage.inputs @ weight.T for name, weight in stage.weights.items()}
    quantized = awq.quantize_stage(stage)
    assert stage.channel_scales is not None
    assert (stage.channel_scales != 1).any()
    assert stage.gain.dtype == dtype
    for name, weight in stage.weights.items():
        folded = (normalized * (stage.gain.float() + offset)) @ (weight * stage.channel_scales).T
        torch.testing.assert_close(folded, original[name], rtol=1e-5, atol=1e-5)
        # Clipping is judged on the inputs that the folded norm gives.
        served = normalized * (stage.gain.float() + offset)
        expected = awq.quantize_clipped(
            weight * stage.channel_scales, served.T @ served / len(served), stage.grid, clip=True, signed=True
        )
        agreement = (quantized[name].codes == expected.codes).float().mean()
        assert agreement > 0.99  # sums in another order may tip a tie


@pytest.mark.parametrize("bits", [3, 4])
def test_beats_rounding_to_nearest(make_stage, make_inputs, make_weight, bits) -> None:
    scheme = Scheme(bits=bits, group_size=16)
    stage, normalized = norm_stage(make_stage, make_inputs, make_weight, scheme=scheme)
    wanted = {name: stage.inputs @ weight.T for name, weight in stage.weights.items()}
    plain = {name: stage.inputs @ weight.dequantize().T for name, weight in rtn.quantize_stage(stage).items()}
    quantized = awq.quantize_stage(stage)
    for name, weight in quantized.items():
        output = normalized * stage.gain.float() @ weight.dequantize().T
        assert (output - wanted[name]).square().sum() < 0.8 * (plain[name] - wanted[name]).square().sum()


def test_without_a_producer_only_clipping_is_searched(make_stage, make_inputs, make_weight) -> None:
    stage = make_stage({"o_proj": make_weight(8, 48)}, W4, make_inputs(256, 48))
    expected = awq.quantize_clipped(stage.weights["o_proj"], stage.hessian(), stage.grid, clip=True, signed=True)
    assert torch.equal(awq.quantize_stage(stage)["o_proj"].codes, expected.codes)
    assert stage.channel_scales is None


def test_with_feedback_it_is_gptq_on_the_folded_weights(make_stage, make_inputs, make_weight) -> None:
    stage, normalized = norm_stage(make_stage, make_inputs, make_weight)
    find = finder(stage)
    assert find is not None
    told = find(factorize(stage.hessian(), 0.01, activation_order=True))
    quantized = awq.quantize_stage_with_feedback(stage)
    scales = stage.channel_scales
    assert scales is not None
    assert torch.equal(scales, told)
    served = normalized * stage.gain.float()  # what the folded norm gives
    factor = factorize(served.T @ served / len(served), 0.01, activation_order=True)
    for name, weight in stage.weights.items():
        expected, _ = gptq.quantize_weight(weight * scales, factor, stage.grid, GptqOptions())
        assert (quantized[name].codes == expected.codes).float().mean() > 0.98  # sums in another order may tip a tie
        lost, whole = stage.losses[name]
        error = (quantized[name].dequantize() / scales - weight).double()
        hessian = stage.hessian().double()
        assert lost == pytest.approx((error @ hessian * error).sum().item(), rel=1e-3)
        assert whole == pytest.approx((weight.double() @ hessian * weight.double()).sum().item(), rel=1e-3)


def test_feedback_behind_a_fold_loses_less_than_either(make_stage, make_inputs, make_weight) -> None:
    losses = {}
    for name, quantize in (("awq", awq.quantize_stage), ("both", awq.quantize_stage_with_feedback)):
        stage, _ = norm_stage(make_stage, make_inputs, make_weight, scheme=Scheme(bits=3, group_size=16))
        found = quantize(stage)
        losses[name] = sum(
            awq.output_error(found[local].dequantize() / stage.channel_scales - weight, stage.hessian())
            for local, weight in stage.weights.items()
        )
    assert losses["both"] < 0.9 * losses["awq"]


def test_without_a_producer_feedback_is_plain_gptq(make_stage, make_inputs, make_weight) -> None:
    one, other = (make_stage({"o_proj": make_weight(8, 48)}, W4, make_inputs(256, 48)) for _ in range(2))
    assert torch.equal(
        awq.quantize_stage_with_feedback(one)["o_proj"].codes, gptq.quantize_stage(other)["o_proj"].codes
    )


@pytest.mark.parametrize("folds", [True, False])
def test_told_the_originals_outputs_it_makes_up_for_errors(make_stage, make_inputs, make_weight, folds) -> None:
    """Its loss on tokens that it has not seen: |W x - Q z|^2; z is what it is given, x what the original gives."""
    stage, _ = norm_stage(make_stage, make_inputs, make_weight)
    if not folds:
        stage = make_stage(stage.weights, W4, stage.inputs)
    told, _ = norm_stage(make_stage, make_inputs, make_weight)
    if not folds:
        told.gain = None
    inputs, error = stage.inputs, 0.2 * make_weight(48, 48, seed=3)
    fit, held, unseen = inputs[:256], inputs[256:320], inputs[320:]
    told.inputs, told.is_aimed = stage.inputs, True
    told.moments = Moments(fit.T @ fit, (fit @ error).T @ fit, len(fit), [Rows(held, None, held @ error)])
    lost = []
    for one in (stage, told):
        codes = awq.quantize_stage(one)
        scales = 1 if one.channel_scales is None else one.channel_scales
        lost.append(
            sum(
                ((unseen + unseen @ error) @ weight.T - unseen @ (codes[name].dequantize() / scales).T).square().sum()
                for name, weight in one.weights.items()
            )
        )
    assert lost[1] < lost[0] / 3
    assert stage.alpha is None
    assert told.alpha == pytest.approx(1, abs=0.05)  # the correction is linear, and there are tokens enough


def test_clip_can_be_switched_off(make_stage, make_inputs, make_weight) -> None:
    options = ComponentSpec(awq=AwqOptions(clip=False))
    stage = make_stage({"o_proj": make_weight(8, 48)}, W4, make_inputs(256, 48), options=options)
    assert torch.equal(awq.quantize_stage(stage)["o_proj"].codes, rtn.quantize_stage(stage)["o_proj"].codes)


def test_a_gain_that_would_overflow_keeps_its_channel(make_stage, make_inputs, make_weight) -> None:
    """A float16 gain of 60000 cannot be divided by a scale below .92: that scale stays 1, and nothing is infinite."""
    stage, normalized = norm_stage(make_stage, make_inputs, make_weight, dtype=torch.float16)
    stage.gain[0] = 60000.0
    normalized[:, 0] *= 1e-9
    stage.inputs = normalized * stage.gain.float()
    original = {name: stage.inputs @ weight.T for name, weight in stage.weights.items()}
    quantized = awq.quantize_stage(stage)
    assert stage.channel_scales is not None
    assert stage.gain.isfinite().all()
    assert stage.channel_scales[0] >= 60000 / 65504
    for name, weight in stage.weights.items():
        folded = (normalized * stage.gain.float()) @ (weight * stage.channel_scales).T
        torch.testing.assert_close(folded, original[name], rtol=1e-5, atol=1e-5)
        assert quantized[name].scales.isfinite().all()


def test_damping_is_a_share_of_the_mean_second_moment(make_stage, make_inputs, make_weight) -> None:
    weights, inputs = {"o_proj": make_weight(8, 48)}, make_inputs(256, 48)
    options = ComponentSpec(awq=AwqOptions(damping=0.5))
    damped = make_stage(weights, W4, inputs, options=options)
    gram = damped.hessian() + 0.5 * damped.hessian().diagonal().mean() * torch.eye(48)
    same = make_stage(weights, W4, gram=gram)
    assert torch.equal(awq.quantize_stage(damped)["o_proj"].codes, awq.quantize_stage(same)["o_proj"].codes)
