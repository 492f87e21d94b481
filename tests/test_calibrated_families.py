"""Families beyond the first twelve, calibrated on images through their own processors: logits, experts, answers."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers.utils import is_torchvision_available

from tests import zoo
from tests.small_set import write_small_set
from tests.zoo_processors import KINDS, ROWS, add_processor, make_tokenizer
from vlmquant import cli
from vlmquant.calibration.encode import Encoded, Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.components import resolve_components
from vlmquant.errors import EXIT_STARVED_EXPERTS, InputError, SentinelError, StarvedExpertsError
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.planning import make_plan
from vlmquant.recipe import load_recipe, parse_recipe

MIXTURES = (
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "gemma4@moe",
    "glm4v_moe",
    "internvl@qwen3_moe",
    "ernie4_5_vl_moe",
    "qwen3_omni_moe_thinker",
)
QUICK = (
    "qwen3_5",
    "qwen3_vl_moe",
    "gemma4",
    "glm46v",
    "llava_onevision",
    "internvl@qwen3_moe",
    "minicpmv4_6",
    "ernie4_5_vl_moe",
)
QUICK_AWQ = ("qwen3_5", "internvl@qwen3_moe")
"""What the default run has; all others are marked slow."""
ROUTERS = re.compile(r"\.(gate|router\.proj)\.weight$")
TOLERANCE = 2e-5
"""Relative error of logits and of a layer's outputs in float32: the same products in another order."""
INT8_TOLERANCE = 0.2
"""The same through a whole tower whose inputs are rounded to int8: where one that lies halfway between two codes falls
the other way, others after it do too, up to a router's choice."""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("calibration") / "set", pairs=18, texts=6)


@pytest.fixture(scope="module")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_zoo(kind, starved=None) -> the directory of that model and its processor. Not to be written to."""
    made: dict[tuple[str, int | None], Path] = {}

    def make(kind: str, starved: int | None = None) -> Path:
        if (kind, starved) not in made:
            model_dir = tmp_path_factory.mktemp("zoo") / kind
            model = zoo.make_model(kind, dtype=torch.bfloat16)
            balance(model, starved)
            model.save_pretrained(model_dir)
            made[kind, starved] = add_processor(kind, model_dir)
        return made[kind, starved]

    return make


def balance(model: nn.Module, starved: int | None) -> None:
    """Give routers pairs of opposite rows, so that every token prefers one of each pair and all experts are chosen.

    starved: an expert whose row is zero: as there are at least two pairs, of eight experts two are chosen before it.
    """
    for name, parameter in model.named_parameters():
        if ROUTERS.search(name):
            half = parameter.shape[0] // 2
            parameter.data[half:] = -parameter.data[:half]
            if starved is not None:
                parameter.data[starved] = 0


def encoded(model_dir: Path, calibration: Path) -> tuple[Encoded, Encoded]:
    """A calibration sample with an image and one without, as the pipeline encodes them."""
    encoder, samples = Encoder(load_processor(model_dir)), load_set(calibration).samples
    shown, told = (encoder.encode(sample, sample.answers[0]) for sample in (samples[0], samples[-1]))
    assert 0 < encoder.image_tokens(shown.inputs) < shown.tokens < 110
    assert encoder.image_tokens(told.inputs) == 0
    return shown, told


def dequantized(kind: str, source: Path, packed: nn.Module, recipe: str) -> tuple[nn.Module, list[str]]:
    """The original, as transformers builds it, with the packed model's weights, and the names of its int8 layers.

    Those round their inputs.
    """
    components = resolve_components(source)
    plan = make_plan(components, load_recipe(recipe))
    dense, rounding = zoo.load(kind, source)[0].float().eval(), []
    for parameter in components.parameters:
        if not parameter.loaded:
            continue
        home, _, leaf = parameter.name.rpartition(".")
        line, module = plan.line(parameter.name), packed.get_submodule(home)
        if line.action == "quantize":
            assert isinstance(module, QuantLinear), parameter.name
            value = module.dequantize(torch.float32)
        else:
            value = getattr(module, leaf).float()
            if recipe == "mixed":  # AWQ may fold its scales into norms
                assert torch.equal(value, components.read(parameter.name).float()), parameter.name
        place_in(dense, parameter.name, components.experts).copy_(value)
        if line.action == "quantize" and line.scheme.activations == "dynamic-int8":
            dense.get_submodule(home).register_forward_pre_hook(round_tokens)
            rounding.append(home)
    return dense, rounding


def place_in(model: nn.Module, name: str, experts: Any) -> torch.Tensor:
    """The tensor of that name, or the part of a stack of experts that stands for it."""
    for module, form in experts.items():
        if name.startswith(f"{module}."):
            expert, projection, leaf = name.removeprefix(f"{module}.").split(".")
            part = form.weight if leaf == "weight" else form.bias
            source = form.source(projection) + ("_bias" if leaf == "bias" else "")
            return part(model.get_submodule(module).get_parameter(source).data, int(expert), projection)
    home, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(home), leaf).data


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def round_tokens(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    scale = (args[0].abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-12)
    return ((args[0] / scale).round().clamp(-128, 127) * scale, *args[1:])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_a_batch_gives_what_its_samples_give_alone(kind: str, tiny_zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Images of different sizes, one and two to a sample; padding on either side."""
    source, paths = tiny_zoo(kind), []
    for size in ((40, 40), (120, 40), (50, 130), (150, 150)):
        paths.append(tmp_path / f"{len(paths)}.png")
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB").save(paths[-1])
    ones = [Sample(path.stem, "vqa", "what? " * (n + 1), ("a dog",), (path,)) for n, path in enumerate(paths)]
    twos = [Sample("01", "vqa", "what?", ("a",), (*paths[:2],)), Sample("23", "vqa", "is it?", ("a",), (*paths[2:],))]
    encoder, model = Encoder(load_processor(source)), zoo.load(kind, source)[0].float().eval()
    for samples in (ones, twos):
        items = [encoder.encode(sample, sample.answers[0]) for sample in samples]
        alone = [zoo.forward(kind, model, item.inputs)[0] for item in items]
        right, left = (zoo.forward(kind, model, collate(items, side).inputs) for side in ("right", "left"))
        for row, (item, wanted) in enumerate(zip(items, alone, strict=True)):
            assert error(right[row, : item.tokens], wanted) < TOLERANCE
            assert error(left[row, -item.tokens :], wanted) < TOLERANCE


CASES = [
    pytest.param(kind, recipe, marks=() if kind in quick else pytest.mark.slow)
    for recipe, quick in (("mixed", QUICK), ("mixed-awq", QUICK_AWQ))
    for kind in KINDS
]


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_a_family_is_calibrated_through_its_own_processor(
    kind: str, recipe: str, tiny_zoo: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    source = tiny_zoo(kind)
    done = quantize(source, recipe, tmp_path / "out", calibration=calibration, dtype=torch.float32)
    assert verify_checkpoint(done.path) == []
    manifest = read_manifest(done.path)
    assert manifest["calibration"]["samples"] == 24
    assert manifest["calibration"]["prompt_style"] == "chat template"
    assert manifest["calibration"]["image_tokens"] > 18
    packed = load_model(done.path, dtype=torch.float32)
    dense, rounding = dequantized(kind, source, packed, recipe)
    shown, told = (sample.inputs for sample in encoded(done.path, calibration))
    assert error(zoo.forward(kind, packed, told), zoo.forward(kind, dense, told)) < TOLERANCE
    wanted = zoo.forward(kind, dense, shown)
    assert error(zoo.forward(kind, packed, shown), wanted) < INT8_TOLERANCE
    for name in rounding:  # each with the same inputs, and then the rest of the model without them
        layer, module = dense.get_submodule(name), packed.get_submodule(name)
        inputs = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert error(module(inputs), layer(inputs)) < TOLERANCE, name
        packed.set_submodule(name, layer)
    assert rounding
    assert error(zoo.forward(kind, packed, shown), wanted) < TOLERANCE
    routed = manifest.get("experts", {})
    assert bool(routed) == (kind in MIXTURES)
    tokens = manifest["calibration"]["tokens"]
    for counts in routed.values():
        assert len(counts) == 8
        assert min(counts) >= 8
        if kind != "ernie4_5_vl_moe":  # it has experts for text and others for images
            assert sum(counts) == 2 * tokens  # each token goes to two, padding to none


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", pytest.param("internvl@qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["mixed", pytest.param("mixed-awq", marks=pytest.mark.slow)])
def test_an_expert_that_is_never_chosen_ends_the_run_unless_the_recipe_lets_it(
    kind: str, recipe: str, tiny_zoo: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    source, starved = tiny_zoo(kind, starved=7), 7
    with pytest.raises(
        StarvedExpertsError, match=r"1 of 8 experts saw fewer than 4 calibration tokens \(expert 7\)"
    ) as e:
        quantize(source, recipe, tmp_path / "out", calibration=calibration, dtype=torch.float32)
    assert e.value.exit_code == EXIT_STARVED_EXPERTS == 7
    assert not (tmp_path / "out").exists()
    method = "gptq" if recipe == "mixed" else "awq"
    lenient = f"version: 1\nname: lenient\ncomponents: {{language: {{scheme: w4a16, method: {method}}}}}\n"
    lenient += "calibration: {experts: {max_starving: 1.0}}\n"
    done = quantize(
        source,
        parse_recipe(lenient, name="lenient"),
        tmp_path / "lenient",
        calibration=calibration,
        dtype=torch.float32,
    )
    routed = read_manifest(done.path)["experts"]
    assert all(counts[starved] == 0 for counts in routed.values())
    for module in routed:
        assert f"{module}: no calibration token was routed to expert 7: rounded to nearest" in done.notes
    assert any("(12.5%) below 4" in note for note in done.notes)
    logits = zoo.forward(kind, load_model(done.path, dtype=torch.float32), encoded(done.path, calibration)[0].inputs)
    assert logits.isfinite().all()


def test_qwen3_5_moe_from_the_command_line_to_an_answer(
    tiny_zoo: Callable[..., Path],
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["vlmquant", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert not end.value.code, err
        return out

    kind, out_dir = "qwen3_5_moe", tmp_path / "out"
    source = tiny_zoo(kind)
    parts = json.loads(run("inspect", source, "--json"))
    assert sum(part["bytes"] for part in parts["components"].values()) == parts["bytes"]
    plan = json.loads(run("plan", source, "--recipe", "mixed", "--json"))
    lines = {line["name"]: line for line in plan["lines"]}
    experts = [name for name in lines if re.search(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$", name)]
    assert len(experts) == zoo.LAYERS * 8 * 3
    assert {lines[name]["action"] for name in experts} == {"quantize"}
    done = json.loads(run("quantize", source, "-r", "mixed", "--calibration", calibration, "-o", out_dir, "--json"))
    assert done["bytes_after"] == plan["bytes_after"] < plan["bytes_before"]
    assert any(note.startswith("experts: 24 in 3 layers") for note in done["notes"])
    run("verify", out_dir)
    packed = load_model(out_dir, dtype=torch.float32)
    dense, _ = dequantized(kind, source, packed, "mixed")
    encoder = Encoder(load_processor(out_dir))
    inputs = collate([encoder.encode(load_set(calibration).samples[0], None)], "left").inputs
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": zoo.PAD}
    with torch.no_grad():
        answers = [model.generate(**inputs, **options) for model in (packed, dense)]
    assert answers[0].shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(*answers)


def test_an_answer_stands_behind_the_end_of_thinking(tiny_zoo: Callable[..., Path]) -> None:
    """Templates that would open a chain of thought at the end of the prompt are told not to."""
    sample = Sample("x", "text", "what is in the picture?", ("a dog",))
    for kind, end in (("qwen3_5", "<think>\n\n</think>\n\n"), ("glm46v", "<|assistant|>\n<think></think>\n")):
        encoder = Encoder(load_processor(tiny_zoo(kind)))
        assert encoder.prompt(sample).endswith(end)
        item = encoder.encode(sample, "a dog")
        answer = encoder.tokenizer.decode(item.inputs["input_ids"][0][item.answer_mask])
        assert answer == f"a dog{ROWS[kind].style.eos}"
        processor = encoder.processor
        processor.chat_template = processor.chat_template.replace("enable_thinking", "thinking")  # as Kimi K2.5 has it
        assert Encoder(processor).prompt(sample).endswith(end)


def test_image_tokens_that_take_the_place_of_the_prompt_s_are_counted(
    tiny_zoo: Callable[..., Path], calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, sample = Encoder(load_processor(tiny_zoo("ovis2"))), load_set(calibration).samples[0]
    assert encoder.image_tokens(encoder.encode(sample, None).inputs) == 16
    assert encoder.image_id == zoo.IMAGE
    encoder = Encoder(load_processor(tiny_zoo("ovis2")))
    monkeypatch.setattr(type(encoder.processor), "replace_image_token", lambda *a, **k: "")
    with pytest.raises(SentinelError, match="sample pair-0: no image tokens in the prompt after processing"):
        encoder.encode(sample, None)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision, transformers has these image processors")
@pytest.mark.parametrize("processor", ["Lfm2Vl", "Cohere2Vision", "Llama4", "Kimi_K25", "Molmo2", "Phi4Multimodal"])
def test_an_image_processor_that_needs_torchvision_says_so(processor: str, tmp_path: Path) -> None:
    make_tokenizer(ROWS["qwen3_5"]).save_pretrained(tmp_path)
    settings = {"image_processor_type": f"{processor}ImageProcessor", "processor_class": f"{processor}Processor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot be loaded: .*torchvision"):
        load_processor(tmp_path)
