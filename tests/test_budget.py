"""What quantizing takes: the way that is chosen, sums worked by hand, and the same bytes whatever it may hold."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import zoo
from tests.conftest import Run
from tests.small_set import write_small_set
from vlmquant import budget, gradients, pipeline, stream
from vlmquant.budget import WAYS, Limits, Prediction, choose, predict, ways
from vlmquant.checkpoint.manifest import read_manifest
from vlmquant.components import resolve_components
from vlmquant.errors import DoesNotFitError
from vlmquant.pipeline import plan_model
from vlmquant.recipe import load_recipe, parse_recipe
from vlmquant.stream import Footprint, Place, Stage, rows_together


def prediction(way: int, peak: int) -> Prediction:
    return Prediction(WAYS[way], {"language": peak}, 0, (1.0, 2.0), {"language": {"a stage": peak}})


def test_the_fastest_way_that_fits() -> None:
    ways = [prediction(0, 30), prediction(1, 20), prediction(2, 10)]
    assert choose(ways, Limits(30)) is ways[0]
    assert choose(ways, Limits(29)) is ways[1]
    assert choose(ways, Limits(10)) is ways[2]
    with pytest.raises(DoesNotFitError, match="in the language") as refused:
        choose([prediction(0, 3 << 30), prediction(2, 2 << 30)], Limits(1 << 30))
    assert "needs 2.00 GiB of memory at the least" in str(refused.value)
    assert refused.value.exit_code == 6
    on_gpu = [
        replace(way, device_phases={"vision": 5, "language": peak}) for way, peak in zip(ways, (9, 8, 7), strict=True)
    ]
    assert choose(on_gpu, Limits(30, 9)) is on_gpu[0]
    assert choose(on_gpu, Limits(30, 8)) is on_gpu[1]
    assert choose(on_gpu, Limits(15, 9)) is on_gpu[2]
    with pytest.raises(
        DoesNotFitError, match=r"of device memory at the least, in the language .*--device-memory-limit"
    ):
        choose(on_gpu, Limits(30, 6))


def test_a_peak_worked_by_hand(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The down projection of the tiny LLaVA: 256 rows and 384 inputs, of 1,000 tokens that are 256 wide."""
    components, plan = plan_model(tiny_llava, load_recipe("mixed").model_copy(update={"effort": "fast"}))
    place = Place(rows=1000, width=256, nbytes=1_024_000, largest_rows=100)
    footprint = Footprint({"language": place}, input_bytes=5_000)
    held = predict(components, plan, footprint, base=10_000, dtype=torch.float32, passes=WAYS[0])
    block = next(one for one in components.blocks if one.component == "language")
    attention, mlp = 2 * 256**2 + 2 * 256 * 128, 3 * 256 * 384
    norms = 2 * 256
    parts = held.parts["language"]
    assert parts["process"] == 10_000
    assert parts["weights of the block"] == 4 * (attention + norms + 2 * 256 * 384)
    assert parts["codes of the block"] == attention + mlp
    assert parts["a stage"] == 256 * 384 * 2 + 4 * 384**2 + 12 * 256 * 384 + 2 * 256 * 384
    assert parts["inside the passes"] == 1000 * (3 * 256 + 384) * 4
    assert parts["between blocks"] == 1_024_000 + 5_000
    again = predict(components, plan, footprint, base=10_000, dtype=torch.float32, passes=WAYS[1]).parts["language"]
    assert again["inside the passes"] == 100 * (3 * 256 + 384 + 3 * 384) * 4
    assert again["weights of the block"] == 4 * norms
    assert again["a stage"] == parts["a stage"]
    monkeypatch.setattr(budget, "ROW_ELEMENTS", 64 * 384)
    again = predict(components, plan, footprint, base=10_000, dtype=torch.float32, passes=WAYS[1]).parts["language"]
    few_rows, floats_of_the_up_projection = 12 * 64 * 384 + 2 * 256 * 384, 4 * 256 * 384
    assert again["a stage"] == 256 * 384 * 2 + 4 * 384**2 + max(few_rows, floats_of_the_up_projection)
    spilled = predict(components, plan, footprint, base=10_000, dtype=torch.float32, passes=WAYS[2])
    assert spilled.parts["language"]["between blocks"] == 0
    assert spilled.disk_bytes == held.disk_bytes + 2 * (1_024_000 + 5_000)
    assert held.peak_bytes == max(sum(one.values()) for one in held.parts.values())
    assert block.linears


def test_passes_of_the_original_model_are_counted(tiny_llava: Path) -> None:
    """Beside the same stage: states and inputs twice, C (in, in), samples held out, weights and one's corrections."""
    text = "name: t\ncomponents: {language: {scheme: w4a16, method: gptq, gptq: {target: TARGET, loss: layer}}}\n"
    footprint = Footprint({"language": Place(rows=1000, width=256, nbytes=1_024_000, largest_rows=100)}, 5_000)
    found = {}
    for target in ("weights", "outputs"):
        components, plan = plan_model(tiny_llava, parse_recipe(text.replace("TARGET", target), name="t"))
        for way in WAYS:
            done = predict(components, plan, footprint, base=0, dtype=torch.float32, passes=way)
            found[target, way] = done.parts["language"], done
    for way in WAYS:
        (plain, before), (both, after) = found["weights", way], found["outputs", way]
        assert both["inside the passes"] == 2 * plain["inside the passes"] + 6 * 100 * 384 * 4
        assert both["between blocks"] - plain["between blocks"] == (0 if way.spill else 1_024_000)
        assert before.seconds is not None
        assert after.seconds is not None
        assert after.seconds > before.seconds
        assert after.disk_bytes - before.disk_bytes == (2 * (1_024_000 + 5_000) if way.spill else 0)
    # Of the stage of gate and up, 768 rows of 256 inputs, or of the down projection, whichever takes most.
    sizes = {
        (768, 256): 768 * 256 * 2 + 2 * 4 * 256**2 + 125 * 2 * 4 * 256 + 4 * 768 * 256 + 3 * 4 * 384 * 256,
        (256, 384): 256 * 384 * 2 + 2 * 4 * 384**2 + 125 * 2 * 4 * 384 + 4 * 4 * 256 * 384,
    }
    assert found["outputs", WAYS[1]][0]["a stage"] == max(sizes.values())


def test_on_a_gpu_weights_and_passes_are_there_and_codes_here(tiny_llava: Path) -> None:
    components, plan = plan_model(tiny_llava, load_recipe("mixed"))
    footprint = Footprint({"language": Place(1000, 256, 1_024_000, 100)}, input_bytes=5_000)
    options = {"base": 10_000, "dtype": torch.float32, "passes": WAYS[1]}
    here = predict(components, plan, footprint, **options)
    there = predict(components, plan, footprint, **options, device=torch.device("cuda"))
    gate_and_up = 2 * 256 * 384 * 2  # in two bytes each, as they are read
    for phase, parts in here.parts.items():
        moved = there.device_parts[phase]
        assert set(moved) == {
            "weights outside blocks",
            "weights of the block",
            "a stage",
            "inside the passes",
            "between blocks",
        }
        assert there.parts[phase] | moved == parts | {"weights being read": there.parts[phase]["weights being read"]}
    assert there.parts["language"]["weights being read"] == gate_and_up
    assert there.device_peak_bytes == sum(there.device_parts["language"].values())
    assert there.peak_bytes < here.peak_bytes
    assert here.device_peak_bytes == 0
    assert ways(torch.device("cuda")) == WAYS[:2]
    assert ways(torch.device("cpu")) == WAYS


def test_plan_for_a_gpu_that_is_not_here(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    samples = write_small_set(tmp_path / "set")
    options = ("-r", "mixed", "--calibration", samples, "--device-memory-limit")
    code, text, _ = run("plan", tiny_llava, *options, "1GiB", "--json")
    found = json.loads(text)["quantizing"]
    assert code == 0
    assert [way["passes"]["spill"] for way in found] == [False, False]
    assert all(0 < way["device_peak_bytes"] < 2**30 for way in found)
    code, text, told = run("plan", tiny_llava, *options, "64KiB")
    assert code == 6
    assert "on the GPU" in text
    assert "of device memory at the least" in told


def test_every_way_gives_the_same_files(
    run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = write_small_set(tmp_path / "set")
    made = {}
    for way in WAYS:
        monkeypatch.setattr(budget, "WAYS", (way,))
        out = tmp_path / f"out-{way.rerun}-{way.spill}"
        options = ("-r", "mixed-awq", "--calibration", samples, "-o", out, "--memory-limit", "8GiB", "--json")
        code, text, _ = run("quantize", tiny_llava, *options)
        assert code == 0
        made[way] = {
            file.name: file.read_bytes() for file in out.iterdir() if file.name not in ("vlmquant.json", "README.md")
        }
        found, manifest = json.loads(text), read_manifest(out)
        assert manifest["work"]["passes"] == way.label
        assert manifest["work"]["memory_limit"] == 8 * 2**30
        assert manifest["work"]["planned"] == found["planned"]
        assert manifest["work"]["peak_bytes"] > 0
        assert found["planned"]["passes"] == {"rerun": way.rerun, "spill": way.spill}
    assert made[WAYS[1]] == made[WAYS[0]]
    assert made[WAYS[2]] == made[WAYS[0]]
    assert {path.name for path in tmp_path.iterdir()} == {"set", *(f"out-{w.rerun}-{w.spill}" for w in WAYS)}


@pytest.mark.parametrize("recipe", ["layers", pytest.param("mixed-awq", marks=pytest.mark.slow), "rtn-w4"])
def test_few_rows_at_a_time_give_the_same_files(
    recipe: str, run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, made, taken = write_small_set(tmp_path / "set"), [], []
    if recipe == "layers":
        recipe = str(tmp_path / "layers.yaml")
        Path(recipe).write_text(
            "name: layers\ncomponents:\n  vision_encoder: {scheme: w8a8-dynamic, method: search}\n"
            "  language: {scheme: w4a16, method: gptq, gptq: {loss: layer}}\n"
        )
    real = Stage.by_rows

    def counted(stage: Stage, weight: Tensor, make: Callable[[Tensor], Any], *, work: float) -> list[Any]:
        parts = real(stage, weight, make, work=work)
        taken.append(len(parts))
        return parts

    monkeypatch.setattr(Stage, "by_rows", counted)
    for elements in (stream.ROW_ELEMENTS, 1):
        taken.clear()
        monkeypatch.setattr(stream, "ROW_ELEMENTS", elements)
        assert (
            run("quantize", tiny_llava, "-r", recipe, "--calibration", samples, "-o", tmp_path / "out", "--force")[0]
            == 0
        )
        made.append({file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")})
        assert max(taken) == (1 if elements > 1 else 384 // 64)
    assert made[0] == made[1]


def test_what_cannot_fit_is_refused_before_any_work(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    samples = write_small_set(tmp_path / "set")
    options = ("-r", "mixed", "--calibration", samples, "-o", tmp_path / "out")
    code, _, told = run("quantize", tiny_llava, *options, "--memory-limit", "50MiB")
    assert code == 6
    assert "quantize needs" in told
    assert "process" in told
    assert not (tmp_path / "out").exists()
    code, _, told = run("quantize", tiny_llava, *options, "--memory-limit", "plenty")
    assert code == 2
    assert "--memory-limit: expected a size such as 24GB" in told


def test_plan_says_whether_it_fits(run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "calibration_dtype", lambda device: torch.float32)  # so small, kilobytes decide
    samples = write_small_set(tmp_path / "set")
    options = ("-r", "mixed", "--calibration", samples, "--memory-limit")
    code, text, _ = run("plan", tiny_llava, "--effort", "fast", *options, "8GiB", "--json")
    assert code == 0
    ways = json.loads(text)["quantizing"]
    assert [way["passes"] for way in ways] == [{"rerun": way.rerun, "spill": way.spill} for way in WAYS]
    assert ways[0]["peak_bytes"] >= ways[1]["peak_bytes"] >= ways[2]["peak_bytes"] > 2**26
    assert all(way["disk_bytes"] > 0 and 0 <= way["seconds"][0] <= way["seconds"][1] for way in ways)
    code, text, told = run("plan", tiny_llava, *options, "40MiB")
    assert code == 6
    assert "Quantizing" in text
    assert "quantize needs" in told


def test_without_a_limit_what_is_free_decides(
    run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = write_small_set(tmp_path / "set")
    for free, way in ((1 << 40, WAYS[0]), (0, WAYS[2])):
        monkeypatch.setattr(budget, "available_bytes", lambda free=free: free)
        out = tmp_path / f"out-{free}"
        assert run("quantize", tiny_llava, "-r", "mixed", "--calibration", samples, "-o", out)[0] == 0
        assert read_manifest(out)["work"]["passes"] == way.label


def test_places_grow_with_their_parts() -> None:
    place = Place(10, 64, 1000, 10)
    assert place.times(12.5, 4.0) == Place(125, 64, 12_500, 40)
    assert replace(place, rows=0).times(2, 2).rows == 0


def test_limits_of_this_process_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = budget.available_bytes()
    assert free > 0
    (tmp_path / "memory.max").write_text(f"{budget.resident_bytes() + 2**20}\n")
    monkeypatch.setattr(budget, "CGROUPS", (tmp_path / "none", tmp_path / "memory.max"))
    assert budget.available_bytes() < 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert budget.available_bytes() > 2**20


def test_nothing_is_kept_where_nothing_is_calibrated(tiny_llava: Path) -> None:
    components = resolve_components(tiny_llava)
    _, plan = plan_model(tiny_llava, load_recipe("rtn-w4"))
    found = predict(components, plan, Footprint({}, 0), base=1, dtype=torch.float32, passes=WAYS[0])
    assert all(one["between blocks"] == one["inside the passes"] == 0 for one in found.parts.values())


def test_experts_see_the_tokens_that_are_routed_to_them(tmp_path: Path) -> None:
    """As many multiplications as by hand, for so many tokens that none need others'; their passes are always kept."""
    recipe = load_recipe("gptq-w4").model_copy(update={"effort": "fast"})
    components, plan = plan_model(zoo.build("qwen3_vl_moe", tmp_path / "model"), recipe)
    text = components.config.get_text_config()
    block = next(one for one in components.blocks if one.name.endswith("language_model.layers.0"))
    (form,) = {form for home, form in components.experts.items() if home.startswith(block.name)}
    tokens = 100 * form.experts * max(form.hidden, form.intermediate)
    shapes = {linear.local: (linear.out_features, linear.in_features) for linear in block.linears}
    experts = {local for local in shapes if "experts." in local}
    assert len(experts) == 3 * form.experts
    seen = {local: tokens * (text.num_experts_per_tok / form.experts if local in experts else 1) for local in shapes}
    by_hand = sum(seen[local] * rows * columns for local, (rows, columns) in shapes.items())
    quantized = {one.local for one in block.linears if plan.line(f"{one.name}.weight").action == "quantize"}
    groups = [group[0].local for group in components.fused_groups(block) if group[0].local in quantized]
    by_hand += sum(0.62 * seen[local] * shapes[local][1] ** 2 + shapes[local][1] ** 3 / 3 for local in groups)
    by_hand += sum(shapes[local][0] * shapes[local][1] ** 2 for local in quantized)
    stages = budget._stages(components, plan, block, tokens)
    assert sum(budget._products(stages, block, tokens, rerun=False)) == pytest.approx(by_hand)
    footprint = Footprint({"language": Place(1000, form.hidden, 4_000, 100)}, input_bytes=0)
    passes = [predict(components, plan, footprint, base=0, dtype=torch.float32, passes=way) for way in WAYS]
    for what in ("inside the passes", "weights of the block", "a stage"):
        assert len({way.parts["language"][what] for way in passes}) == 1


def test_time_is_that_of_passes_in_their_dtype_and_of_rounding_in_float32(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: tokens times weights, and on top second moments, a factor and error feedback."""
    recipe = load_recipe("gptq-w4").model_copy(update={"effort": "fast"})
    components, plan = plan_model(tiny_llava, recipe)
    tokens, passes, rounding = 50_000, 0.0, 0.0
    for block in components.blocks:
        if block.component == "language":
            passes += tokens * sum(linear.out_features * linear.in_features for linear in block.linears)
            for group in components.fused_groups(block):
                columns = group[0].in_features
                rounding += 0.62 * tokens * columns**2 + columns**3 / 3
                rounding += sum(linear.out_features for linear in group) * columns**2
    rates = {torch.float32: 1e9, torch.bfloat16: 4e9}
    monkeypatch.setattr(budget, "_products_per_second", lambda dtype, device: rates[dtype])
    footprint = Footprint({"language": Place(tokens, 256, 1_024_000, 100)}, 5_000)
    for dtype, rate in rates.items():
        found = predict(components, plan, footprint, base=0, dtype=dtype, passes=WAYS[0])
        assert found.seconds is not None
        assert found.seconds[0] == pytest.approx(passes / rate + rounding / 1e9, abs=0.1)


def test_what_outputs_do_to_the_answers_is_counted(tiny_llava: Path) -> None:
    """Beside the same stage: what rows have moved, and G (out, out); on disk, G of all linears."""
    text = "name: t\ncomponents: {language: {scheme: w4a16, method: gptq, gptq: {target: weights, loss: LOSS}}}\n"
    footprint = Footprint({"language": Place(rows=1000, width=256, nbytes=1_024_000, largest_rows=100)}, 5_000)
    found = []
    for loss in ("layer", "answers"):
        components, plan = plan_model(tiny_llava, parse_recipe(text.replace("LOSS", loss), name="t"))
        found.append(predict(components, plan, footprint, base=0, dtype=torch.float32, passes=WAYS[1]))
    plain, coupled = found
    # All rows fit at once in either: 384 outputs of 256 inputs, or 256 of 384.
    sizes = {(384, 256): (768, 256), (256, 384): (256, 384)}
    for one, more in ((plain, 0), (coupled, 1)):
        assert one.parts["language"]["a stage"] == max(
            whole * inputs * 2
            + 4 * inputs**2
            + 14 * rows * inputs
            + more * 4 * (max(rows_together(rows)) ** 2 + rows * inputs)
            for (rows, inputs), (whole, _) in sizes.items()
        )
    outputs = [line.shape[0] for line in plan.lines if line.needs_gradients]
    assert coupled.disk_bytes - plain.disk_bytes == sum(4 * some**2 for rows in outputs for some in rows_together(rows))
    assert coupled.seconds is not None
    assert plain.seconds is not None
    assert coupled.seconds > plain.seconds


def test_a_plan_within_little_memory_takes_no_gradients_that_nobody_asked_for(
    run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `quantize` does; a recipe that asks for them is refused."""
    samples = write_small_set(tmp_path / "set")
    monkeypatch.setattr(gradients, "needed_bytes", lambda *known, **more: 7 << 30)
    asked = tmp_path / "asked.yaml"
    asked.write_text("name: asked\ncomponents: {language: {scheme: w4a16, method: gptq, gptq: {loss: answers}}}\n")
    for recipe, limit, phase, found in (
        ("mixed", "64GiB", True, 0),
        ("mixed", "6GiB", False, 0),
        (asked, "64GiB", True, 0),
        (asked, "6GiB", True, 6),
    ):
        options = ("-r", recipe, "--calibration", samples, "--memory-limit", limit)
        code, text, _ = run("plan", tiny_llava, *options, "--json")
        assert code == found
        assert all(("gradients" in way["phases"]) == phase for way in json.loads(text)["quantizing"])
        assert run("quantize", tiny_llava, *options, "-o", tmp_path / "out", "--force")[0] == found
