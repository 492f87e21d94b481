"""The stream against plain forward passes of ordinary models that hold the same weights."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests.tiny_vlm import KINDS, TEXT, build, image_inputs
from vlmquant import stream as stream_module
from vlmquant.algorithms import ALGORITHMS, rounded
from vlmquant.calibration.encode import Batch
from vlmquant.components import ComponentMap, resolve_components
from vlmquant.errors import SentinelError
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import make_plan
from vlmquant.recipe import Recipe, TokenWeights, parse_recipe
from vlmquant.stream import BlockResult, BlockStream

RECIPE = """
name: test
components:
  vision_encoder: {scheme: w8a8-dynamic, method: int8}
  language: {scheme: w4a16, method: METHOD}
"""
# The passes are float32 on both sides; sums run in another order.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def recipe_of(method: str) -> Recipe:
    return parse_recipe(RECIPE.replace("METHOD", method), name="test")


def batches_of(kind: str, seeds: tuple[int, ...] = (0, 1)) -> list[Any]:
    def make(seed: int) -> Batch:
        inputs = image_inputs(kind, seed=seed)
        return Batch(inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool), ())

    return [lambda seed=seed: make(seed) for seed in seeds]


NO_CLIP = 1e9
NOT_CLIPPED = TokenWeights(clip=NO_CLIP)
"""So that sums are over tokens that all count alike."""


def stream_of(
    components: ComponentMap,
    recipe: Recipe,
    batches: list[Any],
    restore: dict[str, BlockResult] | None = None,
    *,
    token_weights: TokenWeights | None = NOT_CLIPPED,
    **more: Any,
) -> BlockStream:
    return BlockStream(
        components,
        make_plan(components, recipe),
        dict(recipe.specs()),
        batches,
        outside={},
        restore=lambda info: (restore or {}).get(info.name),
        dtype=torch.float32,
        device=torch.device("cpu"),
        token_weights=token_weights,
        **more,
    )


def run(stream: BlockStream) -> tuple[dict[str, BlockResult], dict[str, Tensor]]:
    """Every block's result, and every linear's E[x x^T] as its stage saw it."""
    results, hessians = {}, {}
    for block in stream:
        for stage in block.stages():
            for linear in stage.linears.values():
                hessians[linear.name] = stage.hessian().clone()
            stage.finish(ALGORITHMS[stage.method](stage))
        results[block.info.name] = block.result
    return results, hessians


def served_hessians(
    model_dir: Path, results: dict[str, BlockResult], batches: list[Any], components: ComponentMap, recipe: Recipe
) -> dict[str, Tensor]:
    """The same from an ordinary model with the results' weights, whose INT8 layers round their inputs."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    plan = make_plan(components, recipe)
    rows: dict[str, list[Tensor]] = {}
    for result in results.values():
        for name, value in [*result.changed.items(), *((n, w.dequantize()) for n, w in result.quantized.items())]:
            parameters[name].data = value.float()
    for linear in components.linears:
        if plan.line(f"{linear.name}.weight").action == "quantize":
            line = plan.line(f"{linear.name}.weight")

            def hook(
                module: nn.Module, args: tuple[Tensor, ...], name: str = linear.name, int8: bool = line.method == "int8"
            ) -> tuple[Tensor, ...]:
                rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
                if not int8:
                    return args
                scale = (args[0].abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-12)
                return ((args[0] / scale).round().clamp(-128, 127) * scale,)

            model.get_submodule(linear.name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for make in batches:
            model(**make().inputs, use_cache=False)
    return {name: (x := torch.cat(parts)).T @ x / len(x) for name, parts in rows.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_quantized_on_what_the_quantized_model_gives_it(kind: str, tmp_path: Path) -> None:
    model_dir = build(kind, tmp_path / kind)
    components, recipe, batches = resolve_components(model_dir), recipe_of("gptq"), batches_of(kind)
    results, hessians = run(stream_of(components, recipe, batches))
    served = served_hessians(model_dir, results, batches, components, recipe)
    assert {block.name for block in components.blocks} == set(results)
    assert set(served) == set(hessians)
    for name, hessian in hessians.items():
        scale = served[name].diagonal().mean().item()
        torch.testing.assert_close(hessian / scale, served[name] / scale, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)


def test_awq_folds_keep_what_later_layers_get(tmp_path: Path) -> None:
    model_dir = build("llava", tmp_path / "llava")
    components, recipe, batches = resolve_components(model_dir), recipe_of("awq"), batches_of("llava")
    results, hessians = run(stream_of(components, recipe, batches))
    served = served_hessians(model_dir, results, batches, components, recipe)
    folded = 0
    for block in components.blocks:
        if block.component != "language":
            continue
        norm = f"{block.name}.input_layernorm.weight"
        if norm not in results[block.name].changed:
            continue
        folded += 1
        scales = components.read(norm).float() / results[block.name].changed[norm].float()
        name = f"{block.name}.self_attn.q_proj"
        unfolded = served[name] * scales[:, None] * scales[None, :]
        torch.testing.assert_close(hessians[name], unfolded, **CLOSE)
    assert folded


def test_a_resumed_stream_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    model_dir = build("qwen3_vl", tmp_path / "qwen3_vl")
    components, recipe, batches = resolve_components(model_dir), recipe_of("gptq"), batches_of("qwen3_vl")
    whole, _ = run(stream_of(components, recipe, batches))
    first = dict(list(whole.items())[: len(whole) - 1])
    resumed, hessians = run(stream_of(components, recipe, batches, restore=first))
    assert hessians.keys() == {linear.name for linear in components.blocks[-1].linears}
    for name, result in whole.items():
        for weight, codes in result.quantized.items():
            assert same_weight(codes, resumed[name].quantized[weight])


def same_weight(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def test_padding_is_not_calibrated_on(tmp_path: Path) -> None:
    components, recipe = resolve_components(build("llava", tmp_path / "llava")), recipe_of("gptq")
    plain = batches_of("llava", (0,))

    def padded() -> Batch:
        inputs = dict(plain[0]().inputs)
        for key in ("input_ids", "attention_mask"):
            inputs[key] = nn.functional.pad(inputs[key], (0, 7))
        return Batch(inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool), ())

    _, without = run(stream_of(components, recipe, plain))
    _, with_padding = run(stream_of(components, recipe, [padded]))
    # Of the first language layer, whose inputs no rounding has touched that could turn noise into another code.
    name = next(block for block in components.blocks if block.component == "language").linears[0].name
    torch.testing.assert_close(with_padding[name], without[name], **CLOSE)


def test_text_alone_cannot_calibrate_a_vision_encoder(tmp_path: Path) -> None:
    components, recipe = resolve_components(build("llava", tmp_path / "llava")), recipe_of("gptq")
    ids = torch.tensor([[5, 6, 7, 8]])
    text = Batch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros_like(ids, dtype=torch.bool), ()
    )
    with pytest.raises(SentinelError, match=r"vision_tower.*never ran during calibration"):
        run(stream_of(components, recipe, [lambda: text]))


def test_infinite_inputs_are_refused(tmp_path: Path) -> None:
    components, recipe = resolve_components(build("llava", tmp_path / "llava")), recipe_of("gptq")

    def broken() -> Batch:
        batch = batches_of("llava", (0,))[0]()
        batch.inputs["pixel_values"][0, 0, 0, 0] = torch.inf
        return batch

    with pytest.raises(SentinelError, match="received NaN or infinite inputs"):
        run(stream_of(components, recipe, [broken]))


def test_weights_leave_memory_once_their_block_is_done(tmp_path: Path) -> None:
    components, recipe = resolve_components(build("llava", tmp_path / "llava")), recipe_of("rtn")
    stream = stream_of(components, recipe, batches_of("llava"))
    blocks = [block.name for block in components.blocks]
    for block in stream:
        for stage in block.stages():
            stage.finish(ALGORITHMS[stage.method](stage))
        for name in blocks[: blocks.index(block.info.name)]:
            assert all(parameter.is_meta for parameter in stream.model.get_submodule(name).parameters())


METHODS = {
    "gptq": RECIPE.replace("METHOD", "gptq"),
    "awq": RECIPE.replace("METHOD", "awq"),
    "inputs": RECIPE.replace("scheme: w4a16, method: METHOD", "scheme: nvfp4, method: gptq").replace(
        "scheme: w8a8-dynamic, method: int8", "scheme: w8a8-static, method: rtn"
    ),
    "rounded": RECIPE.replace("METHOD", "gptq").replace(
        "method: int8", "method: int8, search: {fold: true, correct_bias: true}"
    ),
    "cache": RECIPE.replace("METHOD", "gptq") + "kv_cache: {dtype: fp8, strategy: head}\n",
}


@pytest.mark.parametrize(
    ("kind", "method", "spilled"),
    [
        *(("llava", method, True) for method in METHODS),
        ("qwen3_vl", "gptq", False),
        ("gemma3", "awq", True),
        *(
            pytest.param(kind, method, spilled, marks=pytest.mark.slow)
            for kind in ("qwen3_vl", "gemma3")
            for method in METHODS
            for spilled in (False, True)
        ),
    ],
)
def test_passes_that_are_not_kept_give_the_same(
    kind: str, method: str, spilled: bool, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walking through a block anew for every stage, with what lies between blocks in memory or on disk."""
    monkeypatch.setattr(stream_module, "SPILL_BYTES", 1)
    if method == "rounded":  # folds wherever there can be one, so that codes take scales, too
        monkeypatch.setattr(rounded, "candidates", lambda weights, largest: [1 + torch.arange(len(largest)) % 2.0])
        monkeypatch.setattr(rounded, "rounded_error", lambda stage, scales, *_: 1.0 if scales is None else 0.5)
    components, recipe = resolve_components(tiny(kind)), parse_recipe(METHODS[method], name="test")
    kept, hessians = run(stream_of(components, recipe, batches_of(kind, (0, 1, 2))))
    again = stream_of(components, recipe, batches_of(kind, (0, 1, 2)))
    again.rerun, again._spill = True, tmp_path if spilled else None
    found, others = run(again)
    assert found.keys() == kept.keys()
    assert list(tmp_path.iterdir()) == []
    for name, hessian in hessians.items():
        assert torch.equal(others[name], hessian)
    for name, block in kept.items():
        assert found[name].errors == block.errors
        assert found[name].notes == block.notes
        assert found[name].cache == block.cache
        assert found[name].changed.keys() == block.changed.keys()
        assert found[name].quantized.keys() == block.quantized.keys()
        for one, value in block.changed.items():
            assert torch.equal(found[name].changed[one], value)
        for one, weight in block.quantized.items():
            assert torch.equal(found[name].quantized[one].codes, weight.codes)
            assert torch.equal(found[name].quantized[one].scales, weight.scales)
            assert found[name].quantized[one].input_scale == weight.input_scale


def test_passes_that_are_not_kept_leave_nothing_in_a_block(tiny: Any) -> None:
    """While a stage is quantized no tensor of the block's inside is alive: nothing as wide as its inputs."""
    components, recipe = resolve_components(tiny("llava")), recipe_of("gptq")
    gc.collect()
    others = [one for one in gc.get_objects() if type(one) is Tensor]  # of other tests
    known = set(map(id, others))

    def widest(rerun: bool) -> int:
        gc.collect()  # passes that have ended hold what they computed in circles
        stream, found = stream_of(components, recipe, batches_of("llava", (0, 1, 2))), 0
        stream.rerun = rerun
        for block in stream:
            for stage in block.stages():
                if "mlp.down_proj" in stage.linears:
                    wide = [
                        one
                        for one in gc.get_objects()
                        if type(one) is Tensor and id(one) not in known and one.dim() == 3
                        if one.shape[-1] == TEXT["intermediate_size"]
                    ]
                    found = max(found, len(wide))
                    del wide
                stage.finish(ALGORITHMS[stage.method](stage))
        return found

    assert widest(rerun=False) >= 3
    assert widest(rerun=True) == 0
