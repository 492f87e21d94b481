"""Small plots as inline SVG. Colours are the page's CSS variables, so that they follow its light or dark scheme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from vlmquant.report.manifest import ComponentBytes, LayerError
from vlmquant.report.numbers import size_text

SERIES = 7
"""Colours of the page, --series-0 ... --series-6; later series take another mark with the same colour."""

INTERVAL_WIDTH, INTERVAL_HEIGHT = 130, 18


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)


def interval_axis(values: Sequence[float | None]) -> Axis:
    """One axis for a column of intervals: every finite value and zero fit, with some air."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    air = 0.06 * (high - low or 1.0)
    return Axis(low - air if low < 0 else low, high + air, 5, INTERVAL_WIDTH - 5)


def interval(
    point: float | None, low: float | None, high: float | None, axis: Axis, *, margin: float | None = None
) -> Markup:
    """A dot on its interval; a thin line at zero, and a dashed one at the margin."""
    if point is None or not math.isfinite(point):
        return Markup("")
    middle = INTERVAL_HEIGHT / 2
    ends = [
        min(max(bound, axis.low), axis.high)
        for bound in (point if low is None else low, point if high is None else high)
    ]
    first, last = (axis.at(bound) for bound in ends)
    parts = [_line(axis.at(0.0), 2, axis.at(0.0), INTERVAL_HEIGHT - 2, "zero")]
    parts.append(_line(first, middle, max(last, first + 1), middle, "reach"))
    if margin is not None:
        parts.append(_line(axis.at(margin), 0, axis.at(margin), INTERVAL_HEIGHT, "margin"))
    parts.append(Markup('<circle class="point" cx="{:.1f}" cy="{:.1f}" r="3.6"/>').format(axis.at(point), middle))
    return _svg(INTERVAL_WIDTH, INTERVAL_HEIGHT, parts, css="interval", label="point and interval")


def bytes_bars(parts: Sequence[ComponentBytes]) -> Markup:
    """Two stacked bars, before and after, on one scale."""
    width, bar, left, right = 1040.0, 34.0, 56.0, 84.0
    totals = (sum(part.before for part in parts), sum(part.after for part in parts))
    axis = Axis(0, max(*totals, 1), left, width - right)
    drawn: list[Markup] = []
    for row, (title, total) in enumerate(zip(("before", "after"), totals, strict=True)):
        top, edge = 4 + row * (bar + 12), 0
        drawn.append(_text(left - 8, top + bar / 2 + 4, title, "end"))
        for index, part in enumerate(parts):
            size = part.after if row else part.before
            start, stop = axis.at(edge), axis.at(edge + size)
            rectangle = Markup(
                '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" class="series-{}"><title>{}</title></rect>'
            )
            hint = f"{part.component}, {title}: {size_text(size)}"
            drawn.append(rectangle.format(start, top, max(stop - start - 1, 0.4), bar, index % SERIES, hint))
            edge += size
        drawn.append(_text(axis.at(total) + 8, top + bar / 2 + 4, size_text(total), "start", css="strong"))
    return _svg(width, 2 * bar + 20, drawn, label="bytes by component before and after")


def layer_errors_plot(errors: Sequence[LayerError], kinds: Sequence[str]) -> Markup:
    """Relative output error by layer, on a logarithmic scale; each of `kinds` (of module) has a mark."""
    width, height, left, bottom, top = 1040.0, 290.0, 62.0, 40.0, 12.0
    values = [error.error for error in errors]
    decades = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    low, high = decades if decades[1] > decades[0] else (decades[0], decades[0] + 1)
    layers = max(error.layer for error in errors)
    across = Axis(-0.5, layers + 0.5, left, width - 12)
    up = Axis(10.0**low, 10.0**high, height - bottom, top, log=True)
    parts: list[Markup] = []
    for decade in range(low, high + 1):
        level = up.at(10.0**decade)
        parts.append(_line(left, level, width - 12, level, "grid"))
        parts.append(_text(left - 8, level + 4, f"{10.0**decade:g}", "end"))
    step = max(1, math.ceil((layers + 1) / 16))
    parts += [
        _text(across.at(layer), height - bottom + 18, str(layer), "middle") for layer in range(0, layers + 1, step)
    ]
    parts.append(_text((left + width) / 2, height - 5, "layer", "middle"))
    for error in errors:
        kind = kinds.index(error.kind)
        shift = (kind - (len(kinds) - 1) / 2) * min(6.0, 0.7 * (across.at(1) - across.at(0)) / len(kinds))
        hint = f"layer {error.layer}, {error.kind}: {error.error:.3g}"
        parts.append(mark(across.at(error.layer) + shift, up.at(error.error), kind, hint))
    return _svg(width, height, parts, label="relative output error by layer")


def legend_mark(kind: int) -> Markup:
    """The mark of a series by itself, for a legend."""
    return _svg(14, 14, [mark(7, 7, kind, "")], css="key", label="")


SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.6 -3.6h7.2v7.2h-7.2Z",
    "M0 -4.8L4.6 3.6H-4.6Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6 -3.6H-4.6Z",
    "M-1.5 -4.6h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1v-3h3.1Z",
)
"""Circle, square, triangle, diamond, triangle on its head, cross: a series is known by more than its colour."""


def mark(x: float, y: float, series: int, hint: str) -> Markup:
    title = Markup("<title>{}</title>").format(hint) if hint else Markup("")
    template = Markup('<path class="mark series-{}" transform="translate({:.1f} {:.1f})" d="{}">{}</path>')
    return template.format(series % SERIES, x, y, SHAPES[series % len(SHAPES)], title)


LABEL_WIDTH, LABEL_HEIGHT = 140.0, 15.0


@dataclass(frozen=True)
class Tradeoff:
    """A candidate's place: its size in bytes against its distance from the reference."""

    label: str
    size: float
    kl: float
    low: float
    high: float


def tradeoff_plot(points: Sequence[Tradeoff]) -> Markup:
    """Size across, KL up (logarithmic), with intervals: the lower left corner is the best one."""
    width, height, left, bottom, top, right = 1040.0, 320.0, 62.0, 44.0, 22.0, 150.0
    positive = [value for point in points for value in (point.kl, point.low, point.high) if value > 0]
    low = 10.0 ** math.floor(math.log10(min(positive)))
    high = 10.0 ** math.ceil(math.log10(max(positive)) + 1e-9)
    up = Axis(low, high if high > low else 10 * low, height - bottom, top, log=True)
    sizes = [point.size for point in points]
    air = 0.08 * (max(sizes) - min(sizes) or max(sizes))
    across = Axis(min(sizes) - air, max(sizes) + air, left, width - right)
    parts: list[Markup] = []
    for decade in range(round(math.log10(up.low)), round(math.log10(up.high)) + 1):
        level = up.at(10.0**decade)
        parts.append(_line(left, level, width - right, level, "grid"))
        parts.append(_text(left - 8, level + 4, f"{10.0**decade:g}", "end"))
    for size in (min(sizes), max(sizes)) if max(sizes) > min(sizes) else (max(sizes),):
        parts.append(_text(across.at(size), height - bottom + 18, size_text(size), "middle"))
    parts.append(_text((left + width - right) / 2, height - 6, "size on disk", "middle"))
    parts.append(_text(left, top - 9, "KL to the reference, nats per token", "start"))
    label_at = _apart([(across.at(point.size), up.at(max(point.kl, up.low))) for point in points])
    for index, point in enumerate(points):
        x, y = across.at(point.size), up.at(max(point.kl, up.low))
        parts.append(_line(x, up.at(max(point.low, up.low)), x, up.at(min(max(point.high, up.low), up.high)), "reach"))
        parts.append(mark(x, y, index, f"{point.label}: {size_text(point.size)}, KL {point.kl:.4g}"))
        parts.append(_text(x + 10, label_at[index] + 4, point.label, "start", css="strong"))
    return _svg(width, height, parts, label="size against KL")


def _apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights of the labels beside these places, moved down where two would lie on each other."""
    heights = [y for _, y in places]
    order = sorted(range(len(places)), key=lambda index: heights[index])
    for position, index in enumerate(order):
        near = [heights[other] for other in order[:position] if abs(places[other][0] - places[index][0]) < LABEL_WIDTH]
        heights[index] = max([heights[index], *(height + LABEL_HEIGHT for height in near)])
    return heights


def _svg(width: float, height: float, parts: Sequence[Markup], *, css: str = "plot", label: str) -> Markup:
    template = Markup('<svg class="{}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>')
    return template.format(css, width, height, label, Markup("").join(parts))


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    template = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return template.format(css, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, *, css: str = "label") -> Markup:
    template = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return template.format(css, x, y, anchor, escape(text))
