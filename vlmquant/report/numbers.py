"""Numbers as text: one spelling of each quantity wherever a report shows it."""

import math
from collections.abc import Callable, Mapping

from vlmquant.errors import shown
from vlmquant.evaluation.records import Estimate
from vlmquant.evaluation.turns import Ratio
from vlmquant.thresholds import THRESHOLDS

NOTHING = "–"
"""Stands where there is no number."""

Show = Callable[[float | None], str]


def fixed(decimals: int, *, scale: float = 1.0, unit: str = "", sign: bool = False) -> Show:
    """A formatter: scale * value with so many decimals, then the unit."""

    def show(value: float | None) -> str:
        if value is None or math.isnan(value):
            return NOTHING if value is None else "not a number"
        if math.isinf(value):
            return f"{'-' if value < 0 else '+' if sign else ''}∞"
        text = f"{scale * value:{'+' if sign else ''}.{decimals}f}"
        zero = f"{0:.{decimals}f}"
        return (zero if text.lstrip("+-") == zero else text) + unit  # no "-0.0"

    return show


def size_text(value: float | None) -> str:
    """Bytes in powers of ten: 241.7 MB, 3.10 GB."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for unit, size, decimals in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if abs(value) >= size:
            return f"{value / size:.{decimals}f} {unit}"
    return f"{value:.0f} B"


def count_text(value: int) -> str:
    """How many there are: 86,016, 121.4 M, 8.29 B."""
    for unit, size, decimals in (("B", 1e9, 2), ("M", 1e6, 1)):
        if value >= size:
            return f"{value / size:.{decimals}f} {unit}"
    return f"{value:,}"


TIMES = fixed(2, unit="×")
UNSTABLE = "unstable"
"""Stands where the rounds of a speed disagree: a number there would be luck."""
UNPAIRED = "not in turns"
"""Stands where a model was not timed in turns with the reference."""


def ratio_text(ratio: Ratio) -> str:
    """The median of the rounds and its interval: `1.62× [1.55, 1.70]`; `unstable` where there is none to be told."""
    low, high = (fixed(2)(bound) for bound in (ratio.low, ratio.high))
    return f"{TIMES(ratio.point)} [{low}, {high}]" if ratio.stable else UNSTABLE


def places_text(amounts: Mapping[str, int | None]) -> str:
    """Bytes by device: `230.5 MB`, or `15.20 GB on cuda:0, 1.1 MB on cpu`; what is nothing is left out."""
    known = {place: amount for place, amount in amounts.items() if amount}
    if len(known) > 1:
        return ", ".join(f"{size_text(amount)} on {place}" for place, amount in sorted(known.items(), reverse=True))
    return size_text(next(iter(known.values()), 0 if any(v == 0 for v in amounts.values()) else None))


METRIC_TEXT: dict[str, Show] = {
    "perplexity": fixed(2),
    "all_token_perplexity": fixed(2),
    "perplexity_wrong_image": fixed(2),
    "kl": fixed(4),
    "flip_rate": fixed(1, scale=100, unit=" %"),
    "bleu4_sacrebleu": fixed(1),
    "bleu4_coco": fixed(1),
    "exact_match": fixed(1, unit=" %"),
    "perplexity_increase": fixed(2, scale=100, unit=" %", sign=True),
    "bleu4_drop": fixed(2, sign=True),
    "bleu4_coco_drop": fixed(2, sign=True),
    "exact_match_drop": fixed(1, sign=True),
}
"""Metric of metrics.summarize -> its text."""

SHORT_TITLE: dict[str, str] = {
    "perplexity_increase": "perplexity",
    "kl": "KL",
    "flip_rate": "flips",
    "bleu4_drop": "BLEU-4 drop",
    "exact_match_drop": "exact match drop",
}
"""Titles of losses where there is little room."""

METRIC_TITLE: dict[str, str] = {
    "perplexity": "perplexity",
    "all_token_perplexity": "all-token perplexity",
    "perplexity_wrong_image": "perplexity, wrong image",
    "kl": "KL (nats/token)",
    "flip_rate": "flips",
    "bleu4_sacrebleu": "BLEU-4 (sacrebleu)",
    "bleu4_coco": "BLEU-4 (COCO)",
    "exact_match": "exact match",
    "perplexity_increase": "perplexity increase",
    "bleu4_drop": "BLEU-4 drop (sacrebleu)",
    "bleu4_coco_drop": "BLEU-4 drop (COCO)",
    "exact_match_drop": "exact-match drop (points)",
}


def metric_text(metric: str, estimate: Estimate | None) -> str:
    """The point and, in brackets, its interval: `10.97 [10.41, 11.60]`."""
    if estimate is None:
        return NOTHING
    show = METRIC_TEXT.get(metric, fixed(4))
    point, low, high = (show(value) for value in (estimate.point, estimate.low, estimate.high))
    unit = " %" if point.endswith(" %") else ""
    interval = ", ".join(bound.removesuffix(unit) for bound in (low, high))
    return f"{point} [{interval}]"


def metric_title(metric: str) -> str:
    return METRIC_TITLE.get(metric, metric)


def bounds_text(threshold: str, low: float | None, high: float | None) -> str:
    """Both one-sided bounds of a verdict, the unit once: `0.72 to 1.30 %`."""
    show = threshold_text(threshold)
    return NOTHING if low is None and high is None else f"{show(low).split(' ')[0]} to {show(high)}"


def threshold_title(threshold: str, stratum: str | None = None) -> str:
    """What a threshold bounds, and where: `perplexity increase, object`."""
    return THRESHOLDS[threshold].title + (f", {shown(stratum)}" if stratum is not None else "")


def threshold_text(threshold: str) -> Show:
    row = THRESHOLDS[threshold]
    return fixed(row.decimals, scale=row.scale, unit=row.unit)


def margin_text(threshold: str, margin: float) -> str:
    """A margin as short as it was given: `5 %`, `0.1 nats/token`."""
    row = THRESHOLDS[threshold]
    return f"{row.scale * margin:.6g}{row.unit}"


def change_text(threshold: str, value: float | None) -> str:
    """A loss in words that say which way it went: `+2.08 %`, `0.85 points gained`, `0.0690 nats/token`."""
    row, show = THRESHOLDS[threshold], threshold_text(threshold)
    if value is None or not math.isfinite(value):
        return show(value)
    if row.unit == " points":
        return f"{show(abs(value))} {'gained' if value < 0 else 'lost'}"
    return f"{'+' if row.signed and value > 0 else ''}{show(value)}"


def nearness_text(threshold: str, point: float | None, margin: float, stratum: str | None = None) -> str:
    """How near a loss came to its margin: `perplexity +2.08 % of at most 5 %`; what was gained is no part of it."""
    row = THRESHOLDS[threshold]
    subject = f"{row.subject} of {shown(stratum)}" if stratum is not None else row.subject
    if point is not None and point < 0:
        return f"{subject} {change_text(threshold, point)}; allowed: {margin_text(threshold, margin)} worse"
    measured = "not measured," if point is None else change_text(threshold, point).removesuffix(" nats/token") + " of"
    return f"{subject} {measured} at most {margin_text(threshold, margin)}"
