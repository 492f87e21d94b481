"""Loading: packed weights compute what their codes say, transformers alone loads them too, damage is an error."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from tests import packed, tiny_vlm
from tests.conftest import NEEDS_BITSANDBYTES
from vlmquant import loading
from vlmquant.components import resolve_components
from vlmquant.errors import CheckpointError, InputError, UsageError
from vlmquant.formats import bitsandbytes
from vlmquant.grid import QuantizedWeight
from vlmquant.kernels.reference import round_int8
from vlmquant.linear import QuantEmbedding, QuantLinear, SharedRows
from vlmquant.loading import load_model
from vlmquant.planning import make_plan
from vlmquant.recipe import load_recipe

KINDS = ("llava", "qwen2_5_vl", "qwen3_vl")
RECIPES = {name: getattr(packed, name) for name in ("MIXED", "ASYMMETRIC", "THREE_BITS", "EMBEDDING", "PROTECTED")}
WEIGHTS = "model.safetensors"
Checkpoint = tuple[Path, dict[str, QuantizedWeight]]


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Checkpoint]:
    """checkpoint(kind, recipe) -> directory and codes, written once. Not to be written to."""
    made: dict[tuple[str, str], Checkpoint] = {}

    def make(kind: str, recipe: str) -> Checkpoint:
        if (kind, recipe) not in made:
            out = tmp_path_factory.mktemp(kind) / recipe
            made[kind, recipe] = out, packed.write_packed(tiny(kind), out, RECIPES[recipe])
        return made[kind, recipe]

    return make


@pytest.fixture
def damaged(checkpoint: Callable[[str, str], Checkpoint], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("llava", "ASYMMETRIC")[0], tmp_path / "damaged"))


def reference_model(model_dir: Path, codes: dict[str, QuantizedWeight], *, dynamic: str | None) -> Any:
    """The model in float32 with dequantized weights, and int8 rounding before linears with `dynamic` in the name."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    for name, weight in codes.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight.data = weight.dequantize()
        if dynamic and dynamic in name:
            module.register_forward_pre_hook(lambda module, inputs: (round_int8(inputs[0]), *inputs[1:]))
    return model


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_vlm.image_inputs(kind)).logits


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_model_computes_what_its_codes_say(
    kind: str, recipe: str, tiny: Callable[..., Path], checkpoint: Callable[[str, str], Checkpoint]
) -> None:
    path, codes = checkpoint(kind, recipe)
    model = load_model(path, dtype=torch.float32)
    vision = {"llava": "vision_tower", "qwen2_5_vl": "visual.blocks", "qwen3_vl": "visual.blocks"}[kind]
    reference = reference_model(tiny(kind), codes, dynamic=None if recipe == "THREE_BITS" else vision)
    for name, weight in codes.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, QuantLinear | QuantEmbedding)
        assert torch.equal(module.dequantize(), weight.dequantize())
    # An activation on the border between two codes may fall to either side: a step is 1 / 127 of the largest.
    assert (logits(model, kind) - logits(reference, kind)).abs().max() < (2e-4 if recipe == "THREE_BITS" else 3e-2)
    inputs = tiny_vlm.image_inputs(kind)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, reference.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_bfloat16_it_is_as_near_as_bfloat16_allows(
    recipe: str, tiny_llava: Path, checkpoint: Callable[[str, str], Checkpoint]
) -> None:
    path, codes = checkpoint("llava", recipe)
    model = load_model(path)
    assert model.dtype == torch.bfloat16
    reference = reference_model(tiny_llava, codes, dynamic=None if recipe == "THREE_BITS" else "vision_tower")
    exact = logits(reference, "llava")
    error = (logits(model, "llava").float() - exact).norm() / exact.norm()
    plain = logits(reference.to(torch.bfloat16), "llava").float()
    assert error < 2 * (plain - exact).norm() / exact.norm()


@pytest.mark.parametrize("recipe", ["MIXED", "PROTECTED", "THREE_BITS"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_loads_the_same_weights(
    kind: str, recipe: str, checkpoint: Callable[[str, str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, codes = checkpoint(kind, recipe)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
    model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert logits(model, kind).isfinite().all()  # the first forward pass decompresses
    modules = dict(model.named_modules())
    for name, weight in codes.items():
        module = modules[name.removesuffix(".weight")]
        assert type(module) is nn.Linear
        assert torch.equal(module.weight, weight.dequantize(torch.bfloat16)), name


def test_from_pretrained_keeps_weights_packed_and_generates(checkpoint: Callable[[str, str], Checkpoint]) -> None:
    path, codes = checkpoint("qwen3_vl", "MIXED")
    model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    packed_modules = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert packed_modules == {name.removesuffix(".weight") for name in codes}
    inputs = tiny_vlm.image_inputs("qwen3_vl", dtype=torch.bfloat16)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", ["MIXED", "ASYMMETRIC", "EMBEDDING"])
def test_saving_gives_the_same_bytes_back(
    recipe: str, dtype: torch.dtype | None, checkpoint: Callable[[str, str], Checkpoint], tmp_path: Path
) -> None:
    path, _ = checkpoint("llava", recipe)
    load_model(path, dtype=dtype).save_pretrained(tmp_path)
    before, after = load_file(path / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert dtype is not None or after[name].dtype == tensor.dtype


def test_memory_holds_the_codes_and_no_second_copy(checkpoint: Callable[[str, str], Checkpoint]) -> None:
    path, _ = checkpoint("llava", "MIXED")
    model = load_model(path)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    held = sum(module.packed_bytes for module in model.modules() if isinstance(module, QuantLinear))
    assert sum(buffer.nbytes for buffer in model.buffers()) - held < 10_000  # rotary tables and position ids
    stored = sum(tensor.nbytes for tensor in load_file(path / WEIGHTS).values())
    # The op's table has a second number per group, 2 bytes for 128 codes; tiles are padded to 64 rows.
    assert kept + held < stored * 1.1


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_linears_with_the_same_inputs_share_a_product(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed.write_packed(tiny(kind), tmp_path / "packed", packed.ASYMMETRIC)
    model, inputs = load_model(tmp_path / "packed", dtype=torch.float32), tiny_vlm.image_inputs(kind)
    shared = {module.packed for module in model.modules() if isinstance(module, QuantLinear)}
    shared = {rows for rows in shared if isinstance(rows, SharedRows)}
    layers = model.config.get_text_config().num_hidden_layers
    assert {len(rows.firsts) for rows in shared} == {2, 3}
    assert len(shared) >= 2 * layers
    with torch.no_grad():
        found = model(**inputs).logits
        assert all(rows.made is None for rows in shared), "activations are kept longer than they are needed"
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, QuantLinear(module.to_weight(), module.scheme, module.bias))
        apart = model(**inputs).logits
    assert (found - apart).abs().max() < 3e-2  # an activation between two int8 codes may fall to either side
    assert (found - apart).norm() / apart.norm() < 3e-3


def test_unquantized_models_load_as_they_are(tiny_llava: Path) -> None:
    expected = logits(AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32), "llava")
    assert torch.equal(logits(load_model(tiny_llava, dtype=torch.float32), "llava"), expected)


def test_scales_stay_as_stored_whatever_the_dtype(checkpoint: Callable[[str, str], Checkpoint]) -> None:
    path, codes = checkpoint("llava", "MIXED")
    for dtype in (torch.float16, torch.float32):
        model = load_model(path, dtype=dtype)
        for name, weight in codes.items():
            loaded = model.get_submodule(name.removesuffix(".weight")).to_weight()
            assert torch.equal(loaded.scales, weight.scales)
            assert loaded.grid.scale_dtype == torch.bfloat16


def test_dequantizing_on_request_is_left_to_transformers(
    checkpoint: Callable[[str, str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((checkpoint("llava", "MIXED")[0] / "config.json").read_text())["quantization_config"]
    ours = loading._choose_quantizer(CompressedTensorsConfig.from_dict(config))
    assert type(ours) is loading.PackedQuantizer
    theirs = loading._choose_quantizer(CompressedTensorsConfig.from_dict(config | {"dequantize": True}))
    assert type(theirs) is loading.BoundedQuantizer
    floats = config["config_groups"]["group_0"] | {"format": "float-quantized"}
    floats["weights"] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    foreign = config | {"config_groups": {"group_0": floats}}
    assert type(loading._choose_quantizer(CompressedTensorsConfig.from_dict(foreign))) is loading.BoundedQuantizer


# --- damage ---


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


LAYER = "language_model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_packed"), "up_proj: tensor weight_packed is missing"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "up_proj: tensor weight_scale is missing"),
        (lambda t: t.pop(f"{LAYER}.weight_zero_point"), "up_proj: tensor weight_zero_point is missing"),
        (lambda t: t.pop("language_model.model.norm.weight"), "1 missing keys: model.language_model.norm.weight"),
        (lambda t: t.update({"language_model.model.extra": torch.zeros(2)}), "1 unexpected keys: .*extra"),
        (
            lambda t: t[f"{LAYER}.weight_scale"].fill_(torch.nan),
            "up_proj: weight_scale holds values that are 0",
        ),
        (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(384, 3)}), "cannot load it|mismatched"),
        (lambda t: t.update({"language_model.model.norm.weight": torch.ones(3)}), "cannot load it|mismatched"),
        (lambda t: t[f"{LAYER}.weight_shape"].fill_(7), "up_proj: weight_packed has shape"),
    ],
)
def test_damaged_weights_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, damaged: Path
) -> None:
    edit_weights(damaged, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(damaged)
    assert str(damaged) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["quantization_config"].update(quant_method="novel"),
            "quant_method 'novel' is not one that we load",
        ),
        (lambda c: c["quantization_config"].update(config_groups={}), "has no config_groups"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=5),
            "not one of ours",
        ),
        (lambda c: c["quantization_config"]["ignore"].append("re:.*q_proj$"), "missing keys|unexpected keys"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, damaged: Path
) -> None:
    edit_config(damaged, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(damaged)


def test_a_truncated_file_and_a_missing_one_are_named(damaged: Path) -> None:
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(InputError, match=WEIGHTS):
        load_model(damaged)
    (damaged / "config.json").unlink()
    (damaged / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: missing"):
        load_model(damaged)
    with pytest.raises(InputError, match="nowhere"):
        load_model(damaged / "nowhere")


def test_loading_leaves_the_table_of_transformers_as_it_was(tiny_llava: Path, damaged: Path) -> None:
    before = AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    load_model(tiny_llava)
    edit_weights(damaged, lambda tensors: tensors.pop(f"{LAYER}.weight_scale"))
    with pytest.raises(CheckpointError):
        load_model(damaged)
    assert AUTO_QUANTIZER_MAPPING["compressed-tensors"] is before


# --- bitsandbytes ---

needs_bitsandbytes = pytest.mark.skipif(
    any(find_spec(name) is None for name in bitsandbytes.PACKAGES), reason=NEEDS_BITSANDBYTES
)


@needs_bitsandbytes
@pytest.mark.parametrize(("recipe", "tolerance"), [("bnb-nf4", 0.5), ("bnb-int8", 0.1)])
@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_checkpoints_keep_names_and_load(
    kind: str, recipe: str, tolerance: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    components = resolve_components(tiny(kind))
    plan = make_plan(components, load_recipe(recipe))
    bitsandbytes.write_bitsandbytes(components, plan, load_recipe(recipe), tmp_path)
    stored, original = load_file(tmp_path / WEIGHTS), load_file(tiny(kind) / WEIGHTS)
    for line in plan.lines:
        disk = components.parameter(line.name).disk
        if line.action == "keep":
            assert torch.equal(stored[disk], original[disk]), disk
        else:
            assert stored[disk].dtype in (torch.uint8, torch.int8)
    expected = logits(load_model(tiny(kind)), kind).float()
    error = (logits(load_model(tmp_path), kind).float() - expected).norm() / expected.norm()
    assert 0 < error < tolerance


def test_missing_bitsandbytes_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"need bitsandbytes, accelerate: pip install bitsandbytes accelerate"):
        bitsandbytes.require_bitsandbytes()
