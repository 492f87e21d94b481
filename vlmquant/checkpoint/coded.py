"""Checkpoints on disk whose weights are integer codes, ours and others', opened for more than running them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vlmquant import kvcache, signals
from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.components import CONFIG_NAME, ComponentMap, read_config, resolve_components
from vlmquant.conversion import Lazy, Read, Stored
from vlmquant.errors import CacheScaleError, CheckpointError, InputError, VlmquantError, shown
from vlmquant.formats import FORMATS, compressed_tensors
from vlmquant.formats.coding import PACKED_METHODS, Coding, find_coding
from vlmquant.formats.compressed_tensors import parse_cache
from vlmquant.fp8 import Logical
from vlmquant.grid import QuantizedWeight, scale_problem
from vlmquant.recipe import Scheme
from vlmquant.shards import Shards, some


@dataclass(frozen=True, kw_only=True)
class Codes(Stored):
    """A weight that is there as codes: where it belongs can be asked, its values cannot (`Coded.read` has them)."""

    parts: frozenset[str]
    """The tensors on disk."""

    def value(self, read: Read) -> Tensor:
        raise CheckpointError(f"{self.name}: is stored as codes, where a weight of 16 bits or more is needed")

    def names(self) -> set[str]:
        return set(self.parts)


@dataclass(frozen=True)
class Coded:
    """An opened checkpoint."""

    path: Path
    coding: Coding
    components: ComponentMap
    """As of an unquantized model."""
    schemes: dict[str, Scheme]
    """Of every weight that is stored as codes, by the parameter's name."""
    cache_scales: tuple[str, ...] = ()
    """Of the KV cache, where the config has a scheme for it: names on disk."""

    def module(self, name: str) -> str:
        """What a weight's module is called on disk."""
        return self.components.parameter(name).disk.removesuffix(".weight")

    def tensor(self, disk: str) -> Tensor:
        """KeyError where there is none of that name."""
        return self.components.shards.read(disk)

    def scales(self, name: str) -> Tensor:
        """As they lie on disk."""
        return self.tensor(f"{self.module(name)}.{FORMATS[self.coding.format].scale_leaf}")

    def read(self, name: str) -> tuple[QuantizedWeight, Tensor | None]:
        """Codes, and the order of inputs where groups are permuted. CheckpointError for what cannot be right."""
        disk, scheme = self.module(name), self.schemes[name]
        entries, leaves = self.components.shards.entries, FORMATS[self.coding.format]
        rows, columns = self.components.parameter(name).shape
        needed = leaves.encoded_shapes(disk, (rows, columns), scheme, torch.float16)
        for one in needed:
            if one not in entries and not one.endswith(".g_idx"):
                raise CheckpointError(f"{self.path}: {disk}: tensor {one.rpartition('.')[2]} is missing")
        try:
            weight, order = self.coding.decode(disk, self.tensor, scheme)
        except CheckpointError as error:
            raise CheckpointError(f"{entries[f'{disk}.{self.coding.marker}'].file}: {error}") from error
        if weight.shape != (rows, columns):
            raise CheckpointError(f"{self.path}: {disk}: holds a weight of {weight.shape}, not of {(rows, columns)}")
        return weight, order


def open_coded(path: Path, *, trust_remote_code: bool = False) -> Coded:
    """Raises InputError where the weights do not fit the model, CheckpointError for a format that is not read here."""
    content = read_config(path)
    try:
        coding = find_coding(content.get("quantization_config"))
    except CheckpointError as error:
        raise CheckpointError(f"{path / CONFIG_NAME}: {error}") from error

    quantized_cache = coding.format == compressed_tensors.METHOD and parse_cache(content["quantization_config"])
    leaves = tuple(f".{leaf}" for leaf in kvcache.LEAVES.values()) if quantized_cache else ()

    def logical(shards: Shards, dtype: torch.dtype) -> Logical:
        return _logical(shards, coding, dtype, apart=tuple(name for name in shards.entries if name.endswith(leaves)))

    components = resolve_components(path, trust_remote_code=trust_remote_code, logical=logical)
    coded = [one.name for one in components.parameters if not one.copyable]
    kinds = {name: kind.__name__ for name, kind in components.modules.items()}
    found = coding.schemes(kinds, {name.removesuffix(".weight") for name in coded})
    schemes: dict[str, Scheme] = {}
    for name in coded:
        scheme = found.get(name.removesuffix(".weight"))
        if scheme is None:
            raise CheckpointError(
                f"{path / CONFIG_NAME}: quantization_config has no scheme for {name}, which is stored as codes"
            )
        schemes[name] = scheme
    if not schemes:
        raise CheckpointError(f"{path}: no weight in it is stored as codes, whatever quantization_config says")
    cache_scales = tuple(name for name in components.shards.entries if name.endswith(leaves))
    if quantized_cache and not cache_scales:
        raise CacheScaleError(f"{path}: has a kv_cache_scheme and no scales for it, so that engines take 1.0")
    return Coded(path, coding, components, schemes, cache_scales)


def is_foreign(path: Path) -> bool:
    """Whether a directory holds codes in a format of ours, and no manifest of ours."""
    if (path / MANIFEST_NAME).exists() or not (path / CONFIG_NAME).is_file():
        return False
    quantization = read_config(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") in PACKED_METHODS


def _logical(shards: Shards, coding: Coding, dtype: torch.dtype, *, apart: tuple[str, ...]) -> Logical:
    """The tensors as those of an unquantized model: one weight for all that lies on disk of a module's codes.

    apart: tensors that no such model has.
    """
    entries = shards.entries
    coded = coding.coded(entries, shards.read)
    parts: dict[str, set[str]] = {module: set() for module in coded}
    for name in entries:
        module, _, leaf = name.rpartition(".")
        if module in parts and leaf in coding.leaf_names:
            parts[module].add(name)
    taken = {name for names in parts.values() for name in names}
    tensors = {
        name: Lazy.of(Stored(name), one.shape, one.dtype)
        for name, one in entries.items()
        if name not in taken and name not in apart
    }
    for module, shape in coded.items():
        name = f"{module}.weight"
        if name in tensors:
            raise InputError(f"{entries[name].file}: {shown(module)} is there both as codes and as a weight")
        tensors[name] = Lazy.of(Codes(name, parts=frozenset(parts[module])), shape, dtype)
    return Logical(tensors, {name: entries[name].nbytes for name in taken}, apart)


def with_plain_zeros(coded: Coded) -> Coded:
    """The same, with schemes that say symmetric where all zero points of the checkpoint are in the middle."""
    if all(scheme.symmetric for scheme in coded.schemes.values()):
        return coded
    if not all(coded.coding.zeros_in_the_middle(coded.module(name), coded.tensor) for name in coded.schemes):
        return coded
    schemes = {name: scheme.model_copy(update={"symmetric": True}) for name, scheme in coded.schemes.items()}
    return replace(coded, schemes=schemes)


def check_coded(path: Path) -> Iterator[str]:
    """Everything wrong with a checkpoint that has no manifest of ours, one line each.

    Headers and index, that weights and config belong together, and every weight's codes, scales, zero points and
    order of inputs.
    """
    try:
        coded = open_coded(path)
    except CacheScaleError as error:
        yield kvcache.CacheScaleProblem(error)
        return
    except VlmquantError as error:
        yield str(error)
        return
    components = coded.components
    for name in coded.cache_scales:
        if problem := scale_problem(coded.tensor(name)):
            yield kvcache.CacheScaleProblem(f"{components.shards.entries[name].file}: tensor {shown(name)} {problem}")
    if strangers := [name for name in components.ignored if name not in coded.cache_scales]:
        yield f"{path}: tensors that belong to nothing: {some(strangers)}"
    for parameter in components.parameters:
        signals.check()
        try:
            if parameter.name in coded.schemes:
                coded.read(parameter.name)
            elif parameter.loaded:
                components.read(parameter.name)
        except VlmquantError as error:
            yield str(error)
