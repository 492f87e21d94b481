"""compressed-tensors: tensors against the library's own decompression, regexes against the names of three programs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_named_modules, match_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import grids, packed, tiny_vlm
from vlmquant.errors import CheckpointError, PlanError
from vlmquant.formats import compressed_tensors
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import stored_bytes
from vlmquant.recipe import SHORT_SCHEMES, Scheme

SCHEMES = [
    *SHORT_SCHEMES.values(),
    Scheme(bits=3, group_size=None),
    Scheme(bits=3, group_size=32, symmetric=False),
    Scheme(bits=4, group_size=None, symmetric=False),
    Scheme(bits=8, group_size=32, symmetric=False),
]


def round_to(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    return grids.random(scheme, rows, columns, seed=seed)


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    return QuantizationScheme.model_validate(compressed_tensors._group(scheme, ["re:.*"]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("rows", [64, 37])
def test_the_library_decompresses_to_the_same_weight(scheme: Scheme, rows: int) -> None:
    weight = round_to(scheme, rows, 256)
    tensors = {name[2:]: tensor for name, tensor in compressed_tensors.encode("m", weight, scheme).items()}
    compressor = BaseCompressor.get_value_from_registry(compressed_tensors.storage_format(scheme))
    if scheme.scales == "model":
        tensors["weight_scale"] = tensors["weight_scale"].float()  # so that the library multiplies in float32, as we do
        assert torch.equal(compressor.decompress(tensors, library_scheme(scheme))["weight"], weight.dequantize())
    else:  # it multiplies in bfloat16
        found = compressor.decompress(tensors, library_scheme(scheme))["weight"].float()
        torch.testing.assert_close(found, weight.dequantize(), rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_planned_names_shapes_and_bytes_are_those_written(scheme: Scheme) -> None:
    tensors = compressed_tensors.encode("a.b", round_to(scheme, 40, 384), scheme)
    planned = compressed_tensors.encoded_shapes("a.b", (40, 384), scheme, torch.bfloat16)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == planned
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored_bytes((40, 384), scheme, torch.bfloat16)


@settings(max_examples=40, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), rows=st.integers(1, 70), groups=st.integers(1, 3), seed=st.integers(0, 1000))
def test_decode_inverts_encode(scheme: Scheme, rows: int, groups: int, seed: int) -> None:
    weight = round_to(scheme, rows, groups * (scheme.group_size or 33), seed)
    decoded = compressed_tensors.decode("m", compressed_tensors.encode("m", weight, scheme).__getitem__, scheme)
    assert torch.equal(decoded.codes, weight.codes)
    assert torch.equal(decoded.scales, weight.scales)
    assert (decoded.zeros is None and weight.zeros is None) or torch.equal(decoded.zeros, weight.zeros)
    assert decoded.grid == weight.grid


@pytest.mark.parametrize(
    ("leaf", "damage", "message"),
    [
        ("weight_scale", lambda t: t * torch.nan, "m: weight_scale holds values that are 0 or no numbers"),
        ("weight_scale", lambda t: t * 0, "m: weight_scale holds values that are 0 or no numbers"),
        ("weight_scale", lambda t: t[:, :1].contiguous(), "m: weight_scale has shape"),
        ("weight_packed", lambda t: t[:, 1:].contiguous(), "m: weight_packed has shape"),
        ("weight_zero_point", lambda t: t[1:], "m: weight_zero_point has shape"),
    ],
)
def test_damage_is_named(leaf: str, damage: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    scheme = SHORT_SCHEMES["w4a16-asym"]
    tensors = compressed_tensors.encode("m", round_to(scheme, 16, 256), scheme)
    tensors[f"m.{leaf}"] = damage(tensors[f"m.{leaf}"])
    with pytest.raises(CheckpointError, match=message):
        compressed_tensors.decode("m", tensors.__getitem__, scheme)


# --- quantization_config ---

RECIPES = {name: getattr(packed, name) for name in ("MIXED", "ASYMMETRIC", "EMBEDDING", "PROTECTED")} | {
    "PROJECTOR": "{language: {scheme: w4a16, keep: [mlp.down_proj]}, projector: w8a16, lm_head: w8a16}"
}
REFUSED = {("gemma3", "EMBEDDING"), ("paligemma", "EMBEDDING"), ("gemma3", "PROJECTOR")}
"""Their embeddings scale what they look up; Gemma 3's projector is no linear layer. The plan says so."""
PAIRS = [(kind, recipe) for kind in tiny_vlm.KINDS for recipe in RECIPES if (kind, recipe) not in REFUSED]


@pytest.mark.parametrize(("kind", "recipe"), PAIRS)
def test_library_matches_exactly_the_planned_modules(kind: str, recipe: str, tiny: Callable[..., Path]) -> None:
    components, plan = packed.plan_for(tiny(kind), RECIPES[recipe])
    config = QuantizationConfig.model_validate(compressed_tensors.quantization_config(plan, components))
    groups = {target: group for group in config.config_groups.values() for target in group.targets}
    found = {}
    for name, module in match_named_modules(components.skeleton(), groups, config.ignore):
        weights = groups[match_targets(name, module, groups)[0]].weights
        found[name] = (weights.num_bits, weights.symmetric, weights.group_size)
    assert found == {
        line.name.removesuffix(".weight"): (line.scheme.bits, line.scheme.symmetric, line.scheme.group_size)
        for line in plan.lines
        if isinstance(line.scheme, Scheme)
    }


ENGINE_NAMES = {
    "llava": {
        "language": [
            "language_model.model.layers.1.self_attn.qkv_proj",
            "language_model.model.layers.0.mlp.gate_up_proj",
        ],
        "vision_encoder": [
            "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj",
            "vision_tower.vision_model.encoder.layers.1.mlp.fc2",
        ],
        "kept": ["language_model.lm_head", "multi_modal_projector.linear_1"],
    },
    "qwen2_5_vl": {
        "language": [
            "language_model.model.layers.1.self_attn.qkv_proj",  # vLLM
            "model.layers.1.self_attn.qkv_proj",  # SGLang
            "model.layers.0.mlp.down_proj",
        ],
        "vision_encoder": [
            "visual.blocks.0.attn.qkv",
            "visual.blocks.1.attn.qkv_proj",
            "visual.blocks.1.mlp.gate_up_proj",
        ],
        "kept": ["language_model.lm_head", "lm_head", "visual.merger.mlp.0", "visual.patch_embed.proj"],
    },
    "qwen3_vl": {
        "language": [
            "language_model.model.layers.2.self_attn.o_proj",
            "model.language_model.layers.0.mlp.gate_up_proj",
        ],
        "vision_encoder": ["visual.blocks.0.attn.qkv", "model.visual.blocks.1.mlp.linear_fc1"],
        "kept": ["language_model.lm_head", "visual.merger.linear_fc1", "visual.deepstack_merger_list.1.linear_fc2"],
    },
}


@pytest.mark.parametrize("kind", ENGINE_NAMES)
def test_regexes_hold_for_the_names_of_vllm_and_sglang(kind: str, tiny: Callable[..., Path]) -> None:
    components, plan = packed.plan_for(tiny(kind), packed.MIXED)
    groups, ignore = compressed_tensors.parse_config(compressed_tensors.quantization_config(plan, components))
    schemes = {"language": SHORT_SCHEMES["w4a16"], "vision_encoder": SHORT_SCHEMES["w8a8-dynamic"], "kept": None}
    for part, names in ENGINE_NAMES[kind].items():
        for name in names:
            assert compressed_tensors.scheme_for(name, "", groups, ignore) == schemes[part], name
    # vLLM has no default: a layer that nothing matches is an error there, so what is kept must be in `ignore`.
    for name in ENGINE_NAMES[kind]["kept"]:
        assert any(re.match(pattern.removeprefix("re:"), name) for pattern in ignore), name


def test_protected_layers_are_matched_by_number(tiny_qwen3_vl: Path) -> None:
    components, plan = packed.plan_for(tiny_qwen3_vl, packed.PROTECTED)
    groups, ignore = compressed_tensors.parse_config(compressed_tensors.quantization_config(plan, components))

    def label(name: str) -> str | None:
        scheme = compressed_tensors.scheme_for(name, "", groups, ignore)
        return scheme and scheme.label

    assert label("language_model.model.layers.0.self_attn.qkv_proj") is None
    assert label("language_model.model.layers.1.self_attn.qkv_proj") == "w4a16-g128"
    assert label("language_model.model.layers.2.mlp.down_proj") == "w8a16"


def test_regexes_are_short_and_quick(tiny: Callable[..., Path]) -> None:
    components, plan = packed.plan_for(tiny("mllama"), packed.PROTECTED)
    config = compressed_tensors.quantization_config(plan, components)
    patterns = [target for group in config["config_groups"].values() for target in group["targets"]] + config["ignore"]
    for pattern in patterns:
        assert len(pattern) < 300
        assert pattern.startswith("re:^")
        assert not re.search(r"[*+]\)[*+]", pattern), "nested repetition"
        re.match(pattern[3:], "vision.layers." * 2000 + "x")  # would not end in time if it were not linear


def test_config_is_read_back(tiny_llava: Path) -> None:
    components, plan = packed.plan_for(tiny_llava, packed.EMBEDDING)
    config = compressed_tensors.quantization_config(plan, components)
    groups, ignore = compressed_tensors.parse_config(config)
    assert {scheme.label for _, scheme in groups} == {"w8a8-dynamic", "w8a16", "w4a16-g128"}
    assert ignore == config["ignore"]
    assert config["format"] == "mixed-precision"


def test_a_single_format_is_named(tiny_llava: Path) -> None:
    components, plan = packed.plan_for(tiny_llava, "{language: w4a16}")
    assert compressed_tensors.quantization_config(plan, components)["format"] == "pack-quantized"


def test_a_recipe_that_quantizes_nothing_is_refused(tiny_llava: Path) -> None:
    components, plan = packed.plan_for(tiny_llava, "{}")
    with pytest.raises(PlanError, match="quantizes nothing"):
        compressed_tensors.quantization_config(plan, components)


def test_a_regex_that_takes_another_module_is_found(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components, plan = packed.plan_for(tiny_llava, packed.MIXED)
    monkeypatch.setattr(compressed_tensors, "_shortest", lambda name, vision, rest, others, least=1: r"^.*")
    with pytest.raises(PlanError, match="would make it"):
        compressed_tensors.quantization_config(plan, components)


def change(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *outer, last = path.split(".")
    place = config
    for key in outer:
        place = place[key]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quant_method", "gptq"),
        ("config_groups", {}),
        ("kv_cache_scheme", {"num_bits": 8}),
        ("config_groups.g.targets", None),
        ("config_groups.g.format", "nvfp4-pack-quantized"),
        ("config_groups.g.output_activations", {"num_bits": 8}),
        ("config_groups.g.weights", None),
        ("config_groups.g.weights.type", "float"),
        ("config_groups.g.weights.num_bits", 9),
        ("config_groups.g.weights.strategy", "tensor"),
        ("config_groups.g.weights.actorder", "group"),
        ("config_groups.g.input_activations", {"num_bits": 8, "strategy": "tensor", "dynamic": True}),
    ],
)
def test_what_is_not_ours_is_refused(path: str, value: Any) -> None:
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": compressed_tensors._group(SHORT_SCHEMES["w4a16"], ["Linear"])},
    }
    assert compressed_tensors.parse_config(config) == ([(["Linear"], SHORT_SCHEMES["w4a16"])], [])
    with pytest.raises(CheckpointError):
        compressed_tensors.parse_config(change(config, path, value))
