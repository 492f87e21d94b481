"""What a model's directory may bring: files of any kind and content, and numbers that a machine cannot hold."""

import json
import math
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vlmquant
from tests import packed
from tests.small_set import write_small_set
from tests.tiny_vlm import image_inputs
from vlmquant import components as components_room
from vlmquant.components import locate_model, resolve_components
from vlmquant.demo import calibration_set_dir, model_dir
from vlmquant.errors import CheckpointError, InputError, SentinelError, VlmquantError
from vlmquant.formats import compressed_tensors
from vlmquant.formats.compressed_tensors import parse_config, schemes_of
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.recipe import parse_recipe
from vlmquant.shards import open_shards

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "copy"))


@pytest.fixture
def checkpoint(tiny_llava: Path, tmp_path: Path) -> Path:
    packed.write_packed(tiny_llava, tmp_path / "packed", packed.MIXED)
    return tmp_path / "packed"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    """What both doors, the one that quantizes and the one that loads, say in one line."""
    said = []
    for door in (resolve_components, load_model):
        with pytest.raises(VlmquantError) as caught:
            door(folder)
        assert len(str(caught.value)) < 5000
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    return " | ".join(said)


# --- files ---


def as_pipe(file: Path) -> None:
    os.mkfifo(file)


def as_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(file.parent)  # the names of sockets are short
        made.bind(file.name)
        os.chdir(here)


@pytest.mark.parametrize("make", [as_pipe, as_socket, Path.mkdir, lambda file: file.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "generation_config.json", "x.jinja", "merges.txt"])
def test_what_is_no_regular_file_is_never_waited_for(make: Callable[[Path], Any], name: str, copy: Path) -> None:
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    assert f"{copy / name}: is a" in refusal(copy)
    with pytest.raises(InputError, match="no regular file"):
        locate_model(copy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "llava", "model_type": "llava"}', "key model_type stands twice"),
        ('{"model_type": "llava", "text_config": {"a": 1, "a": 2}}', "key a stands twice"),
        ("[" * 70 + "]" * 70, "nested more than"),
        ('{"model_type": "llava", "x": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"model_type": "llava", "x": "\\ud800"}', "surrogate"),
        ('{"model_type": ["llava"]}', "model_type is no text"),
        ('{"model_type": "llava", "text_config": {"model_type": 3}}', "model_type is no text"),
        ('{"model_type": "' + "llava" * 10_000 + '"}', "is unknown to this transformers"),
        ("3", "should be an object"),
    ],
)
def test_an_odd_config_is_told_in_a_line(text: str, words: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    assert words in refusal(copy)


def test_infinity_is_a_number_in_a_config(copy: Path) -> None:
    """Python writes it, and published configs hold it."""
    edit(copy, lambda config: config.update(time_step_limit=[0.0, math.inf]))
    assert resolve_components(copy).linears
    assert load_model(copy) is not None


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_a_name_that_is_no_path_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        locate_model(name)
    assert len(str(caught.value)) < 1000


# --- headers and index ---


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"dtype": ["F32"]}, "dtype"),
        ({"dtype": {}}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"shape": [2**63] * 10_000}, "shape"),
        ({"shape": [2**62] * 60}, "takes"),
        ({"shape": [10**4000]}, "shape"),
        ({"shape": [[1]] * 50}, "shape"),
        ({"shape": "4"}, "shape"),
        ({"data_offsets": [0, 10**3000]}, "data_offsets"),
        ({"data_offsets": {"0": 4}}, "data_offsets"),
        ({"dtype": "F" * 100_000}, "dtype"),
    ],
)
def test_a_header_of_any_content_is_refused(item: dict[str, Any], words: str, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | item}).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(InputError, match=words) as caught:
        open_shards(tmp_path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("metadata", [[], 1, {"format": 1}, {"a": {"b": "c"}}])
def test_metadata_that_is_no_text_is_refused(metadata: Any, tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"1")
    with pytest.raises(InputError, match="__metadata__"):
        open_shards(tmp_path)


@pytest.mark.parametrize("name", ["", "a\nvlmquant: all is well", "\x1b[2J", "a\u202eb", "x" * 100_000])
def test_names_that_a_terminal_must_not_show_are_refused(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {name: "one.safetensors"}}))
    with pytest.raises(InputError, match=r"tensor name .* not printable") as caught:
        open_shards(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    with pytest.raises(InputError) as caught:
        open_shards(tmp_path)
    assert str(caught.value).isprintable()
    (tmp_path / f"{WEIGHTS}.index.json").unlink()
    if name:
        save_file({name: torch.ones(1)}, tmp_path / "one.safetensors")
        with pytest.raises(InputError, match="tensor name"):
            open_shards(tmp_path)


# --- sizes ---


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_hidden_layers", 20_000),
        ("vision_config", "num_hidden_layers", 10**30),
        ("vision_config", "depth", 5000.0),
        ("text_config", "n_routed_experts", 10**8),
        (None, "num_labels", 10**7),
    ],
)
def test_a_config_that_the_weights_cannot_fill_is_refused(part: str | None, key: str, value: Any, copy: Path) -> None:
    edit(copy, lambda config: (config[part] if part else config).update({key: value}))
    assert f"{key} is " in refusal(copy)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_left_to_its_defaults_is_not_made_up(part: str, copy: Path) -> None:
    """Defaults are models of billions of weights: transformers would fill those that are not on disk."""
    edit(copy, lambda config: config.pop(part))
    refusal(copy)
    if part == "text_config":
        with pytest.raises(CheckpointError, match=r"more than the .* bytes on disk can hold"):
            load_model(copy)


@pytest.mark.parametrize("what", ["CONFIG", "BUILD"])
def test_what_takes_too_long_is_ended(what: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*arguments: Any, **keywords: Any) -> None:
        while True:
            pass

    import transformers

    monkeypatch.setattr(components_room, f"{what}_SECONDS", 0.2)
    if what == "CONFIG":
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", endless)
    else:
        monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_config", endless)
    with pytest.raises(InputError, match=r"takes more than 0\.2 s"):
        resolve_components(copy)


def test_what_takes_too_much_memory_is_ended(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(components_room, "CONFIG_BYTES", 1 << 28)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: [0] * 10**9)
    with pytest.raises(InputError, match="takes more than 256 MiB of memory"):
        resolve_components(copy)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("text_config", "hidden_size"),
        ("text_config", "num_attention_heads"),
        ("vision_config", "patch_size"),
        ("vision_config", "num_attention_heads"),
        ("text_config", "vocab_size"),
        ("text_config", "num_key_value_heads"),
    ],
)
def test_sizes_of_zero_are_refused(part: str, key: str, copy: Path) -> None:
    edit(copy, lambda config: config[part].update({key: 0}))
    refusal(copy)


# --- what a config says of quantization ---


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", ["awq"], None])
def test_a_quantized_model_is_refused_wherever_it_says_so(key: str, part: str | None, method: Any, copy: Path) -> None:
    edit(copy, lambda config: (config[part] if part else config).update({key: {"quant_method": method, "bits": 4}}))
    with pytest.raises(InputError, match="already quantized"):
        resolve_components(copy)
    with pytest.raises(VlmquantError, match="quant"):
        load_model(copy)


ODD = (None, 3, "x", [], [3], {}, True, {"a": []}, -1, 1e400, ["re:("], "\ud800", "x" * 10_000)


@pytest.mark.parametrize(
    "path",
    [
        "config_groups",
        "ignore",
        "format",
        "kv_cache_scheme",
        "config_groups.g",
        *(f"config_groups.g.{key}" for key in ("targets", "weights", "input_activations", "output_activations")),
        *(f"config_groups.g.weights.{key}" for key in ("num_bits", "type", "symmetric", "strategy", "group_size")),
        *(f"config_groups.g.weights.{key}" for key in ("dynamic", "actorder")),
        *(f"config_groups.g.input_activations.{key}" for key in ("num_bits", "dynamic", "strategy")),
    ],
)
def test_a_config_of_any_content_is_ours_or_refused(path: str) -> None:
    for value in ODD:
        group = compressed_tensors._group(compressed_tensors.Scheme(bits=8, group_size=None), ["Linear"])
        group["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
        group["format"] = "int-quantized"
        config: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
        *outer, last = path.split(".")
        place = config
        for key in outer:
            place = place[key]
        place[last] = value
        said = ""
        try:
            groups, ignore = parse_config(config)
            schemes_of({"a.b": "Linear"}, groups, ignore)
        except CheckpointError as error:
            said = str(error)
        assert not said or (said.isprintable() and len(said) < 2000)
    for whole in ODD:
        with pytest.raises(CheckpointError):
            parse_config(whole)


@pytest.mark.parametrize("place", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("re:(", "is no regular expression"),
        ("re:" + "(" * 5000 + ")" * 5000, "is no regular expression"),
        (r"re:^(\w+\.?)+!$", "takes more than 0.5 s"),
    ],
)
@pytest.mark.parametrize("door", [load_model, AutoModelForImageTextToText.from_pretrained])
def test_a_regex_of_a_checkpoint_has_an_end(
    place: str,
    pattern: str,
    words: str,
    door: Callable[[Path], Any],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert vlmquant  # imported, it takes part in from_pretrained
    monkeypatch.setattr(compressed_tensors, "REGEX_SECONDS", 0.5)
    monkeypatch.setattr(compressed_tensors, "REGEX_SECONDS_EACH", 0.0)

    def change(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        groups = list(quantization["config_groups"].values())
        (groups[0]["targets"] if place == "targets" else quantization["ignore"]).append(pattern)

    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        door(checkpoint)


def test_a_regex_is_tried_where_the_library_matches_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme that is not ours is transformers' to load, on its own names."""
    monkeypatch.setattr(compressed_tensors, "REGEX_SECONDS", 0.5)
    monkeypatch.setattr(compressed_tensors, "REGEX_SECONDS_EACH", 0.0)

    def change(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = [r"re:^(\w+\.?)+!$"]
            group["weights"]["num_bits"] = 5

    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"takes more than 0\.5 s"):
        AutoModelForImageTextToText.from_pretrained(checkpoint)


# --- numbers ---


def poison(source: Path, out: Path, name: str, value: float) -> Path:
    shutil.copytree(source, out)
    tensors: dict[str, Tensor] = load_file(out / WEIGHTS)
    (name,) = [one for one in tensors if name in one]
    tensors[name].view(-1)[3] = value
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


GPTQ = "{vision_encoder: w8a8-dynamic, language: {scheme: w4a16, method: gptq}}"
AWQ = "{language: {scheme: w4a16, method: awq}}"


@pytest.mark.parametrize(
    ("components", "name"),
    [(GPTQ, "language_model.model.layers.1.mlp.down_proj"), (AWQ, "language_model.model.layers.0.self_attn.q_proj")],
)
def test_huge_weights_that_a_model_survives_are_quantized(components: str, name: str, tmp_path: Path) -> None:
    source = poison(model_dir(), tmp_path / "model", name, -1e30)
    recipe = parse_recipe(f"name: t\ncomponents: {components}\ncalibration: {{samples: 8}}\n", name="t")
    done = quantize(source, recipe, tmp_path / "out", calibration=calibration_set_dir())
    assert all(map(math.isfinite, done.errors.values()))
    load_model(done.path)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("llava", "language_model.model.layers.0.input_layernorm.weight", 1e30),
        ("llava", "encoder.layers.1.self_attn.v_proj.weight", 3.3e38),
        ("qwen2_5_vl", "visual.blocks.0.norm1.weight", -1e30),
        ("qwen3_vl", "language_model.layers.1.post_attention_layernorm.weight", 1e25),
    ],
)
def test_the_weight_that_makes_numbers_infinite_is_named(
    kind: str, name: str, value: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = poison(tiny(kind), tmp_path / "model", name, value)
    components = "{vision_encoder: w8a8-dynamic, language: {scheme: w4a16, method: gptq}}"
    recipe = parse_recipe(f"name: t\ncomponents: {components}\n", name="t")
    with pytest.raises(SentinelError) as caught:
        quantize(source, recipe, tmp_path / "out", calibration=write_small_set(tmp_path / "set"))
    assert name.rpartition("layers.")[2].rpartition("blocks.")[2] in str(caught.value)
    assert f"{abs(torch.tensor(value).bfloat16().item()):.3g}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_codes_of_huge_weights_have_finite_errors(tiny_llava: Path, tmp_path: Path) -> None:
    """Without data nothing overflows but the squares of the error."""
    source = poison(tiny_llava, tmp_path / "model", "language_model.model.layers.0.mlp.up_proj.weight", 1e30)
    done = quantize(source, parse_recipe("name: t\ncomponents: {language: w4a16}\n", name="t"), tmp_path / "out")
    assert all(map(math.isfinite, done.errors.values()))


# --- a head alone ---


def test_a_tied_qwen_may_hold_its_head_only(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("qwen2_vl", tie=True), tmp_path / "model"))
    tensors = load_file(source / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    done = quantize(source, parse_recipe("name: t\ncomponents: {language: w4a16}\n", name="t"), tmp_path / "out")
    with torch.no_grad():
        values = image_inputs("qwen2_vl", dtype=torch.bfloat16)
        assert load_model(done.path)(**values).logits.isfinite().all()
