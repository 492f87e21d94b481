"""A set of samples is a folder.

    manifest.yaml     what it is made of (below); a plain folder of one's own may go without
    samples.jsonl     one JSON object a line: {"id", "task", "question", "answers": [...]} and, where they apply,
                      "image": "images/x.jpg" or "images": [...] (paths inside the folder; neither for text-only),
                      "history": [{"question", "answer"}, ...] (earlier turns, oldest first), "system": "...".
                      Other keys are left alone.
    images/

manifest.yaml: `name`, `licences` (by source), `sources`, `strata` (rows of task, asked, got, with_image, text_only),
`seed`, and `files`: sha256 by path for samples.jsonl and every image. `load_set` checks every hash.
"""

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmquant.calibration.images import file_sha256, pixel_sha256
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.errors import InputError
from vlmquant.recipe import shipped

MANIFEST = "manifest.yaml"
SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class SampleSet:
    """A set as read from its folder."""

    name: str
    samples: tuple[Sample, ...]
    """In file order."""
    manifest: dict[str, Any] | None
    """None for a plain folder."""
    sha256: str
    """Of samples.jsonl, and of the image hashes in the manifest if there is one."""


def load_set(source: str | Path) -> SampleSet:
    """Read a set by the path of its folder or the name of a shipped one.

    Raises InputError that names the file (and line) for whatever is missing, malformed or differs from its manifest.
    """
    folder = _folder_of(source)
    file = folder / SAMPLES
    manifest = _read_manifest(folder)
    samples = tuple(
        _parse_sample(record, folder=folder, where=f"{file}:{line}") for line, record in read_json_lines(file)
    )
    if not samples:
        raise InputError(f"{file}: the set is empty; it needs at least one sample")
    _refuse_twice([sample.id for sample in samples], where=str(file))
    digest = hashlib.sha256(file.read_bytes())
    if manifest is not None:
        _refuse_unlisted_images(samples, manifest, folder)
        digest.update(json.dumps(manifest["files"], sort_keys=True).encode())
    return SampleSet(folder.resolve().name, samples, manifest, digest.hexdigest())


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if not folder.is_dir() and "/" not in str(source):
        folder = shipped("calibration") / str(source)
    if not folder.is_dir():
        names = sorted(path.parent.name for path in shipped("calibration").glob(f"*/{SAMPLES}"))
        close = difflib.get_close_matches(str(source), names, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        known = f"; shipped sets: {', '.join(names)}" if names else ""
        raise InputError(f"{source}: no such set or folder{hint}{known}")
    if not (folder / SAMPLES).is_file():
        raise InputError(
            f"{folder}: no {SAMPLES} in this folder, so it is not a set; build one with `vlmquant calibrate`"
        )
    return folder


def read_json_lines(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSONL file; blank lines are passed over. InputError names file and line."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{file}:{number}: not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise InputError(f"{file}:{number}: a JSON object is expected, not {type(record).__name__}")
                yield number, record
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text: {error}") from error


def _parse_sample(record: dict[str, Any], *, folder: Path, where: str) -> Sample:
    def text(key: str, *, of: dict[str, Any] = record) -> str:
        if key not in of:
            raise InputError(f"{where}: key '{key}' is missing")
        if not isinstance(of[key], str):
            raise InputError(f"{where}: '{key}' must be text, not {type(of[key]).__name__}")
        return str(of[key])

    answers = record.get("answers")
    if answers is None:
        raise InputError(f"{where}: key 'answers' is missing")
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise InputError(f"{where}: 'answers' must be a list of non-empty texts")
    if not answers:
        raise InputError(f"{where}: 'answers' is empty; a sample needs at least one")
    if "image" in record and "images" in record:
        raise InputError(f"{where}: give 'image' or 'images', not both")
    names = record["images"] if "images" in record else [record["image"]] if record.get("image") is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: 'image' must be a path, 'images' a list of paths")
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, dict) for turn in history):
        raise InputError(f"{where}: 'history' must be a list of objects with 'question' and 'answer'")
    return Sample(
        id=text("id"),
        task=text("task"),
        question=text("question"),
        answers=tuple(answers),
        images=tuple(_image_inside(name, folder=folder, where=where) for name in names),
        history=tuple(Turn(text("question", of=turn), text("answer", of=turn)) for turn in history),
        system=text("system") if record.get("system") is not None else None,
    )


def _image_inside(name: str, *, folder: Path, where: str) -> Path:
    """An image's absolute path, which must not lead out of the set's folder."""
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise InputError(f"{where}: image '{name}' lies outside of the set's folder; move it inside")
    if not path.is_file():
        raise InputError(f"{where}: image '{name}' is missing from {folder}")
    return path


def _refuse_twice(ids: list[str], *, where: str) -> None:
    seen: set[str] = set()
    for sample_id in ids:
        if sample_id in seen:
            raise InputError(f"{where}: sample id '{sample_id}' stands twice; ids must differ")
        seen.add(sample_id)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, its hashes checked; None for a plain folder."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{path}: a mapping with `files` (sha256 by path) is expected; build the set again")
    for name, expected in manifest["files"].items():
        file = _image_inside(str(name), folder=folder, where=str(path)) if name != SAMPLES else folder / SAMPLES
        if file_sha256(file) != expected:
            raise InputError(f"{file}: differs from its sha256 in {MANIFEST}; restore the file or build the set again")
    return manifest


def _refuse_unlisted_images(samples: Sequence[Sample], manifest: dict[str, Any], folder: Path) -> None:
    listed = {(folder / name).resolve() for name in manifest["files"]}
    for sample in samples:
        for path in sample.images:
            if path not in listed:
                raise InputError(f"{path}: is in {SAMPLES} but not in {MANIFEST}; build the set again")


def write_set(out_dir: Path, samples: Sequence[Sample], manifest: dict[str, Any]) -> SampleSet:
    """Write a set folder: images copied byte by byte, hashes added to the manifest as `files`; then read it back.

    Everything is made in a folder beside `out_dir` and renamed at the end, so a failed run leaves nothing behind.
    Raises InputError if `out_dir` exists and is not empty, or if there are no samples.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: exists and is not empty; choose another folder or remove it")
    if not samples:
        raise InputError(f"{out_dir}: there are no samples to write")
    _refuse_twice([sample.id for sample in samples], where=str(out_dir))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
    try:
        (partial / "images").mkdir()
        files: dict[str, str] = {}
        lines = [json.dumps(_record(sample, partial, files), ensure_ascii=False) for sample in samples]
        (partial / SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        files[SAMPLES] = file_sha256(partial / SAMPLES)
        content = {"name": out_dir.name, **manifest, "files": dict(sorted(files.items()))}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        partial.chmod(0o755)
        if out_dir.exists():
            out_dir.rmdir()
        os.rename(partial, out_dir)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{out_dir}: the set cannot be written: {error}") from error
        raise
    return load_set(out_dir)


def _record(sample: Sample, folder: Path, files: dict[str, str]) -> dict[str, Any]:
    """A sample's line; its images are copied into `folder`, named by their content, their hashes noted in `files`."""
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
