"""The finished directory: shards under the model's own tensor names, config, what travels along, card and manifest."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import vlmquant
from vlmquant.checkpoint.files import TensorSpec, copy_file, sha256_of, write_safetensors, write_text
from vlmquant.checkpoint.journal import Unit
from vlmquant.checkpoint.reader import MANIFEST_NAME, MANIFEST_VERSION
from vlmquant.components import ComponentMap, auto_class
from vlmquant.errors import CheckpointError
from vlmquant.formats import compressed_tensors
from vlmquant.fp8 import without_quantization
from vlmquant.planning import Plan, PlanLine
from vlmquant.recipe import Recipe, Scheme
from vlmquant.shards import INDEX_NAME, SINGLE_NAME, Shards, dtype_name

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
BASE_CARD_NAME = "README.base.md"
COMPANION_MAX_BYTES = 64_000_000
"""Tokenizers of large vocabularies reach 40 MB; what is larger is no companion of a model."""
COMPANION_FOLDERS = ("additional_chat_templates",)
"""Subdirectories that transformers reads."""
NOT_COPIED = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|onnx|gguf|npz|py|tmp)|.*\.index\.json"
    rf"|{re.escape(CONFIG_NAME)}|{re.escape(MANIFEST_NAME)}|{re.escape(BASE_CARD_NAME)}"
)
"""Names of weights in whatever format, their indexes, code, hidden files, and what is written here."""
COMPANION_PICKLES = ("spk_dict.pt",)
"""The voices of Qwen's Omni models, which transformers asks for when it loads them."""
CODE = re.compile(r"[^.].*\.py")


def write_weights(
    target: Path, components: ComponentMap, recipe: Recipe, plan: Plan, units: Mapping[str, Unit]
) -> None:
    """Shards and index: the model's tensors in the order of its files, each replaced by what a unit holds for it."""
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
            group = _specs_in(unit, line, parameter.disk, components)
            reads |= dict.fromkeys((spec.name for spec in group), Shards(unit.entries).read)
        elif parameter.name in copied:
            entries = [components.shards.entries[name] for name in copied[parameter.name] if name not in reads]
            group = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries]
            reads |= dict.fromkeys((spec.name for spec in group), components.read_stored)
        else:
            group = [TensorSpec(parameter.disk, parameter.dtype, parameter.shape)]
            reads[parameter.disk] = partial(_read_parameter, components, parameter.name)
        groups.append(group)

    def read(name: str) -> Tensor:
        return reads[name](name)

    shards = split(groups, max_bytes=recipe.output.max_shard_size)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    for file, specs in zip(names, shards, strict=True):
        write_safetensors(target / file, specs, read)
    if len(shards) > 1:
        weight_map = {spec.name: file for file, specs in zip(names, shards, strict=True) for spec in specs}
        total = sum(spec.nbytes for specs in shards for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(target / INDEX_NAME, json.dumps(index, indent=2) + "\n")


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


def _specs_in(unit: Unit, line: PlanLine, disk: str, components: ComponentMap) -> list[TensorSpec]:
    """What a unit holds for one parameter."""
    names = [disk]
    if isinstance(line.scheme, Scheme):
        rows, columns = line.shape
        module = disk.removesuffix(".weight")
        names = list(compressed_tensors.encoded_shapes(module, (rows, columns), line.scheme, components.dtype))
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


def companions(components: ComponentMap) -> dict[str, Path]:
    """What travels with the weights, by name in the output: processor, tokenizer, templates, licence and so on.

    Code (*.py) only where the config names it.
    """
    source = components.model_dir
    code = "auto_map" in _read_config(source)
    found = {}
    for file in sorted(source.iterdir()):
        name = BASE_CARD_NAME if file.name == CARD_NAME else file.name
        wanted = not NOT_COPIED.fullmatch(file.name) or (code and CODE.fullmatch(file.name))
        wanted = wanted or file.name in COMPANION_PICKLES
        if wanted and file.is_file() and file.stat().st_size <= COMPANION_MAX_BYTES:
            found[name] = file
    for folder in COMPANION_FOLDERS:
        found |= {f"{folder}/{file.name}": file for file in sorted((source / folder).glob("[!.]*")) if file.is_file()}
    return found


def _read_config(model_dir: Path) -> dict[str, Any]:
    return dict(json.loads((model_dir / CONFIG_NAME).read_text(encoding="utf-8")))


def write_config(target: Path, components: ComponentMap, quantization_config: Mapping[str, Any]) -> None:
    """The model's own config, with how its weights are quantized."""
    config = without_quantization(_read_config(components.model_dir))
    config["quantization_config"] = dict(quantization_config)
    write_text(target / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_rest(
    target: Path,
    components: ComponentMap,
    recipe: Recipe,
    plan: Plan,
    manifest: Mapping[str, Any],
    *,
    changed: Collection[str],
) -> None:
    """What travels along, the card, and last the manifest, with the checksums of all that is there."""
    for name, file in companions(components).items():
        (target / name).parent.mkdir(exist_ok=True)
        copy_file(file, target / name)
    write_text(target / CARD_NAME, card(components, recipe, plan))
    files = {
        file.relative_to(target).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(target.rglob("*"))
        if file.is_file()
    }
    content = {
        "format_version": MANIFEST_VERSION,
        "base_model": base_name(components.model_dir),
        "versions": {
            "vlmquant": vlmquant.__version__,
            **{name: version(name) for name in ("torch", "transformers", "compressed-tensors", "safetensors")},
        },
        "recipe": recipe.model_dump(mode="json"),
        "dtype": dtype_name(components.dtype),
        **manifest,
        "not_copied": sorted(components.ignored) + _not_copied(components),
        "files": files,
        "disk_names": {parameter.name: parameter.disk for parameter in components.parameters},
        "copied": copied_tensors(components, plan, changed=changed),
        "plan": plan.to_json(),
    }
    write_text(target / MANIFEST_NAME, _readable_json(content))


def _not_copied(components: ComponentMap) -> list[str]:
    """Names in the model's directory that stay behind, its weights and hidden files apart."""
    taken = set(companions(components).values()) | {entry.file for entry in components.shards.entries.values()}
    names = [file.name for file in sorted(components.model_dir.iterdir()) if file not in taken]
    folders = set(COMPANION_FOLDERS)
    return [name for name in names if not name.startswith(".") and name not in {CONFIG_NAME, INDEX_NAME} | folders]


def _readable_json(content: Mapping[str, Any]) -> str:
    """JSON with one line for each item of a list, and each key of the two outermost levels."""

    def lines(value: Any, depth: int) -> str:
        indent = " " * depth
        if depth < 3 and isinstance(value, Mapping) and value:
            items = [f"{indent}{json.dumps(key)}: {lines(item, depth + 1)}" for key, item in value.items()]
            return "{\n" + ",\n".join(items) + f"\n{indent[1:]}}}"
        if depth < 4 and isinstance(value, list) and value:
            return "[\n" + ",\n".join(indent + lines(item, 4) for item in value) + f"\n{indent[1:]}]"
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    return lines(content, 1) + "\n"


def base_name(model_dir: Path) -> str:
    """The model's name: its hub id where the directory is one of the hub's cache, else the directory's name."""
    path = model_dir.resolve()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def card(components: ComponentMap, recipe: Recipe, plan: Plan) -> str:
    """The model card, in Markdown with the hub's front matter."""
    base, auto = base_name(components.model_dir), auto_class(components.config).__name__
    front = {"base_model": base, "library_name": "transformers", **_licence(components.model_dir)}
    front["tags"] = ["vlmquant", recipe.output.format]
    rows = [
        f"| {component} | {_schemes(plan, component)} | {totals.bytes_before / 1e6:,.1f} "
        f"| {totals.bytes_after / 1e6:,.1f} | {totals.bits_per_weight:.2f} |"
        for component, totals in plan.by_component().items()
    ]
    original = f"\nThe original model's card is in [{BASE_CARD_NAME}]({BASE_CARD_NAME}).\n"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {base}, quantized with the recipe {recipe.name}

| component | weights | MB before | MB after | bits per weight |
|---|---|---:|---:|---:|
{chr(10).join(rows)}
| all | | {plan.bytes_before / 1e6:,.1f} | {plan.bytes_after / 1e6:,.1f} | {plan.bits_per_weight:.2f} |

Load it with transformers:

```python
import vlmquant  # keeps the weights packed
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/directory")
```

The recipe, what became of every weight, each layer's error and the checksums of all files are in `{MANIFEST_NAME}`;
`vlmquant verify` checks them.
{original if (components.model_dir / CARD_NAME).is_file() else ""}"""


def _schemes(plan: Plan, component: str) -> str:
    """Such as "w4a16-g128 (gptq) ×96, fp16 ×3": how many weight matrices get which scheme, most first."""
    counts: dict[str, int] = {}
    for line in plan.lines:
        if line.component == component and (line.action == "quantize" or len(line.shape) > 1):
            label = f"{line.scheme_label} ({line.method})" if line.action == "quantize" else line.scheme_label
            counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{label} ×{count}" for label, count in sorted(counts.items(), key=lambda item: -item[1]))


def _licence(model_dir: Path) -> dict[str, Any]:
    """What the original card's front matter says of licence, languages and task."""
    try:
        text = (model_dir / CARD_NAME).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") and text.count("---") > 1 else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {key: front[key] for key in kept if key in front} if isinstance(front, dict) else {}
