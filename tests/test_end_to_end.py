"""The whole road on tiny models: quantize by every shipped recipe, load, compare weights and logits, evaluate, gate."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import vlmquant
from tests.conftest import NEEDS_BITSANDBYTES
from tests.small_set import write_small_set
from tests.tiny_vlm import image_inputs
from tests.written import written
from vlmquant.calibration.encode import Encoded, Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.components import resolve_components
from vlmquant.errors import InputError, SentinelError, UsageError
from vlmquant.evaluation.settings import Settings
from vlmquant.gate import exit_code, judge, recorded_gate
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import evaluate, quantize, write_report
from vlmquant.planning import make_plan
from vlmquant.recipe import load_recipe, parse_recipe, shipped
from vlmquant.report.data import read_json

RECIPES = sorted(path.stem for path in shipped("recipes").glob("*.yaml"))
SERVED = ("llava", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("calibration") / "set")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  # not a dict
    return tensors


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_gives_a_checkpoint_that_loads_and_runs(
    recipe: str, tiny_llava: Path, calibration: Path, tmp_path: Path
) -> None:
    if load_recipe(recipe).output.format == "bitsandbytes" and find_spec("bitsandbytes") is None:
        pytest.skip(NEEDS_BITSANDBYTES)
    out = quantize(tiny_llava, recipe, tmp_path / "out", calibration=calibration).path
    assert verify_checkpoint(out) == []
    assert read_manifest(out)["recipe"]["name"] == recipe
    model = load_model(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**image_inputs("llava")).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("component", "place"),
    [
        ("vision_encoder: {scheme: w8a8-dynamic, method: int8}", r"vision_tower\.\S+layers\.0: "),
        ("language: {scheme: w4a16, method: awq}", r"language_model\.\S*layers\.0: "),
    ],
)
def test_samples_that_a_model_cannot_take_are_named(
    component: str, place: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever batch they are in; those beside them are not blamed."""
    encode, broken = Encoder.encode, ("pair-2", "pair-17")

    def broken_ones(self: Encoder, sample: Sample, answer: str | None = None) -> Encoded:
        item = encode(self, sample, answer)
        if sample.id in broken:
            item.inputs["pixel_values"].view(-1)[40] = torch.inf
        return item

    monkeypatch.setattr(Encoder, "encode", broken_ones)
    calibration = write_small_set(tmp_path / "set", pairs=20)
    text = f"name: x\ncalibration: {{token_weights: {{image_share: 1}}}}\ncomponents: {{{component}}}\n"
    recipe = parse_recipe(text, name="x")
    with pytest.raises(
        SentinelError, match=place + r".* received NaN or infinite inputs .*, in 2 of 2\d samples"
    ) as told:
        quantize(tiny_llava, recipe, tmp_path / "out", calibration=calibration)
    assert set(re.findall(r"pair-\d+", str(told.value))) == set(broken)


@pytest.mark.parametrize("kind", SERVED)
def test_mixed_keeps_codes_and_kept_weights_exactly(
    kind: str, tiny: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    source = tiny(kind)
    out = quantize(source, "mixed", tmp_path / "out", calibration=calibration).path
    components = resolve_components(source)
    plan = make_plan(components, load_recipe("mixed"))
    before, after = stored(source), stored(out)
    for line in plan.lines:
        if line.action == "keep":
            disk = components.parameter(line.name).disk
            assert torch.equal(before[disk], after[disk]), line.name
    assert {"projector", "lm_head"} <= {line.component for line in plan.lines if line.action == "keep"}
    model = load_model(out)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    quantized = {line.name.removesuffix(".weight") for line in plan.lines if line.action == "quantize"}
    assert set(modules) == quantized
    # Stock transformers, in a process that never saw vlmquant, is tried in tests/test_loading.py.
    sizes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0 <= sizes - plan.bytes_after < 100_000  # headers


@pytest.mark.parametrize("kind", SERVED)
def test_generation_with_an_image_follows_the_dequantized_model(
    kind: str, tiny: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    source = tiny(kind)
    out = quantize(source, "mixed", tmp_path / "out", calibration=calibration).path
    packed = load_model(out, dtype=torch.float32)
    dense = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_submodule(name).weight.data = module.dequantize().float()
            if "vision" in name or "visual" in name:
                dense.get_submodule(name).register_forward_pre_hook(round_tokens)
    encoder = Encoder(load_processor(out))
    sample = next(sample for sample in load_set(calibration).samples if sample.images)
    inputs = collate([encoder.encode(sample, None)], "left").inputs
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        torch.testing.assert_close(packed(**inputs).logits, dense(**inputs).logits, rtol=0.02, atol=0.02)
        assert torch.equal(packed.generate(**inputs, **options), dense.generate(**inputs, **options))


def round_tokens(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    scale = (args[0].abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-12)
    return ((args[0] / scale).round().clamp(-128, 127) * scale,)


def test_a_run_again_writes_the_same_bytes(tiny_llava: Path, calibration: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(tiny_llava, "mixed", tmp_path / name, calibration=calibration)
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_llava: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmquant.algorithms import ALGORITHMS, gptq

    quantize(tiny_llava, "mixed", tmp_path / "whole", calibration=calibration)
    calls = 0

    def interrupted(stage: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return gptq.quantize_stage(stage)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setitem(ALGORITHMS, "gptq", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llava, "mixed", tmp_path / "resumed", calibration=calibration)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(UsageError, match="--resume"):
        quantize(tiny_llava, "mixed", tmp_path / "resumed", calibration=calibration)
    quantize(tiny_llava, "mixed", tmp_path / "resumed", calibration=calibration, resume=True)
    assert written(tmp_path / "whole") == written(tmp_path / "resumed")


def test_evaluation_to_gate(tiny_llava: Path, calibration: Path, tmp_path: Path) -> None:
    data = write_small_set(tmp_path / "test", pairs=8, offset=100)
    out = quantize(tiny_llava, "mixed", tmp_path / "out", calibration=calibration).path
    settings = Settings(dtype="float32", caption_tokens=4, answer_tokens=4, speed_tokens=4, speed_prompts=1)
    report = evaluate(tiny_llava, [out], data, settings=settings, command=("vlmquant", "eval"))
    written = write_report(
        report, data=data, out=tmp_path / "r.json", html=tmp_path / "r.html", markdown=tmp_path / "r.md"
    )
    assert [path.name for path in written] == ["r.json", "r.md", "r.html"]
    again = read_json(tmp_path / "r.json")
    assert again.summaries == report.summaries
    overall = report.summaries[1]["all"]
    assert 0 < overall["kl"].point < 0.5
    assert report.summaries[0]["all"]["perplexity"].point > 1
    recorded = recorded_gate(report)
    assert recorded.specs == (load_recipe("mixed").gate,)
    assert exit_code(judge(report, recorded.specs)) == 4  # ten samples cannot decide
    with pytest.raises(InputError, match=r"are in the calibration set of .*; evaluate on others"):
        evaluate(tiny_llava, [out], calibration, settings=settings)


def test_the_package_s_own_names(tiny_llava: Path) -> None:
    assert vlmquant.quantize is quantize
    assert vlmquant.evaluate is evaluate
    assert vlmquant.load is load_model
    assert vlmquant.load_recipe is load_recipe


def test_transformers_keeps_our_checkpoints_packed(tiny_llava: Path, calibration: Path, tmp_path: Path) -> None:
    out = quantize(tiny_llava, "mixed", tmp_path / "out", calibration=calibration).path
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_an_output_moves_with_its_manifest(tiny_llava: Path, calibration: Path, tmp_path: Path) -> None:
    out = quantize(tiny_llava, "rtn-w4", tmp_path / "out").path
    moved = shutil.move(out, tmp_path / "elsewhere")
    assert verify_checkpoint(Path(moved)) == []
    assert json.loads((tmp_path / "elsewhere" / "config.json").read_text())["quantization_config"]
