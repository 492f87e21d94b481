"""A report as one HTML file that needs no network: styles, plots and images are inside it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from vlmquant.calibration.samples import Sample
from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Costs, Round
from vlmquant.evaluation.turns import speed_ratios
from vlmquant.pages import render_page
from vlmquant.report import plots
from vlmquant.report.cells import LOSS_TITLE, LOSSES, change_note, values_text
from vlmquant.report.compare_page import compare_values
from vlmquant.report.data import Report, Verdict, overall
from vlmquant.report.eval_page import error_figures, eval_values
from vlmquant.report.manifest import component_bytes, layer_errors, recipe_text
from vlmquant.report.markdown import facts, run_facts
from vlmquant.report.numbers import (
    TIMES,
    change_text,
    fixed,
    margin_text,
    nearness_text,
    size_text,
    threshold_title,
)
from vlmquant.report.table import COST_LEGEND, COST_TITLES, SPEED_COLUMNS, SPEED_LEGEND, cost_rows, remarks
from vlmquant.report.words import date_words, page_title, recipe_name, what_was_done


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
    one = len(report.candidates) == 1
    values = eval_values(report, by_id) if one else compare_values(report, verdicts, by_id)
    return render_page(
        "vlmquant.report",
        "eval.html.j2" if one else "compare.html.j2",
        **values,
        report=report,
        title=page_title(report),
        date=date_words(report.created),
        what_was_done=what_was_done,
        recipe_name=recipe_name,
        outcome=overall(verdicts) if verdicts else None,
        verdicts=_verdict_rows(verdicts),
        thresholds=thresholds,
        headlines=_tiles(_headlines(report)),
        remarks=remarks(report),
        costs=(COST_TITLES, cost_rows(report), f"{SPEED_LEGEND} {COST_LEGEND}"),
        bytes=[(run, component_bytes(run)) for run in report.candidates],
        bytes_bars=lambda parts: [plots.bytes_bars(parts, width=width) for width in (plots.WIDE, plots.NARROW)],
        size_text=size_text,
        errors=[(run, error_figures(layer_errors(run))) for run in report.candidates],
        command=shlex.join(report.command),
        facts=facts(report),
        runs=[(run, run_facts(run), recipe_text(run)) for run in report.runs],
    )


def _verdict_rows(verdicts: Sequence[Verdict]) -> list[Mapping[str, object]]:
    rows: list[Mapping[str, object]] = []
    for verdict in verdicts:
        axis = plots.interval_axis([verdict.point, verdict.low, verdict.high, verdict.margin])
        bound = verdict.low if verdict.outcome == "fail" else verdict.high
        side = "at least" if verdict.outcome == "fail" else "at most"
        rows.append(
            {
                "verdict": verdict,
                "title": threshold_title(verdict.threshold, verdict.stratum),
                "nearness": nearness_text(verdict.threshold, verdict.point, verdict.margin, verdict.stratum),
                "point": change_text(verdict.threshold, verdict.point),
                "bound": "" if bound is None else f"{side} {change_text(verdict.threshold, bound)}",
                "margin": margin_text(verdict.threshold, verdict.margin),
                "confidence": None if verdict.alpha is None else f"{100 * (1 - verdict.alpha):g} %",
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
    for loss in LOSSES:
        if estimate := metrics.get(loss):
            text, note = (
                values_text(loss, report.summaries[0].get(EVERYTHING, {}), metrics),
                change_note(loss, estimate),
            )
            found.append(Headline(LOSS_TITLE[loss], text, note))
    return [*found, *_speed_headlines(after.rounds), *_memory_headlines(before, after)]


TILE_COLUMNS = 12
"""Of the grid of headlines: a row of one to MOST_TILES of them divides it."""
MOST_TILES = 4
"""Headlines in a row."""


def _tiles(headlines: Sequence[Headline]) -> list[tuple[Headline, int]]:
    """Each with the columns it spans: all rows are full, and no row has two more tiles than another."""
    rows = -(-len(headlines) // MOST_TILES)
    counts = [len(headlines) // rows + (row < len(headlines) % rows) for row in range(rows)]
    spans = [TILE_COLUMNS // count for count in counts for _ in range(count)]
    return list(zip(headlines, spans, strict=True))


def _speed_headlines(rounds: Sequence[Round] | None) -> list[Headline]:
    """Of the ratios whose rounds agree; an unstable one is no headline."""
    if not rounds or (ratios := speed_ratios(rounds)) is None:
        return []
    before, after = [one.reference for one in rounds], [one.model for one in rounds]
    speeds = [fixed(1)(median(one.tokens_per_second for one in side)) for side in (before, after)]
    waits = [fixed(2)(median(one.first_token_seconds for one in side)) for side in (before, after)]
    spans = {"speed": f"{' → '.join(speeds)} tokens/s", "first token": f"{' → '.join(waits)} s"}
    found = []
    for title, choose in SPEED_COLUMNS.items():
        if (ratio := choose(ratios)).stable:
            low, high = (fixed(2)(bound) for bound in (ratio.low, ratio.high))
            note = f"{low} to {high} in {ratio.rounds} turns; {spans[title]}"
            found.append(Headline(title, TIMES(ratio.point), note))
    return found


def _memory_headlines(before: Costs, after: Costs) -> list[Headline]:
    """Of the weights, with the activations beside them, which quantizing weights leaves as they are."""
    if not before.held_bytes or after.held_bytes is None:
        return []
    share = fixed(0, scale=100, unit=" %")(after.held_bytes / before.held_bytes)
    held = f"{size_text(before.held_bytes)} → {size_text(after.held_bytes)}"
    above = f"activations {size_text(before.activation_bytes)} → {size_text(after.activation_bytes)}"
    return [Headline("weights in memory", share, f"{held}; {above}")]
