"""Sensitivity: its numbers against float64 and against what quantizing one layer is measured to lose; budgets against
brute force; and the commands on the demo."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import zoo, zoo_check
from tests.conftest import Run
from vlmquant import demo, gradients
from vlmquant.checkpoint import Inputs, read_manifest, verify_checkpoint
from vlmquant.components import ComponentMap, resolve_components
from vlmquant.errors import DoesNotFitError, InputError, PlanError, RecipeError, UsageError
from vlmquant.evaluation.passes import answer_logits
from vlmquant.kernels.reference import round_inputs
from vlmquant.loading import load_model
from vlmquant.pipeline import find_components, find_sensitivity, plan_components, quantize
from vlmquant.planning import make_plan
from vlmquant.recipe import (
    BudgetSpec,
    Recipe,
    Scheme,
    bytes_of,
    load_recipe,
    parse_recipe,
    recipe_text,
    shipped_recipes,
)
from vlmquant.sensitivity import (
    Scores,
    Unit,
    Units,
    allocate,
    check_scores,
    find_units,
    losses,
    model_digest,
    read_scores,
)
from vlmquant.sensitivity.choose import with_choices
from vlmquant.sensitivity.knapsack import Option, frontier, monotone

DEMO = Path(demo.__file__).parent
MODEL, CALIBRATION = DEMO / "model", DEMO / "calibration"
SAMPLES = 32
BUDGET = """name: bought
effort: fast
components:
  language: {scheme: w4a16, method: gptq}
budget: {bits_per_weight: 4.25}
calibration: {samples: 64}
"""


# --- the knapsack ---

option = st.builds(Option, st.integers(0, 12), st.integers(0, 40).map(float))
units_of_options = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None)
@given(units_of_options, st.integers(0, 60), st.integers(0, 120))
def test_no_choice_is_better_than_the_one_found(units: list[list[Option]], most: int, loss: int) -> None:
    found = frontier(units)
    every = [(sum(o.nbytes for o in some), sum(o.loss for o in some)) for some in itertools.product(*units)]
    assert found.exact
    fitting = [lost for nbytes, lost in every if nbytes <= most]
    point = found.within_bytes(most)
    assert (point is None) == (not fitting)
    if point is not None:
        assert found.losses[point] == min(fitting)
        assert found.nbytes[point] == min(nbytes for nbytes, lost in every if lost == min(fitting))
        picked = [options[index] for options, index in zip(units, found.options(point), strict=True)]
        assert sum(one.nbytes for one in picked) == found.nbytes[point]
        assert sum(one.loss for one in picked) == found.losses[point]
    small = [nbytes for nbytes, lost in every if lost <= loss]
    point = found.within_loss(loss)
    assert (point is None) == (not small)
    if point is not None:
        assert found.nbytes[point] == min(small)


@settings(deadline=None)
@given(units_of_options, st.integers(2, 6), st.integers(0, 60))
def test_where_bytes_are_rounded_the_budget_still_holds(units: list[list[Option]], points: int, most: int) -> None:
    found = frontier(units, most_points=points)
    assert len(found.nbytes) <= points
    if (point := found.within_bytes(most)) is not None:
        picked = [options[index] for options, index in zip(units, found.options(point), strict=True)]
        assert sum(one.nbytes for one in picked) <= found.nbytes[point] <= most
        assert sum(one.loss for one in picked) == found.losses[point]


@given(st.lists(option, min_size=1, max_size=6))
def test_losses_do_not_rise_with_bytes_and_move_little(options: list[Option]) -> None:
    made = monotone(options)
    assert [one.nbytes for one in made] == [one.nbytes for one in options]
    ordered = sorted(made, key=lambda one: (one.nbytes, -one.loss))
    assert all(before.loss >= after.loss for before, after in itertools.pairwise(ordered))
    assert sum(one.loss for one in made) == pytest.approx(sum(one.loss for one in options))
    if all(a.loss >= b.loss for a, b in itertools.pairwise(sorted(options, key=lambda o: (o.nbytes, -o.loss)))):
        assert made == options


# --- the score ---


def test_signs_have_the_covariance_of_a_drawn_answer() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 2
    total = torch.zeros(3, 5, 5, dtype=torch.float64)
    count = 4000
    for seed in range(count):
        drawn = gradients.draw(logits, seed=seed).double()
        total += drawn[:, :, None] * drawn[:, None, :] / count
    chances = logits.double().softmax(-1)
    expected = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    assert (total - expected).abs().max() < 0.02  # 4 standard errors of a mean of products below 1/2


@pytest.mark.parametrize("activations", ["none", "dynamic-int8"])
def test_a_probe_sums_what_float64_does(activations: str) -> None:
    """A head of one linear and a softmax, two calls in a sample: sums over tokens, squares over rows and samples."""
    random = torch.Generator().manual_seed(1)
    linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
    change = (torch.randn(4, 6, generator=random) / 50).bfloat16()
    probe = losses._Probe(linear, {"w": losses._Change(change, activations)})
    handle = probe.listen()
    expected = 0.0
    for sample in range(3):
        rows = torch.zeros(4, dtype=torch.float64)
        for call in range(2):
            inputs = torch.randn(1, 5, 6, generator=random)
            output = linear(inputs)
            drawn = gradients.draw(output.detach()[0], seed=sample * 2 + call)[None]
            output.backward(drawn)
            moved = round_inputs(inputs, activations).double() @ (linear.weight + change.float()).double().T
            moved -= inputs.double() @ linear.weight.double().T
            rows += (drawn.double() * moved)[0].sum(0)
        probe.end_sample()
        expected += rows.square().sum().item()
    handle.remove()
    assert probe.totals["w"] == pytest.approx(expected, rel=1e-4)
    assert probe.totals["fp16"] == 0


def demo_components(recipe: Recipe) -> ComponentMap:
    return plan_components(find_components(MODEL), recipe.model_copy(update={"budget": None}))[0]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(BUDGET, name="bought")


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """Of all components of the demo."""
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    find_sensitivity(MODEL, recipe, calibration=CALIBRATION, device="cpu", scores=file, kept=True)
    return file


@pytest.fixture(scope="module")
def units(recipe: Recipe) -> Units:
    return find_units(demo_components(recipe), recipe)


def measured_losses(units: Sequence[Unit], label: str, recipe: Recipe) -> dict[str, float]:
    """KL on the calibration samples with each of these units alone quantized, nats an answer token."""
    heard: dict[str, Any] = {}

    def listen(model: Any, probes: Any, encoder: Any, rows: Any, told: str) -> None:
        heard.update(model=model, probes=probes, encoder=encoder, rows=rows)

    spec = recipe.calibration.model_copy(update={"set": str(CALIBRATION)})
    alone = [replace(unit, choices=(unit.choice(label),)) for unit in units]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_run_gradients", listen)
        with pytest.raises(KeyError):  # without gradients there are no totals
            losses.measure(demo_components(recipe), recipe, alone, spec, device="cpu")
    probes = iter(heard["probes"])

    @torch.no_grad()
    def says() -> list[torch.Tensor]:
        rows = heard["rows"]
        return [answer_logits(heard["model"], heard["encoder"], [row])[0].log_softmax(-1) for row in rows]

    before, found = says(), {}
    for unit in units:
        own = [next(probes) for _ in unit.linears]
        kept = [probe.module.weight.data for probe in own]
        for probe in own:
            probe.module.weight.data = probe.module.weight.data + probe.changes[label].weight
        total = sum((p.exp() * (p - q)).sum().item() for p, q in zip(before, says(), strict=True))
        for probe, weight in zip(own, kept, strict=True):
            probe.module.weight.data = weight
        found[unit.name] = total / sum(map(len, before))
    return found


def test_what_is_predicted_is_what_is_measured(scores_file: Path, recipe: Recipe) -> None:
    """In nats, for layers of all components, whose losses are a thousand times apart. One sample makes half of the loss
    on this set, so that what takes rows to err independently is not close for each."""
    scores, label = read_scores(scores_file), "w4a16-g128"
    every = find_units(demo_components(recipe), recipe, kept=True).units
    some = [*every[1::5], every[-1]]
    assert len({unit.component for unit in some}) == 4
    found = measured_losses(some, label, recipe)
    ratios = [math.log(scores.of(unit)[label] / found[unit.name]) for unit in some]
    per_weight = [math.log(found[unit.name] / unit.weights) for unit in some]
    assert abs(mean(ratios)) < 0.5
    assert pstdev(ratios) < 0.6
    assert pstdev(per_weight) > 1.2  # what a score would be off by that knows no layers


def test_scores_cover_all_components_and_fall_with_bits(scores_file: Path) -> None:
    scores = read_scores(scores_file)
    assert {one.component for one in scores.units} == {"vision_encoder", "projector", "language", "lm_head"}
    names = [one.name for one in scores.units]
    assert len(set(names)) == len(names)
    kinds = {one.kind for one in scores.units if one.component == "language"}
    assert kinds == {"q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"}
    for one in scores.units:
        assert one.losses["fp16"] == 0
        assert one.losses["w3a16-g128"] > one.losses["w4a16-g128"] > 10 * one.losses["w8a16"] > 0


def test_units_measured_in_rounds_have_the_same_losses(
    scores_file: Path, units: Units, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = read_scores(scores_file)
    some = units.units[-2:]
    monkeypatch.setattr(losses, "_rounds", lambda units, room: ([one] for one in units))
    spec = recipe.calibration.model_copy(update={"set": str(CALIBRATION)})
    found = losses.measure(demo_components(recipe), recipe, some, spec, device="cpu")
    for unit in some:
        assert found.of(unit) == pytest.approx(scores.of(unit), rel=1e-3)


def test_rounds_hold_what_fits(units: Units) -> None:
    sizes = [losses._unit_bytes(unit) for unit in units.units]
    rounds = list(losses._rounds(units.units, 2 * max(sizes)))
    assert [unit for some in rounds for unit in some] == list(units.units)
    assert len(rounds) > 1
    assert all(sum(map(losses._unit_bytes, some)) <= 2 * max(sizes) for some in rounds)


# --- what a budget buys ---


def test_the_choice_beats_the_control_within_the_budget(scores_file: Path, units: Units, recipe: Recipe) -> None:
    scores, components = read_scores(scores_file), demo_components(recipe)
    found = allocate(components, recipe, units, scores, BudgetSpec(bits_per_weight=4.25))
    assert found.control is not None
    assert found.control.label == "w4a16-g64"  # just as many bytes
    assert found.loss < found.control.loss
    assert found.nbytes <= found.control.nbytes
    lines = [line for line in make_plan(components, found.recipe).lines if line.component == "language"]
    taken = {line.name: line.bytes_after for line in lines}
    assert sum(taken[f"{name}.weight"] for unit in units.units for name in unit.linears) == found.nbytes
    labels = {line.name: line.scheme_label for line in lines}
    for unit in units.units:
        assert {labels[f"{name}.weight"] for name in unit.linears} == {found.chosen[unit.name]}


def test_the_three_limits_agree(scores_file: Path, units: Units, recipe: Recipe) -> None:
    scores, components = read_scores(scores_file), demo_components(recipe)
    first = allocate(components, recipe, units, scores, BudgetSpec(bits_per_weight=4))
    size = allocate(components, recipe, units, scores, BudgetSpec(bytes=first.nbytes + first.other_bytes))
    assert size.chosen == first.chosen
    plan = make_plan(components, size.recipe)
    assert plan.bytes_after == first.nbytes + first.other_bytes
    lost = allocate(components, recipe, units, scores, BudgetSpec(max_kl=first.loss * 1.000001))
    assert lost.nbytes <= first.nbytes
    assert lost.loss <= first.loss * 1.0001


def test_a_budget_that_nothing_fits_says_what_would(scores_file: Path, units: Units, recipe: Recipe) -> None:
    scores, components = read_scores(scores_file), demo_components(recipe)
    few = find_units(components, recipe, schemes=[Scheme(bits=4)])
    for spec, message in (
        (BudgetSpec(bits_per_weight=3), "fewer than|less than the fewest of these schemes, 3.1"),
        (BudgetSpec(bytes=1000), "budget.bytes: 1,000 are less than the fewest"),
    ):
        with pytest.raises(PlanError, match=message):
            allocate(components, recipe, units, scores, spec)
    with pytest.raises(PlanError, match=r"budget.max_kl: 1e-09 is less than the least"):
        allocate(components, recipe, few, scores, BudgetSpec(max_kl=1e-9))


def test_scores_of_another_model_or_recipe_are_refused(scores_file: Path, units: Units, recipe: Recipe) -> None:
    scores = read_scores(scores_file)
    digest = model_digest(Inputs(demo_components(recipe)))
    check_scores(scores, units.units, digest, where="s")
    with pytest.raises(PlanError, match="s: is of a model with other weights; measure again"):
        check_scores(scores, units.units, "0" * 64, where="s")
    with pytest.raises(PlanError, match="was measured with gptq, not search"):
        check_scores(scores, [replace(units.units[0], method="search")], digest, where="s")
    with pytest.raises(PlanError, match="says nothing of"):
        check_scores(scores.model_copy(update={"units": ()}), units.units, digest, where="s")
    other = find_units(demo_components(recipe), recipe, schemes=[Scheme(bits=5)])
    with pytest.raises(PlanError, match="was not measured with w5a16-g128"):
        check_scores(scores, other.units, digest, where="s")


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path, scores_file: Path) -> None:
    content = json.loads(scores_file.read_text())
    assert Scores.model_validate_json(scores_file.read_text(), strict=True) == read_scores(scores_file)
    for change in ({"version": 2}, {"tokens": 0}, {"more": 1}, {"model": None}):
        file = tmp_path / "s.json"
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=rf"s\.json: {next(iter(change))}.*measure it again"):
            read_scores(file)


def test_units_obey_keep_methods_and_targets(recipe: Recipe) -> None:
    text = BUDGET.replace(
        "method: gptq}", "method: gptq, keep: [layers.0.*], overrides: [{layers: '1:', method: rtn}]}"
    )
    text = text.replace("components:\n", "components:\n  vision_encoder: {scheme: w8a8-dynamic, method: int8}\n")
    changed = parse_recipe(text + "target: {engine: vllm, gpu: sm_80}\n", name="x")
    found = find_units(demo_components(changed), changed)
    language = [unit for unit in found.units if unit.component == "language"]
    assert {unit.layer for unit in language} == {1, 2, 3}
    assert {unit.method for unit in language} == {"rtn"}
    vision = next(unit for unit in found.units if unit.component == "vision_encoder")
    assert {choice.label for choice in vision.choices} == {"w8a8-dynamic", "w8a16", "fp16"}
    assert any("w3a16-g128 is left out" in line for line in found.refused)
    static = parse_recipe(text.replace("w8a8-dynamic", "w8a8-static"), name="x")
    with pytest.raises(PlanError, match="what scheme w8a8-static loses is not predicted"):
        losses.measure(
            demo_components(static), static, find_units(demo_components(static), static).units, static.calibration
        )


def test_what_does_not_fit_into_memory_is_refused(
    units: Units, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses.budget, "available_bytes", lambda: 10_000_000)
    spec = recipe.calibration.model_copy(update={"set": str(CALIBRATION)})
    with pytest.raises(DoesNotFitError, match=r"sensitivity needs about .* GiB for the model and a unit"):
        losses.measure(demo_components(recipe), recipe, units.units, spec, device="cpu")


def test_experts_of_a_layer_are_one_unit_and_are_heard(tmp_path: Path) -> None:
    components = resolve_components(zoo.build("qwen3_vl_moe", tmp_path / "model"))
    recipe = parse_recipe("name: m\ncomponents: {language: {scheme: w4a16, method: gptq}}\n", name="m")
    found = find_units(components, recipe).units
    experts = [unit for unit in found if unit.kind == "experts"]
    form = next(iter(components.experts.values()))
    assert len(experts) == len(components.experts)
    assert {unit.modules for unit in experts} == {("mlp.experts.*",)}
    assert {len(unit.linears) for unit in experts} == {3 * form.experts}
    chosen = {unit.name: unit.choice("w8a16" if unit in experts[1:] else "w4a16-g64") for unit in found}
    plan = make_plan(components, with_choices(recipe, found, chosen))
    for unit in found:
        assert {plan.line(f"{name}.weight").scheme_label for name in unit.linears} == {chosen[unit.name].label}

    model, batch = gradients.whole_model(components, torch.device("cpu")), zoo_check.calibration("qwen3_vl_moe")[0]()
    modules = [model.get_submodule(name) for name in experts[0].linears]
    probes = [losses._Probe(one, {"w": losses._Change((one.weight / 64).bfloat16(), "none")}) for one in modules]
    for probe in probes:
        probe.listen()
    logits = model(**batch.inputs, use_cache=False).logits
    logits.backward(torch.ones_like(logits) / 100)
    for probe in probes:
        probe.end_sample()
    heard = [probe.totals["w"] > 0 for probe in probes]
    assert sum(heard) >= 3 * 2  # as many experts as a token is given, at least
    loaded = load_model(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**batch.inputs, use_cache=False).logits, logits.detach(), rtol=1e-3, atol=1e-4
        )


# --- recipes and commands ---


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{}", "give one of bits_per_weight, bytes and max_kl"),
        ("{bits_per_weight: 4, max_kl: 1}", "give one of"),
        ("{bytes: 2 tons}", "expected a size such as 2GB"),
        ("{bits_per_weight: 0}", "greater than 0"),
        ("{max_kl: 0.1, schemes: [w4a16, nf4]}", "leave nf4 and bnb-int8 out"),
    ],
)
def test_a_wrong_budget_is_named(budget: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(BUDGET.replace("{bits_per_weight: 4.25}", budget), name="x.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("effort: fast", "output: {format: gptq}", "holds one scheme for all; a budget chooses several"),
        ("language: {scheme: w4a16, method: gptq}", "language: fp16", "needs a component with a scheme"),
        ("method: gptq", "method: gptq, overrides: [{scheme: w8a16}]", "a budget chooses schemes; leave them out"),
    ],
)
def test_a_recipe_that_a_budget_does_not_go_with_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(BUDGET.replace(old, new), name="x.yaml")


def test_sizes_and_labels_are_read() -> None:
    assert (bytes_of("2GB"), bytes_of("1.5 GiB"), bytes_of("0B"), bytes_of("2 tons")) == (
        2 * 10**9,
        3 << 29,
        None,
        None,
    )
    parsed = parse_recipe(BUDGET.replace("4.25}", "4.25, schemes: [w4a16-g64, w3a16-g32-asym, fp16]}"), name="x")
    assert parsed.budget is not None
    assert parsed.budget.schemes == (
        Scheme(bits=4, group_size=64),
        Scheme(bits=3, group_size=32, symmetric=False),
        "fp16",
    )
    asked = parse_recipe(BUDGET.replace("bits_per_weight: 4.25", "bytes: 2GB"), name="x").budget
    assert asked is not None
    assert asked.limit == {"bytes": 2 * 10**9}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_is_the_same_when_it_is_written_and_read(name: str) -> None:
    one = load_recipe(name)
    assert parse_recipe(recipe_text(one), name=name) == one


def test_the_command_prints_plots_and_writes_a_recipe(run: Run, scores_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BUDGET)
    words = ("sensitivity", MODEL, "-r", tmp_path / "r.yaml", "--scores", scores_file)
    out, page = tmp_path / "chosen.yaml", tmp_path / "page.html"
    code, printed, _ = run(*words, "--out", out, "--html", page)
    assert code == 0
    assert "q_proj+k_proj+v_proj" in printed
    assert "w4a16-g64 (control)" in printed
    assert "budget (bits_per_weight 4.25)" in printed
    assert out.read_text().startswith("# budget (bits_per_weight 4.25): ")
    chosen = load_recipe(out)
    assert chosen.budget is None
    assert chosen.components.language.overrides
    html = page.read_text()
    assert html.count("<svg") >= 5
    assert "http://" not in html
    assert "https://" not in html
    code, printed, _ = run(*words, "--max-kl", "0.001", "--json")
    said = json.loads(printed)
    assert code == 0
    assert said["allocation"]["predicted_kl"] <= 0.001
    assert said["allocation"]["budget"] == {"max_kl": 0.001}
    assert len(said["units"]) == len(read_scores(scores_file).units)


def test_mistakes_of_the_command_are_told(run: Run, tmp_path: Path, scores_file: Path) -> None:
    for words, message in (
        (("-r", "gptq-w4", "--out", tmp_path / "x"), "there is no budget to choose by"),
        (("-r", "gptq-w4", "--schemes", "w4a16,w9"), "unknown scheme 'w9'"),
        (("-r", "gptq-w4", "--bytes", "much"), "expected a size"),
        (("-r", "gptq-w4", "--max-kl", "1", "--bits-per-weight", "4"), "give one of"),
        (("-r", "rtn-w4", "--scores", scores_file), "was measured with gptq, not rtn"),
    ):
        code, _, err = run("sensitivity", MODEL, *words)
        assert code != 0
        assert message in err


def test_quantize_spends_the_budget(scores_file: Path, recipe: Recipe, tmp_path: Path) -> None:
    done = quantize(MODEL, recipe, tmp_path / "q", calibration=CALIBRATION, device="cpu", scores=scores_file)
    assert any(note.startswith("budget (bits_per_weight 4.25)") for note in done.notes)
    assert verify_checkpoint(tmp_path / "q") == []
    manifest = read_manifest(tmp_path / "q")
    stored = Recipe.model_validate(manifest["recipe"])
    assert stored.budget is None
    assert stored.components.language.overrides
    linears = [
        line for line in manifest["plan"]["lines"] if line["component"] == "language" and len(line["shape"]) == 2
    ]
    bits = 8 * sum(line["bytes_after"] - 16 for line in linears) / sum(math.prod(line["shape"]) for line in linears)
    assert 4.1 < bits <= 4.25
    assert len({line["label"] for line in linears}) > 1
    assert manifest["budget"]["control"]["predicted_kl"] > manifest["budget"]["predicted_kl"]
    model = load_model(tmp_path / "q")
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def test_ranks_are_sent_to_measure_first(recipe: Recipe, tmp_path: Path) -> None:
    from vlmquant.ranks import Ranks

    several = Ranks(size=2)
    with pytest.raises(UsageError, match="run `vlmquant sensitivity` with this recipe first"):
        find_sensitivity(MODEL, recipe, calibration=CALIBRATION, device="cpu", ranks=several)
