"""state_dict() of a quantized model holds its weights, load_state_dict() takes them, num_parameters() counts them."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlmquant.errors import CheckpointError
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one form with other codes."""
    from vlmquant.pipeline import quantize

    recipe = tmp_path_factory.mktemp("recipe") / "r.yaml"
    recipe.write_text(
        "name: r\ncomponents:\n  vision_encoder: {scheme: w8a16, method: rtn}\n"
        "  language: {scheme: w4a16-asym, method: rtn}\n"
    )
    folder = tmp_path_factory.mktemp("made")
    seeds = {"one": 0, "other": 1}
    return {name: quantize(tiny("llava", seed=seed), recipe, folder / name).path for name, seed in seeds.items()}


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def test_a_saved_state_dict_is_the_checkpoint(made: dict[str, Path]) -> None:
    model = load_model(made["one"])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    stored = {key: value for shard in made["one"].glob("*.safetensors") for key, value in load_file(shard).items()}
    ends = {".".join(key.split(".")[-2:]) for key in state}
    assert {".".join(key.split(".")[-2:]) for key in stored} <= ends
    assert sum(value.numel() for key, value in state.items() if "weight_packed" in key) == sum(
        value.numel() for key, value in stored.items() if "weight_packed" in key
    )
    assert not [key for key in state if ".packed." in key]


def test_a_state_dict_makes_another_model_the_same(made: dict[str, Path]) -> None:
    one, other = load_model(made["one"]), load_model(made["other"])
    wanted = packed(one)
    assert wanted
    assert all(not torch.equal(weight, wanted[name]) for name, weight in packed(other).items())
    assert str(other.load_state_dict(one.state_dict())) == "<All keys matched successfully>"
    assert all(torch.equal(weight, wanted[name]) for name, weight in packed(other).items())
    ids = torch.tensor([[1, 5, 7, 9]])
    torch.testing.assert_close(other(input_ids=ids).logits, one(input_ids=ids).logits)


def test_what_is_missing_or_of_another_kind_is_told(made: dict[str, Path]) -> None:
    model = load_model(made["one"])
    state = model.state_dict()
    name = next(key for key in state if key.endswith("weight_packed"))
    without = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match="weight_scale"):
        model.load_state_dict(state | {name.replace("weight_packed", "weight_scale"): torch.ones(3, 3)})
    before = packed(model)
    assert name in model.load_state_dict(without, strict=False).missing_keys
    assert all(torch.equal(weight, before[key]) for key, weight in packed(model).items())


def test_copies_keep_their_own(made: dict[str, Path]) -> None:
    model = load_model(made["one"])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.load_state_dict(load_model(made["other"]).state_dict())
        mine = packed(model)
        assert all(not torch.equal(weight, mine[name]) for name, weight in packed(again).items())


def test_the_number_of_parameters_is_the_models(made: dict[str, Path], tiny: Callable[..., Path]) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(tiny("llava", seed=0))
    model = load_model(made["one"])
    assert model.num_parameters() == whole.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == whole.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < whole.num_parameters()


def test_offloading_to_disk_has_a_message_of_its_own(made: dict[str, Path]) -> None:
    """transformers shows its quantizers the places of all modules once it has found them."""
    quantizer = load_model(made["one"]).hf_quantizer
    places = {"model.vision_tower": "cpu", "model.language_model.layers.1": "disk"}
    with pytest.raises(CheckpointError, match=r"puts model\.language_model\.layers\.1 on disk.*are not offloaded"):
        quantizer.validate_environment(device_map=places)
    quantizer.validate_environment(device_map={"": "cpu"})
