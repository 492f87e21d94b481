"""Experts taken apart: the fused module's outputs, its weights in the right places, and what calibration sees."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import zoo, zoo_check
from vlmquant import experts as rooms
from vlmquant.algorithms import ALGORITHMS
from vlmquant.calibration.encode import Batch
from vlmquant.checkpoint.reader import verify_checkpoint
from vlmquant.components import resolve_components
from vlmquant.errors import PlanError, SentinelError, StarvedExpertsError
from vlmquant.experts import Experts, form_of, holds_experts, parts_of, stands_for, take_apart
from vlmquant.loading import load_model
from vlmquant.planning import make_plan
from vlmquant.recipe import ExpertOptions, TokenWeights, load_recipe, parse_recipe
from vlmquant.stream import BlockStream

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = (
    "qwen3_vl_moe",
    "internvl@gpt_oss",
    "llama4",
    "aria",
    "gemma4@moe",
    "nemotron_h_omni",
    "muse_spark",
    "step3p7",
    "ernie4_5_vl_moe",
)
"""Plain, interleaved with biases and clamps, sorted, transposed, without a gate, with a norm, ..."""


def fused_modules(kind: str) -> dict[str, nn.Module]:
    model = zoo.make_model(kind)
    return {name: module for name, module in model.named_modules() if form_of(module)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_computes_what_the_whole_model_computes(kind: str) -> None:
    model, whole = zoo.make_model(kind), zoo.make_model(kind)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    forms = take_apart(model)
    assert forms
    assert not any(holds_experts(module) for module in model.modules())
    for name, value in parts_of(before, forms).items():
        owner, _, leaf = name.rpartition(".")
        if owner.startswith(tuple(forms)):
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    make = zoo.text_inputs if kind in zoo.IMAGE_FORWARD_BROKEN else zoo.inputs
    values = make(kind)
    assert values is not None
    got, wanted = zoo.forward(kind, model, values), zoo.forward(kind, whole, values)
    assert zoo_check.distance(got, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "internvl@gpt_oss", "aria"])
def test_a_wrong_reading_does_not_pass_the_trial(kind: str) -> None:
    module = next(iter(fused_modules(kind).values()))
    form = form_of(module)
    assert form is not None
    assert stands_for(module, form) is None
    wrong = []
    if kind != "internvl@gpt_oss":  # whose own gate gets both parts back as they lay
        wrong.append(replace(form, interleaved=not form.interleaved))
    if form.hidden == 2 * form.intermediate:
        wrong.append(replace(form, transposed=not form.transposed))
    assert wrong
    for reading in wrong:
        assert stands_for(module, reading) is not None, reading


def test_a_module_that_fails_the_trial_is_left_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "stands_for", lambda fused, form: "outputs differ")
    components = resolve_components(zoo.build("qwen3_vl_moe", tmp_path / "model"))
    assert not components.experts
    with pytest.raises(
        PlanError, match=r"experts\.\w+ stacks the weights of 8 experts .*Qwen3VLMoeTextExperts.* under keep"
    ):
        make_plan(components, load_recipe("mixed"))
    kept = parse_recipe(KEPT, name="kept")
    plan = make_plan(components, kept)
    assert all(line.action == "keep" for line in plan.lines if ".experts." in line.name)


KEPT = "version: 1\nname: kept\ncomponents: {language: {scheme: w4a16, keep: ['*mlp.experts']}}\n"


def test_three_dimensions_alone_make_no_experts(tmp_path: Path) -> None:
    """A convolution of linear attention is kept, whatever its number of channels."""
    components = resolve_components(zoo.build("qwen3_5", tmp_path / "model"))
    plan = make_plan(components, load_recipe("mixed"))
    convolutions = [line for line in plan.lines if line.name.endswith("conv1d.weight")]
    assert convolutions
    assert all(line.action == "keep" and len(line.shape) == 3 for line in convolutions)
    gates = [line for line in plan.lines if line.name.endswith(("in_proj_a.weight", "in_proj_b.weight"))]
    assert gates
    assert all("output per head" in line.reason for line in gates)


def test_experts_of_a_layer_have_one_scheme(tmp_path: Path) -> None:
    components = resolve_components(zoo.build("qwen3_vl_moe", tmp_path / "model"))
    some = KEPT.replace("*mlp.experts", "*mlp.experts.3.*")
    with pytest.raises(PlanError, match=r"mlp\.experts: the experts of a layer .* need one scheme"):
        make_plan(components, parse_recipe(some, name="some"))


def test_kept_experts_are_copied_as_they_lie_on_disk(tmp_path: Path) -> None:
    model_dir = zoo.build("qwen3_vl_moe", tmp_path / "model")
    zoo_check.quantize(model_dir, parse_recipe(KEPT, name="kept"), tmp_path / "out", [])
    from safetensors.torch import load_file

    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert verify_checkpoint(tmp_path / "out") == []
    stacks = [name for name in before if ".experts." in name]
    assert stacks
    assert all(torch.equal(before[name], after[name]) for name in stacks)
    assert not any(".experts.0." in name for name in after)


@pytest.mark.parametrize("kind", ["llama4", "gemma4@moe", "aria"])
def test_kept_experts_are_loaded_with_the_values_of_the_source(kind: str, tmp_path: Path) -> None:
    """transformers takes some apart whose config says that they are quantized, kept or not."""
    model_dir = zoo.build(kind, tmp_path / "model")
    recipe = parse_recipe(KEPT.replace("*mlp.experts", "*.experts"), name="kept")
    zoo_check.quantize(model_dir, recipe, tmp_path / "out", [])
    source, loaded = load_model(model_dir), load_model(tmp_path / "out")
    stacks = {name: value for name, value in source.named_parameters() if ".experts." in name}
    assert stacks
    after = dict(loaded.named_parameters())
    assert all(torch.equal(value.to(after[name].dtype), after[name]) for name, value in stacks.items())


# --- what calibration sees ---

BALANCED = "internvl@qwen3_moe"
PLANTED = 3
"""The expert that a planted routing never chooses."""


class Watched:
    """A stream over one kind, and every stage that it gave, with its statistics before they were used."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        options: ExpertOptions,
        *,
        never: int | None = None,
        recipe: str = "",
        token_weights: TokenWeights | None = None,
    ) -> None:
        model_dir = zoo.build(kind, folder / "model")
        wanted = parse_recipe(recipe, name="given") if recipe else load_recipe("mixed")
        self.components, self.plan = zoo_check.plan_model(model_dir, wanted)
        stream = BlockStream(
            self.components,
            self.plan,
            dict(wanted.specs()),
            zoo_check.calibration(kind),
            outside={},
            restore=lambda info: None,
            dtype=torch.float32,
            device=torch.device("cpu"),
            experts=options,
            token_weights=token_weights,
        )
        if never is not None:
            self._never(stream, never)
        self.methods: dict[str, str] = {}
        self.hessians: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.counts: dict[str, list[int]] = {}
        self.notes: list[str] = []
        for block in stream:
            for stage in block.stages():
                first = f"{block.info.name}.{next(iter(stage.linears))}"
                self.methods[first] = stage.method
                if ".experts." in first and stage.method != "rtn":
                    self.inputs[first] = torch.cat([rows.inputs for rows in stage._rows() if rows])
                    self.hessians[first] = stage.hessian().clone()
                stage.finish(ALGORITHMS[stage.method](stage))
            self.counts |= block.expert_tokens
            self.notes += block.notes

    @staticmethod
    def _never(stream: BlockStream, expert: int) -> None:
        for home in stream.components.experts:
            module = stream.model.get_submodule(home)
            assert isinstance(module, Experts)
            plain = module.forward

            def elsewhere(
                hidden: Tensor, index: Tensor, weights: Tensor, plain: Callable[..., Tensor] = plain
            ) -> Tensor:
                return plain(hidden, torch.where(index == expert, (index + 1) % 8, index), weights)

            module.forward = elsewhere  # type: ignore[method-assign]


def stages_of(watched: Watched, projection: str) -> dict[str, Tensor]:
    return {name: value for name, value in watched.hessians.items() if name.endswith(projection)}


def test_each_experts_statistics_come_from_its_own_tokens(tmp_path: Path) -> None:
    watched = Watched(BALANCED, tmp_path, ExpertOptions(tokens="routed", max_starving=1.0))
    assert watched.counts
    for module, counts in watched.counts.items():
        seen = sum(len(make().inputs["input_ids"][0]) for make in zoo_check.calibration(BALANCED))
        assert sum(counts) == 2 * seen  # top-2
        for expert, count in enumerate(counts):
            name = f"{module}.{expert}.gate_proj"
            if count:
                rows = watched.inputs[name]
                assert len(rows) == count
                wanted = rows.double().T @ rows.double() / count
                torch.testing.assert_close(watched.hessians[name].double(), wanted, rtol=1e-4, atol=1e-6)


def test_an_expert_with_few_tokens_is_shown_others(tmp_path: Path) -> None:
    enough = 10_000
    watched = Watched(BALANCED, tmp_path, ExpertOptions(enough_tokens=enough, others_count=0.25, max_starving=1.0))
    routed = Watched(BALANCED, tmp_path / "routed", ExpertOptions(tokens="routed", max_starving=1.0))
    module, counts = next(iter(watched.counts.items()))
    everything = sum(len(make().inputs["input_ids"][0]) for make in zoo_check.calibration(BALANCED))
    for expert, count in enumerate(counts):
        name = f"{module}.{expert}.gate_proj"
        own = routed.inputs[name]
        assert len(own) == count
        assert len(watched.inputs[name]) == everything  # more is asked for than there is: every token is shown
        rows = watched.inputs[name].double()
        others = rows.T @ rows - own.double().T @ own.double()
        wanted = (own.double().T @ own.double() + 0.25 * others) / (count + 0.25 * (everything - count))
        torch.testing.assert_close(watched.hessians[name].double(), wanted, rtol=1e-3, atol=1e-5)


def test_all_tokens_for_all_experts(tmp_path: Path) -> None:
    watched = Watched(BALANCED, tmp_path, ExpertOptions(tokens="all"), never=PLANTED)
    first = [watched.hessians[f"{module}.{expert}.gate_proj"] for module in watched.counts for expert in (0, PLANTED)]
    torch.testing.assert_close(first[0], first[1])
    assert all(counts[PLANTED] == 0 for counts in watched.counts.values())


def test_an_unused_expert_trips_the_sentinel(tmp_path: Path) -> None:
    with pytest.raises(
        StarvedExpertsError, match=r"mlp\.experts: .*of 8 experts saw fewer than 4 .*expert.* 3"
    ) as error:
        Watched(BALANCED, tmp_path, ExpertOptions(), never=PLANTED)
    assert error.value.exit_code == 7


def test_an_unused_expert_is_rounded_to_nearest_and_named(tmp_path: Path) -> None:
    watched = Watched(BALANCED, tmp_path, ExpertOptions(max_starving=1.0), never=PLANTED)
    for module in watched.counts:
        methods = {leaf: watched.methods[f"{module}.{PLANTED}.{leaf}"] for leaf in ("gate_proj", "down_proj")}
        assert set(methods.values()) == {"rtn"}
        assert watched.methods[f"{module}.0.gate_proj"] == "gptq"
        told = [note for note in watched.notes if note.startswith(module)]
        assert any("expert 3" in note and "nearest" in note for note in told)


def test_padding_reaches_no_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples in one padded batch give every expert the tokens and statistics that they give it one by one."""
    values = [zoo.text_inputs(BALANCED, seed=seed) for seed in (1, 2)]
    ids = [(value or {})["input_ids"][0] for value in values]
    ids[1] = ids[1][:41]
    alone = [{"input_ids": one[None], "attention_mask": torch.ones_like(one)[None]} for one in ids]
    short = len(ids[0]) - len(ids[1])
    padded = {
        "input_ids": torch.stack([ids[0], torch.cat([torch.zeros(short, dtype=torch.long), ids[1]])]),
        "attention_mask": torch.stack([torch.ones_like(ids[0]), (torch.arange(len(ids[0])) >= short).long()]),
    }
    watched = []
    for name, batches in (("alone", alone), ("padded", [padded])):
        made = [Batch(one, torch.ones(1, 1, dtype=torch.bool), ()) for one in batches]
        monkeypatch.setattr(zoo_check, "calibration", lambda kind, made=made: [lambda one=one: one for one in made])
        options = ExpertOptions(tokens="routed", max_starving=1.0)
        watched.append(Watched(BALANCED, tmp_path / name, options, recipe=LANGUAGE))
    one, other = watched
    module = next(iter(one.counts))
    assert one.counts[module] == other.counts[module]
    assert sum(one.counts[module]) == 2 * sum(map(len, ids))
    for name, hessian in one.hessians.items():
        if name.startswith(module) and name.endswith("gate_proj"):  # all else sees what rounding made of these
            torch.testing.assert_close(other.hessians[name], hessian, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("image", [0.0, 0.1])
def test_tokens_that_count_for_nothing_reach_no_expert(
    image: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are they counted. Where they count for something, all of an image are looked at, whatever share elsewhere."""
    (value,) = (value or {} for value in [zoo.text_inputs(BALANCED, seed=1)])
    ids = value["input_ids"]
    images = torch.arange(ids.shape[1])[None] % 3 == 0
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros_like(images), (), images)
    monkeypatch.setattr(zoo_check, "calibration", lambda kind: [lambda: batch])
    options, weights = ExpertOptions(tokens="routed", max_starving=1.0), TokenWeights(image=image, image_share=0.25)
    watched = Watched(BALANCED, tmp_path, options, recipe=LANGUAGE, token_weights=weights)
    module = next(iter(watched.counts))
    assert sum(watched.counts[module]) == 2 * (ids.shape[1] if image else int((~images).sum()))
    for expert, count in enumerate(watched.counts[module]):
        if count:
            assert len(watched.inputs[f"{module}.{expert}.gate_proj"]) == count


LANGUAGE = "version: 1\nname: language\ncomponents: {language: {scheme: w4a16, method: gptq, keep: ['*self_attn']}}\n"


def test_linears_that_only_pass_for_a_group_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of attention across get the image's inputs, queries the text's."""
    from vlmquant import families

    rows = tuple(row for row in families.SHARED_INPUTS if not row[0].startswith("encoder_attn"))
    monkeypatch.setattr(families, "SHARED_INPUTS", rows)
    model_dir = zoo.build("florence2", tmp_path / "model")
    with pytest.raises(SentinelError, match=r"encoder_attn\.\w+ and encoder_attn\.\w+ .*different"):
        zoo_check.quantize(model_dir, load_recipe("mixed"), tmp_path / "out", zoo_check.calibration("florence2"))
