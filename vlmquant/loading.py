"""Loading a checkpoint so that its weights stay packed: with `load_model`, or through transformers after `install`.

transformers' own loader for compressed-tensors makes 16-bit weights of everything at the first forward pass, and cannot
`generate` from an image where the vision encoder is int8. Ours takes its place for checkpoints of schemes we have.
"""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from vlmquant.components import (
    CONFIG_NAME,
    EXPERT_NAME,
    GENERATION_NAME,
    auto_class,
    build,
    make_config,
    model_dtype,
    read_config,
)
from vlmquant.conversion import Lazy, Stored, left_aside, match
from vlmquant.devices import find_device
from vlmquant.errors import CacheScaleError, CheckpointError, InputError, VlmquantError, first_line, shown
from vlmquant.experts import Form, form_of, match_apart, parts_of, take_apart
from vlmquant.families import ACTIVATIONS, FAMILIES, FOLDS, shared_inputs
from vlmquant.formats import FORMATS, bitsandbytes
from vlmquant.formats.coding import PACKED_METHODS, Coding, Leaves, find_coding
from vlmquant.formats.compressed_tensors import METHOD, parse_cache, parse_config, regex_matches
from vlmquant.fp8 import Source, find_source, forget_quantization, logical_tensors, quantization_of
from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.kvcache import LEAVES, add_places, check_loaded, drop_places, loaded_attentions, names_in_model
from vlmquant.linear import (
    FollowingActivation,
    PermutedLinear,
    QuantEmbedding,
    QuantLinear,
    SharedRows,
    can_share,
    share,
)
from vlmquant.reading import read_json
from vlmquant.recipe import Scheme
from vlmquant.shards import INDEX_NAME, SINGLE_NAME, Shards, TensorEntry, open_shards, read_header, some
from vlmquant.state import keep_in_state

CACHE_LEAVES = tuple(f".{leaf}" for leaf in LEAVES.values())
"""The ends of the names of the KV cache's scales."""
MOST_WEIGHTS_PER_BYTE = 3
"""Of 3 bits, 2.5 go into a byte."""
READABLE_METHODS = (*PACKED_METHODS, bitsandbytes.METHOD)
FUSED_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""transformers' name of an activation -> that of kernels.reference.ACTIVATIONS for the same function."""
WORTH_RETURNING = 1 << 19
"""Bytes of packed weights: returning memory takes a millisecond, and mixtures of experts have thousands of weights."""


class _Arriving(nn.Module):
    """Takes a linear's or embedding's place while its tensors come from disk, under their names there."""

    def __init__(self, module: nn.Linear | nn.Embedding, scheme: Scheme, coding: Coding, leaves: Leaves) -> None:
        super().__init__()
        self.scheme, self.embedding, self.coding = scheme, isinstance(module, nn.Embedding), coding
        self.dtype = module.weight.dtype
        shape = (module.weight.shape[0], module.weight.shape[1])
        self.leaves = list(leaves)
        for leaf, (dtype, size) in leaves.items():
            value = torch.empty(size, dtype=dtype, device="meta")
            self.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        self.bias = getattr(module, "bias", None)
        if "weight" not in self.leaves:  # some models' own initialization looks at it
            stand_in = torch.empty(shape, dtype=self.dtype, device="meta")
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # so that it is not initialized
            self.__dict__["weight"] = stand_in

    def finish(self, name: str, activation: str) -> QuantLinear | QuantEmbedding:
        """What stays, once all tensors are there; activation: what outputs go through next, if that is known."""
        for leaf in self.leaves:
            # transformers makes up what it did not find on disk, and marks what it found.
            if not getattr(getattr(self, leaf), "_is_hf_initialized", False):
                raise CheckpointError(f"{name}: tensor {leaf} is missing; the checkpoint is incomplete")
        held = {f"{name}.{leaf}": getattr(self, leaf).data for leaf in self.leaves}
        weight, order = self.coding.decode(name, held.__getitem__, self.scheme)
        if self.embedding:
            return QuantEmbedding(weight, self.scheme, dtype=self.dtype)
        if self.coding.scheme:
            weight = _quicker(weight, self.dtype)
        if order is not None:
            return PermutedLinear(weight, self.scheme, self.bias, order, dtype=self.dtype)
        return QuantLinear(weight, self.scheme, self.bias, dtype=self.dtype, activation=activation)


def _quicker(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """The same weight of a GPTQ or AWQ file as kernels like it best in a model of this dtype: symmetric, and with
    scales in bfloat16, where nothing is lost by that."""
    grid, zeros = weight.grid, weight.zeros
    if zeros is not None and bool((zeros == mid_code(grid.bits)).all()):
        grid, zeros = replace(grid, symmetric=True), None
    if dtype != grid.scale_dtype and torch.equal(weight.scales.bfloat16().float(), weight.scales):
        grid = replace(grid, scale_dtype=torch.bfloat16)
    return replace(weight, zeros=zeros, grid=grid)


class _Spared:
    """The modules that transformers' renamings and converters are to leave alone, by their names in the model."""

    def __init__(self, modules: Iterable[str], base: str) -> None:
        self.names = {name for module in modules for name in (module, module.removeprefix(f"{base}."))}

    def holds(self, key: str) -> bool:
        """Whether a tensor is one of these modules' or of a module inside them."""
        parts = key.split(".")
        return any(".".join(parts[:count]) in self.names for count in range(len(parts) - 1, 0, -1))


class _SparingConverter(WeightConverter):  # type: ignore[misc]  # transformers is not typed
    """One of transformers' converters, which leaves some modules alone: they keep their tensors as they are on disk."""

    __slots__ = ("spared",)

    @staticmethod
    def of(rule: Any, spared: _Spared) -> "_SparingConverter":
        made = _SparingConverter(
            list(rule._original_source_patterns), list(rule._original_target_patterns), list(rule.operations)
        )
        made.force_cpu = rule.force_cpu
        made._was_used = rule._was_used
        made.scope_prefix, made.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
        made.spared = spared
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        used = self.was_used()
        name, pattern = super().rename_source_key(source_key)
        if pattern is not None and (self.spared.holds(source_key) or self.spared.holds(name)):
            self._was_used = used  # type: ignore[misc]
            return source_key, None
        return name, pattern

    def reverse_transform(self) -> "_SparingConverter":
        made: _SparingConverter = super().reverse_transform()
        made.spared = self.spared
        return made


class _SparingRenaming(WeightRenaming):  # type: ignore[misc]
    """One of transformers' renamings, which leaves some modules' names as they are."""

    __slots__ = ("inner", "spared")

    @staticmethod
    def of(rule: Any, spared: _Spared) -> "_SparingRenaming":
        made = _SparingRenaming("never", "never")
        made.inner, made.spared = rule, spared
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self.spared.holds(source_key):
            return source_key, None
        renamed: tuple[str, str | None] = self.inner.rename_source_key(source_key)
        return renamed

    def was_used(self) -> bool:
        return bool(self.inner.was_used())

    def reverse_transform(self) -> "_SparingRenaming":
        return _SparingRenaming.of(self.inner.reverse_transform(), self.spared)


class _ModuleRenaming(WeightRenaming):  # type: ignore[misc]
    """Renames modules one by one, by a table."""

    __slots__ = ("table",)

    @staticmethod
    def of(table: dict[str, str]) -> "_ModuleRenaming":
        made = _ModuleRenaming("never", "never")
        made.table = table
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        module, _, leaf = source_key.rpartition(".")
        if module not in self.table:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        return f"{self.table[module]}.{leaf}", source_key

    def reverse_transform(self) -> "_ModuleRenaming":
        return _ModuleRenaming.of({new: old for old, new in self.table.items()})


def _names_in(
    model: nn.Module, stacks: Mapping[str, Form], coded: Mapping[str, tuple[int, int]], *, apart: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Module on disk -> in the model, of those stored as codes: all of them, and the linears of experts among them.

    transformers' converters are asked about the weights that the codes stand for. apart: find those of single experts,
    too, that transformers has no converters for.
    """
    weights = {f"{disk}.weight": Lazy.of(Stored(f"{disk}.weight"), coded[disk], torch.float32) for disk in coded}
    matched = match_apart(model, weights) if apart else match(model, weights)
    names = {disk: matched.module_name(disk) for disk in coded}
    experts = {}
    for name, value in parts_of(matched.values, stacks).items():
        disk = (value.disk_name or "").removesuffix(".weight")
        if disk in coded:
            names[disk] = name.removesuffix(".weight")
            if EXPERT_NAME.search(name):
                experts[disk] = names[disk]
    return names, experts


def _plain_linears(model: nn.Module, entries: Mapping[str, TensorEntry]) -> set[str]:
    """Modules of the model whose weight lies on disk as it is, in floating point."""
    plain = {
        name: Lazy.of(Stored(name), entry.shape, entry.dtype)
        for name, entry in entries.items()
        if name.endswith(".weight") and entry.dtype.is_floating_point and entry.dtype.itemsize > 1
    }
    return {name.removesuffix(".weight") for name in match(model, plain).values}


class BoundedQuantizer(CompressedTensorsHfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """transformers' own loader, which matches the regexes of a config without a limit: tried before it does."""

    def _process_model_before_weight_loading(self, model: nn.Module, **arguments: Any) -> None:
        names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
        regex_matches(_texts(self.quantization_config.to_dict()), names)
        super()._process_model_before_weight_loading(model, **arguments)


def _texts(content: Any) -> Iterator[str]:
    """All texts in a nest of lists and mappings."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _texts(value)


class _Keeping:
    """What a loader of transformers' does to keep weights packed, whatever their format."""

    coding: Coding

    def _process_model_before_weight_loading(self, model: nn.Module, **arguments: Any) -> None:
        coding = self.coding
        entries = {
            entry.name: entry for file in arguments.get("checkpoint_files") or () for entry in read_header(Path(file))
        }
        self.quantized_on_disk = sorted(
            name.removesuffix(f".{coding.marker}") for name in entries if name.endswith(f".{coding.marker}")
        )
        stacks = {name: form for name, module in model.named_modules() if (form := form_of(module))}
        coded = coding.coded(entries, Shards(entries).read)
        names: dict[str, str] = {}
        self.expert_names: dict[str, str] = {}
        if stacks or coding.odd(entries):
            names, self.expert_names = _names_in(model, stacks, coded, apart=coding.scheme is not None)
        homes = {name.rsplit(".", 2)[0] for name in self.expert_names.values()}
        if coding.scheme is None:  # the config says it, also of experts that are missing on disk
            first = {name: f"{name}.0.{form.projections[0]}" for name, form in stacks.items()}
            found = coding.schemes(dict.fromkeys(first.values(), "Linear"), ())
            homes = {name for name in stacks if found[first[name]]}
            self.expert_names = {
                disk: name for disk, name in self.expert_names.items() if name.rsplit(".", 2)[0] in homes
            }
        take_apart(model, check=False, only=homes)
        # Not a subclass of Embedding: those scale or mask what they look up.
        modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module) is nn.Embedding
        }
        kinds = {name: type(one).__name__ for name, one in modules.items()}
        schemes = {
            name: scheme for name, scheme in coding.schemes(kinds, set(names.values())).items() if scheme is not None
        }
        if coding.scheme is None and len(schemes) != len(coded):
            # Classes as targets, and lists of names as an older transformers had them, take in what is not quantized.
            plain = _plain_linears(model, entries)
            schemes = {name: scheme for name, scheme in schemes.items() if name not in plain}
        on_disk = {name: disk for disk, name in names.items()}
        for name, scheme in schemes.items():
            module = modules[name]
            shape = (module.weight.shape[0], module.weight.shape[1])
            leaves = coding.leaves(shape, scheme, module.weight.dtype, on_disk.get(name), entries)
            model.set_submodule(name, _Arriving(module, scheme, coding, leaves))

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Nothing: transformers takes Llama 4's experts apart, kept ones too, whose weights are stacked on disk."""

    def update_weight_conversions(self, conversions: list[Any], model: nn.Module) -> list[Any]:
        """transformers' own, kept away from experts that stay apart, and one that gives those the model's names."""
        # Not with transformers' own changes: those are for weights that are dequantized while they are loaded.
        base, state = str(model.base_model_prefix), model.state_dict()
        spared = _Spared((name for name, module in model.named_modules() if isinstance(module, _Arriving)), base)
        converters = [_SparingConverter.of(rule, spared) for rule in conversions if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
        renamed = {apply_renamings(f"{disk}.weight", renamings): name for disk, name in self.expert_names.items()}
        renamings.append(_ModuleRenaming.of({old.removesuffix(".weight"): new for old, new in renamed.items()}))
        self.disk_names = {}
        for disk in self.quantized_on_disk:
            key = f"{disk}.{self.coding.marker}"
            name = rename_source_key(key, renamings, converters, base, state)[0]
            if name not in state and key in state:
                name = key
            self.disk_names[name.removesuffix(f".{self.coding.marker}")] = disk
        return [*renamings, *converters]

    def _names_for_saving(self, model: nn.Module) -> None:
        """Have `save_pretrained` write quantized modules under the names that they came with."""
        spared = _Spared(self.disk_names, "")
        rules = [
            _SparingConverter.of(rule, spared)
            if isinstance(rule, WeightConverter)
            else _SparingRenaming.of(rule, spared)
            for rule in getattr(model, "_weight_conversions", None) or ()
        ]
        names = {disk: name for name, disk in self.disk_names.items()}
        model._weight_conversions = [_ModuleRenaming.of(names), *rules]  # type: ignore[assignment]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for scales: they stay as they are on disk, whatever dtype the model is loaded in."""
        scale = FORMATS[self.coding.format].scale_leaf
        if any(str(target).endswith(scale) for target in getattr(converter, "target_patterns", ())):
            return None
        result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)  # type: ignore[misc]
        return result

    def _process_model_after_weight_loading(self, model: nn.Module, **arguments: Any) -> nn.Module:
        activations = _activations(model)
        arrived = {name: module for name, module in model.named_modules() if isinstance(module, _Arriving)}
        freed = 0
        for name in list(arrived):
            follower, activation = activations.get(name, ("", ""))
            model.set_submodule(name, arrived.pop(name).finish(name, activation))
            if activation:
                block, _, leaf = name.rpartition(".")
                function = model.get_submodule(follower)
                model.set_submodule(follower, FollowingActivation(function, model.get_submodule(block), leaf))
            freed = _give_back(freed + model.get_submodule(name).packed_bytes)  # type: ignore[operator, arg-type]
        _share_inputs(model)
        for module in model.modules():
            if isinstance(module, QuantLinear | QuantEmbedding):
                keep_in_state(module)
        self._names_for_saving(model)
        return model

    def validate_environment(self, *arguments: Any, **named: Any) -> None:
        """What transformers has its quantizers look at, the places of modules among it, once they are known."""
        places = named.get("device_map")
        if isinstance(places, Mapping) and (away := [name for name, place in places.items() if place == "disk"]):
            raise CheckpointError(
                f"device_map puts {some(away)} on disk, as there is too little memory elsewhere (max_memory); packed "
                "weights are not offloaded: give max_memory more room, another device, or load without device_map"
            )
        super().validate_environment(*arguments, **named)  # type: ignore[misc]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_pretrained` writes: the packed weights as they came from disk."""
        return model.state_dict(), {}

    @property
    def is_trainable(self) -> bool:
        return False


class PackedQuantizer(_Keeping, CompressedTensorsHfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """transformers' loader for compressed-tensors, with weights that stay packed."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        self.coding = find_coding(config.to_dict())
        self.cache_strategy = parse_cache(config.to_dict())
        self.cached: list[str] = []

    def _process_model_before_weight_loading(self, model: nn.Module, **arguments: Any) -> None:
        if self.cache_strategy is not None:
            self._await_cache_scales(model, arguments.get("checkpoint_files") or ())
        super()._process_model_before_weight_loading(model, **arguments)

    def _process_model_after_weight_loading(self, model: nn.Module, **arguments: Any) -> nn.Module:
        for name in self.cached:
            module = model.get_submodule(name)
            for leaf in LEAVES.values():
                if not getattr(module._buffers[leaf], "_is_hf_initialized", False):
                    module._buffers[leaf] = None  # made up, as it was not on disk
            check_loaded(name, module)
        return super()._process_model_after_weight_loading(model, **arguments)

    def _await_cache_scales(self, model: Any, files: Iterable[str]) -> None:
        """Give the attention modules places for their scales: those of every list of layers that has some on disk."""
        on_disk = {
            entry.name: entry
            for file in files
            for entry in read_header(Path(file))
            if entry.name.endswith(CACHE_LEAVES)
        }
        if not on_disk:
            raise CacheScaleError(
                "quantization_config has a kv_cache_scheme, but every k_scale and v_scale is missing; an engine would "
                "take 1.0, so quantize the model again"
            )
        first = next(iter(on_disk.values()))
        attentions = loaded_attentions(model)
        for name, attention in attentions.items():
            shape = (attention.heads, 1, 1) if self.cache_strategy == "head" else (1,) if first.shape else ()
            add_places(model.get_submodule(name), shape, first.dtype)
        found = names_in_model(model, {name: (entry.shape, entry.dtype) for name, entry in on_disk.items()})
        lists = {_list_around(name) for name in found.values()}
        for name in attentions:
            if _list_around(name) in lists:
                self.cached.append(name)
            else:
                drop_places(model.get_submodule(name))


class PackedWordsQuantizer(_Keeping, HfQuantizer):  # type: ignore[misc]
    """The same for GPTQ and AWQ, in place of transformers' own, which need gptqmodel.

    Which modules are quantized is what lies on disk, and not what the config's lists of names say: transformers takes
    modules_to_not_convert: [visual], as AWQ models of its older versions have it, for none of today's names.
    """

    requires_calibration = True

    def __init__(self, config: Any, *, coding: Coding, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        self.coding = coding

    def is_serializable(self) -> bool:
        return False


def _list_around(name: str) -> str:
    """The list of layers that a module is in: its name up to the last number."""
    parts = name.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[:last])


def _known_parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Kind, name and module of the language models and vision encoders that vlmquant.families has tables for."""
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part.config.model_type in FOLDS:
            yield part.config.model_type, name, part


def _activations(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Linear -> the activation its outputs go through, and that one's name in kernels.reference.ACTIVATIONS."""
    names = {type(ACT2FN[theirs]): ours for theirs, ours in FUSED_ACTIVATIONS.items()}
    found = {}
    for kind, root, part in _known_parts(model):
        linear, activation = ACTIVATIONS.get(kind, ("", ""))
        for name, module in part.named_modules():
            if activation and f".{name}".endswith(f".{activation}") and type(module) in names:
                path = f"{root}.{name}"
                found[path.removesuffix(activation) + linear] = (path, names[type(module)])
    return found


def _share_inputs(model: nn.Module) -> None:
    """Let linears that get the same inputs lie together, where their weights are of one kind."""
    freed = 0
    for _, _, part in _known_parts(model):
        groups: dict[tuple[str, ...], list[QuantLinear]] = {}
        for name, module in part.named_modules():
            alone = not isinstance(module, PermutedLinear)
            if isinstance(module, QuantLinear) and alone and not isinstance(module.packed, SharedRows):
                groups.setdefault(shared_inputs(name), []).append(module)
        for group in groups.values():
            if can_share(group):
                share(group)
                freed = _give_back(freed + sum(one.packed_bytes for one in group))


def _choose_quantizer(config: Any, **arguments: Any) -> CompressedTensorsHfQuantizer:
    """Ours if every group of the config is one of our schemes, else transformers' own."""
    try:
        parse_config(config.to_dict())
    except CheckpointError:
        return BoundedQuantizer(config, **arguments)
    return BoundedQuantizer(config, **arguments) if config.dequantize else PackedQuantizer(config, **arguments)


def install() -> None:
    """Let transformers' `from_pretrained` keep our checkpoints packed. `import vlmquant` sees to it by itself."""
    AUTO_QUANTIZER_MAPPING[METHOD] = _choose_quantizer


@contextlib.contextmanager
def _installed(coding: Coding | None) -> Iterator[None]:
    """Our loader in transformers' table for a moment, whatever the environment says about the rest of the process."""
    method = FORMATS[coding.format].method if coding else METHOD
    before = AUTO_QUANTIZER_MAPPING[method]
    if coding is None or coding.scheme is None:
        AUTO_QUANTIZER_MAPPING[method] = _choose_quantizer
    else:
        AUTO_QUANTIZER_MAPPING[method] = functools.partial(PackedWordsQuantizer, coding=coding)
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[method] = before


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    generation: GenerationConfig | None = None,
) -> Any:
    """The model in a directory, quantized or not, in eval mode; quantized weights stay packed.

    dtype: of everything that is not quantized; None for the model's own. device: "auto" is the GPU if there is one.
    generation: instead of generation_config.json, which is then not opened. Raises UsageError for a device that is not
    there, InputError for a damaged directory and CheckpointError where the checkpoint does
    not fit its model: every tensor must be there, be used and have its shape.
    """
    path, device = Path(path), torch.device(find_device(str(device)))
    shards, content = open_shards(path), read_config(path)
    source = _fp8_source(path, content)
    quantized_by = None if source else _method_of(path, content)
    coding = find_coding(content["quantization_config"]) if quantized_by in PACKED_METHODS else None
    config = make_config(path, content, shards, trust_remote_code=False)
    auto = auto_class(config)
    _refuse_larger(config, shards, path)
    if generation is None and (settings := path / GENERATION_NAME).exists():
        read_json(settings)  # before transformers opens it, whatever it is
    arguments: dict[str, Any] = {} if generation is None else {"generation_config": generation}
    if len(shards.files) == 1 and shards.files[0].name != SINGLE_NAME and not (path / INDEX_NAME).is_file():
        config.transformers_weights = shards.files[0].name
        arguments["config"] = config
    if quantized_by == bitsandbytes.METHOD:
        bitsandbytes.require_bitsandbytes()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for every product in bfloat16
        arguments["device_map"] = {"": str(device)}
    try:
        with _installed(coding):
            if source:
                model, info = _from_fp8(auto, config, path, shards, source, dtype, generation)
            else:
                model, info = _from_pretrained(
                    auto,
                    config,
                    path,
                    dtype=dtype or "auto",
                    output_loading_info=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    **arguments,
                )
    except VlmquantError as error:
        raise type(error)(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    except (RuntimeError, ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    for what, keys in sorted(info.items()):
        names = sorted(str(key) for key in keys)
        if what == "unexpected_keys":
            names = [name for name in names if not left_aside(model, name)]
        if names:
            raise CheckpointError(
                f"{path}: {len(names)} {what.replace('_', ' ')}: {some(names)}; "
                "the weights and config.json do not belong together, or the checkpoint is incomplete"
            )
    if quantized_by == bitsandbytes.METHOD and dtype is not None:
        _cast_kept(model, dtype)
    if device.type != "cpu" and quantized_by != bitsandbytes.METHOD:
        model.to(device)
    give_back_freed_memory()
    return model.eval()


def _refuse_larger(config: Any, shards: Shards, path: Path) -> None:
    """Refuse the config of a model that these weights cannot fill: transformers would build it and make up the rest."""
    config = forget_quantization(deepcopy(config))
    model = build(config, torch.bfloat16, trust_remote_code=False, untie=False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > MOST_WEIGHTS_PER_BYTE * shards.total_bytes:
        raise CheckpointError(
            f"{path}: {CONFIG_NAME} makes a model of {weights:,} weights, more than the {shards.total_bytes:,} bytes "
            "on disk can hold; the weights and config.json do not belong together, or the checkpoint is incomplete"
        )


def _from_pretrained(auto: Any, config: Any, path: Path, /, **arguments: Any) -> Any:
    """Model and loading info, also where a class's own from_pretrained cannot give the latter (Qwen2.5-Omni's)."""
    kind = auto._model_mapping.get(type(config), None)
    own = kind is not None and kind.from_pretrained.__func__ is not PreTrainedModel.from_pretrained.__func__
    if not own:
        return auto.from_pretrained(path, **arguments)
    model, info = PreTrainedModel.from_pretrained.__func__(kind, path, **arguments)
    voices = path / "spk_dict.pt"
    if hasattr(model, "load_speakers") and voices.is_file():
        model.load_speakers(str(voices))
    return model, info


class _Slice:
    """Stands in for a tensor of a checkpoint while transformers loads it, which reads it by `[...]`."""

    def __init__(self, name: str, value: Lazy, shards: Shards, *, check: bool) -> None:
        self.name, self.value, self.shards, self.check = name, value, shards, check
        self.shape, self.dtype = value.shape, value.dtype

    def __getitem__(self, key: Any) -> Tensor:
        read = self.value.read(self.shards.read)
        if self.check and not read.isfinite().all():
            file = self.shards.entries[self.name].file
            raise InputError(f"{file}: tensor {self.name} holds NaN or infinite values; the model is damaged")
        return read[key]


def _from_fp8(
    auto: Any,
    config: Any,
    path: Path,
    shards: Shards,
    source: Source,
    dtype: torch.dtype | None,
    generation: GenerationConfig | None,
) -> tuple[Any, dict[str, Any]]:
    """The model of an FP8 checkpoint as we quantize it: dequantized to its own dtype, one tensor at a time, then cast.

    transformers' own FP8 loader needs accelerate, refuses or misreads blocks at the edges that are partial, and rounds
    to the dtype asked for.
    """
    own = model_dtype(config, shards)
    forget_quantization(config)
    logical = logical_tensors(shards, source, own)
    kind = auto._model_mapping[type(config)]
    model, info = PreTrainedModel.from_pretrained.__func__(
        kind,
        None,
        config=config,
        state_dict={
            name: _Slice(name, value, shards, check=name in logical.scaled) for name, value in logical.tensors.items()
        },
        dtype=dtype or own,
        output_loading_info=True,
    )
    model.name_or_path = model.config._name_or_path = str(path)
    if model.can_generate() and generation is not None:
        model.generation_config = generation
    elif model.can_generate() and (path / GENERATION_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, info


def _fp8_source(path: Path, content: Mapping[str, Any]) -> Source | None:
    """How the weights of an FP8 checkpoint are stored; None for any other, and for one that we load packed."""
    try:
        parse_config(content.get("quantization_config"))
    except CheckpointError:
        with contextlib.suppress(InputError):  # told by `_method_of`
            return find_source(content, path / CONFIG_NAME)
    return None


def reading_part(model: Any) -> Any:
    """The part of a loaded model that takes image and text and answers: itself, or the thinker of an Omni model."""
    row = FAMILIES.get(model.config.model_type)
    return model.get_submodule(row.runs) if row else model


def _give_back(freed: int) -> int:
    """Have memory returned once so many bytes were freed that it is worth the call; what is still to be returned."""
    if freed < WORTH_RETURNING:
        return freed
    give_back_freed_memory()
    return 0


def give_back_freed_memory() -> None:
    """Let glibc return what packing a weight needed for a moment: it keeps it, in holes too small for the next one.

    Other C libraries return it by themselves or have no such call.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _method_of(path: Path, content: Mapping[str, Any]) -> str | None:
    """The checkpoint's quant_method, None for an unquantized model.

    CheckpointError for one that we do not load: transformers warns of a method it does not know, and loads nonsense.
    """
    file, quantization = path / CONFIG_NAME, content.get("quantization_config")
    if not quantization:
        if elsewhere := list(quantization_of(content)):
            raise CheckpointError(
                f"{file}: says how its weights are quantized under {elsewhere[0]}, where transformers does not look; "
                "use the model as quantization_config at the top level has it"
            )
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in READABLE_METHODS:
        raise CheckpointError(
            f"{file}: quant_method {shown(repr(method))} is not one that we load: {', '.join(READABLE_METHODS)}"
        )
    if method in PACKED_METHODS:
        try:
            find_coding(quantization)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
    return str(method)


def _cast_kept(model: nn.Module, dtype: torch.dtype) -> None:
    """What bitsandbytes did not quantize, in the dtype asked for: transformers leaves it as it is on disk."""
    for module in model.modules():
        if not type(module).__module__.startswith("bitsandbytes"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
