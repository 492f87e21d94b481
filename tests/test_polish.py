"""Polishing: its product and loss against autograd in float64, and what it does to a checkpoint."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests import grids
from vlmquant import cli, demo, pipeline, polish
from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.checkpoint.coded import open_coded
from vlmquant.errors import DoesNotFitError, InputError, PlanError, UsageError
from vlmquant.evaluation.passes import batches_of, teacher_forced
from vlmquant.gradients import TokensFollowed
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.polish import Options, ScaledLinear, _Teacher
from vlmquant.recipe import CalibrationSpec, Scheme, parse_recipe

DEMO = Path(demo.__file__).parent
MODEL, CALIBRATION = DEMO / "model", DEMO / "calibration"
SAMPLES = 96
ALL = TokensFollowed(text_alone=False)
LOSSY = "{scheme: {bits: 2, group_size: 32, symmetric: SYM}, method: gptq}"


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "size"), [(64, 32), (80, 32), (48, None)])
def test_product_and_gradients_are_autograds(columns: int, size: int | None, symmetric: bool, some: bool) -> None:
    """some: where gradients go through some of the tokens."""
    weight = grids.random(Scheme(bits=4, group_size=size, symmetric=symmetric), 24, columns, seed=columns)
    bias, followed = torch.randn(24, generator=torch.Generator().manual_seed(1)), ALL
    mask = torch.tensor([[False, True, False, True, True], [True, False, False, False, True]]) | (not some)
    if some:
        followed = TokensFollowed(text_alone=True)
        followed.mask = mask
    layer = ScaledLinear(weight, bias, followed, dtype=torch.float32, device="cpu")
    factor = 0.1 * torch.randn(weight.scales.shape, generator=torch.Generator().manual_seed(2))
    layer.log_factor.data.copy_(factor)
    inputs = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(3)).requires_grad_()
    output = layer(inputs)
    output.square().sum().backward()  # type: ignore[no-untyped-call]

    exact, x = factor.double().requires_grad_(), inputs.detach().double().requires_grad_()
    spread = exact.exp().repeat_interleave(size or columns, dim=1)[:, :columns]
    expected = x @ (weight.dequantize().double() * spread).T + bias
    torch.where(mask[..., None], expected, 0).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.log_factor.grad is not None
    assert inputs.grad is not None
    torch.testing.assert_close(layer.log_factor.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(inputs.grad.double(), x.grad, rtol=1e-4, atol=1e-4)


def test_divergence_is_kl_where_all_tokens_are_kept() -> None:
    random = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(6, 10, generator=random, dtype=torch.float64) for _ in range(2))
    log_probs, ids = theirs.log_softmax(-1).topk(9)  # what is left is one token
    found = _Teacher(ids, log_probs.float()).divergence(ours)
    kl = nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.double(), kl, rtol=1e-4, atol=1e-6)
    fewer = _Teacher(*reversed(theirs.log_softmax(-1).topk(3))).divergence(ours)
    assert (fewer <= kl + 1e-9).all()  # tokens taken together tell less


def test_the_original_answers_nearly_alike_in_a_dtype_that_is_fast(lossy: Path) -> None:
    """Against its own passes in float32: bfloat16 in the products of all linears but the head, and in nothing else."""
    components = open_coded(lossy).components
    encoder, rows = polish._rows(lossy, CalibrationSpec(set=str(CALIBRATION), samples=16))
    model = load_model(MODEL, dtype=torch.float32)
    exact = {
        one.row.key: one.answer_logits.log_softmax(-1)
        for batch in batches_of(rows, 8)
        for one in teacher_forced(model, encoder, batch)
    }
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = polish._ask(MODEL, components, encoder, rows, dtype=dtype, device="cpu")
        assert set(found) == set(exact)
        off = max(
            (exact[key].gather(1, one.ids) - one.log_probs)[:, 0].abs().max().item() for key, one in found.items()
        )
        assert off <= most, dtype
        assert max(one.divergence(exact[key]).mean().item() for key, one in found.items()) < 1e-3
        assert (off > 1e-4) is (dtype == torch.bfloat16)
    polish._multiply_in(torch.bfloat16, model, components)
    kinds = {place: type(module) for place, module in model.named_modules()}
    assert all(
        kinds[one.name] is (nn.Linear if one.component == "lm_head" else polish._FrozenLinear)
        for one in components.linears
    )
    assert {value.dtype for name, value in model.named_parameters() if "norm" in name or "lm_head" in name} == {
        torch.float32
    }


def quantized(folder: Path, *, symmetric: str) -> Path:
    """The demo model in 2 bits, which loses enough to be tuned."""
    recipe = f"name: lossy\neffort: fast\ncomponents: {{language: {LOSSY.replace('SYM', symmetric)}}}\n"
    chosen = parse_recipe(recipe, name="lossy")
    quantize(MODEL, chosen, folder / "q", calibration=CALIBRATION, device="cpu", dtype=torch.float32)
    return folder / "q"


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("lossy"), symmetric="true")


def asked_of(room: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[CalibrationSpec]:
    """What a room asks for, which ends there with InputError."""
    asked = list[CalibrationSpec]()

    def choose(sample_set: Any, spec: CalibrationSpec) -> Any:
        asked.append(spec)
        raise InputError("enough")

    monkeypatch.setattr(room, "choose_samples", choose)
    return asked


def test_more_samples_are_of_the_tasks_that_the_recipe_chose(
    lossy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(polish, monkeypatch)
    content = json.loads((lossy / "vlmquant.json").read_text())
    for strata, samples, expected in (
        ({"caption": 96, "vqa": 16, "chart": 16}, 448, {"caption": 336, "vqa": 56, "chart": 56}),
        ({"caption": 2, "vqa": 1}, 20, {"caption": 13, "vqa": 7}),
        (None, 40, None),
    ):
        monkeypatch.setattr(polish, "read_manifest", lambda path, strata=strata: with_strata(content, strata))
        with pytest.raises(InputError, match="enough"):
            polish.polish(lossy, MODEL, tmp_path / "p", calibration=CALIBRATION, samples=samples, device="cpu")
        assert asked[-1].strata == expected
        assert asked[-1].samples == samples


@pytest.mark.parametrize(
    ("effort", "said", "expected"),
    [
        ("fast", "", 128),
        ("default", "", 128),
        ("high", "", 512),
        ("high", "samples: 40", 40),
        ("fast", "samples: 7", 7),
    ],
)
def test_high_effort_looks_at_more_samples_unless_a_recipe_says_how_many(
    effort: str, said: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(
        f"name: some\neffort: {effort}\ncomponents: {{language: {{scheme: w4a16, method: gptq}}}}\n"
        f"calibration: {{{said}}}\n",
        name="some",
    )
    asked = asked_of(pipeline, monkeypatch)
    with pytest.raises(InputError, match="enough"):
        quantize(MODEL, recipe, Path("nowhere"), calibration=CALIBRATION, device="cpu")
    assert [spec.count for spec in asked] == [expected]


def test_polish_takes_more_samples_than_a_recipe_that_does_not_say_how_many(
    lossy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(polish, monkeypatch)
    with pytest.raises(InputError, match="enough"):
        polish.polish(lossy, MODEL, tmp_path / "p", calibration=CALIBRATION, device="cpu")
    assert [spec.count for spec in asked] == [512]


@pytest.mark.parametrize("most", [1, 2, polish.ANSWERS])
def test_answers_of_a_sample_are_tuned_on_or_its_first_is_held_out(
    most: int, lossy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: of each sample the first answers; none of a sample that is held out tells what to tune."""
    monkeypatch.setattr(polish, "ANSWERS", most)
    spec = CalibrationSpec(set=str(CALIBRATION), samples=40, strata={"caption": 24, "vqa": 16})
    known = {one.id: one for one in choose_samples(load_set(CALIBRATION), spec).samples}
    assert {len(one.answers) for one in known.values()} == {1, 2}
    _, rows = polish._rows(lossy, spec)
    fit, held = polish._split(rows)
    assert len(held) == 24 // 8 + 16 // 8
    assert len({row.sample.id for row in held}) == len(held)
    assert all(row.answer == row.sample.answers[0] for row in held)
    assert not {row.sample.id for row in held} & {row.sample.id for row in fit}
    told = {name: [row.answer for row in fit if row.sample.id == name] for name in known}
    for name, sample in known.items():
        expected = [] if name in {row.sample.id for row in held} else list(sample.answers[:most])
        assert told[name] == expected
    assert len({row.key for row in rows}) == len(rows)


def with_strata(manifest: dict[str, Any], strata: dict[str, int] | None) -> dict[str, Any]:
    recipe = manifest["recipe"]
    return manifest | {"recipe": recipe | {"calibration": recipe["calibration"] | {"strata": strata}}}


@pytest.fixture(scope="module")
def with_zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("zeros"), symmetric="false")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("which", ["lossy", "with_zeros"])
def test_scales_and_norms_are_tuned_and_codes_are_not(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    lossy: Path = request.getfixturevalue(which)
    options = Options(rate=2e-3)
    done = polish.polish(
        lossy, MODEL, tmp_path / "p", calibration=CALIBRATION, samples=SAMPLES, device="cpu", options=options
    )
    assert done.after < 0.97 * done.before
    before, after = tensors_of(lossy), tensors_of(tmp_path / "p")
    assert before.keys() == after.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ
    assert all(name.endswith(("weight_scale", "norm.weight")) for name in differ)
    assert any(name.endswith("weight_scale") for name in differ)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert verify_checkpoint(tmp_path / "p") == []
    said = read_manifest(tmp_path / "p")["polish"]
    assert said["held_out_kl_after"] == done.after
    # What it says of itself is what a packed model of these files loses, on the samples held out.
    # Products here are float32; there they are what is fastest on the machine.
    assert loss_of(tmp_path / "p") == pytest.approx(done.after, rel=0.2)
    assert loss_of(lossy) == pytest.approx(done.before, rel=0.2)


def loss_of(path: Path) -> float:
    """KL on the held-out samples by the packed model as it is loaded."""
    from vlmquant.evaluation.passes import answer_logits, batches_of

    manifest = read_manifest(path)
    recipe = polish.recipe_of(open_coded(path), "compressed-tensors", manifest)
    asked = {"set": str(CALIBRATION), "samples": SAMPLES, "strata": None}
    encoder, rows = polish._rows(path, recipe.calibration.model_copy(update=asked))
    _, held = polish._split(rows)
    original, model = (load_model(one, dtype=torch.float32).eval() for one in (MODEL, path))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches_of(held, 4):
            pairs = zip(answer_logits(original, encoder, batch), answer_logits(model, encoder, batch), strict=True)
            for teacher, logits in pairs:
                total += nn.functional.kl_div(
                    logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
                ).item()
                tokens += len(logits)
    return total / tokens


def test_a_rate_that_harms_is_rolled_back(lossy: Path, tmp_path: Path) -> None:
    done = polish.polish(
        lossy, MODEL, tmp_path / "p", calibration=CALIBRATION, samples=24, device="cpu", options=Options(rate=3.0)
    )
    assert done.rate is None
    assert done.after == done.before
    assert "did not help" in done.notes[0]
    before, after = tensors_of(lossy), tensors_of(tmp_path / "p")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_polished_is_refused(lossy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="too few to tune scales"):
        polish.polish(lossy, MODEL, tmp_path / "p", calibration=CALIBRATION, samples=8, device="cpu")
    floats = tmp_path / "fp8"
    quantize(MODEL, parse_recipe("name: f\ncomponents: {language: fp8-dynamic}\n", name="f"), floats, device="cpu")
    with pytest.raises(PlanError, match="no scales can be tuned"):
        polish.polish(floats, MODEL, tmp_path / "p", calibration=CALIBRATION, device="cpu")
    monkeypatch.setattr(polish.budget, "available_bytes", lambda: 10_000_000)
    with pytest.raises(DoesNotFitError, match="polish needs about"):
        polish.polish(lossy, MODEL, tmp_path / "p", calibration=CALIBRATION, device="cpu")
    assert not (tmp_path / "p").exists()


def test_the_command_says_what_it_did(lossy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polish, "RATES", (6e-4,))
    words = [
        "polish",
        str(lossy),
        "--reference",
        str(MODEL),
        "-c",
        str(CALIBRATION),
        "-o",
        str(tmp_path / "p"),
        "--json",
    ]
    run = CliRunner().invoke(cli.app, words)
    assert run.exit_code == 0, run.output
    said: dict[str, Any] = json.loads(run.stdout)
    assert said["held_out_kl_after"] <= said["held_out_kl_before"]
    assert said["samples"] > said["held_out"] > 0


@pytest.mark.parametrize(
    ("losses", "rate", "tried"),
    [
        ((0.5, 0.09, 0.08, 0.085), polish.RATES[2], 4),
        ((0.5, 0.05, 0.06, 0.01), polish.RATES[1], 3),  # the last is not tried
        ((0.5, 0.4, 0.45, 0.3), None, 4),  # what does harm says nothing of the next
        ((0.09, 0.09, 0.2, 0.2), polish.RATES[0], 3),
    ],
)
def test_rates_are_tried_until_the_next_is_no_better(losses: tuple[float, ...], rate: float | None, tried: int) -> None:
    class Tuner:
        def train(self, fit: Any, held: Any, rate: float, *, epochs: int, most: int) -> tuple[float, None]:
            return losses[polish.RATES.index(rate)], None

    found, known = polish._best_rate(Tuner(), [], [], 0.1, Options())  # type: ignore[arg-type]
    assert found == rate
    assert list(known) == list(polish.RATES[:tried])


def test_scales_are_stored_as_they_were_judged() -> None:
    weight = grids.random(Scheme(bits=4, group_size=32), 8, 64)
    layer = ScaledLinear(weight, None, ALL, dtype=torch.float32, device="cpu")
    assert torch.equal(layer.rounded().scales, weight.scales)
    layer.log_factor.data += 0.01
    rounded = layer.rounded()
    assert torch.equal(rounded.scales, weight.grid.round_scales(weight.scales * torch.tensor(0.01).exp()))
    assert torch.equal(rounded.codes, replace(weight).codes)


def test_high_effort_polishes_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, in the run's own plan; a run that was cut off before goes on with it, and one that was not does not."""
    monkeypatch.setattr(polish, "RATES", (4e-3, 2e-3))
    monkeypatch.setattr(pipeline, "calibration_dtype", lambda device: torch.float32)  # on every CPU the same codes
    text = f"name: high\neffort: high\ncomponents: {{language: {LOSSY.replace('SYM', 'true')}}}\n"
    recipe = parse_recipe(text + f"calibration: {{samples: {SAMPLES // 3}}}\n", name="high")
    out = tmp_path / "out"
    real = polish.polish

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "polish", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quantize(MODEL, recipe, out, calibration=CALIBRATION, device="cpu")
    rounded, manifest = tensors_of(out), read_manifest(out)
    assert "polish" not in manifest
    assert verify_checkpoint(out) == []
    monkeypatch.setattr(pipeline, "polish", real)
    done = quantize(MODEL, recipe, out, calibration=CALIBRATION, device="cpu", resume=True)
    assert any(note.startswith("polish") for note in done.notes)
    assert "gradients" in done.planned.parts["polish"]
    assert verify_checkpoint(out) == []
    tuned, said = tensors_of(out), read_manifest(out)
    assert any(not torch.equal(tuned[name], value) for name, value in rounded.items())
    assert said["polish"]["held_out_kl_after"] < said["polish"]["held_out_kl_before"]
    assert said["polish"]["samples"] == SAMPLES // 3
    for key in ("calibration", "alphas", "errors", "fingerprint", "command", "work"):
        assert said[key] == manifest[key], key
    monkeypatch.setattr(pipeline, "polish", cut_off)
    quantize(MODEL, recipe, out, calibration=CALIBRATION, device="cpu", resume=True)
    assert all(torch.equal(tensors_of(out)[name], value) for name, value in tuned.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_high_effort_is_refused_where_its_gradients_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, by what polishing the model is known to take."""
    text = f"name: high\neffort: high\ncomponents: {{language: {LOSSY.replace('SYM', 'true')}}}\n"
    recipe, asked = parse_recipe(text, name="high"), list[int]()

    def needed(components: Any, coded: Any, *, tokens: int, followed: int) -> int:
        assert followed < tokens
        asked.append(followed)
        return 1 << 40

    monkeypatch.setattr(pipeline, "needed_bytes", needed)
    with pytest.raises(DoesNotFitError, match=r"in the polish .*gradients 1024\.00"):
        quantize(MODEL, recipe, tmp_path / "out", calibration=CALIBRATION, device="cpu", memory_limit=1 << 33)
    assert not (tmp_path / "out").exists()
    assert min(asked) > 0
    fast = recipe.model_copy(update={"effort": "fast"})
    components, plan = pipeline.plan_model(MODEL, fast)
    assert "polish" not in pipeline.plan_work(components, plan, fast, calibration=CALIBRATION)[0].phases


def test_memory_is_that_of_weights_gradients_and_activations(lossy: Path) -> None:
    """By hand: all but codes in float32, a byte a code, two copies of the largest; in a layer 40 vectors for a token of
    text, and 3 for one of an image."""
    components = open_coded(lossy).components
    sizes = {one.name: math.prod(one.shape) for one in components.parameters}
    coded = set(open_coded(lossy).schemes)
    kept = sum(size for name, size in sizes.items() if name not in coded)
    codes = sum(size for name, size in sizes.items() if name in coded)
    text = components.config.get_text_config()
    activations = 4 * 8 * (30 * 40 + 70 * 3) * text.hidden_size * text.num_hidden_layers
    wanted = 4 * kept + codes + 8 * max(sizes.values()) + activations
    needed = polish.needed_bytes(components, coded, tokens=100, followed=30)
    assert needed == max(wanted, 4 * (kept + codes))


def test_a_checkpoint_may_be_polished_in_its_place(lossy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(lossy, mine)
    options = Options(rate=2e-3)
    with pytest.raises(UsageError, match="lie one in the other"):
        polish.polish(mine, MODEL, mine, calibration=CALIBRATION, samples=24, device="cpu", options=options)
    polish.polish(mine, MODEL, mine, calibration=CALIBRATION, samples=24, device="cpu", options=options, force=True)
    assert verify_checkpoint(mine) == []
    assert "polish" in read_manifest(mine)
