"""Which part of a model every tensor belongs to, found on the meta device and checked against the shards' headers.

Fails closed: a missing, unexpected or misshapen tensor is an error that names it, and so is a model whose vision
encoder, language model or embedding cannot be found. What is neither of these, projector nor head is component `other`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmquant.conversion import Lazy, Matched, Stored, cast, left_aside, match
from vlmquant.errors import InputError, UnknownClassError, first_line, shown
from vlmquant.experts import Form, holds_experts, match_apart, parts_of, take_apart
from vlmquant.families import FAMILIES, FOLDS, WAY_OUT, Family, Fold, shared_inputs
from vlmquant.fp8 import Logical, Source, find_source, forget_quantization, logical_tensors
from vlmquant.guess import guess_by_names, guess_family
from vlmquant.headers import forms_in, model_of, tie
from vlmquant.hub import refuse_misfits, why_no_weights
from vlmquant.limits import OverLimitError, limited
from vlmquant.reading import read_json
from vlmquant.recipe import COMPONENTS as RECIPE_COMPONENTS
from vlmquant.shards import Shards, dtype_name, open_shards, some

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
LAYERS = re.compile(r"(num_|n_|encoder_|decoder_|mtp_)*(hidden_)?(layers?|blocks)|depth|num_nextn_predict_layers")
"""Keys of a config that say how often a layer is repeated: a model has at least a tensor for each."""
WIDTHS = re.compile(r"(moe_)?(num|n)_(local_|routed_|shared_)?experts|num_labels")
"""Keys that say how many parts a layer has: they are tensors, or the rows of some."""
LEAST_WIDTH = 10_000
"""Up to it, such a number is taken as it is."""
CONFIG_SECONDS, CONFIG_BYTES = 60.0, 4 << 30
BUILD_SECONDS, BUILD_BYTES = 600.0, 8 << 30
"""What transformers may take for a config, and for a model without weights. The largest, mixtures with 60,000 linears,
take a minute and a gigabyte."""
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w][\w./-]*))?")
"""org/name, or org/name@revision: a branch, a tag or a commit."""
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")
"""Files of a hub repository that a model in safetensors format consists of, its card and licence among them."""
EXPERT_NAME = re.compile(r"\.\d+\.(gate|up|down)_proj\.(weight|bias)$")
"""The end of an expert's parameter name in the model."""
RECOMPUTED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
"""Tensors of old checkpoints that transformers computes anew and never loads."""
OTHER = "other"
"""The component of what a recipe says nothing about: always kept, shown and stored."""
COMPONENTS = (*RECIPE_COMPONENTS, OTHER)
"""In the order in which they are shown."""
NEEDED = ("vision_encoder", "language", "embedding")
"""Without one of these a model is none for us."""
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which configs hold that of their language model."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Under which a config gives its model's dtype, today and before transformers 4.56."""
TIED = "tie_word_embeddings"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM", "AutoModel")
"""Names in a config's auto_map, most fitting first."""


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
    """A parameter or stored buffer of the model, or a tensor that only travels with it."""

    name: str
    """The module's parameter; for a tensor that the model class does not load, its name on disk."""
    component: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    disk: str
    """Its name in a checkpoint that stores it by itself: the one it has, or one made for a part of a tensor."""
    nbytes: int
    """On disk, with its share of the scales."""
    value: Lazy = field(compare=False)
    """How it is made from the tensors on disk."""
    buffer: bool = False
    """Stored with the weights but none of them: a router's bias correction, bounds, positions."""
    loaded: bool = True
    """Whether the model class has a place for it; what has none is copied (the layers of multi-token prediction)."""
    exact: bool = False
    """Whether transformers loads it in float32 whatever the model's dtype."""
    copyable: bool = True
    """Whether its tensors on disk can be copied as they are: FP8 values with scales of their own cannot."""

    @property
    def sources(self) -> set[str]:
        """The tensors on disk that it is made from."""
        return self.value.made.names()


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
        experts: dict[str, Form],
        modules: dict[str, type[nn.Module]],
        unread_experts: frozenset[str],
        part_types: dict[str, str],
        trust_remote_code: bool,
        untied: bool = False,
        source: Source | None = None,
        unknown: str | None = None,
    ) -> None:
        self.model_dir, self.config, self.family, self.dtype = model_dir, config, family, dtype
        self.shards, self.parameters, self.linears, self.blocks = shards, parameters, linears, blocks
        self.tied = tied
        """Groups of parameter names that are one tensor in the model; only the first of a group need be on disk."""
        self.untied = untied
        """Whether the config says that head and embedding are one tensor, and the disk holds two values."""
        self.ignored = ignored
        """Tensors on disk, by their names there, that transformers computes anew instead of loading."""
        self.experts = experts
        """Modules of routed experts, by name, that are taken apart into one linear per expert and projection."""
        self.modules = modules
        """The class of every module of the skeleton, by name."""
        self.unread_experts = unread_experts
        """Modules that stack experts' weights in a way that is not known."""
        self.part_types = part_types
        """The model_type of each vision encoder and of the language model, by the module's name."""
        self.source = source
        """How weights are stored that are FP8 on disk and dequantized when they are read; None where there are none."""
        self.unknown = unknown
        """Why the model has no class here, so that all that is known of it are names and shapes; None where it has."""
        self.restated = False
        """Whether some of it is stored in another dtype than it lies in, so that the config has to say which."""
        self._trust_remote_code = trust_remote_code

    @cached_property
    def language_weights(self) -> int:
        """The numbers in the linears of the language model, experts' included."""
        return sum(prod(one.shape) for one in self.parameters if one.component == "language" and len(one.shape) > 1)

    @cached_property
    def _by_name(self) -> dict[str, ParameterInfo]:
        return {parameter.name: parameter for parameter in self.parameters}

    def parameter(self, name: str) -> ParameterInfo:
        return self._by_name[name]

    @property
    def parts_told(self) -> str:
        """Where the components are, such as "vision_encoder: model.visual; projector: model.visual.merger"."""
        prefixes = self.family.prefixes()
        parts = {name: [prefix for prefix, owner in prefixes.items() if owner == name] for name in COMPONENTS}
        return "; ".join(f"{name}: {', '.join(places)}" for name, places in parts.items() if places)

    def folds_in(self, block: BlockInfo) -> tuple[Fold, ...]:
        """Of the tower or language model that a block is in: the same names may mean something else in another one."""
        around = [part for part in self.part_types if block.name.startswith(f"{part}.")]
        return FOLDS.get(self.part_types[max(around, key=len)], ()) if around else ()

    def form_of(self, linear: str) -> Form | None:
        """How the experts of its layer lie, for the linear of a routed expert."""
        return self.experts.get(linear.rsplit(".", 2)[0])

    @cached_property
    def routed_beside(self) -> dict[str, int]:
        """Module around a module of experts -> their number."""
        return {module.rpartition(".")[0]: form.experts for module, form in self.experts.items()}

    @cached_property
    def _buffers_on_disk(self) -> set[str]:
        return {name for parameter in self.parameters if parameter.buffer for name in parameter.sources}

    def holds(self, name: str) -> bool:
        """Whether there is such a parameter or stored buffer on disk."""
        return name in self._by_name

    @property
    def total_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def read(self, name: str) -> Tensor:
        """A parameter by its module name, as it lies on disk. InputError where it holds NaN or infinite values."""
        info = self._by_name[name]
        value = info.value.read(self.shards.read)
        return value if info.buffer else self._checked(value, min(info.sources))

    def _checked(self, value: Tensor, disk: str) -> Tensor:
        if not all(bool(end.isfinite()) for end in value.aminmax()):
            bad = int(value.numel() - value.isfinite().sum())
            entry = self.shards.entries[disk]
            if value.dtype.itemsize < entry.dtype.itemsize and Shards({disk: entry}).read(disk).isfinite().all():
                raise InputError(
                    f"{entry.file}: tensor {disk} holds {bad} values beyond {dtype_name(value.dtype)}, in which it "
                    "would be stored; write output: {kept: fp32} in the recipe to store it as it is"
                )
            nan = int(value.isnan().sum())
            raise InputError(
                f"{entry.file}: tensor {disk} holds {nan} NaN and {bad - nan} infinite "
                f"values of {value.numel()}; the model is damaged, so download or train it again"
            )
        return value

    def read_stored(self, disk: str) -> Tensor:
        """A tensor by its name on disk, as it lies there. InputError where it holds NaN or infinite values."""
        value = self.shards.read(disk)
        return value if disk in self._buffers_on_disk else self._checked(value, disk)

    def rounded(self, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> "ComponentMap":
        """The same model of another dtype, with some parameters read, and stored, in others than they lie in.

        A tensor on disk is copied as a whole, rounded, where all that is made from it is; else its parts are stored.
        """
        changed = {one.name for one in self.parameters if dtypes.get(one.name, one.dtype) != one.dtype}
        if not changed and dtype == self.dtype:
            return self
        spoilt: set[str] = set()
        for one in self.parameters:
            if one.name not in changed or not one.copyable:
                spoilt |= one.sources
        whole = {
            disk: dtypes[one.name] for one in self.parameters if one.name in changed for disk in one.sources - spoilt
        }
        parameters = []
        for one in self.parameters:
            if one.name in changed:
                to = dtypes[one.name]
                apart = not one.sources.isdisjoint(spoilt)
                value = cast(one.value, to) if apart else Lazy.of(one.value.made, one.shape, to)
                one = replace(one, dtype=to, value=value, copyable=not apart)
            parameters.append(one)
        made = copy(self)
        for name in ("_by_name", "_buffers_on_disk"):  # what was cached
            vars(made).pop(name, None)
        made.parameters, made.dtype, made.restated = tuple(parameters), dtype, True
        made.shards = Shards(self.shards.entries, whole)
        return made

    def skeleton(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The whole model on the meta device, experts taken apart, in eval mode, in `dtype` or its own.

        UnknownClassError where it has no class here.
        """
        if self.unknown:
            raise UnknownClassError(f"{self.model_dir}: {self.unknown}, so it cannot be built")
        model = build(self.config, dtype or self.dtype, trust_remote_code=self._trust_remote_code, untie=not self.tied)
        take_apart(model, check=False, only=set(self.experts))
        return model

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
            if not old.is_meta or self.holds(name):
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
    """A tensor on CPU filled with a value that no computed buffer has; of a bool there is none."""
    value = torch.empty_like(like, device="cpu")
    if value.dtype == torch.bool:
        return value.fill_(False)
    exact = not (value.is_floating_point() or value.is_complex())
    return value.fill_(torch.iinfo(value.dtype).min if exact else torch.nan)


def _is_sentinel(value: Tensor) -> bool:
    if value.dtype == torch.bool:
        return False
    exact = not (value.is_floating_point() or value.is_complex())
    return bool((value == torch.iinfo(value.dtype).min if exact else value.isnan()).any())


def locate_model(name_or_path: str | Path) -> Path:
    """The directory of a model: a path as it is, or a hub repository's local copy, downloaded if not cached.

    org/name@revision is the repository at that branch, tag or commit.
    """
    try:
        path = Path(name_or_path).expanduser()
        there, folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:  # no such user; a name that is too long, or not ours to look at
        raise InputError(
            f"{shown(name_or_path)}: cannot be opened ({shown(first_line(error))}); give another path"
        ) from error
    if folder:
        refuse_misfits(path)
        return path
    if there:
        raise InputError(f"{path}: is a file; give the directory of a model")
    if (hub := HUB_ID.fullmatch(str(name_or_path))) is None:
        raise InputError(
            f"{shown(path)}: no such directory; give a model's directory or a hub id such as org/name or "
            "org/name@revision"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub[1], revision=hub[2], allow_patterns=list(HUB_PATTERNS)))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name_or_path}: no such directory, and as a hub id neither cached nor reachable (offline?); "
            "download it first or give a path"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{name_or_path}: no such directory, and not to be had from the hub: {first_line(error)}"
        ) from error


def resolve_components(
    model_dir: Path,
    *,
    trust_remote_code: bool = False,
    family: Family | None = None,
    logical: Callable[[Shards, torch.dtype], Logical] | None = None,
) -> ComponentMap:
    """Place every tensor of a model. Reads its config and the shards' headers, and no weights.

    family: where the parts are, for a model that is neither in the table nor guessed right.
    logical: for a model that is quantized in a way of which nothing is known here, its tensors as if it were not.
    Raises InputError for a model that is incomplete, damaged, already quantized (in another format than FP8, which is
    read) or has no part that can be quantized.
    """
    content = read_config(model_dir)
    source = None if logical else find_source(content, model_dir / CONFIG_NAME)
    if "auto_map" in content and not trust_remote_code:
        raise UnknownClassError(
            f"{model_dir / CONFIG_NAME}: auto_map asks to run code that comes with the model; read it, then pass "
            "--trust-remote-code"
        )
    shards = open_shards(model_dir)
    config = forget_quantization(make_config(model_dir, content, shards, trust_remote_code=trust_remote_code))
    dtype = model_dtype(config, shards)
    model = build(config, dtype, trust_remote_code=trust_remote_code, untie=False)
    tensors = logical(shards, dtype) if logical else _tensors_of(shards, source, dtype)
    matched, ignored, travelling = _match_names(model, tensors.tensors, model_dir, match_apart if logical else match)
    linears = {name for name, _ in _quantizable(model)}
    family = _family_of(config, model, model_dir, family)
    experts = take_apart(model)
    found = parts_of(matched.values, experts)
    found = {name: found[name] for name in model.state_dict() if name in found}
    exact = _kept_exact(model)

    def untied_model() -> nn.Module:
        fresh = build(config, dtype, trust_remote_code=trust_remote_code, untie=True)
        take_apart(fresh, check=False, only=set(experts))
        return fresh

    return _map(
        model,
        found,
        model_dir=model_dir,
        config=config,
        family=family,
        dtype=dtype,
        shards=shards,
        tensors=tensors,
        experts=experts,
        disk={
            name: _name_on_disk(name, value, experts, matched if name.removesuffix(".weight") in linears else None)
            for name, value in found.items()
        },
        exact={name for name in found if exact.search(name)},
        travelling=travelling,
        ignored=ignored,
        part_types={
            name: part_type(model.get_submodule(name), config) for name in (*family.vision_encoder, family.language)
        },
        trust_remote_code=trust_remote_code,
        source=source,
        untie=untied_model,
    )


@dataclass(frozen=True)
class UnknownConfig:
    """What is read of a config.json that transformers has no class for."""

    model_type: str
    dtype: torch.dtype | None
    auto_map: Any
    name_or_path: str


def resolve_from_headers(model_dir: Path, *, unknown: str, family: Family | None = None) -> ComponentMap:
    """Place every tensor of a model by its name and shape alone: parameters are called as on disk.

    unknown: why its class is not asked. Its blocks cannot be run, so that it can be quantized without data only. Stacks
    of experts are not taken apart, as names do not tell which way round they lie. What is stored in more bits than the
    model's dtype stays so: its class may want it.

    Raises InputError as `resolve_components` does, and where no language model or vision encoder is told by names.
    """
    content = read_config(model_dir)
    source = find_source(content, model_dir / CONFIG_NAME)
    shards = open_shards(model_dir)
    config = UnknownConfig(content["model_type"], _named_dtype(content), content.get("auto_map"), str(model_dir))
    dtype = model_dtype(config, shards)
    tensors = _tensors_of(shards, source, dtype)
    try:
        model = model_of(tensors.tensors)
    except InputError as error:
        raise InputError(f"{model_dir}: {error}") from error
    text = next((content[key] for key in TEXT_CONFIGS if isinstance(content.get(key), dict)), content)
    layers = text.get("num_hidden_layers")
    family = family or guess_by_names(model, model_dir, layers=layers if type(layers) is int else None)
    _check_row(family, model, config, model_dir)
    embedding, head = next(name for name, owner in family.prefixes().items() if owner == "embedding"), family.lm_head
    table, other = (tensors.tensors.get(f"{name}.weight") for name in (embedding, head))
    ties = other is None or (content.get(TIED) or text.get(TIED))
    if table is not None and head and ties and (other is None or other.shape == table.shape):
        tie(model, embedding, head)
    found = {name: tensors.tensors[name] for name in model.state_dict() if name in tensors.tensors}
    return _map(
        model,
        found,
        model_dir=model_dir,
        config=config,
        family=family,
        dtype=dtype,
        shards=shards,
        tensors=tensors,
        experts=forms_in(model),
        disk={name: name for name in found},
        exact={name for name, value in found.items() if value.dtype != dtype},
        travelling={},
        ignored=(),
        part_types={},
        trust_remote_code=False,
        source=source,
        untie=lambda: _untie(model),
        unknown=unknown,
    )


def _named_dtype(content: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config names."""
    found = [getattr(torch, content[key], None) for key in DTYPE_KEYS if isinstance(content.get(key), str)]
    return next((one for one in found if isinstance(one, torch.dtype) and one.is_floating_point), None)


def _tensors_of(shards: Shards, source: Source | None, dtype: torch.dtype) -> Logical:
    """The tensors as if none were in FP8."""
    if source:
        return logical_tensors(shards, source, dtype)
    stored = {name: Lazy.of(Stored(name), entry.shape, entry.dtype) for name, entry in shards.entries.items()}
    return Logical(stored, {}, ())


def _map(
    model: nn.Module,
    found: dict[str, Lazy],
    *,
    model_dir: Path,
    config: Any,
    family: Family,
    dtype: torch.dtype,
    shards: Shards,
    tensors: Logical,
    experts: dict[str, Form],
    disk: Mapping[str, str],
    exact: Collection[str],
    travelling: Mapping[str, Lazy],
    ignored: tuple[str, ...],
    part_types: dict[str, str],
    trust_remote_code: bool,
    source: Source | None,
    untie: Callable[[], nn.Module],
    unknown: str | None = None,
) -> ComponentMap:
    """The map of a model on meta (experts taken apart, tied as its config says) and its values by parameter name.

    untie: makes it as if its config said that nothing is tied. disk: what each is called where it is stored by itself.
    exact: those that stay in the dtype they have.
    """
    tied = _tied_groups(model, found, shards)
    untied = not tied and bool(_shared_parameters(model))
    if not tied:
        model = untie()
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _check_shapes(model, found, tied, shards, model_dir)
    _check_dtypes(model, found, shards)
    owners = _place(found, family, tied, config, model_dir)
    blocks = tuple(_find_blocks(model, family, owners))
    parameters = tuple(
        ParameterInfo(
            name,
            owners[name],
            tuple(value.shape),
            value.dtype,
            disk[name],
            value.nbytes,
            value,
            buffer=name not in weights,
            exact=name in exact,
        )
        for name, value in found.items()
    ) + tuple(
        ParameterInfo(name, OTHER, tuple(value.shape), value.dtype, name, value.nbytes, value, loaded=False)
        for name, value in travelling.items()
    )
    parameters = _with_scales(parameters, tensors, shards)
    _check_disk_names(parameters, model_dir)
    in_blocks = {linear.name: linear for block in blocks for linear in block.linears}
    infos = tuple(
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
        linears=infos,
        blocks=blocks,
        tied=tied,
        ignored=ignored + tensors.dropped,
        experts=experts,
        modules={name: type(module) for name, module in model.named_modules()},
        part_types=part_types,
        unread_experts=frozenset(name for name, module in model.named_modules() if holds_experts(module)),
        trust_remote_code=trust_remote_code,
        untied=untied,
        source=source,
        unknown=unknown,
    )


def read_config(model_dir: Path) -> dict[str, Any]:
    """The content of a model's config.json. InputError where there is none of a transformers model."""
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such directory; give a model's directory")
    refuse_misfits(model_dir)
    file = model_dir / CONFIG_NAME
    if not file.exists():
        if any(model_dir.glob("*.gguf")):
            raise InputError(f"{model_dir}: {why_no_weights(model_dir)}")
        raise InputError(f"{file}: missing; a model's directory holds a {CONFIG_NAME}")
    content: dict[str, Any] = read_json(file, constants=True)
    if not all(isinstance(part["model_type"], str) for part in (content, *_parts(content)) if "model_type" in part):
        raise InputError(f"{file}: a model_type is no text; the file is damaged")
    if "model_type" not in content:
        raise InputError(f"{file}: names no model_type; this is not the config of a transformers model")
    return content


def make_config(model_dir: Path, content: Mapping[str, Any], shards: Shards, *, trust_remote_code: bool) -> Any:
    """transformers' config object. InputError where transformers refuses it, or it cannot be that of these weights."""
    from transformers import AutoConfig

    file = model_dir / CONFIG_NAME
    _refuse_too_many(content, shards, file)
    try:
        with limited(seconds=CONFIG_SECONDS, more_bytes=CONFIG_BYTES):
            return AutoConfig.from_pretrained(
                model_dir, local_files_only=not trust_remote_code, trust_remote_code=trust_remote_code
            )
    except OverLimitError as error:
        raise InputError(f"{file}: {error} to read; is it damaged?") from error
    except Exception as error:
        kind = content["model_type"]
        if f"`{kind}`" in str(error):
            raise UnknownClassError(f"{file}: model type {shown(kind)} is unknown to this transformers") from error
        if strangers := [one for one in _unknown_types(content) if one in str(error)]:
            raise UnknownClassError(
                f"{file}: model type {shown(kind)} has a part of type {shown(strangers[0])}, which is unknown to this "
                "transformers"
            ) from error
        raise InputError(f"{file}: transformers refuses this config: {first_line(error)}") from error


def _unknown_types(content: Mapping[str, Any]) -> list[str]:
    from transformers import CONFIG_MAPPING

    named = [part["model_type"] for part in (content, *_parts(content)) if "model_type" in part]
    return [kind for kind in dict.fromkeys(named) if kind not in CONFIG_MAPPING]


def _refuse_too_many(content: Mapping[str, Any], shards: Shards, file: Path) -> None:
    """Refuse numbers of layers and experts that the weights cannot have: transformers would make as many modules."""
    tensors = len(shards.entries)
    widest = max([LEAST_WIDTH, tensors, *(max(entry.shape, default=0) for entry in shards.entries.values())])
    for key, value in (item for part in (content, *_parts(content)) for item in part.items()):
        most = tensors if LAYERS.fullmatch(key) else widest if WIDTHS.fullmatch(key) else None
        if most is not None and isinstance(value, int | float) and value > most:
            raise InputError(
                f"{file}: {key} is {shown(value)}, more than the {tensors} tensors on disk have room for; does "
                f"{CONFIG_NAME} belong to these weights?"
            )


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All mappings inside a config."""
    for value in content.values():
        if isinstance(value, dict):
            yield value
            yield from _parts(value)


def auto_class(config: Any) -> Any:
    """transformers' auto class that builds models of this config. InputError where none takes images and text."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name in AUTO_CLASSES if getattr(config, "auto_map", None) else ():
        if name in config.auto_map:
            return getattr(transformers, name)
    known = (
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, transformers.AutoModelForImageTextToText),
        (modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, transformers.AutoModelForMultimodalLM),
    )
    for names, auto in known:
        if config.model_type in names:
            return auto
    raise UnknownClassError(
        f"{config.name_or_path}: model type {config.model_type} is not an image-text model that transformers can build "
        "(neither AutoModelForImageTextToText nor AutoModelForMultimodalLM knows it)"
    )


def build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool, untie: bool) -> nn.Module:
    """The model on the meta device, in eval mode. InputError where transformers cannot build one."""
    auto = auto_class(config)
    for attention in ("sdpa", "eager"):
        try:
            with limited(seconds=BUILD_SECONDS, more_bytes=BUILD_BYTES), torch.device("meta"):
                model: nn.Module = auto.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
                )
        except OverLimitError as error:
            raise InputError(f"{config.name_or_path}: {error} to build; is {CONFIG_NAME} damaged?") from error
        except Exception as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue
            raise UnknownClassError(f"{config.name_or_path}: {_why_not_built(config, error)}") from error
        break
    if untie:
        _untie(model)
    return model.eval().requires_grad_(False)


def _untie(model: nn.Module) -> nn.Module:
    """Give every name of a parameter on meta that has several a parameter of its own; the model."""
    for names in _shared_parameters(model):
        for name in names[1:]:
            module, _, leaf = name.rpartition(".")
            value = model.get_parameter(name)
            setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty_like(value), requires_grad=False))
    return model


def _why_not_built(config: Any, error: Exception) -> str:
    if "requires the timm library" in str(error):
        return (
            f"model type {config.model_type} takes its vision encoder from timm, which is not installed here; "
            "pip install timm (it brings torchvision along)"
        )
    parts = (config, *(value for value in vars(config).values() if hasattr(value, "model_type")))
    if any(part.model_type.startswith("timm") for part in parts):
        return (
            f"model type {config.model_type} takes its vision encoder from timm, which does not build it "
            f"without weights "
            f"here ({first_line(error)}); such models are not handled"
        )
    return f"transformers cannot build a model of type {config.model_type}: {first_line(error)}"


def model_dtype(config: Any, shards: Shards) -> torch.dtype:
    """The config's dtype, or else the one that most weight bytes on disk have, codes, FP8 and its scales apart."""
    if isinstance(config.dtype, torch.dtype) and config.dtype.itemsize > 1:
        return config.dtype
    sizes: Counter[torch.dtype] = Counter()
    for entry in shards.entries.values():
        if (
            entry.dtype.is_floating_point
            and entry.dtype.itemsize > 1
            and not entry.name.endswith(("_scale", "_scale_inv"))
        ):
            sizes[entry.dtype] += entry.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.bfloat16


def _family_of(config: Any, model: nn.Module, model_dir: Path, given: Family | None) -> Family:
    """The row given, the model's own in the table, or a guess."""
    row = given or FAMILIES.get(config.model_type) or guess_family(config, model, model_dir)
    _check_row(row, model, config, model_dir)
    return row


def _check_row(row: Family, model: nn.Module, config: Any, model_dir: Path) -> None:
    """InputError where a row names parts that the model has not."""
    modules = dict(model.named_modules())
    if absent := [name for name in (*row.vision_encoder, row.language) if name not in modules]:
        raise InputError(
            f"{model_dir}: model type {config.model_type} has no module {', '.join(absent)}, where its row "
            f"({row.source}) says that its parts are; it is made of {', '.join(outline(model))}"
        )


def part_type(module: nn.Module, config: Any) -> str:
    """The model_type that a tower's or language model's own config names; that of the text config for a flat model."""
    own = getattr(module, "config", None)
    if own is None or own is config:
        return str(config.get_text_config().model_type)
    return str(own.model_type)


def outline(model: nn.Module) -> list[str]:
    """The outermost modules that a model is made of, one level below its base model and its wrapped models."""
    base = getattr(model, "base_model_prefix", "")
    names = []
    for name, module in model.named_children():
        inner = [f"{name}.{child}" for child, _ in module.named_children()] if name in (base, "thinker") else []
        names += inner or [name]
    return names


def _match_names(
    model: nn.Module,
    stored: dict[str, Lazy],
    model_dir: Path,
    how: Callable[[nn.Module, Mapping[str, Lazy]], Matched],
) -> tuple[Matched, tuple[str, ...], dict[str, Lazy]]:
    """Which tensors stand for which parameters; what transformers computes anew; what it leaves aside by design."""
    try:
        matched = how(model, stored)
    except InputError as error:
        raise InputError(f"{model_dir}: {error}") from error
    ignored, travelling, unexpected = [], {}, []
    for disk in matched.unexpected:
        if RECOMPUTED.search(disk):
            ignored.append(disk)
        elif left_aside(model, disk):
            travelling[disk] = stored[disk]
        else:
            unexpected.append(disk)
    if unexpected:
        raise InputError(
            f"{model_dir}: {len(unexpected)} tensors have no place in a {type(model).__name__}: {some(unexpected)}; "
            "does config.json belong to these weights?"
        )
    return matched, tuple(ignored), travelling


def _name_on_disk(name: str, value: Lazy, experts: dict[str, Form], linear: Matched | None) -> str:
    """What a parameter is called in a checkpoint that stores it by itself.

    linear: of the weight of a linear layer, which may be stored as codes and scales: transformers has to find them too.
    """
    ending, sources = EXPERT_NAME.search(name), value.made.names()
    home = name.removesuffix(ending[0]) if ending else ""
    if value.disk_name is not None:
        module, _, leaf = value.disk_name.rpartition(".")
        loads = linear is None or (leaf == "weight" and linear.module_name(module) == name.removesuffix(".weight"))
        return value.disk_name if loads or home in experts else name
    if ending and home in experts and len(sources) == 1:
        # Beside the stack that it is taken from: there the loaders of engines look for single experts.
        leaf = home.rpartition(".")[2]
        before, found, _ = min(sources).rpartition(f".{leaf}.")
        if found:
            return f"{before}.{leaf}{ending[0]}"
    return name


def _kept_exact(model: nn.Module) -> re.Pattern[str]:
    """What fits the names of parameters that transformers loads in float32."""
    globs = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    globs |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    return re.compile("|".join(f"(?:{glob.replace('*', '.*')})" for glob in sorted(globs)) or "(?!)")


def _with_scales(parameters: tuple[ParameterInfo, ...], logical: Logical, shards: Shards) -> tuple[ParameterInfo, ...]:
    """The parameters with what FP8 weights take on disk, scales included: where several are made from the same tensors,
    each gets a share by its size, and the shares add up to the whole."""
    together: dict[str, set[str]] = {}  # tensor on disk -> all that it shares a parameter with, directly or not
    for parameter in parameters:
        merged = set().union(*(together.get(name, {name}) for name in parameter.sources))
        together |= dict.fromkeys(merged, merged)
    members: dict[int, list[ParameterInfo]] = {}
    for parameter in parameters:
        members.setdefault(id(together[min(parameter.sources)]), []).append(parameter)
    changed: dict[str, ParameterInfo] = {}
    for group in members.values():
        sources = together[min(group[0].sources)]
        if sources.isdisjoint(logical.scaled):
            continue
        total = sum(logical.scaled.get(name, shards.entries[name].nbytes) for name in sources)
        whole, done = sum(prod(one.shape) for one in group), 0
        for one in group:
            before, done = total * done // whole, done + prod(one.shape)
            copyable = one.sources.isdisjoint(logical.scaled)
            changed[one.name] = replace(one, nbytes=total * done // whole - before, copyable=copyable)
    return tuple(changed.get(one.name, one) for one in parameters)


def _check_disk_names(parameters: tuple[ParameterInfo, ...], model_dir: Path) -> None:
    owners: dict[str, str] = {}
    for parameter in parameters:
        other = owners.setdefault(parameter.disk, parameter.name)
        if other != parameter.name:
            raise InputError(
                f"{model_dir}: parameters {other} and {parameter.name} would both be stored as {parameter.disk}; "
                "please report this as a bug"
            )


def _shared_parameters(model: nn.Module) -> list[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _tied_groups(model: nn.Module, found: dict[str, Lazy], shards: Shards) -> tuple[tuple[str, ...], ...]:
    """Names that share one tensor. Where the disk has several values for them, transformers does not tie, nor do we."""
    groups = []
    for names in _shared_parameters(model):
        stored = [name for name in names if name in found]
        values = (found[name].read(shards.read) for name in stored)
        first = next(values) if len(stored) > 1 else None
        if first is None or all(torch.equal(first, value) for value in values):
            groups.append((*stored, *(name for name in names if name not in found)))
    return tuple(groups)


def _check_shapes(
    model: nn.Module,
    found: dict[str, Lazy],
    tied: tuple[tuple[str, ...], ...],
    shards: Shards,
    model_dir: Path,
) -> None:
    spared = {name for group in tied if group[0] in found for name in group[1:]}
    expected = dict(model.named_parameters(remove_duplicate=False))
    made_up = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    stored = {**expected, **model.state_dict()}
    missing = [
        name
        for name in stored
        if name not in found
        and name not in spared
        and (name in expected or not any(pattern.search(name) for pattern in made_up))
    ]
    if missing:
        raise InputError(f"{model_dir}: {len(missing)} tensors are missing: {some(missing)}; is the download complete?")
    for name, value in found.items():
        if value.shape != stored[name].shape:
            sources = sorted(value.made.names())
            whose = f"tensor {sources[0]}" if value.disk_name else f"parameter {name}, made from {some(sources)},"
            raise InputError(
                f"{shards.entries[sources[0]].file}: {whose} has shape {list(value.shape)}, but config.json makes it "
                f"{list(stored[name].shape)}; does config.json belong to these weights?"
            )


def _check_dtypes(model: nn.Module, found: dict[str, Lazy], shards: Shards) -> None:
    """Refuse integers and bytes where the model has weights."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in found.items():
        if name in weights and (not value.dtype.is_floating_point or value.dtype.itemsize == 1):
            disk = min(value.made.names())
            raise InputError(
                f"{shards.entries[disk].file}: tensor {disk} is {value.dtype}, so this model is already quantized"
            )


def _place(
    found: dict[str, Lazy], family: Family, tied: tuple[tuple[str, ...], ...], config: Any, model_dir: Path
) -> dict[str, str]:
    """Parameter name -> component; what no prefix covers is `other`. InputError where a needed one has nothing."""
    prefixes = sorted(family.prefixes().items(), key=lambda item: -len(item[0]))

    def owner_of(name: str) -> str:
        return next((owner for prefix, owner in prefixes if f"{name}.".startswith(f"{prefix}.")), OTHER)

    owners = {name: owner_of(name) for name in found}
    for group in tied:  # an embedding may lie on disk as the head that it is tied to
        if group[0] in owners:
            owners[group[0]] = min(map(owner_of, group), key=COMPONENTS.index)
    if absent := [name for name in NEEDED if name not in owners.values()]:
        places = [prefix for prefix, owner in family.prefixes().items() if owner in absent]
        outermost = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in found))
        raise InputError(
            f"{model_dir}: model type {config.model_type}: found no weights of {', '.join(absent)} below "
            f"{', '.join(places)}, where its row ({family.source}) says; the weights lie below "
            f"{some(outermost)}; {WAY_OUT}"
        )
    return owners


def _quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers that run as such.

    Not those inside torch's own attention, which reads them and never calls them, and no module that makes something
    else of a linear's weight, as some routers do.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if plain and not name.startswith(inside):
            yield name, module


def _linear_info(name: str, local: str, block: str | None, module: nn.Linear, component: str) -> LinearInfo:
    return LinearInfo(name, local, block, component, module.out_features, module.in_features, module.bias is not None)


def _find_blocks(model: nn.Module, family: Family, owners: dict[str, str]) -> Iterator[BlockInfo]:
    """The items of the outermost lists whose items run, those of the vision encoders first, in order of definition."""
    linears = [(name, module) for name, module in _quantizable(model) if f"{name}.weight" in owners]
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for component, inside in (("vision_encoder", family.vision_encoder), ("language", (family.language,))):
        blocks: dict[str, list[tuple[str, nn.Linear]]] = {}
        for name, module in linears:
            around = list(outer_modules(name))
            pairs = zip(around, [*around, name][1:], strict=True)
            home = next((outer for outer, item in pairs if outer in lists and item not in lists), None)
            below = any(name.startswith(f"{root}.") for root in inside)
            if home is not None and below and owners[f"{name}.weight"] == component:
                item = name[len(home) + 1 :].partition(".")[0]
                blocks.setdefault(f"{home}.{item}", []).append((name, module))
        for index, (block, members) in enumerate(blocks.items()):
            yield BlockInfo(
                block,
                component,
                index,
                tuple(_linear_info(name, name[len(block) + 1 :], block, module, component) for name, module in members),
            )


def outer_modules(name: str) -> Iterator[str]:
    """The names of all modules around a module, the outermost first."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))
