"""Component maps, plans and strata as tables for a terminal, and as data for machines."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from vlmquant.calibration.sampling import Stratum
from vlmquant.components import COMPONENTS, ComponentMap
from vlmquant.planning import Plan
from vlmquant.report.data import Verdict, overall
from vlmquant.report.numbers import threshold_text, threshold_title
from vlmquant.shards import dtype_name


def megabytes(count: int) -> str:
    """Bytes for people: 241.7 MB, 3.1 GB (powers of ten, as disks are sold and `plan` adds up)."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def component_summary(components: ComponentMap) -> dict[str, Any]:
    """What `inspect --json` prints."""
    parts = {}
    for name in COMPONENTS:
        parameters = [parameter for parameter in components.parameters if parameter.component == name]
        if not parameters:
            continue
        blocks = [block for block in components.blocks if block.component == name]
        linears = [linear for linear in components.linears if linear.component == name]
        groups = sorted(
            {
                tuple(linear.local for linear in group)
                for block in blocks
                for group in components.fused_groups(block)
                if len(group) > 1
            }
        )
        parts[name] = {
            "parameters": sum(_count(parameter.shape) for parameter in parameters),
            "bytes": sum(parameter.nbytes for parameter in parameters),
            "tensors": len(parameters),
            "blocks": len(blocks),
            "linears": len(linears),
            "linear_parameters": sum(linear.in_features * linear.out_features for linear in linears),
            "fused_groups": [list(group) for group in groups],
        }
    return {
        "model": str(components.model_dir),
        "model_type": components.config.model_type,
        "dtype": dtype_name(components.dtype),
        "bytes": components.total_bytes,
        "tied": [list(names) for names in components.tied],
        "components": parts,
    }


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def component_table(components: ComponentMap) -> Table:
    """One row per component."""
    summary = component_summary(components)
    rows = [
        (
            name,
            f"{part['parameters']:,}",
            megabytes(part["bytes"]),
            str(part["blocks"] or "-"),
            str(part["linears"] or "-"),
            "; ".join("+".join(one.rpartition(".")[2] for one in group) for group in part["fused_groups"]) or "-",
        )
        for name, part in summary["components"].items()
    ]
    rows.append(
        ("all", f"{sum(_count(p.shape) for p in components.parameters):,}", megabytes(summary["bytes"]), "", "", "")
    )
    title = f"{summary['model']}: {summary['model_type']}, {summary['dtype']}"
    if summary["tied"]:
        title += f"; tied: {', '.join(' = '.join(names) for names in summary['tied'])}"
    return make_table(title, ("component", "parameters", "size", "blocks", "linears", "fused groups"), rows)


def plan_table(plan: Plan) -> Table:
    """Bytes and bits per component, and every fallback."""
    schemes: dict[str, list[str]] = {}
    for line in plan.lines:
        label = f"{line.scheme_label} ({line.method})" if line.action == "quantize" else line.scheme_label
        known = schemes.setdefault(line.component, [])
        if label not in known and (line.action == "quantize" or len(line.shape) > 1):
            known.append(label)
    rows = [
        (
            name,
            ", ".join(schemes[name]) or "fp16",
            f"{totals.parameters:,}",
            megabytes(totals.bytes_before),
            megabytes(totals.bytes_after),
            f"{totals.bits_per_weight:.2f}",
            f"{totals.quantized_bits_per_weight:.2f}" if totals.quantized_parameters else "-",
        )
        for name, totals in plan.by_component().items()
    ]
    totals = plan.totals
    ratio = totals.bytes_before / max(totals.bytes_after, 1)
    rows.append(
        (
            "all",
            f"{ratio:.2f}x smaller",
            f"{totals.parameters:,}",
            megabytes(totals.bytes_before),
            megabytes(totals.bytes_after),
            f"{totals.bits_per_weight:.2f}",
            f"{totals.quantized_bits_per_weight:.2f}" if totals.quantized_parameters else "-",
        )
    )
    columns = ("component", "schemes", "parameters", "before", "after", "bits/weight", "of the quantized")
    table = make_table("Plan", columns, rows, left=2)
    if plan.fallbacks:
        table.caption = "\n".join(plan.fallbacks)
        table.caption_justify = "left"
    return table


def plan_lines_table(plan: Plan) -> Table:
    """One row per tensor."""
    rows = [
        (
            line.name,
            line.component,
            f"{line.scheme_label} ({line.method})" if line.action == "quantize" else "keep",
            line.reason,
            "x".join(map(str, line.shape)),
            f"{line.bytes_before:,}",
            f"{line.bytes_after:,}",
        )
        for line in plan.lines
    ]
    return make_table(
        "Every weight", ("weight", "component", "becomes", "why", "shape", "before", "after"), rows, left=4
    )


def strata_table(strata: Sequence[Stratum]) -> Table:
    """What was drawn from each task of a set."""
    rows = [(row.task, str(row.asked), str(row.got), str(row.with_image), str(row.text_only)) for row in strata]
    return make_table("Strata", ("task", "asked", "got", "with image", "text only"), rows)


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """One row per threshold and model."""
    rows = []
    for verdict in verdicts:
        text = threshold_text(verdict.threshold)
        rows.append(
            (
                verdict.candidate,
                threshold_title(verdict.threshold),
                verdict.outcome,
                verdict.reason,
                text(verdict.point),
                f"{text(verdict.low)} to {text(verdict.high)}",
                text(verdict.margin),
                str(verdict.n),
                "-" if verdict.n_needed is None else str(verdict.n_needed),
            )
        )
    columns = ("model", "threshold", "verdict", "why", "measured", "bounds", "margin", "samples", "needed")
    return make_table(f"Gate: {overall(verdicts)}", columns, rows, left=4)
