"""A user's own data -> candidates for a set. Containers (a file's format) give records, `records` reads their layout.

Only data is read: no dataset scripts, no pickles, no network but for a dataset id of the hub.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

from vlmquant.calibration.sets import SAMPLES, load_set
from vlmquant.calibration.sources import coco, files, folders, tables
from vlmquant.calibration.sources.files import Items
from vlmquant.calibration.sources.places import SUFFIXES
from vlmquant.calibration.sources.records import CAPTION_QUESTION, RecordReader
from vlmquant.calibration.sources.spec import (
    KEYS_SHOWN,
    ROLES,
    BadRecord,
    Candidate,
    EmbeddedImage,
    ImageSource,
    Record,
    SourceReading,
    SourceSpec,
    UnusableRecordError,
    parse_map,
)
from vlmquant.errors import InputError, UsageError, shown
from vlmquant.nearest import nearest
from vlmquant.reading import parse_json, read_text
from vlmquant.shards import some

__all__ = [
    "CAPTION_QUESTION",
    "FORMATS",
    "BadRecord",
    "Candidate",
    "EmbeddedImage",
    "ImageSource",
    "SourceReading",
    "SourceSpec",
    "detect_format",
    "parse_map",
    "parse_source",
    "read_source",
]


@dataclass(frozen=True)
class Format:
    """A container of records."""

    read: Callable[[SourceSpec, Path, Path], Items]
    """(source, its path, a folder for what must be unpacked) -> records."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role -> key, where the format fixes it."""


def _set(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    for sample in load_set(path).samples:
        yield Candidate(replace(sample, images=()), sample.images)


def _json(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    return files.read_json_records(spec, files.unpacked(path, scratch), path.parent)


def _csv(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    return files.read_table_records(spec, files.unpacked(path, scratch), path.parent, tabs=False)


def _tsv(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    return files.read_table_records(spec, files.unpacked(path, scratch), path.parent, tabs=True)


def _coco(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    return coco.read_coco_records(spec, files.unpacked(path, scratch), path)


def _parquet(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    if not path.is_dir():
        return tables.read_parquet_records([path], path.parent)
    return tables.read_parquet_records(
        _of_suffix(folders.files_below(path, allow_outside=spec.allow_outside), ".parquet"), path
    )


def _arrow(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    if not path.is_dir():
        return tables.read_arrow_records([path], path.parent)
    return tables.read_arrow_records(tables.saved_files(path, spec.split), path)


def _hub(spec: SourceSpec, path: Path, scratch: Path) -> Items:
    return tables.read_hub_records(spec)


FORMATS: dict[str, Format] = {
    "set": Format(_set),
    "jsonl": Format(_json),
    "json": Format(_json),
    "csv": Format(_csv),
    "tsv": Format(_tsv),
    "imagefolder": Format(folders.read_imagefolder_records),
    "folder": Format(folders.read_pair_records),
    "webdataset": Format(folders.read_webdataset_records),
    "coco": Format(_coco, coco.ROLES),
    "messages": Format(_json),
    "parquet": Format(_parquet),
    "arrow": Format(_arrow),
    "hub": Format(_hub),
}
"""By name, as in FORMAT:PATH."""
OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
NAMES_SHOWN = 6
"""Of files, in a message."""


def parse_source(text: str) -> SourceSpec:
    """A source in one word, as on the command line: PATH, PATH=TASK, FORMAT:PATH or FORMAT:PATH=TASK.

    What exists under the whole text is a path, whatever it looks like.
    """
    if _exists(text):
        return SourceSpec(text)
    name, colon, rest = text.partition(":")
    form, text = (name, rest) if colon and name in ("auto", *FORMATS) else ("auto", text)
    if not _exists(text) and (match := re.fullmatch(r"(.+)=([\w.-]+)", text)):
        return SourceSpec(match[1], form, match[2])
    return SourceSpec(text, form)


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(text)
    except ValueError:  # a NUL
        return False


def read_source(spec: SourceSpec, *, scratch: Path) -> SourceReading:
    """All candidates of a source, every record that could not be used, and what was read as what.

    scratch: a folder for what has to be unpacked; it must outlive the candidates.
    Raises InputError for a source that cannot be read at all, or where no record can be used.
    """
    if unknown := spec.map.keys() - set(ROLES):
        raise UsageError(f"unknown role '{shown(min(unknown))}' in a map; known: {', '.join(ROLES)}")
    spec, name = _located(spec)
    reader = RecordReader(spec, FORMATS[name].roles)
    candidates: list[Candidate] = []
    bad: list[BadRecord] = []
    ids: set[str] = set()
    for item in FORMATS[name].read(spec, Path(spec.path), scratch):
        if isinstance(item, Record):
            try:
                item = replace(reader.candidate(item), where=item.where)
            except UnusableRecordError as error:
                item = BadRecord(item.where, str(error))
        if isinstance(item, BadRecord):
            bad.append(item)
            continue
        sample = item.sample if spec.task is None else replace(item.sample, task=spec.task)
        sample = replace(sample, id=_unused(sample.id, ids))
        ids.add(sample.id)
        candidates.append(replace(item, sample=sample))
    reading = SourceReading(
        candidates,
        tuple(bad),
        {},
        name,
        reader.read_as,
        reader.unused,
        len(candidates) + len(bad),
        reader.images or sum(len(item.images) for item in candidates),
    )
    _refuse_idle_map(spec, reader.keys)
    if not candidates:
        raise InputError(_useless(spec, reading))
    return reading


def _unused(name: str, ids: Collection[str]) -> str:
    """An id, with a number behind it where it stands twice."""
    return next(made for made in chain([name], (f"{name}-{number}" for number in count(2))) if made not in ids)


def detect_format(spec: SourceSpec) -> str:
    """The key of FORMATS that fits a path. Raises InputError if none does."""
    return _located(spec)[1]


def _located(spec: SourceSpec) -> tuple[SourceSpec, str]:
    """A source with the file to read, and its format."""
    path = Path(spec.path)
    if spec.format != "auto":
        if spec.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"{spec.path}: unknown format '{shown(spec.format, limit=60)}'; known: auto, {known}")
        if spec.format != "hub" and not _exists(spec.path):
            raise InputError(_absent(spec.path))
        return spec, spec.format
    if not _exists(spec.path):
        if not _is_hub_id(spec.path):
            raise InputError(_absent(spec.path))
        return spec, "hub"
    if not path.is_dir():
        return spec, _file_format(path)
    found = folders.files_below(path, allow_outside=spec.allow_outside)
    if name := _folder_format(path, found, spec.split):
        return spec, name
    records = [file for file in found if _suffix(file) in OF_SUFFIX]
    if len(records) == 1:
        return replace(spec, path=str(records[0])), _file_format(records[0])
    if records:
        names = [file.relative_to(path).as_posix() for file in records]
        raise InputError(
            f"{spec.path}: holds {len(records)} files of records ({some(names, most=NAMES_SHOWN)}); name one of them"
        )
    kinds = Counter(_suffix(file) or "no suffix" for file in found)
    held = (
        ", ".join(f"{count} x {shown(kind, limit=20)}" for kind, count in kinds.most_common(NAMES_SHOWN)) or "no file"
    )
    raise InputError(
        f"{spec.path}: cannot tell its format: holds {held}, and no metadata.jsonl, .csv or .parquet, no file of "
        "records and no images with text files of the same names; name the format as FORMAT:PATH, one of "
        f"{', '.join(FORMATS)}"
    )


def _file_format(path: Path) -> str:
    name = OF_SUFFIX.get(_suffix(path))
    if name is None:
        raise InputError(
            f"{path}: cannot tell its format by its suffix (known: {', '.join(OF_SUFFIX)}, and these with .gz); "
            f"name it as FORMAT:PATH, one of {', '.join(FORMATS)}"
        )
    if name == "json" and path.suffix.lower() == ".json" and files.json_shape(path, lines=False) == "object":
        content = parse_json(read_text(path, max_bytes=files.MAX_FILE_BYTES), where=str(path))
        return "coco" if coco.is_coco(content) else name
    return name


def _folder_format(path: Path, found: list[Path], split: str) -> str | None:
    if os.path.lexists(path / SAMPLES):
        return "set"
    if folders.metadata_of(path, split) is not None:
        return "imagefolder"
    if any((path / name).exists() for name in (tables.SAVED, tables.SPLITS)) and _of_suffix(found, ".arrow"):
        return "arrow"
    if _of_suffix(found, ".parquet"):
        return "parquet"
    if any(map(folders.is_tar, found)):
        return "webdataset"
    return "folder" if any(text is not None for _, text in folders.pairs(found)[0]) else None


def _suffix(path: Path) -> str:
    """In lower case, without that of gzip."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _of_suffix(found: list[Path], suffix: str) -> list[Path]:
    return [file for file in found if file.suffix.lower() == suffix]


def _is_hub_id(text: str) -> bool:
    """Whether what is no path here may be a data set of the hub: owner/name, where owner is no folder here."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) or Path(text).parent.is_dir():
        return False
    return _suffix(Path(text)) not in (
        *OF_SUFFIX,
        *SUFFIXES,
        ".gz",
        ".txt",
        ".zip",
        ".xml",
        ".yaml",
        ".xlsx",
        ".pkl",
        ".pt",
    )


def _absent(text: str) -> str:
    path = Path(text)
    try:
        beside = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    except (OSError, ValueError):
        beside = []
    close = nearest(path.name, beside)
    return f"{shown(text)}: no such file or folder" + (f"; did you mean {path.parent / close}?" if close else "")


def _refuse_idle_map(spec: SourceSpec, keys: list[str]) -> None:
    for role, named in spec.map.items():
        for key in filter(None, named.split("+")):
            if keys and key not in keys and key.partition(".")[0] not in keys:
                raise InputError(
                    f"{spec.path}: --map {shown(role)}={shown(key, limit=60)}: no record has this key; there are "
                    f"{', '.join(shown(name, limit=60) for name in keys[:KEYS_SHOWN])}"
                )


def _useless(spec: SourceSpec, reading: SourceReading) -> str:
    """Why nothing of a source can be used."""
    if not reading.bad:
        return f"{spec.path}: holds no record, read as {reading.format}"
    first = reading.bad[0]
    return (
        f"{spec.path}: holds no sample: of {reading.records} records {reading.reasons()} (the first: {first.where}: "
        f"{first.reason}); {reading.summary()}; name what holds what with --map image=KEY,question=KEY,answer=KEY"
    )
