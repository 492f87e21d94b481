"""Recipes: what is shipped loads, what is wrong is named with its place."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests import zoo
from tests.conftest import Run
from vlmquant.algorithms import ALGORITHMS
from vlmquant.components import resolve_components
from vlmquant.errors import EXIT_USAGE, RecipeError
from vlmquant.pipeline import plan_model
from vlmquant.planning import make_plan
from vlmquant.recipe import (
    METHODS,
    SHORT_SCHEMES,
    Override,
    Recipe,
    Scheme,
    load_family,
    load_recipe,
    parse_recipe,
    shipped,
)

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
        r"x\.yaml:3:\d+: components\.language\.scheme: dynamic-int8 activations need type: int, bits: 8",
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
        "w2a16": "w2a16-g128",
        "w3a16": "w3a16-g128",
        "w4a16": "w4a16-g128",
        "w4a16-asym": "w4a16-g128-asym",
        "w5a16": "w5a16-g128",
        "w6a16": "w6a16-g128",
        "w7a16": "w7a16-g128",
        "w8a16": "w8a16",
        "w8": "w8a16",
        **{
            name: name
            for name in (
                *("w8a8-dynamic", "w8a8-static", "w4afp8", "fp8-dynamic", "fp8-static", "fp8-block"),
                *("nvfp4a16", "nvfp4", "mxfp4a16"),
            )
        },
    }
    assert Scheme(type="float", bits=8, group_size=None).label == "fp8a16"
    assert Scheme(bits=4, group_size=64, symmetric=False).label == "w4a16-g64-asym"


def test_percentages_and_shares_are_the_same_threshold() -> None:
    by_percent = parse_recipe(GOOD + "gate: {max_perplexity_increase: 2.5%}\n", name="a")
    by_share = parse_recipe(GOOD + "gate: {max_perplexity_increase: 0.025}\n", name="b")
    assert by_percent.gate == by_share.gate


def test_a_scheme_written_out_is_judged_as_one() -> None:
    text = "version: 1\nname: x\ncomponents:\n  language: {scheme: {bits: 9}, method: gptq}\n"
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, name="r.yaml")
    assert (
        str(error.value)
        == "r.yaml:4:29: components.language.scheme.bits: input should be 2, 3, 4, 5, 6, 7 or 8 (got 9)"
    )


# What strangers put into YAML

ODD = {
    "a tag of Python's": (
        "seed: !!python/object/apply:os.system [true]",
        "4:7: a value of YAML's kind 'python/object/apply:os.system'",
    ),
    "a tag that does not fit": ("seed: !!int x", r"4:7: not valid YAML \(invalid literal"),
    "a date": ("calibration: {set: 2026-01-05}", "4:20: a value of YAML's kind 'timestamp' is not allowed in recipes"),
    "a date that is none": ("calibration: {set: 2026-77-05}", "4:20: a value of YAML's kind 'timestamp'"),
    "bytes": ("family: {language: !!binary aGk=, vision_encoder: [x]}", "4:20: a value of YAML's kind 'binary'"),
    "a set": ("fallback: {when_indivisible: !!set {fp16}}", "4:30: a value of YAML's kind 'set'"),
    "pairs in order": ("calibration: {strata: !!omap [vqa: 3]}", "4:23: a value of YAML's kind 'omap'"),
    "a number of 7,000 digits": (
        f"calibration: {{samples: {'7' * 7000}}}",
        r"4:24: not valid YAML \(Exceeds the limit",
    ),
    "a number of 300 digits": (
        f"calibration: {{samples: {'7' * 300}}}",
        r"calibration\.samples: input should be less than",
    ),
    "a list for a key": ("? [a, b]\n: 1", "4:3: a key must be a word"),
    "a mapping for a key": ("? {a: b}\n: 1", "4:3: a key must be a word"),
    "a merge": ("gate: {<<: {max_kl: 1}}", "4:8: a key must be a word"),
    "nested lists": (f"gate: {'[' * 900}{']' * 900}", "4:70: nested more than 64 deep"),
    "nested mappings": (f"gate: {'{a: ' * 500}1{'}' * 500}", "nested more than 64 deep"),
    "half a surrogate pair": ('calibration: {set: "\\udc80"}', "not valid YAML"),
    "a control character": ("calibration: {set: \x07}", "not valid YAML"),
    "two documents": ("---\nname: y", "not valid YAML"),
    "a number for a key": ("5: 6", "keys should be strings"),
    "nothing for a key": ("null: 6", "keys should be strings"),
}


@pytest.mark.parametrize(("text", "message"), ODD.values(), ids=ODD)
def test_yaml_that_means_nothing_here_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^x\.yaml.*{message}") as caught:
        parse_recipe(GOOD + text, name="x.yaml")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "gate: {max_kl: true}",
        "gate: {max_kl: .inf}",
        "gate: {max_bleu_drop: .nan}",
        "gate: {max_perplexity_increase: 1e999}",
        f"gate: {{max_perplexity_increase: {'9' * 400}%}}",
        "gate: {max_perplexity_increase: 1.2.3%}",
        "gate: {max_flip_rate: -1%}",
        "gate: {max_exact_match_drop: many}",
        "gate: {alpha: .nan}",
        "calibration: {samples: '12'}",
        "calibration: {samples: 12.0}",
        "calibration: {seed: false}",
        "calibration: {set: 7}",
        "calibration: {strata: {vqa: yes}}",
        "calibration: {experts: {others_count: .inf}}",
        "fallback: {when_indivisible: fp16}",
        "components: 3",
        "version: true",
        "version: 1.0",
        "family: [a]",
        "output: {max_shard_size: 1e12}",
    ],
)
def test_values_of_another_type_and_numbers_that_are_none(text: str) -> None:
    plain = GOOD if not text.startswith("components") else "name: x\n"
    with pytest.raises(RecipeError, match=r"^x\.yaml:\d+:\d+: "):
        parse_recipe(plain + text, name="x.yaml")


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("2E-3", 2e-3), (".5", 0.5), ("1", 1.0), ("'0.1'", 0.1)]
)
def test_numbers_as_people_write_them(written: str, value: float) -> None:
    assert parse_recipe(GOOD + f"gate: {{max_kl: {written}}}", name="x").gate.max_kl == value


@pytest.mark.parametrize("layers", ["9" * 5000 + ":", ":" + "9" * 5000 + "%", "1234567890:", "٣:", "1:2:3"])
def test_ranges_that_are_none(layers: str) -> None:
    text = f'name: x\ncomponents:\n  language: {{scheme: w4a16, overrides: [{{layers: "{layers}", method: awq}}]}}\n'
    with pytest.raises(RecipeError, match=r"^x:3:50: .*expected a range") as caught:
        parse_recipe(text, name="x")
    assert len(str(caught.value)) < 500


def test_of_many_errors_the_first_are_told() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD + "".join(f"key{number}: 1\n" for number in range(3_000)), name="x.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "x.yaml:4:1: unknown key 'key0'"
    assert lines[-1] == "and 2,980 more of the kind"
    assert len(lines) == 21


def test_long_words_are_cut() -> None:
    for text in (GOOD + f"{'k' * 900}: 1\n", GOOD + f"gate: {'v' * 100_000}\n", GOOD.replace("w4a16", "s" * 100_000)):
        with pytest.raises(RecipeError, match=r"\.\.\.") as caught:
            parse_recipe(text, name="x.yaml")
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("load", [load_recipe, load_family])
def test_what_is_no_file_is_not_read(load: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "huge.yaml").write_text("# " + "x" * 1_000_001)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\n")
    for name in ("pipe", "folder", "huge", "binary", "none", "n" * 150):
        with pytest.raises(RecipeError, match=name):
            load(tmp_path / f"{name}.yaml")


def test_a_folder_of_its_name_does_not_hide_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixed").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mixed").name == "mixed"


@pytest.mark.parametrize(
    ("effort", "options", "aimed"),
    [
        ("", "", True),
        ("default", "", True),
        ("fast", "", False),
        ("high", "", True),
        ("fast", "target: outputs", True),
        ("", "target: weights", False),
        ("fast", "damping: 0.02", False),
    ],
)
def test_effort_decides_what_the_recipe_leaves_open(effort: str, options: str, aimed: bool, tiny_llava: Path) -> None:
    components = resolve_components(tiny_llava)
    line = f"effort: {effort}\n" if effort else ""
    text = f"name: t\n{line}components: {{language: {{scheme: w4a16, method: gptq, gptq: {{{options}}}}}}}\n"
    recipe = parse_recipe(text, name="t")
    again = Recipe.model_validate(recipe.model_dump(mode="json"))  # as a manifest keeps it
    for one in (recipe, again):
        lines = [line for line in make_plan(components, one).lines if line.action == "quantize"]
        assert {line.needs_original for line in lines if line.method == "gptq"} == {aimed}
    faster = make_plan(components, again.model_copy(update={"effort": "fast"})).lines
    assert {line.needs_original for line in faster if line.method == "gptq"} == {options == "target: outputs"}


def test_effort_of_the_command_line(run: Run, tiny_llava: Path) -> None:
    code, _, err = run("plan", tiny_llava, "-r", "gptq-w4", "--effort", "hihg")
    assert code == EXIT_USAGE
    assert "--effort: 'hihg' is none of fast, default, high" in err
    assert run("plan", tiny_llava, "-r", "gptq-w4", "--effort", "fast")[0] == 0


def test_a_mixture_has_a_second_pass_only_if_asked(tmp_path: Path) -> None:
    model = zoo.build("qwen3_vl_moe", tmp_path / "model")
    for options, wanted in (("", set()), (", gptq: {target: outputs}", {"self_attn"})):
        text = f"name: t\ncomponents: {{language: {{scheme: w4a16, method: gptq{options}}}}}\n"
        _, plan = plan_model(model, parse_recipe(text, name="t"))
        told = {line.name.split(".")[-3] for line in plan.lines if line.needs_original}
        assert told == wanted
        assert any(line.action == "quantize" and "experts" in line.name for line in plan.lines)


def test_only_layers_that_are_aimed_need_the_original(tiny_llava: Path) -> None:
    for text, wanted in (
        ("{scheme: w4a16, method: gptq}", True),
        ("{scheme: w4a16, method: awq+gptq}", True),
        ("{scheme: w4a16, method: awq}", True),
        ("{scheme: w4a16, method: awq, awq: {target: weights}}", False),
        ("{scheme: w4a16, method: awq, gptq: {target: weights}}", True),
        ("{scheme: w4a16, method: awq+gptq, awq: {target: weights}}", True),
        ("{scheme: w4a16, method: search}", False),
        ("{scheme: w4a16, method: rtn}", False),
    ):
        _, plan = plan_model(tiny_llava, parse_recipe(f"name: t\ncomponents: {{language: {text}}}\n", name="t"))
        told = {line.needs_original for line in plan.lines if line.action == "quantize"}
        assert told == {wanted}, text
        assert not any(line.needs_original for line in plan.lines if line.action == "keep")
