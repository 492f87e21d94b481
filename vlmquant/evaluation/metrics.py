"""From scored samples to numbers with intervals. Every metric is a function of sums; a bootstrap, a matrix product."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlmquant.errors import InputError, shown
from vlmquant.evaluation.bleu import (
    STATISTICS,
    coco_score,
    coco_statistics,
    sacrebleu_score,
    sacrebleu_signature,
    sacrebleu_statistics,
)
from vlmquant.evaluation.records import Estimate, Run, SampleScore

CONFIDENCE = 0.95
SHORT_ANSWER_WORDS = 4
"""A sample whose shortest reference has at most this many words is answered exactly or not; captions never count."""
EVERYTHING = "all"
"""The stratum of all samples."""

Array = NDArray[np.float64]
Sums = Mapping[str, Array]
"""Statistic -> its sum over samples, (resamples,) or (resamples, 10) for the BLEU statistics."""


def is_short_answer(task: str, references: Sequence[str]) -> bool:
    """Whether a sample is scored by exact match."""
    return task != "caption" and min(len(reference.split()) for reference in references) <= SHORT_ANSWER_WORDS


def is_caption(task: str, references: Sequence[str]) -> bool:
    """Whether a sample is scored by BLEU-4: a caption, or several long references."""
    return task == "caption" or (len(references) >= 2 and not is_short_answer(task, references))


def normalise(answer: str) -> str:
    """Case folded, white space collapsed, quotes and full stops around it gone: how answers are compared exactly."""
    return re.sub(r"\s+", " ", answer.casefold()).strip(" .!?\"'`")


def is_exact(generated: str, references: Sequence[str]) -> bool:
    """Whether a generated answer equals any of the references after normalise."""
    return normalise(generated) in {normalise(reference) for reference in references}


def _per_token(total: str, tokens: str) -> Callable[[Sums], Array]:
    return lambda sums: sums[total] / sums[tokens]


def _perplexity(nll: str, tokens: str) -> Callable[[Sums], Array]:
    return lambda sums: np.exp(sums[nll] / sums[tokens])


METRICS: dict[str, tuple[str, Callable[[Sums], Array]]] = {
    "perplexity": ("tokens", _perplexity("nll", "tokens")),
    "all_token_perplexity": ("all_tokens", _perplexity("all_nll", "all_tokens")),
    "perplexity_wrong_image": ("wrong_image_tokens", _perplexity("wrong_image_nll", "wrong_image_tokens")),
    "kl": ("compared_tokens", _per_token("kl", "compared_tokens")),
    "flip_rate": ("compared_tokens", _per_token("flips", "compared_tokens")),
    "bleu4_sacrebleu": ("captions", lambda sums: sacrebleu_score(sums["sacrebleu"])),
    "bleu4_coco": ("captions", lambda sums: coco_score(sums["coco"])),
    "exact_match": ("answers", lambda sums: 100 * sums["exact"] / sums["answers"]),
}
"""Metric -> the statistic that must be positive for it to exist, and its value from sums.

Rates are fractions, BLEU-4 and exact_match percent, kl nats a token."""

DIFFERENCES: dict[str, tuple[str, Callable[[Array, Array], Array]]] = {
    "perplexity_increase": ("perplexity", lambda candidate, reference: candidate / reference - 1),
    "bleu4_drop": ("bleu4_sacrebleu", lambda candidate, reference: reference - candidate),
    "bleu4_coco_drop": ("bleu4_coco", lambda candidate, reference: reference - candidate),
    "exact_match_drop": ("exact_match", lambda candidate, reference: reference - candidate),
}
"""Paired difference -> the metric it compares, and how; positive is worse than the reference."""


def summarize(
    run: Run, reference: Run | None, *, seed: int, resamples: int, confidence: float = CONFIDENCE
) -> dict[str, dict[str, Estimate]]:
    """Stratum -> metric -> estimate, for every task of the run and for "all".

    Intervals are percentile bootstraps over images: samples that share one are drawn together. With a reference the
    paired DIFFERENCES stand beside the metrics; both models are resampled alike. A metric without samples is left out.
    """
    if reference is not None:
        check_paired(run, reference)
    runs = [statistics(run.samples), *([statistics(reference.samples)] if reference else [])]
    tasks = np.array([sample.task for sample in run.samples])
    summary = {}
    for stratum in [*dict.fromkeys(tasks.tolist()), EVERYTHING]:
        members = np.arange(len(tasks)) if stratum == EVERYTHING else np.flatnonzero(tasks == stratum)
        clusters = image_clusters([run.samples[index] for index in members])
        parts = [{name: values[members] for name, values in part.items()} for part in runs]
        summary[stratum] = _estimates(parts, clusters, seed=seed, resamples=resamples, confidence=confidence)
    return summary


def kl_difference(run: Run, other: Run, *, seed: int, resamples: int, confidence: float = CONFIDENCE) -> Estimate:
    """KL of `run` minus that of `other`, nats a token, both from the same reference and resampled alike over images.

    Below zero, `run` is the nearer to the reference. Raises InputError where the two were not scored on the same
    samples, or one of them without a reference.
    """
    check_paired(run, other)
    parts = [statistics(found.samples) for found in (run, other)]
    for found, part in zip((run, other), parts, strict=True):
        if not part["compared_tokens"].any():
            raise InputError(f"{shown(found.label)}: was scored without a reference; it has no KL to compare")
    (needed, value), clusters = METRICS["kl"], image_clusters(run.samples)
    counts = _resample_counts(int(clusters.max()) + 1, seed=seed, resamples=resamples)
    points = [value({name: part[name].sum(axis=0, keepdims=True) for name in ("kl", needed)}) for part in parts]
    draws = [
        _quietly(value, {name: counts @ _by_cluster(part[name], clusters) for name in ("kl", needed)}) for part in parts
    ]
    n = int((parts[0][needed] > 0).sum())
    return _interval(points[0] - points[1], draws[0] - draws[1], n, confidence=confidence)


def check_paired(run: Run, reference: Run) -> None:
    """Raise InputError unless both runs scored the same answer tokens of the same samples in the same order."""
    if len(run.samples) != len(reference.samples):
        raise InputError(
            f"{shown(run.label)}: {len(run.samples)} samples scored, but {len(reference.samples)} for "
            f"{shown(reference.label)}; score both on the same data"
        )
    for mine, theirs in zip(run.samples, reference.samples, strict=True):
        if (mine.id, mine.tokens) != (theirs.id, theirs.tokens):
            raise InputError(
                f"{shown(run.label)}: sample {shown(mine.id)} ({mine.tokens} answer tokens) stands where "
                f"{shown(reference.label)} has {shown(theirs.id)} ({theirs.tokens}); score both on the same data with "
                "the same tokenizer"
            )


def bleu_signature(run: Run) -> str | None:
    """sacrebleu's signature of bleu4_sacrebleu over all captions of the run; None without captions."""
    references = [sample.references for sample in run.samples if _has_caption(sample)]
    return sacrebleu_signature(references) if references else None


def _has_caption(sample: SampleScore) -> bool:
    return sample.generated is not None and is_caption(sample.task, sample.references)


def statistics(samples: Sequence[SampleScore]) -> dict[str, Array]:
    """Sufficient statistic -> (samples,) or (samples, 10) float64, zero where a sample does not take part."""

    def column(value: Callable[[SampleScore], float | None]) -> Array:
        return np.array([value(sample) or 0.0 for sample in samples], dtype=np.float64)

    def bleu(one: Callable[[str, Sequence[str]], Array]) -> Array:
        rows = [one(s.generated or "", s.references) if _has_caption(s) else np.zeros(STATISTICS) for s in samples]
        return np.stack(rows)

    return {
        "tokens": column(lambda sample: sample.tokens),
        "nll": column(lambda sample: sample.nll),
        "all_tokens": column(lambda sample: sample.all_tokens),
        "all_nll": column(lambda sample: sample.all_nll),
        "wrong_image_tokens": column(lambda sample: None if sample.wrong_image_nll is None else sample.tokens),
        "wrong_image_nll": column(lambda sample: sample.wrong_image_nll),
        "compared_tokens": column(lambda sample: None if sample.kl is None else sample.tokens),
        "kl": column(lambda sample: sample.kl),
        "flips": column(lambda sample: sample.flips),
        "answers": column(lambda sample: sample.exact is not None),
        "exact": column(lambda sample: sample.exact),
        "captions": column(_has_caption),
        "sacrebleu": bleu(sacrebleu_statistics),
        "coco": bleu(coco_statistics),
    }


def image_clusters(samples: Sequence[SampleScore]) -> NDArray[np.int64]:
    """(samples,) int64 from 0 without gaps: samples linked by shared images bear the same number."""
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, sample in enumerate(samples):
        for image in sample.images:
            parent[root(index)] = root(first_with.setdefault(image, index))
    return np.unique([root(index) for index in range(len(samples))], return_inverse=True)[1].astype(np.int64)


def _estimates(
    runs: list[dict[str, Array]], clusters: NDArray[np.int64], *, seed: int, resamples: int, confidence: float
) -> dict[str, Estimate]:
    """Metrics of runs[0], and with runs[1] its paired differences from it, over one stratum."""
    counts = _resample_counts(int(clusters.max()) + 1, seed=seed, resamples=resamples)
    points = [{name: values.sum(axis=0, keepdims=True) for name, values in run.items()} for run in runs]
    draws = [{name: counts @ _by_cluster(values, clusters) for name, values in run.items()} for run in runs]
    found = {}
    for name, (needed, value) in METRICS.items():
        if points[0][needed][0] > 0:
            found[name] = (value(points[0]), _quietly(value, draws[0]), int((runs[0][needed] > 0).sum()))
    for name, (metric, difference) in DIFFERENCES.items():
        needed, value = METRICS[metric]
        if len(runs) == 2 and points[0][needed][0] > 0 and points[1][needed][0] > 0:
            point = difference(value(points[0]), value(points[1]))
            drawn = difference(_quietly(value, draws[0]), _quietly(value, draws[1]))
            found[name] = (point, drawn, int((runs[0][needed] > 0).sum()))
    return {name: _interval(*parts, confidence=confidence) for name, parts in found.items()}


def _quietly(value: Callable[[Sums], Array], sums: Sums) -> Array:
    """A resample may hold no sample of a metric: its value is then nan, and _interval passes over it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return value(sums)


def _interval(point: Array, draws: Array, n: int, *, confidence: float) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not draws.size:
        return Estimate(float(point[0]), float("nan"), float("nan"), n, None)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(float(point[0]), float(low), float(high), n, float(draws.std()))


def _by_cluster(values: Array, clusters: NDArray[np.int64]) -> Array:
    sums = np.zeros((int(clusters.max()) + 1, *values.shape[1:]))
    np.add.at(sums, clusters, values)
    return sums


def _resample_counts(clusters: int, *, seed: int, resamples: int) -> Array:
    """(resamples, clusters): how often each cluster is drawn; rows sum to the number of clusters."""
    random = np.random.default_rng(seed)
    return random.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)
