"""What was measured, and what a gate made of it. Imports neither torch nor transformers."""

from collections.abc import Sequence

from vlmquant.errors import shown
from vlmquant.report.data import Report, Verdict, overall
from vlmquant.report.numbers import change_text, margin_text, threshold_text, threshold_title
from vlmquant.report.table import COLUMNS, LEGEND, compare_table
from vlmquant.tables.layout import Table, make_table


def comparison_table(report: Report) -> Table:
    """One row per model, the reference first."""
    rows = [(row.method, *(cell.text for cell in row.cells.values())) for row in compare_table(report)]
    return make_table("", COLUMNS, rows, caption=[LEGEND])


def verdict_table(verdicts: Sequence[Verdict], *, thresholds: str = "") -> Table:
    """One row per threshold and model; below it what would decide, and where the thresholds are from."""
    rows = []
    for verdict in verdicts:
        text = threshold_text(verdict.threshold)
        rows.append(
            (
                verdict.candidate,
                threshold_title(verdict.threshold, verdict.stratum),
                verdict.outcome,
                verdict.reason,
                change_text(verdict.threshold, verdict.point),
                margin_text(verdict.threshold, verdict.margin),
                f"{text(verdict.low)} to {text(verdict.high)}",
                str(verdict.n),
            )
        )
    columns = ("model", "threshold", "verdict", "why", "measured", "at most", "bounds of the loss", "samples")
    told = [
        f"{shown(verdict.candidate)}, {threshold_title(verdict.threshold, verdict.stratum)}: {verdict.advice}"
        for verdict in verdicts
        if verdict.advice
    ]
    caption = [*told, *([f"thresholds: {thresholds}"] if thresholds else [])]
    return make_table(f"Gate: {overall(verdicts)}", columns, rows, left=4, caption=caption)
