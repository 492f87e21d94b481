"""Directories of all ages of the hub: what is read, and what is refused with the command that makes it readable."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_end_to_end import stored
from tests.tiny_vlm import image_inputs
from vlmquant.checkpoint.assemble import base_name
from vlmquant.components import resolve_components
from vlmquant.errors import InputError
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.shards import open_shards

PEFT = '''
"""As much of peft as the suggested command needs: the adapter is a number that is added to the head."""
import json, pathlib, torch


class PeftModel:
    @classmethod
    def from_pretrained(cls, model, adapter):
        made = cls()
        made.model, made.added = model, json.loads(pathlib.Path(adapter, "adapter_config.json").read_text())["added"]
        return made

    def merge_and_unload(self):
        with torch.no_grad():
            self.model.lm_head.weight.add_(self.added)
        return self.model
'''


@pytest.fixture
def copy(tiny_qwen3_vl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3_vl, tmp_path / "my model's"))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def refusal(folder: Path) -> str:
    """The same words from what quantizes and from what evaluates."""
    with pytest.raises(InputError) as quantizing:
        resolve_components(folder)
    with pytest.raises(InputError) as loading:
        load_model(folder)
    assert str(quantizing.value) == str(loading.value)
    return str(quantizing.value)


def run_command(message: str, folder: Path, **environment: str) -> Path:
    """Run the one command in a message, as a shell would, and give the directory that it wrote."""
    (command,) = re.findall(r"^ +(python -c .*)$", message, re.MULTILINE)
    assert shlex.split(command)[0] == "python"
    bin_dir = Path(folder, "bin")
    bin_dir.mkdir()
    (bin_dir / "python").symlink_to(sys.executable)
    environment |= {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    environment.setdefault("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "MODEL-OUT"


def test_the_command_for_pickled_weights_converts_them(copy: Path, tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    pickle_weights(copy)
    message = refusal(copy)
    assert "holds pickled weights only, which can run code when loaded; if you trust them" in message
    assert "AutoModelForImageTextToText" in message
    out = run_command(message, tmp_path)
    assert resolve_components(out).parameters == resolve_components(tiny_qwen3_vl).parameters
    before, after = stored(tiny_qwen3_vl), stored(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    names = {file.name for file in tiny_qwen3_vl.iterdir()}
    assert {file.name for file in out.iterdir()} == names
    assert quantize(out, "rtn-w4", tmp_path / "quantized").path.is_dir()


def test_the_command_leaves_a_cache_as_it_is(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_qwen3_vl, tmp_path / "source"))
    pickle_weights(source)
    snapshot = as_cache(source, tmp_path / "cache")
    before = {file: file.read_bytes() for file in snapshot.iterdir()}
    out = run_command(refusal(snapshot), tmp_path)
    assert not any(file.is_symlink() for file in out.iterdir())
    assert {file: file.read_bytes() for file in snapshot.iterdir()} == before
    assert load_model(out) is not None


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("llava", "t.AutoModelForImageTextToText.from"),
        ("qwen2_5_omni", "t.AutoModelForMultimodalLM.from"),
        ("llama", "t.AutoModelForCausalLM.from"),
        ("siglip", "t.AutoModel.from"),
        ("unheard_of", r't.AutoModel.from_pretrained(d, dtype="auto", trust_remote_code=True)'),
    ],
)
def test_the_command_names_the_class_of_the_model(model_type: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(InputError, match=re.escape(named)):
        open_shards(tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_the_command_for_an_adapter_merges_it(beside: bool, tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    if beside:
        shutil.copytree(tiny_qwen3_vl, adapter)
    adapter.mkdir(exist_ok=True)
    settings = {"base_model_name_or_path": str(tiny_qwen3_vl), "peft_type": "LORA", "added": 1.0}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    message = refusal(adapter)
    assert f"holds an adapter (LORA) to {tiny_qwen3_vl}" in message
    if beside:
        assert "move adapter_config.json, adapter_model.safetensors away, else merge it first" in message
        return
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins" / "peft.py").write_text(PEFT)
    path = os.pathsep.join([str(tmp_path / "stand-ins"), *filter(None, sys.path)])
    out = run_command(message, tmp_path, PYTHONPATH=path)
    merged, base = resolve_components(out), resolve_components(tiny_qwen3_vl)
    assert torch.equal(merged.read("lm_head.weight"), base.read("lm_head.weight") + 1)
    assert {file.name for file in out.iterdir()} == {file.name for file in tiny_qwen3_vl.iterdir()}


def test_an_adapter_without_a_base_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "to a model that it does not name" in message
    assert '"BASE-MODEL"' in message


def test_one_file_is_read_whatever_it_is_called(copy: Path, tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "my-finetune.fp16.safetensors")
    assert resolve_components(copy).parameters == resolve_components(tiny_qwen3_vl).parameters
    inputs = image_inputs("qwen3_vl", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(load_model(copy)(**inputs).logits, load_model(tiny_qwen3_vl)(**inputs).logits)
    out = quantize(copy, "rtn-w4", tmp_path / "out").path
    plain = quantize(tiny_qwen3_vl, "rtn-w4", tmp_path / "plain").path
    assert all(torch.equal(stored(out)[name], value) for name, value in stored(plain).items())
    assert load_model(out) is not None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.safetensors", "b.safetensors"],
            r"several files of weights and no index \(a\.safetensors, b\.safetensors\)",
        ),
        (["model-00001-of-00002.safetensors"], "holds 1 of 2 shards and no index"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "holds 2 of 2 shards and no index"),
        (
            ["consolidated.safetensors"],
            "consolidated.safetensors only, whose tensors have names that transformers does",
        ),
    ],
)
def test_files_that_may_not_be_the_model_are_refused(copy: Path, names: list[str], message: str) -> None:
    for name in names:
        shutil.copy(copy / "model.safetensors", copy / name)
    (copy / "model.safetensors").unlink()
    assert re.search(message, refusal(copy))


@pytest.mark.parametrize("shards", [1, 2])
def test_another_makers_file_beside_the_model_is_left_alone(
    tiny: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    source = Path(shutil.copytree(tiny("qwen3_vl", shards=shards), tmp_path / "source"))
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, source / "consolidated.safetensors")
    assert resolve_components(source).parameters == resolve_components(tiny("qwen3_vl")).parameters
    out = quantize(source, "rtn-w4", tmp_path / "out").path
    assert not (out / "consolidated.safetensors").exists()
    assert load_model(source) is not None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-Q4_K_M.gguf", "mmproj.gguf"], "holds GGUF files only, which are llama.cpp's"),
        (["consolidated.00.pth"], r"holds pickled weights only \(consolidated\.00\.pth\), in a form that transformers"),
        (["tf_model.h5"], "holds weights for TensorFlow only"),
        (["flax_model.msgpack"], "holds weights for Flax only"),
        (["training_args.txt"], "holds neither model.safetensors nor"),
        (["adapter_model.safetensors"], "holds neither model.safetensors nor"),
    ],
)
def test_other_weights_are_refused_by_name(copy: Path, names: list[str], message: str) -> None:
    (copy / "model.safetensors").unlink()
    for name in names:
        (copy / name).touch()
    assert re.search(message, refusal(copy))


def test_gguf_files_without_a_config_are_told_apart_from_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a config"):
        resolve_components(tmp_path)
    (tmp_path / "model-Q8_0.gguf").touch()
    assert "holds GGUF files only" in refusal(tmp_path)


# --- the hub's cache ---


def as_cache(model: Path, root: Path) -> Path:
    """The model as huggingface_hub stores it; its snapshot, which holds links to blobs."""
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    return snapshot


def through_link(snapshot: Path, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(snapshot)
    return tmp_path / "link"


def moved_cache(snapshot: Path, tmp_path: Path) -> Path:
    """The whole cache behind a link, as where home directories are small."""
    root = snapshot.parents[2]
    root.rename(tmp_path / "large-disk")
    root.symlink_to(tmp_path / "large-disk")
    return snapshot


def moved_blobs(snapshot: Path, tmp_path: Path) -> Path:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    return snapshot


@pytest.mark.parametrize("reach", [lambda snapshot, _: snapshot, through_link, moved_cache, moved_blobs])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_cache_full_of_links_is_a_model(
    tiny: Callable[..., Path], tmp_path: Path, reach: Callable[[Path, Path], Path], shards: int
) -> None:
    source = tiny("qwen3_vl", shards=shards)
    folder = reach(as_cache(source, tmp_path / "hub"), tmp_path)
    assert resolve_components(folder).parameters == resolve_components(source).parameters
    assert base_name(folder) == "org/name"
    assert load_model(folder) is not None
    out = quantize(folder, "rtn-w3", tmp_path / "out").path
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_an_empty_snapshot_says_what_is_downloaded(tiny_llava: Path, tmp_path: Path) -> None:
    snapshot = as_cache(tiny_llava, tmp_path)
    (snapshot / "model.safetensors").unlink()
    assert "Only safetensors are downloaded from the hub" in refusal(snapshot)


def test_links_to_another_place_are_still_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(tmp_path / "other.safetensors")
    (copy / "any-name.safetensors").symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="symbolic link that leads out of the model directory"):
        open_shards(copy)
