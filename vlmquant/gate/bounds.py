"""One-sided bounds of a loss from paired samples in clusters (samples that share an image): the gate's statistics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vlmquant.evaluation.bleu import HYPOTHESIS, MATCHES, REFERENCE, STATISTICS, TOTALS, sacrebleu_score

POWER = 0.8
"""Probability with which the sample size named in a verdict should decide."""
RESAMPLES = 4000
CHUNK = 500
"""Resamples held in memory at once."""
FEW_CHANGED = 10
"""Below so many clusters with any change a bootstrap has not seen the tail of the loss."""

TINY = 1e-9
"""A difference this small beside what it is measured by is rounding."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """A loss and its one-sided 1 - alpha bounds."""

    point: float
    low: float
    high: float
    error: float
    """Standard error of the point, clusters taken into account."""


@dataclass(frozen=True)
class Smooth:
    """A loss that is a smooth function of sums over samples."""

    value: Callable[[Array], Array]
    """Sums (..., features) -> loss (...)."""
    gradient: Callable[[Array], Array]
    """Sums (..., features) -> its derivatives (..., features)."""


def _ratio_gradient(sums: Array) -> Array:
    return np.stack([1 / sums[..., 1], -sums[..., 0] / sums[..., 1] ** 2], axis=-1)


def _bleu_gradient(sums: Array) -> Array:
    """(..., 10) -> (..., 10): derivatives of sacrebleu_score where no order is smoothed (else of its other factors)."""
    score = sacrebleu_score(sums)[..., None]
    matches, totals = sums[..., MATCHES], sums[..., TOTALS]
    hypothesis, reference = sums[..., HYPOTHESIS, None], sums[..., REFERENCE, None]
    short = hypothesis < reference
    order = matches.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [
            np.where(matches > 0, score / (order * matches), 0.0),
            np.where(totals > 0, -score / (order * totals), 0.0),
            np.where(short, score * reference / hypothesis**2, 0.0),
            np.where(short, -score / hypothesis, 0.0),
        ]
    gradient: Array = np.nan_to_num(np.concatenate(parts, axis=-1), posinf=0.0, neginf=0.0)
    return gradient


RATIO = Smooth(lambda sums: sums[..., 0] / sums[..., 1], _ratio_gradient)
"""Features: what is lost, what it is counted in (such as nats and tokens)."""

BLEU_DROP = Smooth(
    lambda sums: sacrebleu_score(sums[..., :STATISTICS]) - sacrebleu_score(sums[..., STATISTICS:]),
    lambda sums: np.concatenate(
        [_bleu_gradient(sums[..., :STATISTICS]), -_bleu_gradient(sums[..., STATISTICS:])], axis=-1
    ),
)
"""Features: the ten BLEU statistics of the reference model, then of the candidate."""


def bootstrap_bounds(clusters: Array, loss: Smooth, *, alpha: float, seed: int) -> Bounds:
    """Studentized bootstrap over clusters; clusters (clusters, features) float64 are sums over each one's samples.

    Every resample is measured in its own standard error (infinitesimal jackknife: the gradient times each cluster's
    sums), which keeps the error rate at alpha for the skewed losses of language models where percentiles do not
    (Efron and Tibshirani 1993, chapter 12).
    """
    point, error = (float(part[0]) for part in _measure(np.ones((1, len(clusters))), clusters, loss))
    random = np.random.default_rng(seed)
    even = np.full(len(clusters), 1 / len(clusters))
    pivots = []
    for start in range(0, RESAMPLES, CHUNK):
        counts = random.multinomial(len(clusters), even, size=min(CHUNK, RESAMPLES - start)).astype(np.float64)
        values, errors = _measure(counts, clusters, loss)
        with np.errstate(divide="ignore", invalid="ignore"):
            pivot = (values - point) / np.where(errors > TINY * error, errors, 0.0)
        pivots.append(np.where(np.abs(values - point) <= TINY * error, 0.0, pivot))
    ordered = np.sort(np.nan_to_num(np.concatenate(pivots), nan=-np.inf, posinf=np.inf, neginf=-np.inf))
    if error <= TINY * max(1.0, abs(point)):  # every cluster lost the same
        return Bounds(point, point, point, 0.0)
    last = len(ordered) - 1
    lowest, highest = ordered[math.floor(alpha * last)], ordered[math.ceil((1 - alpha) * last)]
    return Bounds(point, point - float(highest) * error, point - float(lowest) * error, error)


def _measure(counts: Array, clusters: Array, loss: Smooth) -> tuple[Array, Array]:
    """counts (resamples, clusters) -> the loss and its standard error, (resamples,) each."""
    sums = counts @ clusters
    with np.errstate(divide="ignore", invalid="ignore"):
        influence = loss.gradient(sums) @ clusters.T
        centred = influence - (counts * influence).sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
        spread = len(clusters) / (len(clusters) - 1)
        return loss.value(sums), np.sqrt(spread * (counts * centred**2).sum(axis=1))


def unseen_share(clusters: int, *, alpha: float) -> float:
    """Largest share of clusters that may be of a kind of which none was seen: the exact rule of three."""
    return float(1 - alpha ** (1 / clusters))


def sparse_bounds(bounds: Bounds, *, clusters: int, scale: float, alpha: float) -> Bounds:
    """Bounds where so few clusters changed that resampling them says nothing: normal ones, and an unseen share on top.

    scale: what the loss would be if every cluster changed altogether. The point and its error are those given.
    """
    room = NormalDist().inv_cdf(1 - alpha) * bounds.error + scale * unseen_share(clusters, alpha=alpha)
    return Bounds(bounds.point, bounds.point - room, bounds.point + room, bounds.error)


def rate_bounds(events: Array, trials: Array, *, alpha: float) -> Bounds:
    """Bounds of sum(events) / sum(trials), (clusters,) each: Wilson's score interval at the effective sample size.

    The effective size is trials / design effect, that is the clustered variance over the binomial one (at least 1).
    No event at all: the rule of three, with a cluster as the trial.
    """
    total, rate = float(trials.sum()), float(events.sum() / trials.sum())
    error = _clustered_error(events - rate * trials, total)
    if events.sum() == 0:
        return Bounds(0.0, 0.0, unseen_share(len(trials), alpha=alpha), 0.0)
    if events.sum() == total:
        return Bounds(1.0, 1.0 - unseen_share(len(trials), alpha=alpha), 1.0, 0.0)
    size = min(total, rate * (1 - rate) / error**2) if error > 0 else total
    z = NormalDist().inv_cdf(1 - alpha)
    centre = (rate + z * z / (2 * size)) / (1 + z * z / size)
    reach = z * math.sqrt(rate * (1 - rate) / size + z * z / (4 * size * size)) / (1 + z * z / size)
    return Bounds(rate, centre - reach, centre + reach, max(error, math.sqrt(rate * (1 - rate) / total)))


def paired_bounds(worse: Array, better: Array, trials: Array, *, alpha: float) -> Bounds:
    """Bounds of (sum(worse) - sum(better)) / sum(trials), (clusters,) each: answers lost less answers gained.

    Tango's score interval for paired proportions (Statistics in Medicine 17, 1998), whose centre is McNemar's test,
    with counts divided by the design effect. Without any change the bounds are at least the rule of three's, with a
    cluster as the trial.
    """
    n, lost, gained = float(trials.sum()), float(worse.sum()), float(better.sum())
    difference = (lost - gained) / n
    error = _clustered_error(worse - better - difference * trials, n)
    plain = math.sqrt(max(0.0, (lost + gained) / n - difference**2) / n)
    effect = max(1.0, (error / plain) ** 2) if plain > 0 else n / len(trials)
    counts = (lost / effect, gained / effect, n / effect)
    z = NormalDist().inv_cdf(1 - alpha)
    low, high = _tango(*counts, target=z), _tango(*counts, target=-z)
    if not lost and not gained:
        share = unseen_share(len(trials), alpha=alpha)
        low, high = min(low, -share), max(high, share)
    return Bounds(difference, low, high, max(error, plain))


def _tango(lost: float, gained: float, n: float, *, target: float) -> float:
    """The difference at which the score statistic, which falls from +inf to -inf over (-1, 1), equals the target."""

    def score(difference: float) -> float:
        a, b = 2 * n, (2 * n - lost + gained) * difference - lost - gained
        c = -gained * difference * (1 - difference)
        gain = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # most likely rate of gains at this difference
        variance = n * (2 * gain + difference * (1 - difference))
        excess = lost - gained - n * difference
        if variance <= 0:
            return math.copysign(math.inf, excess) if excess else 0.0
        return excess / math.sqrt(variance)

    low, high = -1.0, 1.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > target else (low, middle)
    return (low + high) / 2


def _clustered_error(residuals: Array, total: float) -> float:
    return math.sqrt(float((residuals**2).sum())) / total


def samples_needed(bounds: Bounds, *, margin: float, samples: int, alpha: float) -> int | None:
    """Samples with which a loss that stays as it is would be decided with probability POWER.

    n ((z(1 - alpha) + z(POWER)) error / (margin - point))^2, the normal approximation; None where the point lies on the
    margin or the error is unknown, so that no number can be named.
    """
    distance = abs(margin - bounds.point)
    if distance < 1e-12 or not math.isfinite(bounds.error):
        return None
    normal = NormalDist()
    reach = (normal.inv_cdf(1 - alpha) + normal.inv_cdf(POWER)) * bounds.error
    needed = samples * (reach / distance) ** 2
    return math.ceil(needed) if needed < 1e12 else None


def samples_to_see_nothing(share: float, *, samples: int, clusters: int, alpha: float) -> int:
    """Samples after which `unseen_share` is at most `share` in (0, 1), at the present samples per cluster."""
    return math.ceil(math.log(alpha) / math.log1p(-share) * samples / clusters)
