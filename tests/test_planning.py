"""A plan has a line for every tensor, its bytes are those on disk, and what cannot work is refused before any work."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlmquant.components import resolve_components
from vlmquant.errors import PlanError
from vlmquant.planning import Plan, make_plan, stored_bytes
from vlmquant.recipe import SHORT_SCHEMES, Recipe, Scheme, load_recipe, parse_recipe, shipped

BF16 = torch.bfloat16
LAYERS = "model.language_model.layers"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def recipe(components: str, *, more: str = "") -> Recipe:
    return parse_recipe(f"version: 1\nname: test\ncomponents: {components}\n{more}", name="test.yaml")


def plan(model_dir: Path, components: str, *, more: str = "") -> Plan:
    return make_plan(resolve_components(model_dir), recipe(components, more=more))


def labels(result: Plan, *, block: str = f"{LAYERS}.0") -> dict[str, str]:
    """Name inside the block -> label, of the block's linear layers."""
    return {
        line.name.removeprefix(f"{block}.").removesuffix(".weight"): line.scheme_label
        for line in result.lines
        if line.name.startswith(f"{block}.") and len(line.shape) == 2
    }


# (64, 256): 4 bits are 32 words a row; 3 bits 24; 8 bits 64. Two groups of 128, scales of 2 bytes; shape 16 bytes.
@pytest.mark.parametrize(
    ("shape", "scheme", "expected"),
    [
        ((64, 256), Scheme(bits=4), 64 * 32 * 4 + 64 * 2 * 2 + 16),
        ((64, 256), Scheme(bits=3), 64 * 24 * 4 + 64 * 2 * 2 + 16),
        ((64, 256), Scheme(bits=8, group_size=None), 64 * 64 * 4 + 64 * 2 + 16),
        ((64, 256), Scheme(bits=4, symmetric=False), 64 * 32 * 4 + 64 * 2 * 2 + 16 + 8 * 2 * 4),
        ((64, 256), Scheme(bits=3, symmetric=False), 64 * 24 * 4 + 64 * 2 * 2 + 16 + 6 * 2 * 4),
        ((10, 16), Scheme(bits=3, group_size=16), 10 * 2 * 4 + 10 * 2 + 16),  # 48 bits a row: two words
        ((64, 256), SHORT_SCHEMES["w8a8-dynamic"], 64 * 256 + 64 * 2),
        ((64, 256), SHORT_SCHEMES["w8a8-static"], 64 * 256 + 64 * 2 + 2),
        ((64, 256), SHORT_SCHEMES["fp8-static"], 64 * 256 + 64 * 2 + 2),
        ((64, 256), "nf4", 64 * 256 // 2 + 64 * 256 // 64 * 4),
        ((64, 256), "bnb-int8", 64 * 256 + 64 * 4),
    ],
)
def test_stored_bytes_by_hand(shape: tuple[int, int], scheme: Scheme | str, expected: int) -> None:
    assert stored_bytes(shape, scheme, BF16) == expected


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 128])
@pytest.mark.parametrize("activations", ["none", "dynamic-int8"])
def test_stored_bytes_are_those_of_the_format(
    bits: int, symmetric: bool, group_size: int | None, activations: str
) -> None:
    from vlmquant.formats.compressed_tensors import encoded_shapes

    if activations != "none" and (bits, symmetric, group_size) != (8, True, None):
        return
    scheme = Scheme.model_validate(
        {"bits": bits, "symmetric": symmetric, "group_size": group_size, "activations": activations}
    )
    shapes = encoded_shapes("layer", (72, 384), scheme, BF16)
    expected = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values())
    assert stored_bytes((72, 384), scheme, BF16) == expected


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mllama"])
@pytest.mark.parametrize("path", sorted(shipped("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_gives_a_line_for_every_tensor(path: Path, kind: str, tiny: Callable[..., Path]) -> None:
    components = resolve_components(tiny(kind))
    loaded = load_recipe(path)
    if kind == "gemma3" and loaded.components.embedding.scheme != "fp16":
        with pytest.raises(PlanError, match="Gemma3TextScaledWordEmbedding"):
            make_plan(components, loaded)
        return
    result = make_plan(components, loaded)
    assert [line.name for line in result.lines] == [parameter.name for parameter in components.parameters]
    assert result.bytes_before == components.shards.total_bytes
    assert sum(totals.bytes_after for totals in result.by_component().values()) == result.bytes_after
    assert result.bytes_after < result.bytes_before or path.stem == "protect-first-layers"
    for line in result.lines:
        assert line.reason
        assert (line.action == "keep") == (line.scheme is None) == (line.method is None)
        assert line.action == "quantize" or line.bytes_after == line.bytes_before
        assert line.name.endswith(".weight") or line.action == "keep"
    assert json.loads(json.dumps(result.to_json()))["bytes_after"] == result.bytes_after


def test_components_get_what_the_recipe_says(tiny_llava: Path) -> None:
    result = make_plan(resolve_components(tiny_llava), load_recipe("mixed"))
    schemes = {(line.component, line.scheme_label, line.method) for line in result.lines if line.action == "quantize"}
    assert schemes == {("vision_encoder", "w8a8-dynamic", "int8"), ("language", "w4a16-g128", "gptq")}
    quantized = [line.name for line in result.lines if line.action == "quantize"]
    assert len(quantized) == 2 * 6 + 2 * 7
    # A layer of 256 -> 128 keys: 128 rows of 32 words, two scales, and the shape.
    line = result.line(f"{LAYERS}.0.self_attn.k_proj.weight")
    assert (line.bytes_before, line.bytes_after) == (128 * 256 * 2, 128 * 32 * 4 + 128 * 2 * 2 + 16)
    assert result.line("lm_head.weight").reason == "the recipe keeps this component"
    assert result.line("model.vision_tower.embeddings.patch_embedding.weight").reason == "not a linear layer of a block"
    language = result.by_component()["language"]
    linears = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 384)
    assert language.quantized_parameters == linears
    assert language.quantized_bits_per_weight == pytest.approx(4 + 16 / 128 + 14 * 16 * 8 / linears)
    assert result.bits_per_weight == 8 * result.bytes_after / sum(line.weights for line in result.lines)


def test_what_a_result_keeps_is_told_where_it_is_much(tiny_llava: Path) -> None:
    small = plan(tiny_llava, "{language: {scheme: w4a16, method: rtn}}")
    kept = {name: found.bytes_after - found.quantized_bytes_after for name, found in small.by_component().items()}
    share, largest = sum(kept.values()) / small.bytes_after, max(kept, key=kept.__getitem__)
    note = small.notes[-1]
    assert note.startswith(f"{100 * share:.0f}% of the result ({sum(kept.values()):,} of {small.bytes_after:,} bytes)")
    assert f"stay as they are: {largest} {kept[largest]:,}" in note
    assert "stay as they are" not in "".join(plan(tiny_llava, "{}").notes)
    mostly = (
        "{vision_encoder: w8a8-dynamic, language: w8a8-dynamic, embedding: w8a16, lm_head: w8a16, projector: w8a16}"
    )
    assert "stay as they are" not in "".join(plan(tiny_llava, mostly).notes)


def test_embedding_projector_and_head_take_data_free_methods(tiny_llava: Path) -> None:
    result = plan(tiny_llava, "{embedding: w8, projector: w8a8-dynamic, lm_head: w8a16, language: w4a16}")
    embedding = result.line("model.language_model.embed_tokens.weight")
    assert (embedding.scheme_label, embedding.method) == ("w8a16", "rtn")
    assert embedding.bytes_after == 600 * 256 + 600 * 2 + 16
    assert result.line("model.multi_modal_projector.linear_2.weight").scheme_label == "w8a8-dynamic"
    assert result.line("model.multi_modal_projector.linear_2.bias").action == "keep"
    assert result.line("lm_head.weight").action == "quantize"


@pytest.mark.parametrize("method", ["gptq", "awq", "int8"])
@pytest.mark.parametrize("component", ["projector", "lm_head"])
def test_methods_that_need_inputs_are_refused_outside_blocks(tiny_llava: Path, component: str, method: str) -> None:
    with pytest.raises(PlanError, match=rf"components\.{component}: .* outside the blocks.* use method: rtn"):
        plan(tiny_llava, f"{{{component}: {{scheme: w8a16, method: {method}}}}}")


@pytest.mark.parametrize("spec", ["w4a16", "w8a8-dynamic", "{scheme: w8, method: gptq}"])
def test_an_embedding_is_w8_or_kept(tiny_llava: Path, spec: str) -> None:
    with pytest.raises(PlanError, match="an embedding is stored as w8"):
        plan(tiny_llava, f"{{embedding: {spec}}}")


@pytest.mark.parametrize("component", ["embedding", "lm_head"])
def test_tied_tensors_are_not_quantized(tiny: Callable[..., Path], component: str) -> None:
    with pytest.raises(PlanError, match=rf"components\.{component}: embedding and lm_head are one tied tensor"):
        plan(tiny("qwen2_5_vl", tie=True), f"{{{component}: w8}}")
    assert plan(tiny("qwen2_5_vl", tie=True), "{language: w4a16}").bytes_after


def test_a_component_without_linears_cannot_be_quantized(tiny: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match=r"components\.projector: .* no linear layer there"):
        plan(tiny("gemma3"), "{projector: w8a16}")


def test_smaller_groups_where_the_group_size_does_not_divide(tiny_qwen2_5_vl: Path) -> None:
    """Its vision MLP has 96 = 3 * 32 inputs; 64 = one group of 64."""
    result = plan(tiny_qwen2_5_vl, "{vision_encoder: {scheme: w4a16, method: gptq}}")
    assert labels(result, block="model.visual.blocks.0") == {
        "attn.qkv": "w4a16-g64",
        "attn.proj": "w4a16-g64",
        "mlp.gate_proj": "w4a16-g64",
        "mlp.up_proj": "w4a16-g64",
        "mlp.down_proj": "w4a16-g32",
    }
    line = result.line("model.visual.blocks.1.mlp.down_proj.weight")
    assert line.reason == "96 inputs are no multiple of group size 128, so the group size is 32"
    assert line.method == "gptq"
    assert len(result.fallbacks) == 2 * 5
    assert f"{line.name}: {line.reason}" in result.fallbacks


@pytest.mark.parametrize(
    ("steps", "label", "method"),
    [("w8a8-dynamic", "w8a8-dynamic", "int8"), ("w8a16", "w8a16", "int8"), ("fp16", "bfloat16", None)],
)
def test_other_fallbacks(tiny_qwen2_5_vl: Path, steps: str, label: str, method: str | None) -> None:
    more = f"fallback: {{when_indivisible: [{steps}]}}"
    result = plan(tiny_qwen2_5_vl, "{vision_encoder: {scheme: w4a16, method: gptq}}", more=more)
    assert set(labels(result, block="model.visual.blocks.0").values()) == {label}
    assert result.line("model.visual.blocks.0.mlp.down_proj.weight").method == method
    assert len(result.fallbacks) == 2 * 5


def test_no_fallback_is_an_error_with_a_divisor(tiny_qwen2_5_vl: Path) -> None:
    with pytest.raises(
        PlanError, match=r"attn\.qkv has 64 inputs, which group size 128 does not divide; .* such as 64"
    ):
        plan(tiny_qwen2_5_vl, "{vision_encoder: w4a16}", more="fallback: {when_indivisible: []}")


def test_overrides_apply_in_order_and_by_layer(tiny_qwen3_vl: Path) -> None:
    result = plan(
        tiny_qwen3_vl,
        "{language: {scheme: w4a16, method: gptq, overrides: ["
        '{layers: "1:", method: awq}, {layers: "-1:", scheme: fp16}, '
        '{layers: "0:1", modules: [mlp.down_proj], scheme: w8a16}]}}',
    )
    first = labels(result, block=f"{LAYERS}.0")
    assert first.pop("mlp.down_proj") == "w8a16"
    assert set(first.values()) == {"w4a16-g128"}
    assert result.line(f"{LAYERS}.0.mlp.up_proj.weight").method == "gptq"
    assert result.line(f"{LAYERS}.1.mlp.up_proj.weight").method == "awq"
    assert set(labels(result, block=f"{LAYERS}.2").values()) == {"bfloat16"}
    assert result.line(f"{LAYERS}.2.mlp.up_proj.weight").reason == "override 2 of the recipe"


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("overrides: [{modules: [self_attn.v_proj], scheme: w8a16}]", "q_proj, self_attn.k_proj, self_attn.v_proj"),
        ("keep: ['*.gate_proj']", "mlp.gate_proj, mlp.up_proj"),
    ],
)
def test_fused_layers_need_one_scheme(tiny_llava: Path, spec: str, names: str) -> None:
    with pytest.raises(PlanError, match=rf"{re.escape(names)} run as one kernel"):
        plan(tiny_llava, f"{{language: {{scheme: w4a16, {spec}}}}}")


@pytest.mark.parametrize(
    ("glob", "kept"),
    [
        ("layers.0", {f"{LAYERS}.0.self_attn.{leaf}" for leaf in ATTENTION} | {f"{LAYERS}.0.mlp.down_proj"}),
        ("mlp.down_proj", {f"{LAYERS}.{index}.mlp.down_proj" for index in range(2)}),
        ("*.1.self_attn", {f"{LAYERS}.1.self_attn.{leaf}" for leaf in ATTENTION}),
        (f"{LAYERS}.1.mlp.down_proj", {f"{LAYERS}.1.mlp.down_proj"}),
    ],
)
def test_keep_globs_name_modules_or_what_contains_them(tiny_llava: Path, glob: str, kept: set[str]) -> None:
    result = plan(tiny_llava, f"{{language: {{scheme: w4a16, keep: ['{glob}']}}}}")
    reasons = {line.name.removesuffix(".weight"): line.reason for line in result.lines}
    assert {name for name in kept if reasons[name] == f"listed under keep in the recipe as {glob}"} == kept
    other = f"{LAYERS}.{0 if '1' in glob else 1}.mlp.up_proj.weight"
    assert result.line(other).action == "quantize"


def test_keep_may_name_what_is_kept_anyway(tiny_llava: Path) -> None:
    result = plan(tiny_llava, "{vision_encoder: {scheme: w8a8-dynamic, keep: [embeddings.patch_embedding]}}")
    assert result.line("model.vision_tower.embeddings.patch_embedding.weight").action == "keep"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("keep: [mlp.down_projj]", r"language\.keep: 'mlp\.down_projj' names no module .* 'mlp\.down_proj'\?"),
        ("overrides: [{modules: [mlp.fc1]}]", r"overrides\.0: 'mlp\.fc1' names no linear layer of this model"),
        ("overrides: [{layers: '5:'}]", r'overrides\.0: layers "5:" hold none of its modules; there are 2 layers'),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(tiny_llava: Path, spec: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(tiny_llava, f"{{language: {{scheme: w4a16, {spec}}}}}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{scheme: w4a16, method: int8}", "method int8 makes 8-bit integers"),
        ("{scheme: w4a16, method: bitsandbytes}", "w4a16-g128 does not go with method bitsandbytes"),
    ],
)
def test_a_method_must_fit_its_scheme(tiny_llava: Path, spec: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(tiny_llava, f"{{language: {spec}}}")


def test_bitsandbytes_needs_its_method(tiny_llava: Path) -> None:
    with pytest.raises(PlanError, match="scheme nf4 does not go with method gptq"):
        plan(tiny_llava, "{language: {scheme: nf4, method: gptq}}", more="output: {format: bitsandbytes}")
    result = plan(tiny_llava, "{language: {scheme: nf4, method: bitsandbytes}}", more="output: {format: bitsandbytes}")
    line = result.line(f"{LAYERS}.0.mlp.up_proj.weight")
    assert (line.scheme, line.scheme_label, line.method) == ("nf4", "nf4", "bitsandbytes")
