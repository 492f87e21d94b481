"""Tensors that the model class leaves aside by design, and stored buffers: kept, bit for bit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests import zoo, zoo_check
from vlmquant.checkpoint.reader import verify_checkpoint
from vlmquant.cli import app
from vlmquant.components import resolve_components
from vlmquant.errors import InputError
from vlmquant.loading import load_model
from vlmquant.recipe import load_recipe, parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "model.safetensors"
MTP = {
    "qwen3_5": ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.mlp.experts.3.up_proj.weight"),
    "glm4v_moe": (
        "model.language_model.layers.46.mlp.experts.0.gate_proj.weight",
        "model.language_model.layers.46.eh_proj.weight",
    ),
    "glm_ocr": (
        "model.language_model.layers.16.self_attn.q_proj.weight",
        "model.language_model.layers.16.eh_proj.weight",
    ),
    "paddleocr_vl": ("visual.vision_model.head.mlp.fc1.weight",),
}
"""Kind -> names of tensors that its class ignores, as its published checkpoints have them."""


def inject(model_dir: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    added = {name: torch.randn(128, 256, generator=generator).bfloat16() for name in names}
    save_file({**load_file(model_dir / WEIGHTS), **added}, model_dir / WEIGHTS, {"format": "pt"})
    return added


@pytest.mark.parametrize("kind", MTP)
def test_what_the_class_ignores_travels_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model_dir = zoo.build(kind, tmp_path / "model")
    added = inject(model_dir, MTP[kind])
    recipe = parse_recipe(zoo_check.WEIGHTS_ONLY, name="x")
    components, plan = zoo_check.quantize(model_dir, recipe, tmp_path / "out", [])
    lines = {line.name: line for line in plan.lines}
    for name, value in added.items():
        assert (lines[name].component, lines[name].action, lines[name].bytes_after) == ("other", "keep", value.nbytes)
    assert plan.bytes_before == components.total_bytes == sum(t.nbytes for t in load_file(model_dir / WEIGHTS).values())
    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, value in added.items():
        assert torch.equal(written[name], value)
    assert verify_checkpoint(tmp_path / "out") == []
    load_model(tmp_path / "out", dtype=torch.float32)
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [re.compile(one.removeprefix("re:")) for one in ignore if one.startswith("re:")]
    for name in added:
        assert any(pattern.match(name.removesuffix(".weight")) for pattern in patterns), (name, ignore)
    served = "mtp.layers.0.self_attn.qkv_proj" if kind == "qwen3_5" else None  # what vLLM calls it
    assert served is None or any(pattern.match(served) for pattern in patterns)


def test_the_plan_counts_them(tmp_path: Path) -> None:
    model_dir = zoo.build("qwen3_5", tmp_path / "model")
    added = inject(model_dir, MTP["qwen3_5"])
    shown = CliRunner().invoke(app, ["plan", str(model_dir), "-r", "mixed", "--json"])
    assert shown.exit_code == 0, shown.output
    plan = json.loads(shown.stdout)
    assert plan["components"]["other"]["bytes_before"] == sum(value.nbytes for value in added.values())
    assert any(note.startswith("3 tensors (196,608 bytes, below mtp)") for note in plan["notes"])


def test_other_strangers_are_still_refused(tmp_path: Path) -> None:
    model_dir = zoo.build("qwen3_5", tmp_path / "model")
    inject(model_dir, ("model.language_model.layers.0.mlp.extra_proj.weight",))
    with pytest.raises(InputError, match=r"no place in a Qwen3_5ForConditionalGeneration: .*extra_proj"):
        resolve_components(model_dir)


BUFFERS = {"glm4v_moe": "e_score_correction_bias", "gemma4": "layer_scalar", "florence2": "pos_idx_to_embed"}


@pytest.mark.parametrize("kind", BUFFERS)
def test_stored_buffers_are_there_while_calibrating_and_after(kind: str, tmp_path: Path) -> None:
    model_dir = zoo.build(kind, tmp_path / "model")
    components, plan = zoo_check.quantize(model_dir, zoo_check.mixed(), tmp_path / "out", zoo_check.calibration(kind))
    buffers = [one for one in components.parameters if one.buffer and one.name.endswith(BUFFERS[kind])]
    assert buffers
    assert all(plan.line(one.name).action == "keep" for one in buffers)
    before, after = load_file(model_dir / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(before[one.disk], after[one.disk]) for one in buffers)


@pytest.mark.parametrize("kind", ["glm4v_moe", "gemma4"])
def test_a_stored_buffer_changes_what_calibration_sees(kind: str, tmp_path: Path) -> None:
    """Were buffers left out while calibrating, two models that differ in them alone would get the same codes."""
    results = []
    for name, factor in (("one", 1.0), ("two", -2.0)):
        model_dir = zoo.build(kind, tmp_path / name)
        tensors = load_file(model_dir / WEIGHTS)
        changed = {
            key: value * factor if key.endswith(BUFFERS[kind]) else value.clone() for key, value in tensors.items()
        }
        save_file(changed, model_dir / WEIGHTS, {"format": "pt"})
        out = tmp_path / f"{name}-out"
        zoo_check.quantize(model_dir, zoo_check.mixed(), out, zoo_check.calibration(kind))
        results.append({key: value for key, value in load_file(out / WEIGHTS).items() if key.endswith("weight_packed")})
    assert any(not torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_mixed_is_the_shipped_recipe_but_for_starving() -> None:
    shipped, ours = load_recipe("mixed"), zoo_check.mixed()
    assert ours.components == shipped.components
