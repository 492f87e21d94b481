"""Metrics from hand-made scores: points by hand, intervals by what intervals promise."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from vlmquant.errors import InputError
from vlmquant.evaluation.metrics import (
    bleu_signature,
    image_clusters,
    is_caption,
    is_exact,
    is_short_answer,
    kl_difference,
    summarize,
)
from vlmquant.evaluation.records import Costs, Run, SampleScore

COSTS = Costs(weight_bytes=1, load_seconds=1.0, peak_bytes=1, tokens_per_second=1.0, prefill_seconds=1.0)
BLANK = SampleScore(
    id="",
    task="vqa",
    images=(),
    tokens=1,
    nll=0.0,
    all_tokens=1,
    all_nll=0.0,
    kl=None,
    flips=None,
    generated=None,
    references=("yes",),
    exact=None,
)


def run_of(*samples: SampleScore, label: str = "model") -> Run:
    named = tuple(replace(sample, id=sample.id or f"s{index}") for index, sample in enumerate(samples))
    return Run("dir", label, named, COSTS, {}, {}, None)


def one(run: Run, metric: str, reference: Run | None = None, stratum: str = "all") -> float:
    return summarize(run, reference, seed=0, resamples=50)[stratum][metric].point


def test_perplexity_is_weighted_by_tokens() -> None:
    run = run_of(replace(BLANK, tokens=3, nll=3 * math.log(2)), replace(BLANK, tokens=1, nll=math.log(32)))
    assert one(run, "perplexity") == pytest.approx(4)  # (3 * 1 + 1 * 5) / 4 = 2 bits a token


def test_all_token_perplexity_counts_all_tokens() -> None:
    assert one(run_of(replace(BLANK, all_tokens=2, all_nll=2 * math.log(7))), "all_token_perplexity") == pytest.approx(
        7
    )


def test_kl_and_flips_are_a_token() -> None:
    run = run_of(replace(BLANK, tokens=3, kl=0.3, flips=1), replace(BLANK, tokens=1, kl=0.5, flips=1))
    assert one(run, "kl") == pytest.approx(0.2)
    assert one(run, "flip_rate") == pytest.approx(0.5)


def test_exact_match_is_percent_of_short_answers_only() -> None:
    long = replace(BLANK, references=("a long answer of six words",), exact=None)
    run = run_of(replace(BLANK, exact=True), replace(BLANK, exact=False), replace(BLANK, exact=False), long)
    summary = summarize(run, None, seed=0, resamples=50)
    assert summary["all"]["exact_match"].point == pytest.approx(100 / 3)
    assert summary["all"]["exact_match"].n == 3


def test_a_metric_without_samples_is_left_out() -> None:
    assert set(summarize(run_of(BLANK), None, seed=0, resamples=50)["all"]) == {"perplexity", "all_token_perplexity"}


def test_strata_are_the_tasks_and_all() -> None:
    run = run_of(replace(BLANK, nll=math.log(2)), replace(BLANK, task="ocr", nll=math.log(8)))
    assert list(summarize(run, None, seed=0, resamples=50)) == ["vqa", "ocr", "all"]
    assert [one(run, "perplexity", stratum=stratum) for stratum in ("vqa", "ocr", "all")] == pytest.approx([2, 8, 4])


def test_bleu_counts_captions_only() -> None:
    caption = replace(BLANK, task="caption", generated="a dog runs fast", references=("a dog runs fast", "one dog"))
    run = run_of(caption, replace(BLANK, generated="no", exact=False))
    assert one(run, "bleu4_sacrebleu") == pytest.approx(100)
    assert one(run, "bleu4_coco") == pytest.approx(100, abs=1e-5)
    assert "nrefs:2" in str(bleu_signature(run))
    assert bleu_signature(run_of(BLANK)) is None


def test_wrong_image_perplexity() -> None:
    run = run_of(replace(BLANK, tokens=2, wrong_image_nll=2 * math.log(20)), BLANK)
    assert one(run, "perplexity_wrong_image") == pytest.approx(20)


def test_differences_are_positive_when_the_candidate_is_worse() -> None:
    caption = replace(BLANK, task="caption", references=("a dog runs fast",))
    good = run_of(
        replace(caption, tokens=2, nll=2 * math.log(4), generated="a dog runs fast"),
        replace(BLANK, tokens=0, exact=True),
        label="reference",
    )
    bad = run_of(
        replace(caption, tokens=2, nll=2 * math.log(5), generated="a cat sits"), replace(BLANK, tokens=0, exact=False)
    )
    assert one(bad, "perplexity_increase", good) == pytest.approx(0.25)
    assert one(bad, "exact_match_drop", good) == pytest.approx(100)
    assert one(bad, "bleu4_drop", good) == pytest.approx(100 - one(bad, "bleu4_sacrebleu"))
    assert one(bad, "bleu4_coco_drop", good) == pytest.approx(one(good, "bleu4_coco") - one(bad, "bleu4_coco"))


def noisy(count: int, seed: int, *, shift: float = 0.0, images: Callable[[int], str] = str) -> Run:
    """Samples of very different difficulty, `shift` nats a token worse than with the same seed and no shift."""
    random = np.random.default_rng(seed)
    nll, extra = random.normal(2.0, 0.5, count), random.normal(shift, 0.01, count)
    scores = [
        replace(BLANK, tokens=10, nll=10 * float(n + (e if shift else 0)), images=(images(k),))
        for k, (n, e) in enumerate(zip(nll, extra, strict=True))
    ]
    return run_of(*scores)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = math.exp(2.0)
    found = [summarize(noisy(60, seed), None, seed=seed, resamples=400)["all"]["perplexity"] for seed in range(200)]
    covered = sum(estimate.low <= truth <= estimate.high for estimate in found)
    assert (
        175 <= covered <= 198
    )  # 95 % of 200 is 190; standard deviation 3; the percentile bootstrap runs a little short


def test_interval_agrees_with_theory() -> None:
    estimate = summarize(noisy(400, 1), None, seed=0, resamples=4000)["all"]["perplexity"]
    # log perplexity is a mean of 400 values of sd about .5: standard error .025 of it, times the perplexity
    sd = np.std([sample.nll / 10 for sample in noisy(400, 1).samples])
    assert estimate.standard_error == pytest.approx(estimate.point * sd / 20, rel=0.1)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * estimate.point * sd / 20, rel=0.1)
    assert estimate.n == 400


def test_paired_interval_is_narrower_than_the_unpaired() -> None:
    reference, candidate = noisy(100, 3), noisy(100, 3, shift=0.02)
    paired = summarize(candidate, reference, seed=0, resamples=1000)["all"]["perplexity_increase"]
    alone = summarize(candidate, None, seed=0, resamples=1000)["all"]["perplexity"]
    assert paired.point == pytest.approx(math.exp(0.02) - 1, abs=0.005)
    assert paired.low > 0  # certain, although the perplexity itself is known to some percent only
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low) / alone.point


def test_kl_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.exponential(1.0, 200)  # what the two models share: some samples are hard for both
    better, worse = (
        run_of(*(replace(BLANK, images=(str(i),), kl=float(h + extra)) for i, h in enumerate(hard)), label=name)
        for name, extra in (("better", 0.0), ("worse", 0.05))
    )
    found = kl_difference(better, worse, seed=0, resamples=500)
    assert found.point == pytest.approx(-0.05)
    assert found.low == pytest.approx(found.high)  # what they share is gone
    assert found.n == 200
    unpaired = summarize(better, better, seed=0, resamples=500)["all"]["kl"]
    assert unpaired.high - unpaired.low > 0.1
    with pytest.raises(InputError, match="without a reference"):
        kl_difference(better, run_of(*(replace(s, kl=None) for s in better.samples)), seed=0, resamples=5)


def test_same_seed_same_interval() -> None:
    first, again, other = (summarize(noisy(30, 1), None, seed=seed, resamples=100)["all"] for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_samples_that_share_an_image_are_resampled_together() -> None:
    alone = summarize(noisy(100, 2), None, seed=0, resamples=2000)["all"]["perplexity"]
    # twice the same hundred samples is no more evidence, if the copies share their images
    copies = [replace(sample, id=f"{sample.id}-{k}") for k in range(2) for sample in noisy(100, 2).samples]
    shared = summarize(run_of(*copies), None, seed=0, resamples=2000)["all"]["perplexity"]
    apart = [replace(sample, images=(sample.id,)) for sample in copies]
    separate = summarize(run_of(*apart), None, seed=0, resamples=2000)["all"]["perplexity"]
    assert (shared.low, shared.high) == pytest.approx((alone.low, alone.high))
    assert separate.high - separate.low == pytest.approx((alone.high - alone.low) / math.sqrt(2), rel=0.1)


def test_clusters_are_linked_through_shared_images() -> None:
    samples = [replace(BLANK, images=images) for images in [("a",), ("b", "c"), (), ("c", "a"), ("d",), ()]]
    clusters = image_clusters(samples)
    assert len({clusters[0], clusters[1], clusters[3]}) == 1
    assert len(set(clusters.tolist())) == 4


def test_unpaired_runs_are_refused() -> None:
    run = run_of(BLANK, BLANK)
    with pytest.raises(InputError, match="2 samples scored, but 1"):
        summarize(run, run_of(BLANK), seed=0, resamples=10)
    with pytest.raises(InputError, match="same tokenizer"):
        summarize(run, run_of(BLANK, replace(BLANK, tokens=2)), seed=0, resamples=10)


def test_kinds_of_answers() -> None:
    assert is_short_answer("vqa", ["a red car"])
    assert not is_short_answer("caption", ["a red car"])
    assert not is_short_answer("vqa", ["the car that stands there"])
    assert is_caption("caption", ["a red car"])
    assert not is_caption("vqa", ["red", "dark red"])  # one short answer in two spellings
    assert is_caption("describe", ["a car stands in the street", "there is a car in the street"])
    assert not is_caption("reasoning", ["because the car is red and big"])


@pytest.mark.parametrize(
    ("text", "exact"), [("Two.", True), (" two ", True), ("2", True), ("two dogs", False), ("", False)]
)
def test_exact_match_looks_past_case_spaces_and_full_stops(text: str, exact: bool) -> None:
    assert is_exact(text, ["two", "2"]) == exact


def test_runs_of_other_samples_are_told_in_a_line_whatever_they_are_called() -> None:
    name = "\x1b[31m\n" + "x" * 50_000
    mine, theirs = run_of(replace(BLANK, id=name + "a"), label=name), run_of(replace(BLANK, id=name + "b"), label=name)
    for other in (theirs, run_of(BLANK, BLANK, label=name)):
        with pytest.raises(InputError, match="same data") as caught:
            summarize(mine, other, seed=0, resamples=10)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2000
