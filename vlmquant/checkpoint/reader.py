"""Checking a checkpoint: everything that needs no forward pass."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmquant import kvcache
from vlmquant.checkpoint.files import sha256_of
from vlmquant.checkpoint.manifest import MANIFEST_NAME, MANIFEST_VERSION, parse_manifest, read_manifest, seal_problem
from vlmquant.checkpoint.ownership import unlisted
from vlmquant.components import CONFIG_NAME
from vlmquant.errors import InputError, shown
from vlmquant.formats import FORMATS, compressed_tensors, name_of
from vlmquant.grid import scale_problem
from vlmquant.reading import is_inside, read_json
from vlmquant.recipe import Recipe, Scheme
from vlmquant.shards import INDEX_NAME, Shards, open_shards

__all__ = ["MANIFEST_NAME", "MANIFEST_VERSION", "read_manifest", "verify_checkpoint"]


def verify_checkpoint(path: Path) -> list[str]:
    """Everything wrong with a checkpoint's files, one line each; empty where all is well.

    Checks that the manifest is as it was written; sizes and sha256 of all files in it, and that there are no others but
    hidden ones; headers and index; that config, recipe and plan name one format; every tensor's presence, shape and
    dtype against the plan; that scales are finite and above 0. It is no signature: who changes a checkpoint on purpose
    can seal it anew. CheckpointError where there is no manifest to check against.
    """
    manifest = parse_manifest(path)
    changed = seal_problem(path, manifest)
    problems = [changed] if changed else []
    problems += _file_problems(path, manifest["files"])
    problems += [
        f"{path / shown(name)}: not in the manifest"
        for name in unlisted(path, manifest)
        if not any(part.startswith(".") for part in Path(name).parts)
    ]
    problems += _format_problems(path, manifest)
    try:
        shards = open_shards(path)
        problems += _index_problems(path, shards)
    except InputError as error:
        return [*problems, str(error)]
    if not any(isinstance(line["scheme"], str) for line in manifest["plan"]["lines"]):
        problems += _tensor_problems(path, shards, manifest)
    return problems


def _file_problems(path: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, expected in files.items():
        file = path / name
        if not os.path.isfile(file):  # also where the name is too long for a file
            yield f"{path / shown(name)}: missing"
        elif not is_inside(file, path):
            yield f"{file}: is a symbolic link that leads out of the checkpoint"
        elif (size := file.stat().st_size) != expected["bytes"]:
            yield f"{file}: {size} bytes, but {expected['bytes']} were written"
        elif sha256_of(file) != expected["sha256"]:
            yield f"{file}: sha256 differs from the manifest; its content has changed since it was written"


def _format_problems(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Which checks apply is said in three places; they must agree."""
    written = Recipe.model_validate(manifest["recipe"]).output.format
    try:
        found = read_json(path / CONFIG_NAME).get("quantization_config")
    except InputError as error:
        yield str(error)
        return
    method = name_of(found)
    if method != written:
        yield f"{path / CONFIG_NAME}: its quant_method is {shown(method)}, but the recipe's output format is {written}"
    ours = written in FORMATS
    for line in manifest["plan"]["lines"]:
        if line["action"] == "quantize" and ours != isinstance(line["scheme"], dict):
            yield f"{path / MANIFEST_NAME}: plan: {shown(line['name'])} has a scheme that {written} does not store"


def _index_problems(path: Path, shards: Shards) -> Iterator[str]:
    index = path / INDEX_NAME
    if index.is_file():
        metadata = read_json(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != shards.total_bytes:
            yield f"{index}: total_size is {shown(total)}, but the tensors have {shards.total_bytes} bytes"


def cache_shapes(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The scales of the KV cache that a checkpoint must hold, by their names on disk."""
    cache = manifest.get("kv_cache") or {"maxima": {}}
    return {
        f"{layer['disk']}.{leaf}": (1,) if cache["strategy"] == "tensor" else (len(layer[kind]), 1, 1)
        for layer in cache["maxima"].values()
        for kind, leaf in kvcache.LEAVES.items()
    }


def _cache_problems(path: Path, shards: Shards, manifest: Mapping[str, Any]) -> Iterator[kvcache.CacheScaleProblem]:
    for name, shape in cache_shapes(manifest).items():
        entry = shards.entries.get(name)
        if entry is None:
            yield kvcache.CacheScaleProblem(f"{path}: tensor {shown(name)}, a scale of the KV cache, is missing")
        elif entry.shape != shape or not entry.dtype.is_floating_point:
            found = f"{entry.dtype} {list(entry.shape)}"
            yield kvcache.CacheScaleProblem(
                f"{path}: tensor {shown(name)} is {found}, its kv_cache needs {list(shape)}"
            )
        elif problem := scale_problem(shards.read(name)):
            yield kvcache.CacheScaleProblem(f"{entry.file}: tensor {name} {problem}")


def _tensor_problems(path: Path, shards: Shards, manifest: Mapping[str, Any]) -> Iterator[str]:
    entries = shards.entries
    written = Recipe.model_validate(manifest["recipe"]).output.format
    form = FORMATS.get(written, FORMATS[compressed_tensors.METHOD])
    scale_dtype = getattr(torch, manifest.get("scale_dtype") or manifest["dtype"])
    expected: set[str] = set()
    for line in manifest["plan"]["lines"]:
        disk = manifest["disk_names"][line["name"]]
        shape = tuple(line["shape"])
        copied = manifest["copied"].get(line["name"], [disk])
        if copied != [disk]:
            expected |= set(copied)
            continue
        if line["action"] == "keep":
            expected.add(disk)
            if disk in entries and entries[disk].shape != shape:
                yield f"{path}: tensor {shown(disk)} has shape {list(entries[disk].shape)}, planned {list(shape)}"
            continue
        parts = form.encoded_shapes(
            disk.removesuffix(".weight"), shape, Scheme.model_validate(line["scheme"]), scale_dtype
        )
        expected |= parts.keys()
        for name, (dtype, part) in parts.items():
            if name not in entries:
                continue
            entry = entries[name]
            if (entry.dtype, entry.shape) != (dtype, tuple(part)):
                found = f"{entry.dtype} {list(entry.shape)}"
                yield f"{path}: tensor {shown(name)} is {found}, its scheme needs {dtype} {list(part)}"
            elif name.endswith(("_scale", ".scales")) and (bad := compressed_tensors.bad_scales(shards.read(name))):
                yield f"{entry.file}: tensor {name} has {bad} scales that are 0 or no finite numbers"
    yield from _cache_problems(path, shards, manifest)
    yield from (f"{path}: tensor {shown(name)} is missing" for name in sorted(expected - entries.keys()))
    expected |= cache_shapes(manifest).keys()
    yield from (f"{path}: tensor {shown(name)} is in no plan" for name in sorted(entries.keys() - expected))
