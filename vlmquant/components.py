"""Which part of a model every tensor belongs to, found on the meta device and checked against the shards' headers.

Fails closed: a module without a place, a missing, unexpected or misshapen tensor is an error that names it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmquant.errors import InputError
from vlmquant.families import FAMILIES, FOLDS, Family, shared_inputs
from vlmquant.recipe import COMPONENTS
from vlmquant.shards import Shards, TensorEntry, open_shards

CONFIG_NAME = "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files of a hub repository that a model in safetensors format consists of."""
RECOMPUTED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
"""Tensors of old checkpoints that transformers computes anew and never loads."""
PROJECTOR_NAMES = ("projector", "connector", "merger")
"""Words in the names of modules between vision encoder and language model, for models without a row of their own."""


@dataclass(frozen=True)
class LinearInfo:
    """A linear layer that may be quantized; `name` is its module's, `local` its name inside its block (or `name`)."""

    name: str
    local: str
    block: str | None
    component: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class BlockInfo:
    """One repeated layer of the vision encoder or the language model; `index` counts inside its component."""

    name: str
    component: str
    index: int
    linears: tuple[LinearInfo, ...]


@dataclass(frozen=True)
class ParameterInfo:
    """A tensor of the checkpoint; `name` is the module's parameter, `disk` the tensor's name in the shards."""

    name: str
    component: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    disk: str
    nbytes: int


class ComponentMap:
    """A model without its weights: who owns what, and how to read it."""

    def __init__(
        self,
        *,
        model_dir: Path,
        config: Any,
        family: Family,
        dtype: torch.dtype,
        shards: Shards,
        parameters: tuple[ParameterInfo, ...],
        linears: tuple[LinearInfo, ...],
        blocks: tuple[BlockInfo, ...],
        tied: tuple[tuple[str, ...], ...],
        ignored: tuple[str, ...],
        trust_remote_code: bool,
    ) -> None:
        self.model_dir, self.config, self.family, self.dtype = model_dir, config, family, dtype
        self.shards, self.parameters, self.linears, self.blocks = shards, parameters, linears, blocks
        self.tied = tied
        """Groups of parameter names that are one tensor in the model; only the first of a group need be on disk."""
        self.ignored = ignored
        """Tensors on disk, by their names there, that transformers computes anew instead of loading."""
        self._trust_remote_code = trust_remote_code

    @cached_property
    def _by_name(self) -> dict[str, ParameterInfo]:
        return {parameter.name: parameter for parameter in self.parameters}

    def parameter(self, name: str) -> ParameterInfo:
        return self._by_name[name]

    @property
    def total_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def read(self, name: str) -> Tensor:
        """A parameter by its module name, as it lies on disk. InputError where it holds NaN or infinite values."""
        info = self._by_name[name]
        value = self.shards.read(info.disk)
        if bad := int(value.numel() - value.isfinite().sum()):
            nan = int(value.isnan().sum())
            raise InputError(
                f"{self.shards.entries[info.disk].file}: tensor {info.disk} holds {nan} NaN and {bad - nan} infinite "
                f"values of {value.numel()}; the model is damaged, so download or train it again"
            )
        return value

    def skeleton(self) -> nn.Module:
        """The whole model on the meta device, in eval mode and in `dtype`; its attention runs on any device."""
        return _build(self.config, self.dtype, trust_remote_code=self._trust_remote_code, untie=not self.tied)

    def materialize_buffers(self, model: nn.Module) -> None:
        """Give every non-persistent buffer still on meta its value, on CPU, as transformers does when it loads a model.

        Works on a fresh skeleton whose parameters stay on meta, so that nothing already loaded is initialized again.
        """
        fresh = self.skeleton()
        buffers = dict(_buffers(fresh))
        for name, (module, buffer) in buffers.items():
            module._buffers[name.rpartition(".")[2]] = _sentinel(buffer)
        fresh.initialize_weights()  # type: ignore[operator]  # of transformers' PreTrainedModel
        for name, (module, old) in _buffers(model):
            if not old.is_meta:
                continue
            leaf = name.rpartition(".")[2]
            value = buffers[name][0]._buffers[leaf]
            assert value is not None
            if _is_sentinel(value):
                raise InputError(f"{self.model_dir}: buffer {name} is not on disk and transformers does not compute it")
            module._buffers[leaf] = value

    def fused_groups(self, block: BlockInfo) -> list[tuple[LinearInfo, ...]]:
        """The block's linears, together where they share an input and a serving kernel (q,k,v / gate,up)."""
        groups: dict[tuple[str, ...], list[LinearInfo]] = {}
        for linear in block.linears:
            groups.setdefault(shared_inputs(linear.local), []).append(linear)
        return [tuple(sorted(group, key=lambda one: _rank(one.local))) for group in groups.values()]


def _rank(local: str) -> int:
    """Its place in the row of SHARED_INPUTS; 0 if it has none."""
    return next((index for index, leaf in enumerate(shared_inputs(local)[1:]) if f".{local}".endswith(f".{leaf}")), 0)


def _buffers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, Tensor]]]:
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                yield f"{prefix}.{leaf}".lstrip("."), (module, buffer)


def _sentinel(like: Tensor) -> Tensor:
    """A tensor on CPU filled with a value that no computed buffer has."""
    value = torch.empty_like(like, device="cpu")
    return value.fill_(torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).min)


def _is_sentinel(value: Tensor) -> bool:
    return bool((value.isnan() if value.is_floating_point() else value == torch.iinfo(value.dtype).min).any())


def locate_model(name_or_path: str | Path) -> Path:
    """The directory of a model: a path as it is, or a hub repository's local copy, downloaded if not cached."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}: is a file; give the directory of a model")
    if not HUB_ID.fullmatch(str(name_or_path)):
        raise InputError(f"{path}: no such directory; give a model's directory or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(HUB_PATTERNS)))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name_or_path}: no such directory, and as a hub id neither cached nor reachable (offline?); "
            "download it first or give a path"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name_or_path}: no such directory, and not to be had from the hub: {reason}") from error


def resolve_components(model_dir: Path, *, trust_remote_code: bool = False) -> ComponentMap:
    """Place every tensor of a model. Reads its config and the shards' headers, and no weights.

    Raises InputError for a model that is incomplete, damaged, already quantized or has a part without a place.
    """
    config = _load_config(model_dir, trust_remote_code=trust_remote_code)
    shards = open_shards(model_dir)
    dtype = _model_dtype(config, shards)
    model = _build(config, dtype, trust_remote_code=trust_remote_code, untie=False)
    family = _family_of(config, model, model_dir)
    found, ignored = _match_names(model, shards, model_dir)
    tied = _tied_groups(model, found, shards)
    if not tied:
        model = _build(config, dtype, trust_remote_code=trust_remote_code, untie=True)
    _check_shapes(model, found, tied, shards, model_dir)
    owners = _place(found, family, model_dir)
    blocks = tuple(_find_blocks(model, family, owners))
    parameters = tuple(
        ParameterInfo(name, owners[name], entry.shape, entry.dtype, entry.name, entry.nbytes)
        for name, entry in found.items()
    )
    in_blocks = {linear.name: linear for block in blocks for linear in block.linears}
    linears = tuple(
        in_blocks.get(name) or _linear_info(name, name, None, module, owners[f"{name}.weight"])
        for name, module in _quantizable(model)
        if f"{name}.weight" in owners
    )
    return ComponentMap(
        model_dir=model_dir,
        config=config,
        family=family,
        dtype=dtype,
        shards=shards,
        parameters=parameters,
        linears=linears,
        blocks=blocks,
        tied=tied,
        ignored=ignored,
        trust_remote_code=trust_remote_code,
    )


def _load_config(model_dir: Path, *, trust_remote_code: bool) -> Any:
    """The model's config, after refusing what must not be loaded: other people's code, and quantized weights."""
    from transformers import AutoConfig

    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such directory; give a model's directory")
    file = model_dir / CONFIG_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; a model's directory holds a {CONFIG_NAME}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise InputError(f"{file}: names no model_type; this is not the config of a transformers model")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if quantization := part.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise InputError(f"{file}: already quantized ({method}); start from the unquantized model")
    if "auto_map" in content and not trust_remote_code:
        raise InputError(
            f"{file}: auto_map asks to run code that comes with the model; read it, then pass --trust-remote-code"
        )
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except Exception as error:
        if f"`{content['model_type']}`" in str(error):
            raise InputError(f"{file}: model type {content['model_type']} is unknown to this transformers") from error
        raise InputError(f"{file}: transformers refuses this config: {_first_line(error)}") from error


def _build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool, untie: bool) -> nn.Module:
    """The model on the meta device, in eval mode. InputError where transformers has no such model."""
    from transformers import AutoModelForImageTextToText

    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForImageTextToText.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
                )
        except Exception as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue
            raise InputError(
                f"{config.name_or_path}: not an image-text model that transformers can build: {_first_line(error)}"
            ) from error
        break
    if untie:
        for names in _shared_parameters(model):
            for name in names[1:]:
                module, _, leaf = name.rpartition(".")
                value = model.get_parameter(name)
                setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty_like(value), requires_grad=False))
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _model_dtype(config: Any, shards: Shards) -> torch.dtype:
    """The config's dtype, or else the one that most weight bytes on disk have."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    sizes: Counter[torch.dtype] = Counter()
    for entry in shards.entries.values():
        sizes[entry.dtype] += entry.nbytes
    return sizes.most_common(1)[0][0]


def _family_of(config: Any, model: nn.Module, model_dir: Path) -> Family:
    """The model's row, or one read from its config, with the folds of its vision encoder and language model."""
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    row = FAMILIES.get(config.model_type) or _guess_family(config, model, model_dir)
    types = [part.model_type for part in (vision, text) if part is not None]
    return replace(row, folds=tuple(fold for kind in types for fold in FOLDS.get(kind, ())))


def _guess_family(config: Any, model: nn.Module, model_dir: Path) -> Family:
    """A row for a model that has none, from vision_config, text_config and the model's own embeddings."""
    from transformers import PreTrainedModel

    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    names = {id(module): name for name, module in model.named_modules()}
    submodels = [
        (name, module) for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)
    ]

    def root(part: Any) -> str | None:
        """The one outermost submodel that has this config."""
        hits = [name for name, module in submodels if part is not None and module.config is part]
        hits = [name for name in hits if not any(name.startswith(f"{other}.") for other in hits)]
        return hits[0] if len(hits) == 1 else None

    vision_root, text_root = root(vision), root(text)
    embedding = names.get(id(model.get_input_embeddings()))  # type: ignore[operator]  # of PreTrainedModel
    head = names.get(id(model.get_output_embeddings()))  # type: ignore[operator]
    if not (vision_root and text_root and embedding and head):
        raise InputError(
            f"{model_dir}: model type {config.model_type} has no row in the table of families, and its config does not "
            f"say where its parts are; unplaced: {', '.join(sorted(_children(model)))}"
        )
    placed = (vision_root, text_root, embedding, head)
    projector = tuple(
        name
        for name in _children(model)
        if not name.startswith(placed) and any(word in name.rpartition(".")[2] for word in PROJECTOR_NAMES)
    )
    return Family(vision_root, projector, text_root, embedding, head)


def _children(model: nn.Module) -> list[str]:
    """The modules that a model, or the base model inside it, is directly made of."""
    base = getattr(model, "base_model_prefix", "")
    outer = [name for name, _ in model.named_children() if name != base]
    inner = model.get_submodule(base) if base and hasattr(model, base) else nn.Module()
    return outer + [f"{base}.{name}" for name, _ in inner.named_children()]


def _match_names(model: nn.Module, shards: Shards, model_dir: Path) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Parameter name -> tensor on disk, in the model's order, by transformers' own renaming; and what is ignored."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    if buffers := sorted(set(state) - {name for name, _ in model.named_parameters(remove_duplicate=False)}):
        raise InputError(f"{model_dir}: buffers that are stored with the weights are not handled: {_some(buffers)}")
    found: dict[str, TensorEntry] = {}
    ignored, unexpected = [], []
    for disk, entry in shards.entries.items():
        name, converted = rename_source_key(disk, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise InputError(
                f"{model_dir}: tensor {disk} is merged with others when transformers loads it (experts?); "
                "such weights are not handled"
            )
        if name in found:
            raise InputError(f"{model_dir}: tensors {found[name].name} and {disk} both stand for parameter {name}")
        if name in state:
            found[name] = entry
        elif RECOMPUTED.search(name):
            ignored.append(disk)
        else:
            unexpected.append(disk)
    if unexpected:
        raise InputError(
            f"{model_dir}: {len(unexpected)} tensors have no place in a {type(model).__name__}: {_some(unexpected)}; "
            "does config.json belong to these weights?"
        )
    for entry in found.values():
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise InputError(f"{entry.file}: tensor {entry.name} is {entry.dtype}, so this model is already quantized")
    return {name: found[name] for name in state if name in found}, tuple(ignored)


def _shared_parameters(model: nn.Module) -> list[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _tied_groups(model: nn.Module, found: dict[str, TensorEntry], shards: Shards) -> tuple[tuple[str, ...], ...]:
    """Names that share one tensor. Where the disk has several values for them, transformers does not tie, nor do we."""
    groups = []
    for names in _shared_parameters(model):
        stored = [name for name in names if name in found]
        values = (shards.read(found[name].name) for name in stored)
        first = next(values) if len(stored) > 1 else None
        if first is None or all(torch.equal(first, value) for value in values):
            groups.append((*stored, *(name for name in names if name not in found)))
    return tuple(groups)


def _check_shapes(
    model: nn.Module,
    found: dict[str, TensorEntry],
    tied: tuple[tuple[str, ...], ...],
    shards: Shards,
    model_dir: Path,
) -> None:
    spared = {name for group in tied if group[0] in found for name in group[1:]}
    expected = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in expected if name not in found and name not in spared]:
        raise InputError(
            f"{model_dir}: {len(missing)} tensors are missing: {_some(missing)}; is the download complete?"
        )
    for name, entry in found.items():
        if entry.shape != tuple(expected[name].shape):
            raise InputError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, but config.json makes it "
                f"{list(expected[name].shape)}; does config.json belong to these weights?"
            )


def _place(found: dict[str, TensorEntry], family: Family, model_dir: Path) -> dict[str, str]:
    """Parameter name -> component. InputError names what no prefix covers, and a component without weights."""
    prefixes = sorted(family.prefixes().items(), key=lambda item: -len(item[0]))
    owners, unplaced = {}, []
    for name in found:
        owner = next((owner for prefix, owner in prefixes if f"{name}.".startswith(f"{prefix}.")), None)
        if owner is None:
            module = name.rpartition(".")[0]
            unplaced.append(module if "." in module else name)
        else:
            owners[name] = owner
    if unplaced:
        raise InputError(
            f"{model_dir}: parts that belong to no known component: {_some(list(dict.fromkeys(unplaced)))}"
        )
    if absent := [name for name in COMPONENTS if name != "lm_head" and name not in owners.values()]:
        raise InputError(
            f"{model_dir}: found no weights of {', '.join(absent)}; this is not a vision-language model we know"
        )
    return owners


def _quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers that run as such: the ones inside torch's own attention are read by it and never called."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(inside):
            yield name, module


def _linear_info(name: str, local: str, block: str | None, module: nn.Linear, component: str) -> LinearInfo:
    return LinearInfo(name, local, block, component, module.out_features, module.in_features, module.bias is not None)


def _find_blocks(model: nn.Module, family: Family, owners: dict[str, str]) -> Iterator[BlockInfo]:
    """The items of the outermost module lists, those of the vision encoder first, in order of definition."""
    linears = [(name, module) for name, module in _quantizable(model) if f"{name}.weight" in owners]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
    for component, root in (("vision_encoder", family.vision_encoder), ("language", family.language)):
        blocks: dict[str, list[tuple[str, nn.Linear]]] = {}
        for name, module in linears:
            home = next((outer for outer in lists if name.startswith(f"{outer}.")), None)
            if home is not None and name.startswith(f"{root}.") and owners[f"{name}.weight"] == component:
                item = name[len(home) + 1 :].partition(".")[0]
                blocks.setdefault(f"{home}.{item}", []).append((name, module))
        for index, (block, members) in enumerate(blocks.items()):
            yield BlockInfo(
                block,
                component,
                index,
                tuple(_linear_info(name, name[len(block) + 1 :], block, module, component) for name, module in members),
            )


def _some(names: list[str], *, shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
