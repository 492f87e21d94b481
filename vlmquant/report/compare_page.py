"""Several candidates on one page: each part once, with all of them side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vlmquant.calibration.samples import Sample
from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Run
from vlmquant.report import charts, plots
from vlmquant.report.cells import COMPARED, LOSS_TITLE, LOSSES, LossCell, Metrics, loss_cell
from vlmquant.report.data import Report, Verdict, overall
from vlmquant.report.numbers import METRIC_TEXT, fixed, nearness_text, size_text
from vlmquant.report.pictures import picture
from vlmquant.report.ranking import Place, ranked
from vlmquant.report.table import METRIC_COLUMNS, compare_table
from vlmquant.report.words import treatment
from vlmquant.report.worst import Changed, changed_answers, word_changes

ANSWERS_SHOWN = 4
SIZE = "size"
"""The column of costs that stands beside the loss."""
STRATA_LOSSES = tuple(loss for loss in LOSSES if loss != "flip_rate")
"""Told by stratum; flips go with the KL."""
THUMBNAIL_SIDE = 160
"""Longest side of an image beside answers, pixels."""


def compare_values(report: Report, verdicts: Sequence[Verdict], samples: Mapping[str, Sample]) -> dict[str, object]:
    """What compare.html.j2 asks for."""
    places = ranked(report)
    return {
        "ranking": _ranking(report, places, verdicts),
        "summary": _summary(report, places, verdicts),
        "tradeoff": _tradeoff(report, places),
        "strata": _strata(report, places),
        "places": places,
        "answers": _answers(report, places, samples),
    }


@dataclass(frozen=True)
class _Line:
    """A row of the ranking."""

    place: Place | None
    """None: the reference."""
    label: str
    words: str
    gate: tuple[str, str] | None
    """Outcome, and the number that decided it."""
    losses: Sequence[LossCell]
    costs: Mapping[str, str]
    """By title of the column, but for the size."""
    size: str
    smaller: str = ""


def _ranking(report: Report, places: Sequence[Place], verdicts: Sequence[Verdict]) -> dict[str, object]:
    losses = [loss for loss in LOSSES if any(loss in place.summary.get(EVERYTHING, {}) for place in places)]
    before = report.summaries[0].get(EVERYTHING, {})
    costs = {
        row.method: {title: cell.text for title, cell in row.cells.items() if title not in (*METRIC_COLUMNS, SIZE)}
        for row in compare_table(report)
    }
    base = report.reference
    base_cells = [LossCell(_own(loss, before)) for loss in losses]
    lines = [
        _Line(None, base.label, "the original", None, base_cells, costs[base.label], size_text(base.costs.weight_bytes))
    ]
    for place in places:
        cells = [_after(loss_cell(loss, before, place.summary.get(EVERYTHING, {}))) for loss in losses]
        nbytes = place.run.costs.weight_bytes
        smaller = f"{fixed(2, unit='×')(base.costs.weight_bytes / nbytes)} smaller" if nbytes else ""
        gate = _decided([one for one in verdicts if one.candidate == place.run.label])
        words = ", ".join(treatment(place.run))
        lines.append(
            _Line(place, place.run.label, words, gate, cells, costs[place.run.label], size_text(nbytes), smaller)
        )
    return {
        "titles": [LOSS_TITLE[loss] for loss in losses],
        "costs": list(costs[base.label]),
        "lines": lines,
        "judged": bool(verdicts),
    }


def _own(loss: str, metrics: Metrics) -> str:
    """The reference's own value of what a loss compares; nothing for a distance from it."""
    metric = COMPARED.get(loss)
    return METRIC_TEXT[metric](metrics[metric].point) if metric is not None and metric in metrics else ""


def _after(cell: LossCell) -> LossCell:
    """Without the value before, which stands in the reference's row."""
    return LossCell(cell.text.split(" → ")[-1], cell.note, cell.plot)


def _decided(verdicts: Sequence[Verdict]) -> tuple[str, str] | None:
    """The outcome, and of the verdicts that made it the one that is nearest to its margin, or farthest beyond it."""
    if not verdicts:
        return None
    outcome = overall(verdicts)
    deciding = [one for one in verdicts if one.outcome == outcome and one.point is not None]
    if not deciding:
        return outcome, next((one.reason for one in verdicts if one.outcome == outcome), "nothing was measured")
    most = max(deciding, key=lambda one: (one.point or 0.0) / one.margin if one.margin else float("inf"))
    return outcome, nearness_text(most.threshold, most.point, most.margin, most.stratum)


def _summary(report: Report, places: Sequence[Place], verdicts: Sequence[Verdict]) -> dict[str, object] | None:
    """Who passes, and who loses least at which size; None where there is nothing to choose from."""
    frontier = [place for place in places if place.on_frontier]
    if not frontier:
        return None
    own = [[one for one in verdicts if one.candidate == run.label] for run in report.candidates]
    outcomes = [overall(part) for part in own if part]
    nearest, smallest = frontier[0], min(frontier, key=lambda place: place.run.costs.weight_bytes)
    return {
        "judged": len(outcomes),
        "passed": outcomes.count("pass"),
        "nearest": nearest,
        "smallest": smallest,
    }


def _tradeoff(report: Report, places: Sequence[Place]) -> tuple[Markup, Markup] | None:
    points = [
        charts.Tradeoff(
            place.run.label,
            place.rank,
            place.run.costs.weight_bytes,
            place.kl.point,
            place.kl.low,
            place.kl.high,
            place.on_frontier,
        )
        for place in places
        if place.kl is not None and place.kl.point > 0 and place.kl.high < float("inf")
    ]
    original = report.reference.costs.weight_bytes
    if len(points) < 2 or not any(point.size for point in points):
        return None
    wide, narrow = (charts.tradeoff_plot(points, original=original, width=w) for w in (plots.WIDE, plots.NARROW))
    return wide, narrow


def _strata(report: Report, places: Sequence[Place]) -> list[dict[str, object]]:
    """A group of rows for each loss, a row for each stratum that has it; all samples stand in the ranking."""
    groups: list[dict[str, object]] = []
    for loss in STRATA_LOSSES:
        rows = []
        for stratum, before in report.summaries[0].items():
            found = [place.summary.get(stratum, {}) for place in places]
            counts = [part[loss].n for part in found if loss in part]
            if stratum == EVERYTHING or not counts:
                continue
            cells = [_after(loss_cell(loss, before, part)) for part in found]
            rows.append({"stratum": stratum, "n": counts[0], "before": _own(loss, before), "cells": cells})
        if rows:
            groups.append({"title": LOSS_TITLE[loss], "rows": rows})
    return groups


def _answers(report: Report, places: Sequence[Place], samples: Mapping[str, Sample]) -> dict[str, object]:
    """The samples that most candidates answer otherwise: right ones that became wrong first, then by KL."""
    changed = {
        place.run.label: {one.after.id: one for one in changed_answers(report.reference, place.run)} for place in places
    }
    by_id: dict[str, list[Changed]] = {}
    for found in changed.values():
        for name, one in found.items():
            by_id.setdefault(name, []).append(one)

    def weight(name: str) -> tuple[int, int, float, str]:
        lost = sum(one.kind == LOST for one in by_id[name])
        return -lost, -len(by_id[name]), -max(one.kl_per_token for one in by_id[name]), name

    rows = []
    for name in sorted(by_id, key=weight)[:ANSWERS_SHOWN]:
        one, sample = by_id[name][0], samples.get(name)
        links = [picture(path, THUMBNAIL_SIDE) for path in sample.images[:1]] if sample else []
        rows.append(
            {
                "id": name,
                "task": one.after.task,
                "question": sample.question if sample else None,
                "picture": next((link for link in links if link), None),
                "references": one.after.references,
                "before": one.before.generated,
                "cells": [_answer(changed[place.run.label].get(name)) for place in places],
            }
        )
    return {
        "rows": rows,
        "counts": [_counts(place.run, list(changed[place.run.label].values())) for place in places],
        "total": len(by_id),
    }


LOST, GAINED = "right, now wrong", "wrong, now right"


def _answer(one: Changed | None) -> dict[str, object] | None:
    if one is None:
        return None
    return {"kind": one.kind, "after": word_changes(one.before.generated or "", one.after.generated or "")}


def _counts(run: Run, changed: Sequence[Changed]) -> str:
    """How many answers changed, and how many of them for the worse and the better."""
    lost, gained = (sum(one.kind == kind for one in changed) for kind in (LOST, GAINED))
    asked = sum(sample.generated is not None for sample in run.samples)
    return f"{len(changed)} of {asked} changed, {lost} lost, {gained} gained"
