"""Every tensor has one owner, one name on disk and one in the model; what does not fit is refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests import tiny_vlm
from vlmquant.components import ComponentMap, locate_model, resolve_components
from vlmquant.errors import InputError
from vlmquant.families import FAMILIES
from vlmquant.recipe import COMPONENTS

WEIGHTS = "model.safetensors"


def loaded_by_transformers(model_dir: Path) -> nn.Module:
    model, info = AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.bfloat16, output_loading_info=True, trust_remote_code=False
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_parameters_and_buffers_equal_those_of_transformers(kind: str, tiny: Callable[..., Path]) -> None:
    model_dir = tiny(kind)
    components, reference = resolve_components(model_dir), loaded_by_transformers(model_dir)
    expected = dict(reference.named_parameters())
    assert [parameter.name for parameter in components.parameters] == list(expected)
    assert all(torch.equal(components.read(name), value) for name, value in expected.items())
    assert components.total_bytes == components.shards.total_bytes == sum(value.nbytes for value in expected.values())
    assert components.total_bytes == sum(value.nbytes for value in load_file(model_dir / WEIGHTS).values())
    assert {parameter.component for parameter in components.parameters} == set(COMPONENTS)
    skeleton = components.skeleton()
    assert not skeleton.training
    assert all(value.is_meta for value in skeleton.parameters())
    components.materialize_buffers(skeleton)
    buffers = dict(skeleton.named_buffers())
    assert buffers.keys() == dict(reference.named_buffers()).keys()
    for name, value in reference.named_buffers():
        assert buffers[name].dtype == value.dtype
        assert torch.equal(buffers[name], value), name


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_blocks_stand_in_the_order_in_which_they_run(kind: str, tiny: Callable[..., Path]) -> None:
    components = resolve_components(tiny(kind))
    model = tiny_vlm.make_model(kind)
    ran: list[str] = []
    called: set[str] = set()
    for block in components.blocks:
        model.get_submodule(block.name).register_forward_pre_hook(lambda *_, name=block.name: ran.append(name))
    for linear in components.linears:
        model.get_submodule(linear.name).register_forward_pre_hook(lambda *_, name=linear.name: called.add(name))
    with torch.no_grad():
        model(**tiny_vlm.image_inputs(kind))
    names = [block.name for block in components.blocks]
    assert list(dict.fromkeys(ran)) == names
    assert called == {linear.name for linear in components.linears}
    in_blocks = [linear for block in components.blocks for linear in block.linears]
    assert all(linear.name == f"{linear.block}.{linear.local}" for linear in in_blocks)
    assert {linear for linear in components.linears if linear.block} == set(in_blocks)
    for component in ("vision_encoder", "language"):
        indices = [block.index for block in components.blocks if block.component == component]
        assert indices == list(range(len(indices)))
        assert len(indices) >= 2


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_linears_of_a_group_get_the_same_inputs(kind: str, tiny: Callable[..., Path]) -> None:
    components = resolve_components(tiny(kind))
    model = tiny_vlm.make_model(kind)
    inputs: dict[str, Tensor] = {}
    for linear in components.linears:
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args, name=linear.name: inputs.update({name: args[0]})
        )
    with torch.no_grad():
        model(**tiny_vlm.image_inputs(kind))
    for block in components.blocks:
        groups = components.fused_groups(block)
        assert sorted(one.name for group in groups for one in group) == sorted(one.name for one in block.linears)
        for group in groups:
            assert all(torch.equal(inputs[group[0].name], inputs[one.name]) for one in group)
        leaves = [[one.local.rpartition(".")[2] for one in group] for group in groups]
        if any("v_proj" in group for group in leaves):
            assert ["q_proj", "k_proj", "v_proj"] in leaves or ["k_proj", "v_proj"] in leaves


def test_names_of_known_parts(tiny: Callable[..., Path]) -> None:
    qwen = resolve_components(tiny("qwen3_vl"))
    owners = {parameter.name: parameter.component for parameter in qwen.parameters}
    assert owners["model.visual.merger.linear_fc1.weight"] == "projector"
    assert owners["model.visual.deepstack_merger_list.1.norm.bias"] == "projector"
    assert owners["model.visual.pos_embed.weight"] == "vision_encoder"
    newline = resolve_components(tiny("llava_next")).parameter("model.image_newline")
    assert (newline.component, newline.disk) == ("projector", "image_newline")
    mllama = resolve_components(tiny("mllama"))
    assert [block.name.removeprefix("model.") for block in mllama.blocks] == [
        "vision_model.transformer.layers.0",
        "vision_model.transformer.layers.1",
        "vision_model.global_transformer.layers.0",
        *(f"language_model.layers.{index}" for index in range(3)),
    ]
    cross = [[one.local for one in group] for group in mllama.fused_groups(mllama.blocks[4])]
    assert ["cross_attn.q_proj"] in cross
    assert ["cross_attn.k_proj", "cross_attn.v_proj"] in cross
    llava = resolve_components(tiny("llava"))
    disk = {parameter.name: parameter.disk for parameter in llava.parameters}
    assert disk["lm_head.weight"] == "language_model.lm_head.weight"
    assert disk["model.language_model.norm.weight"] == "language_model.model.norm.weight"
    assert disk["model.vision_tower.post_layernorm.bias"] == "vision_tower.vision_model.post_layernorm.bias"


SPEAKING_NAMES = ("llava", "idefics3", "smolvlm", "internvl", "gemma3", "paligemma", "mistral3", "mllama")


@pytest.mark.parametrize("kind", SPEAKING_NAMES)
def test_a_family_without_a_row_is_read_from_its_config(
    kind: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_row = resolve_components(tiny(kind))
    monkeypatch.delitem(FAMILIES, kind)
    without_row = resolve_components(tiny(kind))
    assert without_row.parameters == with_row.parameters
    assert without_row.blocks == with_row.blocks
    assert without_row.linears == with_row.linears


def test_what_no_row_places_is_other_and_kept(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = FAMILIES["llava"]
    monkeypatch.setitem(FAMILIES, "llava", replace(row, projector=()))
    components = resolve_components(tiny_llava)
    assert {one.name for one in components.parameters if one.component == "other"} == {
        f"model.multi_modal_projector.linear_{number}.{leaf}" for number in (1, 2) for leaf in ("weight", "bias")
    }


def test_a_row_that_fits_no_module_is_refused_with_a_way_out(tiny_llava: Path) -> None:
    row = replace(FAMILIES["llava"], vision_encoder=("model.visual",), source="recipe")
    with pytest.raises(InputError, match=r"type llava has no module model\.visual, .*\(recipe\).*model\.vision_tower"):
        resolve_components(tiny_llava, family=row)


@pytest.fixture
def copy(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "copy"))


def edit_config(model_dir: Path, **changes: Any) -> None:
    file = model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(model_dir: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(model_dir / WEIGHTS)
    change(tensors)
    save_file(tensors, model_dir / WEIGHTS, {"format": "pt"})


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        InputError, match=r"1 tensors are missing: model\.language_model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        resolve_components(copy)


def test_an_unexpected_tensor_is_named(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({"language_model.model.layers.9.extra": torch.ones(2)}))
    with pytest.raises(InputError, match=r"no place .*: language_model\.model\.layers\.9\.extra"):
        resolve_components(copy)


def test_a_wrong_shape_is_named(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({"language_model.model.norm.weight": torch.ones(255)}))
    with pytest.raises(InputError, match=r"language_model\.model\.norm\.weight has shape \[255\].* \[256\]"):
        resolve_components(copy)


def test_tensors_that_transformers_recomputes_are_listed_and_not_placed(copy: Path) -> None:
    disk = "vision_tower.vision_model.embeddings.position_ids"
    edit_weights(copy, lambda tensors: tensors.update({disk: torch.arange(5)[None]}))
    components = resolve_components(copy)
    assert components.ignored == (disk,)
    assert components.total_bytes + 5 * 8 == components.shards.total_bytes


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "1 NaN and 0 infinite"), (torch.inf, "0 NaN and 1 infinite")]
)
def test_a_weight_that_is_no_number_is_named_with_its_count(copy: Path, value: float, message: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.norm.weight"][3] = value

    edit_weights(copy, spoil)
    components = resolve_components(copy)
    with pytest.raises(InputError, match=rf"language_model\.model\.norm\.weight holds {message} values of 256"):
        components.read("model.language_model.norm.weight")


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantized_model_is_refused(copy: Path, part: str | None) -> None:
    quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, **(quantization if part is None else {part: config[part] | quantization}))
    with pytest.raises(InputError, match=r"already quantized \(gptq\)"):
        resolve_components(copy)


def test_integer_weights_are_refused(copy: Path) -> None:
    edit_weights(
        copy, lambda tensors: tensors.update({"language_model.model.norm.weight": torch.ones(256).to(torch.int8)})
    )
    with pytest.raises(InputError, match=r"int8, so this model is already quantized"):
        resolve_components(copy)


def test_code_of_the_model_is_not_run(copy: Path) -> None:
    edit_config(copy, auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(InputError, match="auto_map asks to run code"):
        resolve_components(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.unlink(), r"config\.json: missing"),
        (lambda config: config.write_text(config.read_text()[:50]), r"config\.json:\d+: not valid JSON"),
        (lambda config: config.write_text("{}"), "names no model_type"),
        (lambda config: config.write_text('{"model_type": "llava_9"}'), "model type llava_9 is unknown"),
        (lambda config: config.write_text('{"model_type": "bert"}'), "not an image-text model"),
        (lambda config: config.write_bytes(b"\xff\xfe{"), "not UTF-8 text"),
    ],
)
def test_a_bad_config_is_one_line(copy: Path, change: Callable[[Path], Any], message: str) -> None:
    change(copy / "config.json")
    with pytest.raises(InputError, match=message) as caught:
        resolve_components(copy)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        resolve_components(tmp_path / "nowhere")


def test_tied_embeddings_have_one_tensor(tiny: Callable[..., Path]) -> None:
    model_dir = tiny("qwen2_5_vl", tie=True)
    components = resolve_components(model_dir)
    assert components.tied == (("model.language_model.embed_tokens.weight", "lm_head.weight"),)
    assert "lm_head" not in {parameter.component for parameter in components.parameters}
    assert components.total_bytes == components.shards.total_bytes
    skeleton = components.skeleton()
    assert skeleton.get_parameter("lm_head.weight") is skeleton.get_parameter(
        "model.language_model.embed_tokens.weight"
    )


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_that_are_stored_twice(tiny: Callable[..., Path], tmp_path: Path, equal: bool) -> None:
    """As transformers does it: equal values are tied, unequal ones are not."""
    model_dir = Path(shutil.copytree(tiny("qwen2_5_vl", tie=True), tmp_path / "twice"))
    edit_weights(
        model_dir,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * (1 if equal else 2)}),
    )
    components = resolve_components(model_dir)
    assert bool(components.tied) == equal
    assert "lm_head" in {parameter.component for parameter in components.parameters}
    assert components.total_bytes == components.shards.total_bytes
    names = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    head, embedding = (components.skeleton().get_parameter(name) for name in names)
    reference = AutoModelForImageTextToText.from_pretrained(model_dir)
    assert torch.equal(*(reference.get_parameter(name) for name in names)) == equal
    assert (dict(components.skeleton().named_parameters()).keys() >= set(names)) != equal
    assert head.shape == embedding.shape


def test_buffers_that_are_already_there_stay(tiny_llava: Path) -> None:
    components: ComponentMap = resolve_components(tiny_llava)
    model = components.skeleton()
    module = model.get_submodule("model.vision_tower.embeddings")
    module.register_buffer("position_ids", torch.zeros(1, 5, dtype=torch.long), persistent=False)
    components.materialize_buffers(model)
    assert torch.equal(module.get_buffer("position_ids"), torch.zeros(1, 5, dtype=torch.long))
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_buffer_that_nobody_computes_is_an_error(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = resolve_components(tiny_llava)
    model = components.skeleton()
    monkeypatch.setattr(type(model), "initialize_weights", lambda self: None)
    with pytest.raises(InputError, match="transformers does not compute it"):
        components.materialize_buffers(model)


def test_locate_model(tiny_llava: Path, tmp_path: Path) -> None:
    assert locate_model(str(tiny_llava)) == tiny_llava
    with pytest.raises(InputError, match="no such directory; give a model's directory or a hub id"):
        locate_model("./nowhere/at/all")
    with pytest.raises(InputError, match=r"nobody/nothing: .* neither cached nor reachable"):
        locate_model("nobody/nothing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        locate_model(tmp_path / "file")


def test_a_tied_embedding_may_lie_on_disk_as_the_head(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tied = resolve_components(tiny("llava", tie=True))
    model_dir = Path(shutil.copytree(tiny("llava", tie=True), tmp_path / "copy"))
    embedding = "language_model.model.embed_tokens.weight"

    def as_head(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.lm_head.weight"] = tensors.pop(embedding)

    edit_weights(model_dir, as_head)
    components = resolve_components(model_dir)
    (moved,) = [one for one in components.parameters if one.component == "embedding"]
    assert moved.disk == "language_model.lm_head.weight"
    assert components.total_bytes == tied.total_bytes
    assert len(components.tied[0]) == 2
