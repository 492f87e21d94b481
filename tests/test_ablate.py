"""ablate: a choice worked by hand, subsets against what they must hold, and the command on the bundled model."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests import fake_runs
from tests.conftest import Run
from tests.small_set import write_small_set
from tests.test_readme import scored_here
from vlmquant import ablate, demo, pipeline
from vlmquant.ablate.choice import Row, choose_row
from vlmquant.ablate.subsets import KINDS, Kind, draw_subset, subset_size
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import SampleSet, load_set
from vlmquant.checkpoint.files import Lock
from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.checkpoint.ownership import remove_checkpoint
from vlmquant.errors import InputError
from vlmquant.evaluation.metrics import summarize
from vlmquant.evaluation.records import Estimate
from vlmquant.recipe import CalibrationSpec, load_recipe
from vlmquant.tables.work import ablation_table


def about(point: float, half: float = 0.01) -> Estimate:
    return Estimate(point, point - half, point + half, 100)


def row(calibration: str | None, method: str, kl: float, seconds: float, *, draws: Sequence[float] = ()) -> Row:
    return Row(calibration, method, about(kl), about(0.1), about(0.05), 100, seconds, tuple(draws) or (kl,))


THREE = [row("image", "gptq", 0.20, 100), row("mixed", "gptq", 0.21, 90), row("text", "awq", 0.25, 30)]


def test_the_lowest_is_taken_where_it_is_alone() -> None:
    found = choose_row(THREE, [about(0, 0), about(0.01, 0.009), about(0.05)])
    assert (found.least, found.taken, found.as_good) == (0, 0, ())
    assert found.sentence == (
        "use gptq on image calibration: KL 0.2000 [0.1900, 0.2100] nats/token, the lowest of 3; the other 2 lose more"
    )


def test_what_is_as_good_and_hardly_cheaper_is_told_and_not_taken() -> None:
    found = choose_row(THREE, [about(0, 0), about(0.01, 0.011), about(0.05)])
    assert (found.least, found.taken, found.as_good) == (0, 0, (1,))
    assert (
        "as good within noise: gptq on mixed calibration (KL +0.0100 [-0.0010, 0.0210]; 90 % of the time)"
        in found.sentence
    )
    assert found.sentence.endswith("; the other loses more")


def test_within_noise_the_cheaper_is_taken() -> None:
    found = choose_row(THREE, [about(0, 0), about(0.01, 0.011), about(0.05, 0.06)])
    assert (found.least, found.taken, found.as_good) == (0, 2, (1, 2))
    assert found.sentence.startswith("use awq on text calibration: KL 0.2500")
    assert "the lowest, gptq on image calibration (KL +0.0500 [-0.0100, 0.1100]), in 30 % of its time" in found.sentence


def test_of_two_about_as_cheap_the_one_that_loses_less_is_taken() -> None:
    rows = [*THREE, row(None, "rtn", 0.26, 27)]
    assert choose_row(rows, [about(0, 0), about(0.01), about(0.05, 0.06), about(0.06, 0.07)]).taken == 2
    assert choose_row([*rows[:3], replace(rows[3], seconds=1)], [about(0), *[about(0.05, 0.06)] * 3]).taken == 3


def test_what_was_no_worse_in_one_draw_is_as_good() -> None:
    rows = [row("image", "gptq", 0.2, 9, draws=(0.19, 0.21)), row("text", "gptq", 0.3, 9, draws=(0.40, 0.20))]
    assert choose_row(rows, [about(0, 0), about(0.1)]).as_good == (1,)
    apart = [rows[0], replace(rows[1], kl_of_draws=(0.39, 0.22))]
    assert choose_row(apart, [about(0, 0), about(0.1)]).as_good == ()


def a_set(images: int, texts: int) -> SampleSet:
    shown = [
        Sample(f"i{n}", ("caption", "vqa")[n % 2], "What?", ("This.",), (Path(f"/{n}.png"),)) for n in range(images)
    ]
    read = [Sample(f"t{n}", "text", "What?", ("That.",)) for n in range(texts)]
    return SampleSet("a", (*shown, *read), None, "")


@given(
    images=st.integers(1, 30),
    texts=st.integers(0, 30),
    wanted=st.integers(2, 70),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_subsets_are_of_one_size_and_of_their_kind(
    images: int, texts: int, wanted: int, seed: int, data: st.DataObject
) -> None:
    kinds: list[Kind] = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True))
    source = a_set(images, texts)
    size = subset_size(source, kinds, wanted)
    assert size == wanted or any(size == most for most in (images, 2 * images, images + texts))
    texts_of = {sample.id: (sample.task, sample.question, sample.answers) for sample in source.samples}
    for kind in kinds:
        drawn = draw_subset(source, CalibrationSpec(seed=seed), kind, size=size, draw=1)
        seeing = [sample for sample in drawn.samples if sample.images]
        assert len({sample.id for sample in drawn.samples}) == len(drawn.samples) == size
        assert len(seeing) == {"text": 0, "image": size, "mixed": (size + 1) // 2}[kind]
        assert drawn.stripped == max(0, size - len(seeing) - texts)
        assert {s.id: (s.task, s.question, s.answers) for s in drawn.samples}.items() <= texts_of.items()


def test_texts_that_lost_their_images_are_those_of_the_image_calibration() -> None:
    source, spec = a_set(40, 0), CalibrationSpec()
    image, text, mixed = (draw_subset(source, spec, kind, size=16, draw=1) for kind in ("image", "text", "mixed"))
    assert [replace(sample, images=()) for sample in image.samples] == list(text.samples)
    assert {sample for sample in mixed.samples if sample.images} < set(image.samples)
    assert [sample.task for sample in text.samples].count("vqa") == 8
    other = draw_subset(source, spec, "image", size=16, draw=2)
    assert (other.name, image.name) == ("image-2", "image")
    assert set(other.samples) != set(image.samples)


def test_a_set_without_images_is_refused_where_they_are_needed() -> None:
    with pytest.raises(InputError, match="none of its 5 samples has an image, which calibration on image and mixed"):
        subset_size(a_set(0, 5), ["text", "image", "mixed"], 4)
    assert subset_size(a_set(0, 5), ["text"], 4) == 4


def test_pooled_draws_are_their_sums() -> None:
    reference = [fake_runs.sample(index, "vqa") for index in range(30)]
    base = fake_runs.run("model", reference)
    one, other = (fake_runs.run("int4", fake_runs.degraded(reference, seed=seed)) for seed in (0, 1))
    options: dict[str, Any] = {"seed": 0, "resamples": 50}
    alone = summarize(ablate.pool([one]), ablate.pool([base]), **options)["all"]
    full = summarize(one, base, **options)["all"]
    assert all(alone[name] == full[name] for name in ("kl", "perplexity_increase", "flip_rate"))
    both = summarize(ablate.pool([one, other]), ablate.pool([base, base]), **options)["all"]
    tokens = sum(sample.tokens for sample in reference)
    kl = sum(sample.kl or 0 for run in (one, other) for sample in run.samples) / (2 * tokens)
    nll = [sum(sample.nll for sample in run.samples) / tokens for run in (one, other, base)]
    assert both["kl"].point == pytest.approx(kl)
    assert both["perplexity_increase"].point == pytest.approx(math.exp((nll[0] + nll[1]) / 2 - nll[2]) - 1)


def found_of(rows: Sequence[Row], behind: Sequence[Estimate]) -> ablate.Ablation:
    samples = [fake_runs.sample(index, "vqa") for index in range(2)]
    report = fake_runs.report(samples, fake_runs.run("int4", fake_runs.degraded(samples, seed=0)))
    return ablate.Ablation(tuple(rows), tuple(behind), choose_row(rows, behind), report, "user CPU s")


def test_what_is_told_once_all_is_measured() -> None:
    alone = [row("text", "gptq", 0.2, 9)]
    used = {"text-gptq": {"too_long": {"a": 3000}}}
    told = ablate._after(load_recipe("mixed"), found_of(alone, [about(0, 0)]), used)
    assert told == [
        "text-gptq: 1 samples longer than max_tokens were left out",
        "text alone cannot calibrate all of the recipe: components.vision_encoder (method int8) needs images",
    ]
    assert ablate._after(load_recipe("gptq-w4"), found_of(alone, [about(0, 0)]), {}) == []
    few = [replace(alone[0], calibration="image", kl=Estimate(0.2, 0.1, 0.3, 9))]
    assert ablate._after(load_recipe("mixed"), found_of(few, [about(0, 0)]), {}) == [
        "9 held-out samples: the intervals say little; take more"
    ]


def test_the_table_marks_the_lowest_what_is_as_good_and_what_to_take() -> None:
    found = found_of(THREE, [about(0, 0), about(0.01, 0.02), about(0.05, 0.06)])
    table = ablation_table(found)
    assert [line[:3] for line in table.rows] == [
        ("gptq", "image", "lowest"),
        ("gptq", "mixed", "as good"),
        ("awq", "text", "as good, recommended"),
    ]
    assert table.rows[1][3:] == (
        *("0.2100 [0.2000, 0.2200]", "0.0100 [-0.0100, 0.0300]", "+10.00 % [+9.00, +11.00]", "5.0 % [4.0, 6.0]"),
        *("100", "90.0"),
    )
    several = found_of([replace(one, kl_of_draws=(0.1, 0.3)) for one in THREE], found.behind)
    assert "0.1000 to 0.3000" in ablation_table(several).rows[0]


# --- the command, on the bundled model ---


@pytest.fixture(scope="module")
def words() -> list[object]:
    return [
        *("ablate", demo.model_dir(), "--data", demo.test_set_dir()),
        *("--calibration", demo.calibration_set_dir(), "--recipe", "gptq-w4"),
        *("--effort", "fast", "--samples", 8, "--limit", 12, "--device", "cpu"),
    ]


ONE = ("--calibrations", "text,image", "--methods", "gptq", "--samples", 4, "--limit", 8)
TWO = ("--calibrations", "text,image", "--methods", "gptq,rtn")


@pytest.fixture
def scored_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process."""
    monkeypatch.setattr(pipeline, "score_models", scored_here)


@pytest.mark.usefixtures("scored_quickly")
def test_two_calibrations_and_two_methods(run: Run, words: list[object], tmp_path: Path) -> None:
    work, report = tmp_path / "work", tmp_path / "report.json"
    code, out, err = run(*words, *TWO, "--work", work, "--keep", "--json", "--out", report)
    assert code == 0, err
    found = json.loads(out)
    names = {(one["method"], one["calibration"]): one for one in found["rows"]}
    assert set(names) == {("gptq", "text"), ("gptq", "image"), ("rtn", None)}
    assert [one["kl"]["point"] for one in found["rows"]] == sorted(one["kl"]["point"] for one in found["rows"])
    assert sum(one["recommended"] for one in found["rows"]) == 1
    assert found["rows"][0]["above_lowest"]["point"] == 0
    assert all(one["seconds"] > 0 for one in found["rows"])
    assert "text calibration: 4 of 8 samples had their images taken away" in found["notes"]
    assert names["gptq", "image"]["tokens"] > names["gptq", "text"]["tokens"] > names["rtn", None]["tokens"] == 0
    assert found["recommendation"].startswith("use ")

    # what each row says is what the report, which others can read, says of that checkpoint
    told = json.loads(report.read_text())
    labels = [one["label"] for one in told["candidates"]]
    assert labels == ["text-gptq", "image-gptq", "rtn"]
    for label, summary in zip(labels, told["summaries"][1:], strict=True):
        method, calibration = (label, None) if label == "rtn" else (label.partition("-")[2], label.partition("-")[0])
        assert summary["all"]["kl"] == names[method, calibration]["kl"]

    # and the checkpoint is what `quantize` makes of that calibration set
    assert {len(sample.images) for sample in load_set(work / "sets" / "text").samples} == {0}
    code, _, err = run(
        *(
            "quantize",
            demo.model_dir(),
            "-r",
            "gptq-w4",
            "--effort",
            "fast",
            "--device",
            "cpu",
            "-o",
            tmp_path / "by-hand",
        ),
        *("--calibration", work / "sets" / "image"),
    )
    assert code == 0, err
    hand, image, text = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "by-hand", work / "image-gptq", work / "text-gptq")
    )
    assert all((hand[name] == image[name]).all() for name in hand)
    assert any((text[name] != image[name]).any() for name in hand)


@pytest.mark.usefixtures("scored_quickly")
def test_an_interrupted_ablation_goes_on(
    run: Run, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, quantize = tmp_path / "work", pipeline.quantize
    made: list[str] = []

    def interrupted(model: Path, recipe: Any, out: Path, **options: Any) -> Any:
        made.append(out.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return quantize(model, recipe, out, **options)

    monkeypatch.setattr(pipeline, "quantize", interrupted)
    assert run(*words, *ONE, "--work", work)[0] != 0
    assert (work / "text-gptq" / MANIFEST_NAME).is_file()
    first = (work / "text-gptq" / MANIFEST_NAME).stat()
    costs = json.loads((work / "ablation.json").read_text())["costs"]
    assert set(costs) == {"text-gptq", "image-gptq"}

    kept: list[tuple[int, int]] = []

    def watched(model: Path, recipe: Any, out: Path, **options: Any) -> Any:
        done = quantize(model, recipe, out, **options)
        if out.name == "text-gptq":
            now = (out / MANIFEST_NAME).stat()
            kept.append((now.st_ino, now.st_mtime_ns))
        return done

    monkeypatch.setattr(pipeline, "quantize", watched)
    code, out, err = run(*words, *ONE, "--work", work, "--json")
    assert code == 0, err
    assert kept == [(first.st_ino, first.st_mtime_ns)]
    seconds = {one["calibration"]: one["seconds"] for one in json.loads(out)["rows"]}
    assert seconds["text"] == costs["text-gptq"]["user_cpu_seconds"]
    assert sorted(path.name for path in work.iterdir()) == ["ablation.json", "sets"]  # what was scored is deleted
    assert json.loads((work / "ablation.json").read_text())["costs"] == {}


@pytest.mark.usefixtures("scored_quickly")
def test_several_draws_stand_in_one_row(run: Run, words: list[object], tmp_path: Path) -> None:
    code, out, err = run(
        *words,
        "--work",
        tmp_path / "work",
        "--calibrations",
        "mixed",
        "--methods",
        "gptq,rtn",
        "--draws",
        2,
        *("--samples", 4),
    )
    assert code == 0, err
    assert "mixed-gptq-2, 2 of 3" in err
    header, first, second = out.splitlines()[0], *out.splitlines()[2:4]
    assert "of each draw" in header
    assert {first.split()[0], second.split()[0]} == {"gptq", "rtn"}
    assert out.splitlines()[-1].startswith("Recommended: use ")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--methods", "gptq,gtpq"), 2, "--methods: 'gtpq' is none of rtn, search, int8, gptq, awq, awq+gptq"),
        (("--methods", "gptq,gptq"), 2, "--methods: gptq stands twice"),
        (("--calibrations", "images"), 2, "did you mean 'image'?"),
        (("--methods", "int8"), 1, "method int8 makes 8-bit integers"),
        (("--calibration", demo.test_set_dir()), 1, "of its images are in the calibration set test too"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    run: Run, words: list[object], tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    found, _, err = run(*words, *options, "--work", tmp_path / "work")
    assert (found, message in err) == (code, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_keeps_the_language_layers(run: Run, words: list[object], tmp_path: Path) -> None:
    recipe = tmp_path / "vision.yaml"
    recipe.write_text("version: 1\nname: v\ncomponents: {vision_encoder: {scheme: w8a8-dynamic, method: int8}}\n")
    code, _, err = run(*words, "-r", recipe, "--work", tmp_path / "work")
    assert code == 2
    assert "keeps the language layers at 16 bits" in err


def test_a_set_of_text_alone(run: Run, words: list[object], tmp_path: Path) -> None:
    texts = write_small_set(tmp_path / "texts", pairs=0, texts=6)
    code, _, err = run(*words, "--calibration", texts, "--work", tmp_path / "work")
    assert code == 1
    assert "none of its 6 samples has an image" in err


def test_a_folder_that_holds_something_else_stays_as_it_is(run: Run, words: list[object], tmp_path: Path) -> None:
    (tmp_path / "work" / "text-gptq").mkdir(parents=True)
    (tmp_path / "work" / "text-gptq" / "thesis.txt").write_text("mine")
    code, _, err = run(*words, *TWO, "--work", tmp_path / "work")
    assert code == 2
    assert "holds something, and no ablation" in err
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "text-gptq", "thesis.txt"]


@pytest.mark.usefixtures("scored_quickly")
def test_another_ablation_needs_another_folder(run: Run, words: list[object], tmp_path: Path) -> None:
    short = (*words, "--work", tmp_path / "work", "--methods", "rtn", "--calibrations", "text")
    assert run(*short)[0] == 0
    code, _, err = run(*short, "--samples", 6)
    assert code == 2
    assert "holds an ablation with another number of samples; give a new folder" in err
    write_small_set(tmp_path / "work" / "sets" / "text", pairs=0, texts=8)
    code, _, err = run(*short, "--methods", "gptq")
    assert code == 2
    assert "holds other samples than this ablation's" in err


def test_one_ablation_at_a_time_works_in_a_folder(run: Run, words: list[object], tmp_path: Path) -> None:
    lock = Lock(tmp_path / "ablation.lock")
    lock.acquire()
    code, _, err = run(*words, *TWO, "--work", tmp_path)
    lock.release()
    assert code == 2
    assert "another vlmquant writes this output" in err
    assert list(tmp_path.iterdir()) == []


def test_only_what_we_wrote_is_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.quantize(demo.model_dir(), load_recipe("rtn-w4"), out, device="cpu")
    (out / "notes.txt").write_text("mine")
    (out / "config.json").write_text("changed")
    assert remove_checkpoint(out) == ["config.json", "notes.txt"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "notes.txt"]
