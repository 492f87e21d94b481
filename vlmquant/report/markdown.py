"""A report as Markdown: the verdict first, then the table, the strata, the costs, and how to repeat it."""

import shlex
from collections.abc import Sequence
from typing import Any

from vlmquant.errors import visible
from vlmquant.evaluation.metrics import bleu_signature
from vlmquant.evaluation.records import Costs, Run
from vlmquant.report.data import Report, Verdict, overall
from vlmquant.report.manifest import component_bytes, recipe_of, recipe_text, work_of
from vlmquant.report.numbers import (
    bounds_text,
    change_text,
    fixed,
    metric_text,
    metric_title,
    size_text,
    threshold_text,
    threshold_title,
)
from vlmquant.report.table import (
    COST_LEGEND,
    COST_TITLES,
    LEGEND,
    cost_rows,
    markdown_rows,
    markdown_table,
    markdown_text,
    remarks,
)
from vlmquant.report.worst import changed_answers

WORST_SHOWN = 10

SIGNS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive", "skipped": "➖ not judged"}


def to_markdown(report: Report, verdicts: Sequence[Verdict] = (), *, thresholds: str = "") -> str:
    """The whole report; with the gate's verdicts they come first. thresholds: where theirs are from."""
    parts: list[list[str]] = [
        [f"# vlmquant report: {markdown_text(', '.join(run.label for run in report.candidates))}"]
    ]
    if verdicts:
        parts.append(verdict_lines(verdicts, thresholds=thresholds))
    parts.append(["## Comparison", "", *markdown_table(report)])
    parts.append(
        [
            "All samples; 95 % bootstrap intervals over images in brackets. KL and flips: against the reference. "
            + LEGEND
        ]
    )
    parts.append([f"- {markdown_text(label)}: {markdown_text(text)}" for label, text in remarks(report)])
    parts.append(_strata(report))
    parts.append(_costs(report))
    for run in report.candidates:
        parts.append(_bytes(run))
        parts.append(_worst(report.reference, run))
    parts.append(_details(report))
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def card_section(report: Report, verdicts: Sequence[Verdict] = (), *, thresholds: str = "") -> str:
    """What a model card says of a report: the gate, the table, and on what it was measured."""
    sets = ", ".join(f"{name}: sha256 {digest}" for name, digest in report.hashes.items())
    parts = [
        ["## What it cost"],
        verdict_lines(verdicts, thresholds=thresholds) if verdicts else [],
        markdown_table(report),
        [
            f"Measured on {len(report.reference.samples)} samples ({markdown_text(sets)}) on {report.created}; 95 % "
            f"bootstrap intervals over images in brackets. KL and flips: against the original. {LEGEND}"
        ],
        [f"- {markdown_text(label)}: {markdown_text(text)}" for label, text in remarks(report)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def verdict_lines(verdicts: Sequence[Verdict], *, thresholds: str = "") -> list[str]:
    """The gate's outcome in bold, a table of its verdicts, advice, and where the thresholds are from."""
    body = []
    for verdict in verdicts:
        show = threshold_text(verdict.threshold)
        body.append(
            [
                markdown_text(verdict.candidate),
                markdown_text(threshold_title(verdict.threshold, verdict.stratum)),
                SIGNS[verdict.outcome],
                change_text(verdict.threshold, verdict.point),
                show(verdict.margin),
                bounds_text(verdict.threshold, verdict.low, verdict.high),
                str(verdict.n),
                markdown_text(verdict.reason),
            ]
        )
    titles = ["method", "loss", "verdict", "measured", "at most", "one-sided bounds of the loss", "n", "why"]
    advice = [
        f"- {markdown_text(verdict.candidate)}, {markdown_text(threshold_title(verdict.threshold, verdict.stratum))}: "
        f"{markdown_text(verdict.advice)}"
        for verdict in verdicts
        if verdict.advice
    ]
    lines = [f"**Gate: {SIGNS[overall(verdicts)]}**", "", *markdown_rows(titles, body, left=3)]
    lines += ["", *advice] if advice else []
    return [*lines, "", f"Thresholds: {markdown_text(thresholds)}."] if thresholds else lines


def _strata(report: Report) -> list[str]:
    metrics = list(dict.fromkeys(name for summary in report.summaries for found in summary.values() for name in found))
    body = []
    for stratum in dict.fromkeys(name for summary in report.summaries for name in summary):
        for metric in metrics:
            found = [summary.get(stratum, {}).get(metric) for summary in report.summaries]
            if any(found):
                n = next(estimate.n for estimate in found if estimate is not None)
                texts = [metric_text(metric, estimate) for estimate in found]
                body.append([markdown_text(stratum), markdown_text(metric_title(metric)), str(n), *texts])
    titles = ["stratum", "metric", "n", *(markdown_text(run.label) for run in report.runs)]
    return ["## By stratum", "", *markdown_rows(titles, body, left=2)]


def _costs(report: Report) -> list[str]:
    body = [list(map(markdown_text, row)) for row in cost_rows(report)]
    return ["## Costs", "", *markdown_rows(COST_TITLES, body), "", COST_LEGEND]


def _bytes(run: Run) -> list[str]:
    parts = component_bytes(run)
    if not parts:
        return []
    total = ("all", sum(part.before for part in parts), sum(part.after for part in parts))
    rows = [*((part.component, part.before, part.after) for part in parts), total]
    body = [
        [markdown_text(name), size_text(before), size_text(after), f"{100 * after / before:.1f} %" if before else "–"]
        for name, before, after in rows
    ]
    titles = ["component", "before", "after", "left"]
    return [f"## Bytes by component: {markdown_text(run.label)}", "", *markdown_rows(titles, body)]


def _worst(reference: Run, run: Run) -> list[str]:
    changed = changed_answers(reference, run)
    if not changed:
        return []
    body = [
        [
            markdown_text(one.after.id),
            markdown_text(one.after.task),
            one.kind,
            markdown_text(one.before.generated or ""),
            markdown_text(one.after.generated or ""),
            markdown_text(" / ".join(one.after.references)),
            fixed(3)(one.kl_per_token),
        ]
        for one in changed[:WORST_SHOWN]
    ]
    titles = ["sample", "task", "", "reference model", "quantized model", "accepted answers", "KL per token"]
    share = f"{len(changed)} of {len(run.samples)} answers changed; the {len(body)} worst:"
    return [f"## Changed answers: {markdown_text(run.label)}", "", share, "", *markdown_rows(titles, body, left=6)]


def _details(report: Report) -> list[str]:
    lines = ["## How to repeat it", "", _fence(visible(shlex.join(report.command))), ""]
    lines += [f"- {markdown_text(key)}: {markdown_text(value)}" for key, value in facts(report)]
    for run in report.runs:
        lines += ["", f"### {markdown_text(run.label)}", ""]
        lines += [f"- {markdown_text(key)}: {markdown_text(value)}" for key, value in run_facts(run)]
        if recipe := recipe_text(run):
            lines += ["", _fence(recipe.rstrip(), "yaml")]
    return lines


def facts(report: Report) -> list[tuple[str, str]]:
    """What holds for the whole report: when, signature, hashes."""
    signature = bleu_signature(report.reference)
    return [
        ("created", report.created),
        *([("sacrebleu signature", signature)] if signature else []),
        *((f"sha256 of {key.replace('_', ' ')}", value) for key, value in report.hashes.items()),
    ]


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What is to know of one run: path, recipe, what quantizing took, settings, versions."""
    name = recipe_of(run).get("name")
    return [
        ("model", run.model),
        *([("recipe", str(name))] if name else []),
        *work_of(run),
        *process_facts(run.costs),
        *((key, _plain(value)) for key, value in {**run.settings, **run.environment}.items()),
    ]


def process_facts(costs: Costs) -> list[tuple[str, str]]:
    """The whole process that scored a model, which says little of the model."""
    before = size_text(costs.baseline_bytes)
    return [("process at its peak", f"{size_text(costs.peak_bytes)}, of which {before} before the model was loaded")]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _fence(text: str, language: str = "") -> str:
    text = "\n".join(map(visible, text.split("\n")))
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}{language}\n{text}\n{ticks}"
