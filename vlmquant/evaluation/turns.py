"""Speed of one model against another's, on machines that are never quiet: both answer the same prompts in turns.

A model measured after the other meets another machine: other work has begun or ended meanwhile. In turns both meet the
same, so the ratio of two neighbouring timings says more than either of them, and the median of many ratios is not moved
by the few in which one of the two was held up.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vlmquant.evaluation.records import Costs, Round, Timing
from vlmquant.evaluation.settings import Settings

CONFIDENCE = 0.95
"""At least, that the interval holds the median."""
UNSTABLE_SPREAD = 0.2
"""A ratio is unstable where its interval is wider than this share of it: then it is no number to be told by."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a model is as the reference; its interval is distribution-free (order statistics)."""

    point: float
    """Median of the rounds."""
    low: float
    high: float
    rounds: int
    stable: bool
    """Whether the rounds agree: enough of them for an interval, and one no wider than UNSTABLE_SPREAD."""


@dataclass(frozen=True)
class SpeedRatios:
    """Of tokens a second, and of the first token."""

    decode: Ratio
    first_token: Ratio


def rounds_of(prompts: Sequence[int], settings: Settings) -> list[int]:
    """The prompt of each round; none where none is to be timed."""
    return [prompts[number % len(prompts)] for number in range(settings.speed_rounds)] if prompts else []


def take_turns(
    reference: Callable[[int], Timing],
    model: Callable[[int], Timing],
    prompts: Sequence[int],
    *,
    step: Callable[[], None] = lambda: None,
) -> tuple[Round, ...]:
    """A round for each of the prompts, timed by both, who take turns in going first: what drifts favours neither."""
    found = []
    for number, prompt in enumerate(prompts):
        if number % 2:
            after = model(prompt)
            before = reference(prompt)
        else:
            before = reference(prompt)
            after = model(prompt)
        found.append(Round(before, after))
        step()
    return tuple(found)


def speed_ratios(rounds: Sequence[Round] | None) -> SpeedRatios | None:
    """Above 1: faster than the reference. None without rounds, or with one that no clock gives."""
    times = [time for one in rounds or () for side in (one.reference, one.model) for time in _numbers(side)]
    if not rounds or not all(0 < time < math.inf for time in times):
        return None
    return SpeedRatios(
        decode=median_ratio([one.model.tokens_per_second / one.reference.tokens_per_second for one in rounds]),
        first_token=median_ratio([one.reference.first_token_seconds / one.model.first_token_seconds for one in rounds]),
    )


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """The median with its interval: from the k-th lowest to the k-th highest, k as large as CONFIDENCE allows."""
    ordered, count = sorted(ratios), len(ratios)
    point = statistics.median(ordered)
    left_out = _left_out(count)
    low, high = ordered[left_out or 0], ordered[count - 1 - (left_out or 0)]
    stable = left_out is not None and high - low <= UNSTABLE_SPREAD * point
    return Ratio(point, low, high, count, stable)


def _left_out(count: int) -> int | None:
    """How many of so many values may be left out at each end; None where even all of them are too few.

    The median lies outside of the k-th lowest and highest with probability 2 P(Binomial(count, 1/2) < k).
    """
    below, found = 0.0, None
    for k in range(count // 2 + 1):
        below += math.comb(count, k) / 2**count
        if 2 * below > 1 - CONFIDENCE:
            break
        found = k
    return found


def with_timings(costs: Costs, timings: Sequence[Timing]) -> Costs:
    """The costs with what a model's own timings give; as they are where there are none."""
    if not timings:
        return costs
    first, speeds = zip(*map(_numbers, timings), strict=True)
    return replace(
        costs,
        prefill_seconds=statistics.median(first),
        tokens_per_second=statistics.median(speeds),
        tokens_per_second_range=(min(speeds), max(speeds)),
    )


def with_rounds(costs: Costs, rounds: Sequence[Round]) -> Costs:
    """The costs of a model that took turns with the reference."""
    return replace(with_timings(costs, [one.model for one in rounds]), rounds=tuple(rounds))


def _numbers(timing: Timing) -> tuple[float, float]:
    return timing.first_token_seconds, timing.tokens_per_second
