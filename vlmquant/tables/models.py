"""Component maps, plans and the support table."""

from collections.abc import Mapping
from typing import Any

from vlmquant.components import COMPONENTS, ComponentMap
from vlmquant.planning import Plan, has_folds
from vlmquant.report.numbers import count_text, size_text
from vlmquant.shards import dtype_name
from vlmquant.tables.layout import Table, make_table


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
        "stored_as": components.source.label if components.source else None,
        "bytes": components.total_bytes,
        "family": {
            "source": components.family.source,
            "parts": {prefix: owner for prefix, owner in components.family.prefixes().items() if prefix},
            "runs": components.family.runs,
            "folds": [name for name in ("vision_encoder", "language") if has_folds(components, name)],
        },
        "experts": {
            name: {"experts": form.experts, "hidden": form.hidden, "intermediate": form.intermediate}
            for name, form in components.experts.items()
        },
        "not_loaded": [parameter.name for parameter in components.parameters if not parameter.loaded],
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
            "; ".join(
                dict.fromkeys("+".join(one.rpartition(".")[2] for one in group) for group in part["fused_groups"])
            )
            or "-",
            count_text(part["parameters"]),
            size_text(part["bytes"]),
            str(part["blocks"] or "-"),
            str(part["linears"] or "-"),
        )
        for name, part in summary["components"].items()
    ]
    rows.append(
        (
            "all",
            "",
            count_text(sum(_count(p.shape) for p in components.parameters)),
            size_text(summary["bytes"]),
            "",
            "",
        )
    )
    title = f"{summary['model']}: {summary['model_type']}, {summary['dtype']}"
    if summary["tied"]:
        title += f"; tied: {', '.join(' = '.join(names) for names in summary['tied'])}"
    columns = ("component", "fused groups", "parameters", "size", "blocks", "linears")
    return make_table(title, columns, rows, left=2, caption=_family_lines(components))


def _family_lines(components: ComponentMap) -> list[str]:
    """Where the parts are, who says so, and what is special about the model."""
    family = components.family
    whose = {
        "table": "in the table of families",
        "guess": "guessed",
        "recipe": "as the given row says",
        "names": "by the tensors' names",
    }[family.source]
    lines = [f"parts ({whose}): {components.parts_told}"]
    if components.source:
        lines.append(f"stored in {components.source.label}, dequantized to {dtype_name(components.dtype)} when read")
    if components.experts:
        counts = sorted({form.experts for form in components.experts.values()})
        lines.append(f"experts: {len(components.experts)} layers of {' or '.join(map(str, counts))}")
    if travelling := [parameter.name for parameter in components.parameters if not parameter.loaded]:
        lines.append(
            f"not loaded by the model class, kept as they are: {len(travelling)} tensors ({travelling[0]}, ...)"
        )
    for name in ("vision_encoder", "language"):
        if not has_folds(components, name):
            lines.append(f"{name}: no layer is known to take AWQ's channel scales, so awq only clips there")
    return lines


def support_rows(support: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The support table of `inspect --families`: what works first, then what is refused and why."""
    columns = ("model type", "parts", "components", "experts", "AWQ folds", "tried with", "transformers alone")
    works: list[tuple[str, ...]] = []
    refused: list[tuple[str, ...]] = []
    for kind, found in support["types"].items():
        if "class" not in found:
            why = found.get("refused") or f"not tried: {found['not_built']}"
            refused.append((kind, "-", why.split("; say where")[0], "-", "-", "-", "-"))
            continue
        names = {"vision_encoder": "vision", "lm_head": "head"}
        parts = [names.get(name, name) for name in COMPONENTS if name in found["parts"]]
        folds = "+".join({"vision_encoder": "vision"}.get(name, name) for name in found["folds"]) or "none"
        tried = ["rtn", *(["int8 + gptq"] if found["calibrated"] else []), "+".join(found["compared"]) + " logits"]
        works.append(
            (
                kind,
                found["source"],
                ", ".join(parts),
                "yes" if found["experts"] else "-",
                folds,
                ", ".join(tried),
                "ok" if found["stock"] == "ok" else "needs vlmquant",
            )
        )
    return columns, works + refused


def support_table(support: Mapping[str, Any]) -> Table:
    """Which model types of transformers work, and how that was tried."""
    columns, rows = support_rows(support)
    working = sum(row[1] != "-" for row in rows)
    title = f"{working} of {len(rows)} model types work (transformers {support['versions']['transformers']})"
    return make_table(title, columns, rows, left=len(columns))


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
            ", ".join(schemes[name]) or "-",
            count_text(totals.parameters),
            size_text(totals.bytes_before),
            size_text(totals.bytes_after),
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
            count_text(totals.parameters),
            size_text(totals.bytes_before),
            size_text(totals.bytes_after),
            f"{totals.bits_per_weight:.2f}",
            f"{totals.quantized_bits_per_weight:.2f}" if totals.quantized_parameters else "-",
        )
    )
    columns = ("component", "schemes", "parameters", "before", "after", "bits per weight", "where quantized")
    return make_table("Plan", columns, rows, left=2, caption=(*plan.fallbacks, *plan.notes))


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
    columns = ("weight", "component", "becomes", "why", "shape", "bytes before", "bytes after")
    fewer = ("weight", "becomes", "bytes after", "bytes before", "shape", "component")
    return make_table("Every weight", columns, rows, left=4, fewer=fewer)
