"""Export: the same codes in another format, or a refusal that says what differs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from tests import packed, zoo
from tests.test_loading_foreign import LAYER, edit, logits
from vlmquant import cli
from vlmquant.algorithms import ALGORITHMS, rtn
from vlmquant.checkpoint import check_coded, read_manifest, verify_checkpoint
from vlmquant.checkpoint.coded import open_coded
from vlmquant.engines import check_checkpoint, check_plan
from vlmquant.errors import CheckpointError, PlanError, UsageError
from vlmquant.export import export
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import plan_model, quantize
from vlmquant.recipe import Recipe, TargetSpec, parse_recipe

SYMMETRIC, ASYMMETRIC = "{language: w4a16}", "{language: w4a16-asym}"


def recipe_of(components: str, format: str = "compressed-tensors", more: str = "") -> Recipe:
    text = f"name: test\ncomponents: {components}\noutput: {{format: {format}{more}}}\n"
    return parse_recipe(text, name="test")


@pytest.fixture(scope="module")
def ours(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """ours(kind, components) -> a checkpoint in compressed-tensors that quantize wrote. Not to be written to."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, components: str) -> Path:
        if (kind, components) not in made:
            out = tmp_path_factory.mktemp(kind) / "ours"
            made[kind, components] = quantize(tiny(kind), recipe_of(components), out).path
        return made[kind, components]

    return make


def tensors_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        one.dtype == second[name].dtype and torch.equal(one, second[name]) for name, one in first.items()
    )


@pytest.mark.parametrize(
    ("format", "components"),
    [("gptq", SYMMETRIC), ("gptq_v2", ASYMMETRIC), ("awq", ASYMMETRIC), ("awq", SYMMETRIC)],
)
def test_there_and_back_gives_the_same_bytes(
    format: str, components: str, ours: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = ours("qwen3_vl", components)
    there = export(source, format, tmp_path / "there")
    assert verify_checkpoint(there.path) == []
    assert list(check_coded(there.path)) == []
    back = export(there.path, "compressed-tensors", tmp_path / "back").path
    assert verify_checkpoint(back) == []
    assert equal(tensors_of(back), tensors_of(source))
    configs = [json.loads((path / "config.json").read_text()) for path in (source, back)]
    assert configs[0] == configs[1]
    before, after = load_model(source, dtype=torch.float32), load_model(there.path, dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in after.modules()) == len(open_coded(source).schemes)
    assert torch.equal(logits(after, "qwen3_vl"), logits(before, "qwen3_vl"))


@pytest.mark.parametrize(("kind", "format"), [("llava", "gptq"), ("qwen2_5_vl", "gptq_v2"), ("llava", "awq")])
def test_quantize_writes_what_export_would(
    kind: str, format: str, tiny: Callable[..., Path], ours: Callable[[str, str], Path], tmp_path: Path
) -> None:
    written = quantize(tiny(kind), recipe_of(SYMMETRIC, format), tmp_path / "written")
    assert verify_checkpoint(written.path) == []
    sizes = sum(file.stat().st_size for file in written.path.glob("*.safetensors"))
    assert 0 <= sizes - written.plan.bytes_after < 100_000  # headers
    exported = export(ours(kind, SYMMETRIC), format, tmp_path / "exported").path
    assert equal(tensors_of(written.path), tensors_of(exported))
    config = (written.path / "config.json").read_text()
    assert config == (exported / "config.json").read_text()
    components, plan = plan_model(tiny(kind), recipe_of(SYMMETRIC, format))
    for target in (TargetSpec(engine="vllm", gpu="sm_90"), TargetSpec(engine="transformers")):
        contracts = check_checkpoint(exported, target), check_plan(components, plan, target, format=format)
        found = [{(one.rule, one.what, frozenset(one.layers)) for one in each.findings} for each in contracts]
        assert found[0] == found[1]
        assert contracts[0].fits
    assert any("gptqmodel" in one.change for one in contracts[0].findings)


def test_a_killed_run_goes_on(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, calls = recipe_of(SYMMETRIC, "gptq"), 0

    def stop_in_the_second_block(stage: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        return rtn.quantize_stage(stage)  # type: ignore[arg-type]

    monkeypatch.setitem(ALGORITHMS, "rtn", stop_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llava, recipe, tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / "out.partial" / "units").iterdir())) > 1
    quantize(tiny_llava, recipe, tmp_path / "out", resume=True)
    quantize(tiny_llava, recipe, tmp_path / "whole")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_the_same_format_again_gives_the_same_bytes(ours: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = ours("llava", "{vision_encoder: w8a8-dynamic, embedding: w8, language: w3a16}")
    again = export(source, "compressed-tensors", tmp_path / "again").path
    assert verify_checkpoint(again) == []
    assert equal(tensors_of(again), tensors_of(source))
    assert (again / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_experts_are_exported_one_by_one(tmp_path: Path) -> None:
    model = zoo.build("qwen3_vl_moe", tmp_path / "model")
    source = quantize(model, recipe_of(SYMMETRIC, "awq"), tmp_path / "source").path
    out = export(source, "gptq", tmp_path / "out").path
    assert verify_checkpoint(out) == []
    before, after = load_model(source, dtype=torch.float32), load_model(out, dtype=torch.float32)
    held = {name: one.to_weight() for name, one in before.named_modules() if isinstance(one, QuantLinear)}
    assert sum(".experts." in name for name in held) > 8
    for name, weight in held.items():
        other = after.get_submodule(name).to_weight()
        assert torch.equal(other.codes, weight.codes)
        assert torch.equal(other.scales, weight.scales)


@pytest.mark.parametrize(
    ("components", "format", "more", "message"),
    [
        (
            "{vision_encoder: w8a8-dynamic, language: w4a16}",
            "gptq",
            "",
            r"visual.* \(vision_encoder\) is w8a8-dynamic, "
            "but gptq files hold the linears of the language layers alone; compressed-tensors holds both",
        ),
        ("{language: w3a16}", "gptq", "", "is w3a16-g128, but gptq files hold integers of 4 or 8 bits"),
        ("{language: fp8-dynamic}", "gptq", "", "is fp8-dynamic, but gptq files hold integers of 4 or 8 bits"),
        ("{language: w8a16}", "awq", "", "is w8a16, but awq files hold integers of 4 bits"),
        (
            "{language: w8a8-dynamic}",
            "gptq",
            "",
            "is w8a8-dynamic, but gptq files hold integers of 4 or 8 bits with",
        ),
        (
            "{language: {scheme: w4a16, overrides: [{layers: '0:1', scheme: w8a16}]}}",
            "gptq_v2",
            "",
            "is w4a16-g128 and .* w8a16, but gptq_v2 files have one scheme for all",
        ),
        ("{language: w4a16, lm_head: w4a16}", "awq", "", r"lm_head.weight \(lm_head\) is w4a16-g128"),
        ("{}", "awq", "", "quantizes nothing"),
    ],
)
def test_plan_refuses_what_the_format_cannot_hold(
    components: str, format: str, more: str, message: str, tiny_qwen3_vl: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_model(tiny_qwen3_vl, recipe_of(components, format, more))


def test_plan_refuses_scales_of_more_than_16_bits(tiny: Callable[..., Path]) -> None:
    model = tiny("llava", dtype=torch.float32)
    plan_model(model, recipe_of(SYMMETRIC, "gptq"))
    with pytest.raises(PlanError, match=r"scales would be float32, and gptq files hold float16 ones; .*kept: fp32"):
        plan_model(model, recipe_of(SYMMETRIC, "gptq", ", kept: fp32"))


@pytest.mark.parametrize(
    ("components", "format", "message"),
    [
        ("{vision_encoder: w8a8-dynamic, language: w4a16}", "awq", r"\(vision_encoder\) is w8a8-dynamic"),
        ("{language: w3a16}", "gptq", "is w3a16-g128, but gptq files hold integers of 4 or 8 bits"),
    ],
)
def test_export_refuses_what_the_format_cannot_hold(
    components: str, format: str, message: str, ours: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        export(ours("llava", components), format, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_permuted_groups_and_8_bits_and_unknown_formats_are_refused(tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", SYMMETRIC, "gptq")
    edit(tmp_path / "q", lambda tensors: tensors.update({f"{LAYER}.g_idx": tensors[f"{LAYER}.g_idx"].flip(0)}))
    with pytest.raises(PlanError, match=r"up_proj: its groups are of inputs in an order of their own \(g_idx"):
        export(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    with pytest.raises(UsageError, match="'gguf' is none of compressed-tensors, gptq, gptq_v2, awq"):
        export(tmp_path / "q", "gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="quant_method is None"):
        export(tiny_llava, "awq", tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"q"}


def test_floating_point_is_refused_and_verified(ours: Callable[[str, str], Path], tmp_path: Path) -> None:
    for components, label in (("{language: nvfp4a16}", "nvfp4a16"), ("{language: fp8-block}", "fp8-block")):
        source = Path(shutil.copytree(ours("llava", components), tmp_path / label))
        with pytest.raises(PlanError, match=f"is {label}, floating point, and no integer format holds it"):
            export(source, "compressed-tensors", tmp_path / "out")
        (source / "vlmquant.json").unlink()
        assert list(check_coded(source)) == []


def test_scales_that_float16_has_not_are_refused_or_rounded_on_purpose(tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", SYMMETRIC)
    tiny_scale = torch.tensor(1.5 * 2.0**-25 * (1 + 1 / 64)).bfloat16()

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight_scale"][0, 0] = tiny_scale

    edit(tmp_path / "q", shrink)
    with pytest.raises(PlanError, match=r"gptq files hold scales in float16; 1 of [\d,]+ scales \(bfloat16\) have no"):
        export(tmp_path / "q", "gptq", tmp_path / "out")
    done = export(tmp_path / "q", "gptq", tmp_path / "out", round_scales=True)
    assert any("1 of" in note and "as --round-scales allowed" in note for note in done.notes)
    assert verify_checkpoint(done.path) == []
    scale = tensors_of(done.path)[f"{LAYER}.scales"][0, 0].item()
    assert scale == 2.0**-24
    export(tmp_path / "q", "compressed-tensors", tmp_path / "same")
    assert torch.equal(tensors_of(tmp_path / "same")[f"{LAYER}.weight_scale"][0, 0], tiny_scale)


def test_float16_scales_of_others_stay_in_compressed_tensors(tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", ASYMMETRIC, "awq")
    fine = torch.tensor(0.01).half()
    edit(tmp_path / "q", lambda tensors: tensors[f"{LAYER}.scales"][0].fill_(fine))
    done = export(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    assert any("scales stay float16" in note for note in done.notes)
    assert read_manifest(done.path)["scale_dtype"] == "float16"
    assert verify_checkpoint(done.path) == []
    weight = load_model(done.path).get_submodule("model.language_model.layers.0.mlp.up_proj").to_weight()
    assert weight.scales[0, 0] == fine.float()


def test_a_single_symmetric_layer_among_asymmetric_ones_keeps_its_zero_points(tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", ASYMMETRIC, "awq")
    middle = torch.tensor([0x88888888 - (1 << 32)], dtype=torch.int32)
    edit(tmp_path / "q", lambda tensors: tensors.update({f"{LAYER}.qzeros": middle.expand(2, 48)}))
    out = export(tmp_path / "q", "compressed-tensors", tmp_path / "out").path
    assert verify_checkpoint(out) == []
    assert f"{LAYER}.weight_zero_point" in tensors_of(out)
    both = [load_model(path, dtype=torch.float32) for path in (tmp_path / "q", out)]
    assert torch.allclose(logits(both[0], "llava"), logits(both[1], "llava"), atol=1e-4)


def test_a_zero_point_of_0_is_refused_by_version_1(tiny_llava: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", ASYMMETRIC)
    later = LAYER.replace("layers.0", "layers.1")
    edit(tmp_path / "q", lambda tensors: tensors[f"{later}.weight_zero_point"].zero_())
    with pytest.raises(CheckpointError, match="up_proj: 768 zero points are 0, which version 1 of GPTQ's"):
        export(tmp_path / "q", "gptq", tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"q"}
    export(tmp_path / "q", "gptq_v2", tmp_path / "out")


def test_what_a_manifest_says_travels_and_force_is_needed(ours: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(ours("llava", SYMMETRIC), tmp_path / "source"))
    (source / "README.base.md").write_text("the base model's card")
    out = export(source, "awq", tmp_path / "out").path
    assert (out / "README.base.md").read_text() == "the base model's card"
    before, after = read_manifest(source), read_manifest(out)
    assert after["exported_from"] == {
        "format": "compressed-tensors",
        "name": "source",
        "fingerprint": before["fingerprint"],
    }
    assert after["errors"] == before["errors"]
    assert after["settings"] == before["settings"]
    assert after["base_model"] == before["base_model"]
    assert after["recipe"] == before["recipe"] | {"output": before["recipe"]["output"] | {"format": "awq"}}
    assert set(before["files"]) - {"config.json"} <= set(after["files"]) | {"README.base.md"}
    with pytest.raises(UsageError, match="exists and is not empty"):
        export(source, "awq", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds what vlmquant did not write there.*notes\.txt"):
        export(source, "awq", tmp_path / "out", force=True)
    (tmp_path / "out" / "notes.txt").unlink()
    export(source, "gptq", tmp_path / "out", force=True)
    assert read_manifest(out)["recipe"]["output"]["format"] == "gptq"
    with pytest.raises(UsageError, match="lie one in the other"):
        export(source, "gptq", source / "out")


# --- the command, and verifying what others wrote ---


def test_the_commands(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    packed.write_packed(tiny_qwen2_5_vl, tmp_path / "q", ASYMMETRIC, "awq")
    run = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "q")])
    assert (run.exit_code, "no manifest says" in run.stdout) == (0, True)
    arguments = ["export", str(tmp_path / "q"), "--format", "gptq_v2", "--out", str(tmp_path / "out"), "--json"]
    run = CliRunner().invoke(cli.app, arguments)
    assert run.exit_code == 0
    said = json.loads(run.stdout)
    assert (said["from"], said["format"], said["weights"]) == ("awq", "gptq_v2", 14)
    assert CliRunner().invoke(cli.app, ["verify", str(tmp_path / "out")]).exit_code == 0
    edit(tmp_path / "q", lambda tensors: tensors["model.layers.0.mlp.up_proj.scales"].zero_())
    run = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "q")])
    assert run.exit_code == 1
    assert "model.safetensors: model.layers.0.mlp.up_proj: scales holds values that are 0 or no numbers" in run.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.scales"), "up_proj: tensor scales is missing"),
        (lambda t: t.pop(f"{LAYER}.qweight"), "up_proj"),
        (lambda t: t.update({f"{LAYER}.weight": torch.ones(384, 256)}), "both as codes and as a weight"),
        (
            lambda t: t.pop("language_model.model.norm.weight"),
            "1 tensors are missing: model.language_model.norm",
        ),
        (lambda t: t["language_model.model.norm.weight"].fill_(torch.nan), "norm.weight holds"),
        (lambda t: t.update({f"{LAYER}.scales": torch.ones(2, 8).half()}), r"scales has shape \[2, 8\]"),
    ],
)
def test_damage_in_what_others_wrote_is_found(
    change: Callable[[dict[str, Tensor]], object], message: str, tiny_llava: Path, tmp_path: Path
) -> None:
    packed.write_packed(tiny_llava, tmp_path / "q", SYMMETRIC, "gptq")
    assert list(check_coded(tmp_path / "q")) == []
    edit(tmp_path / "q", change)
    problems = list(check_coded(tmp_path / "q"))
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems
