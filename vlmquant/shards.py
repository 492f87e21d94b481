"""Safetensors files of a model directory: headers checked in full before anything is read, tensors read with pread.

pread and not mmap: a file that shrinks while it is read is then an error with a name, and not a dead process.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmquant.errors import InputError
from vlmquant.hub import only_file, refuse_adapter, why_no_weights

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HEADER_MAX_BYTES = 100_000_000
"""The limit of the safetensors format."""
LENGTH_BYTES = 8
"""Size of the little-endian header length a safetensors file begins with."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    start: int
    """Byte of the file where its data begins."""


class Shards:
    """All tensors of a model directory, by their names on disk."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries

    @property
    def total_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in the order of their names."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor as it lies on disk, or these entries of its first dimension (a slice with start and stop).

        InputError where the file ends early or cannot be read.
        """
        entry = self.entries[name]
        first, shape, nbytes = entry.start, entry.shape, entry.nbytes
        if rows is not None:
            row_bytes = nbytes // shape[0]
            first, nbytes = first + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        view = memoryview(raw.numpy())  # type: ignore[arg-type]  # an array is a buffer
        try:
            descriptor = os.open(entry.file, os.O_RDONLY)
            try:
                done = 0
                while done < nbytes:
                    count = os.preadv(descriptor, [view[done:]], first + done)
                    if count == 0:
                        raise InputError(
                            f"{entry.file}: ends inside tensor {name}; the file was cut short while it was being read, "
                            "so copy or download it again"
                        )
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"{entry.file}: cannot be read: {error.strerror}") from error
        return raw.view(entry.dtype).reshape(shape)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def open_shards(model_dir: Path) -> Shards:
    """Read and check every header, and the index against them. InputError names the file and what is wrong."""
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such directory; give the directory of a model in safetensors format")
    refuse_adapter(model_dir)
    index, single = model_dir / INDEX_NAME, model_dir / SINGLE_NAME
    if not index.is_file():
        name = SINGLE_NAME if single.is_file() else only_file(model_dir)
        if name is None:
            raise InputError(f"{model_dir}: {why_no_weights(model_dir)}")
        return Shards({entry.name: entry for entry in read_header(_inside(model_dir, name))})
    weight_map = _read_index(index)
    if single.is_file() and SINGLE_NAME not in weight_map.values():
        raise InputError(
            f"{model_dir}: holds both {SINGLE_NAME} and an index of other shards; remove the one not meant"
        )
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (model_dir / name).is_file()]:
        raise InputError(
            f"{index}: names {len(missing)} of {len(names)} shards that are not there: {', '.join(missing)}; "
            "download the model again"
        )
    entries: dict[str, TensorEntry] = {}
    for name in names:
        for entry in read_header(_inside(model_dir, name)):
            if weight_map.get(entry.name) != name:
                listed = weight_map.get(entry.name)
                says = f"says that it is in {listed}" if listed else "does not list it"
                raise InputError(
                    f"{model_dir / name}: holds tensor {entry.name}, but the index {says}; download the model again"
                )
            entries[entry.name] = entry
    if absent := [key for key in weight_map if key not in entries]:
        raise InputError(
            f"{index}: lists {some(absent)} in {weight_map[absent[0]]}, which does not hold it; download it again"
        )
    return Shards(entries)


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in the order of their data, after all checks of its header."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(LENGTH_BYTES)
            if len(start) < LENGTH_BYTES:
                raise InputError(f"{file}: {size} bytes is too short for a safetensors file; download it again")
            length = int.from_bytes(start, "little")
            if length > min(HEADER_MAX_BYTES, size - LENGTH_BYTES):
                raise InputError(
                    f"{file}: header length {length} exceeds the file of {size} bytes or the format's limit; "
                    "the file is damaged or not safetensors"
                )
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    header = _parse_json(text, file=file)
    header.pop("__metadata__", None)
    data_start = LENGTH_BYTES + length
    entries = [_entry(name, item, file=file, data_start=data_start) for name, item in header.items()]
    entries.sort(key=lambda entry: entry.start)
    end = data_start
    for entry in entries:
        if entry.start != end:
            kind = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise InputError(f"{file}: the data of tensor {entry.name} {kind}; the file is damaged")
        end += entry.nbytes
    if size != end:
        kind = "truncated" if size < end else "has trailing bytes"
        raise InputError(f"{file}: {kind}: {end} bytes expected by its header, {size} found; download it again")
    return entries


def _entry(name: str, item: Any, *, file: Path, data_start: int) -> TensorEntry:
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{file}: tensor {name} is described by neither more nor less than dtype, shape and data_offsets"
        )
    if item["dtype"] not in DTYPES:
        raise InputError(f"{file}: tensor {name} has dtype {item['dtype']!r}; known: {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[item["dtype"]], item["shape"], item["data_offsets"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise InputError(f"{file}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}; the file is damaged")
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        raise InputError(
            f"{file}: tensor {name} of shape {shape} has no elements, so it is no weight; the file is damaged"
        )
    if offsets[1] - offsets[0] != nbytes:
        raise InputError(
            f"{file}: tensor {name} of shape {shape} and dtype {item['dtype']} takes {nbytes} bytes, "
            f"but its offsets {offsets} span {offsets[1] - offsets[0]}; the file is damaged"
        )
    return TensorEntry(name, dtype, tuple(shape), nbytes, file, data_start + offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_index(index: Path) -> dict[str, str]:
    """The weight map of an index: tensor name -> plain name of a safetensors file in the same directory."""
    try:
        content = _parse_json(index.read_bytes(), file=index)
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; the index is damaged")
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or shard != Path(shard).name
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise InputError(
                f"{index}: puts tensor {name} into {shard!r}; a shard is a .safetensors file beside the index, "
                "without any directory in its name"
            )
    return weight_map


def _inside(model_dir: Path, name: str) -> Path:
    """The file of that name; refused where a link leads out of the model, except into the blobs of the hub's cache."""
    file, root = model_dir / name, model_dir.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parent.parent / "blobs").resolve())
    if not any(file.resolve().is_relative_to(home) for home in homes):
        raise InputError(
            f"{file}: is a symbolic link that leads out of the model directory; copy the file in its place"
        )
    return file


def _parse_json(text: bytes, *, file: Path) -> dict[str, Any]:
    """A JSON object whose keys are unique at every level."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}:{error.lineno}: not valid JSON ({error.msg}); the file is damaged or truncated"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object; the file is damaged")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in values if keys.count(key) > 1)} stands twice")
    return values


def some(names: Iterable[str], *, shown: int = 5) -> str:
    """A long list, cut short: "a, b and 7 more"."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
