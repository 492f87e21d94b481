"""Reading a checkpoint back: its manifest, and every check that needs no forward pass."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlmquant.checkpoint.files import sha256_of
from vlmquant.errors import CheckpointError, InputError
from vlmquant.formats import compressed_tensors
from vlmquant.recipe import Scheme
from vlmquant.shards import INDEX_NAME, Shards, open_shards

MANIFEST_NAME = "vlmquant.json"
MANIFEST_VERSION = 1


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`. CheckpointError where it is missing, damaged or of another version."""
    file = path / MANIFEST_NAME
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{file}: missing; {path} is no checkpoint that vlmquant finished") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy or write the checkpoint again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{file}: has no format_version; copy or write the checkpoint again")
    if version > MANIFEST_VERSION:
        raise CheckpointError(
            f"{file}: format version {version} is newer than the {MANIFEST_VERSION} this vlmquant reads; upgrade it"
        )
    if version < MANIFEST_VERSION:
        raise CheckpointError(
            f"{file}: format version {version} is older than the {MANIFEST_VERSION} this vlmquant reads; "
            "quantize the model again"
        )
    if missing := [key for key in ("files", "plan", "disk_names", "dtype", "recipe") if key not in manifest]:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}; copy or write the checkpoint again")
    return dict(manifest)


def verify_checkpoint(path: Path) -> list[str]:
    """Everything wrong with a checkpoint's files, one line each; empty where all is well.

    Checks sizes and sha256 of all files, headers and index, every tensor's presence, shape and dtype against the plan,
    and that scales are finite and above 0. CheckpointError where there is no manifest to check against.
    """
    manifest = read_manifest(path)
    problems = list(_file_problems(path, manifest["files"]))
    try:
        shards = open_shards(path)
    except InputError as error:
        return [*problems, str(error)]
    problems += _index_problems(path, shards)
    if manifest["recipe"]["output"]["format"] == "compressed-tensors":
        problems += _tensor_problems(path, shards, manifest)
    return problems


def _file_problems(path: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            yield f"{file}: missing"
        elif (size := file.stat().st_size) != expected["bytes"]:
            yield f"{file}: {size} bytes, but {expected['bytes']} were written"
        elif sha256_of(file) != expected["sha256"]:
            yield f"{file}: sha256 differs from the manifest; its content has changed since it was written"
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in files:
            yield f"{file}: not in the manifest"


def _index_problems(path: Path, shards: Shards) -> Iterator[str]:
    index = path / INDEX_NAME
    if index.is_file():
        total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        if total != shards.total_bytes:
            yield f"{index}: total_size is {total}, but the tensors have {shards.total_bytes} bytes"


def _tensor_problems(path: Path, shards: Shards, manifest: dict[str, Any]) -> Iterator[str]:
    entries = shards.entries
    expected: set[str] = set()
    for line in manifest["plan"]["lines"]:
        disk = manifest["disk_names"][line["name"]]
        shape = tuple(line["shape"])
        if line["name"] in manifest.get("copied", {}) and manifest["copied"][line["name"]] != [disk]:
            expected |= set(manifest["copied"][line["name"]])
            continue
        if line["action"] == "keep":
            expected.add(disk)
            if disk in entries and entries[disk].shape != shape:
                yield f"{path}: tensor {disk} has shape {list(entries[disk].shape)}, planned {list(shape)}"
            continue
        parts = compressed_tensors.encoded_shapes(
            disk.removesuffix(".weight"),
            shape,
            Scheme.model_validate(line["scheme"]),
            getattr(torch, manifest["dtype"]),
        )
        expected |= parts.keys()
        for name, (dtype, part) in parts.items():
            if name not in entries:
                continue
            entry = entries[name]
            if (entry.dtype, entry.shape) != (dtype, tuple(part)):
                found = f"{entry.dtype} {list(entry.shape)}"
                yield f"{path}: tensor {name} is {found}, its scheme needs {dtype} {list(part)}"
            elif name.endswith("_scale"):
                scales = shards.read(name)
                if bad := int(scales.numel() - (scales.isfinite() & (scales > 0)).sum()):
                    yield f"{entry.file}: tensor {name} has {bad} scales that are not finite numbers above 0"
    yield from (f"{path}: tensor {name} is missing" for name in sorted(expected - entries.keys()))
    yield from (f"{path}: tensor {name} is in no plan" for name in sorted(entries.keys() - expected))
