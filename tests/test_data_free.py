"""Recipes that need no calibration: without a class, by the names of tensors; with one, without building a model."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from tests import tiny_vlm
from tests.written import lasting
from vlmquant import pipeline
from vlmquant.algorithms import ALGORITHMS
from vlmquant.checkpoint import CheckpointWriter, verify_checkpoint
from vlmquant.cli import app
from vlmquant.components import ComponentMap, resolve_components, resolve_from_headers
from vlmquant.conversion import Lazy, Stored
from vlmquant.errors import (
    EXIT_ERROR,
    EXIT_OK,
    CheckpointError,
    InputError,
    PlanError,
    SentinelError,
    UnknownClassError,
)
from vlmquant.headers import StackedExperts, forms_in, model_of
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import plan_model, quantize
from vlmquant.planning import CALIBRATED, make_plan, needs_class
from vlmquant.recipe import Recipe, parse_recipe
from vlmquant.serving import cache_layers
from vlmquant.stream import BlockStream

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
SCHEMES = ("fp8-dynamic", "nvfp4a16", "fp8-block")


def recipe(scheme: str, more: str = "") -> Recipe:
    parts = "".join(f"  {part}: {scheme}\n" for part in ("vision_encoder", "projector", "language"))
    return parse_recipe(f"name: data-free\ncomponents:\n{parts}{more}", name="data-free")


def unknown(model_dir: Path, kind: str = "unheard_of") -> Path:
    """The same model under a type that transformers does not know."""
    copy = model_dir.with_name(f"{model_dir.name}-{kind}")
    shutil.copytree(model_dir, copy)
    return retyped(copy, kind)


def retyped(model_dir: Path, kind: str) -> Path:
    file = model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind}))
    return model_dir


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if "safetensors" in file.name}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each kind with a class and without."""
    root = tmp_path_factory.mktemp("models")
    built = {kind: tiny_vlm.build(kind, root / kind, shards=2) for kind in FAMILIES}
    return {kind: (model_dir, unknown(model_dir)) for kind, model_dir in built.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_without_a_class_plan_and_weights_are_the_same(
    kind: str, scheme: str, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    with_class, without = models[kind]
    components, plan = plan_model(with_class, recipe(scheme))
    disk = {one.name: one.disk for one in components.parameters}
    first = quantize(with_class, recipe(scheme), tmp_path / "known")
    second = quantize(without, recipe(scheme), tmp_path / "unknown")

    def told(name: str, line: Any) -> tuple[Any, ...]:
        return name, line.component, line.action, line.scheme, line.method, line.shape, line.bytes_after

    assert {told(disk[line.name], line) for line in plan.lines} == {told(line.name, line) for line in second.plan.lines}
    assert weights(first.path) == weights(second.path)
    assert first.errors == {name: pytest.approx(second.errors[disk[name]]) for name in first.errors}
    assert "told by the names of its tensors: vision_encoder: " in second.plan.notes[0]
    assert list(verify_checkpoint(second.path)) == []


def test_given_its_class_back_the_result_loads_as_the_known_one(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Names on disk in targets and ignore are found by a loader with names of its own."""
    with_class, without = models["llava"]
    known = load_model(quantize(with_class, recipe("nvfp4a16"), tmp_path / "known").path)
    loaded = load_model(retyped(quantize(without, recipe("nvfp4a16"), tmp_path / "unknown").path, "llava"))
    packed = [name for name, module in known.named_modules() if isinstance(module, QuantLinear)]
    assert packed
    assert packed == [name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)]
    inputs = tiny_vlm.image_inputs("llava", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(known(**inputs).logits, loaded(**inputs).logits)


def test_a_killed_run_is_resumed_where_it_stopped(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, without = models["qwen3_vl"]
    whole = quantize(without, recipe("nvfp4a16"), tmp_path / "whole")
    add, units = CheckpointWriter.add, list[str | None]()

    def dying(self: CheckpointWriter, block: str | None, *args: Any) -> None:
        if len(units) == 3:
            raise KeyboardInterrupt
        units.append(block)
        add(self, block, *args)

    monkeypatch.setattr(CheckpointWriter, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize(without, recipe("nvfp4a16"), tmp_path / "out")
    assert units == [None, "model.visual.blocks.0", "model.visual.blocks.1"]
    assert not (tmp_path / "out").exists()
    units.clear()
    monkeypatch.setattr(CheckpointWriter, "add", lambda self, *args: (units.append(args[0]), add(self, *args))[1])
    resumed = quantize(without, recipe("nvfp4a16"), tmp_path / "out", resume=True)
    assert units == [f"model.language_model.layers.{layer}" for layer in range(3)]
    assert weights(resumed.path) == weights(whole.path)
    assert lasting(resumed.path) == lasting(whole.path)


def test_tensors_of_odd_kinds_travel_unchanged(tmp_path: Path) -> None:
    model_dir = retyped(tiny_vlm.build("llava", tmp_path / "model", tie=True), "unheard_of")
    tensors = load_file(model_dir / "model.safetensors")
    norm = "language_model.model.layers.0.input_layernorm.weight"
    odd = {
        norm: tensors[norm].float() + 1e-5,
        "logit_scale": torch.tensor(2.5),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
        "language_model.model.layers.1.steps": torch.tensor(7, dtype=torch.int32),
        "language_model.model.mask": torch.tensor([True, False]),
        "vision_tower.vision_model.gain": torch.randn(3, dtype=torch.float64),
    }
    save_file(tensors | odd, model_dir / "model.safetensors")
    done = quantize(model_dir, recipe("fp8-dynamic"), tmp_path / "out")
    written = load_file(done.path / "model.safetensors")
    for name, value in (tensors | odd).items():
        if done.plan.line(name).action == "keep":
            assert written[name].dtype == value.dtype, name
            assert torch.equal(written[name], value), name
    assert odd.keys() <= {line.name for line in done.plan.lines if line.action == "keep"}
    assert not [name for name in written if "lm_head" in name]
    assert list(verify_checkpoint(done.path)) == []
    with pytest.raises(PlanError, match="one tied tensor"):
        plan_model(model_dir, recipe("fp8-dynamic", "  embedding: w8\n"))


def test_what_has_no_layers_of_language_is_refused_with_what_is_there(tmp_path: Path) -> None:
    model_dir = retyped(tiny_vlm.build("llava", tmp_path / "model"), "unheard_of")
    tensors = load_file(model_dir / "model.safetensors")

    def refusal(kept: Callable[[str], bool]) -> str:
        save_file({name: one for name, one in tensors.items() if kept(name)}, model_dir / "model.safetensors")
        with pytest.raises(InputError) as error:
            plan_model(model_dir, recipe("fp8-dynamic"))
        return str(error.value)

    assert "found no layers of a language model beside language_model.model.embed_tokens" in (
        told := refusal(lambda name: ".layers." not in name or "vision" in name)
    )
    assert "which lie below language_model.lm_head, language_model.model, multi_modal_projector" in told
    assert "found no input embedding (embed_tokens, " in refusal(lambda name: "embed_tokens" not in name)
    assert "found no vision encoder" in refusal(lambda name: "vision" not in name)


def test_a_row_in_the_recipe_says_where_parts_are(models: dict[str, tuple[Path, Path]]) -> None:
    row = "family:\n  vision_encoder: [vision_tower]\n  language: language_model.model\n"
    wanted = parse_recipe(f"name: row\n{row}components:\n  language: fp8-dynamic\n", name="row")
    components, plan = plan_model(models["llava"][1], wanted)
    assert components.family.source == "recipe"
    assert plan.line("multi_modal_projector.linear_1.weight").component == "other"
    assert plan.line("language_model.model.layers.1.mlp.up_proj.weight").action == "quantize"


def test_with_calibration_an_unknown_class_is_refused(models: dict[str, tuple[Path, Path]]) -> None:
    parts = "vision_encoder: {scheme: w4a16, method: rtn}, language: {scheme: w4a16, method: gptq}"
    wanted = parse_recipe(f"name: t\ncomponents: {{{parts}}}", name="t")
    with pytest.raises(UnknownClassError) as error:
        plan_model(models["llava"][1], wanted)
    assert "config.json: model type unheard_of is unknown to this transformers; without its class go recipes" in str(
        error.value
    )
    assert str(error.value).endswith("this one has components.language (method gptq)")


def test_code_that_is_not_trusted_is_not_needed(tmp_path: Path, models: dict[str, tuple[Path, Path]]) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(models["llava"][0], model_dir)
    content = json.loads((model_dir / "config.json").read_text())
    content |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (model_dir / "config.json").write_text(json.dumps(content))
    (model_dir / "code.py").write_text("raise SystemExit('this code must not run')\n")
    done = quantize(model_dir, recipe("fp8-dynamic"), tmp_path / "out")
    assert done.plan.notes[0].startswith("auto_map asks to run code")
    assert (done.path / "code.py").exists()
    assert "transformers had no class for this model" in (done.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("components: {language: {scheme: w4a16, method: rtn, rtn: {scale_search: mse}}}", []),
        ("components: {language: {scheme: fp16, method: gptq}, lm_head: fp8-dynamic}", []),
        ("components: {language: {scheme: w4a16, method: gptq}}", ["components.language (method gptq)"]),
        ("components: {language: nvfp4}", ["components.language (scheme nvfp4)"]),
        (
            "components: {language: {scheme: w4a16, overrides: [{layers: '0:1', method: awq}]}}",
            ["components.language (method awq)"],
        ),
        ("components: {language: fp8-dynamic}\nkv_cache: fp8", ["kv_cache"]),
    ],
)
def test_what_of_a_recipe_needs_a_class(text: str, needed: list[str]) -> None:
    assert needs_class(parse_recipe(f"name: t\n{text}", name="t")) == needed


def test_methods_that_look_at_inputs_are_those_that_ask_for_them(models: dict[str, tuple[Path, Path]]) -> None:
    """The table of algorithms, tried on a stage without inputs."""
    components = resolve_components(models["llava"][0])
    wanted = recipe("w4a16")
    stream = BlockStream(
        components,
        make_plan(components, wanted),
        dict(wanted.specs()),
        [],
        outside={},
        restore=lambda info: None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    stage = next(next(iter(stream)).stages())
    asking = set()
    for name, algorithm in ALGORITHMS.items():
        try:
            assert algorithm(stage).keys() == stage.linears.keys()
        except SentinelError:  # of which there are none
            asking.add(name)
    assert asking == CALIBRATED


def test_a_known_model_is_not_built_to_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tiny_vlm.build("llava", tmp_path / "model")
    for file in model_dir.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is to be run")

    for owner, name in ((pipeline, "load_processor"), (pipeline, "load_set"), (ComponentMap, "skeleton")):
        monkeypatch.setattr(owner, name, forbidden)
    done = quantize(model_dir, recipe("nvfp4a16"), tmp_path / "out")
    assert done.calibration is None
    assert done.errors


def test_the_commands_on_a_model_without_a_class(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: t\ncomponents: {language: fp8-dynamic, vision_encoder: fp8-dynamic}\n")
    model_dir, out, run = models["qwen2_5_vl"][1], tmp_path / "out", CliRunner().invoke
    planned = run(app, ["plan", str(model_dir), "--recipe", str(file), "--json"])
    assert planned.exit_code == EXIT_OK, planned.output
    assert json.loads(planned.stdout)["components"]["language"]["quantized_bits_per_weight"] < 8.1
    assert run(app, ["quantize", str(model_dir), "--recipe", str(file), "--out", str(out)]).exit_code == EXIT_OK
    assert run(app, ["verify", str(out)]).exit_code == EXIT_OK
    checked = run(app, ["check", str(out), "--engine", "vllm", "--gpu", "sm_90", "--json"])
    assert json.loads(checked.stdout)["served"]
    with pytest.raises(InputError, match="model type unheard_of is unknown to this transformers"):
        load_model(out)
    assert run(app, ["inspect", str(model_dir)]).exit_code == EXIT_OK
    (next(iter(out.glob("*.safetensors")))).write_bytes(b"")
    assert run(app, ["verify", str(out)]).exit_code == EXIT_ERROR


# --- trees made of names ---


def tree(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return model_of({name: Lazy.of(Stored(name), shape, dtype) for name, shape in shapes.items()})


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_linears_are_matrices_that_multiply() -> None:
    block = "model.layers.0"
    model = tree(
        {
            "model.embed_tokens.weight": (64, 32),
            f"{block}.attn.in_proj_weight": (96, 32),
            f"{block}.attn.out_proj.weight": (32, 32),
            f"{block}.attn.rel_pos_table.weight": (9, 4),
            f"{block}.mixer.conv1d.weight": (32, 1, 4),
            f"{block}.mlp.fc1.weight": (64, 32),
            f"{block}.mlp.fc1.bias": (64,),
            f"{block}.mlp.fc2.weight": (32, 64),
            f"{block}.mlp.fc2.bias": (31,),
            f"{block}.mlp.fc3.weight": (32, 64),
            f"{block}.mlp.fc3.lora_a": (4, 64),
            f"{block}.mlp.position_proj.weight": (32, 64),
            f"{block}.norm.weight": (32,),
        }
    )
    assert linears(model) == [f"{block}.mlp.fc1", f"{block}.mlp.position_proj"]
    assert isinstance(model.get_submodule("model.embed_tokens"), nn.Embedding)
    assert isinstance(model.get_submodule("model.layers"), nn.ModuleList)


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    model = tree({f"layers.{layer}.mlp.up_proj.weight": (16, 16) for layer in (10, 2, 0, 1)})
    assert [name for name, _ in model.get_submodule("layers").named_children()] == ["0", "1", "2", "10"]


def test_routers_are_no_linears_and_alike_experts_have_a_form() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.gate.weight": (4, 32), "b.gate.weight": (4, 32), "b.other.weight": (5, 32)}
    for expert in range(4):
        shapes |= {f"a.experts.{expert}.{leaf}.weight": (48, 32) for leaf in ("gate_proj", "up_proj")}
        shapes[f"a.experts.{expert}.down_proj.weight"] = (32, 48)
    shapes |= {"b.experts.gate_up_proj": (4, 32, 96), "b.experts.down_proj": (4, 48, 32)}
    model = tree(shapes)
    assert [name for name in linears(model) if "experts" not in name] == ["b.other"]
    assert isinstance(model.get_submodule("b.experts"), StackedExperts)
    form = forms_in(model)["a.experts"]
    assert (form.experts, form.hidden, form.intermediate, form.gated, form.biased) == (4, 32, 48, True, False)
    shapes["a.experts.3.down_proj.weight"] = (32, 47)
    assert forms_in(tree(shapes)) == {}


def test_stacks_of_experts_are_kept_and_told(tmp_path: Path) -> None:
    model_dir = retyped(tiny_vlm.build("llava", tmp_path / "model"), "unheard_of")
    tensors = load_file(model_dir / "model.safetensors")
    stack = "language_model.model.layers.1.mlp.experts.down_proj"
    save_file(tensors | {stack: torch.randn(4, 32, 64).bfloat16()}, model_dir / "model.safetensors")
    _, plan = plan_model(model_dir, recipe("fp8-dynamic"))
    assert plan.line(stack).action == "keep"
    assert [told for told in plan.fallbacks if told.startswith(f"{stack}: stacks 4 matrices")]


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("model.a.weight", "model.a"), "a module has that name already"),
        (("model..weight",), "no name of a parameter"),
        ((".".join("a" * 40),), "no name of a parameter"),
        (("model.forward.weight",), "a module has that name already"),
    ],
)
def test_names_that_no_modules_have_are_refused(names: tuple[str, ...], what: str) -> None:
    with pytest.raises(InputError, match=what):
        tree(dict.fromkeys(names, (16, 16)))


def test_codes_of_another_program_are_refused(tmp_path: Path) -> None:
    model_dir = retyped(tiny_vlm.build("llava", tmp_path / "model"), "unheard_of")
    tensors: dict[str, Tensor] = load_file(model_dir / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj"
    codes = torch.zeros(tensors.pop(f"{name}.weight").shape, dtype=torch.int32)
    save_file(tensors | {f"{name}.qweight": codes}, model_dir / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj.qweight is torch.int32, so this model is already quantized"):
        resolve_from_headers(model_dir, unknown="its class is not asked")


def test_a_model_without_a_class_cannot_be_built(models: dict[str, tuple[Path, Path]]) -> None:
    components = resolve_from_headers(models["llava"][1], unknown="nobody knows it")
    with pytest.raises(UnknownClassError, match="nobody knows it, so it cannot be built"):
        components.skeleton()
    with pytest.raises(UnknownClassError, match="nobody knows it, so it cannot be built"):
        cache_layers(components)
    assert not issubclass(UnknownClassError, CheckpointError)


def test_inspect_shows_what_names_tell(models: dict[str, tuple[Path, Path]]) -> None:
    known, unknown = models["qwen3_vl"]
    told = [CliRunner().invoke(app, ["inspect", str(model), "--json"]) for model in (known, unknown)]
    assert [one.exit_code for one in told] == [EXIT_OK, EXIT_OK]
    parts = [json.loads(one.stdout)["components"] for one in told]
    for name in ("vision_encoder", "language", "lm_head"):
        assert parts[1][name]["bytes"] == parts[0][name]["bytes"]
    shown = CliRunner().invoke(app, ["inspect", str(unknown)]).stdout
    assert "by the tensors' names" in " ".join(shown.split())
