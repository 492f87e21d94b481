"""A report as one HTML file that needs no network: styles, plots and images are inside it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from vlmquant.calibration.images import UnusableImageError, thumbnail_uri
from vlmquant.calibration.samples import Sample
from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Estimate, Run
from vlmquant.pages import render_page
from vlmquant.report import plots
from vlmquant.report.data import Report, Verdict, overall
from vlmquant.report.manifest import component_bytes, layer_errors, recipe_text
from vlmquant.report.markdown import facts, run_facts
from vlmquant.report.numbers import (
    METRIC_TEXT,
    SHORT_TITLE,
    bounds_text,
    fixed,
    metric_text,
    size_text,
    threshold_text,
    threshold_title,
)
from vlmquant.report.table import COLUMNS, compare_table, remarks
from vlmquant.report.worst import Changed, changed_answers, word_changes

WORST_SHOWN = 8
IMAGE_SIDE = 360
"""Longest side of an embedded image, pixels."""

LOSSES = ("perplexity_increase", "kl", "flip_rate", "bleu4_drop", "exact_match_drop")
"""What quantization may cost: zero is no loss, and more is worse."""


@dataclass(frozen=True)
class Headline:
    """One large number."""

    title: str
    text: str
    note: str


def to_html(
    report: Report, verdicts: Sequence[Verdict] = (), samples: Sequence[Sample] = (), *, thresholds: str = ""
) -> str:
    """The page. With the evaluated samples it shows the questions and images of the answers that changed most.

    thresholds: where those of the verdicts are from.
    """
    by_id = {sample.id: sample for sample in samples}
    kinds = list(dict.fromkeys(error.kind for run in report.candidates for error in layer_errors(run)))
    return render_page(
        "vlmquant.report",
        "page.html.j2",
        report=report,
        title=", ".join(run.label for run in report.candidates) or report.reference.label,
        outcome=overall(verdicts) if verdicts else None,
        verdicts=_verdict_rows(verdicts),
        thresholds=thresholds,
        headlines=_headlines(report),
        tradeoff=_tradeoff(report),
        columns=COLUMNS,
        rows=compare_table(report),
        remarks=remarks(report),
        strata=[_strata(report, index) for index in range(1, len(report.runs))],
        bytes=[(run, component_bytes(run)) for run in report.candidates],
        bytes_bars=plots.bytes_bars,
        size_text=size_text,
        errors=[(run, _error_plots(run, kinds)) for run in report.candidates],
        kinds=[(kind, plots.legend_mark(index)) for index, kind in enumerate(kinds)],
        changed=[(run, *_changed(report.reference, run, by_id)) for run in report.candidates],
        command=shlex.join(report.command),
        facts=facts(report),
        runs=[(run, run_facts(run), recipe_text(run)) for run in report.runs],
    )


def _verdict_rows(verdicts: Sequence[Verdict]) -> list[Mapping[str, object]]:
    rows: list[Mapping[str, object]] = []
    for verdict in verdicts:
        show = threshold_text(verdict.threshold)
        axis = plots.interval_axis([verdict.point, verdict.low, verdict.high, verdict.margin])
        rows.append(
            {
                "verdict": verdict,
                "title": threshold_title(verdict.threshold),
                "point": show(verdict.point),
                "bounds": bounds_text(verdict.threshold, verdict.low, verdict.high),
                "margin": show(verdict.margin),
                "plot": plots.interval(verdict.point, verdict.low, verdict.high, axis, margin=verdict.margin),
            }
        )
    return rows


def _headlines(report: Report) -> list[Headline]:
    """The few numbers to remember of a single candidate; several are told apart by the table and the trade-off."""
    if len(report.candidates) != 1:
        return []
    before, after = report.reference.costs, report.candidates[0].costs
    metrics = report.summaries[1].get(EVERYTHING, {})
    found = []
    if after.weight_bytes:
        times = fixed(2, unit="×")(before.weight_bytes / after.weight_bytes)
        found.append(Headline("smaller", times, f"{size_text(before.weight_bytes)} → {size_text(after.weight_bytes)}"))
    titles = SHORT_TITLE | {"kl": "KL, nats per token", "flip_rate": "flipped tokens"}
    for metric in LOSSES:
        if estimate := metrics.get(metric):
            text, interval = metric_text(metric, estimate).split(" [")
            found.append(Headline(titles[metric], text, f"95 %: {interval.rstrip(']')}"))
    if before.tokens_per_second and after.tokens_per_second:
        times = fixed(2, unit="×")(after.tokens_per_second / before.tokens_per_second)
        speeds = f"{before.tokens_per_second:.1f} → {after.tokens_per_second:.1f} tokens/s"
        found.append(Headline("speed", times, speeds))
    if before.peak_bytes:
        times = fixed(0, scale=100, unit=" %")(after.peak_bytes / before.peak_bytes)
        found.append(Headline("peak memory", times, f"{size_text(before.peak_bytes)} → {size_text(after.peak_bytes)}"))
    return found


def _tradeoff(report: Report) -> Markup | None:
    points = []
    for run, summary in zip(report.candidates, report.summaries[1:], strict=True):
        kl = summary.get(EVERYTHING, {}).get("kl")
        if kl is not None and kl.point > 0 and kl.high < float("inf"):
            points.append(plots.Tradeoff(run.label, run.costs.weight_bytes, kl.point, kl.low, kl.high))
    return plots.tradeoff_plot(points) if len(points) > 1 else None


def _strata(report: Report, index: int) -> Mapping[str, object]:
    """Rows of one candidate's losses by stratum, one axis for each column."""
    summary, before = report.summaries[index], report.summaries[0]
    metrics = [metric for metric in LOSSES if any(metric in found for found in summary.values())]

    def values(metric: str) -> list[float | None]:
        found = [estimates[metric] for estimates in summary.values() if metric in estimates]
        return [value for one in found for value in (one.point, one.low, one.high)]

    axes = {metric: plots.interval_axis(values(metric)) for metric in metrics}

    def cell(metric: str, estimate: Estimate | None) -> tuple[str, Markup]:
        if estimate is None:
            return metric_text(metric, None), Markup("")
        return metric_text(metric, estimate), plots.interval(estimate.point, estimate.low, estimate.high, axes[metric])

    rows = []
    for stratum, found in summary.items():
        perplexity = found.get("perplexity")
        rows.append(
            {
                "stratum": stratum,
                "n": perplexity.n if perplexity else "",
                "perplexity": tuple(
                    METRIC_TEXT["perplexity"](estimate.point if estimate else None)
                    for estimate in (before.get(stratum, {}).get("perplexity"), perplexity)
                ),
                "cells": [cell(metric, found.get(metric)) for metric in metrics],
            }
        )
    return {"run": report.runs[index], "titles": [SHORT_TITLE[metric] for metric in metrics], "rows": rows}


def _error_plots(run: Run, kinds: Sequence[str]) -> list[tuple[str, Markup]]:
    errors = layer_errors(run)
    components = dict.fromkeys(error.component for error in errors)
    return [
        (component, plots.layer_errors_plot([error for error in errors if error.component == component], kinds))
        for component in components
    ]


def _changed(reference: Run, run: Run, samples: Mapping[str, Sample]) -> tuple[int, list[Mapping[str, object]]]:
    """How many answers changed, and the worst of them as cards."""
    changed = changed_answers(reference, run)
    return len(changed), [_card(one, samples.get(one.after.id)) for one in changed[:WORST_SHOWN]]


def _card(one: Changed, sample: Sample | None) -> Mapping[str, object]:
    pictures = [_picture(path) for path in sample.images] if sample else []
    return {
        "id": one.after.id,
        "task": one.after.task,
        "kind": one.kind,
        "question": sample.question if sample else None,
        "before": one.before.generated,
        "after": word_changes(one.before.generated or "", one.after.generated or ""),
        "references": one.after.references,
        "kl": METRIC_TEXT["kl"](one.kl_per_token),
        "pictures": [picture for picture in pictures if picture],
        "missing": len(one.after.images) - sum(picture is not None for picture in pictures),
    }


def _picture(path: Path) -> str | None:
    """A data: URI of the image, downscaled; None where it can no longer be read, which the page says."""
    try:
        return thumbnail_uri(path, IMAGE_SIDE)
    except UnusableImageError:
        return None
