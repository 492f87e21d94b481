"""What the stream says the original model gives a layer, against ordinary passes of both models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests.test_stream import CLOSE, batches_of, same_weight, stream_of
from tests.tiny_vlm import KINDS, build
from vlmquant.algorithms import ALGORITHMS
from vlmquant.components import resolve_components
from vlmquant.planning import make_plan
from vlmquant.recipe import Recipe, parse_recipe
from vlmquant.stream import BlockResult, BlockStream, Moments

RECIPE = """
name: test
components:
  vision_encoder: {scheme: VISION, method: int8, search: {fold: true, correct_bias: true}}
  language: {scheme: w4a16, method: gptq, gptq: {target: outputs}, overrides: OVERRIDES}
"""
HELD = 1
"""Of two batches whose samples are not known the last is held out."""


def recipe_of(vision: str = "w8a8-dynamic", overrides: str = "[]") -> Recipe:
    text = RECIPE.replace("VISION", vision).replace("OVERRIDES", overrides)
    return parse_recipe(text, name="test")


def copy_of(moments: Moments) -> Moments:
    return Moments(moments.squares.clone(), moments.cross.clone(), moments.tokens, list(moments.held))


def run(stream: BlockStream) -> tuple[dict[str, BlockResult], dict[str, Moments]]:
    results, seen = {}, {}
    for block in stream:
        for stage in block.stages():
            if stage.has_originals:
                for linear in stage.linears.values():
                    seen[linear.name] = stage.of_moments(copy_of)
            stage.finish(ALGORITHMS[stage.method](stage))
        results[block.info.name] = block.result
    return results, seen


def inputs_by_batch(model: Any, names: set[str], batches: list[Any], int8: set[str]) -> list[dict[str, Tensor]]:
    """What each linear is given by each batch, (tokens, in)."""
    found: list[dict[str, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...]:
        if name in names:
            found[-1][name] = args[0].reshape(-1, args[0].shape[-1])
        if name not in int8:
            return args
        scale = (args[0].abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-12)
        return ((args[0] / scale).round().clamp(-128, 127) * scale,)

    for name in names | int8:
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: hook(m, a, name))
    with torch.no_grad():
        for make in batches:
            found.append({})
            model(**make().inputs, use_cache=False)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_both_models_inputs_meet_at_every_layer(kind: str, tmp_path: Path) -> None:
    model_dir = build(kind, tmp_path / kind)
    components, recipe, batches = resolve_components(model_dir), recipe_of(), batches_of(kind)
    results, seen = run(stream_of(components, recipe, batches))
    plan = make_plan(components, recipe)
    assert set(seen) == {line.name.removesuffix(".weight") for line in plan.lines if line.needs_original}
    assert seen
    original = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    served = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    parameters = dict(served.named_parameters())
    for result in results.values():
        for name, weight in result.quantized.items():
            parameters[name].data = weight.dequantize()
        for name, value in result.changed.items():
            parameters[name].data = value.float()
    int8 = {line.name.removesuffix(".weight") for line in plan.lines if line.method == "int8"}
    wanted = inputs_by_batch(original, set(seen), batches, set())
    given = inputs_by_batch(served, set(seen), batches, int8)
    for name, moments in seen.items():
        x, z = wanted[1 - HELD][name], given[1 - HELD][name]
        scale = z.square().mean().item() * len(z)
        torch.testing.assert_close(moments.squares / scale, z.T @ z / scale, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)
        wanted_cross = (x - z).T @ z / scale
        torch.testing.assert_close(moments.cross / scale, wanted_cross, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)
        assert moments.tokens == len(z)
        (held,) = moments.held
        x, z = wanted[HELD][name], given[HELD][name]
        assert held.shift is not None
        torch.testing.assert_close(held.inputs, z, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(held.shift, x - z, rtol=1e-2, atol=1e-2)


def test_what_has_no_error_before_it_is_rounded_from_its_own_weights(tmp_path: Path) -> None:
    """While nothing is quantized both models are one: the first stage of the first block has nothing to make up for."""
    components = resolve_components(build("llava", tmp_path / "llava"))
    recipe = recipe_of("fp16", '[{layers: "1:", scheme: w4a16, method: gptq}, {layers: "0:1", scheme: fp16}]')
    _, seen = run(stream_of(components, recipe, batches_of("llava")))
    first, *others = seen.values()
    assert not first.cross.any()
    assert any(one.cross.any() for one in others)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_ways_of_the_passes_give_the_same_codes(kind: str, tmp_path: Path) -> None:
    components, recipe, batches = resolve_components(build(kind, tmp_path / kind)), recipe_of(), batches_of(kind)
    kept, _ = run(stream_of(components, recipe, batches))
    ways = {
        "rerun": stream_of(components, recipe, batches, rerun=True),
        "spilled": stream_of(components, recipe, batches, rerun=True, spill=tmp_path),
        "resumed": stream_of(components, recipe, batches, restore=dict(list(kept.items())[:-1])),
    }
    for way, stream in ways.items():
        for name, result in run(stream)[0].items():
            assert result.alphas == kept[name].alphas, way
            for weight, codes in result.quantized.items():
                assert same_weight(codes, kept[name].quantized[weight]), (way, weight)


def test_samples_are_held_out_one_by_one_where_rows_tell_them_apart(tmp_path: Path) -> None:
    components = resolve_components(build("llava", tmp_path / "llava"))
    stream = stream_of(components, recipe_of(), batches_of("llava"))
    stream._samples = {0: 4, 1: 4, 2: 4, 3: 4}
    inputs = torch.zeros(4, 3, 5)
    held = torch.cat([stream.held_out(number, inputs) for number in range(4)]).view(16, 3)
    assert held.all(1).nonzero().flatten().tolist() == [7, 15]
    assert held.any(1).sum() == 2


def test_a_stage_without_the_original_is_rounded_as_ever(tmp_path: Path) -> None:
    """Where there is nothing beside the inputs, or the recipe does not ask, the codes are those of plain GPTQ."""
    components, batches = resolve_components(build("llava", tmp_path / "llava")), batches_of("llava")
    plain = parse_recipe(
        RECIPE.replace("VISION", "w8a8-dynamic").replace("OVERRIDES", "[]").replace("outputs", "weights"), name="test"
    )
    without, seen = run(stream_of(components, plain, batches))
    assert not seen
    aimed, _ = run(stream_of(components, recipe_of(), batches))
    first = next(info.name for info in components.blocks if info.component == "language")
    differ = [
        name
        for name, weight in aimed[first].quantized.items()
        if not same_weight(weight, without[first].quantized[name])
    ]
    assert differ  # the vision encoder's INT8 errors are what its first layer is told of
    assert all(0 <= alpha <= 1 for result in aimed.values() for alpha in result.alphas.values())
