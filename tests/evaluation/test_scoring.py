"""score_model: sums over references, divergence by hand, the process it runs in, and what it refuses."""

import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests import tiny_vlm
from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.errors import InputError, SentinelError, UsageError, VlmquantError
from vlmquant.evaluation import remote, scoring
from vlmquant.evaluation.environment import environment, peak_resident_bytes
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.metrics import summarize
from vlmquant.evaluation.process import Worker
from vlmquant.evaluation.records import Run
from vlmquant.evaluation.remote import score_model, score_models
from vlmquant.evaluation.scoring import (
    Answering,
    check_samples,
    divergence,
    sample_from_dict,
    score_here,
    with_wrong_images,
)
from vlmquant.evaluation.settings import Settings

SETTINGS = Settings(
    dtype="float32", batch_size=3, caption_tokens=4, answer_tokens=3, speed_prompts=1, speed_rounds=2, speed_tokens=3
)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    found = []
    for number in range(3):
        image = tmp_path / f"{number}.png"
        Image.effect_noise((50, 50), 60 + 20 * number).convert("RGB").save(image)
        answers = ("a small dog runs .", "two people on the grass .", "a red bike near the water .")
        found.append(Sample(f"c{number}", "caption", "describe the image.", answers[: number + 1], (image,)))
    return [*found, Sample("q0", "vqa", "how many circles?", ("three",), found[0].images)]


@pytest.fixture(scope="module")
def other_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA with noise on its weights: a stand-in for what quantization does."""
    out_dir = tmp_path_factory.mktemp("other") / "noisy"
    tiny_vlm.build("llava", out_dir)
    tensors = load_file(out_dir / "model.safetensors")
    torch.manual_seed(0)
    noisy = {name: value + 0.05 * value.float().std() * torch.randn_like(value) for name, value in tensors.items()}
    save_file(
        {name: value.bfloat16() for name, value in noisy.items()}, out_dir / "model.safetensors", {"format": "pt"}
    )
    return out_dir


def test_divergence_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    candidate = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log()
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.25 * math.log(1 / 3) + 0.75 * math.log(3)
    kl, flips = divergence(reference, candidate)
    assert kl == pytest.approx(by_hand, rel=1e-6)
    assert flips == 2  # the tie of the first token goes to the first word
    assert divergence(reference, reference) == (0.0, 0)


def test_divergence_needs_one_vocabulary() -> None:
    with pytest.raises(InputError, match="vocabulary of 2 tokens and this model one of 3"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 3))


def test_a_damaged_manifest_is_told_before_the_work(
    tiny_llava: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    (model / "vlmquant.json").write_text("{}}")
    monkeypatch.setattr(scoring, "load_model", lambda *_, **__: pytest.fail("loaded first"))
    with pytest.raises(VlmquantError, match=r"vlmquant\.json:1"):
        score_here(model, samples, SETTINGS, reference=None, record=None)


def test_a_model_against_itself_and_against_noise(
    tiny_llava: Path, other_llava: Path, samples: list[Sample], tmp_path: Path
) -> None:
    record = tmp_path / "reference.npy"
    reference = score_here(tiny_llava, samples, SETTINGS, reference=None, record=record)
    assert [(sample.kl, sample.flips) for sample in reference.samples] == [(None, None)] * 4
    lps = LogProbs.open(record)
    again = score_here(tiny_llava, samples, SETTINGS, reference=lps, record=None)
    for first, second in zip(reference.samples, again.samples, strict=True):
        assert second == replace(first, kl=0.0, flips=0)
    noisy = score_here(other_llava, samples, replace(SETTINGS, batch_size=1), reference=lps, record=None)
    summary = summarize(noisy, reference, seed=0, resamples=20)["all"]
    assert summary["kl"].point > 1e-4
    assert {"perplexity_increase", "bleu4_drop", "exact_match_drop", "flip_rate"} <= set(summary)
    # KL of one sample, from both models' own forward passes in float64
    assert noisy.samples[3].kl == pytest.approx(kl_by_transformers(tiny_llava, other_llava, samples[3]), rel=1e-3)


def kl_by_transformers(reference: Path, candidate: Path, sample: Sample) -> float:
    item = Encoder(load_processor(reference)).encode(sample, sample.answers[0])
    positions = item.answer_mask.nonzero().flatten() - 1
    found = []
    for path in (reference, candidate):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            found.append(model(**item.inputs).logits[0, positions].double().log_softmax(-1))
    return float((found[0].exp() * (found[0] - found[1])).sum())


def test_references_of_a_caption_are_summed(tiny_llava: Path, samples: list[Sample]) -> None:
    def score(*answers: str, references: int = 2) -> tuple[int, float, int, float]:
        sample = replace(samples[0], answers=answers)
        settings = replace(SETTINGS, generate=False, references_per_caption=references)
        found = score_here(tiny_llava, [sample], settings, reference=None, record=None).samples[0]
        return found.tokens, found.nll, found.all_tokens, found.all_nll

    first, second, both = (
        score("a small dog"),
        score("two people ride"),
        score("a small dog", "two people ride", "a bike"),
    )
    assert both[0] == first[0] + second[0]
    assert both[1] == pytest.approx(first[1] + second[1], rel=1e-4)
    prompt = first[2] - first[0]
    assert both[2] == prompt + both[0]  # the prompt counts once
    assert both[3] == pytest.approx(first[3] + second[1], rel=1e-4)
    assert score("a small dog", "two people ride", references=1) == pytest.approx(first)


def test_run_records_what_was_done(tiny_llava: Path, samples: list[Sample]) -> None:
    run = score_here(tiny_llava, samples, SETTINGS, reference=None, record=None)
    caption, answer = run.samples[2], run.samples[3]
    assert caption.references == ("A small dog runs.", "Two people on the grass.", "A red bike near the water.")
    assert caption.generated
    assert (caption.exact, answer.exact) == (None, False)
    assert answer.images == run.samples[0].images != run.samples[1].images
    assert run.settings["dtype"] == "float32"
    assert run.environment["threads"] == torch.get_num_threads()
    assert run.costs.weight_bytes == (tiny_llava / "model.safetensors").stat().st_size
    assert run.costs.tokens_per_second is not None
    assert run.costs.tokens_per_second > 0
    assert run.costs.peak_bytes >= (run.costs.baseline_bytes or 0) > 0
    weights = sum(value.numel() * 4 for value in load_file(tiny_llava / "model.safetensors").values())  # in float32
    assert run.costs.memory is not None
    assert list(run.costs.memory) == ["cpu"]
    assert weights <= (run.costs.held_bytes or 0) <= weights + 4096  # and buffers that no file holds
    assert (run.costs.rounds, run.costs.unpaired) == (None, None)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_the_longest_prompts_with_an_image_are_timed(tiny_llava: Path, samples: list[Sample]) -> None:
    long = "which of the many things in this picture is the largest of all?"
    asked = [
        *samples,
        replace(samples[0], id="long", question=long),
        replace(samples[0], id="text", question=10 * long, images=()),
    ]
    encoder = Encoder(load_processor(tiny_llava), tidy_captions=False)
    of = scoring.Answers(asked, encoder, SETTINGS)
    assert scoring.long_prompts(of, 3) == [4, 3, 0]  # "how many circles?" has more tokens than "describe the image."
    only_text = scoring.Answers([replace(one, images=()) for one in asked], encoder, SETTINGS)
    assert scoring.long_prompts(only_text, 1) == [5]


def test_no_answers_no_speed(tiny_llava: Path, samples: list[Sample]) -> None:
    run = score_here(tiny_llava, samples[:1], replace(SETTINGS, generate=False), reference=None, record=None)
    assert (run.costs.tokens_per_second, run.costs.prefill_seconds) == (None, None)


class Here:
    """A worker in this process: what it is asked, and what it answers or, by a plan, cannot."""

    log: ClassVar[list[str]] = []
    fails: ClassVar[Callable[[str], bool]] = staticmethod(lambda asked: False)
    free: ClassVar[int | None] = None

    def __init__(self, files: Sequence[int]) -> None:
        self.answering, self.name = Answering(), ""

    def ask(self, request: dict[str, Any]) -> bytes:
        ((what, asked),) = request.items()
        if what == "load":
            self.name = Path(asked["model_dir"]).name
        self.log.append(f"{what} {self.name}" + (f" {asked}" if what == "time" else ""))
        if Here.fails(self.log[-1]):
            return json.dumps({"error": {"kind": "DoesNotFitError", "message": "no room"}}).encode()
        answer = self.answering(json.loads(json.dumps(request, default=str)))
        if what == "score" and Here.free is not None:
            answer["score"]["room"]["free"] = Here.free
        return json.dumps(answer).encode()

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"end {self.name}")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(remote, "Worker", Here)
    Here.log, Here.fails, Here.free = [], staticmethod(lambda asked: False), None
    return Here


def test_models_take_turns_with_the_reference(
    here: type[Here], tiny_llava: Path, other_llava: Path, samples: list[Sample], tmp_path: Path
) -> None:
    base, run = score_models(
        [tiny_llava, other_llava], samples, SETTINGS, record=tmp_path / "lp", labels=["the original", "noise"]
    )
    one, other = tiny_llava.name, other_llava.name
    assert here.log == [
        f"load {one}", f"score {one}",
        f"load {other}", f"time {one} 3", f"time {other} 3", f"time {other} 3", f"time {one} 3", f"score {other}",
        f"end {other}", f"end {one}",
    ]  # fmt: skip
    assert (base.label, run.label) == ("the original", "noise")
    assert base.costs.rounds is None
    assert run.costs.rounds is not None
    assert base.costs.tokens_per_second == pytest.approx(
        statistics.median(one.reference.tokens_per_second for one in run.costs.rounds)
    )
    assert run.samples[0].kl is not None


@pytest.mark.parametrize("why", ["no room to begin with", "memory runs out"])
def test_models_that_do_not_fit_beside_the_reference_are_scored_without_it(
    why: str, here: type[Here], tiny_llava: Path, other_llava: Path, samples: list[Sample], tmp_path: Path
) -> None:
    one, other = tiny_llava.name, other_llava.name
    if why == "memory runs out":
        here.fails = staticmethod(lambda asked: asked == f"load {other}" and f"end {one}" not in here.log)
    else:
        here.free = 1000
    base, run = score_models([tiny_llava, other_llava], samples, SETTINGS, record=tmp_path / "lp", labels=["a", "b"])
    tried = [f"load {other}", f"end {other}"] if why == "memory runs out" else []
    alone = [f"load {other}", f"time {other} 3", f"time {other} 3", f"score {other}", f"end {other}"]
    assert here.log == [
        f"load {one}", f"score {one}", *tried, f"time {one} 3", f"time {one} 3", f"end {one}", *alone
    ]  # fmt: skip
    assert run.costs.rounds is None
    assert run.costs.unpaired == "it and the reference do not fit into memory at once"
    assert base.costs.tokens_per_second
    assert run.costs.tokens_per_second
    assert run.samples[0].kl is not None


def test_wrong_images_are_another_samples_of_the_task(samples: list[Sample]) -> None:
    swapped = [with_wrong_images(samples, index) for index in range(4)]
    assert [sample and sample.images for sample in swapped] == [*(samples[k].images for k in (1, 2, 0)), None]
    assert [sample and sample.question for sample in swapped[:3]] == [sample.question for sample in samples[:3]]


def test_wrong_images_are_scored(tiny_llava: Path, samples: list[Sample]) -> None:
    settings = replace(SETTINGS, wrong_image=True, generate=False)
    right, wrong = (score_here(tiny_llava, given, settings, reference=None, record=None).samples for given in (
        samples, [replace(samples[0], images=samples[1].images), *samples[1:]]))  # fmt: skip
    assert right[0].wrong_image_nll == pytest.approx(wrong[0].nll, rel=1e-4)
    assert right[0].wrong_image_nll != pytest.approx(right[0].nll, rel=1e-4)
    assert right[3].wrong_image_nll is None  # the only one of its task


def test_score_model_runs_in_a_process_of_its_own(tiny_llava: Path, samples: list[Sample], tmp_path: Path) -> None:
    record = tmp_path / "reference.npy"
    settings = replace(SETTINGS, threads=1)
    run = score_model(tiny_llava, samples, settings, reference=None, record=record, label="original")
    assert run.label == "original"
    assert run.environment["threads"] == 1
    here = score_here(tiny_llava, samples, settings, reference=LogProbs.open(record), record=None)
    assert [sample.nll for sample in here.samples] == pytest.approx([sample.nll for sample in run.samples], rel=1e-5)
    assert [sample.kl for sample in here.samples] == pytest.approx([0.0] * 4, abs=1e-5)
    assert [sample.generated for sample in here.samples] == [sample.generated for sample in run.samples]


def test_an_error_in_the_process_comes_back_as_itself(
    tiny_llava: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = Answering()

    def here(worker: Worker, request: dict[str, Any]) -> bytes:
        return json.dumps(answering(json.loads(json.dumps(request, default=str)))).encode()

    monkeypatch.setattr(Worker, "ask", here)  # spares the seconds of importing transformers
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png"):
        score_model(tiny_llava, [replace(samples[0], images=(broken,))], SETTINGS, reference=None, record=None)


def test_an_empty_or_missing_model_is_named(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        score_model(tmp_path / "none", samples, SETTINGS, reference=None, record=None)


def test_samples_that_cannot_be_scored_are_refused(samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="no samples to evaluate on"):
        check_samples([])
    with pytest.raises(InputError, match="sample c0 has no answer"):
        check_samples([replace(samples[0], answers=(" ",))])
    with pytest.raises(InputError, match="two samples have the id c0"):
        check_samples([samples[0], samples[0]])


def test_a_reference_of_other_samples_is_refused(tiny_llava: Path, samples: list[Sample], tmp_path: Path) -> None:
    lps = LogProbs.create(tmp_path / "lp", {"c0": 3}, 600)
    with pytest.raises(InputError, match=r"4 of 4 samples are not given to it as to the reference"):
        score_here(tiny_llava, samples, SETTINGS, reference=lps, record=None)
    settings = replace(SETTINGS, allow_other_inputs=True)
    with pytest.raises(InputError, match=r"sample c0 has \d+ answer tokens here and 3 for the reference"):
        score_here(tiny_llava, samples, settings, reference=lps, record=None)


def test_logits_that_are_not_finite_are_caught(other_llava: Path, samples: list[Sample], tmp_path: Path) -> None:
    for file in other_llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    head = next(name for name in tensors if "lm_head" in name)
    tensors[head][7] = 3e38
    tensors[head][8] = -3e38
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SentinelError, match="not finite"):
        score_here(tmp_path, samples, SETTINGS, reference=None, record=None)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        Settings(batch_size=0)
    with pytest.raises(UsageError, match="dtype is 'float8'"):
        Settings(dtype="float8")  # type: ignore[arg-type]


def test_samples_survive_the_way_to_the_process(samples: list[Sample]) -> None:
    sample = replace(samples[0], history=(Turn("a?", "b"),), system="be brief")
    assert sample_from_dict(json.loads(json.dumps(asdict(sample), default=str))) == sample


def test_environment_says_where() -> None:
    found = environment()
    assert {"vlmquant", "torch", "transformers", "cpu", "threads", "memory_bytes"} <= set(found)
    assert found["cpu"]
    assert 10_000_000 < peak_resident_bytes() <= found["memory_bytes"]
