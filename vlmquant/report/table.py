"""The compare table: one row per model, the reference first; as cells, Markdown, and rows for JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmquant.errors import LINE_CHARACTERS, shown, visible
from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Costs, Estimate, Run
from vlmquant.report.data import Report
from vlmquant.report.numbers import NOTHING, fixed, metric_text, size_text


@dataclass(frozen=True)
class Cell:
    """One number of the table, and how it is written."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    method: str
    cells: Mapping[str, Cell]
    """By title of the column, in the table's order."""


METRIC_COLUMNS = {
    "perplexity": "perplexity",
    "BLEU-4": "bleu4_sacrebleu",
    "exact match": "exact_match",
    "KL": "kl",
    "flips": "flip_rate",
}
"""Title of a column -> metric of metrics.summarize."""

COST_COLUMNS: dict[str, tuple[Callable[[Costs], float | None], Callable[[float | None], str]]] = {
    "tokens/s": (lambda costs: costs.tokens_per_second, fixed(1)),
    "memory": (lambda costs: costs.peak_bytes, size_text),
    "size": (lambda costs: costs.weight_bytes, size_text),
}

METHOD = "method"
COLUMNS = (METHOD, *METRIC_COLUMNS, *COST_COLUMNS)


def compare_table(report: Report) -> list[Row]:
    """A row for the reference, then one for each candidate: numbers of all samples, intervals where they exist."""
    return [_row(run, summary.get(EVERYTHING, {})) for run, summary in zip(report.runs, report.summaries, strict=True)]


def _row(run: Run, metrics: Mapping[str, Estimate]) -> Row:
    cells = {title: _metric_cell(metric, metrics.get(metric)) for title, metric in METRIC_COLUMNS.items()}
    for title, (value, show) in COST_COLUMNS.items():
        number = value(run.costs)
        cells[title] = Cell(show(number), number)
    return Row(run.label, cells)


def _metric_cell(metric: str, estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(NOTHING)
    return Cell(metric_text(metric, estimate), estimate.point, estimate.low, estimate.high, estimate.n)


def remarks(report: Report) -> list[tuple[str, str]]:
    """Label and text: what of each run is not as its model or the settings ask for; other inputs come first."""
    return [
        (run.label, shown(text, limit=LINE_CHARACTERS))
        for run in report.runs
        for text in (*([run.other_inputs] if run.other_inputs else []), *run.notes)
    ]


def compare_rows(report: Report) -> list[dict[str, Any]]:
    """Plain JSON: {method, perplexity: {point, low, high, n}, ..., size: bytes}; null where there is no number."""
    return [
        {METHOD: row.method}
        | {title: _plain(cell) if title in METRIC_COLUMNS else _finite(cell.value) for title, cell in row.cells.items()}
        for row in compare_table(report)
    ]


def markdown_table(report: Report) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    rows = compare_table(report)
    return markdown_rows(COLUMNS, [[markdown_text(row.method), *(c.text for c in row.cells.values())] for row in rows])


def markdown_rows(titles: Sequence[str], body: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a Markdown table whose first `left` columns are text; the cells are Markdown already."""
    rule = ["---" if index < left else "---:" for index in range(len(titles))]
    return ["| " + " | ".join(cells) + " |" for cells in (titles, rule, *body)]


def markdown_text(text: str) -> str:
    """Anyone's text on one line, so that Markdown shows it as it is: no table cell ends early, no HTML gets through."""
    line = visible(" ".join(text.split()))
    line = "".join("\\" + letter if letter in "\\`*_[]|~#!" else letter for letter in line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(cell: Cell) -> dict[str, float | None]:
    return {"point": _finite(cell.value), "low": _finite(cell.low), "high": _finite(cell.high), "n": cell.n}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
