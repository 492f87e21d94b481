"""Verify: what was added to a checkpoint is found, its manifest covers itself, and no manifest is a traceback."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.small_set import write_small_set
from tests.test_checkpoint import make_case
from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import image_hashes, load_set
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.checkpoint.manifest import sealed
from vlmquant.errors import CheckpointError
from vlmquant.pipeline import _refuse_calibration_images
from vlmquant.recipe import CalibrationSpec


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards, as a run with an image calibrated it; to be copied."""
    out = tmp_path_factory.mktemp("made") / "out"
    case = make_case(tiny("llava"))
    with case.writer(out) as writer:
        for block, unit in case.units.items():
            writer.add(block, *unit)
        writer.finish(
            {
                "calibration": {"sha256": "ab", "strata": [], "images": ["cd" * 32]},
                "errors": {"x": 0.25, "y": 1},
                "notes": ["a note"],
                "experts": {"layer": [1, 2]},
            }
        )
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def write_manifest(out: Path, content: Any) -> None:
    (out / "vlmquant.json").write_text(json.dumps(content))


def manifest_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "vlmquant.json").read_text()))


ADDED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.json",
    "additional_chat_templates/x.jinja",
    "evil.py",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "notes.txt",
    "my\nfile",
)


@pytest.mark.parametrize("name", ADDED)
def test_an_added_file_is_found(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    found = [problem for problem in verify_checkpoint(out) if problem.endswith(": not in the manifest")]
    assert any(name.split("\n")[0] in problem and "\n" not in problem for problem in found)


def test_links_pipes_and_folders_are_found(out: Path) -> None:
    (out / "folder").symlink_to("/etc")
    (out / "template.jinja").symlink_to("/etc/hostname")
    os.mkfifo(out / "pipe")
    (out / "empty").mkdir()
    found = {Path(problem.split(": ")[0]).name for problem in verify_checkpoint(out)}
    assert found == {"folder", "template.jinja", "pipe", "empty"}


def test_a_file_that_became_a_link_out_of_the_checkpoint_is_found(out: Path, tmp_path: Path) -> None:
    (out / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (out / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (problem,) = verify_checkpoint(out)
    assert "tokenizer.json: is a symbolic link that leads out" in problem


def test_hidden_files_are_no_matter(out: Path) -> None:
    for name in (".DS_Store", ".git/config", ".cache/huggingface/download/x.metadata", ".gitattributes"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    assert verify_checkpoint(out) == []


def change_images(content: dict[str, Any]) -> None:
    content["calibration"]["images"] = []


def change_gate(content: dict[str, Any]) -> None:
    content["recipe"]["gate"]["max_kl"] = 9.0


def change_notes(content: dict[str, Any]) -> None:
    content["notes"].clear()


def change_file(content: dict[str, Any]) -> None:
    del content["files"]["tokenizer.json"]


def add_key(content: dict[str, Any]) -> None:
    content["verified_by"] = "me"


@pytest.mark.parametrize("change", [change_images, change_gate, change_notes, change_file, add_key])
def test_a_changed_manifest_is_found_by_all_who_read_it(out: Path, tmp_path: Path, change: Callable[..., None]) -> None:
    content = manifest_of(out)
    change(content)
    write_manifest(out, content)
    assert any("differs from its own manifest_sha256" in problem for problem in verify_checkpoint(out))
    with pytest.raises(CheckpointError, match=r"vlmquant\.json: differs from its own manifest_sha256"):
        read_manifest(out)
    selection = choose_samples(
        load_set(write_small_set(tmp_path / "set", pairs=1, texts=0)), CalibrationSpec(samples=1)
    )
    with pytest.raises(CheckpointError, match="differs from its own"):
        _refuse_calibration_images(out, selection, tmp_path / "set")


def test_how_the_manifest_is_laid_out_does_not_matter(out: Path) -> None:
    (out / "vlmquant.json").write_text(json.dumps(manifest_of(out), indent=7, sort_keys=True, ensure_ascii=True))
    assert verify_checkpoint(out) == []


def test_a_manifest_without_its_digest_is_none(out: Path) -> None:
    content = manifest_of(out)
    del content["manifest_sha256"]
    write_manifest(out, content)
    with pytest.raises(CheckpointError, match="lacks manifest_sha256; written by an older vlmquant or changed"):
        verify_checkpoint(out)


def test_the_format_that_the_manifest_names_switches_no_check_off(out: Path) -> None:
    content = manifest_of(out)
    content["recipe"]["output"]["format"] = "bitsandbytes"
    for part in content["recipe"]["components"].values():
        part["scheme"], part["overrides"] = "fp16", []
    content["recipe"]["components"]["language"]["scheme"] = "nf4"
    line = next(line for line in content["plan"]["lines"] if line["action"] == "quantize")
    line["shape"][0] += 8
    write_manifest(out, sealed(content))
    problems = "\n".join(verify_checkpoint(out))
    assert "its quant_method is compressed-tensors, but the recipe's output format is bitsandbytes" in problems
    assert f"{line['name']} has a scheme that bitsandbytes does not store" in problems
    assert "its scheme needs" in problems


def test_a_checkpoint_as_the_hub_s_cache_holds_it_is_whole(out: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(out.rglob("*"))):
        if file.is_file():
            file.rename(blobs / str(number))
            (snapshot / file.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file.relative_to(out)).symlink_to(blobs / str(number))
    assert verify_checkpoint(snapshot) == []


# What a manifest may hold


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values, of lists and of mappings with many keys the first one only."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in list(value)[: 1 if len(value) > 20 else None]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return copy


def test_whatever_a_sealed_manifest_holds_there_are_words_for_it(out: Path) -> None:
    content = manifest_of(out)
    for file in out.iterdir():
        if file.name not in ("config.json", "vlmquant.json"):
            file.unlink()
    save_file({"x.weight_scale": torch.ones(2, 2), "x.weight": torch.ones(2, 2)}, out / "model.safetensors")
    content["plan"]["lines"] = [line for line in content["plan"]["lines"] if line["action"] == "quantize"][:2]
    content["disk_names"] = {line["name"]: "x" for line in content["plan"]["lines"]}
    content["copied"] = {content["plan"]["lines"][0]["name"]: ["y"]}
    seen = refused = 0
    for path in places(content):
        for value in (None, True, -1, [[1]], {"x": []}):
            write_manifest(out, sealed(replaced(content, path, value)))
            seen += 1
            try:
                verify_checkpoint(out)
                manifest = read_manifest(out)
            except CheckpointError:
                refused += 1
            else:  # what is accepted can be worked with as its readers do
                assert all(isinstance(image, str) for image in (manifest.get("calibration") or {}).get("images", ()))
                assert isinstance(manifest["recipe"]["gate"], dict)
                assert all(isinstance(line["name"], str) for line in manifest["plan"]["lines"])
    assert seen > 400
    assert refused > seen / 3


def test_a_recipe_may_leave_out_what_has_a_default(out: Path) -> None:
    content = manifest_of(out)
    del content["recipe"]["output"]
    write_manifest(out, sealed(content))
    assert verify_checkpoint(out) == []


def test_names_of_any_length_are_told_in_a_line(out: Path) -> None:
    long = "x" * 100_000
    content = manifest_of(out)
    files = {**content["files"], f"{long}.safetensors": content["files"]["config.json"]}
    write_manifest(out, sealed({**content, "files": files}))
    (missing,) = verify_checkpoint(out)
    assert missing.endswith(": missing")
    line = {**content["plan"]["lines"][0], "name": long}
    plan = {**content["plan"], "lines": [*content["plan"]["lines"], line]}
    write_manifest(out, sealed({**content, "plan": plan}))
    with pytest.raises(CheckpointError, match="is not in disk_names") as caught:
        verify_checkpoint(out)
    assert max(len(missing), len(str(caught.value))) < 1000


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\0b"])
def test_a_file_name_that_leads_out_is_refused(out: Path, name: str) -> None:
    content = manifest_of(out)
    content["files"][name] = content["files"]["tokenizer.json"]
    write_manifest(out, sealed(content))
    with pytest.raises(CheckpointError, match=r"files\..*no plain path inside the checkpoint"):
        verify_checkpoint(out)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": 1, "a": 2}', '{"format_version": ' + "1" * 5000 + "}", "\ud800"]
)
def test_text_that_is_no_manifest_is_refused(out: Path, text: str) -> None:
    (out / "vlmquant.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"vlmquant\.json"):
        read_manifest(out)


def test_a_manifest_that_is_a_pipe_is_refused_at_once(out: Path) -> None:
    (out / "vlmquant.json").unlink()
    os.mkfifo(out / "vlmquant.json")
    with pytest.raises(CheckpointError, match="is a named pipe"):
        verify_checkpoint(out)


def test_images_of_the_calibration_are_refused_in_an_evaluation(out: Path, tmp_path: Path) -> None:
    samples = load_set(write_small_set(tmp_path / "set", pairs=2, texts=0))
    selection = choose_samples(samples, CalibrationSpec(samples=2))
    _refuse_calibration_images(out, selection, tmp_path / "set")
    content = manifest_of(out)
    content["calibration"]["images"] = list(image_hashes(selection.samples))[:1]
    write_manifest(out, sealed(content))
    with pytest.raises(Exception, match="1 of its images"):
        _refuse_calibration_images(out, selection, tmp_path / "set")
