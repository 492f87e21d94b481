"""Component maps, plans and strata as tables for a terminal, and as data for machines."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vlmquant.budget import Limits, Prediction
from vlmquant.calibration.build import SourceUse
from vlmquant.calibration.sampling import Stratum
from vlmquant.components import COMPONENTS, ComponentMap
from vlmquant.engines import Contract
from vlmquant.errors import LINE_CHARACTERS, shown
from vlmquant.planning import Plan, has_folds
from vlmquant.publish import Upload
from vlmquant.report.data import Verdict, overall
from vlmquant.report.numbers import change_text, margin_text, threshold_text, threshold_title
from vlmquant.serving import USABLE, Serving
from vlmquant.shards import dtype_name

CACHE_KINDS = {
    "full": "all tokens",
    "sliding": "the last tokens of a window",
    "latent": "a latent of all tokens",
    "images": "the images' tokens",
    "state": "a state of fixed size",
}
"""serving.LayerCache.kind, in words."""


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
    """A table whose first `left` columns are text and the others numbers. Its texts are shown as they are, not read as
    rich's markup."""
    table = Table(title=Text(shown(title, limit=LINE_CHARACTERS)), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell, limit=LINE_CHARACTERS)) for cell in row))
    return table


def _add_caption(table: Table, lines: Iterable[str]) -> None:
    table.caption = Text("\n".join(shown(line, limit=LINE_CHARACTERS) for line in lines))
    table.caption_justify = "left"


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
            f"{part['parameters']:,}",
            megabytes(part["bytes"]),
            str(part["blocks"] or "-"),
            str(part["linears"] or "-"),
            "; ".join(
                dict.fromkeys("+".join(one.rpartition(".")[2] for one in group) for group in part["fused_groups"])
            )
            or "-",
        )
        for name, part in summary["components"].items()
    ]
    rows.append(
        ("all", f"{sum(_count(p.shape) for p in components.parameters):,}", megabytes(summary["bytes"]), "", "", "")
    )
    title = f"{summary['model']}: {summary['model_type']}, {summary['dtype']}"
    if summary["tied"]:
        title += f"; tied: {', '.join(' = '.join(names) for names in summary['tied'])}"
    table = make_table(title, ("component", "parameters", "size", "blocks", "linears", "fused groups"), rows)
    _add_caption(table, _family_lines(components))
    return table


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
    if plan.fallbacks or plan.notes:
        _add_caption(table, (*plan.fallbacks, *plan.notes))
    return table


def engine_table(contract: Contract) -> Table:
    """What an engine does not take of a checkpoint and what to change; without any, what runs it."""
    told = f"{contract.target.engine} {contract.version}"
    if contract.findings:
        rows = [
            (
                "refused" if one.refused else "note",
                one.rule,
                one.places or "the checkpoint",
                one.what,
                one.change,
                one.source,
            )
            for one in contract.findings
        ]
        table = make_table(
            f"Engine contract: {told}", ("", "rule", "layers", "what", "what to change", "source"), rows, left=6
        )
    else:
        served = [(row.part, row.stored, row.kernel, str(row.layers)) for row in contract.served]
        table = make_table(f"Engine contract: {told}", ("part", "stored", "kernel", "layers"), served, left=3)
    if contract.unchecked:
        _add_caption(table, [f"not checked: {one}" for one in contract.unchecked])
    return table


def serving_table(serving: Serving) -> Table:
    """What serving takes on each GPU, and what would fit."""
    wish = serving.wish
    sequence = f"{wish.text_tokens:,} tokens of text"
    if wish.images:
        width, height = wish.image_size
        sequence += f" and {serving.image_tokens:,} of {wish.images} image{'s' * (wish.images > 1)} of {width}x{height}"
    kept = ", ".join(f"{count} layers: {CACHE_KINDS[kind]}" for kind, count in serving.layers.items())
    rows = [
        ("weights", megabytes(serving.weight_bytes)),
        (f"KV cache in {serving.cache_dtype}, batch {wish.batch:,}", megabytes(serving.cache_bytes)),
        ("together", megabytes(serving.weight_bytes + serving.cache_bytes)),
    ]
    lines = [f"A sequence has {sequence}.", f"The cache keeps: {kept or 'nothing'}.", *serving.notes]
    if wish.gpu_memory is not None:
        rows.append((f"{USABLE:.0%} of a GPU's {megabytes(wish.gpu_memory)}", megabytes(int(USABLE * wish.gpu_memory))))
        if serving.fits:
            lines.append(
                f"It fits: up to a batch of {serving.largest_batch:,} at this length, or up to "
                f"{serving.largest_text:,} tokens of text at this batch."
            )
        else:
            lines.append(f"It does NOT fit: {serving.what_fits()}.")
    table = make_table(f"Serving, on each of {wish.tp} GPUs" if wish.tp > 1 else "Serving", ("", "bytes"), rows)
    _add_caption(table, lines)
    return table


def work_table(ways: Sequence[Prediction], limits: Limits) -> Table:
    """What quantizing takes, for each way to run the calibration passes, and what its peak is made of."""
    fits = f"fits {' and '.join(megabytes(size) for size in (limits.host, limits.device) if size is not None)}"
    on_device = any(way.device_phases for way in ways)
    columns = ("passes", "most of the peak", "peak", *(("on the GPU",) if on_device else ()), "disk", "seconds", fits)
    rows = []
    for way in ways:
        phases, parts = (way.device_phases, way.device_parts) if on_device else (way.phases, way.parts)
        phase = max(phases, key=phases.__getitem__)
        largest = sorted(parts.get(phase, {}).items(), key=lambda item: -item[1])[:3]
        rows.append(
            (
                way.passes.label,
                f"{phase}: " + ", ".join(f"{name} {megabytes(size)}" for name, size in largest),
                megabytes(way.peak_bytes),
                *((megabytes(way.device_peak_bytes),) if on_device else ()),
                megabytes(way.disk_bytes),
                span(way.seconds),
                "yes" if way.fits(limits) else "no",
            )
        )
    return make_table("Quantizing", columns, rows, left=2)


def span(seconds: tuple[float, float] | None) -> str:
    """A range of time."""
    return "-" if seconds is None else f"{seconds[0]:,.0f} to {seconds[1]:,.0f}"


def upload_table(upload: Upload) -> Table:
    """The files that go to the hub, and their sizes."""
    rows = [*((name, megabytes(size)) for name, size in upload.files), ("all", megabytes(upload.total_bytes))]
    return make_table(f"{upload.checkpoint} to {upload.repository}", ("file", "size"), rows)


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


def sources_table(sets: Sequence[Sequence[SourceUse]]) -> Table:
    """How much of each source arrived in the sets that were made of it."""
    rows = []
    for uses in zip(*sets, strict=True):
        use = uses[0]
        unusable, passed_over = sum(use.unusable.values()), sum(use.passed_over.values())
        samples, images = sum(one.samples for one in uses), sum(one.images for one in uses)
        counts = (use.reading.records, unusable, passed_over, samples, use.reading.images, images)
        rows.append((use.name, *map(str, counts)))
    columns = ("source", "records", "unusable", "passed over", "samples taken", "its images", "images taken")
    return make_table("Sources", columns, rows)


def strata_table(strata: Sequence[Stratum]) -> Table:
    """What was drawn from each task of a set."""
    rows = [(shown(row.task), str(row.asked), str(row.got), str(row.with_image), str(row.text_only)) for row in strata]
    return make_table("Strata", ("task", "asked", "got", "with image", "text only"), rows)


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
    table = make_table(f"Gate: {overall(verdicts)}", columns, rows, left=4)
    told = [
        f"{shown(verdict.candidate)}, {threshold_title(verdict.threshold, verdict.stratum)}: {verdict.advice}"
        for verdict in verdicts
        if verdict.advice
    ]
    if told or thresholds:
        _add_caption(table, [*told, *([f"thresholds: {thresholds}"] if thresholds else [])])
    return table
