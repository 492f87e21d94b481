"""Records of folders and archives: images with metadata, images with text files beside them, webdataset shards."""

import os
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vlmquant.calibration.sources.files import (
    MAX_RECORD_BYTES,
    Items,
    opened,
    read_json_records,
    read_table_records,
    unpacked,
)
from vlmquant.calibration.sources.places import SUFFIXES
from vlmquant.calibration.sources.spec import BadRecord, Record, SourceSpec
from vlmquant.calibration.sources.tables import read_parquet_records
from vlmquant.errors import InputError, first_line, shown
from vlmquant.reading import is_inside, parse_json, read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_SUFFIXES = (".txt", ".caption", ".json")
"""Of a file that says what the image of the same name shows."""
MAX_TEXT_BYTES = 10_000_000
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_FILES = 5_000_000
"""Of a folder."""


def files_below(folder: Path, *, allow_outside: bool) -> list[Path]:
    """All files of a folder in order of their names, hidden ones left out; links out of it are refused.

    Images are left to the one who reads them: each costs its own record.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for home, folders, names in os.walk(folder, followlinks=allow_outside):
        if os.path.realpath(home) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(home))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(home) / name for name in sorted(names) if not name.startswith(".")]
        for path in (*(Path(home) / name for name in folders), *files):
            if path.suffix.lower() not in SUFFIXES:
                refuse_outside(path, folder, allow_outside=allow_outside)
        found += files
        if len(found) > MAX_FILES:
            raise InputError(f"{folder}: holds more than {MAX_FILES:,} files; name the one to read")
    return found


def refuse_outside(path: Path, folder: Path, *, allow_outside: bool) -> None:
    """InputError for a link that leads out of the folder of a source."""
    if not allow_outside and os.path.islink(path) and not is_inside(path, folder):
        raise InputError(f"{path}: is a link that leads out of {folder}; copy it inside, or say --allow-outside")


def metadata_of(folder: Path, split: str) -> Path | None:
    """The metadata file of an image folder: its own, or that of the split's folder in it."""
    places = (folder, folder / split)
    return next((place / name for place in places for name in METADATA if os.path.lexists(place / name)), None)


def read_imagefolder_records(spec: SourceSpec, folder: Path, scratch: Path) -> Items:
    """A folder of images with metadata.jsonl, .csv or .parquet, whose `file_name` starts from the folder."""
    path = metadata_of(folder, spec.split)
    if path is None:
        raise InputError(f"{folder}: neither of {', '.join(METADATA)} is in this image folder")
    refuse_outside(path, folder, allow_outside=spec.allow_outside)
    if path.suffix == ".jsonl":
        yield from read_json_records(spec, path, path.parent)
    elif path.suffix == ".csv":
        yield from read_table_records(spec, path, path.parent, tabs=False)
    else:
        yield from read_parquet_records([path], path.parent)


def pairs(files: list[Path]) -> tuple[list[tuple[Path, Path | None]], list[Path]]:
    """(image, the text file of its name), and text files of no image."""
    texts: dict[Path, Path] = {}
    for suffix in reversed(TEXT_SUFFIXES):
        texts |= {file.with_suffix(""): file for file in files if file.suffix.lower() == suffix}
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    stems = {image.with_suffix("") for image in images}
    return [(image, texts.get(image.with_suffix(""))) for image in images], [
        text for stem, text in texts.items() if stem not in stems
    ]


def read_pair_records(spec: SourceSpec, folder: Path, scratch: Path) -> Items:
    """Images, each with its caption, or a record in JSON, in a file of the same name beside it."""
    together, alone = pairs(files_below(folder, allow_outside=spec.allow_outside))
    for image, text in together:
        where = shown(image)
        if text is None:
            yield BadRecord(where, "without a text file of the same name")
            continue
        try:
            content = read_text(text, max_bytes=MAX_TEXT_BYTES)
            said = parse_json(content, where=str(text)) if text.suffix == ".json" else content
        except InputError as error:
            yield BadRecord(where, f"unreadable: {shown(error)}")
            continue
        fields = {**said} if isinstance(said, dict) else {"caption": said}
        yield Record(where, {**fields, "image": image.relative_to(folder).as_posix()}, folder)
    for text in alone:
        yield BadRecord(shown(text), "without an image of the same name")


# webdataset


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive by its name."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def read_webdataset_records(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    """Shards of a webdataset: members of one name up to its first dot are one record, their endings its keys."""
    if path.is_dir():
        shards = [file for file in files_below(path, allow_outside=spec.allow_outside) if is_tar(file)]
    else:
        shards = [path]
    if not shards:
        raise InputError(f"{path}: no .tar file in this folder")
    for shard in shards:
        yield from _shard(shard, unpacked(shard, scratch))


def _shard(shard: Path, path: Path) -> Items:
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    with opened(path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.issparse():
                        raise InputError(f"{shard}: member {shown(member.name)} is stored with holes; pack it again")
                    if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
                        home, slash, name = member.name.rpartition("/")
                        stem, _, ending = name.partition(".")
                        parts = groups.setdefault(shown(f"{home}{slash}{stem}"), {})
                        if ending.lower() in parts:
                            raise InputError(f"{shard}: member {shown(member.name)} stands twice")
                        parts[ending.lower()] = (member.offset_data, member.size)
        except InputError:
            raise
        except Exception as error:  # tarfile's own, and whatever damaged numbers lead to
            raise InputError(f"{shard}: cannot be read as a tar archive: {shown(first_line(error))}") from error
    for name, parts in groups.items():
        where = f"{shard} {name}"
        try:
            again = partial(_member_fields, path, parts)
            yield Record(where, {"__key__": name, **again()}, shard.parent, again)
        except InputError as error:
            yield BadRecord(where, f"unreadable: {shown(error)}")


def _member_fields(path: Path, parts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The record in some members: texts, the keys of a JSON object, and bytes."""
    fields: dict[str, Any] = {}
    for ending, (offset, size) in parts.items():
        if size > MAX_RECORD_BYTES:
            raise InputError(f"member .{shown(ending)} has {size:,} bytes; at most {MAX_RECORD_BYTES:,} are read")
        with opened(path) as stream:
            stream.seek(offset)
            content = stream.read(size)
        if ending == "json":
            value = parse_json(content, where=".json")
            fields = {**value, **fields} if isinstance(value, dict) else {**fields, "json": value}
        elif ending in ("txt", "text", "caption", "cls", "question", "answer"):
            try:
                fields[ending] = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"member .{ending} is no UTF-8 text ({error.reason})") from error
        else:
            fields[ending] = content
    return fields
