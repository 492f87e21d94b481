"""The method chosen by loss on samples held out: losses against float64, codes against those of each method alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_original_passes import copy_of
from tests.test_stream import batches_of, stream_of
from tests.tiny_vlm import build
from vlmquant.algorithms import ALGORITHMS, auto, awq, gptq
from vlmquant.algorithms.folding import Find, finder
from vlmquant.algorithms.target import aim, factor_of
from vlmquant.components import ComponentMap, resolve_components
from vlmquant.recipe import Recipe, parse_recipe
from vlmquant.stream import BlockResult, Moments, Stage

SEEDS = tuple(range(16))


def recipe_of(method: str, target: str) -> Recipe:
    text = f"name: test\ncomponents: {{language: {{scheme: w4a16, method: {method}, gptq: {{target: {target}}}}}}}\n"
    return parse_recipe(text, name="test")


def quantized(components: ComponentMap, recipe: Recipe, batches: list[Any], **more: Any) -> dict[str, BlockResult]:
    results = {}
    for block in stream_of(components, recipe, batches, **more):
        for stage in block.stages():
            stage.finish(ALGORITHMS[stage.method](stage))
        results[block.info.name] = block.result
    return results


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> ComponentMap:
    return resolve_components(build("llava", tmp_path_factory.mktemp("auto") / "llava"))


def by_hand(weight: Tensor, effective: Tensor, moments: Moments) -> float:
    """sum over the later half of the held-out tokens of |W x - Q z|^2, float64."""
    z = torch.cat([rows.inputs for rows in moments.held]).double()
    shift = torch.cat(
        [torch.zeros_like(rows.inputs) if rows.shift is None else rows.shift for rows in moments.held]
    ).double()
    half = len(z) // 2
    x, z = (z + shift)[half:], z[half:]
    return (x @ weight.double().T - z @ effective.double().T).square().sum().item()


def losses_of_feedback(stage: Stage, moments: Moments, find: Find, *, aimed: bool) -> float:
    """Of awq+gptq, whose scales are told before they are divided by."""
    options, weights = stage.options.gptq, stage.weights
    shown = auto._apart(copy_of(moments))[0]
    tokens = moments.tokens if aimed else None  # which correlations are shrunk by
    scales = find(factor_of(moments.squares / moments.tokens, options, tokens=tokens))
    if scales is not None:
        weights = {name: weight * scales for name, weight in weights.items()}
    if aimed:
        target = aim(weights, shown.divided(scales), options)
        weights, factor = target.weights, target.factor
    else:
        hessian = moments.squares / moments.tokens
        factor = factor_of(hessian if scales is None else hessian / scales / scales[:, None], options)
    lost = 0.0
    for name, weight in stage.weights.items():
        value = gptq.quantize_weight(weights[name], factor, stage.grid, options)[0].dequantize()
        lost += by_hand(weight, value if scales is None else value / scales, moments)
    return lost


@pytest.mark.parametrize("target", ["weights", "outputs"])
def test_losses_are_those_of_unseen_tokens(target: str, components: ComponentMap) -> None:
    """Of all methods, for codes that are found from what is not held out alone."""
    compared = 0
    for block in stream_of(components, recipe_of("auto", target), batches_of("llava", SEEDS)):
        for stage in block.stages():
            mean_abs = stage.mean_abs() if stage.can_fold else None
            moments = stage.of_moments(copy_of)
            assert any(rows.shift is not None for rows in moments.held) == (target == "outputs")
            find = finder(stage)
            found = auto.held_losses(stage, copy_of(moments), mean_abs, aimed=target == "outputs", find=find)
            assert set(found) == set(auto.METHODS if mean_abs is not None else ("gptq", "search"))
            hessian = moments.squares / moments.tokens
            if target == "weights":
                factor, grid = (
                    factor_of(hessian.clone(), stage.options.gptq),
                    stage.grid.fitted(*stage.weights.values()),
                )
                codes = {
                    name: gptq.quantize_weight(weight, factor, grid, stage.options.gptq)[0].dequantize()
                    for name, weight in stage.weights.items()
                }
                wanted = sum(by_hand(stage.weights[name], codes[name], moments) for name in codes)
                assert found["gptq"] == pytest.approx(wanted, rel=1e-3)
            if mean_abs is not None:
                assert find is not None
                wanted = losses_of_feedback(stage, copy_of(moments), find, aimed=target == "outputs")
                assert found["awq+gptq"] == pytest.approx(wanted, rel=1e-2)  # codes at ties tip by how H was divided
                scales = awq.find_scales(stage, mean_abs, hessian)
                grid = stage.grid.fitted(*stage.weights.values())
                scaled, divided = stage.weights, hessian.clone()
                if scales is not None:
                    scaled = {name: weight * scales for name, weight in scaled.items()}
                    divided = hessian / scales / scales[:, None]
                if target == "outputs":
                    shown = copy_of(auto._apart(moments)[0]).divided(scales)
                    aimed = aim(scaled, shown, stage.options.gptq)
                    scaled, divided = aimed.weights, aimed.factor.hessian()
                wanted = 0.0
                for name, weight in stage.weights.items():
                    codes = awq.quantize_clipped(scaled[name], divided, grid, clip=True, signed=True)
                    value = codes.dequantize()
                    wanted += by_hand(weight, value if scales is None else value / scales, moments)
                assert found["awq"] == pytest.approx(wanted, rel=1e-3)
            compared += 1
            stage.finish(ALGORITHMS["gptq"](stage))
    assert compared >= 8


@pytest.mark.parametrize("method", auto.METHODS)
def test_the_chosen_method_rounds_as_it_does_alone(
    method: str, components: ComponentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(stage: Stage, moments: Moments, mean_abs: Tensor | None, **asked: Any) -> dict[str, float]:
        return {name: float(name != method) for name in auto.METHODS}

    monkeypatch.setattr(auto, "held_losses", losses)
    batches = batches_of("llava", SEEDS[:4])
    chosen = quantized(components, recipe_of("auto", "outputs"), batches)
    alone = quantized(components, recipe_of(method, "outputs"), batches)
    for block, result in alone.items():
        for name, weight in result.quantized.items():
            assert torch.equal(chosen[block].quantized[name].codes, weight.codes), name
            assert torch.equal(chosen[block].quantized[name].scales, weight.scales), name
            assert chosen[block].methods[name] == method
        for name, value in result.changed.items():
            assert torch.equal(chosen[block].changed[name], value), name


def test_the_least_loss_wins(components: ComponentMap, monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = auto.held_losses, dict[str, dict[str, float]]()

    def losses(stage: Stage, moments: Moments, mean_abs: Tensor | None, **asked: Any) -> dict[str, float]:
        tried = real(stage, moments, mean_abs, **asked)
        found.update({linear.name + ".weight": tried for linear in stage.linears.values()})
        return tried

    monkeypatch.setattr(auto, "held_losses", losses)
    results = quantized(components, recipe_of("auto", "outputs"), batches_of("llava", SEEDS))
    for result in results.values():
        for name, method in result.methods.items():
            assert found[name][method] == min(found[name].values()), name
    assert {name for result in results.values() for name in result.methods} == set(found)
    assert any(len(set(tried.values())) > 2 for tried in found.values())


def test_without_samples_held_out_the_first_is_taken(components: ComponentMap) -> None:
    results = quantized(components, recipe_of("auto", "outputs"), batches_of("llava", (0,)))
    alone = quantized(components, recipe_of("gptq", "outputs"), batches_of("llava", (0,)))
    for block, result in alone.items():
        for name, weight in result.quantized.items():
            assert torch.equal(results[block].quantized[name].codes, weight.codes), name
