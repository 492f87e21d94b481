"""Recipes: what is shipped loads, what is wrong is named with its place."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlmquant.algorithms import ALGORITHMS
from vlmquant.errors import EXIT_USAGE, RecipeError
from vlmquant.recipe import METHODS, SHORT_SCHEMES, Override, Scheme, load_recipe, parse_recipe, shipped

SHIPPED = sorted(shipped("recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_under_its_name(path: Path) -> None:
    assert load_recipe(path).name == path.stem
    assert load_recipe(path.stem) == load_recipe(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_a_recipe_that_means_the_same(path: Path) -> None:
    recipe = load_recipe(path)
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert parse_recipe(text, name="resolved") == recipe


def test_methods_are_the_algorithms_and_bitsandbytes() -> None:
    assert set(METHODS) == {*ALGORITHMS, "bitsandbytes"}


GOOD = "name: x\ncomponents:\n  language: {scheme: w4a16, method: gptq}\n"

WRONG = {
    "unknown key": (
        GOOD + "componets: 1\n",
        r"x\.yaml:4:1: unknown key 'componets', did you mean 'components'\?",
    ),
    "unknown key inside": (
        "name: x\ncomponents:\n  language:\n    scheme: {bits: 4, group_sise: 64}\n",
        r"x\.yaml:4:23: components\.language\.scheme: unknown key 'group_sise', did you mean 'group_size'\?",
    ),
    "wrong type": (
        "name: x\ncomponents:\n  language:\n    scheme: {bits: four}\n",
        r"x\.yaml:4:20: components\.language\.scheme\.bits: .*\(got 'four'\)",
    ),
    "unknown scheme": (
        "name: x\ncomponents:\n  language: w4a61\n",
        r"x\.yaml:3:13: components\.language.*unknown scheme 'w4a61', did you mean 'w4a16'\?",
    ),
    "missing key": ("components: {language: w4a16}\n", r"x\.yaml:1:1: key 'name' is missing"),
    "duplicate key": (GOOD + "name: y\n", r"x\.yaml:4:1: key 'name' stands twice \(first on line 1\)"),
    "alias": ("name: x\ncomponents:\n  language: &a w4a16\n  projector: *a\n", r"x\.yaml:\d+:\d+: YAML aliases"),
    "not a mapping": ("- 1\n", r"x\.yaml:1:1: a recipe is a mapping"),
    "not YAML": ("name: [x\n", r"x\.yaml:2:1: "),
    "bad range": (
        "name: x\ncomponents:\n  language:\n    scheme: w4a16\n    overrides:\n      - {layers: first, method: awq}\n",
        r"x\.yaml:6:18: components\.language\.overrides\.0\.layers: expected a range",
    ),
    "unsupported scheme": (
        "name: x\ncomponents:\n  language: {scheme: {bits: 4, activations: dynamic-int8}}\n",
        r"x\.yaml:3:\d+: components\.language\.scheme: dynamic-int8 activations need bits: 8",
    ),
    "mixed formats": (
        "name: x\ncomponents:\n  language: {scheme: nf4, method: bitsandbytes}\n",
        r"x\.yaml:1:1: nf4 and bnb-int8 need output",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text, name="x.yaml")
    assert caught.value.exit_code == EXIT_USAGE
    assert "Traceback" not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    message = ""
    try:
        parse_recipe(text, name="fuzz")
    except RecipeError as error:  # anything else fails the test
        message = str(error)
    assert not message or message.startswith("fuzz")


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'mixed'"):
        load_recipe("mixd")


@pytest.mark.parametrize(
    ("layers", "covered"),
    [
        (":", [0, 1, 2, 3]),
        ("0:2", [0, 1]),
        ("-1:", [3]),
        ("1:-1", [1, 2]),
        ("0:50%", [0, 1]),
        ("50%:", [2, 3]),
        ("9:", []),
    ],
)
def test_layer_ranges_are_half_open_as_in_python(layers: str, covered: list[int]) -> None:
    override = Override(layers=layers)
    assert [layer for layer in range(4) if override.covers(layer, 4, "mlp.up_proj")] == covered


def test_modules_are_globs() -> None:
    override = Override(modules=("mlp.down_proj", "self_attn.*"))
    assert override.covers(0, 1, "self_attn.q_proj")
    assert override.covers(0, 1, "mlp.down_proj")
    assert not override.covers(0, 1, "mlp.up_proj")


def test_short_schemes_say_what_they_are() -> None:
    assert {name: scheme.label for name, scheme in SHORT_SCHEMES.items()} == {
        "w3a16": "w3a16-g128",
        "w4a16": "w4a16-g128",
        "w4a16-asym": "w4a16-g128-asym",
        "w8a16": "w8a16",
        "w8": "w8a16",
        "w8a8-dynamic": "w8a8-dynamic",
    }
    assert Scheme(bits=4, group_size=64, symmetric=False).label == "w4a16-g64-asym"


def test_percentages_and_shares_are_the_same_threshold() -> None:
    by_percent = parse_recipe(GOOD + "gate: {max_perplexity_increase: 2.5%}\n", name="a")
    by_share = parse_recipe(GOOD + "gate: {max_perplexity_increase: 0.025}\n", name="b")
    assert by_percent.gate == by_share.gate


def test_a_scheme_written_out_is_judged_as_one() -> None:
    text = "version: 1\nname: x\ncomponents:\n  language: {scheme: {bits: 5}, method: gptq}\n"
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, name="r.yaml")
    assert str(error.value) == "r.yaml:4:29: components.language.scheme.bits: input should be 3, 4 or 8 (got 5)"
