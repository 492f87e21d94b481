"""The finished directory: shards under the model's own tensor names, config, what travels along, card and manifest."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import vlmquant
from vlmquant import kvcache
from vlmquant.checkpoint.card import base_name, base_revision, card
from vlmquant.checkpoint.companions import CARD_NAME, Companions
from vlmquant.checkpoint.files import TensorSpec, copy_file, sha256_of, write_safetensors, write_text
from vlmquant.checkpoint.journal import Unit
from vlmquant.checkpoint.manifest import MANIFEST_NAME, MANIFEST_VERSION, digest_of_text, manifest_text, sealed
from vlmquant.components import CONFIG_NAME, DTYPE_KEYS, TEXT_CONFIGS, TIED, ComponentMap, read_config
from vlmquant.errors import CheckpointError
from vlmquant.formats import FORMATS, Format
from vlmquant.fp8 import without_quantization
from vlmquant.planning import Plan, PlanLine
from vlmquant.recipe import Recipe, Scheme
from vlmquant.shards import INDEX_NAME, SINGLE_NAME, Shards, dtype_name

INDEXED = "model-{:05d}-of-{:05d}.safetensors"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""The names of shards."""


def write_weights(
    target: Path,
    components: ComponentMap,
    recipe: Recipe,
    plan: Plan,
    units: Mapping[str, Unit],
    maxima: Mapping[str, kvcache.Maxima],
) -> dict[str, str]:
    """Shards and index: the model's tensors in the order of its files, each replaced by what a unit holds for it.

    Returns the sha256 of each shard, as it was written.

    maxima: what attention put into the KV cache, whose scales come last.
    """
    done = {name: unit for unit in units.values() for name in (*unit.quantized, *unit.changed)}
    copied = copied_tensors(components, plan, changed={name for unit in units.values() for name in unit.changed})
    reads: dict[str, Callable[[str], Tensor]] = {}  # final tensor name -> how to read it
    groups: list[list[TensorSpec]] = []
    for parameter in sorted(components.parameters, key=_place_in(components.shards)):
        unit = done.get(parameter.name)
        line = plan.line(parameter.name)
        if (line.action == "quantize") != (unit is not None and parameter.name in unit.quantized):
            held = "no block holds its codes" if line.action == "quantize" else "a block holds codes for it"
            raise CheckpointError(
                f"{target}: {parameter.name}: the plan says {line.action}, but {held}; report this bug"
            )
        if unit is not None:
            group = _specs_in(unit, line, parameter.disk, components, FORMATS[recipe.output.format])
            reads |= dict.fromkeys((spec.name for spec in group), Shards(unit.entries).read)
        elif parameter.name in copied:
            entries = [components.shards.entries[name] for name in copied[parameter.name] if name not in reads]
            group = [TensorSpec(entry.name, components.shards.dtype(entry.name), entry.shape) for entry in entries]
            reads |= dict.fromkeys((spec.name for spec in group), components.read_stored)
        else:
            group = [TensorSpec(parameter.disk, parameter.dtype, parameter.shape)]
            reads[parameter.disk] = partial(_read_parameter, components, parameter.name)
        groups.append(group)
    if plan.cache:
        scales = kvcache.make_scales(plan.cache, maxima)
        groups.append([TensorSpec(name, scale.dtype, tuple(scale.shape)) for name, scale in scales.items()])
        reads |= dict.fromkeys(scales, scales.__getitem__)

    def read(name: str) -> Tensor:
        return reads[name](name)

    shards = split(groups, max_bytes=recipe.output.max_shard_size)
    names = [INDEXED.format(number, len(shards)) for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    digests = {file: write_safetensors(target / file, specs, read) for file, specs in zip(names, shards, strict=True)}
    if len(shards) > 1:
        weight_map = {spec.name: file for file, specs in zip(names, shards, strict=True) for spec in specs}
        total = sum(spec.nbytes for specs in shards for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(target / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return digests


def _read_parameter(components: ComponentMap, name: str, _: str) -> Tensor:
    return components.read(name).contiguous()


def copied_tensors(components: ComponentMap, plan: Plan, *, changed: Collection[str]) -> dict[str, list[str]]:
    """Kept parameter -> the tensors on disk that are copied for it, bit for bit and under their names.

    A kept parameter that is made from a tensor together with one that is quantized or changed is not among them: it is
    stored by itself. So are the biases of quantized layers that are stored under names of their own, such as experts'.
    """
    quantized = {line.name.rpartition(".")[0] for line in plan.lines if line.action == "quantize"}
    spoilt: set[str] = set()
    for parameter in components.parameters:
        part = parameter.value.disk_name is None and parameter.name.rpartition(".")[0] in quantized
        kept = plan.line(parameter.name).action == "keep" and parameter.name not in changed
        if not kept or part or not parameter.copyable:
            spoilt |= parameter.sources
    return {
        parameter.name: sorted(parameter.sources)
        for parameter in components.parameters
        if plan.line(parameter.name).action == "keep" and not parameter.sources & spoilt
    }


def _place_in(shards: Shards) -> Any:
    """Sorting key of a parameter: where it lies in the model's files."""

    def place(parameter: Any) -> tuple[str, int]:
        return min((shards.entries[name].file.name, shards.entries[name].start) for name in parameter.sources)

    return place


def _specs_in(unit: Unit, line: PlanLine, disk: str, components: ComponentMap, format: Format) -> list[TensorSpec]:
    """What a unit holds for one parameter."""
    names = [disk]
    if isinstance(line.scheme, Scheme):
        rows, columns = line.shape
        module = disk.removesuffix(".weight")
        names = list(format.encoded_shapes(module, (rows, columns), line.scheme, components.dtype))
    return [TensorSpec(name, unit.entries[name].dtype, unit.entries[name].shape) for name in names]


def split(groups: Iterable[list[TensorSpec]], *, max_bytes: int) -> list[list[TensorSpec]]:
    """Shards of at most `max_bytes`, in the order given; groups stay together, and a larger one stands alone."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(spec.nbytes for spec in group)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1] += group
        size += nbytes
    return shards


def write_config(target: Path, components: ComponentMap, quantization_config: Mapping[str, Any]) -> None:
    """The model's own config, with how its weights are quantized, and with what is true of its head and embedding."""
    config = without_quantization(read_config(components.model_dir))
    if components.restated:
        config = _restated(config, dtype_name(components.dtype))
    if components.untied:
        _untie(config)
    config["quantization_config"] = dict(quantization_config)
    write_text(target / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _restated(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that gives this dtype wherever it gives one, and wherever a model's begins."""
    changed = {key: _restated(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    known = [key for key in DTYPE_KEYS if key in config]
    if known or "model_type" in config:
        changed |= dict.fromkeys(known or DTYPE_KEYS[:1], dtype)
    return changed


def _untie(config: dict[str, Any]) -> None:
    """Say at every level that head and embedding are two; classes look at different ones, and some tie by default."""
    config[TIED] = False
    for key, part in config.items():
        if isinstance(part, dict) and (TIED in part or key in TEXT_CONFIGS):
            _untie(part)


def write_rest(
    target: Path,
    components: ComponentMap,
    recipe: Recipe,
    plan: Plan,
    manifest: Mapping[str, Any],
    *,
    companions: Companions,
    changed: Collection[str],
    digests: Mapping[str, str],
) -> None:
    """What travels along, the card, and last the manifest, with the checksums of all that is there.

    digests: of files that need not be read again for theirs.
    """
    for name, file in companions.copied.items():
        (target / name).parent.mkdir(exist_ok=True)
        copy_file(file, target / name)
    text = card(components, recipe, plan, companions, manifest)
    write_text(target / CARD_NAME, text)
    files = {
        file.relative_to(target).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": digests.get(file.relative_to(target).as_posix()) or sha256_of(file),
        }
        for file in sorted(target.rglob("*"))
        if file.is_file()
    }
    content = {
        "format_version": MANIFEST_VERSION,
        "base_model": base_name(components.model_dir),
        "base_revision": base_revision(components.model_dir),
        "versions": {
            "vlmquant": vlmquant.__version__,
            **{name: version(name) for name in ("torch", "transformers", "compressed-tensors", "safetensors")},
        },
        "recipe": recipe.model_dump(mode="json"),
        "dtype": dtype_name(components.dtype),
        **manifest,
        "not_copied": sorted(components.ignored) + list(companions.left),
        "files": files,
        "card_sha256": digest_of_text(text),
        "disk_names": {parameter.name: parameter.disk for parameter in components.parameters},
        "copied": copied_tensors(components, plan, changed=changed),
        "plan": plan.to_json(),
    }
    write_text(target / MANIFEST_NAME, manifest_text(sealed(content)))
