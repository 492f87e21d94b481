"""Channel scales for rounding with feedback: what they are judged by, against float64 and against rounding itself."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmquant.algorithms import awq, folding, gptq
from vlmquant.algorithms.factor import Factor, factorize
from vlmquant.grid import grid_of
from vlmquant.recipe import GptqOptions, Scheme

W4 = Scheme(bits=4, group_size=16)
SCHEMES = [
    W4,
    Scheme(bits=3, group_size=24),
    Scheme(bits=4, group_size=48, symmetric=False),
    Scheme(bits=4, group_size=20),
]


def factor_at(hessian: Tensor) -> Factor:
    return factorize(hessian.clone(), 0.01, activation_order=True)


def any_scales(scales: Tensor) -> Tensor:
    """What a producer takes that takes all."""
    return scales


def lost(rows: Tensor, unexplained: Tensor, scales: Tensor, scheme: Scheme) -> float:
    """The formula, group by group, in float64."""
    w, d, s = (one.double().numpy() for one in (rows, unexplained, scales))
    total = 0.0
    for start in range(0, w.shape[1], scheme.group_size):
        span = slice(start, start + scheme.group_size)
        scaled = w[:, span] * s[span]
        if scheme.symmetric:
            reach = 2 * np.abs(scaled).max(1)
        else:
            reach = np.maximum(scaled.max(1), 0) - np.minimum(scaled.min(1), 0)
        total += (reach**2).sum() * (d[span] / s[span] ** 2).sum()
    return float(total)


@pytest.fixture
def layer(make_inputs, make_weight):
    """A weight (24, 48) and H (48, 48) of inputs some of which fire strongly."""
    inputs = make_inputs(512, 48, spread=1.2)
    return make_weight(24, 48), inputs.T @ inputs / len(inputs)


def test_what_others_do_not_tell_is_divided_as_the_inputs_are(layer) -> None:
    """D of S^-1 H S^-1 is that of H divided by s^2, whatever goes with what."""
    _, hessian = layer
    scales = torch.linspace(0.3, 3.0, 48)
    before, after = (
        factorize(one.clone(), 1e-9, activation_order=False).unexplained()
        for one in (hessian, hessian / scales / scales[:, None])
    )
    torch.testing.assert_close(after, before / scales**2, rtol=1e-4, atol=0)


def test_it_is_the_conditional_variance_in_the_order_of_the_weight(layer) -> None:
    """1 / D is the diagonal of the inverse of what is processed up to an input."""
    _, hessian = layer
    factor = factorize(hessian.clone(), 1e-9, activation_order=True)
    found, order = factor.unexplained(), factor.order
    for place in (0, 17, 47):
        later = order[place:]
        inverse = torch.linalg.inv(hessian.double()[later][:, later])
        assert found[order[place]].item() == pytest.approx(1 / inverse[0, 0].item(), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_other_scales_lose_much_less(layer, scheme) -> None:
    """Not 1, not one of AWQ's, not what a random step leads to."""
    weight, hessian = layer
    unexplained = factor_at(hessian).unexplained()
    grid = grid_of(scheme, 48, torch.bfloat16)
    scales = folding.find_scales(weight, unexplained, grid, any_scales)
    assert scales is not None
    least = lost(weight, unexplained, scales, scheme)
    assert least < 0.9 * lost(weight, unexplained, torch.ones(48), scheme)
    strength = hessian.diagonal().sqrt()
    for other in awq.channel_scale_candidates(weight, strength, group_size=scheme.group_size, grid_points=20):
        assert least < lost(weight, unexplained, other, scheme)
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        step = (0.05 * torch.randn(48, generator=random)).exp()
        assert lost(weight, unexplained, scales * step, scheme) > 0.98 * least


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_loses_less_with_them(make_inputs, make_weight, scheme) -> None:
    """With scales of groups searched, as they are."""
    inputs = make_inputs(512, 48, spread=1.2)
    hessian, weight = inputs.T @ inputs / len(inputs), make_weight(256, 48)
    grid, options = grid_of(scheme, 48, torch.bfloat16), GptqOptions()
    scales = folding.find_scales(weight, factor_at(hessian).unexplained(), grid, any_scales)
    assert scales is not None
    errors = [
        gptq.quantize_weight(weight * one, factor_at(hessian / one / one[:, None]), grid, options)[1].sum().item()
        for one in (torch.ones(48), scales)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_scales_are_those_that_the_producer_takes(layer) -> None:
    weight, hessian = layer
    unexplained, grid = factor_at(hessian).unexplained(), grid_of(W4, 48, torch.bfloat16)
    powers = folding.find_scales(weight, unexplained, grid, lambda scales: scales.log2().round().exp2())
    assert powers is not None
    assert torch.equal(powers.log2(), powers.log2().round())
    # What it takes is judged again: of a producer that takes nothing of use, nothing is folded.
    assert folding.find_scales(weight, unexplained, grid, torch.ones_like) is None


def test_inputs_that_never_fire_stay_near_the_others(layer) -> None:
    weight, hessian = layer
    hessian[5], hessian[:, 5] = 0, 0
    unexplained = factorize(hessian.clone(), 1e-6, activation_order=True).unexplained()
    scales = folding.find_scales(weight, unexplained, grid_of(W4, 48, torch.bfloat16), any_scales)
    assert scales is not None
    assert scales.isfinite().all()
    assert scales.min() >= 1 / folding.MOST
    assert scales.max() <= folding.MOST


def behind_a_norm(make_stage, make_inputs, make_weight, *, scheme=W4):
    """A stage whose inputs a norm puts out, and that knows what its outputs do to the answers."""
    return make_stage(
        {name: make_weight(12, 48, seed=10 + number) for number, name in enumerate(("gate", "up"))},
        scheme,
        make_inputs(384, 48, spread=1.2),
        gain=make_weight(1, 48, seed=5)[0].abs() * 10 + 0.3,
        output_moments={"gate": [torch.eye(12)], "up": [torch.eye(12)]},
    )


def test_plain_gptq_scales_nothing(make_stage, make_inputs, make_weight) -> None:
    stage = behind_a_norm(make_stage, make_inputs, make_weight)
    gptq.quantize_stage(stage)
    assert stage.channel_scales is None


def test_without_a_producer_nothing_is_scaled(make_stage, make_inputs, make_weight) -> None:
    stage = behind_a_norm(make_stage, make_inputs, make_weight)
    stage.gain = None
    assert folding.finder(stage) is None


def test_outputs_count_as_the_answers_say(make_stage, make_inputs, make_weight) -> None:
    """Scales are those of the linear that counts, of whatever size the other's weights are."""
    stage = behind_a_norm(make_stage, make_inputs, make_weight)
    stage.weights["gate"] *= 30
    stage.output_moments["gate"] = [torch.eye(12) * 1e-9]
    factor = factorize(stage.hessian(), 0.01, activation_order=True)
    find = folding.finder(stage)
    assert find is not None
    alone = folding.find_scales(stage.weights["up"], factor.unexplained(), stage.grid, stage.admissible)
    assert alone is not None
    torch.testing.assert_close(find(factor), alone, rtol=0.03, atol=0)
