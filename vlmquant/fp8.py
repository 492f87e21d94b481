"""FP8 checkpoints as sources: which config means one, and the weights that its values and scales stand for.

Two kinds are read, both as float8_e4m3fn values times scales: transformers' own (`quant_method: fp8`, as Qwen,
DeepSeek and Mistral publish; its `weight_scale_inv` multiplies, whatever the name says) and compressed-tensors'
(float-quantized). A scale holds for a whole weight, a row, or a block of rows and columns; the blocks at the edges may
be partial. Scales of activations and of the key-value cache are left aside: they are no part of a weight.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vlmquant.conversion import Lazy, Read, Stored
from vlmquant.errors import InputError, shown
from vlmquant.grid import E4M3
from vlmquant.reading import check
from vlmquant.shards import Shards, TensorEntry, dtype_name, some

METHOD = "fp8"
COMPRESSED_TENSORS = "compressed-tensors"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where a config says how the weights are stored: today's key and compressed-tensors' first one."""
FLOAT_FORMATS = ("float-quantized", "naive-quantized")
"""compressed-tensors' formats that store FP8 values as they are."""
STRATEGIES = ("tensor", "channel", "block")
DEFAULT_BLOCK = (128, 128)
"""transformers' weight_block_size where the config names none."""
SCALE_ENDINGS = {METHOD: ("_scale_inv", "_scale"), COMPRESSED_TENSORS: ("_scale",)}
"""What is put behind a weight's name to get that of its scale; `_scale` under `fp8` is AutoFP8's."""
ACTIVATION_LEAVES = ("input_scale", "output_scale", "activation_scale", "input_zero_point", "output_zero_point")
"""What may stand beside an FP8 weight and says nothing about it."""
CACHE_LEAVES = ("k_scale", "v_scale", "q_scale")
"""Scales of the key-value cache, beside an attention or one of its projections."""
ROWS = 128
"""So many rows are in memory in float32 at a time."""
WAY_OUT = "start from the unquantized model, or from its FP8 release"


@dataclass(frozen=True)
class Source:
    """How the FP8 weights of a checkpoint are stored."""

    method: str
    block: tuple[int, int] | None
    """Rows and columns that share a scale, where scales are per block."""
    channels: bool
    """Whether a scale may hold for a row."""

    @property
    def label(self) -> str:
        """Such as "FP8 (fp8, blocks of 128 x 128)"."""
        if self.block:
            return f"FP8 ({self.method}, blocks of {self.block[0]} x {self.block[1]})"
        return f"FP8 ({self.method}, {'a scale per row' if self.channels else 'a scale per tensor'})"


@dataclass(frozen=True, kw_only=True)
class Dequantized(Stored):
    """An FP8 weight (rows, columns) or (experts, rows, columns) times its scale, or a part along its first dimension.

    Products are made in float32 and rounded once, to `dtype`.
    """

    shape: tuple[int, ...]
    """Of the whole weight."""
    scale: TensorEntry
    block: tuple[int, int]
    """Rows and columns that share a scale; those of the whole weight where there is only one."""
    dtype: torch.dtype

    def value(self, read: Read) -> Tensor:
        start, stop = (self.rows.start, self.rows.stop) if self.rows else (0, self.shape[0])
        values = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        if len(self.shape) == 2:
            self._fill(values, read, start)
        for place in range(stop - start if len(self.shape) == 3 else 0):
            self._fill(values[place], read, 0, expert=start + place)
        return values

    def _fill(self, values: Tensor, read: Read, start: int, expert: int | None = None) -> None:
        """Put the weight's rows from `start` on into `values` (rows, columns)."""
        height, width = self.block
        first, columns = start // height, values.shape[1]
        scales = self._scales(read, slice(first, -(-(start + len(values)) // height)), expert)
        for low in range(0, len(values), ROWS):
            high = min(low + ROWS, len(values))
            if expert is None:
                part = read(self.name, slice(start + low, start + high)).float()
            else:
                part = read(self.name, slice(expert, expert + 1))[0, low:high].float()
            factors = scales[torch.arange(start + low, start + high) // height - first]
            if factors.shape[1] > 1:
                factors = factors.repeat_interleave(width, 1)[:, :columns]
            values[low:high] = part.mul_(factors)

    def _scales(self, read: Read, rows: slice, expert: int | None) -> Tensor:
        """(rows of blocks, columns of blocks) in float32, of these rows of blocks."""
        height, width = self.block
        count, across = -(-self.shape[-2] // height), -(-self.shape[-1] // width)
        whole = self.scale.shape
        if expert is not None and len(whole) > 0 and whole[0] == self.shape[0]:
            scales = read(self.scale.name, slice(expert, expert + 1))
        elif expert is None and len(whole) > 0 and whole[0] == count:
            scales, rows, count = read(self.scale.name, rows), slice(None), rows.stop - rows.start
        else:
            scales = read(self.scale.name, None)
        scales = scales.float()
        if bad := int(scales.numel() - scales.isfinite().sum()):
            raise InputError(
                f"{self.scale.file}: scale {self.scale.name} holds {bad} values that are NaN or infinite; the model is "
                "damaged, so download it again"
            )
        return scales.reshape(count, across)[rows]


@dataclass(frozen=True)
class Logical:
    """The tensors of a checkpoint as if it were not quantized."""

    tensors: dict[str, Lazy]
    scaled: dict[str, int]
    """The weights among them that are FP8 on disk -> their bytes there, scales included."""
    dropped: tuple[str, ...]
    """Names on disk of scales that belong to no weight."""


def find_source(config: Mapping[str, Any], file: Path) -> Source | None:
    """What a config.json says; None for an unquantized model. InputError for weights quantized in another way."""
    found = [_source(quantization, file) for quantization in quantization_of(config).values()]
    if len(set(found)) > 1:
        raise InputError(f"{file}: already quantized, in {len(set(found))} ways at once; {WAY_OUT}")
    return found[0] if found else None


def quantization_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All that a config and its parts say of quantization, by the path of the key."""
    found = {f"{prefix}{key}": config[key] for key in QUANTIZATION_KEYS if config.get(key)}
    for key, value in config.items():
        if isinstance(value, dict) and key not in QUANTIZATION_KEYS:
            found |= quantization_of(value, f"{prefix}{key}.")
    return found


class _Weights(BaseModel):
    """How the weights of a group are stored, as far as we read it."""

    model_config = ConfigDict(strict=True)
    num_bits: int | None = None
    type: str | None = None
    symmetric: bool = True
    strategy: str | None = None
    block_structure: str | list[Any] | None = None


class _Group(BaseModel):
    model_config = ConfigDict(strict=True)
    weights: _Weights | None = None
    format: str | None = None


class _Quantization(BaseModel):
    model_config = ConfigDict(strict=True)
    config_groups: dict[str, _Group] | None = None
    format: str | None = None


def _source(quantization: Any, file: Path) -> Source:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == METHOD:
        block = quantization.get("weight_block_size", DEFAULT_BLOCK)
        return Source(METHOD, _block(block, "weight_block_size", file) if block is not None else None, False)
    if method != COMPRESSED_TENSORS:
        raise InputError(f"{file}: already quantized ({shown(method)}); {WAY_OUT}")
    read: _Quantization = check(_Quantization, quantization, where=f"{file}: already quantized", remedy=WAY_OUT)
    groups = [group for group in (read.config_groups or {}).values() if group.weights]
    blocks, strategies = set(), set()
    for group in groups:
        weights = group.weights
        assert weights is not None
        kept_as = group.format or read.format
        taken = (
            weights.type == "float"
            and weights.num_bits == 8
            and weights.symmetric
            and weights.strategy in STRATEGIES
            and kept_as in (None, *FLOAT_FORMATS)
        )
        if not taken:
            kind = shown(f"{weights.num_bits}-bit {weights.type}, {kept_as}")
            raise InputError(f"{file}: already quantized ({method}, {kind}); {WAY_OUT}")
        strategies.add(weights.strategy)
        if weights.strategy == "block":
            blocks.add(_block(weights.block_structure, "block_structure", file))
    if len(blocks) > 1 or not groups:
        why = "with blocks of several sizes" if groups else "by a config without groups"
        raise InputError(f"{file}: already quantized ({method}, {why}); {WAY_OUT}")
    return Source(method, blocks.pop() if blocks else None, "channel" in strategies)


def _block(value: Any, key: str, file: Path) -> tuple[int, int]:
    if (pair := block_of(value)) is None:
        raise InputError(
            f"{file}: {key} is {shown(repr(value))}, which is no pair of rows and columns; the config is damaged"
        )
    return pair


def block_of(value: Any) -> tuple[int, int] | None:
    """Rows and columns that a config says share a scale; None for what is no such pair."""
    if isinstance(value, str):  # compressed-tensors once wrote "128x128"
        value = [int(size) if re.fullmatch("[0-9]{1,9}", size) else 0 for size in value.split("x")]
    pair = isinstance(value, list | tuple) and len(value) == 2
    return (value[0], value[1]) if pair and all(type(size) is int and size > 0 for size in value) else None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of how the weights are stored, in none of its parts."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def forget_quantization(config: Any) -> Any:
    """Have transformers' config object, and those inside it, say nothing of how the weights are stored."""
    for key in QUANTIZATION_KEYS:
        vars(config).pop(key, None)
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            forget_quantization(part)
    return config


def logical_tensors(shards: Shards, source: Source, dtype: torch.dtype) -> Logical:
    """Every tensor but the scales; an FP8 weight has `dtype`, every other one is as it lies on disk.

    InputError names a weight without a scale, a scale without a weight, and a scale that does not fit its weight.
    """
    entries = shards.entries
    scales: dict[str, TensorEntry] = {}
    for entry in entries.values():
        if entry.dtype == E4M3:
            scales[entry.name] = _scale_of(entry, entries, source)
        elif entry.dtype.is_floating_point and entry.dtype.itemsize == 1:
            raise InputError(
                f"{entry.file}: tensor {entry.name} is {dtype_name(entry.dtype)}; of FP8 only float8_e4m3fn is read"
            )
    consumed = {scale.name for scale in scales.values()}
    dropped = tuple(name for name in entries if name not in consumed and _is_dropped(name, scales))
    orphans = [name for name in entries if name not in consumed and _is_orphan(name)]
    if orphans:
        weight = _weight_of(orphans[0])
        there = f"{weight} is {dtype_name(entries[weight].dtype)}" if weight in entries else f"there is no {weight}"
        raise InputError(
            f"{entries[orphans[0]].file}: {len(orphans)} scales have no FP8 weight: {some(orphans)} ({there}); is the "
            "download complete?"
        )
    tensors, scaled = {}, {}
    for name, entry in entries.items():
        if name in scales:
            block = _block_of(entry, scales[name], source)
            made = Dequantized(name, shape=entry.shape, scale=scales[name], block=block, dtype=dtype)
            tensors[name] = Lazy.of(made, entry.shape, dtype)
            scaled[name] = entry.nbytes + scales[name].nbytes
        elif name not in consumed and name not in dropped:
            tensors[name] = Lazy.of(Stored(name), entry.shape, entry.dtype)
    return Logical(tensors, scaled, dropped)


def _is_dropped(name: str, scales: Mapping[str, TensorEntry]) -> bool:
    module, _, leaf = name.rpartition(".")
    stacked = name.removesuffix("_activation_scale")
    return leaf in CACHE_LEAVES or (leaf in ACTIVATION_LEAVES and f"{module}.weight" in scales) or stacked in scales


def _is_orphan(name: str) -> bool:
    return name.endswith((".weight_scale", "_scale_inv"))


def _weight_of(scale: str) -> str:
    return scale.removesuffix("_inv").removesuffix("_scale")


def _scale_of(weight: TensorEntry, entries: Mapping[str, TensorEntry], source: Source) -> TensorEntry:
    """The one scale of an FP8 weight."""
    names = [f"{weight.name}{ending}" for ending in SCALE_ENDINGS[source.method]]
    found = [entries[name] for name in names if name in entries]
    if len(found) != 1:
        how = f"no scale ({' or '.join(names)})" if not found else f"two scales ({' and '.join(names)})"
        raise InputError(f"{weight.file}: FP8 tensor {weight.name} has {how}; is the download complete?")
    if not found[0].dtype.is_floating_point or found[0].dtype == E4M3:
        raise InputError(
            f"{found[0].file}: scale {found[0].name} is {dtype_name(found[0].dtype)}; floating point is expected"
        )
    return found[0]


def _block_of(weight: TensorEntry, scale: TensorEntry, source: Source) -> tuple[int, int]:
    """Rows and columns of the weight that share a scale. InputError where the scale's shape is not the config's."""
    if len(weight.shape) not in (2, 3):
        raise InputError(
            f"{weight.file}: FP8 tensor {weight.name} has shape {list(weight.shape)}; a matrix or a stack of them is "
            "expected"
        )
    fitting = dict(_shapes(weight.shape, source))
    if scale.shape not in fitting:
        wanted = " or ".join(str(list(shape)) for shape in fitting)
        raise InputError(
            f"{scale.file}: scale {scale.name} has shape {list(scale.shape)}, but that of {weight.name} "
            f"{list(weight.shape)} as {source.label} is {wanted}; does config.json belong to these weights?"
        )
    return fitting[scale.shape]


def _shapes(weight: tuple[int, ...], source: Source) -> Iterator[tuple[tuple[int, ...], tuple[int, int]]]:
    """Every shape that the scale of a weight may have -> the block that it then speaks of."""
    *experts, rows, columns = weight
    if source.block:
        height, width = source.block
        yield (*experts, -(-rows // height), -(-columns // width)), source.block
        if experts and rows <= height and rows % 2 == 0:  # transformers gives the halves of gate_up_proj one each
            yield (*experts, 2, -(-columns // width)), (rows // 2, width)
    if source.channels:
        yield (*experts, rows, 1), (1, columns)
        yield (*experts, rows), (1, columns)
    if experts:
        yield (*experts, 1, 1), (rows, columns)
        yield (*experts, 1), (rows, columns)
        yield (*experts,), (rows, columns)
        if rows % 2 == 0 and not source.block:
            yield (*experts, 2, 1), (rows // 2, columns)
    for one in ((), (1,), (1, 1)):
        yield one, (rows, columns)
