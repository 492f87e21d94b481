"""The gate: a report and thresholds become one verdict per number, and the verdicts an exit code.

Every threshold is a non-inferiority test on paired samples, clustered by image. A candidate passes when the upper
one-sided 1 - alpha bound of its loss is at most the margin, fails when the lower one exceeds it, and is inconclusive
between the two or on fewer than MIN_CLUSTERS images. What cannot be measured fails; what the samples say nothing of
fails as well, or is skipped where the thresholds say so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vlmquant.errors import EXIT_GATE_FAILED, EXIT_GATE_INCONCLUSIVE, EXIT_OK, LINE_CHARACTERS, UsageError, shown
from vlmquant.evaluation.bleu import STATISTICS, sacrebleu_score
from vlmquant.evaluation.metrics import image_clusters, is_caption, statistics
from vlmquant.evaluation.records import Run, SampleScore
from vlmquant.gate.bounds import (
    BLEU_DROP,
    FEW_CHANGED,
    RATIO,
    Bounds,
    bootstrap_bounds,
    paired_bounds,
    rate_bounds,
    samples_needed,
    samples_to_see_nothing,
    sparse_bounds,
)
from vlmquant.gate.show import to_junit, to_step_summary
from vlmquant.gate.source import Gate, choose_gate, given_gate, recorded_gate
from vlmquant.recipe import GateSpec
from vlmquant.report.data import Outcome, Report, Verdict, overall
from vlmquant.report.numbers import threshold_text
from vlmquant.thresholds import THRESHOLDS, option

__all__ = [
    "MIN_CLUSTERS",
    "Gate",
    "Verdict",
    "choose_gate",
    "exit_code",
    "given_gate",
    "judge",
    "recorded_gate",
    "to_junit",
    "to_step_summary",
]

MIN_CLUSTERS = 30
"""Images (or samples without one) below which no bound is trusted: the usual least size for large-sample intervals."""
SEED = 0
AFFORDABLE = 10
"""Times the present samples, up to which more of them are advised."""

Array = NDArray[np.float64]
Pair = tuple[SampleScore, SampleScore]
"""One sample as the reference and as the candidate scored it."""


class _Unmeasured(Exception):
    """Why a loss cannot be computed; the message ends in the verdict."""


class _Absent(_Unmeasured):
    """No sample of the report has what the loss is computed from."""


@dataclass(frozen=True)
class _Evidence:
    """What the samples say of one loss, on the scale it is tested on."""

    samples: list[SampleScore]
    features: Array
    """(samples, features): what to sum over each cluster."""
    point: float
    bound: Callable[[Array], Bounds]
    """(clusters, features) -> bounds."""
    room: float = 0.0
    """Loss of a corpus that changed altogether, where unchanged samples prove little; else 0."""


@dataclass(frozen=True)
class _Test:
    """How a threshold is measured: gather(pairs, alpha, seed) raises _Unmeasured; the scale of the test, and back."""

    gather: Callable[[list[Pair], float, int], _Evidence]
    to_scale: Callable[[float], float] = float
    from_scale: Callable[[float], float] = float


def judge(report: Report, gates: GateSpec | Sequence[GateSpec | None], *, seed: int = SEED) -> list[Verdict]:
    """One verdict for every candidate and threshold of its gate. Raises UsageError where there is nothing to judge.

    gates: one for all candidates, or one for each; None for a candidate that is not judged.
    """
    if not report.candidates:
        raise UsageError("gate: the report holds no candidate; evaluate a quantized model against its reference")
    specs = [gates] * len(report.candidates) if isinstance(gates, GateSpec) else gates
    if not any(spec and spec.judged() for spec in specs):
        raise UsageError(
            f"gate: no threshold is set; give at least one, such as {option('max_kl')} {THRESHOLDS['max_kl'].example}; "
            f"there are {', '.join(map(option, TESTS))}, and the same under `gate` in a recipe"
        )
    return [
        _with_inputs(candidate, _judge_one(report.reference, candidate, spec, stratum, name, margin, seed=seed))
        for candidate, spec in zip(report.candidates, specs, strict=True)
        if spec is not None
        for stratum, name, margin in spec.judged()
    ]


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 if all pass, 3 if any fails, 4 if any is inconclusive and none fails. Raises UsageError for no verdict."""
    outcome = overall(verdicts)
    return {"pass": EXIT_OK, "fail": EXIT_GATE_FAILED, "inconclusive": EXIT_GATE_INCONCLUSIVE}[outcome]


def _with_inputs(candidate: Run, verdict: Verdict) -> Verdict:
    """The verdict, with a word where the candidate was not given what the reference was."""
    if candidate.other_inputs is None:
        return verdict
    other = shown(candidate.other_inputs, limit=LINE_CHARACTERS)
    return replace(verdict, reason=f"{verdict.reason}; {other}")


def _judge_one(
    reference: Run, candidate: Run, spec: GateSpec, stratum: str | None, name: str, margin: float, *, seed: int
) -> Verdict:
    test = TESTS[name]
    verdict = partial(
        Verdict, candidate=candidate.label, threshold=name, margin=margin, stratum=stratum, alpha=spec.alpha
    )
    unknown = partial(verdict, point=None, low=None, high=None, n_needed=None)
    try:
        evidence = test.gather(_pairs(reference, candidate, stratum), spec.alpha, seed)
    except _Unmeasured as problem:
        skipped = isinstance(problem, _Absent) and spec.unmeasured == "skip"
        return unknown(n=0, outcome="skipped" if skipped else "fail", reason=str(problem))
    n, limit = len(evidence.samples), test.to_scale(margin)
    if not math.isfinite(evidence.point):
        return unknown(n=n, outcome="fail", reason="the loss is not a finite number")
    clusters = _by_cluster(evidence)
    if len(clusters) < MIN_CLUSTERS:
        needed = math.ceil(n * MIN_CLUSTERS / len(clusters))
        return verdict(
            point=test.from_scale(evidence.point),
            low=None,
            high=None,
            n=n,
            n_needed=needed,
            outcome="inconclusive",
            reason=f"too few samples: {len(clusters)} images, and no bound is trusted below {MIN_CLUSTERS}",
            advice=f"evaluate on about {needed:,} samples of at least {MIN_CLUSTERS} images; here are {n:,}",
        )
    bounds = evidence.bound(clusters)
    outcome: Outcome = "pass" if bounds.high <= limit else "fail" if bounds.low > limit else "inconclusive"
    found = verdict(
        point=test.from_scale(bounds.point),
        low=_bound(bounds.low, test),
        high=_bound(bounds.high, test),
        n=n,
        n_needed=_needed(bounds, evidence, len(clusters), limit, spec.alpha) if outcome == "inconclusive" else None,
        outcome=outcome,
        reason=REASONS[outcome],
    )
    return replace(found, advice=_advice(found)) if outcome == "inconclusive" else found


def _advice(verdict: Verdict) -> str:
    """What to do about a margin between the bounds: more samples, where so many can be had; else another margin."""
    show = threshold_text(verdict.threshold)
    assert verdict.point is not None
    apart = verdict.margin - verdict.point
    place = f"measured {show(verdict.point)}, {show(abs(apart))} {'below' if apart > 0 else 'above'} the margin"
    if verdict.n_needed is not None and verdict.n_needed <= AFFORDABLE * verdict.n:
        return f"{place}; about {verdict.n_needed:,} samples would probably decide, here are {verdict.n:,}"
    told = f"{place}: too near to be told apart by more samples"
    if verdict.high is None:
        return f"{told}; choose the margin that you mean"
    known = f"these {verdict.n:,} pass a margin of {show(verdict.high)} or more"
    if verdict.low is not None and verdict.low > 0:
        known += f" and fail one below {show(verdict.low)}"
    return f"{told}; {known}, so choose the margin that you mean"


def _bound(value: float, test: _Test) -> float | None:
    """A bound in the threshold's unit; None where there is no finite one."""
    shown = test.from_scale(value)
    return shown if math.isfinite(shown) else None


def _needed(bounds: Bounds, evidence: _Evidence, clusters: int, limit: float, alpha: float) -> int | None:
    n, slack = len(evidence.samples), limit - bounds.point
    needed = samples_needed(bounds, margin=limit, samples=n, alpha=alpha)
    if needed is not None and 0 < slack < evidence.room:
        share = slack / evidence.room
        needed = max(needed, samples_to_see_nothing(share, samples=n, clusters=clusters, alpha=alpha))
    return None if needed is None else max(needed, n + 1)


def _pairs(reference: Run, candidate: Run, stratum: str | None) -> list[Pair]:
    theirs = {sample.id: sample for sample in reference.samples}
    mine = {sample.id: sample for sample in candidate.samples}
    if len(theirs) != len(reference.samples) or len(mine) != len(candidate.samples):
        raise _Unmeasured("a sample stands twice in a run, so samples cannot be paired")
    if theirs.keys() != mine.keys():
        odd = min(theirs.keys() ^ mine.keys())
        raise _Unmeasured(f"not the same samples: {shown(odd)} was scored by only one of the two runs")
    pairs = [(theirs[name], mine[name]) for name in theirs]
    for one, other in pairs:
        if (one.tokens, one.images, one.references) != (other.tokens, other.images, other.references):
            raise _Unmeasured(
                f"sample {shown(one.id)} is not the same in both runs: other tokens, images or references"
            )
    if stratum is not None:
        pairs = [pair for pair in pairs if pair[0].task == stratum]
        if not pairs:
            raise _Absent(f"the report has no sample of the stratum {shown(stratum)}")
    return pairs


def _by_cluster(evidence: _Evidence) -> Array:
    """(clusters, features): sums over samples that share an image."""
    numbers = image_clusters(evidence.samples)
    sums = np.zeros((int(numbers.max()) + 1, evidence.features.shape[1]))
    np.add.at(sums, numbers, evidence.features)
    return sums


def _take(pairs: list[Pair], what: str, takes_part: Callable[[SampleScore], bool]) -> list[Pair]:
    chosen = [pair for pair in pairs if any(map(takes_part, pair))]
    if not chosen:
        raise _Absent(f"the report has no {what}")
    for one, other in chosen:
        if takes_part(one) != takes_part(other):
            raise _Unmeasured(f"sample {shown(one.id)} has {what} in only one of the two runs")
    return chosen


def _finite(samples: Sequence[SampleScore], what: str, value: Callable[[SampleScore], float | None]) -> Array:
    numbers = []
    for sample in samples:
        number = value(sample)
        if number is None or not math.isfinite(number):
            state = "missing" if number is None else "not finite"
            raise _Unmeasured(f"sample {shown(sample.id)}: its {what} is {state}")
        numbers.append(float(number))
    return np.array(numbers)


def _answered(pairs: list[Pair]) -> tuple[list[SampleScore], list[SampleScore], Array]:
    """Reference and candidate scores of the samples with answer tokens, and the tokens, (samples,)."""
    pairs = _take(pairs, "answer tokens", lambda sample: sample.tokens > 0)
    ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
    return ours, theirs, np.array([sample.tokens for sample in ours], dtype=np.float64)


def _per_token(samples: list[SampleScore], lost: Array, tokens: Array, alpha: float, seed: int) -> _Evidence:
    bound = partial(bootstrap_bounds, loss=RATIO, alpha=alpha, seed=seed)
    return _Evidence(samples, np.stack([lost, tokens], axis=1), float(lost.sum() / tokens.sum()), bound)


def _perplexity_increase(pairs: list[Pair], alpha: float, seed: int) -> _Evidence:
    """Difference of the mean negative log-likelihoods, which is the logarithm of the perplexities' ratio."""
    reference, candidate, tokens = _answered(pairs)
    before, after = (
        _finite(side, "negative log-likelihood", lambda sample: sample.nll) for side in (reference, candidate)
    )
    return _per_token(reference, after - before, tokens, alpha, seed)


def _kl(pairs: list[Pair], alpha: float, seed: int) -> _Evidence:
    _, candidate, tokens = _answered(pairs)
    return _per_token(candidate, _finite(candidate, "KL", lambda sample: sample.kl), tokens, alpha, seed)


def _flips(pairs: list[Pair], alpha: float, seed: int) -> _Evidence:
    _, candidate, tokens = _answered(pairs)
    flips = _finite(candidate, "count of flips", lambda sample: sample.flips)

    def bound(clusters: Array) -> Bounds:
        return rate_bounds(clusters[:, 0], clusters[:, 1], alpha=alpha)

    return _Evidence(candidate, np.stack([flips, tokens], axis=1), float(flips.sum() / tokens.sum()), bound, room=1.0)


def _bleu_drop(pairs: list[Pair], alpha: float, seed: int) -> _Evidence:
    def is_captioned(sample: SampleScore) -> bool:
        return sample.generated is not None and is_caption(sample.task, sample.references)

    pairs = _take(pairs, "generated captions", is_captioned)
    samples = [one for one, _ in pairs]
    changed = np.array([[one.generated != other.generated] for one, other in pairs], dtype=np.float64)
    statistic = [statistics([pair[side] for pair in pairs])["sacrebleu"] for side in (0, 1)]
    features = np.concatenate([*statistic, changed], axis=1)
    whole = float(sacrebleu_score(statistic[0].sum(axis=0)))

    def bound(clusters: Array) -> Bounds:
        found = bootstrap_bounds(clusters[:, : 2 * STATISTICS], BLEU_DROP, alpha=alpha, seed=seed)
        seen = int((clusters[:, -1] > 0).sum())
        return found if seen >= FEW_CHANGED else sparse_bounds(found, clusters=len(clusters), scale=whole, alpha=alpha)

    point = float(BLEU_DROP.value(features[:, : 2 * STATISTICS].sum(axis=0)))
    return _Evidence(samples, features, point, bound, room=whole if changed.sum() < FEW_CHANGED else 0.0)


def _exact_match_drop(pairs: list[Pair], alpha: float, seed: int) -> _Evidence:
    pairs = _take(pairs, "short answers", lambda sample: sample.exact is not None)
    before, after = (np.array([bool(pair[side].exact) for pair in pairs]) for side in (0, 1))
    features = np.stack([before & ~after, ~before & after, np.ones(len(pairs), dtype=bool)], axis=1).astype(np.float64)

    def bound(clusters: Array) -> Bounds:
        return paired_bounds(clusters[:, 0], clusters[:, 1], clusters[:, 2], alpha=alpha)

    return _Evidence([one for one, _ in pairs], features, float(before.mean() - after.mean()), bound, room=1.0)


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 700 else math.inf  # 700: near the largest exponent of a float64


TESTS: dict[str, _Test] = {
    "max_perplexity_increase": _Test(_perplexity_increase, math.log1p, _expm1),
    "max_bleu_drop": _Test(_bleu_drop),
    "max_kl": _Test(_kl),
    "max_flip_rate": _Test(_flips),
    "max_exact_match_drop": _Test(_exact_match_drop, lambda points: points / 100, lambda share: 100 * share),
}
"""Every threshold of GateSpec, in the order of the verdicts."""

REASONS: dict[Outcome, str] = {
    "pass": "the upper bound of the loss is within the margin",
    "fail": "the lower bound of the loss is above the margin",
    "inconclusive": "the margin lies between the bounds of the loss",
}
