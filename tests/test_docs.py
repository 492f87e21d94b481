"""docs/: what is made from code and results is up to date, and says what is so."""

import json
import re
from pathlib import Path

import pytest

from docs import fill
from vlmquant import errors
from vlmquant.recipe import GateSpec, shipped

ROOT = Path(__file__).parents[1]
UP_TO_DATE = fill.pages()


@pytest.mark.parametrize("file", UP_TO_DATE, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_page_is_up_to_date(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == UP_TO_DATE[file], "run: python docs/fill.py"


def test_what_was_changed_by_hand_is_found() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    changed = text.replace("| `w4a16` | INT4 |", "| `w4a16` | INT5 |")
    assert changed != text
    assert fill.filled(changed) == fill.filled(text) == text
    assert fill.filled(text.replace("| `w4afp8`", "| `w4afp9`")) == text


def test_every_page_of_a_model_is_made() -> None:
    here = {file.stem for file in (ROOT / "docs" / "models").glob("*.md")}
    assert here == set(fill.PAGES)


def test_schemes_as_they_are_known() -> None:
    rows = {line.split(" | ")[0].strip("| `"): line for line in fill.schemes().splitlines()}
    assert rows["w8a8-dynamic"] == "| `w8a8-dynamic` | INT8 | channel | dynamic-int8 | by the method |"
    assert rows["w4a16-asym"] == "| `w4a16-asym` | INT4, with zero points | 128 inputs | 16 bit | by the method |"
    assert rows["fp8-block"].startswith("| `fp8-block` | FP8 | 128 x 128 |")
    assert rows["nvfp4"].endswith("| nvfp4 | yes |")


def test_gate_keys_are_those_a_recipe_takes() -> None:
    named = re.findall(r"^\| `(\w+)`", fill.CODE["gate_keys"](), re.MULTILINE)
    assert sorted(named) == sorted(GateSpec.model_fields)
    assert "max_perplexity_increase" in named
    assert "Mean KL(reference" in fill.CODE["gate_keys"]()


def test_every_exit_code_is_told() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_") and isinstance(value, int)}
    told = dict(re.findall(r"^\| (\d+) \| (.+) \|$", fill.exit_codes(), re.MULTILINE))
    assert {int(code) for code in told} == codes
    assert told["6"] == "not enough memory or disk"
    assert all(len(text) > 3 for text in told.values())


def test_every_variable_is_told() -> None:
    assert {name: told for name, told in fill.variables().items() if not told} == {}
    assert "VLMQUANT_DISABLE_HF_PATCH" in fill.environment()


def test_every_command_is_in_the_reference() -> None:
    text = fill.command_reference()
    for name, _ in fill.commands():
        assert f"## vlmquant {name}\n" in text
    assert "`--gpu-memory`" in text
    assert "vlmquant recommend org/model --gpu-memory 24GB --gpu hopper\n" in text


def test_the_recipes_are_told_in_their_own_words() -> None:
    names = re.findall(r"^\| `([^`]+)` \| (.+) \|$", fill.recipes(), re.MULTILINE)
    files = sorted(shipped("recipes").glob("*.yaml"))
    assert [name for name, _ in names] == [file.stem for file in files]


def test_sizes_against_sums_made_by_hand() -> None:
    """Qwen2.5-VL 7B: 28 layers of 3584 x (2 x 3584 + 2 x 512 + 3 x 18944), and two tables of 152064 x 3584."""
    models = json.loads(fill.SIZES.read_text())["models"]
    found = models["Qwen2.5-VL 7B"]
    language = 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18_944)
    vision = 32 * 1280 * (4 * 1280 + 3 * 3420)
    merger = 5120 * 5120 + 5120 * 3584
    by_hand = language + vision + merger + 2 * 152_064 * 3584
    assert found["parameters"] == pytest.approx(by_hand, rel=2e-3)
    assert found["parameters"] == pytest.approx(8.29e9, rel=1e-3)
    quantized = language * (4 + 16 / 128) / 8 + vision + 2 * (merger + 2 * 152_064 * 3584)
    assert found["recipes"]["mixed"]["bytes"] == pytest.approx(quantized, rel=2e-3)
    assert found["cache_bytes"] == 28 * 2 * 512 * 4096 * 2


@pytest.mark.slow
def test_sizes_as_planned_now(tmp_path: Path) -> None:
    from benchmarks.model_sizes import measure

    models = json.loads(fill.SIZES.read_text())["models"]
    assert measure("SmolVLM2 2.2B", tmp_path / "model") == models["SmolVLM2 2.2B"]


def test_time_and_memory_against_sums_made_by_hand() -> None:
    """Qwen2.5-VL 7B: 128 samples x 1,200 tokens, and 4 patches for each of 1,024 image tokens; all kept in memory."""
    found = json.loads(fill.WORK.read_text())
    assumed = [found[key] for key in ("samples", "image_tokens", "text_tokens", "dtype")]
    assert assumed == [128, 1024, 176, "float32"]
    tokens, patches = 128 * 1200, 128 * 4 * 1024
    vision = patches * 32 * 1280 * (4 * 1280 + 3 * 3420)
    passes = tokens * 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18_944)
    squares = 3 * 3584**2 + 18_944**2  # columns of q/k/v, o, gate/up and down
    moments = tokens * 28 * squares
    feedback = 28 * ((4608 + 3584 + 2 * 18_944) * 3584**2 + 3584 * 18_944**2)
    factors = 28 * (3 * 3584**3 + 18_944**3) / 3
    inputs = patches * 2 * 3 * 14**2 * 4  # patches of two frames in float32
    by_hand = {
        "fast": vision + passes + 0.62 * moments + feedback + factors,
        # Through the original as well; second moments of both models' inputs; solved by twice.
        "default": 2 * (vision + passes) + 1.62 * moments + 5 * feedback + 2 * factors,
    }
    for chains, (effort, products) in enumerate(by_hand.items(), 1):
        kept, least = found["models"]["7B"]["efforts"][effort]
        assert kept["seconds"][0] * found["products_per_second"] == pytest.approx(products, rel=0.02)
        assert kept["peak_bytes"] > chains * tokens * (4 * 3584 + 18_944) * 4 + inputs
        assert least["peak_bytes"] < kept["peak_bytes"] / 2
        assert least["seconds"][0] > kept["seconds"][0]


def test_time_and_memory_are_told_with_what_is_assumed() -> None:
    text = fill.time_and_memory()
    assert re.findall(r"^\| (\S+ \w+) \|", text, re.MULTILINE) == ["InternVL3 1B", "Qwen2.5-VL 7B", "Qwen2.5-VL 72B"]
    assert text.count("| fast |") == text.count("| default |") == 3
    told = " ".join(text.rpartition("|\n")[2].split())
    machine = json.loads(fill.WORK.read_text())["environment"]["cpu"]
    for part in ("128 samples", "1,024 image tokens", "one thread", machine, "billion float32 products"):
        assert part in told
    assert fill.hours((3600, 36_000)) == "1.0 to 10.0 h"


@pytest.mark.slow
def test_memory_as_planned_now(tmp_path: Path) -> None:
    from benchmarks.plan_sizes import MODELS, measure

    found = json.loads(fill.WORK.read_text())
    for size in ("1B", "7B"):
        now = measure(MODELS[size], tmp_path / size, base=found["base_bytes"])
        for effort, ways in found["models"][size]["efforts"].items():
            assert [way["phases"] for way in now["efforts"][effort]] == [way["phases"] for way in ways]


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "report.png").stat().st_size < 300_000
