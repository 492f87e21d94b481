"""The compare table: one row per model, the reference first; as cells, Markdown, and rows for JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmquant.errors import LINE_CHARACTERS, shown, visible
from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Costs, Estimate, Run
from vlmquant.evaluation.turns import Ratio, SpeedRatios, speed_ratios
from vlmquant.report.data import Report
from vlmquant.report.numbers import (
    NOTHING,
    TIMES,
    UNPAIRED,
    fixed,
    metric_text,
    places_text,
    ratio_text,
    size_text,
)


@dataclass(frozen=True)
class Cell:
    """One number of the table, and how it is written."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    stable: bool | None = None
    """Of a speed: whether its rounds agree."""


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

SPEED_COLUMNS: dict[str, Callable[[SpeedRatios], Ratio]] = {
    "speed": lambda found: found.decode,
    "first token": lambda found: found.first_token,
}
"""Title of a column -> how many times as fast as the reference."""

COST_COLUMNS: dict[str, Callable[[Costs], float | None]] = {
    "memory": lambda costs: costs.held_bytes,
    "size": lambda costs: costs.weight_bytes,
}
"""Title of a column -> bytes."""

SPEED_LEGEND = (
    "Speed and first token: tokens a second, and the time to the first one, as times as fast as the reference; the "
    "median of rounds in which both answer the same prompt, one right after the other, at batch size 1, with its "
    "interval of at least 95 %."
)
LEGEND = f"{SPEED_LEGEND} Memory: the tensors that the loaded model holds, in the dtype that it computes in."
"""What the columns of costs are, below the table."""

METHOD = "method"
COLUMNS = (METHOD, *METRIC_COLUMNS, *SPEED_COLUMNS, *COST_COLUMNS)


def compare_table(report: Report) -> list[Row]:
    """A row for the reference, then one for each candidate: numbers of all samples, intervals where they exist."""
    return [_row(run, summary.get(EVERYTHING, {})) for run, summary in zip(report.runs, report.summaries, strict=True)]


def _row(run: Run, metrics: Mapping[str, Estimate]) -> Row:
    cells = {title: _metric_cell(metric, metrics.get(metric)) for title, metric in METRIC_COLUMNS.items()}
    ratios = speed_ratios(run.costs.rounds)
    for title, choose in SPEED_COLUMNS.items():
        cells[title] = _speed_cell(choose(ratios)) if ratios else Cell(UNPAIRED if run.costs.unpaired else NOTHING)
    for title, value in COST_COLUMNS.items():
        number = value(run.costs)
        cells[title] = Cell(size_text(number), number)
    return Row(run.label, cells)


def _speed_cell(ratio: Ratio) -> Cell:
    return Cell(ratio_text(ratio), ratio.point, ratio.low, ratio.high, ratio.rounds, ratio.stable)


def _metric_cell(metric: str, estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(NOTHING)
    return Cell(metric_text(metric, estimate), estimate.point, estimate.low, estimate.high, estimate.n)


def remarks(report: Report) -> list[tuple[str, str]]:
    """Label and text: what of each run is not as its model or the settings ask for, or is no number to be told by;
    other inputs come first."""
    return [
        (run.label, shown(text, limit=LINE_CHARACTERS))
        for run in report.runs
        for text in (*([run.other_inputs] if run.other_inputs else []), *run.notes, *_speed_remarks(run.costs))
    ]


def _speed_remarks(costs: Costs) -> list[str]:
    if costs.unpaired:
        return [f"its speed was not measured in turns with the reference's: {costs.unpaired}"]
    if (ratios := speed_ratios(costs.rounds)) is None:
        return []
    return [
        f"{title} is unstable: {TIMES(ratio.low)} to {TIMES(ratio.high)} over {ratio.rounds} rounds; "
        "measure on a machine with less other work"
        for title, choose in SPEED_COLUMNS.items()
        if not (ratio := choose(ratios)).stable
    ]


COST_TITLES = (
    METHOD,
    "size",
    "weights in memory",
    "activations",
    "load peak",
    "load",
    "first token",
    "tokens/s",
    "slowest to fastest",
)
COST_LEGEND = (
    "Weights in memory: the tensors that the loaded model holds, shared ones once. Activations: the peak above them "
    "while it was scored in batches, KV cache included. Load peak: above what the process took before it loaded the "
    "model. Seconds and tokens/s: medians of each model's own timings; models compare by the ratios."
)
"""What stands in cost_rows."""


def cost_rows(report: Report) -> list[list[str]]:
    """A row for each model, as COST_TITLES has it; the texts are anybody's."""
    seconds, speed = fixed(2, unit=" s"), fixed(1)
    rows = []
    for run in report.runs:
        costs, places = run.costs, run.costs.memory or {}
        slowest, fastest = costs.tokens_per_second_range or (None, None)
        rows.append(
            [
                run.label,
                size_text(costs.weight_bytes),
                places_text({name: place.held for name, place in places.items()}),
                size_text(costs.activation_bytes),
                places_text({name: place.load for name, place in places.items()}),
                seconds(costs.load_seconds),
                seconds(costs.prefill_seconds),
                speed(costs.tokens_per_second),
                NOTHING if slowest is None else f"{speed(slowest)} to {speed(fastest)}",
            ]
        )
    return rows


def compare_rows(report: Report) -> list[dict[str, Any]]:
    """Plain JSON: {method, perplexity: {point, low, high, n}, ..., speed: {..., n: rounds, stable}, size: bytes}; null
    where there is no number."""
    return [
        {METHOD: row.method}
        | {title: _finite(cell.value) if title in COST_COLUMNS else _plain(cell) for title, cell in row.cells.items()}
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
    numbers = {"point": _finite(cell.value), "low": _finite(cell.low), "high": _finite(cell.high), "n": cell.n}
    return numbers if cell.stable is None else numbers | {"stable": cell.stable}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
