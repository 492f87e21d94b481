"""The compressed-tensors format: how schemes are stored, and what config.json says of them.

Only what versions 0.17 to 0.20 of the library all read is written. Regexes say which modules a scheme is for; they hold
in three name spaces at once: transformers 5, vLLM and SGLang (which fuse q, k, v and gate, up).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from vlmquant.components import ComponentMap, outer_modules
from vlmquant.errors import CheckpointError, PlanError, first_line, shown
from vlmquant.fp8 import block_of
from vlmquant.grid import E4M3, E8M0, QuantizedWeight, grid_of
from vlmquant.limits import Confined, OverLimitError
from vlmquant.packing import pack_codes, packed_columns, pair_nibbles, split_nibbles, unpack_codes
from vlmquant.planning import Plan
from vlmquant.reading import check, told
from vlmquant.recipe import Scheme

METHOD = "compressed-tensors"
VERSION = "0.17.0"
"""The oldest version of the library that reads what we write."""
PACKED, INT8, FP8, NVFP4, MXFP4 = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
MIXED = "mixed-precision"
DENSE = "dense"
"""Of a checkpoint whose weights are all kept."""
CACHE_SCHEME: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
"""kv_cache_scheme, beside its strategy."""
CACHE_STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
"""A recipe's word for a strategy -> the library's."""
INPUT_LEAVES = {"nvfp4": "input_global_scale", "static-int8": "input_scale", "static-fp8": "input_scale"}
"""What the number is called that inputs are rounded by, where calibration finds one, by a scheme's `activations`."""
INT8_OFFSET = 128
"""Our codes are unsigned; int8 tensors hold code - 128."""


def storage_format(scheme: Scheme) -> str:
    if scheme.type == "float":
        return {"model": FP8, "e4m3": NVFP4, "e8m0": MXFP4}[scheme.scales]
    return INT8 if scheme.int8_inputs else PACKED


def encoded_shapes(
    disk_module: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that `encode` writes for a weight (out, in), by name on disk; dtype: the model's."""
    rows, columns = shape
    stored, grid = storage_format(scheme), grid_of(scheme, columns, dtype)
    groups = -(-columns // grid.group_size)
    scales = torch.uint8 if stored == MXFP4 else grid.scale_dtype
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_scale": (scales, (-(-rows // grid.group_rows), groups))
    }
    if stored in (INT8, FP8):
        tensors["weight"] = (torch.int8 if stored == INT8 else E4M3, shape)
    elif stored in (NVFP4, MXFP4):
        tensors["weight_packed"] = (torch.uint8, (rows, -(-columns // 2)))
    else:
        tensors["weight_packed"] = (torch.int32, (rows, packed_columns(columns, scheme.bits)))
        tensors["weight_shape"] = (torch.int64, (2,))
        if not scheme.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (packed_columns(rows, scheme.bits), groups))
    if stored == NVFP4:
        tensors["weight_global_scale"] = (torch.float32, (1,))
    if leaf := INPUT_LEAVES.get(scheme.activations):
        tensors[leaf] = (torch.float32 if stored == NVFP4 else grid.scale_dtype, (1,))
    return {f"{disk_module}.{leaf}": what for leaf, what in sorted(tensors.items())}


def encode(disk_module: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The weight as tensors by their names on disk. Zero points are packed along the rows, as the library has them."""
    stored, grid = storage_format(scheme), weight.grid
    scales = grid.store_scales(weight.scales[:: grid.group_rows])
    tensors = {"weight_scale": scales.view(torch.uint8) if stored == MXFP4 else scales}
    if stored == INT8:
        tensors["weight"] = (weight.codes ^ INT8_OFFSET).view(torch.int8)
    elif stored == FP8:
        tensors["weight"] = weight.codes.view(E4M3)
    elif stored in (NVFP4, MXFP4):
        tensors["weight_packed"] = pair_nibbles(weight.codes)
    else:
        tensors["weight_packed"] = pack_codes(weight.codes, grid.bits)
        tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        if weight.zeros is not None:
            tensors["weight_zero_point"] = pack_codes(weight.zeros.T, grid.bits).T.contiguous()
    if grid.global_scale is not None:
        tensors["weight_global_scale"] = torch.tensor([grid.global_scale], dtype=torch.float32)
    if leaf := INPUT_LEAVES.get(scheme.activations):
        dtype = torch.float32 if stored == NVFP4 else grid.scale_dtype
        tensors[leaf] = torch.tensor([weight.input_scale], dtype=dtype)
    return {f"{disk_module}.{leaf}": tensor.contiguous() for leaf, tensor in sorted(tensors.items())}


def bad_scales(stored: Tensor) -> int:
    """How many of a weight's scales are 0 or no finite numbers. Bytes are exponents of two (E8M0), 255 is NaN.

    Scales below 0 are sound: codes of integers reach further to one side, and some tools turn them round.
    """
    if stored.dtype == torch.uint8:
        return int((stored == 255).sum())
    values = stored.float()
    return int(values.numel() - (values.isfinite() & (values != 0)).sum())


def decode(disk_module: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `encode`; `read` gives a tensor by its name. CheckpointError names one that cannot be right."""

    def tensor(leaf: str) -> Tensor:
        return read(f"{disk_module}.{leaf}" if disk_module else leaf)

    def refuse(leaf: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{disk_module or 'weight'}: {leaf} {what}; the checkpoint is damaged, so quantize again"
        )

    def number(leaf: str) -> float:
        value = tensor(leaf).flatten()
        if len(value) != 1 or bad_scales(value) or value < 0:
            raise refuse(leaf, "is no positive number")
        return float(value)

    stored, scales = storage_format(scheme), tensor("weight_scale")
    if stored == INT8:
        codes = tensor("weight").view(torch.uint8) ^ INT8_OFFSET
    elif stored == FP8:
        if not (weight := tensor("weight")).float().isfinite().all():
            raise refuse("weight", "holds values that are no numbers")
        codes = weight.view(torch.uint8)
    elif stored in (NVFP4, MXFP4):
        codes = split_nibbles(tensor("weight_packed"))
    else:
        packed, (rows, columns) = tensor("weight_packed"), tensor("weight_shape").tolist()
        if packed.shape != (rows, packed_columns(columns, scheme.bits)):
            raise refuse(
                "weight_packed", f"has shape {list(packed.shape)}, which does not hold {rows} x {columns} codes"
            )
        codes = unpack_codes(packed, scheme.bits, columns)
    rows, columns = codes.shape
    grid = grid_of(scheme, columns, scales.dtype)
    if scales.shape != (-(-rows // grid.group_rows), -(-columns // grid.group_size)):
        raise refuse(
            "weight_scale", f"has shape {list(scales.shape)}, which does not fit a weight of {rows} x {columns}"
        )
    if stored == NVFP4:
        grid = replace(grid, global_scale=number("weight_global_scale"))
    if bad_scales(scales):
        raise refuse("weight_scale", "holds values that are 0 or no numbers")
    scales = grid.load_scales(scales.view(E8M0) if stored == MXFP4 else scales)
    zeros = None
    if not scheme.symmetric:
        packed = tensor("weight_zero_point")
        if packed.shape != (packed_columns(rows, scheme.bits), scales.shape[1]):
            raise refuse("weight_zero_point", f"has shape {list(packed.shape)}, which does not fit {rows} rows")
        zeros = unpack_codes(packed.T, scheme.bits, rows).T.contiguous()
    scales = scales.repeat_interleave(grid.group_rows, dim=0)[:rows]
    leaf = INPUT_LEAVES.get(scheme.activations)
    return QuantizedWeight(codes, scales, zeros, grid, number(leaf) if leaf else None)


# --- quantization_config ---

FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("qkv",): "qkv_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
}
"""Linears that serving engines run as one, and what they call it (SGLang's name for an already fused qkv included)."""
ENGINE_NAMES = {
    r"text_moe\.experts": "text_experts",
    r"vision_moe\.experts": "vision_experts",
    r"text_moe\.gate": "text_experts_gate",
    r"vision_moe\.gate": "vision_experts_gate",
}
"""Parts of names as they stand in a regex, and what vLLM calls the same part (of ERNIE 4.5 VL)."""
VISION_WORDS = "visual|vision"
"""One of them is in the name of every vision module, in all three name spaces, and in no name of the language model."""
ANY_EXPERT = "#"
"""Stands for the number of an expert."""
OWN_MODEL = r"language_model\."
"""The end of a name in transformers, behind which engines have a model of its own."""
EMBEDDING_CLASS = "Embedding"
"""Target for an int8 embedding beside its regex: vLLM builds that of Llama models without a name (vLLM PR 45535)."""


@dataclass(frozen=True)
class _Place:
    """A module's name, taken apart: what every name space agrees on."""

    name: str
    vision: bool
    container: str | None
    """The list of layers it is in, such as model.language_model.layers; None outside the blocks."""
    layer: int
    local: str
    """Its name inside its layer; outside the blocks, its name without what only transformers puts before it."""


def quantization_config(plan: Plan, components: ComponentMap) -> dict[str, Any]:
    """What goes into config.json. PlanError if no regexes say exactly which modules the plan quantizes."""
    modules = {name: kind for name, kind in components.modules.items() if not _further_expert(name, components)}
    schemes: dict[str, Scheme | None] = {name.rpartition(".")[0]: None for names in components.tied for name in names}
    travelling = {parameter.name for parameter in components.parameters if not parameter.loaded}
    for line in plan.lines:
        module = line.name.rpartition(".")[0]
        if line.name in travelling or _further_expert(module, components):
            continue
        if line.action == "quantize":
            if not isinstance(line.scheme, Scheme):
                raise PlanError(f"{line.name}: scheme {line.scheme_label} has no place in compressed-tensors")
            schemes[module] = line.scheme
        elif len(line.shape) > 1:
            schemes.setdefault(module, None)
    places = {name: _place(name, components) for name in schemes}
    members: dict[Scheme | None, list[_Place]] = {}
    for name, place in places.items():
        members.setdefault(schemes[name], []).append(place)
    groups: dict[str, dict[str, Any]] = {}
    formats = []
    for scheme, inside in members.items():
        if scheme is not None:
            targets = _patterns(inside, places.values(), [name for name in modules if schemes.get(name) != scheme])
            if any(issubclass(modules.get(place.name, nn.Module), nn.Embedding) for place in inside):
                targets.append(EMBEDDING_CLASS)
            groups[f"group_{len(groups)}"] = _group(scheme, targets)
            formats.append(storage_format(scheme))
    if not groups and not plan.cache:
        raise PlanError("the recipe quantizes nothing in this model; give a component a scheme other than fp16")
    quantized = [name for name in modules if schemes.get(name) is not None]
    ignore = _patterns(members.get(None, []), places.values(), quantized) + _travelling(components, modules)
    config = {
        "quant_method": METHOD,
        "format": (formats[0] if len(set(formats)) == 1 else MIXED) if formats else DENSE,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": CACHE_SCHEME | {"strategy": CACHE_STRATEGIES[plan.cache.strategy]} if plan.cache else None,
        "config_groups": groups,
        "ignore": ignore,
        "version": VERSION,
    }
    _verify(config, schemes, modules)
    return config


def _further_expert(name: str, components: ComponentMap) -> bool:
    """Whether a module belongs to an expert that is not the first of its layer: patterns do not tell experts apart."""
    parts = name.split(".")
    return any(
        parts[place].isdigit() and parts[place] != "0" and ".".join(parts[:place]) in components.experts
        for place in range(max(len(parts) - 2, 1), len(parts))
    )


INPUTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "dynamic-int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "static-int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
    "dynamic-fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    "dynamic-fp8-g128": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": True,
    },
    "static-fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    },
}
"""What a group says of its inputs, by a scheme's `activations`."""
SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
"""What it says scales are stored in, where they are not in the model's dtype."""


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": storage_format(scheme),
        "weights": _weights(scheme),
        "input_activations": INPUTS[scheme.activations],
        "output_activations": None,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    """What a group says of its weights."""
    said: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "dynamic": False,
    }
    if scheme.group_rows > 1:
        return said | {"strategy": "block", "block_structure": [scheme.group_rows, scheme.group_size]}
    if scheme.group_size is None:
        return said | {"strategy": "channel"}
    strategy = "tensor_group" if scheme.scales == "e4m3" else "group"
    stored = {"scale_dtype": SCALE_DTYPES[scheme.scales]} if scheme.scales != "model" else {}
    return said | {"strategy": strategy, "group_size": scheme.group_size} | stored


def _place(name: str, components: ComponentMap) -> _Place:
    vision = re.search(VISION_WORDS, name) is not None
    for block in components.blocks:
        if name.startswith(f"{block.name}."):
            container, _, layer = block.name.rpartition(".")
            local = name[len(block.name) + 1 :]
            home = name.rsplit(".", 2)[0]
            if home in components.experts:  # one pattern for all experts of a layer
                local = f"{home[len(block.name) + 1 :]}.{ANY_EXPERT}.{name.rpartition('.')[2]}"
            return _Place(name, vision, container, int(layer), local)
    if vision:
        return _Place(name, vision, None, 0, name)
    local = name.removeprefix("model.").removeprefix("language_model.").removeprefix("text_model.")
    if components.unknown:  # called as on disk, where language_model.model.embed_tokens is usual
        local = local.removeprefix("model.")
    return _Place(name, vision, None, 0, local)


def _travelling(components: ComponentMap, modules: Collection[str]) -> list[str]:
    """Patterns for what the model class does not load but engines may: parts with nothing in them that it loads."""
    used = {outer for one in components.parameters if one.loaded for outer in (*outer_modules(one.disk), one.disk)}
    roots = dict.fromkeys(
        next(outer for outer in (*outer_modules(one.disk), one.disk) if outer not in used)
        for one in components.parameters
        if not one.loaded
    )
    patterns = []
    for root in roots:
        parts, rest = root.split("."), r"(?:\..*)?$"
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1) if not parts[-count].isdigit()]
        choices = [rf"^(?:.*\.)?{re.escape(tail)}{rest}" for tail in tails]
        fitting = (one for one in choices if not any(re.match(one, module) for module in modules))
        patterns.append(f"re:{next(fitting, f'^{re.escape(root)}{rest}')}")
    return patterns


def _patterns(chosen: Iterable[_Place], everything: Iterable[_Place], others: Collection[str]) -> list[str]:
    """Anchored regexes for the chosen modules that fit none of the others, each with as little of a name as that takes.

    Each takes time linear in the name, up to the search for one word.
    """
    chosen, everything = list(chosen), list(everything)
    layers_of: dict[tuple[str, str, bool], set[int]] = {}
    outside: list[_Place] = []
    for place in chosen:
        if place.container:
            layers_of.setdefault((place.container, place.local, place.vision), set()).add(place.layer)
        else:
            outside.append(place)
    locals_of: dict[tuple[str, bool, tuple[int, ...]], list[str]] = {}
    for (container, local, vision), layers in layers_of.items():
        locals_of.setdefault((container, vision, tuple(sorted(layers))), []).append(local)
    numbers_of: dict[str, set[int]] = {}
    for place in everything:
        if place.container:
            numbers_of.setdefault(place.container, set()).add(place.layer)
    patterns = []
    for (container, vision, numbered), locals_ in locals_of.items():
        every = numbered == tuple(sorted(numbers_of[container]))
        numbers = r"\d+" if every else _either(str(layer) for layer in numbered)
        rest = f"\\.{numbers}\\.{_either_local(locals_)}$"
        patterns.append(_shortest(container, vision, rest, others))
    patterns += [
        _shortest(place.local, place.vision, "$", others, least=2 if place.vision else place.local.count(".") + 1)
        for place in outside
    ]
    return [f"re:{_with_engine_names(pattern)}" for pattern in dict.fromkeys(patterns)]


def _with_engine_names(pattern: str) -> str:
    for ours, theirs in ENGINE_NAMES.items():
        pattern = pattern.replace(ours, f"(?:{ours}|{theirs})")
    return pattern


def _start(vision: bool) -> str:
    """The start of a regex: with or without a word for vision in the name, then anything up to a dot."""
    return rf"^(?{'=' if vision else '!'}.*(?:{VISION_WORDS}))(?:.*\.)?"


def _shortest(name: str, vision: bool, rest: str, others: Collection[str], *, least: int = 1) -> str:
    """A regex with as much of the end of a name as keeps it from fitting others; name spaces differ in what is before.

    The whole name, where nothing less does.
    """
    parts = name.split(".")
    counts = [count for count in range(min(least, len(parts)), len(parts)) if not parts[-count].isdigit()]
    for count in [*counts, len(parts)]:
        tail = re.escape(".".join(parts[-count:]))
        if tail.startswith(OWN_MODEL):  # engines call it language_model.model.layers
            tail = tail.replace(OWN_MODEL, OWN_MODEL + r"(?:model\.)?", 1)
        pattern = f"{_start(vision)}{tail}{rest}"
        matcher = re.compile(pattern)
        if not any(matcher.match(other) for other in others):
            return pattern
    return f"^{re.escape(name)}{rest}"


def _either_local(locals_: list[str]) -> str:
    """Such as self_attn\\.(?:q_proj|k_proj); where all parts of a fused module are in, its name is as well."""
    leaves: dict[str, list[str]] = {}
    for local in locals_:
        parent, _, leaf = local.rpartition(".")
        leaves.setdefault(parent, []).append(leaf)
    choices = []
    for parent, names in leaves.items():
        names = names + [fused for parts, fused in FUSED.items() if set(parts) <= set(names)]
        inner = _either(re.escape(name) for name in names)
        place = re.escape(parent).replace(re.escape(ANY_EXPERT), r"\d+")
        choices.append(f"{place}\\.{inner}" if parent else inner)
    return _either(choices)


def _either(choices: Iterable[str]) -> str:
    choices = list(choices)
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


REGEX = "re:"
"""What a target begins with that is a regular expression, matched from the start of a name."""
REGEX_SECONDS, REGEX_SECONDS_EACH = 5.0, 1e-5
"""What matching may take, and for each pair of a name and a regex."""
REGEX_BYTES = 1 << 30


class _Targets:
    """A list of targets, by how closely they name a module."""

    def __init__(self, targets: Iterable[str], fitting: Mapping[str, Collection[str]]) -> None:
        self.texts = set(targets)
        self.fitting = set().union(*(fitting.get(target, ()) for target in self.texts))
        """The names that a regex among them fits."""

    def closeness(self, name: str, kind: str) -> int | None:
        """0 for its exact name, 1 for a regex, 2 for its class, None where nothing fits."""
        tests = (name in self.texts, name in self.fitting, kind in self.texts)
        return tests.index(True) if True in tests else None


def schemes_of(
    modules: Mapping[str, str], groups: Iterable[tuple[list[str], Scheme]], ignore: Iterable[str]
) -> dict[str, Scheme | None]:
    """The scheme of each module (name -> class): exact names before regexes before classes, as the library does.

    CheckpointError for a regex that is none, or that does not come to an end.
    """
    groups, ignore = list(groups), list(ignore)
    fitting = regex_matches([*ignore, *(target for targets, _ in groups for target in targets)], modules)
    left_out, parts = _Targets(ignore, fitting), [(_Targets(targets, fitting), scheme) for targets, scheme in groups]
    schemes: dict[str, Scheme | None] = {}
    for name, kind in modules.items():
        found = [(place, scheme) for part, scheme in parts if (place := part.closeness(name, kind)) is not None]
        ignored = left_out.closeness(name, kind) is not None
        schemes[name] = None if ignored or not found else min(found, key=lambda one: one[0])[1]
    return schemes


def scheme_for(
    name: str, kind: str, groups: Iterable[tuple[list[str], Scheme]], ignore: Iterable[str]
) -> Scheme | None:
    """The scheme of one module."""
    return schemes_of({name: kind}, groups, ignore)[name]


def regex_matches(targets: Iterable[str], names: Iterable[str]) -> dict[str, set[str]]:
    """The names that each regex among the targets fits.

    A checkpoint's regexes are a stranger's: they are tried in a child process, which may take only so long.
    """
    patterns = sorted({target for target in targets if target.startswith(REGEX)})
    names = list(names)
    if not patterns:
        return {}
    seconds = REGEX_SECONDS + REGEX_SECONDS_EACH * len(patterns) * len(names)
    confined = Confined(_match_all, seconds=seconds, more_bytes=REGEX_BYTES)
    try:
        found = confined(patterns, names)
    except OverLimitError as error:
        raise CheckpointError(
            f"quantization_config: matching its {len(patterns)} regular expressions ({shown(patterns[0])}, ...) with "
            f"{len(names)} names {error}; write them without nested repetition"
        ) from error
    finally:
        confined.close()
    return {pattern: {names[place] for place in places} for pattern, places in zip(patterns, found, strict=True)}


def _match_all(patterns: list[str], names: list[str]) -> list[list[int]]:
    found = []
    for pattern in patterns:
        try:
            matcher = re.compile(pattern.removeprefix(REGEX))
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"quantization_config: {shown(pattern)} is no regular expression ({first_line(error)})"
            ) from error
        found.append([place for place, name in enumerate(names) if matcher.match(name)])
    return found


def _verify(
    config: Mapping[str, Any], schemes: Mapping[str, Scheme | None], modules: Mapping[str, type[nn.Module]]
) -> None:
    """Match all names of the model as a loader will; PlanError names a module that would be taken for another."""
    groups, ignore = parse_config(config)
    for name, found in schemes_of({name: kind.__name__ for name, kind in modules.items()}, groups, ignore).items():
        wanted = schemes.get(name)
        if found != wanted:
            labels = [scheme.label if scheme else "kept" for scheme in (found, wanted)]
            raise PlanError(
                f"{name}: the regexes of compressed-tensors would make it {labels[0]} instead of {labels[1]}; its name "
                "is too much like another module's, so give both the same scheme in the recipe"
            )


class _Numbers(BaseModel):
    """How weights or inputs are quantized, as far as we read it."""

    model_config = ConfigDict(strict=True)
    num_bits: int | None = None
    type: str | None = "int"
    symmetric: bool | None = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: str | list[int] | None = None
    scale_dtype: str | None = None
    dynamic: bool | str | None = False
    actorder: str | bool | None = None


class _Group(BaseModel):
    model_config = ConfigDict(strict=True)
    targets: list[str]
    weights: _Numbers | None = None
    input_activations: _Numbers | None = None
    output_activations: Any = None
    format: str | None = None


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)
    config_groups: dict[str, _Group]
    ignore: list[str] | None = None
    format: str | None = None
    kv_cache_scheme: _Numbers | None = None


def parse_cache(config: Mapping[str, Any]) -> str | None:
    """The strategy of the KV cache's scales, tensor or head; None without a kv_cache_scheme.

    CheckpointError for a scheme that we do not have.
    """
    read: _Config = check(_Config, dict(config), where="quantization_config", error=CheckpointError)
    found = read.kv_cache_scheme
    if found is None:
        return None
    theirs = found.strategy or CACHE_STRATEGIES["tensor"]
    strategy = next((ours for ours, name in CACHE_STRATEGIES.items() if name == theirs), None)
    if strategy is None or found.model_dump(include=set(CACHE_SCHEME)) != CACHE_SCHEME:
        raise CheckpointError(
            "quantization_config: its kv_cache_scheme is not one of ours: FP8 with fixed scales, for tensors or heads"
        )
    return strategy


def _scheme_of(name: str, group: _Group) -> Scheme:
    """The scheme of a group of the config. CheckpointError for one that we do not have."""
    weights, inputs = group.weights, group.input_activations
    try:
        if not weights or group.output_activations or weights.dynamic:
            raise ValueError("it is not weights with fixed scales")
        if weights.actorder == "group":
            raise ValueError("groups are permuted")
        strategy = weights.strategy or ("group" if weights.group_size else "channel")
        if strategy not in ("group", "tensor_group", "channel", "block"):
            raise ValueError(f"strategy {shown(strategy)}")
        block = _block(weights.block_structure) if strategy == "block" else (1, weights.group_size)
        scales = {stored: name for name, stored in SCALE_DTYPES.items()}.get(weights.scale_dtype or "", "model")
        if (scales == "e4m3") != (strategy == "tensor_group"):
            raise ValueError(f"scales in {shown(weights.scale_dtype)} with strategy {strategy}")
        return Scheme(
            bits=weights.num_bits,
            type=weights.type,
            group_size=None if strategy == "channel" else block[1],
            group_rows=block[0],
            symmetric=weights.symmetric is not False,
            scales=scales,
            activations=_activations(inputs),
        )
    except ValueError as error:
        reason = told(error) if isinstance(error, ValidationError) else first_line(error)
        raise CheckpointError(
            f"quantization_config: config_groups.{shown(name)}: its scheme is not one of ours: {reason}"
        ) from error


def _block(structure: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if (pair := block_of(structure)) is None:
        raise ValueError(f"block_structure {shown(repr(structure))} is no pair of rows and columns")
    return pair


def _activations(inputs: _Numbers | None) -> str:
    """The name of what a group says of its inputs."""
    if inputs is None:
        return "none"
    for name, said in INPUTS.items():
        if said and all(getattr(inputs, key) == value for key, value in said.items()):
            return name
    raise ValueError("inputs are quantized in a way of their own")


def parse_config(config: Any) -> tuple[list[tuple[list[str], Scheme]], list[str]]:
    """The inverse of `quantization_config`: for each group its targets and scheme, and what is ignored.

    CheckpointError if the config is of another method, or has a group that is stored in a way we do not write.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method != METHOD:
        raise CheckpointError(f"quantization_config: quant_method is {shown(repr(method))}, not {METHOD!r}")
    read: _Config = check(_Config, dict(config), where="quantization_config", error=CheckpointError)
    if parse_cache(config) is None and not read.config_groups:
        raise CheckpointError("quantization_config: has no config_groups, so it is not one of ours")
    parsed = []
    for name, group in read.config_groups.items():
        scheme = _scheme_of(name, group)
        stored = group.format or read.format
        if stored != storage_format(scheme):
            raise CheckpointError(
                f"quantization_config: config_groups.{shown(name)} is stored as {shown(stored)}, not as "
                f"{storage_format(scheme)}"
            )
        parsed.append((group.targets, scheme))
    return parsed, read.ignore or []
