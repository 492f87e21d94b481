"""Models with weights of 32 bits: what is kept of them is stored in 16, and nothing else of the work changes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests import grids, tiny_vlm, zoo
from tests.tiny_vlm import image_inputs
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.errors import InputError
from vlmquant.formats.compressed_tensors import decode
from vlmquant.loading import load_model
from vlmquant.pipeline import Quantized, plan_model, quantize
from vlmquant.recipe import Recipe, Scheme, parse_recipe
from vlmquant.shards import open_shards

COMPONENTS = "{vision_encoder: w8a16, language: w4a16}"
GATE = "mlp.gate.weight"
"""Of Ernie: transformers keeps it in float32."""


def recipe(components: str = COMPONENTS, kept: str | None = None) -> Recipe:
    output = f"output: {{kept: {kept}}}\n" if kept else ""
    return parse_recipe(f"name: test\ncomponents: {components}\n{output}", name="test")


def floats(model_dir: Path) -> Counter[torch.dtype]:
    return Counter(one.dtype for one in open_shards(model_dir).entries.values() if one.dtype.is_floating_point)


def config_of(model_dir: Path) -> dict[str, Any]:
    return dict(json.loads((model_dir / "config.json").read_text()))


def set_dtype(model_dir: Path, **dtypes: str | None) -> None:
    """Of the top level (`model`) and of parts; None leaves it out."""
    config = config_of(model_dir)
    for part, dtype in dtypes.items():
        place = config if part == "model" else config[part]
        place.pop("dtype", None)
        if dtype:
            place["torch_dtype" if part != "model" else "dtype"] = dtype
    (model_dir / "config.json").write_text(json.dumps(config))


def build(kind: str, out: Path, **dtypes: str | None) -> Path:
    model_dir = tiny_vlm.build(kind, out, dtype=torch.float32)
    set_dtype(model_dir, **dtypes)
    return model_dir


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(**image_inputs(kind)).logits
    return values


@pytest.mark.parametrize(
    ("kind", "dtypes", "written"),
    [
        ("llava", {"model": "float32", "text_config": "float32"}, torch.bfloat16),
        ("qwen2_5_vl", {"model": None, "text_config": None, "vision_config": "float32"}, torch.bfloat16),
        ("internvl", {"model": "bfloat16", "text_config": "float32"}, torch.bfloat16),
        ("mllama", {"model": "float16"}, torch.float16),
    ],
)
def test_what_is_kept_is_stored_in_16_bits(
    kind: str, dtypes: dict[str, str | None], written: torch.dtype, tmp_path: Path
) -> None:
    source = build(kind, tmp_path / "model", **dtypes)
    done = quantize(source, recipe(), tmp_path / "out")
    name, note = str(written).removeprefix("torch."), done.plan.notes[0]
    assert f"are stored as {name}" in note
    assert "kept: fp32" in note
    assert set(floats(done.path)) == {written}
    assert done.plan.bytes_after == open_shards(done.path).total_bytes
    assert {line.scheme_label for line in done.plan.lines if line.action == "keep"} == {name}
    config = config_of(done.path)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    assert {part[key] for part in parts for key in ("dtype", "torch_dtype") if key in part} == {name}
    assert config["dtype"] == name
    assert read_manifest(done.path)["dtype"] == name
    assert verify_checkpoint(done.path) == []
    before, after = load_file(source / "model.safetensors"), load_file(done.path / "model.safetensors")
    kept = before.keys() & after.keys()
    assert kept
    assert all(torch.equal(after[disk], before[disk].to(written)) for disk in kept)


def test_codes_are_those_of_the_32_bits(tmp_path: Path) -> None:
    source = build("llava", tmp_path / "model")
    done = quantize(source, recipe(), tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(done.path / "model.safetensors")
    names, differ = read_manifest(done.path)["disk_names"], 0
    for line in done.plan.lines:
        if isinstance(line.scheme, Scheme):
            disk = names[line.name]
            codes = decode(disk.removesuffix(".weight"), after.__getitem__, line.scheme).codes
            exact, rounded = (
                grids.nearest(value, line.scheme).codes for value in (before[disk], before[disk].bfloat16().float())
            )
            assert torch.equal(codes, exact)
            differ += int((exact != rounded).sum())
    assert differ > 0, "rounding first would have given the same"


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_it_is_loaded_as_it_is_stored(kind: str, tmp_path: Path) -> None:
    """By us, and by transformers with the codes put in as plain weights."""
    done = quantize(build(kind, tmp_path / "model"), recipe(), tmp_path / "out")
    packed = load_model(done.path)
    assert packed.dtype == packed.config.dtype == torch.bfloat16
    plain = tmp_path / "plain"
    tiny_vlm.build(kind, plain)
    stored, names = load_file(done.path / "model.safetensors"), read_manifest(done.path)["disk_names"]
    tensors = {}
    for line in done.plan.lines:
        disk = names[line.name]
        if isinstance(line.scheme, Scheme):
            tensors[disk] = decode(disk.removesuffix(".weight"), stored.__getitem__, line.scheme).dequantize()
        else:
            tensors[disk] = stored[disk]
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    dense = AutoModelForImageTextToText.from_pretrained(plain, dtype=torch.float32).eval()
    packed = load_model(done.path, dtype=torch.float32)
    torch.testing.assert_close(logits(packed, kind), logits(dense, kind), rtol=1e-4, atol=1e-4)


def test_a_recipe_may_keep_the_32_bits(tmp_path: Path) -> None:
    source = build("llava", tmp_path / "model", model="float32")
    done = quantize(source, recipe(kept="fp32"), tmp_path / "wide")
    assert {line.scheme_label for line in done.plan.lines if line.action == "keep"} == {"float32"}
    assert not any("are stored as" in note for note in done.plan.notes)
    assert set(floats(done.path)) == {torch.float32}
    assert config_of(done.path)["dtype"] == "float32"
    assert done.plan.bytes_after == open_shards(done.path).total_bytes


def test_a_model_of_16_bits_is_left_as_it_is(tiny_llava: Path, tmp_path: Path) -> None:
    results = [
        quantize(tiny_llava, recipe(kept=kept), tmp_path / str(kept)).path / "model.safetensors"
        for kept in (None, "fp32")
    ]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_what_transformers_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """A router, and what is no weight, in a mixture of experts whose stacks are kept."""
    source = zoo.build("ernie4_5_vl_moe", tmp_path / "model", dtype=torch.float32)
    done = quantize(source, recipe("{vision_encoder: w8a16}"), tmp_path / "out")
    wide = {name for name, one in open_shards(done.path).entries.items() if one.dtype == torch.float32}
    assert any(name.endswith(GATE) for name in wide)
    assert all("gate" in name or "e_score_correction_bias" in name for name in wide)
    assert {line.scheme_label for line in done.plan.lines if line.name.endswith(GATE)} <= {"float32"}
    assert done.plan.bytes_after == open_shards(done.path).total_bytes
    load_model(done.path)


def test_stacks_of_kept_experts_stay_stacks(tmp_path: Path) -> None:
    source = zoo.build("qwen3_vl_moe", tmp_path / "model", dtype=torch.float32)
    stacked = {name: one.shape for name, one in open_shards(source).entries.items() if len(one.shape) == 3}
    done = quantize(source, recipe("{vision_encoder: w8a16}"), tmp_path / "out")
    entries = open_shards(done.path).entries
    assert stacked
    assert {name: (entries[name].shape, entries[name].dtype) for name in stacked} == {
        name: (shape, torch.bfloat16) for name, shape in stacked.items()
    }
    model = AutoModelForImageTextToText.from_pretrained(done.path)
    assert model.dtype == torch.bfloat16


def test_other_parts_stay_as_they_are(tmp_path: Path) -> None:
    source = build("llava", tmp_path / "model")
    family = "family: {vision_encoder: [model.vision_tower], language: model.language_model, embedding: '', other: []}"
    plain = f"name: test\ncomponents: {COMPONENTS}\n{family}\n"
    done = quantize(source, parse_recipe(plain, name="test"), tmp_path / "out")
    projector = {line.name: line for line in done.plan.lines if "multi_modal_projector" in line.name}
    assert {(line.component, line.scheme_label) for line in projector.values()} == {("other", "float32")}
    entries = open_shards(done.path).entries
    assert {entries[name.removeprefix("model.")].dtype for name in projector} == {torch.float32}


def test_calibration_runs_on_what_is_stored(tmp_path: Path) -> None:
    """Kept weights are read as they will be in the quantized model, those to be quantized as they are."""
    source = build("llava", tmp_path / "model")
    components, _ = plan_model(source, recipe())
    before = load_file(source / "model.safetensors")
    norm, linear = "layers.0.input_layernorm.weight", "layers.0.mlp.up_proj.weight"
    read = {name: components.read(f"model.language_model.{name}") for name in (norm, linear)}
    assert torch.equal(read[norm], before[f"language_model.model.{norm}"].bfloat16())
    assert torch.equal(read[linear], before[f"language_model.model.{linear}"])


def test_a_value_beyond_16_bits_is_named(tmp_path: Path) -> None:
    source = build("llava", tmp_path / "model", model="float16")
    tensors = load_file(source / "model.safetensors")
    tensors["language_model.model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"norm\.weight holds 1 values beyond float16, .*kept: fp32"):
        quantize(source, recipe(), tmp_path / "out")
    quantize(source, recipe(kept="fp32"), tmp_path / "wide")


def test_the_label_of_a_plan_says_what_is_written(tmp_path: Path) -> None:
    done: Quantized = quantize(build("llava", tmp_path / "model"), recipe(), tmp_path / "out")
    entries, names = open_shards(done.path).entries, read_manifest(done.path)["disk_names"]
    for line in done.plan.lines:
        if line.action == "keep":
            assert line.scheme_label == str(entries[names[line.name]].dtype).removeprefix("torch.")
            assert line.bytes_after == entries[names[line.name]].nbytes
