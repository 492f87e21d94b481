"""What a checkpoint holds, as an engine sees it: its linears by their names on disk, and how each is stored."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vlmquant.components import CONFIG_NAME, TEXT_CONFIGS, ComponentMap, read_config
from vlmquant.engines.names import vllm_name
from vlmquant.engines.table import COLUMN, EMBEDDING, EXPERTS, FORMS, HEAD, LANGUAGE, ROW, VISION, Form
from vlmquant.errors import InputError, shown
from vlmquant.formats import FORMATS, compressed_tensors
from vlmquant.headers import EMBEDDINGS, HEADS
from vlmquant.planning import Plan
from vlmquant.reading import check
from vlmquant.recipe import Scheme
from vlmquant.shards import dtype_name, open_shards

VISION_CONFIGS = ("vision_config", "vision_tower_config")
FLOAT4, WORD_BITS = 4, 32
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
KV_LEAVES = ("k_scale", "v_scale")
EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")
"""The name of one expert's linear, and that of its layer of experts."""


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a linear are quantized."""

    bits: int
    type: str
    dynamic: bool


@dataclass(frozen=True)
class Stored:
    """How a weight is stored, in the words of quantization_config. group_size None: a scale per channel or tensor."""

    method: str
    bits: int
    type: str
    strategy: str
    group_size: int | None = None
    symmetric: bool = True
    inputs: Inputs | None = None
    format: str | None = None
    act_order: bool = False

    @property
    def form(self) -> str | None:
        """Its name in the table; None if it has none."""
        return next((form.name for form in FORMS if self._fits(form)), None)

    def _fits(self, form: Form) -> bool:
        mine = (self.inputs.type, self.inputs.bits) if self.inputs else None
        wanted = ((form.bits, self.bits), (form.strategies, self.strategy), (form.group_sizes, self.group_size))
        return (
            self.method in form.methods
            and form.type in (None, self.type)
            and all(allowed is None or value in allowed for allowed, value in wanted)
            and (form.inputs is True or form.inputs == mine)
        )

    @property
    def label(self) -> str:
        """For people, such as int4 g128 asym, int8 channel with int8 inputs or nvfp4a16."""
        if self.type == "float" and self.form is not None:
            return self.form
        kind = "" if self.method == "compressed-tensors" else f"{shown(self.method)} "
        size = f"g{self.group_size}" if self.group_size and self.strategy != "block" else shown(self.strategy)
        inputs = f" with {shown(self.inputs.type)}{self.inputs.bits} inputs" if self.inputs else ""
        return f"{kind}{shown(self.type)}{self.bits} {size}{'' if self.symmetric else ' asym'}{inputs}"


@dataclass(frozen=True)
class Layer:
    """A linear or embedding by its name on disk. stored None: 16 bits (or whatever it has)."""

    name: str
    part: str
    rows: int
    columns: int
    stored: Stored | None

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def split(self) -> str | None:
        """Which side of it tensor parallelism splits; None for neither (embedding and head are padded)."""
        if self.part in (EMBEDDING, HEAD):
            return None
        return "columns" if self.leaf in COLUMN else "rows" if self.leaf in ROW else None


@dataclass(frozen=True)
class Held:
    """A checkpoint, or what a plan would write."""

    where: str
    model_type: str
    dtype: str
    layers: tuple[Layer, ...]
    config: Mapping[str, Any]
    """quantization_config."""
    tied: bool
    heads: Mapping[str, tuple[int, int]]
    """Attention heads and key/value heads, of the language model and of the vision encoder."""
    read: Callable[[str], Tensor] | None = None
    """Reads a tensor, of which only scales of one number are asked for; None for a plan."""
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    unnamed: tuple[str, ...] = ()
    """Quantized modules that nothing in quantization_config tells how to read."""


class _Args(BaseModel):
    model_config = ConfigDict(strict=True)
    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool | str = False
    actorder: str | bool | None = None


class _Group(BaseModel):
    model_config = ConfigDict(strict=True)
    targets: list[str]
    weights: _Args | None = None
    input_activations: _Args | None = None
    format: str | None = None


class _CompressedTensors(BaseModel):
    model_config = ConfigDict(strict=True)
    config_groups: dict[str, _Group]
    format: str | None = None
    ignore: list[str] | None = None


class _Other(BaseModel):
    """What GPTQ, AWQ and FP8 files say."""

    model_config = ConfigDict(strict=True)
    bits: int = 4
    group_size: int | None = None
    sym: bool = True
    desc_act: bool = False
    zero_point: bool = True
    weight_block_size: list[int] | None = None
    quant_algo: str | None = None


Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def open_checkpoint(path: Path) -> Held:
    """Read config.json and headers of a checkpoint of anybody's. InputError where it is not quantized, or damaged."""
    content = read_config(path)
    where = str(path / CONFIG_NAME)
    shards = open_shards(path)
    shapes = {name: (entry.dtype, entry.shape) for name, entry in shards.entries.items()}
    return _held(content, shapes, shards.read, where)


def of_plan(components: ComponentMap, plan: Plan, format: str) -> Held:
    """What `quantize` would write by a plan in a format of FORMATS, from names and shapes alone."""
    form = FORMATS[format]
    content = read_config(components.model_dir) | {"quantization_config": form.quantization_config(plan, components)}
    if components.untied:
        content["tie_word_embeddings"] = False
    disk = {one.name: one.disk for one in components.parameters}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for line in plan.lines:
        if line.action == "quantize" and isinstance(line.scheme, Scheme):
            module, (rows, columns) = disk[line.name].removesuffix(".weight"), line.shape
            sizes[module] = (rows, columns)
            shapes |= form.encoded_shapes(module, (rows, columns), line.scheme, components.dtype)
        else:
            shapes[disk[line.name]] = (line.stored or components.dtype, line.shape)
    return _held(content, shapes, None, str(components.model_dir), sizes=sizes, dtype=dtype_name(components.dtype))


def _held(
    content: Mapping[str, Any],
    shapes: Shapes,
    read: Callable[[str], Tensor] | None,
    where: str,
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    dtype: str | None = None,
) -> Held:
    config = content.get("quantization_config")
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: has no quantization_config; give the directory of a quantized model")
    method = str(config.get("quant_method"))
    modules = _modules(shapes)
    quantized = {name: leaves for name, leaves in modules.items() if _is_quantized(leaves, shapes, name)}
    if method == compressed_tensors.METHOD:
        stored, unnamed = _by_groups(config, quantized, shapes, content, where)
    else:
        stored, unnamed = dict.fromkeys(quantized, _by_method(method, config, where)), ()
    layers = []
    for name, leaves in modules.items():
        how = stored.get(name)
        size = (sizes or {}).get(name) or _size(name, leaves, shapes, how, read)
        if size is not None:
            layers.append(Layer(name, _part(name), *size, how))
    return Held(
        where=where,
        model_type=str(content.get("model_type")),
        dtype=dtype or _dtype_of(content),
        layers=tuple(layers),
        config=config,
        tied=not any(name.rpartition(".")[2] in HEADS for name in modules),
        heads=_heads(content),
        read=read,
        tensors=shapes,
        unnamed=unnamed,
    )


def _modules(shapes: Shapes) -> dict[str, set[str]]:
    """The last parts of the names of tensors, by what is before them."""
    modules: dict[str, set[str]] = {}
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, set()).add(leaf)
    return modules


def _is_quantized(leaves: set[str], shapes: Shapes, name: str) -> bool:
    if leaves & {"weight_packed", "qweight", "weight_scale", "weight_scale_inv"}:
        return True
    return "weight" in leaves and shapes[f"{name}.weight"][0] in FP8


def _by_groups(
    config: Mapping[str, Any], quantized: Mapping[str, set[str]], shapes: Shapes, content: Mapping[str, Any], where: str
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """How each quantized module is stored, by compressed-tensors' groups; and the modules that no group is for.

    A group is for a module whose name it matches, as it is on disk or as transformers or vLLM have it, or else whose
    class; and only if it is stored in tensors of that kind.
    """
    read = check(
        _CompressedTensors,
        {key: config[key] for key in _CompressedTensors.model_fields if key in config},
        where=f"{where}: quantization_config",
    )
    groups = [(group, _stored_as(group, read.format)) for group in read.config_groups.values() if group.weights]
    spellings = {name: {name, *_spellings(name, str(content.get("model_type")))} for name in quantized}
    everything = sorted({one for names in spellings.values() for one in names})
    fitting = compressed_tensors.regex_matches((target for group, _ in groups for target in group.targets), everything)
    stored: dict[str, Stored] = {}
    unnamed = []
    for name, leaves in quantized.items():
        able = [(group, how) for group, how in groups if _could_be(how, leaves, shapes, name)]
        named = [
            how
            for group, how in able
            if any(
                target in spellings[name] or spellings[name] & fitting.get(target, set()) for target in group.targets
            )
        ]
        kind = "Embedding" if _part(name) == EMBEDDING else "Linear"
        classed = [how for group, how in able if kind in group.targets]
        if found := named or classed:
            stored[name] = found[0]
        else:
            unnamed.append(name)
            if able:
                stored[name] = able[0][1]
    return stored, tuple(unnamed)


def _stored_as(group: _Group, fallback: str | None) -> Stored:
    weights, inputs = group.weights, group.input_activations
    assert weights is not None
    return Stored(
        method=compressed_tensors.METHOD,
        bits=weights.num_bits,
        type=weights.type,
        strategy=weights.strategy or ("group" if (weights.group_size or -1) > 0 else "channel"),
        group_size=weights.group_size if (weights.group_size or -1) > 0 else None,
        symmetric=weights.symmetric,
        inputs=Inputs(inputs.num_bits, inputs.type, bool(inputs.dynamic)) if inputs else None,
        format=group.format or fallback,
        act_order=weights.actorder == "group",
    )


def _could_be(how: Stored, leaves: set[str], shapes: Shapes, name: str) -> bool:
    """Whether the tensors of a module can be those of a weight that is stored so."""
    if "weight_packed" in leaves:
        dtype, (*_, columns) = shapes[f"{name}.weight_packed"]
        if (dtype == torch.uint8) != (how.type == "float" and how.bits == FLOAT4) or "pack" not in (how.format or ""):
            return False
        scales = shapes.get(f"{name}.weight_scale")
        if how.type == "float" or not how.group_size or scales is None:
            return True
        least, most = _columns(columns - 1, how.bits) + 1, _columns(columns, how.bits)
        return -(-least // how.group_size) <= scales[1][-1] <= -(-most // how.group_size)
    if "weight" not in leaves or "pack" in (how.format or ""):
        return False
    return (shapes[f"{name}.weight"][0] in FP8) == (how.type == "float")


def _columns(words: int, bits: int) -> int:
    """The most codes that fit so many words."""
    return words * WORD_BITS // bits


def _by_method(method: str, config: Mapping[str, Any], where: str) -> Stored:
    known = {key: config[key] for key in _Other.model_fields if config.get(key) is not None}
    read = check(_Other, known, where=f"{where}: quantization_config")
    group = read.group_size if (read.group_size or -1) > 0 else None
    strategy = "group" if group else "channel"
    if method == "gptq":
        act_order = read.desc_act and group is not None
        return Stored(method, read.bits, "int", strategy, group, read.sym, act_order=act_order)
    if method == "awq":
        return Stored(method, read.bits, "int", strategy, group, not read.zero_point)
    if method == "fp8":
        blocks = read.weight_block_size
        return Stored(method, 8, "float", "block" if blocks else "tensor", None, inputs=Inputs(8, "float", True))
    if method == "modelopt" and "FP4" in (read.quant_algo or ""):
        return Stored(method, 4, "float", "tensor_group", 16, inputs=Inputs(4, "float", True))
    if method == "modelopt":
        return Stored(method, 8, "float", "tensor", None, inputs=Inputs(8, "float", False))
    return Stored(method, read.bits, "int", "channel")


def _size(
    name: str, leaves: set[str], shapes: Shapes, how: Stored | None, read: Callable[[str], Tensor] | None
) -> tuple[int, int] | None:
    """(outputs, inputs) of a module with a matrix; None for anything else."""
    bits = how.bits if how else 8
    if "weight_packed" in leaves:
        dtype, (rows, columns) = shapes[f"{name}.weight_packed"]
        if dtype == torch.uint8:
            return rows, 2 * columns
        if WORD_BITS % bits and read is not None and "weight_shape" in leaves:
            rows, columns = read(f"{name}.weight_shape").tolist()
            return int(rows), int(columns)
        return rows, _columns(columns, bits)
    if "qweight" in leaves:
        _, (first, second) = shapes[f"{name}.qweight"]
        if how is not None and how.method == "awq":
            return _columns(second, bits), first
        return second, _columns(first, bits)
    if "weight" not in leaves or len(shapes[f"{name}.weight"][1]) != 2:
        return None
    dtype, (rows, columns) = shapes[f"{name}.weight"]
    return rows, columns * (2 if how and how.bits == FLOAT4 and dtype == torch.uint8 else 1)


def _part(name: str) -> str:
    if re.search(compressed_tensors.VISION_WORDS, name):
        return VISION
    leaf = name.rpartition(".")[2]
    if EXPERT.fullmatch(name):
        return EXPERTS
    return EMBEDDING if leaf in EMBEDDINGS else HEAD if leaf in HEADS else LANGUAGE


def _spellings(name: str, model_type: str) -> Iterable[str]:
    """The names that transformers 5 and vLLM have for a module on disk, as far as prefixes tell."""
    yield f"model.{name}"
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("model.layers.", "model.language_model.layers."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("language_model.lm_head", "lm_head"),
    ):
        if name.startswith(old):
            yield name.replace(old, new, 1)
    if (theirs := vllm_name(name, model_type)) is not None:
        yield theirs


def _dtype_of(content: Mapping[str, Any]) -> str:
    inner = [content.get(key) for key in TEXT_CONFIGS]
    for one in (content, *(part for part in inner if isinstance(part, Mapping))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(one.get(key), str):
                return str(one[key])
    return "unknown"


def _heads(content: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    found = {}
    text = next((content[key] for key in TEXT_CONFIGS if isinstance(content.get(key), Mapping)), content)
    vision: Any = next((content[key] for key in VISION_CONFIGS if isinstance(content.get(key), Mapping)), {})
    for part, config in ((LANGUAGE, text), (VISION, vision)):
        heads = next((config[key] for key in ("num_attention_heads", "num_heads") if key in config), None)
        shared = config.get("num_key_value_heads", heads)
        if type(heads) is int and type(shared) is int and heads > 0 and shared > 0:
            found[part] = (heads, shared)
    return found
