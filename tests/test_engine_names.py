"""Mixtures of experts in the name spaces of serving engines: tensors on disk, and what config.json's regexes match.

The names are those that vLLM 0.33's loaders map (`build_expert_params_mapping`, each model's `hf_to_vllm_mapper`); its
quantization looks at the first expert of a layer, under its own names.
"""

import re
from pathlib import Path

import pytest

from tests import zoo
from vlmquant.formats.compressed_tensors import encoded_shapes, parse_config, quantization_config, scheme_for
from vlmquant.pipeline import plan_model
from vlmquant.planning import make_plan
from vlmquant.recipe import SHORT_SCHEMES, load_recipe

PARTS = ("gate_proj", "up_proj", "down_proj")
NAMES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen3_vl_moe": (
        "model.language_model.layers.1.mlp.experts.{}.{}",
        "language_model.model.layers.1.mlp.experts",
        ("language_model.model.layers.1.mlp.gate",),
    ),
    "qwen3_5_moe": (
        "model.language_model.layers.1.mlp.experts.{}.{}",
        "language_model.model.layers.1.mlp.experts",
        ("language_model.model.layers.1.mlp.gate", "language_model.model.layers.1.mlp.shared_expert_gate"),
    ),
    "glm4v_moe": (
        "model.language_model.layers.1.mlp.experts.{}.{}",
        "language_model.model.layers.1.mlp.experts",
        ("language_model.model.layers.1.mlp.gate",),
    ),
    "llama4": (
        "language_model.model.layers.1.feed_forward.experts.{}.{}",
        "language_model.model.layers.1.feed_forward.experts",
        ("language_model.model.layers.1.feed_forward.router",),
    ),
    "internvl@qwen3_moe": (
        "language_model.model.layers.1.mlp.experts.{}.{}",
        "language_model.model.layers.1.mlp.experts",
        ("language_model.model.layers.1.mlp.gate",),
    ),
    "gemma4@moe": (
        "model.language_model.layers.1.experts.{}.{}",
        "language_model.model.layers.1.experts",
        ("language_model.model.layers.1.router.proj",),
    ),
    "qwen3_omni_moe": (
        "thinker.model.layers.1.mlp.experts.{}.{}",
        "language_model.model.layers.1.mlp.experts",
        ("language_model.model.layers.1.mlp.gate",),
    ),
    "ernie4_5_vl_moe": (
        "model.layers.2.mlp.experts.{}.{}",
        "language_model.model.layers.2.mlp.text_experts",
        (
            "language_model.model.layers.2.mlp.text_experts_gate",
            "language_model.model.layers.2.mlp.vision_experts_gate",
        ),
    ),
}
"""Kind -> an expert's linear on disk; the layer of experts in vLLM; what has to stay at 16 bits there."""


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_experts_are_stored_where_vllm_looks_for_them(kind: str, tmp_path: Path) -> None:
    disk, layer, kept = NAMES[kind]
    components, plan = plan_model(zoo.build(kind, tmp_path / "model"), load_recipe("mixed"))
    names = {one.disk for one in components.parameters}
    experts = next(iter(components.experts.values())).experts
    for expert in (0, experts - 1):
        for part in PARTS:
            assert f"{disk.format(expert, part)}.weight" in names
    written = encoded_shapes(disk.format(0, "gate_proj"), (256, 256), SHORT_SCHEMES["w4a16"], components.dtype)
    assert {name.rpartition(".")[2] for name in written} == {"weight_packed", "weight_scale", "weight_shape"}
    groups, ignore = parse_config(quantization_config(plan, components))
    found = {scheme_for(f"{layer}.0.{part}", "RoutedExperts", groups, ignore) for part in PARTS}
    assert {scheme and scheme.bits for scheme in found} == {4}
    for name in kept:
        assert scheme_for(name, "ReplicatedLinear", groups, ignore) is None
        assert any(re.match(one.removeprefix("re:"), name) for one in ignore), name


@pytest.mark.parametrize("kind", ["internvl@gpt_oss", "aria"])
@pytest.mark.filterwarnings("ignore")
def test_experts_out_of_a_stack_are_stored_beside_it(kind: str, tmp_path: Path) -> None:
    """Also where transformers has another name for the module than the disk, and a stack has no expert's name."""
    components, _ = plan_model(zoo.build(kind, tmp_path / "model"), load_recipe("mixed"))
    names = {one.disk for one in components.parameters if one.component == "language" and ".experts." in one.name}
    assert names
    assert all(
        re.match(r"language_model\.model\.layers\.\d\.mlp\.experts\.\d\.\w+_proj\.(weight|bias)$", one) for one in names
    )


@pytest.mark.filterwarnings("ignore")
def test_what_vllm_fuses_of_linear_attention_is_matched_under_its_name(tmp_path: Path) -> None:
    components, plan = plan_model(zoo.build("qwen3_5", tmp_path / "model"), load_recipe("mixed"))
    groups, ignore = parse_config(quantization_config(plan, components))
    layer = "language_model.model.layers.0.linear_attn"
    fused = scheme_for(f"{layer}.in_proj_qkvz", "Linear", groups, ignore)
    assert fused is not None
    assert fused == scheme_for(f"{layer}.in_proj_qkv", "Linear", groups, ignore)
    assert fused == scheme_for(f"{layer}.in_proj_z", "Linear", groups, ignore)
    for kept in ("in_proj_ba", "in_proj_b", "in_proj_a", "conv1d"):
        assert scheme_for(f"{layer}.{kept}", "Linear", groups, ignore) is None


@pytest.mark.filterwarnings("ignore")
def test_a_group_size_that_does_not_fit_gives_way_for_all_experts_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4's experts have 704 inner channels: groups of 64 fit all their linears, groups of 128 only some."""
    monkeypatch.setitem(zoo.SETTINGS["gemma4@moe"]["text_config"], "moe_intermediate_size", 192)
    components, _ = plan_model(zoo.build("gemma4@moe", tmp_path / "model"), load_recipe("mixed"))
    plan = make_plan(components, load_recipe("mixed"))
    sizes = {line.scheme.group_size for line in plan.lines if ".experts." in line.name and line.action == "quantize"}  # type: ignore[union-attr]
    assert sizes == {64}
    assert any("as the common divisor of the experts' inputs" in told for told in plan.fallbacks)
