"""A set of samples is a folder, for calibration and for evaluation alike.

    samples.jsonl     one JSON object a line: {"id", "task", "question", "answers": [...]} and, where they apply,
                      "image": "images/x.jpg" or "images": [...] (paths inside the folder; neither for text-only),
                      "history": [{"question", "answer"}, ...] (earlier turns, oldest first), "system": "...".
                      Other keys are left alone.
    images/
    manifest.yaml     what it is made of (below); a plain folder of one's own may go without
    skipped.jsonl     the records that could not be used, each with where it stands and why; only where there were any

manifest.yaml: `name`, `sources` (what was read as what), `strata` (rows of task, asked, got, with_image, text_only),
`seed`, `skipped` (counts by reason), and `files`: sha256 by path for everything else in the folder. `load_set` checks
every hash.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from vlmquant import signals
from vlmquant.calibration.images import file_sha256, pixel_sha256
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.errors import InputError, shown
from vlmquant.nearest import did_you_mean
from vlmquant.reading import check, inside, parse_json, read_text, read_yaml
from vlmquant.recipe import shipped

MANIFEST = "manifest.yaml"
SAMPLES = "samples.jsonl"
SKIPPED = "skipped.jsonl"
FORM = "a line is {id, task, question, answers: [...], image}; `vlmquant data` makes such lines of other data"


@dataclass(frozen=True)
class SampleSet:
    """A set as read from its folder."""

    name: str
    samples: tuple[Sample, ...]
    """In file order."""
    manifest: dict[str, Any] | None
    """None for a plain folder."""
    sha256: str
    """Of samples.jsonl, and of the hashes in the manifest if there is one."""


class _Line(BaseModel):
    """A line of samples.jsonl."""

    model_config = ConfigDict(extra="ignore")

    id: str
    task: str
    question: str
    answers: Annotated[list[Annotated[str, StringConstraints(pattern=r"\S")]], Field(min_length=1)]
    image: str | None = None
    images: list[str] = []
    history: list[Turn] | None = None
    system: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "_Line":
        if {"image", "images"} <= self.model_fields_set:
            raise ValueError("give 'image' or 'images', not both")
        return self


class _Manifest(BaseModel):
    """What a manifest must hold for its set to be read."""

    model_config = ConfigDict(extra="ignore")

    files: dict[str, str]


def load_set(source: str | Path) -> SampleSet:
    """Read a set by the path of its folder or the name of a shipped one.

    Raises InputError that names the file (and line) for whatever is missing, malformed or differs from its manifest.
    """
    folder = _folder_of(source).resolve()
    file = inside(folder, SAMPLES, where=str(folder))
    text = read_text(file)
    manifest = _read_manifest(folder)
    samples = tuple(_sample(record, folder, where) for where, record in json_lines(text, str(file)))
    if not samples:
        raise InputError(f"{file}: the set is empty; it needs at least one sample")
    _refuse_twice([sample.id for sample in samples], where=str(file))
    digest = hashlib.sha256(file.read_bytes())
    if manifest is not None:
        _refuse_unlisted_images(samples, manifest, folder)
        digest.update(json.dumps(manifest["files"], sort_keys=True).encode())
    return SampleSet(folder.name, samples, manifest, digest.hexdigest())


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if not os.path.isdir(folder) and "/" not in str(source):
        folder = shipped("calibration") / str(source)
    if not os.path.isdir(folder):
        if os.path.exists(source):
            raise InputError(f"{shown(source)}: is no set; make one of it: vlmquant data {shown(source)} --out DIR")
        names = sorted(path.parent.name for path in shipped("calibration").glob(f"*/{SAMPLES}"))
        hint = did_you_mean(str(source), names)
        known = f"; shipped sets: {', '.join(names)}" if names else ""
        raise InputError(f"{shown(source)}: no such set or folder{hint}{known}")
    if not os.path.lexists(folder / SAMPLES):
        raise InputError(
            f"{folder}: no {SAMPLES} in this folder, so it is not a set; make one of it: "
            f"vlmquant data {folder} --out DIR"
        )
    return folder


def json_lines(text: str, file: str) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line of JSON that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", parse_json(line, where=f"{file}:{number}")


def _sample(record: Any, folder: Path, where: str) -> Sample:
    line: _Line = check(_Line, record, where=where, remedy=FORM)
    names = line.images if line.image is None else [line.image]
    return Sample(
        id=line.id,
        task=line.task,
        question=line.question,
        answers=tuple(line.answers),
        images=tuple(inside(folder, name, where=where, what="image").resolve() for name in names),
        history=tuple(line.history or ()),
        system=line.system,
    )


def _refuse_twice(ids: list[str], *, where: str) -> None:
    seen: set[str] = set()
    for sample_id in ids:
        if sample_id in seen:
            raise InputError(f"{where}: sample id '{shown(sample_id)}' stands twice; ids must differ")
        seen.add(sample_id)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, its hashes checked; None for a plain folder."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    manifest: dict[str, Any] = read_yaml(path, remedy="restore it or build the set again")
    check(_Manifest, manifest, where=str(path), remedy="restore it or build the set again")
    for name, expected in manifest["files"].items():
        file = inside(folder, name, where=str(path))
        if file_sha256(file) != expected:
            raise InputError(f"{file}: differs from its sha256 in {MANIFEST}; restore the file or build the set again")
    return manifest


def _refuse_unlisted_images(samples: Sequence[Sample], manifest: Mapping[str, Any], folder: Path) -> None:
    listed = {(folder / name).resolve() for name in manifest["files"]}
    for sample in samples:
        for path in sample.images:
            if path not in listed:
                raise InputError(f"{path}: is in {SAMPLES} but not in {MANIFEST}; build the set again")


def write_set(
    out_dir: Path, samples: Sequence[Sample], manifest: dict[str, Any], *, skipped: Sequence[Mapping[str, str]] = ()
) -> SampleSet:
    """Write a set folder: images copied byte by byte, hashes added to the manifest as `files`; then read it back.

    Everything is made under another name and renamed at the end, so a failed run leaves nothing behind; an empty folder
    that is there already stays the folder it is. Raises InputError if `out_dir` exists and is not empty, or if there
    are no samples.
    """
    refuse_filled(out_dir)
    if not samples:
        raise InputError(f"{out_dir}: there are no samples to write")
    _refuse_twice([sample.id for sample in samples], where=str(out_dir))
    there = out_dir.is_dir()
    beside = f".{out_dir.name}.partial-{uuid.uuid4().hex[:8]}"
    partial = out_dir / beside if there else out_dir.parent / beside
    try:
        (partial / "images").mkdir(parents=True)
        files: dict[str, str] = {}
        _write_lines(partial, SAMPLES, [_record(sample, partial, files) for sample in samples], files)
        if skipped:
            _write_lines(partial, SKIPPED, skipped, files)
        content = {"name": shown(out_dir.resolve().name), **manifest, "files": dict(sorted(files.items()))}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        with signals.held():
            if there:
                for path in sorted(
                    partial.iterdir(), key=lambda path: path.name == SAMPLES
                ):  # last what makes it a set
                    os.rename(path, out_dir / path.name)
                partial.rmdir()
            else:
                os.rename(partial, out_dir)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{out_dir}: the set cannot be written: {error}") from error
        raise
    return load_set(out_dir)


def refuse_filled(out_dir: Path) -> None:
    """InputError where a set would have to share its folder with what is there."""
    try:
        if os.path.lexists(out_dir) and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise InputError(f"{out_dir}: exists and is not empty; choose another folder or remove it")
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(out_dir)}: cannot be used as a folder: {error}") from error


def _write_lines(folder: Path, name: str, records: Iterable[Mapping[str, Any]], files: dict[str, str]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    files[name] = file_sha256(folder / name)


def _record(sample: Sample, folder: Path, files: dict[str, str]) -> dict[str, Any]:
    """A sample's line; its images are copied into `folder`, named by their content, their hashes noted in `files`."""
    signals.check()
    record: dict[str, Any] = {"id": sample.id, "task": sample.task, "question": sample.question}
    record["answers"] = list(sample.answers)
    names = []
    for path in sample.images:
        digest = file_sha256(path)
        name = f"images/{digest[:16]}{path.suffix.lower()}"
        if name not in files:
            shutil.copyfile(path, folder / name)
            files[name] = digest
        names.append(name)
    if len(names) == 1:
        record["image"] = names[0]
    elif names:
        record["images"] = names
    if sample.history:
        record["history"] = [{"question": turn.question, "answer": turn.answer} for turn in sample.history]
    if sample.system is not None:
        record["system"] = sample.system
    return record


def image_hashes(samples: Iterable[Sample]) -> dict[str, str]:
    """Hash of decoded pixels -> id of the first sample that shows this image."""
    ids: dict[str, str] = {}
    for sample in samples:
        for path in sample.images:
            ids.setdefault(pixel_sha256(path), sample.id)
    return ids


def shared_images(first: Iterable[Sample], second: Iterable[Sample]) -> list[tuple[str, str]]:
    """(id, id) of samples of the two collections that show the same image, by decoded pixels; empty if none do."""
    ours, theirs = image_hashes(first), image_hashes(second)
    return [(ours[digest], sample_id) for digest, sample_id in theirs.items() if digest in ours]
