"""The figures of a page: errors by layer, and size against accuracy. Each is drawn for the width it is shown at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vlmquant.report.manifest import LayerError
from vlmquant.report.numbers import size_text
from vlmquant.report.plots import NARROW, Axis, line, mark, polyline, svg, text

KIND_SERIES = {
    **dict.fromkeys(("q_proj", "query", "q", "qkv", "qkv_proj", "in_proj", "query_key_value", "c_attn"), 0),
    **dict.fromkeys(("k_proj", "key", "k", "kv_proj"), 1),
    **dict.fromkeys(("v_proj", "value", "v"), 2),
    **dict.fromkeys(("o_proj", "out_proj", "proj", "dense", "c_proj", "o"), 3),
    **dict.fromkeys(("gate_proj", "gate_up_proj", "w1"), 4),
    **dict.fromkeys(("up_proj", "fc1", "w3", "linear_fc1", "c_fc"), 5),
    **dict.fromkeys(("down_proj", "fc2", "w2", "linear_fc2"), 6),
}
"""Kind of module -> its series: attention in cool colours, the MLP in warm ones, the same in every model."""
OTHER_SERIES = 7

LOG_SPAN = 1e-9
"""The smallest value with a place of its own on a logarithmic axis, in largest ones."""
LOG_STEPS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(1 + tenth / 10 for tenth in range(90)))
"""Within each power of ten a logarithmic axis has lines at these: at the fewest that give it TICKS."""
TICKS = 3


def series_of(kind: str) -> int:
    return KIND_SERIES.get(kind, OTHER_SERIES)


def log_axis(values: Sequence[float], start: float, end: float) -> tuple[Axis, list[float]]:
    """An axis that the positive values fill, with a little air, and its ticks."""
    high = max(values)
    low = max(min(values), high * LOG_SPAN)
    air = max((high / low) ** 0.08, 1.02)
    low, high = low / air, high * air
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in LOG_STEPS:
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= TICKS:
            break
    return Axis(low, high, start, end, log=True), ticks


def tick_text(value: float) -> str:
    """Of few letters, however small the value is."""
    if 1e-3 <= value < 1e3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def grid_lines(ticks: Sequence[float], up: Axis, left: float, right: float) -> list[Markup]:
    """A line across the plot for each tick, and what it stands for beside it."""
    parts: list[Markup] = []
    for tick in ticks:
        parts.append(line(left, up.at(tick), right, up.at(tick), "grid"))
        parts.append(text(left - 8, up.at(tick) + 4, tick_text(tick), "end"))
    return parts


def layer_errors_plot(errors: Sequence[LayerError], *, width: float) -> Markup:
    """Relative output error by layer on a logarithmic scale; lines join the largest of each kind."""
    height, left, right, bottom, top = 300.0, 50.0, 12.0, 40.0, 12.0
    up, ticks = log_axis([error.error for error in errors], height - bottom, top)
    layers = max(error.layer for error in errors)
    across = Axis(-0.5, layers + 0.5, left, width - right)
    parts = grid_lines(ticks, up, left, width - right)
    step = max(1, math.ceil((layers + 1) / (16 if width > NARROW else 8)))
    parts += [
        text(across.at(layer), height - bottom + 18, str(layer), "middle") for layer in range(0, layers + 1, step)
    ]
    parts.append(text((left + width - right) / 2, height - 5, "layer", "middle"))
    kinds = list(dict.fromkeys(error.kind for error in errors))
    for kind in kinds:
        largest: dict[int, float] = {}
        for error in errors:
            if error.kind == kind:
                largest[error.layer] = max(error.error, largest.get(error.layer, 0.0))
        points = [(across.at(layer), up.at(max(largest[layer], up.low))) for layer in sorted(largest)]
        parts.append(polyline(points, f"join series-{series_of(kind)}"))
    for error in errors:
        hint = f"layer {error.layer}, {error.kind}: {error.error:.3g}"
        parts.append(mark(across.at(error.layer), up.at(max(error.error, up.low)), series_of(error.kind), hint))
    return svg(width, height, parts, label="relative output error by layer")


LABEL_HEIGHT, LETTER, BESIDE, MARK = 14.0, 7.0, 10.0, 4.0
"""Pixels: of a label beside a point and of one letter of it, how far beside it stands, and of a mark to each side."""


@dataclass(frozen=True)
class Tradeoff:
    """A candidate's place: its size in bytes against its distance from the reference."""

    label: str
    rank: int
    size: float
    kl: float
    low: float
    high: float
    on_frontier: bool


def tradeoff_plot(points: Sequence[Tradeoff], *, original: float, width: float) -> Markup:
    """Size across from zero, KL up (logarithmic), with intervals; a line joins those that nobody beats in both.

    original: bytes of the reference, whose KL is zero and so has no place but a line.
    """
    height, left, bottom, top, right = 330.0, 50.0, 44.0, 26.0, 16.0
    positive = [value for point in points for value in (point.kl, point.low, point.high) if value > 0]
    up, ticks = log_axis(positive, height - bottom, top)
    across = Axis(0.0, 1.06 * max(original, *(point.size for point in points)), left, width - right)
    parts = grid_lines(ticks, up, left, width - right)
    for size in _round_steps(across.high, 6 if width > NARROW else 3):
        parts.append(text(across.at(size), height - bottom + 18, size_text(size) if size else "0", "middle"))
    parts.append(text((left + width - right) / 2, height - 6, "size on disk", "middle"))
    parts.append(text(left, top - 10, "KL to the reference, nats per token", "start"))
    parts.append(line(across.at(original), top, across.at(original), height - bottom, "original"))
    if width > NARROW:
        parts.append(text(across.at(original) - 6, height - bottom - 8, f"original, {size_text(original)}", "end"))
    parts.append(_frontier(points, across, up))
    places = [(across.at(point.size), up.at(max(point.kl, up.low))) for point in points]
    for point, (x, y) in zip(points, places, strict=True):
        parts.append(line(x, up.at(max(point.low, up.low)), x, up.at(min(max(point.high, up.low), up.high)), "reach"))
        parts.append(mark(x, y, point.rank - 1, f"{point.label}: {size_text(point.size)}, KL {point.kl:.4g}"))
    labels = [f"{point.rank} {point.label[:24]}" if width > NARROW else str(point.rank) for point in points]
    parts += labels_beside(labels, places, width=width, css=["strong"] * len(labels))
    return svg(width, height, parts, label="size against KL")


def _frontier(points: Sequence[Tradeoff], across: Axis, up: Axis) -> Markup:
    """Steps: at each size the least KL that is to be had."""
    best = sorted((point for point in points if point.on_frontier), key=lambda point: point.size)
    corners: list[tuple[float, float]] = []
    for point in best:
        x, y = across.at(point.size), up.at(max(point.kl, up.low))
        corners.append((x, corners[-1][1] if corners else up.end))
        corners.append((x, y))
    return polyline([*corners, (across.end, corners[-1][1])], "frontier") if corners else Markup("")


def _round_steps(high: float, most: int) -> list[float]:
    """Zero and at most so many round values up to `high`."""
    rough = high / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * index for index in range(math.floor(high / step) + 1)]


def labels_beside(
    labels: Sequence[str], places: Sequence[tuple[float, float]], *, width: float, css: Sequence[str]
) -> list[Markup]:
    """Of points: to the right of each, or to the left where the plot ends; lower where another label or point is."""
    taken = [(x - MARK, x + MARK, y - MARK, y + MARK) for x, y in places]
    parts: dict[int, Markup] = {}
    for index in sorted(range(len(places)), key=lambda index: places[index][1]):
        (x, y), long = places[index], LETTER * len(labels[index])
        fits = x + BESIDE + long < width
        left = x + BESIDE if fits else x - BESIDE - long
        while any(
            left < end and start < left + long and y - LABEL_HEIGHT < below and above < y
            for start, end, above, below in taken
        ):
            y += 1
        taken.append((left, left + long, y - LABEL_HEIGHT, y))
        at = (left, "start") if fits else (left + long, "end")
        parts[index] = text(at[0], y - LABEL_HEIGHT / 3, labels[index], at[1], css=css[index])
    return [parts[index] for index in range(len(places))]
