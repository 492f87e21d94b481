"""Loading what other programs write: GPTQ, AWQ, and compressed-tensors in its older and other spellings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import packed, tiny_vlm
from vlmquant.errors import CheckpointError, InputError
from vlmquant.grid import QuantizedWeight
from vlmquant.linear import PermutedLinear, QuantLinear
from vlmquant.loading import load_model
from vlmquant.packing import unpack_codes

WEIGHTS = "model.safetensors"
SYMMETRIC, ASYMMETRIC = "{language: w4a16}", "{language: w4a16-asym}"


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**tiny_vlm.image_inputs(kind)).logits
    return result


def dense_logits(model_dir: Path, codes: dict[str, QuantizedWeight], out: Path, kind: str) -> Tensor:
    """Of the model with dequantized weights in place of the codes."""
    packed.write_dense(model_dir, out, codes)
    return logits(load_model(out, dtype=torch.float32), kind)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, path / WEIGHTS, metadata={"format": "pt"})


def configure(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "format", "recipe"),
    [
        ("llava", "gptq", SYMMETRIC),
        ("qwen2_5_vl", "gptq_v2", ASYMMETRIC),
        ("qwen3_vl", "awq", ASYMMETRIC),
    ],
)
def test_packed_weights_compute_what_their_codes_say(
    kind: str, format: str, recipe: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    codes = packed.write_packed(tiny(kind), tmp_path / "q", recipe, format)
    model = load_model(tmp_path / "q", dtype=torch.float32)
    found = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert found == {name.removesuffix(".weight") for name in codes}
    for name, weight in codes.items():
        held = model.get_submodule(name.removesuffix(".weight")).to_weight()
        assert torch.equal(held.codes, weight.codes)
        assert torch.equal(held.scales, weight.scales)
    packed.write_packed(tiny(kind), tmp_path / "ct", recipe)
    other = load_model(tmp_path / "ct", dtype=torch.float32)
    assert torch.equal(logits(model, kind), logits(other, kind))
    for name in found:  # nor is it slower
        assert model.get_submodule(name).form == other.get_submodule(name).form
        assert model.get_submodule(name).layout == other.get_submodule(name).layout


def test_permuted_groups_stay_packed_and_compute_what_g_idx_says(tiny_llava: Path, tmp_path: Path) -> None:
    codes = packed.write_packed(tiny_llava, tmp_path / "q", SYMMETRIC, "gptq")
    generator = torch.Generator().manual_seed(0)
    dense: dict[str, Tensor] = {}

    def permute(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]
            module = name.removesuffix(".g_idx")
            rows = tensors[f"{module}.scales"].shape[1]
            stored = unpack_codes(tensors[f"{module}.qweight"].T, 4, len(tensors[name])).T.float()  # (in, out)
            scales = tensors[f"{module}.scales"].float()[tensors[name].long()]  # (in, out), by hand
            assert scales.shape == (len(tensors[name]), rows)
            dense[f"{module}.weight"] = ((stored - 8) * scales).T.contiguous()

    edit(tmp_path / "q", permute)
    configure(tmp_path / "q", lambda config: config.update(desc_act=True))
    model = load_model(tmp_path / "q", dtype=torch.float32)
    permuted = [module for module in model.modules() if isinstance(module, PermutedLinear)]
    assert len(permuted) == sum(len(weight.scales[0]) > 1 for weight in codes.values())
    shutil.copytree(tiny_llava, tmp_path / "dense")
    edit(tmp_path / "dense", lambda tensors: tensors.update(dense))
    expected = load_model(tmp_path / "dense", dtype=torch.float32)
    assert torch.allclose(logits(model, "llava"), logits(expected, "llava"), atol=2e-5)
    for name, module in model.named_modules():
        if isinstance(module, PermutedLinear):
            assert torch.equal(module.dequantize(), expected.get_submodule(name).weight)


@pytest.mark.parametrize("names", [["visual"], None, ["nothing.of.the.kind"]])
def test_what_is_quantized_in_awq_is_what_lies_on_disk(
    names: list[str] | None, tiny_qwen2_5_vl: Path, tmp_path: Path
) -> None:
    codes = packed.write_packed(tiny_qwen2_5_vl, tmp_path / "q", ASYMMETRIC, "awq")
    configure(tmp_path / "q", lambda config: config.update(modules_to_not_convert=names))
    model = load_model(tmp_path / "q", dtype=torch.float32)
    original = load_model(tiny_qwen2_5_vl, dtype=torch.float32)
    loaded = model.state_dict()
    kept = [name for name in original.state_dict() if name in loaded]
    assert sum("visual" in name for name in kept) > 20
    for name in kept:
        assert torch.equal(loaded[name], original.state_dict()[name]), name
    assert torch.allclose(
        logits(model, "qwen2_5_vl"), dense_logits(tiny_qwen2_5_vl, codes, tmp_path / "d", "qwen2_5_vl"), atol=5e-2
    )


LAYER = "language_model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("gptq", lambda t: t.pop(f"{LAYER}.qweight"), "missing keys: model.language_model.layers.0.mlp.up_proj.weight"),
        ("gptq", lambda t: t.pop(f"{LAYER}.scales"), "up_proj: tensor scales is missing"),
        ("awq", lambda t: t.pop(f"{LAYER}.qzeros"), "up_proj: tensor qzeros is missing"),
        ("awq", lambda t: t.update({f"{LAYER}.g_idx": torch.zeros(2)}), "1 unexpected keys: .*g_idx"),
        ("awq", lambda t: t.update({f"{LAYER}.scales": torch.ones(3, 384).half()}), "cannot load it|mismatched"),
        (
            "gptq",
            lambda t: t[f"{LAYER}.scales"].fill_(torch.nan),
            "up_proj: scales holds values that are 0",
        ),
        ("gptq", lambda t: t[f"{LAYER}.g_idx"].fill_(0), "up_proj: g_idx does not give each of 2 groups"),
        ("gptq", lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].long()}), "qweight is torch.int64"),
    ],
)
def test_damaged_weights_are_refused(
    format: str, change: Callable[[dict[str, Tensor]], object], message: str, tiny_llava: Path, tmp_path: Path
) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", ASYMMETRIC if format == "awq" else SYMMETRIC, format)
    edit(tmp_path / "q", change)
    with pytest.raises((CheckpointError, InputError), match=message) as error:
        load_model(tmp_path / "q")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "cannot load it|mismatched|qzeros"),
        ({"group_size": 64}, "cannot load it|mismatched|scales"),
        ({"checkpoint_format": "gptq_v2"}, "says sym and gptq_v2, but .* or gptq"),
        ({"checkpoint_format": "marlin"}, "config.json: quantization_config: checkpoint_format 'marlin'"),
        ({"quant_method": "awq"}, "version 'gptq' of AWQ's files is not one that we read: gemm"),
        ({"quant_method": "awq", "format": "gemm"}, "cannot load it|mismatched|unexpected"),
    ],
)
def test_a_config_that_lies_is_refused(change: dict[str, Any], message: str, tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", SYMMETRIC, "gptq")
    configure(tmp_path / "q", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "q")


# --- compressed-tensors of other makers ---


def test_classes_as_targets_and_names_of_older_transformers(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    codes = packed.write_packed(tiny_qwen2_5_vl, tmp_path / "q", SYMMETRIC)
    before = logits(load_model(tmp_path / "q", dtype=torch.float32), "qwen2_5_vl")

    def as_llm_compressor(config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        del group["format"]
        group["targets"] = ["Linear"]
        group["weights"] |= {
            "actorder": "static",
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
            "scale_dtype": None,
            "zp_dtype": None,
        }
        blocks = [f"visual.blocks.{layer}.{name}" for layer in range(2) for name in ("attn.qkv", "attn.proj")]
        config["ignore"] = ["lm_head", *blocks]
        config["sparsity_config"], config["quantization_status"] = {}, "compressed"

    configure(tmp_path / "q", as_llm_compressor)
    model = load_model(tmp_path / "q", dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == len(codes)
    assert torch.equal(logits(model, "qwen2_5_vl"), before)


def test_zero_points_that_are_not_packed_and_a_g_idx_in_order(tiny_llava: Path, tmp_path: Path) -> None:
    codes = packed.write_packed(tiny_llava, tmp_path / "q", ASYMMETRIC)

    def unpack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            module = name.removesuffix(".weight_zero_point")
            rows, columns = tensors[f"{module}.weight_shape"].tolist()
            tensors[name] = unpack_codes(tensors[name].T.contiguous(), 4, rows).T.to(torch.int8) - 8
            tensors[f"{module}.weight_g_idx"] = torch.full((columns,), -1, dtype=torch.int32)

    edit(tmp_path / "q", unpack)
    model = load_model(tmp_path / "q", dtype=torch.float32)
    for name, weight in codes.items():
        held = model.get_submodule(name.removesuffix(".weight")).to_weight()
        assert torch.equal(held.codes, weight.codes)
        assert held.zeros is not None
        assert weight.zeros is not None
        assert torch.equal(held.zeros, weight.zeros)


def test_zero_points_of_symmetric_weights_must_be_zero(tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", SYMMETRIC)

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            zeros = torch.zeros(tensors[name].shape, dtype=torch.int8)
            tensors[name.replace("weight_scale", "weight_zero_point")] = zeros

    edit(tmp_path / "q", add)
    load_model(tmp_path / "q")
    edit(tmp_path / "q", lambda tensors: tensors[f"{LAYER}.weight_zero_point"][0].fill_(1))
    with pytest.raises(CheckpointError, match="up_proj: weight_zero_point holds zero points, though"):
        load_model(tmp_path / "q")
