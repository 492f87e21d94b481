"""From a checkpoint of integer codes to another format of them: the same codes, scales and zero points.

Works block by block; what another format cannot hold is refused before anything is written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmquant
from vlmquant import signals
from vlmquant.checkpoint import CheckpointWriter, Inputs, check_output, read_manifest
from vlmquant.checkpoint.card import base_name, base_revision
from vlmquant.checkpoint.coded import Coded, open_coded, with_plain_zeros
from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.components import COMPONENTS, locate_model
from vlmquant.errors import PlanError, UsageError, shown
from vlmquant.formats import FORMATS, compressed_tensors
from vlmquant.formats.gptq import order_of
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import Plan, PlanLine, stored_bytes
from vlmquant.progress import bar
from vlmquant.recipe import WORD_FORMATS, Components, ComponentSpec, OutputSpec, Recipe, Scheme
from vlmquant.shards import dtype_name

SMALLEST_HALF = 2.0**-24
"""The smallest float16 above 0."""
CARRIED = ("alphas", "calibration", "errors", "experts", "methods", "settings")
"""What a manifest says of the codes, whatever format they are in."""


@dataclass(frozen=True)
class Exported:
    """What `export` did."""

    path: Path
    plan: Plan
    source_format: str
    format: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "from": self.source_format,
            "format": self.format,
            "weights": sum(line.action == "quantize" for line in self.plan.lines),
            "bytes_before": self.plan.bytes_before,
            "bytes_after": self.plan.bytes_after,
            "notes": list(self.notes),
        }


def export(
    model: str | Path,
    format: str,
    out: str | Path,
    *,
    force: bool = False,
    round_scales: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the checkpoint in `model`, of whatever integer format, in another one to the directory `out`.

    round_scales: where the format's scales are float16 and some have no equal there, take the nearest.
    Raises UsageError, PlanError or CheckpointError that says what the format cannot hold, before anything is written.
    """
    if format not in FORMATS:
        raise UsageError(f"--format: '{shown(format)}' is none of {', '.join(FORMATS)}")
    coded = with_plain_zeros(open_coded(locate_model(model), trust_remote_code=trust_remote_code))
    components = coded.components
    if floats := [name for name, scheme in coded.schemes.items() if scheme.type == "float"]:
        raise PlanError(
            f"{coded.path}: {floats[0]} is {coded.schemes[floats[0]].label}, floating point, and no integer format "
            "holds it; quantize the original model by a recipe with that output format"
        )
    if coded.cache_scales:
        raise PlanError(
            f"{coded.path}: has scales of a KV cache ({coded.cache_scales[0]}, ...), which export does not carry over; "
            "quantize the original model by a recipe with that output format and without kv_cache"
        )
    check_output(Path(out), components.model_dir, resume=False, force=force)
    manifest = _manifest_of(coded.path)
    plan = plan_of(coded, format, manifest)
    FORMATS[format].quantization_config(plan, components)
    scale_dtype, notes = _check(coded, format, round_scales=round_scales)
    inputs = Inputs(components)
    recipe = recipe_of(coded, format, manifest)
    carried = carried_by(coded, manifest)
    if scale_dtype != components.dtype and format == compressed_tensors.METHOD:
        carried["scale_dtype"] = dtype_name(scale_dtype)
    came = f"exported from {coded.coding.format}: codes, scales and zero points are those of {base_name(coded.path)}"
    all_notes = (*manifest.get("notes", ()), came, *notes)
    writer = CheckpointWriter(
        Path(out),
        components,
        recipe,
        plan,
        fingerprint={"export": format, "vlmquant": vlmquant.__version__},
        resume=False,
        force=force,
        inputs=inputs,
        resumable=False,
        scale_dtype=scale_dtype,
    )

    def weight(name: str) -> QuantizedWeight:
        return _in_format(coded.read(name)[0], format, scale_dtype)

    with writer, bar("export", total=len(coded.schemes)) as progress:
        for unit, names in units_of(coded):
            signals.check()
            writer.add(unit, _OneByOne(names, weight, progress.step), {}, {})
        writer.finish({**carried, "exported_from": _origin(coded, manifest), "notes": all_notes})
    return Exported(Path(out), plan, coded.coding.format, format, (came, *notes))


class _OneByOne(Mapping[str, QuantizedWeight]):
    """Weights that are made when they are asked for, so that only one of them is in memory unpacked."""

    def __init__(self, names: Sequence[str], make: Callable[[str], QuantizedWeight], step: Callable[[], None]) -> None:
        self.names, self.make, self.step = names, make, step

    def __getitem__(self, name: str) -> QuantizedWeight:
        self.step()
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def carried_by(coded: Coded, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of a checkpoint made of another says of the codes, and of the model behind both."""
    base = {"base_model": base_name(coded.path), "base_revision": base_revision(coded.path)}
    base |= {key: manifest[key] for key in base if key in manifest}
    return {key: manifest[key] for key in CARRIED if key in manifest} | base


def units_of(coded: Coded, *, also: Iterable[str] = ()) -> Iterator[tuple[str | None, list[str]]]:
    """The coded weights outside all blocks (None), then those of each block; among them others that are named."""
    blocks = {f"{info.name}.": info.name for info in coded.components.blocks}
    found: dict[str | None, list[str]] = {}
    for name in (*coded.schemes, *also):
        owner = next((block for prefix, block in blocks.items() if name.startswith(prefix)), None)
        found.setdefault(owner, []).append(name)
    for unit in (None, *blocks.values()):
        if unit in found:
            yield unit, found[unit]


def _in_format(weight: QuantizedWeight, format: str, scale_dtype: torch.dtype) -> QuantizedWeight:
    scales = weight.scales
    if format in WORD_FORMATS:
        scales = _halved(scales)
    return replace(weight, scales=scales, grid=replace(weight.grid, scale_dtype=scale_dtype))


def _halved(scales: Tensor) -> Tensor:
    """float32 scales -> the nearest float16 that are not 0, in float32."""
    return scales.half().float().abs().clamp_min(SMALLEST_HALF).copysign(scales)


def _check(coded: Coded, format: str, *, round_scales: bool) -> tuple[torch.dtype, list[str]]:
    """The dtype of the scales in the new file, and what is to be said of it. Reads scales and orders, and no codes."""
    model_dtype = coded.components.dtype
    target = torch.float16 if format in WORD_FORMATS else model_dtype
    inexact, total, worst, found = 0, 0, 0.0, set[torch.dtype]()
    for name, scheme in coded.schemes.items():
        signals.check()
        _refuse_permuted(coded, name, scheme, format)
        scales = coded.scales(name)
        found.add(scales.dtype)
        rounded = _halved(scales.float()) if target == torch.float16 else scales.to(target).float()
        wrong = rounded != scales.float()
        total += wrong.numel()
        if bool(wrong.any()):
            inexact += int(wrong.sum())
            worst = max(worst, float(((rounded - scales.float()) / scales.float())[wrong].abs().max()))
    if not inexact:
        return target, []
    told = (
        f"{inexact:,} of {total:,} scales ({', '.join(sorted(map(dtype_name, found)))}) have no equal in "
        f"{dtype_name(target)} and change by up to {worst:.2g} of their value"
    )
    if format not in WORD_FORMATS:
        if len(found) > 1:
            raise PlanError(f"{coded.path}: scales are of several dtypes, and {told}; it cannot be written exactly")
        kept = found.pop()
        return kept, [f"scales stay {dtype_name(kept)}: in the model's {dtype_name(target)} some would be rounded"]
    if not round_scales:
        raise PlanError(
            f"{coded.path}: {format} files hold scales in float16; {told}; --round-scales takes the nearest, and "
            "compressed-tensors holds them as they are"
        )
    if worst == float("inf") or worst != worst:
        raise PlanError(f"{coded.path}: scales are beyond float16, in which {format} files hold them")
    return target, [f"{told}, as --round-scales allowed"]


def _refuse_permuted(coded: Coded, name: str, scheme: Scheme, format: str) -> None:
    disk = coded.module(name)
    for leaf in ("g_idx", "weight_g_idx"):
        if f"{disk}.{leaf}" not in coded.components.shards.entries:
            continue
        groups = coded.tensor(f"{disk}.{leaf}")
        columns = coded.components.parameter(name).shape[1]
        unsaid = bool((groups == -1).all())  # by compressed-tensors
        if not unsaid and order_of(disk, groups, columns=columns, group_size=scheme.group_size or columns) is not None:
            raise PlanError(
                f"{coded.path}: {disk}: its groups are of inputs in an order of their own ({leaf}, desc_act), which "
                f"{format} files as engines read them today cannot say; `vlmquant.load` runs it as it is"
            )


def plan_of(coded: Coded, format: str, manifest: Mapping[str, Any]) -> Plan:
    """A line for every tensor: what is codes stays codes, the rest is copied."""
    methods = {line["name"]: line.get("method") for line in manifest.get("plan", {}).get("lines", ())}
    lines = []
    for one in coded.components.parameters:
        scheme = coded.schemes.get(one.name)
        kept = scheme is None
        lines.append(
            PlanLine(
                one.name,
                one.component,
                "keep" if kept else "quantize",
                scheme,
                None if kept else methods.get(one.name) or coded.coding.format,
                "kept as it is in the source" if kept else f"codes of the source ({coded.coding.format})",
                one.shape,
                one.nbytes,
                prod(one.shape) * one.dtype.itemsize
                if scheme is None
                else stored_bytes(one.shape, scheme, coded.components.dtype, format=format),
                one.dtype if kept else None,
            )
        )
    return Plan(tuple(lines))


def _manifest_of(path: Path) -> dict[str, Any]:
    """That of the source; empty for a checkpoint of another program. CheckpointError for one that was changed."""
    return read_manifest(path) if (path / MANIFEST_NAME).is_file() else {}


def recipe_of(coded: Coded, format: str, manifest: Mapping[str, Any]) -> Recipe:
    """The source's own recipe with another format; for others' checkpoints one that says each component's scheme."""
    if manifest:
        recipe = Recipe.model_validate(manifest["recipe"])
        return recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": format})})
    specs: dict[str, ComponentSpec] = {}
    for component in COMPONENTS:
        used = [
            scheme for name, scheme in coded.schemes.items() if coded.components.parameter(name).component == component
        ]
        if used and component in Components.model_fields:
            specs[component] = ComponentSpec(scheme=max(used, key=used.count))
    return Recipe(
        name=f"exported-{format}",
        components=Components(**specs),
        output=OutputSpec.model_validate({"format": format}),
    )


def _origin(coded: Coded, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": coded.coding.format, "name": base_name(coded.path), "fingerprint": manifest.get("fingerprint")}


__all__ = ["Exported", "export"]
