"""The model card: what it says, from which revision, and what an evaluation may change of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from tests import fake_runs
from tests.written import lasting
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.checkpoint.card import check_card, record_evaluation
from vlmquant.checkpoint.files import sha256_of
from vlmquant.components import locate_model
from vlmquant.errors import CheckpointError, InputError
from vlmquant.pipeline import MODEL, put_into_card, quantize
from vlmquant.recipe import parse_recipe
from vlmquant.report.data import Report

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
RECIPE = """
version: 1
name: plain
components:
  vision_encoder: {scheme: w8a8-dynamic, method: rtn}
  language: w4a16
target: {engine: vllm, gpu: sm_80}
"""


def as_repository(models: dict[str, Path], hub: Path) -> None:
    """org/name in the hub's cache, with a commit for each model, and the first as its branch main and its tag v1."""
    repository = hub / "models--org--name"
    for commit, model in models.items():
        shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(next(iter(models)))


@pytest.fixture(scope="module")
def written(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made from a commit of the hub; not to be changed."""
    hub = tmp_path_factory.mktemp("hub")
    as_repository({SHA: tiny_llava}, hub)
    snapshot = hub / "models--org--name" / "snapshots" / SHA
    command = ["vlmquant", "quantize", MODEL, "--recipe", "plain"]
    recipe = parse_recipe(RECIPE, name="recipe")
    return quantize(snapshot, recipe, hub / "out", command=command).path


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def front_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_card_says_from_what_and_how_it_was_made(written: Path) -> None:
    card = (written / "README.md").read_text()
    front = front_of(card)
    assert (front["base_model"], front["base_model_revision"]) == ("org/name", SHA)
    assert front["base_model_relation"] == "quantized"
    assert f"https://huggingface.co/org/name) at revision `{SHA}`" in card
    assert f"```sh\nvlmquant quantize org/name@{SHA} --recipe plain --out OUT\n```" in card
    assert "| language | w4a16-g128 (rtn) ×14" in card
    assert "No calibration data was used." in card
    assert "import vlmquant" in card
    assert "vllm serve path/to/this/directory\n" in card
    manifest = read_manifest(written)
    assert manifest["base_revision"] == SHA
    assert manifest["command"][2] == f"org/name@{SHA}"


def test_the_card_says_how_to_load_it(written: Path, tiny_llava: Path, tmp_path: Path) -> None:
    """transformers alone runs no quantized vision encoder (FORMATS of compressed-tensors, `generate` with an image)."""
    card = (written / "README.md").read_text()
    assert "Do not leave out `import vlmquant`" in card
    assert "generate with an image calls a quantized vision encoder before it is dequantized and fails" in card
    assert "in an environment of its own" in card
    assert "inputs are rounded to 8 bits on CPUs with AMX; set VLLM_CPU_INT4_W4A8=0 for the server." in card
    recipe = parse_recipe("name: language\ncomponents: {language: fp8-dynamic}", name="recipe")
    other = (quantize(tiny_llava, recipe, tmp_path / "out").path / "README.md").read_text()
    assert "Without `import vlmquant` transformers dequantizes it to 16 bits in memory." in other
    assert "W4A8" not in other


def test_another_run_has_the_same_card_and_manifest(written: Path, tmp_path: Path) -> None:
    """Neither card nor manifest says where the output went or how often the run was begun."""
    again = quantize(
        written.parent / "models--org--name" / "snapshots" / SHA,
        parse_recipe(RECIPE, name="recipe"),
        tmp_path / "elsewhere",
        command=["vlmquant", "quantize", MODEL, "--recipe", "plain"],
        resume=True,
    ).path
    assert (again / "README.md").read_bytes() == (written / "README.md").read_bytes()
    assert lasting(again) == lasting(written)


@pytest.mark.parametrize("suffix", ["", "@main", "@v1", f"@{SHA}"])
def test_a_hub_id_may_name_a_revision(
    suffix: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    as_repository({SHA: tiny_llava, OTHER: tiny_llava}, hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    assert locate_model(f"org/name{suffix}").name == SHA
    assert locate_model(f"org/name@{OTHER}").name == OTHER


@pytest.mark.parametrize("name", ["org/name@v9", "org/name@", "org/name@-x", "org/name@../main", "org@v1/name"])
def test_a_revision_that_is_none_is_refused(
    name: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_repository({SHA: tiny_llava}, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="no such directory"):
        locate_model(name)


def a_report(*, nll: float) -> Report:
    """A candidate that is worse by so many nats a token than its reference, made by a recipe that allows 2 %."""
    reference = fake_runs.captions(60, seed=1)
    gate = {"max_perplexity_increase": 0.02}
    candidate = fake_runs.run("w4", fake_runs.degraded(reference, seed=2, nll=nll), manifest={"recipe": {"gate": gate}})
    return fake_runs.report(reference, candidate)


def test_an_evaluation_is_put_into_the_card_and_verify_still_passes(out: Path) -> None:
    before = (out / "README.md").read_text()
    put_into_card(a_report(nll=0.0), out)
    card = (out / "README.md").read_text()
    assert card.startswith(before.rstrip())
    assert "## What it cost" in card
    assert "| w4 | " in card
    assert "**Gate: ✅ pass**" in card
    assert "ab" * 32 in card
    assert verify_checkpoint(out) == []
    assert read_manifest(out)["evaluation"]["gate"] == "pass"
    put_into_card(a_report(nll=0.5), out)
    again = (out / "README.md").read_text()
    assert again.count("## What it cost") == 1
    assert "**Gate: ❌ fail**" in again
    assert "✅" not in again
    assert verify_checkpoint(out) == []
    assert read_manifest(out)["evaluation"]["gate"] == "fail"
    assert sha256_of(out / "README.md") == read_manifest(out)["files"]["README.md"]["sha256"]


def test_a_card_that_is_not_ours_any_more_is_left_alone(out: Path) -> None:
    (out / "README.md").write_text((out / "README.md").read_text().replace("Load it", "Do load it"))
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    for act in (lambda: check_card(out), lambda: put_into_card(a_report(nll=0.0), out)):
        with pytest.raises(CheckpointError, match=r"README\.md: is not the card that vlmquant wrote there"):
            act()
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_a_run_that_ended_between_card_and_manifest_is_made_good_by_the_next(out: Path) -> None:
    manifest = (out / "vlmquant.json").read_bytes()
    record_evaluation(out, {"gate": None}, "text")
    (out / "vlmquant.json").write_bytes(manifest)
    assert verify_checkpoint(out) != []
    record_evaluation(out, {"gate": None}, "another text <!-- vlmquant eval: end -->")
    assert verify_checkpoint(out) == []
    assert (out / "README.md").read_text().count("eval: end") == 1
    record_evaluation(out, {"gate": None}, "a third")
    assert "another text" not in (out / "README.md").read_text()


def test_a_changed_manifest_is_not_sealed_anew(out: Path) -> None:
    manifest = json.loads((out / "vlmquant.json").read_text())
    manifest["notes"] = ["planted"]
    (out / "vlmquant.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest_sha256"):
        record_evaluation(out, {"gate": None}, "text")
