"""GPTQ and AWQ files: bytes written by hand, round trips, and what such files cannot hold."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from tests import grids, packed
from tests.test_formats import round_to
from vlmquant.errors import CheckpointError, PlanError
from vlmquant.formats import FORMATS, awq, gptq
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import stored_bytes
from vlmquant.recipe import WORD_FORMATS, OutputSpec, Scheme

WORDS = ("gptq", "gptq_v2", "awq")
SMALL = Scheme(bits=4, group_size=16, symmetric=False)


def counting(zeros: list[list[int]] | None) -> QuantizedWeight:
    """8 outputs of 32 inputs in groups of 16: code (n + k) % 16 of output n and input k, scale (n+1) / (g+1)."""
    codes = (torch.arange(8)[:, None] + torch.arange(32)[None]) % 16
    scales = torch.stack([torch.arange(8) + 1.0, (torch.arange(8) + 1.0) / 2], dim=1)
    grid = None if zeros is None else torch.tensor(zeros, dtype=torch.uint8)
    return QuantizedWeight(codes.to(torch.uint8), scales, grid, grids.whole(4, 16, zeros is None, torch.float16))


def hexadecimal(tensor: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08X}" for word in tensor.flatten().tolist()]


ZEROS = [[n + 1, 15 - n] for n in range(8)]


def test_gptq_bytes() -> None:
    for version, first, second in (("gptq", "76543210", "789ABCDE"), ("gptq_v2", "87654321", "89ABCDEF")):
        tensors = FORMATS[version].encode("m", counting(ZEROS), SMALL)
        # Words run down the inputs: of output 0 inputs 0 to 7 hold 0 to 7, the first one in the lowest bits.
        assert hexadecimal(tensors["m.qweight"][:, 0]) == ["76543210", "FEDCBA98", "76543210", "FEDCBA98"]
        assert hexadecimal(tensors["m.qweight"][0]) == [
            *("76543210", "87654321", "98765432", "A9876543", "BA987654", "CBA98765", "DCBA9876", "EDCBA987")
        ]
        # Zero points of group 0 are 1 to 8 for outputs 0 to 7, of group 1 they are 15 to 8; version 1 takes 1 off.
        assert hexadecimal(tensors["m.qzeros"]) == [first, second]
        assert tensors["m.scales"].dtype == torch.float16
        assert tensors["m.scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]]
        assert tensors["m.g_idx"].tolist() == [0] * 16 + [1] * 16


def test_gptq_bytes_of_symmetric_weights() -> None:
    four, eight = Scheme(bits=4, group_size=32), Scheme(bits=8, group_size=32)
    for scheme, version, word in (
        (four, "gptq", "77777777"),
        (four, "gptq_v2", "88888888"),
        (eight, "gptq", "7F7F7F7F"),
        (eight, "gptq_v2", "80808080"),
    ):
        assert set(hexadecimal(FORMATS[version].encode("m", round_to(scheme, 16, 64), scheme)["m.qzeros"])) == {word}


def test_awq_bytes() -> None:
    tensors = awq.encode("m", counting(ZEROS), SMALL)
    # A word holds the 8 outputs of an input, in the nibbles 0, 4, 1, 5, 2, 6, 3, 7: so from the top 7 5 3 1 6 4 2 0.
    assert hexadecimal(tensors["m.qweight"][:4]) == ["75316420", "86427531", "97538642", "A8649753"]
    assert tuple(tensors["m.qweight"].shape) == (32, 1)
    assert hexadecimal(tensors["m.qzeros"]) == ["86427531", "8ACE9BDF"]
    assert tensors["m.scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]]
    assert set(tensors) == {"m.qweight", "m.qzeros", "m.scales"}


def test_symmetric_weights_have_zero_points_of_8_in_awq() -> None:
    scheme = Scheme(bits=4, group_size=32)
    assert set(hexadecimal(awq.encode("m", round_to(scheme, 16, 64), scheme)["m.qzeros"])) == {"88888888"}


def schemes_for(name: str) -> list[Scheme]:
    bits = awq.BITS if name == "awq" else gptq.BITS
    symmetric = (False,) if name == "awq" else (True, False)
    return [
        Scheme(bits=count, group_size=size, symmetric=one)  # type: ignore[arg-type]
        for count in bits
        for size in (32, 128, None)
        for one in symmetric
    ]


CASES = [(name, scheme) for name in WORDS for scheme in schemes_for(name)]


def test_the_lists_of_formats_agree() -> None:
    listed = get_args(OutputSpec.model_fields["format"].annotation)
    assert set(listed) == {*FORMATS, "bitsandbytes"}
    assert set(WORDS) == set(WORD_FORMATS) == set(FORMATS) - {"compressed-tensors"}


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(CASES), rows=st.integers(1, 6), groups=st.integers(1, 3), seed=st.integers(0, 1000))
def test_decode_inverts_encode(case: tuple[str, Scheme], rows: int, groups: int, seed: int) -> None:
    name, scheme = case
    weight = round_to(scheme, rows * 8, groups * (scheme.group_size or 64), seed)
    if weight.zeros is not None:
        weight.zeros.clamp_(min=1)
    tensors = FORMATS[name].encode("m", weight, scheme)
    found, order = FORMATS[name].decode("m", tensors.__getitem__, scheme)
    assert order is None
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)
    assert (found.zeros is None and weight.zeros is None) or torch.equal(found.zeros, weight.zeros)
    assert found.grid == replace(weight.grid, scale_dtype=torch.float16)


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_planned_names_shapes_and_bytes_are_those_written(name: str, scheme: Scheme) -> None:
    weight = round_to(scheme, 40, 384)
    if weight.zeros is not None:
        weight.zeros.clamp_(min=1)
    tensors = FORMATS[name].encode("a.b", weight, scheme)
    planned = FORMATS[name].encoded_shapes("a.b", (40, 384), scheme, torch.bfloat16)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == planned
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    total = stored_bytes((40, 384), scheme, torch.bfloat16, format=name)
    assert sum(tensor.nbytes for tensor in tensors.values()) == total


def test_groups_that_are_permuted() -> None:
    weight = counting(ZEROS)
    tensors = FORMATS["gptq"].encode("m", weight, SMALL)
    # Odd inputs are group 1: the same codes then mean other weights, (code - zero) * scale with their own group's.
    tensors["m.g_idx"] = torch.arange(32, dtype=torch.int32) % 2
    found, order = FORMATS["gptq"].decode("m", tensors.__getitem__, SMALL)
    assert order is not None
    assert order.tolist() == [*range(0, 32, 2), *range(1, 32, 2)]
    dense = torch.empty(8, 32)
    dense[:, order] = found.dequantize()
    for n in range(8):
        for k in range(32):
            zero, scale = ZEROS[n][k % 2], (n + 1) / (1 + k % 2)
            assert dense[n, k] == ((n + k) % 16 - zero) * scale


def test_a_file_without_g_idx_is_in_order() -> None:
    tensors = FORMATS["gptq"].encode("m", counting(ZEROS), SMALL)
    del tensors["m.g_idx"]
    found, order = FORMATS["gptq"].decode("m", tensors.__getitem__, SMALL)
    assert order is None
    assert torch.equal(found.codes, counting(ZEROS).codes)


@pytest.mark.parametrize(
    ("name", "leaf", "damage", "message"),
    [
        ("gptq", "scales", lambda t: t * torch.nan, "m: scales holds values that are 0 or no numbers"),
        ("awq", "scales", lambda t: t * 0, "m: scales holds values that are 0 or no numbers"),
        ("awq", "scales", lambda t: t[:1], r"m: scales has shape \[1, 8\], but 8 x 32 codes of 4 bits in groups of 16"),
        ("gptq", "qzeros", lambda t: t[:1], r"m: qzeros has shape \[1, 1\]"),
        ("gptq", "qweight", lambda t: t[1:], "m: scales|m: qzeros|m: g_idx"),
        ("gptq", "g_idx", lambda t: t * 0, "m: g_idx does not give each of 2 groups 16 of 32 inputs"),
        ("gptq", "g_idx", lambda t: t[1:], "m: g_idx does not give"),
        ("gptq", "g_idx", lambda t: t.float(), "m: g_idx does not give"),
        ("awq", "qzeros", lambda t: t.long(), "m: qzeros is int64, and codes are packed in int32"),
        ("gptq", "qweight", lambda t: t.float(), "m: qweight is float32, and codes are packed in int32"),
        ("gptq", "qzeros", lambda t: t | 15, "m: qzeros holds 15, which programs read as a zero point of 0 or of 16"),
    ],
)
def test_damage_is_named(name: str, leaf: str, damage: Callable[[Any], Any], message: str) -> None:
    tensors = FORMATS[name].encode("m", counting(ZEROS), SMALL)
    tensors[f"m.{leaf}"] = damage(tensors[f"m.{leaf}"])
    with pytest.raises(CheckpointError, match=message):
        FORMATS[name].decode("m", tensors.__getitem__, SMALL)


def test_a_version_that_lies_is_found_where_weights_are_symmetric() -> None:
    scheme = Scheme(bits=4, group_size=32)
    for written, told in (("gptq", "gptq_v2"), ("gptq_v2", "gptq")):
        tensors = FORMATS[written].encode("m", round_to(scheme, 16, 64), scheme)
        with pytest.raises(CheckpointError, match=f"says sym and {told}, but 32 of 32 zero points .* or {written}"):
            FORMATS[told].decode("m", tensors.__getitem__, scheme)


def test_what_the_files_cannot_hold_exactly_is_refused() -> None:
    weight = counting([[0, 0]] + [[n, n] for n in range(1, 8)])
    with pytest.raises(CheckpointError, match="m: 2 zero points are 0, which version 1 of GPTQ's files cannot say"):
        FORMATS["gptq"].encode("m", weight, SMALL)
    second = FORMATS["gptq_v2"].encode("m", weight, SMALL)
    assert torch.equal(FORMATS["gptq_v2"].decode("m", second.__getitem__, SMALL)[0].zeros, weight.zeros)
    fine = QuantizedWeight(weight.codes, weight.scales * (1 + 2.0**-12), None, grids.whole(4, 16, True, torch.float32))
    for name in WORDS:
        with pytest.raises(CheckpointError, match=r"16 of 16 scales \(float32\) have no equal in float16.* 0.00024 of"):
            FORMATS[name].encode("m", fine, SMALL)


@pytest.mark.parametrize("power", [-17, -14, 0, 15])
def test_bfloat16_scales_have_an_equal_in_float16(power: int) -> None:
    for fraction in range(128):
        scale = torch.tensor(2.0**power * (1 + fraction / 128))
        assert scale.bfloat16().float() == scale
        assert scale.half().float() == scale


# --- quantization_config ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5 bits; GPTQ's files are read with 2, 3, 4, 8"),
        ({"bits": "4"}, "bits"),
        ({"group_size": 8}, "groups of 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not one that we read: gptq, gptq_v2"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "gives some modules settings of their own"),
        ({"sym": "yes"}, "sym"),
    ],
)
def test_gptq_configs_that_are_not_read(change: dict[str, Any], message: str) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
    assert gptq.parse_config(config) == ("gptq", Scheme(bits=4))
    assert gptq.parse_config(config | {"checkpoint_format": "gptq_v2", "group_size": -1, "sym": False}) == (
        "gptq_v2",
        Scheme(bits=4, group_size=None, symmetric=False),
    )
    with pytest.raises(CheckpointError, match=message):
        gptq.parse_config(config | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "3 bits; AWQ's files have 4"),
        ({"version": "gemv"}, "version 'gemv' of AWQ's files"),
        ({"version": "GEMM", "zero_point": False}, "zero_point is false"),
        ({"group_size": 8}, "groups of 8"),
    ],
)
def test_awq_configs_that_are_not_read(change: dict[str, Any], message: str) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"}
    assert awq.parse_config(config) == Scheme(bits=4, group_size=64, symmetric=False)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "gemm"}
    assert awq.parse_config(old) == Scheme(bits=4, symmetric=False)
    with pytest.raises(CheckpointError, match=message):
        awq.parse_config(config | change)


KEPT = "{layers: '0:1', modules: [mlp.down_proj, 'self_attn.*'], scheme: fp16}"
PARTLY = f"{{language: {{scheme: w4a16, overrides: [{KEPT}]}}}}"


def engine_names(kind: str, name: str) -> list[str]:
    """What vLLM calls a module of transformers'."""
    if kind == "llava":
        name = name.removeprefix("model.")
        for theirs, ours in (("language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")):
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
    else:
        for theirs, ours in (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")):
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        name = name.removeprefix("model.")
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    return [name, *(name.replace(part, whole) for part, whole in fused.items() if name.endswith(part))]


@pytest.mark.parametrize("recipe", ["{language: w4a16}", PARTLY])
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_awq_names_hold_for_both_ways_of_matching(kind: str, recipe: str, tiny: Callable[..., Path]) -> None:
    components, plan = packed.plan_for(tiny(kind), recipe, "awq")
    names = awq.quantization_config(plan, components)["modules_to_not_convert"]
    quantized = {line.name.removesuffix(".weight") for line in plan.lines if line.action == "quantize"}
    assert len(quantized) > 5
    for module, made in components.skeleton().named_modules():
        if isinstance(made, torch.nn.Linear):
            assert should_convert_module(module, names) == (module in quantized), module
            for name in engine_names(kind, module):
                assert any(one in name for one in names) == (module not in quantized), name
    for name in ("visual", "model.visual") if kind != "llava" else ("vision_tower", "model.vision_tower"):
        assert name in names


@pytest.mark.parametrize("recipe", ["{language: w4a16}", PARTLY])
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_gptq_says_what_is_not_quantized(kind: str, recipe: str, tiny: Callable[..., Path]) -> None:
    components, plan = packed.plan_for(tiny(kind), recipe, "gptq")
    config = gptq.quantization_config(plan, components, version="gptq")
    quantized = {line.name.removesuffix(".weight") for line in plan.lines if line.action == "quantize"}
    left_out = [pattern.removeprefix("-:") for pattern in config["dynamic"]]
    for module, made in components.skeleton().named_modules():
        if isinstance(made, torch.nn.Linear):
            for name in (module, *engine_names(kind, module)):
                assert any(re.match(one, name) for one in left_out) == (module not in quantized), name
            if module.startswith(config["block_name_to_quantize"]):
                listed = [one for block in config.get("modules_in_block_to_quantize", [[""]]) for one in block]
                assert any(module.endswith(one) for one in listed) == (module in quantized), module


def test_a_name_that_is_part_of_a_quantized_one_is_refused(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components, plan = packed.plan_for(tiny_llava, PARTLY, "awq")
    monkeypatch.setattr(awq.uniform, "tail", lambda name, components: name.rpartition(".")[2])
    with pytest.raises(PlanError, match="_proj stays at 16 bits and is a part of the name of model"):
        awq.not_converted(plan, components)
