"""What a page's tables show of one loss: the numbers before and after, their change and its interval, a small plot."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from vlmquant.evaluation.records import Estimate
from vlmquant.report import plots
from vlmquant.report.numbers import METRIC_TEXT, NOTHING, fixed

LOSSES = ("perplexity_increase", "kl", "flip_rate", "bleu4_drop", "exact_match_drop")
"""What quantization may cost: zero is no loss, and more is worse."""

COMPARED = {"perplexity_increase": "perplexity", "bleu4_drop": "bleu4_sacrebleu", "exact_match_drop": "exact_match"}
"""Loss -> the metric whose two values it compares; other losses are distances, and have one value."""

LOSS_TITLE = {
    "perplexity_increase": "perplexity",
    "kl": "KL, nats/token",
    "flip_rate": "flipped tokens",
    "bleu4_drop": "BLEU-4",
    "exact_match_drop": "exact match",
}
FEW = 10
"""Samples below which an interval says nothing, and none is shown."""

NO_PLOT = Markup("")
Metrics = Mapping[str, Estimate]
"""Estimates of one run over one stratum, by metric."""


@dataclass(frozen=True)
class LossCell:
    text: str
    """The two values, or the one: `13.3 → 11.4`, `0.0690`."""
    note: str = ""
    """Change and interval, in the direction of the metric itself: `-1.9 [-3.6, +0.6]`."""
    plot: Markup = NO_PLOT


def loss_cell(loss: str, before: Metrics, after: Metrics, axis: plots.Axis | None = None) -> LossCell:
    estimate = after.get(loss)
    if estimate is None:
        return LossCell(NOTHING)
    plot = Markup("")
    if axis is not None and estimate.n >= FEW:
        plot = plots.interval(estimate.point, estimate.low, estimate.high, axis)
    return LossCell(values_text(loss, before, after), change_note(loss, estimate), plot)


def values_text(loss: str, before: Metrics, after: Metrics) -> str:
    """`13.3 → 11.4` of what has two values, else the loss itself."""
    if loss not in COMPARED:
        return METRIC_TEXT[loss](after[loss].point)
    metric = COMPARED[loss]
    ends = [METRIC_TEXT[metric](part[metric].point if metric in part else None) for part in (before, after)]
    unit = " %" if all(end.endswith(" %") for end in ends) else ""
    return f"{ends[0].removesuffix(unit)} → {ends[1]}"


def change_note(loss: str, estimate: Estimate) -> str:
    """The 95 % interval, after the change itself where the two values stand before it: `+4.00 % [+2.52, +5.47]`."""
    way = -1.0 if loss.endswith("_drop") else 1.0  # a drop is told as the change of its metric
    ends = sorted((way * estimate.low, way * estimate.high), key=lambda end: (math.isnan(end), end))
    largest = max((abs(value) for value in (estimate.point, *ends) if math.isfinite(value)), default=0.0)
    show = {
        "perplexity_increase": fixed(2 if largest < 0.1 else 1 if largest < 1 else 0, scale=100, sign=True),
        "flip_rate": fixed(1, scale=100),
        "kl": fixed(4),
    }.get(loss, fixed(1, sign=True))
    unit = " %" if loss in ("perplexity_increase", "flip_rate") else ""
    signed = loss in COMPARED
    point = f"{show(way * estimate.point)}{unit}" if signed else ""
    bounds = f"[{show(ends[0])}, {show(ends[1])}]{'' if signed else unit}" if estimate.n >= FEW else f"n {estimate.n}"
    return f"{point} {bounds}".strip()


def column_axis(loss: str, parts: Iterable[Metrics]) -> plots.Axis:
    """One axis for the plots of a column: those that are shown fit."""
    known = [part[loss] for part in parts if loss in part and part[loss].n >= FEW]
    return plots.interval_axis([value for one in known for value in (one.point, one.low, one.high)])
