"""Linears that stay at 16 bits by their score: a planted one, in plan, files and model, resumed and among ranks."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests import tiny_vlm
from tests.small_set import write_small_set
from tests.test_ranks import Forked
from tests.tiny_vlm import image_inputs
from tests.written import written
from vlmquant import pipeline, stream
from vlmquant.algorithms import ALGORITHMS
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.errors import SentinelError
from vlmquant.exempt import Score, chosen
from vlmquant.grid import QuantizedWeight
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.planning import make_plan
from vlmquant.ranks import join
from vlmquant.recipe import Recipe, parse_recipe

LAYERS = 4
PLANTED = "layers.2.mlp.fc2"
FC2 = f"model.vision_tower.encoder.{PLANTED}"
OUTLIER = 2000.0


def recipe(exempt_above: str) -> Recipe:
    return parse_recipe(
        "name: test\ncomponents:\n  vision_encoder:\n    scheme: w8a8-dynamic\n    method: int8\n"
        f"    search: {{fold: true, correct_bias: true, exempt_above: {exempt_above}}}\n"
        "  language: {scheme: w4a16, method: rtn}\n",
        name="test",
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one channel before one linear is so large that int8 has nothing left for the others."""
    config = tiny_vlm.CONFIGS["llava"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(config, "vision_config", config["vision_config"] | {"num_hidden_layers": LAYERS})
        model_dir = tiny_vlm.build("llava", tmp_path_factory.mktemp("planted") / "model")
    tensors = load_file(model_dir / "model.safetensors")
    (bias,) = (name for name in tensors if name.endswith(PLANTED.replace("fc2", "fc1.bias")))
    tensors[bias][5] = OUTLIER
    weight = bias.replace("fc1.bias", "fc2.weight")
    tensors[weight][:, 5] /= OUTLIER  # what the block puts out stays as it was
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    return model_dir


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("calibration") / "set", pairs=14)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BATCH_SIZE", 4)


@pytest.fixture(scope="module")
def made(planted: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes. Not to be written to."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "BATCH_SIZE", 4)
        return pipeline.quantize(
            planted, recipe("5"), tmp_path_factory.mktemp("made") / "out", calibration=calibration
        ).path


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        given = image_inputs("llava")["pixel_values"].float()
        return torch.cat(list(model.get_image_features(given).pooler_output)).float()


def test_by_how_much_its_score_is_above_the_median_of_its_kind() -> None:
    losses = {"qkv": (1.0, 1.0, 1.2, 5.9), "fc2": (8.0, 9.0, 50.0, 10.0)}
    scores = [
        Score((f"{layer}.{kind}",), (kind,), "vision_encoder", lost)
        for kind, found in losses.items()
        for layer, lost in enumerate(found)
    ]
    assert set(chosen(scores, {"vision_encoder": 5})) == {"2.fc2", "3.qkv"}
    (told,) = chosen(scores, {"vision_encoder": 5.3}).values()
    assert told == "rounding takes 5.9 of its output's square, 5.4 times the median of qkv"


def test_a_linear_that_loses_far_more_than_its_like_is_told_of(
    planted: Path, calibration: Path, tmp_path: Path
) -> None:
    """Weights before a large channel are so small that their codes are 0; in the other layers nothing is amiss."""
    source = shutil.copytree(planted, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(PLANTED.replace("fc2", "fc1.bias")):
            tensor[6:12] = OUTLIER
        if name.endswith(f"{PLANTED}.weight"):
            tensor[:, 6:12] /= OUTLIER
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    text = "name: test\ncomponents: {vision_encoder: {scheme: w4a16, method: search}}\n"
    done = pipeline.quantize(source, parse_recipe(text, name="test"), tmp_path / "out", calibration=calibration)
    (note,) = [note for note in done.notes if note.startswith("errors: ")]
    alike = sorted(error for name, error in done.errors.items() if name.endswith("mlp.fc2.weight"))
    assert len(alike) == LAYERS
    times = alike[-1] / ((alike[1] + alike[2]) / 2)
    assert f" more from {FC2} ({alike[-1]:.2g}, {times:.0f} times the median of its like); where" in note


def test_what_is_far_more_is_so_among_linears_of_one_scheme_and_place() -> None:
    label = {0: "w4a16", 1: "w4a16", 2: "w4a16", 3: "w4a16", 4: "w4a16", 5: "w8a16"}
    found = {
        "layers.{}.mlp.up.weight": (0.01, 0.012, 0.051, 0.009, 0.0101, 0.3),  # the sixth is alone of its scheme
        "layers.{}.mlp.down.weight": (0.01, 0.012, 0.049, 0.009, 0.0101, 0.01),
        "layers.{}.attn.weight": (0.00001, 0.00001, 0.0009, 0.00001, 0.00001, 0.01),  # a thousandth is nothing
        "layers.{}.mlp.experts.3.gate.weight": (0.0, 0.0, 0.5, 0.0, 0.0, 0.0),
    }
    errors = {name.format(layer): error for name, of in found.items() for layer, error in enumerate(of)}
    lines = [SimpleNamespace(name=name, scheme_label=label[int(name.split(".")[1])]) for name in errors]
    (note,) = pipeline._errors_note(errors, SimpleNamespace(lines=lines))  # type: ignore[arg-type]
    assert " more from layers.2.mlp.up (0.051, 5 times the median of its like); where" in note


def test_tokens_count_in_the_scores_as_in_the_codes(
    planted: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "name: test\ncalibration: {token_weights: {image: 2.0, image_share: 0.5, prompt: 0.5}}\ncomponents:\n"
        "  language: {scheme: w8a8-dynamic, method: search, search: {exempt_above: 1000}}\n"
    )
    seen: dict[str, list[Tensor | None]] = {}
    real = ALGORITHMS["search"]

    def listening(stage: stream.Stage) -> dict[str, QuantizedWeight]:
        seen.setdefault(next(iter(stage.linears.values())).name, []).append(stage.drawn(64).weights)
        return real(stage)

    monkeypatch.setitem(ALGORITHMS, "search", listening)
    pipeline.quantize(planted, parse_recipe(text, name="test"), tmp_path / "out", calibration=calibration)
    assert len(seen) == 8  # two layers of four inputs
    for scored, coded in seen.values():
        assert scored is not None
        assert coded is not None
        assert set(scored.tolist()) == {4.0, 0.5, 1.0}
        assert torch.equal(scored, coded)


def test_plan_files_and_model_agree_on_what_stays(planted: Path, made: Path) -> None:
    assert verify_checkpoint(made) == []
    manifest = read_manifest(made)
    kept = {line["name"]: line for line in manifest["plan"]["lines"] if line["action"] == "keep"}
    line = kept[f"{FC2}.weight"]
    assert re.search(r"rounding takes .* of its output's square, .* times the median of mlp.fc2", line["reason"])
    assert line["bytes_after"] == line["bytes_before"]
    assert [note for note in manifest["notes"] if "stays at 16 bits" in note] == [
        f"{FC2}: stays at 16 bits: {line['reason']}"
    ]
    ignored = json.loads((made / "config.json").read_text())["quantization_config"]["ignore"]
    model = load_model(made, dtype=torch.float32)
    modules = {name: module for name, module in model.named_modules() if name.endswith((".fc1", ".fc2"))}
    assert {name for name, module in modules.items() if not isinstance(module, QuantLinear)} == {FC2}
    assert {name for name in modules if any(re.match(one.removeprefix("re:"), name) for one in ignored)} == {FC2}
    original = AutoModelForImageTextToText.from_pretrained(planted, dtype=torch.float32)
    assert torch.equal(modules[FC2].weight, original.get_submodule(FC2).weight)


def test_the_model_that_is_served_is_the_dequantized_one(planted: Path, made: Path) -> None:
    served = load_model(made, dtype=torch.float32).eval()
    other = AutoModelForImageTextToText.from_pretrained(planted, dtype=torch.float32).eval()
    for name, module in served.named_modules():
        if isinstance(module, QuantLinear) and "vision" in name:
            plain = other.get_submodule(name)
            plain.weight.data, plain.bias.data = module.dequantize(), module.bias.float()
            plain.register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
    tensors = dict(served.named_parameters())
    for name, parameter in other.named_parameters():
        if "vision" in name and "norm" in name:
            parameter.data = tensors[name].data
    torch.testing.assert_close(features(served), features(other), rtol=1e-3, atol=1e-3)


def rounded(inputs: Tensor) -> Tensor:
    scales = (inputs.abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-12)
    return (inputs / scales).round().clamp(-128, 127) * scales


def test_less_is_lost(planted: Path, made: Path, calibration: Path, tmp_path: Path) -> None:
    wanted = features(AutoModelForImageTextToText.from_pretrained(planted, dtype=torch.float32).eval())
    whole = pipeline.quantize(planted, recipe("null"), tmp_path / "whole", calibration=calibration).path
    lost = [(features(load_model(one, dtype=torch.float32)) - wanted).square().sum() for one in (made, whole)]
    assert lost[0] < 0.2 * lost[1]
    assert not any("stays at 16 bits" in note for note in read_manifest(whole)["notes"])


def test_a_threshold_that_nothing_reaches_changes_nothing(planted: Path, calibration: Path, tmp_path: Path) -> None:
    plain, high = (
        pipeline.quantize(planted, recipe(above), tmp_path / above, calibration=calibration).path
        for above in ("null", "1e9")
    )
    assert load_bytes(plain) == load_bytes(high)


def load_bytes(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_what_stays_is_decided_by_all_processes(planted: Path, made: Path, calibration: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with join() as joined:
            pipeline.quantize(planted, recipe("5"), tmp_path / "two", calibration=calibration, ranks=joined)

    forked = Forked(2, work, tmp_path)
    assert forked.wait() == [0, 0], forked.told(0) + forked.told(1)
    assert load_bytes(tmp_path / "two") == load_bytes(made)
    assert read_manifest(tmp_path / "two")["notes"] == read_manifest(made)["notes"]


def test_a_resumed_run_keeps_the_same(
    planted: Path, made: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, out = stream.Stage.finish, tmp_path / "out"

    def stop(self: stream.Stage, quantized: object) -> None:
        if self.block.info.component == "language":
            raise SentinelError("stop here")
        put(self, quantized)

    with monkeypatch.context() as patched:
        patched.setattr(stream.Stage, "finish", stop)
        with pytest.raises(SentinelError, match="stop here"):
            pipeline.quantize(planted, recipe("5"), out, calibration=calibration)
    pipeline.quantize(planted, recipe("5"), out, calibration=calibration, resume=True)
    assert written(out) == written(made)


def test_fused_linears_stay_together(planted: Path) -> None:
    """A name alone of those that one kernel runs cannot be kept: the plan says so."""
    components = pipeline.find_components(planted)
    first = next(info for info in components.blocks if info.component == "vision_encoder").linears
    names = {linear.name: "why" for linear in first if linear.local.endswith(("q_proj", "k_proj", "v_proj"))}
    plan = make_plan(components, recipe("5"), names)
    assert {line.name.removesuffix(".weight") for line in plan.lines if line.reason == "why"} == set(names)
    with pytest.raises(pipeline.PlanError, match="run as one kernel"):
        make_plan(components, recipe("5"), dict(list(names.items())[:1]))
