"""One candidate on a page: its verdict, what it lost and where, and the answers that changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from vlmquant.calibration.samples import Sample
from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Run
from vlmquant.report import charts, plots
from vlmquant.report.cells import LOSS_TITLE, LOSSES, column_axis, loss_cell
from vlmquant.report.data import Report
from vlmquant.report.manifest import LayerError
from vlmquant.report.numbers import METRIC_TEXT
from vlmquant.report.pictures import picture
from vlmquant.report.worst import Changed, changed_answers, word_changes

WORST_SHOWN = 8
LAYERS_NAMED = 5
"""Of the worst layers, so many stand beside the plot."""
IMAGE_SIDE = 360
"""Longest side of an embedded image, pixels."""


def eval_values(report: Report, samples: Mapping[str, Sample]) -> dict[str, object]:
    """What eval.html.j2 asks for."""
    (run,) = report.candidates
    count, cards = _changed(report.reference, run, samples)
    return {"run": run, "strata": _strata(report), "changed": count, "cards": cards}


def _strata(report: Report) -> dict[str, object]:
    """Rows of the losses by stratum, all samples last, one axis for each column."""
    before, summary = report.summaries
    losses = [loss for loss in LOSSES if any(loss in found for found in summary.values())]
    axes = {loss: column_axis(loss, summary.values()) for loss in losses}
    rows = []
    for stratum, found in summary.items():
        perplexity = found.get("perplexity")
        rows.append(
            {
                "stratum": "all samples" if stratum == EVERYTHING else stratum,
                "whole": stratum == EVERYTHING,
                "n": perplexity.n if perplexity else "",
                "cells": [loss_cell(loss, before.get(stratum, {}), found, axes[loss]) for loss in losses],
            }
        )
    return {"titles": [LOSS_TITLE[loss] for loss in losses], "rows": rows}


@dataclass(frozen=True)
class ErrorFigure:
    component: str
    wide: Markup
    narrow: Markup
    """Empty where all that there is lies in one layer."""
    legend: Sequence[tuple[str, Markup]]
    """Kinds of module and their marks."""
    worst: Sequence[tuple[LayerError, str]]
    """The layers with the largest errors, and how many times the median's each is."""


def error_figures(errors: Sequence[LayerError]) -> list[ErrorFigure]:
    """For every component its worst layers by name, and a plot where it has several."""
    figures = []
    for component in dict.fromkeys(error.component for error in errors):
        own = [error for error in errors if error.component == component]
        wide = narrow = Markup("")
        kinds = sorted(dict.fromkeys(error.kind for error in own), key=charts.series_of)
        if len({error.layer for error in own}) > 1:
            wide, narrow = (charts.layer_errors_plot(own, width=width) for width in (ERRORS_WIDE, plots.NARROW))
        legend = [(kind, plots.legend_mark(charts.series_of(kind))) for kind in kinds] if wide else []
        usual = median(error.error for error in own)
        worst = sorted(own, key=lambda error: -error.error)[:LAYERS_NAMED]
        named = [(error, f"{error.error / usual:.1f}×") for error in worst]
        figures.append(ErrorFigure(component, wide, narrow, legend, named))
    return figures


ERRORS_WIDE = 760.0
"""Pixels of the plot that has the worst layers beside it."""


def _changed(reference: Run, run: Run, samples: Mapping[str, Sample]) -> tuple[int, list[Mapping[str, object]]]:
    """How many answers changed, and the worst of them as cards."""
    changed = changed_answers(reference, run)
    return len(changed), [_card(one, samples.get(one.after.id)) for one in changed[:WORST_SHOWN]]


def _card(one: Changed, sample: Sample | None) -> Mapping[str, object]:
    pictures = [picture(path, IMAGE_SIDE) for path in sample.images] if sample else []
    return {
        "id": one.after.id,
        "task": one.after.task,
        "kind": one.kind,
        "question": sample.question if sample else None,
        "before": one.before.generated,
        "after": word_changes(one.before.generated or "", one.after.generated or ""),
        "references": one.after.references,
        "kl": METRIC_TEXT["kl"](one.kl_per_token),
        "pictures": [link for link in pictures if link],
        "missing": len(one.after.images) - sum(link is not None for link in pictures),
    }
