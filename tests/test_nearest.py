"""Suggestions are never wrong in meaning: by meaning, as a slip, or not at all."""

import pytest

from vlmquant.errors import RecipeError
from vlmquant.nearest import did_you_mean, distance, nearest
from vlmquant.recipe import METHODS, SCHEME_MEANINGS, SCHEME_NAMES, parse_recipe, shipped

RECIPES = sorted(file.stem for file in shipped("recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("w8a8", "w8a8-dynamic"),
        ("W4A16", "w4a16"),
        ("w4a61", "w4a16"),
        ("w4a15", None),
        ("w8a4", None),
        ("int4", "w4a16"),
    ],
)
def test_schemes(word: str, meant: str | None) -> None:
    assert nearest(word, SCHEME_NAMES, SCHEME_MEANINGS) == meant


@pytest.mark.parametrize(
    ("word", "meant"),
    [("gptqq", "gptq"), ("gtpq", "gptq"), ("qptq", None), ("rnt", "rtn"), ("aqw", "awq"), ("hqq", None)],
)
def test_methods(word: str, meant: str | None) -> None:
    assert nearest(word, METHODS) == meant


@pytest.mark.parametrize(
    ("word", "meant"), [("misxed", "mixed"), ("awq-w2", None), ("gptq-4w", "gptq-w4"), ("int8", "int8"), ("int4", None)]
)
def test_recipes(word: str, meant: str | None) -> None:
    assert nearest(word, RECIPES) == meant


def test_two_that_are_as_near_are_none() -> None:
    assert nearest("cat", ["can", "car"]) is None
    assert did_you_mean("cat", ["cart", "dog"]) == ", did you mean 'cart'?"
    assert did_you_mean("cat", []) == ""


@pytest.mark.parametrize(
    ("one", "other", "slips"), [("", "abc", 3), ("kitten", "sitting", 3), ("ca", "ac", 1), ("a" * 9, "a" * 9, 0)]
)
def test_distances_by_hand(one: str, other: str, slips: int) -> None:
    assert distance(one, other) == distance(other, one) == slips


def test_every_other_name_means_a_scheme() -> None:
    assert set(SCHEME_MEANINGS.values()) <= set(SCHEME_NAMES)
    assert not set(SCHEME_MEANINGS) & set(SCHEME_NAMES)


@pytest.mark.parametrize(
    ("body", "hint"),
    [("scheme: w4a16, method: gptqq", "'gptqq'.*did you mean 'gptq'"), ("scheme: w8a8", "did you mean 'w8a8-dynamic'")],
)
def test_a_recipe_says_what_was_meant(body: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        parse_recipe(f"name: r\ncomponents:\n  language: {{{body}}}\n", name="r.yaml")
