"""Small plots as inline SVG. Colours are the page's CSS variables, so that they follow its light or dark scheme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from vlmquant.report.manifest import ComponentBytes
from vlmquant.report.numbers import size_text

SERIES = 8
"""Colours of the page, --series-0 ... --series-7; later series take another mark with the same colour."""

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
    parts = [line(axis.at(0.0), 2, axis.at(0.0), INTERVAL_HEIGHT - 2, "zero")]
    parts.append(line(first, middle, max(last, first + 1), middle, "reach"))
    if margin is not None:
        parts.append(line(axis.at(margin), 0, axis.at(margin), INTERVAL_HEIGHT, "margin"))
    parts.append(Markup('<circle class="point" cx="{:.1f}" cy="{:.1f}" r="3.6"/>').format(axis.at(point), middle))
    return svg(INTERVAL_WIDTH, INTERVAL_HEIGHT, parts, css="interval", label="point and interval")


WIDE, NARROW = 1040.0, 330.0
"""Widths of a figure, in pixels: of a desktop's page and of a phone's."""


def bytes_bars(parts: Sequence[ComponentBytes], *, width: float) -> Markup:
    """Two stacked bars, before and after, on one scale."""
    bar, left, right = 34.0, 50.0, 70.0
    totals = (sum(part.before for part in parts), sum(part.after for part in parts))
    axis = Axis(0, max(*totals, 1), left, width - right)
    drawn: list[Markup] = []
    for row, (title, total) in enumerate(zip(("before", "after"), totals, strict=True)):
        top, edge = 4 + row * (bar + 12), 0
        drawn.append(text(left - 8, top + bar / 2 + 4, title, "end"))
        for index, part in enumerate(parts):
            size = part.after if row else part.before
            start, stop = axis.at(edge), axis.at(edge + size)
            rectangle = Markup(
                '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" class="series-{}"><title>{}</title></rect>'
            )
            hint = f"{part.component}, {title}: {size_text(size)}"
            drawn.append(rectangle.format(start, top, max(stop - start - 1, 0.4), bar, index % SERIES, hint))
            edge += size
        drawn.append(text(axis.at(total) + 8, top + bar / 2 + 4, size_text(total), "start", css="strong"))
    return svg(width, 2 * bar + 20, drawn, label="bytes by component before and after")


def legend_mark(series: int) -> Markup:
    """The mark of a series by itself, for a legend."""
    return svg(14, 14, [mark(7, 7, series, "")], css="key", label="")


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


def svg(width: float, height: float, parts: Sequence[Markup], *, css: str = "plot", label: str) -> Markup:
    template = Markup('<svg class="{}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>')
    return template.format(css, width, height, label, Markup("").join(parts))


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    template = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return template.format(css, x1, y1, x2, y2)


def polyline(points: Sequence[tuple[float, float]], css: str) -> Markup:
    template = Markup('<polyline class="{}" points="{}"/>')
    return template.format(css, " ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def text(x: float, y: float, text: str, anchor: str, *, css: str = "label") -> Markup:
    template = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return template.format(css, x, y, anchor, escape(text))
