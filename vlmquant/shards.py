"""Safetensors files of a model directory: headers checked in full before anything is read, tensors read with pread.

pread and not mmap: a file that shrinks while it is read is then an error with a name, and not a dead process.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmquant.errors import InputError, shown
from vlmquant.hub import only_file, refuse_misfits, why_no_weights
from vlmquant.reading import is_inside, parse_json, read_bytes, refuse_irregular

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HEADER_MAX_BYTES = 100_000_000
"""The limit of the safetensors format."""
LENGTH_BYTES = 8
"""Size of the little-endian header length a safetensors file begins with."""
NAME_CHARACTERS = 500
"""The longest name of a tensor or shard; those of models have about a hundred."""
LARGEST = 2**63
"""Sizes and offsets stay below it."""
DIMENSIONS = 64
DAMAGED = "the file is damaged; download it again"

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
    """All tensors of a model directory, by their names on disk.

    rounded: tensors that are read in another dtype than they lie in.
    """

    def __init__(self, entries: dict[str, TensorEntry], rounded: Mapping[str, torch.dtype] | None = None) -> None:
        self.entries, self.rounded = entries, dict(rounded or {})

    @property
    def total_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in the order of their names."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives a tensor in."""
        return self.rounded.get(name, self.entries[name].dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or these entries of its first dimension (a slice with start and stop).

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
        return raw.view(entry.dtype).reshape(shape).to(self.dtype(name))


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def open_shards(model_dir: Path) -> Shards:
    """Read and check every header, and the index against them. InputError names the file and what is wrong."""
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such directory; give the directory of a model in safetensors format")
    refuse_misfits(model_dir)
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
            f"{index}: names {len(missing)} of {len(names)} shards that are not there: {some(missing, most=20)}; "
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
    refuse_irregular(file)
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
    header = _object(text, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file}: __metadata__ is no mapping of texts to texts; {DAMAGED}")
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
    _check_name(name, "tensor", file)
    where = f"{file}: tensor {name}"
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} is described by neither more nor less than dtype, shape and data_offsets")
    kind, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"{where} has dtype {shown(repr(kind))}; known: {', '.join(DTYPES)}")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2 and len(shape) <= DIMENSIONS):
        raise InputError(f"{where} has shape {_told(shape)} and data_offsets {_told(offsets)}; {DAMAGED}")
    dtype = DTYPES[kind]
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        raise InputError(f"{where} of shape {_told(shape)} has no elements, so it is no weight; {DAMAGED}")
    if offsets[1] - offsets[0] != nbytes:
        raise InputError(
            f"{where} of shape {_told(shape)} and dtype {kind} takes {shown(nbytes)} bytes, "
            f"but its offsets {offsets} span {offsets[1] - offsets[0]}; {DAMAGED}"
        )
    return TensorEntry(name, dtype, tuple(shape), nbytes, file, data_start + offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < LARGEST for item in value)


def _told(value: Any) -> str:
    """A value of a header, which may be anything, for a message."""
    if isinstance(value, list):
        return f"[{some(map(_told, value), most=8)}]"
    return shown(repr(value)) if not isinstance(value, int) or abs(value) < 10**100 else "a number of many digits"


def _check_name(name: str, what: str, file: Path) -> None:
    """Names go into messages, tables and the names of files; no model has any that are not plain."""
    if not name.isprintable() or not 0 < len(name) <= NAME_CHARACTERS:
        raise InputError(
            f"{file}: {what} name {shown(name)!r} ({len(name):,} characters) is empty, longer than {NAME_CHARACTERS} "
            f"characters or not printable; {DAMAGED}"
        )


def _read_index(index: Path) -> dict[str, str]:
    """The weight map of an index: tensor name -> plain name of a safetensors file in the same directory."""
    weight_map = _object(read_bytes(index), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; the index is damaged")
    for name, shard in weight_map.items():
        _check_name(name, "tensor", index)
        if (
            not isinstance(shard, str)
            or shard != Path(shard).name
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise InputError(
                f"{index}: puts tensor {name} into {_told(shard)}; a shard is a .safetensors file beside the index, "
                "without any directory in its name"
            )
        _check_name(shard, "shard", index)
    return weight_map


def _inside(model_dir: Path, name: str) -> Path:
    """The file of that name; refused where a link leads out of the model, except into the blobs of the hub's cache."""
    file = model_dir / name
    if not is_inside(file, model_dir):
        raise InputError(
            f"{file}: is a symbolic link that leads out of the model directory; copy the file in its place"
        )
    return file


def _object(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = parse_json(text.decode("utf-8"), where=str(file), remedy="download it again")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: damaged: not UTF-8 text ({error.reason}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object; the file is damaged")
    return value


def some(names: Iterable[str], *, most: int = 5) -> str:
    """A long list of names, cut short: "a, b and 7 more"."""
    names = list(names)
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
