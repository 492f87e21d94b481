"""push: what is sent to the hub, what is refused before, and through which calls of huggingface_hub."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi
from typer.testing import CliRunner

from vlmquant.checkpoint import read_manifest
from vlmquant.checkpoint.card import record_evaluation
from vlmquant.cli import app
from vlmquant.errors import CheckpointError, InputError, UsageError
from vlmquant.pipeline import quantize
from vlmquant.publish import prepare, push


@pytest.fixture(scope="module")
def written(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tiny_llava, "rtn-w4", tmp_path_factory.mktemp("push") / "out").path


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def hub(*files: str) -> Any:
    """An API with huggingface_hub's own signatures, whose repository holds these files."""
    api = create_autospec(HfApi, instance=True)
    api.list_repo_files.return_value = [".gitattributes", *files]
    api.create_commit.return_value.commit_url = "https://huggingface.co/org/name/commit/1"
    return api


def test_everything_goes_in_one_commit(out: Path) -> None:
    (out / ".cache").mkdir()
    (out / ".cache" / "mine").write_text("not to be sent")
    api = hub("README.md", "model.safetensors")
    assert push(prepare(out, "org/name", private=True), api) == "https://huggingface.co/org/name/commit/1"
    api.create_repo.assert_called_once_with("org/name", private=True, exist_ok=True)
    (call,) = api.create_commit.call_args_list
    sent = {one.path_in_repo: Path(one.path_or_fileobj) for one in call.args[1]}
    assert set(sent) == {*read_manifest(out)["files"], "vlmquant.json"}
    assert all(path == out / name for name, path in sent.items())
    assert call.args[0] == "org/name"
    assert call.kwargs["commit_message"].startswith("rtn-w4 by vlmquant ")


def test_a_dry_run_lists_what_would_be_sent_and_sends_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmquant.publish.push", None)
    result = CliRunner().invoke(app, ["push", str(out), "org/name", "--dry-run", "--private", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    on_disk = {file.relative_to(out).as_posix(): file.stat().st_size for file in out.rglob("*") if file.is_file()}
    assert told["files"] == on_disk
    assert told["total_bytes"] == sum(on_disk.values())
    assert (told["repository"], told["private"], told["address"]) == ("org/name", True, None)
    assert "eval --card" in told["notes"][0]
    text = CliRunner().invoke(app, ["push", str(out), "org/name", "--dry-run"]).stdout
    for word in ("model.safetensors", "README.md", "org/name: nothing was sent"):
        assert word in text


def test_what_does_not_verify_is_not_sent(out: Path) -> None:
    with (out / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"nothing was sent, as the checkpoint does not verify: .*sha256 differs"):
        prepare(out, "org/name", private=False)
    result = CliRunner().invoke(app, ["push", str(out), "org/name", "--dry-run"])
    assert isinstance(result.exception, CheckpointError)


@pytest.mark.parametrize(("gate", "notes"), [("pass", 0), ("inconclusive", 1), (None, 1), ("fail", None)])
def test_what_failed_its_gate_is_not_sent(gate: str | None, notes: int | None, out: Path) -> None:
    record_evaluation(out, {"gate": gate}, "measured")
    if notes is None:
        with pytest.raises(CheckpointError, match=r"nothing was sent, as .* failed its gate"):
            prepare(out, "org/name", private=False)
    else:
        assert len(prepare(out, "org/name", private=False).notes) == notes


@pytest.mark.parametrize("name", ["name", "org/name@v1", "../name", "org/name/more", ""])
def test_a_repository_has_a_name_of_the_hub(name: str, out: Path) -> None:
    with pytest.raises(UsageError, match="is no repository of the hub"):
        prepare(out, name, private=False)


def test_weights_of_another_model_are_not_mixed_with_it(out: Path) -> None:
    api = hub("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    with pytest.raises(InputError, match=r"holds weights that are none of this checkpoint \(model-00001-of-00002"):
        push(prepare(out, "org/name", private=False), api)
    api.create_commit.assert_not_called()


def test_without_a_network_it_says_so(out: Path) -> None:
    """The tests run with HF_HUB_OFFLINE, so that this is the real API's own refusal."""
    with pytest.raises(InputError, match=r"push: org/name: .*hf auth login"):
        push(prepare(out, "org/name", private=False))
