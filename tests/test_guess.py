"""Where a model's parts are: guessed for models without a row, given by a user, refused with a way out."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import zoo
from vlmquant.checkpoint.assemble import card
from vlmquant.checkpoint.companions import find_companions
from vlmquant.cli import app
from vlmquant.components import resolve_components
from vlmquant.errors import InputError, RecipeError
from vlmquant.families import FAMILIES, from_spec
from vlmquant.pipeline import plan_model
from vlmquant.recipe import load_family, load_recipe, parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
LIKE_A_ROW = (
    "qwen3_5",
    "qwen3_vl_moe",
    "glm4v_moe",
    "llava_onevision",
    "gemma4",
    "kimi_k25",
    "deepseek_vl_hybrid",
    "ovis2",
    "ernie4_5_vl_moe",
    "blip-2",
    "qwen2_5_omni_thinker",
    "minicpmv4_6",
    "janus",
    "video_llava",
    "molmo2",
)


@pytest.mark.parametrize("kind", LIKE_A_ROW)
def test_the_guess_places_what_the_row_places(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = zoo.build(kind, tmp_path / "model")
    with_row = resolve_components(model_dir)
    monkeypatch.delitem(FAMILIES, kind)
    guessed = resolve_components(model_dir)
    assert (with_row.family.source, guessed.family.source) == ("table", "guess")
    assert guessed.blocks == with_row.blocks
    both = {
        one.name: (one.component, two.component)
        for one, two in zip(with_row.parameters, guessed.parameters, strict=True)
    }
    quantizable = ("vision_encoder", "language", "embedding", "lm_head")
    different = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    assert not [name for name, pair in different.items() if any(one in quantizable for one in pair)], different


@pytest.mark.parametrize(
    ("kind", "what"), [("chameleon", "vision encoder"), ("fuyu", "vision encoder"), ("udop", "language model")]
)
def test_a_refusal_names_the_type_the_parts_and_a_way_out(kind: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        resolve_components(zoo.build(kind, tmp_path / "model"))
    told = str(error.value)
    assert f"model type {kind}: found no {what} among its parts: " in told
    assert "--family" in told
    assert "vision_encoder, projector, language" in told
    parts = told.split("parts: ")[1].split(";")[0].split(", ")
    assert all(part.count(".") <= 1 for part in parts), "outermost modules, not leaves"


ROW = """
vision_encoder: [model.vision_tower]
projector: [model.multi_modal_projector]
language: model.language_model
"""


def test_a_users_row_takes_the_place_of_a_guess(tmp_path: Path) -> None:
    model_dir = zoo.build("aya_vision", tmp_path / "model")
    (tmp_path / "row.yaml").write_text(
        ROW.replace("projector: [model.multi_modal_projector]", "other: [model.multi_modal_projector]")
    )
    family = from_spec(load_family(tmp_path / "row.yaml"))
    components = resolve_components(model_dir, family=family)
    assert components.family.source == "recipe"
    owners = {one.component for one in components.parameters if "multi_modal_projector" in one.name}
    assert owners == {"other"}


def test_a_row_in_a_recipe_and_in_a_file_give_the_same_plan(tmp_path: Path) -> None:
    model_dir = zoo.build("aya_vision", tmp_path / "model")
    (tmp_path / "row.yaml").write_text(ROW)
    recipe = "version: 1\nname: x\ncomponents: {language: w4a16}\n"
    (tmp_path / "plain.yaml").write_text(recipe)
    (tmp_path / "with.yaml").write_text(recipe + "family:" + ROW.replace("\n", "\n  ") + "\n")
    by_file = CliRunner().invoke(
        app,
        ["plan", str(model_dir), "-r", str(tmp_path / "plain.yaml"), "--family", str(tmp_path / "row.yaml"), "--json"],
    )
    by_recipe = CliRunner().invoke(app, ["plan", str(model_dir), "-r", str(tmp_path / "with.yaml"), "--json"])
    assert (by_file.exit_code, by_recipe.exit_code) == (0, 0), by_file.output + by_recipe.output
    assert by_file.stdout == by_recipe.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vision_encoder: [a]\n", "row.yaml:1:1: key 'language' is missing"),
        ("language: a\nvision_encoder: []\n", "vision_encoder: .*at least 1"),
        ("language: a\nvision_encoders: [b]\n", "unknown key 'vision_encoders', did you mean 'vision_encoder'"),
        ("- a\n", "a family is a mapping"),
    ],
)
def test_a_bad_row_is_told_by_place(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "row.yaml").write_text(text)
    with pytest.raises(RecipeError, match=told):
        load_family(tmp_path / "row.yaml")


def test_a_recipe_with_a_row_is_read(tmp_path: Path) -> None:
    recipe = parse_recipe(
        f"version: 1\nname: x\ncomponents: {{}}\nfamily:{ROW.replace(chr(10), chr(10) + '  ')}\n", name="x"
    )
    assert recipe.family is not None
    assert recipe.family.language == "model.language_model"


def test_a_guess_is_shown(tmp_path: Path, tiny_llava: Path) -> None:
    model_dir = zoo.build("aya_vision", tmp_path / "model")
    shown = CliRunner().invoke(app, ["inspect", str(model_dir)])
    assert shown.exit_code == 0, shown.output
    assert "parts (guessed)" in shown.stdout
    assert "model.vision_tower" in shown.stdout
    assert "parts (in the table of families)" in CliRunner().invoke(app, ["inspect", str(tiny_llava)]).stdout
    planned = CliRunner().invoke(app, ["plan", str(model_dir), "-r", "mixed", "--json"])
    assert "its parts were guessed" in planned.stdout


@pytest.mark.parametrize(
    ("kind", "auto"), [("phi4_multimodal", "AutoModelForMultimodalLM"), ("qwen3_5", "AutoModelForImageTextToText")]
)
def test_a_card_names_the_class_that_loads_it(kind: str, auto: str, tmp_path: Path) -> None:
    recipe = load_recipe("mixed")
    components, plan = plan_model(zoo.build(kind, tmp_path / "model"), recipe)
    text = card(components, recipe, plan, find_companions(components))
    assert f"from transformers import {auto}\n" in text
    assert f"model = {auto}.from_pretrained(" in text


def test_families_are_listed() -> None:
    listed = CliRunner().invoke(app, ["inspect", "--families"])
    assert listed.exit_code == 0
    assert "qwen3_5_moe" in listed.stdout
    assert CliRunner().invoke(app, ["inspect"]).exit_code != 0
