"""recommend: against what the hardware has, sums made by hand, and what `plan` and `quantize` make of its answer."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from vlmquant.pipeline import plan_model
from vlmquant.planning import Plan
from vlmquant.recipe import load_recipe, shipped
from vlmquant.recommend import CANDIDATES, GUIDE, ORIGINAL, parse_gpu
from vlmquant.serving import USABLE

SMALL = ("--context", "100", "--image-size", "64x48")
HOPPER = ("--accuracy", "--gpu", "hopper")
CACHE = 2 * 2 * 2 * 64 * (100 + 4) * 2
"""Of one sequence: keys and values of two layers, two heads of 64, 104 tokens, 16 bits."""


def planned(model: Path, recipe: str) -> Plan:
    return plan_model(model, load_recipe(recipe))[1]


def found(run: Run, model: Path, *options: object) -> dict[str, Any]:
    code, out, err = run("recommend", model, *SMALL, *options, "--json")
    assert code in (0, 6), err
    return json.loads(out)  # type: ignore[no-any-return]


def memory_for(weights: int, *, batch: int = 1) -> str:
    """The least memory of a GPU of which 90 % hold these weights and the cache."""
    return f"{int((weights + batch * CACHE) / USABLE) + 2}B"


def test_where_16_bits_fit_they_stay(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    original = sum(line.bytes_before for line in planned(tiny_llava, "mixed").lines)
    enough = memory_for(original)
    for goal in ((), ("--accuracy",)):
        answer = found(run, tiny_llava, "--gpu-memory", enough, *goal)
        assert answer["recommended"] is None
        assert answer["fits"]
        assert answer["candidates"][0]["bytes"] == original
    code, out, _ = run(
        "recommend", tiny_llava, *SMALL, "--gpu-memory", enough, "--out", tmp_path / "recipe.yaml", "--batch", 1
    )
    assert code == 0
    assert "the model as it is, at 16 bits. 16 bits fit, so nothing has to be lost" in out
    assert "recipe.yaml is not written" in out
    assert list(tmp_path.iterdir()) == []
    less = found(run, tiny_llava, "--gpu-memory", memory_for(original - 100))
    assert less["recommended"] == "mixed"
    assert f"not {ORIGINAL}, whose" in less["reason"]


@pytest.mark.parametrize(
    ("gpu", "recipe"),
    [
        ("hopper", "hopper-fp8"),
        ("ada", "hopper-fp8"),
        ("blackwell", "hopper-fp8"),
        ("ampere", "int8"),
        ("sm_86", "int8"),
        ("turing", "int8"),
        ("cpu", "turing-int8"),
    ],
)
def test_latency_takes_the_8_bits_that_the_card_multiplies(run: Run, tiny_llava: Path, gpu: str, recipe: str) -> None:
    """FP8 from Ada on, INT8 from Turing to Hopper; no CPU of vLLM's has an embedding of 8 bits."""
    answer = found(run, tiny_llava, "--gpu-memory", "24GB", "--gpu", gpu, "--latency")
    assert answer["recommended"] == recipe
    if gpu == "ampere":
        assert "hopper-fp8" in answer["reason"]
        assert "weight-only" in answer["reason"]


def test_with_less_memory_come_fewer_bits(run: Run, tiny_llava: Path) -> None:
    sizes = {name: planned(tiny_llava, name).bytes_after for name in ("hopper-fp8", "gptq-w4", "mixed", "w3")}
    assert sizes["hopper-fp8"] > sizes["mixed"] > sizes["w3"]
    for recipe in ("gptq-w4", "mixed"):
        answer = found(run, tiny_llava, "--gpu-memory", memory_for(sizes[recipe]), "--accuracy", "--gpu", "ampere")
        fitting = [one["recipe"] for one in answer["candidates"] if one["fits"]]
        assert answer["recommended"] == fitting[0]
        assert all(sizes.get(name, 0) <= sizes[recipe] for name in fitting)
    assert answer["recommended"] == "mixed"
    assert "GPTQ" in answer["reason"]
    answer = found(run, tiny_llava, "--gpu-memory", memory_for(sizes["w3"]))
    assert answer["recommended"] == "w3"


def test_accuracy_first_goes_by_what_was_lost() -> None:
    """8 bits before GPTQ before AWQ: no candidate has a KL that is surely lower than that of one before it."""
    rows = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "reference.json").read_text())["rows"]
    lost = {row["method"]: row["KL"] for row in rows if row["KL"]}
    order = [name for name in GUIDE["accuracy"] if name in lost]
    assert order == ["int8", "gptq-w4", "mixed", "awq-w4", "mixed-awq", "w3"]
    for number, earlier in enumerate(order):
        for later in order[number + 1 :]:
            assert lost[later]["high"] > lost[earlier]["low"], (earlier, later)
    assert lost["int8"]["high"] < lost["gptq-w4"]["low"]
    assert max(lost[name]["high"] for name in ("gptq-w4", "mixed")) < lost["awq-w4"]["low"]


def test_accuracy_first_says_that_8_bits_come_before_4(run: Run, tiny_llava: Path) -> None:
    _, out, _ = run("recommend", "--help")
    assert "the most bits that fit, 8 before 4, since 4 always lose more; of 4, GPTQ's" in " ".join(out.split())
    answer = found(run, tiny_llava, "--gpu-memory", memory_for(planned(tiny_llava, "hopper-fp8").bytes_after), *HOPPER)
    assert answer["recommended"] == "hopper-fp8"
    assert "as 8 lose less than any 4; of 4, GPTQ's are the best" in answer["reason"]


def test_its_numbers_are_those_of_plan(run: Run, tiny_llava: Path) -> None:
    options = ("--gpu-memory", "50MB", "--batch", 3)
    answer = found(run, tiny_llava, *options, "--gpu", "ampere")
    for one in answer["candidates"]:
        if one["recipe"] is not None:
            _, out, _ = run("plan", tiny_llava, "-r", one["recipe"], *SMALL, *options, "--json")
            assert json.loads(out)["serving"] == one["serving"]
            assert one["serving"]["cache_bytes"] == 3 * CACHE


def test_the_recipe_it_writes_is_one_that_quantize_takes(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    options = ("--gpu-memory", "24GB", "--gpu", "hopper", "--latency")
    code, out, _ = run("recommend", tiny_llava, *SMALL, *options, "--out", file)
    assert code == 0
    assert f"--recipe {file}" in " ".join(out.split())
    recipe, original = load_recipe(file), load_recipe("hopper-fp8")
    assert recipe.components == original.components
    assert recipe.target is not None
    assert (recipe.target.engine, recipe.target.gpu, recipe.target.tp) == ("vllm", "sm_90", 1)
    assert file.read_text().startswith("# `vlmquant recommend` for model on 1 GPU (sm_90) of 24.00 GB")
    assert "latency comes first" in file.read_text().splitlines()[1]
    code, _, err = run("quantize", tiny_llava, "-r", file, "--out", tmp_path / "out")
    assert code == 0, err
    code, _, err = run("recommend", tiny_llava, *SMALL, *options, "--out", file)
    assert code == 2
    assert "is there already" in err


def test_where_nothing_fits_it_says_what_would(run: Run, tiny_llava: Path) -> None:
    options = ("--gpu", "ampere", "--batch", 4)
    code, out, err = run("recommend", tiny_llava, *SMALL, "--gpu-memory", "20KB", *options)
    assert code == 6
    assert "does not fit" in out
    said = re.search(r"nothing fits: the smallest that can be served, w3, takes .* a GPU of ([0-9.]+ MB)", err)
    assert said is not None, err
    assert found(run, tiny_llava, "--gpu-memory", said[1], *options)["recommended"] == "w3"
    just_less = f"{float(said[1].removesuffix(' MB')) - 0.02:.2f}MB"
    assert not found(run, tiny_llava, "--gpu-memory", just_less, *options)["fits"]


def test_more_gpus_are_offered_where_they_would_do(run: Run, tiny_llava: Path) -> None:
    too_little = f"{int(planned(tiny_llava, 'w3').bytes_after / USABLE) - 1000}B"
    answer = found(run, tiny_llava, "--gpu-memory", too_little)
    assert not answer["fits"]
    assert "or 2 GPUs of this size (--tp 2) would do" in answer["reason"]
    assert found(run, tiny_llava, "--gpu-memory", too_little, "--tp", 2)["fits"]


def test_every_goal_knows_every_candidate() -> None:
    names = {file.stem for file in shipped("recipes").glob("*.yaml")}
    for order in GUIDE.values():
        assert sorted(order) == sorted(CANDIDATES)
    assert set(CANDIDATES) - {ORIGINAL} <= names


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--latency", "--accuracy", "--gpu", "hopper"), "either --latency or --accuracy"),
        (("--latency",), "what is fast depends on the card; give --gpu"),
        (("--gpu", "voodoo"), "expected blackwell, hopper, ada, ampere, turing, cpu or a compute capability"),
        (("--engine", "llamacpp", "--gpu", "hopper"), "give --engine vllm"),
    ],
)
def test_calls_that_mean_nothing(run: Run, tiny_llava: Path, options: tuple[str, ...], what: str) -> None:
    code, _, err = run("recommend", tiny_llava, "--gpu-memory", "24GB", *options)
    assert code == 2
    assert what in err


def test_names_of_generations() -> None:
    assert [parse_gpu(name) for name in ("Hopper", "ampere", "sm_120", "cpu")] == ["sm_90", "sm_80", "sm_120", "cpu"]
