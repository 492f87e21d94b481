"""What units lose, and what a budget bought, as rows of text and as an offline page."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from vlmquant.pages import render_page
from vlmquant.recipe import KEEP, recipe_text
from vlmquant.report import charts, plots
from vlmquant.report.eval_page import error_figures
from vlmquant.report.manifest import LayerError
from vlmquant.report.numbers import count_text
from vlmquant.sensitivity import Allocation, Scores, UnitLoss

SHOWN = ("w4a16-g128", "w4a16-g64", "w8a8-dynamic", "w8a16", "w3a16-g128")
"""The scheme whose losses are drawn: the first of these that a unit has, or else its first."""


def loss_text(loss: float | None) -> str:
    return "-" if loss is None else "0" if loss == 0 else f"{loss:.2e}"


def schemes_of(units: Sequence[UnitLoss]) -> list[str]:
    """All labels, 16 bits last: they lose nothing."""
    return [label for label in dict.fromkeys(label for unit in units for label in unit.losses) if label != KEEP]


def loss_rows(scores: Scores, chosen: Mapping[str, str] | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: every unit with what it loses by each scheme, and the scheme that it gets."""
    labels = schemes_of(scores.units)
    columns = ("component", "layer", "linears", "method", *(("chosen",) if chosen else ()), "weights", *labels)
    rows = []
    for unit in scores.units:
        picked = (chosen.get(unit.name, "-"),) if chosen else ()
        losses = (loss_text(unit.losses.get(label)) for label in labels)
        rows.append(
            (unit.component, str(unit.layer), unit.kind, unit.method, *picked, count_text(unit.weights), *losses)
        )
    return columns, rows


def uniform_rows(found: Allocation) -> list[tuple[str, ...]]:
    """The choice and one scheme for all: bits per weight, bytes, predicted loss, and how many times the choice's."""
    rows: list[tuple[str, ...]] = [
        ("chosen", f"{found.bits(found.nbytes):.3f}", f"{found.nbytes:,}", loss_text(found.loss), "1")
    ]
    for one in sorted(found.uniform, key=lambda one: one.nbytes):
        times = f"{one.loss / found.loss:.2f}" if found.loss else "-"
        mark = " (control)" if one is found.control else ""
        rows.append((one.label + mark, f"{found.bits(one.nbytes):.3f}", f"{one.nbytes:,}", loss_text(one.loss), times))
    return rows


UNIFORM_COLUMNS = ("all units", "bits per weight", "bytes", "predicted KL", "times the choice's")


def to_html(scores: Scores, allocation: Allocation | None, *, model: str) -> str:
    """The page."""
    columns, rows = loss_rows(scores, allocation.chosen if allocation else None)
    return render_page(
        "vlmquant.report",
        "sensitivity.html.j2",
        title=f"{model}: what each layer loses by each scheme",
        scores=scores,
        allocation=allocation,
        headlines=_headlines(allocation) if allocation else [],
        frontier=[frontier_plot(allocation, width=width) for width in (plots.WIDE, plots.NARROW)] if allocation else [],
        figures=error_figures([one for one in map(_drawn, scores.units) if one.error > 0]),
        shown=SHOWN[0],
        columns=columns,
        rows=rows,
        recipe=recipe_text(allocation.recipe) if allocation else "",
    )


def _headlines(found: Allocation) -> list[tuple[str, str, str]]:
    heads = [
        ("bits per weight", f"{found.bits(found.nbytes):.3f}", f"{found.nbytes:,} bytes of {found.weights:,} weights"),
        ("predicted KL", loss_text(found.loss), "nats an answer token"),
    ]
    if found.control:
        bits = f"{found.bits(found.control.nbytes):.3f} bits, {found.control.label} for all"
        heads.append(("uniform control", loss_text(found.control.loss), bits))
    return heads


def _drawn(unit: UnitLoss) -> LayerError:
    label = next((one for one in SHOWN if one in unit.losses), next(iter(unit.losses)))
    return LayerError(unit.component, unit.layer, unit.kind.partition("+")[0], unit.losses[label])


def frontier_plot(found: Allocation, *, width: float) -> Markup:
    """Bits per weight across, predicted loss up (logarithmic): the least that is to be had, uniform schemes, the
    choice."""
    height, left, bottom, top, right = 330.0, 60.0, 44.0, 26.0, 16.0
    marks = [(one.label, one.nbytes, one.loss) for one in found.uniform if one.loss > 0]
    curve = [(nbytes, loss) for nbytes, loss in found.curve if loss > 0]
    losses = [loss for _, loss in curve] + [loss for _, _, loss in marks] + [found.loss]
    up, ticks = charts.log_axis([loss for loss in losses if loss > 0] or [1.0], height - bottom, top)
    sizes = [nbytes for nbytes, _ in curve] + [nbytes for _, nbytes, _ in marks] + [found.nbytes]
    across = plots.Axis(0.97 * found.bits(min(sizes)), 1.03 * found.bits(max(sizes)), left, width - right)
    parts = charts.grid_lines(ticks, up, left, width - right)
    for bits in range(1, 17):
        if across.low <= bits <= across.high and (width > plots.NARROW or bits % 2 == 0):
            parts.append(plots.text(across.at(bits), height - bottom + 18, str(bits), "middle"))
    parts.append(plots.text((left + width - right) / 2, height - 6, "bits per weight", "middle"))
    parts.append(plots.text(left, top - 10, "predicted KL, nats per token", "start"))
    points = [(across.at(found.bits(nbytes)), up.at(max(loss, up.low))) for nbytes, loss in curve]
    parts.append(plots.polyline(points, "frontier"))
    if found.loss > 0:
        marks.insert(0, ("chosen", found.nbytes, found.loss))
    places = [(across.at(found.bits(nbytes)), up.at(max(loss, up.low))) for _, nbytes, loss in marks]
    for number, ((label, nbytes, loss), (x, y)) in enumerate(zip(marks, places, strict=True)):
        parts.append(plots.mark(x, y, number, f"{label}: {found.bits(nbytes):.3f} bits, {loss:.3g}"))
    names = [label for label, _, _ in marks]
    parts += charts.labels_beside(
        names, places, width=width, css=["strong" if name == "chosen" else "label" for name in names]
    )
    return plots.svg(width, height, parts, label="bits per weight against predicted loss")
