"""A user's own data -> candidates for a set: one function per format, chosen by name or by a look at the files.

Only data is read: no dataset scripts, no pickles, no network but for a dataset id of the hub.
"""

import base64
import binascii
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from vlmquant.calibration.samples import Sample, Turn
from vlmquant.calibration.sets import SAMPLES, load_set, read_json_lines
from vlmquant.errors import InputError

CAPTION_QUESTION = "Describe the image in one sentence."
"""Asked of an image that comes with captions and no question."""

ID_KEYS = ("id", "question_id", "sample_id")
QUESTION_KEYS = ("question", "prompt", "instruction", "query")
ANSWER_KEYS = ("answers", "answer", "response", "output")
CAPTION_KEYS = ("captions", "caption", "text")
IMAGE_KEYS = ("images", "image", "image_path", "file_name", "image_file", "img")
"""Keys under which a record may hold its parts; the first that is there counts."""

FIELD_BYTES = 10_000_000
"""Longest CSV field read."""


@dataclass(frozen=True)
class EmbeddedImage:
    """An encoded image that is not a file of its own."""

    key: str
    """Tells it from others of the source."""
    read: Callable[[], bytes]


ImageSource = Path | EmbeddedImage


@dataclass(frozen=True)
class SourceSpec:
    """Where samples come from."""

    path: str
    """A file, a folder, or a dataset's id on the hub (owner/name)."""
    format: str = "auto"
    """A key of FORMATS, or "auto" to look."""
    task: str | None = None
    """Task of all its samples; None reads it from the records, else caption, vqa or text by what a record holds."""
    licence: str = "not stated"
    """Goes into the set's manifest."""
    images: str | None = None
    """Folder that image paths start from; None for the folder of the file itself."""
    split: str = "train"
    """Of a dataset from the hub."""


def parse_source(text: str) -> SourceSpec:
    """A source in one word, as on the command line: PATH, PATH=TASK, FORMAT:PATH or FORMAT:PATH=TASK.

    What exists under the whole text is a path, whatever it looks like.
    """
    if Path(text).exists():
        return SourceSpec(text)
    name, colon, rest = text.partition(":")
    form, text = (name, rest) if colon and name in ("auto", *FORMATS) else ("auto", text)
    if not Path(text).exists() and (match := re.fullmatch(r"(.+)=([\w.-]+)", text)):
        return SourceSpec(match[1], form, match[2])
    return SourceSpec(text, form)


@dataclass(frozen=True)
class Candidate:
    """A sample whose images nobody has opened yet (`sample.images` is empty)."""

    sample: Sample
    images: tuple[ImageSource, ...]


class UnusableRecordError(InputError):
    """A record that makes no sample; it is skipped and counted."""


def read_source(spec: SourceSpec, *, scratch: Path) -> tuple[list[Candidate], dict[str, int]]:
    """All candidates of a source, and how many records were skipped, by reason.

    scratch: a folder for what the `datasets` library needs to unpack; it must outlive the candidates.
    Raises InputError for a source that cannot be read at all.
    """
    name = detect_format(spec) if spec.format == "auto" else spec.format
    if name not in FORMATS:
        raise InputError(f"{spec.path}: unknown format '{name}'; known: auto, {', '.join(FORMATS)}")
    if name != "hub" and not Path(spec.path).exists():
        raise InputError(f"{spec.path}: no such file or folder")
    candidates: list[Candidate] = []
    skipped: dict[str, int] = {}
    seen: dict[str, int] = {}
    for item in FORMATS[name](spec, scratch):
        if isinstance(item, str):
            skipped[item] = skipped.get(item, 0) + 1
            continue
        sample = item.sample if spec.task is None else replace(item.sample, task=spec.task)
        seen[sample.id] = seen.get(sample.id, 0) + 1
        if seen[sample.id] > 1:
            sample = replace(sample, id=f"{sample.id}-{seen[sample.id]}")
        candidates.append(replace(item, sample=sample))
    if not candidates:
        why = f" ({', '.join(f'{count} {reason}' for reason, count in skipped.items())})" if skipped else ""
        raise InputError(f"{spec.path}: holds no sample, read as {name}{why}")
    return candidates, skipped


def detect_format(spec: SourceSpec) -> str:
    """The key of FORMATS that fits a path. Raises InputError if none does."""
    path = Path(spec.path)
    if path.is_dir():
        if (path / SAMPLES).is_file():
            return "set"
        if any((path / name).is_file() for name in ("metadata.jsonl", "metadata.csv")):
            return "imagefolder"
        if (path / "dataset_info.json").is_file() and any(path.glob("*.arrow")):
            return "arrow"
        if any(path.rglob("*.parquet")):
            return "parquet"
    elif path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".csv", ".parquet"):
            return suffix[1:]
        if suffix in (".jsonl", ".ndjson"):
            first = next(iter(read_json_lines(path)), (0, {}))[1]
            return "messages" if "messages" in first else "jsonl"
        if suffix == ".json":
            content = _read_json(path)
            return "coco" if isinstance(content, dict) and "annotations" in content else "json"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", spec.path):
        return "hub"
    else:
        raise InputError(f"{spec.path}: no such file or folder")
    raise InputError(f"{spec.path}: cannot tell its format; name it, one of {', '.join(FORMATS)}")


# Formats. Each yields candidates, or the reason why a record was skipped.

Items = Iterator[Candidate | str]


def _from_set(spec: SourceSpec, _: Path) -> Items:
    for sample in load_set(spec.path).samples:
        yield Candidate(replace(sample, images=()), sample.images)


def _from_jsonl(spec: SourceSpec, _: Path) -> Items:
    path = Path(spec.path)
    yield from _from_records(read_json_lines(path), spec, path)


def _from_json(spec: SourceSpec, _: Path) -> Items:
    path = Path(spec.path)
    content = _read_json(path)
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(f"{path}: a JSON list of objects is expected, such as {{image, question, answer}}")
    yield from _from_records(enumerate(content, start=1), spec, path)


def _from_csv(spec: SourceSpec, _: Path) -> Items:
    path = Path(spec.path)
    yield from _from_records(_csv_rows(path), spec, path)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(FIELD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row:
                    raise InputError(f"{path}:{reader.line_num}: more fields than the header names")
                yield reader.line_num, {key: value for key, value in row.items() if value}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error


def _from_imagefolder(spec: SourceSpec, _: Path) -> Items:
    """A folder of images with metadata.jsonl or metadata.csv, whose `file_name` is relative to the folder."""
    folder = Path(spec.path)
    path = folder / "metadata.jsonl"
    if path.is_file():
        yield from _from_records(read_json_lines(path), spec, path)
    elif (folder / "metadata.csv").is_file():
        path = folder / "metadata.csv"
        yield from _from_records(_csv_rows(path), spec, path)
    else:
        raise InputError(f"{folder}: neither metadata.jsonl nor metadata.csv in this image folder")


def _from_coco(spec: SourceSpec, _: Path) -> Items:
    """COCO captions: images[{id, file_name}], annotations[{image_id, caption}]; all captions of an image together."""
    path = Path(spec.path)
    content = _read_json(path)
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]).strip())
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not COCO captions: needs images with id and file_name, annotations with image_id and caption"
        ) from error
    folder = _coco_images(path, spec, next(iter(names.values()), ""))
    for image_id, name in names.items():
        texts = tuple(text for text in captions.get(image_id, ()) if text)
        if not texts:
            yield "without a caption"
            continue
        sample = Sample(f"coco-{image_id}", "caption", CAPTION_QUESTION, texts)
        yield Candidate(sample, (folder / name,))


def _coco_images(path: Path, spec: SourceSpec, first: str) -> Path:
    """The folder of the images: as given, beside the file, in images/, or in the split's folder as COCO unpacks."""
    if spec.images is not None:
        return Path(spec.images)
    split = path.stem.removeprefix("captions_")
    for folder in (path.parent, path.parent / "images", path.parent / split, path.parent.parent / split):
        if (folder / first).is_file():
            return folder
    raise InputError(f"{path}: found no folder with its images (first: {first}); name it with `images`")


def _from_messages(spec: SourceSpec, _: Path) -> Items:
    """OpenAI-style chat, one conversation a line: {"messages": [{"role", "content": text | parts}]}."""
    path = Path(spec.path)
    for line, record in read_json_lines(path):
        where = f"{path}:{line}"
        messages = record.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"{where}: 'messages' must be a list of objects with role and content")
        try:
            yield _conversation(messages, record, spec, path, where=where)
        except UnusableRecordError as error:
            yield str(error)


def _from_datasets(spec: SourceSpec, scratch: Path) -> Items:
    """Parquet files, a folder that `datasets` saved, or a dataset of the hub; images stay encoded and are read late."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(spec.path)
    try:
        if path.is_dir() and (path / "dataset_info.json").is_file():
            table = datasets.load_from_disk(str(path))
        elif path.exists():
            files = [str(path)] if path.is_file() else sorted(str(file) for file in path.rglob("*.parquet"))
            table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch))
        else:
            table = datasets.load_dataset(spec.path, split=spec.split)
    except Exception as error:  # the library raises nearly anything: network, missing files, scripts it refuses
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{spec.path}: `datasets` cannot load it: {reason}") from error
    images = [name for name, feature in table.features.items() if _holds_images(name, feature, datasets)]
    for name in images:
        feature = table.features[name]
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    texts = table.remove_columns(images)
    counts = {name: _images_per_row(table, name) for name in images}
    for row, record in enumerate(texts):
        found = tuple(
            _cell_image(table, row, name, index, path) for name in images for index in range(counts[name][row])
        )
        try:
            yield _record(record, found, spec)
        except UnusableRecordError as error:
            yield str(error)


def _holds_images(name: str, feature: Any, datasets: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Image) or (name in IMAGE_KEYS and isinstance(inner, dict) and "bytes" in inner)


def _images_per_row(table: Any, column: str) -> list[int]:
    """Read from the column's offsets alone, without the images."""
    import pyarrow
    import pyarrow.compute

    values = table.data.column(column)
    if pyarrow.types.is_struct(values.type):
        return [int(valid) for valid in pyarrow.compute.is_valid(values).to_pylist()]
    return [count or 0 for count in pyarrow.compute.list_value_length(values).to_pylist()]


def _cell_image(table: Any, row: int, column: str, index: int, folder: Path) -> EmbeddedImage:
    def read() -> bytes:
        cell = table[row][column]
        cell = cell if isinstance(cell, dict) else cell[index]
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        path = Path(str(cell.get("path")))
        return (path if path.is_absolute() else folder / path).read_bytes()

    return EmbeddedImage(f"{column} {row} {index}", read)


FORMATS: dict[str, Callable[[SourceSpec, Path], Items]] = {
    "set": _from_set,
    "jsonl": _from_jsonl,
    "json": _from_json,
    "csv": _from_csv,
    "imagefolder": _from_imagefolder,
    "coco": _from_coco,
    "messages": _from_messages,
    "parquet": _from_datasets,
    "arrow": _from_datasets,
    "hub": _from_datasets,
}


# Records


def _from_records(records: Iterable[tuple[int, dict[str, Any]]], spec: SourceSpec, path: Path) -> Items:
    for line, record in records:
        where = f"{path}:{line}"
        try:
            if isinstance(record.get("conversations"), list):  # {"from": "human" | "gpt", "value": text}
                messages = [_renamed(message, where) for message in record["conversations"]]
                yield _conversation(messages, record, spec, path, where=where)
            else:
                yield _record(record, _images_of(record, spec, path, where), spec)
        except UnusableRecordError as error:
            yield str(error)


def _record(record: Mapping[str, Any], images: tuple[ImageSource, ...], spec: SourceSpec) -> Candidate:
    """{image, question, answer} or {image, caption} as a candidate."""
    question = _first_text(record, QUESTION_KEYS)
    answers = _texts(record, ANSWER_KEYS) or _texts(record, CAPTION_KEYS)
    if not answers:
        raise UnusableRecordError("without an answer or caption")
    if question is None:
        if not images:
            raise UnusableRecordError("without a question or an image")
        question, task = CAPTION_QUESTION, "caption"
    else:
        task = "vqa" if images else "text"
    question = _without_image_marks(question)
    if not question and not images:
        raise UnusableRecordError("without a question or an image")
    task = str(record.get("task") or task)
    sample_id = _id_of(record, [question, *answers, *map(_key, images)], spec)
    return Candidate(Sample(sample_id, task, question, answers), images)


def _conversation(
    messages: list[dict[str, Any]], record: Mapping[str, Any], spec: SourceSpec, path: Path, *, where: str
) -> Candidate:
    """A chat as a candidate: its last exchange is question and answer, those before are history."""
    system: str | None = None
    images: list[ImageSource] = list(_images_of(record, spec, path, where))
    turns: list[Turn] = []
    question: str | None = None
    for message in messages:
        role = message.get("role")
        text, found = _content(message.get("content"), spec, path, where)
        if role in ("system", "developer"):
            system = text
        elif role == "user":
            if found and (turns or question is not None):
                raise UnusableRecordError("with an image after its first question")
            images += found
            question = text if question is None else f"{question}\n{text}"
        elif role == "assistant" and question is not None:
            turns.append(Turn(question, text))
            question = None
        else:
            raise UnusableRecordError(f"with a message of role {role!r} out of place")
    if not turns or not turns[-1].answer:
        raise UnusableRecordError("without an answer or caption")
    *history, last = turns
    texts = [system or "", *(text for turn in turns for text in (turn.question, turn.answer)), *map(_key, images)]
    task = str(record.get("task") or ("vqa" if images else "text"))
    sample = Sample(
        _id_of(record, texts, spec), task, last.question, (last.answer,), history=tuple(history), system=system
    )
    return Candidate(sample, tuple(images))


def _content(content: Any, spec: SourceSpec, path: Path, where: str) -> tuple[str, list[ImageSource]]:
    """Text and images of a message's content: plain text, or parts of type text, image_url or image."""
    if isinstance(content, str):
        return _without_image_marks(content), []
    texts: list[str] = []
    images: list[ImageSource] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(str(part.get("text", "")))
        elif kind in ("image_url", "image"):
            place = part.get("image_url", part.get("image", part.get("path")))
            images.append(_image_at(place.get("url") if isinstance(place, dict) else place, spec, path, where))
        else:
            raise InputError(f"{where}: content must be text or parts of type text, image or image_url, not {kind!r}")
    return _without_image_marks("\n".join(texts)), images


def _images_of(record: Mapping[str, Any], spec: SourceSpec, path: Path, where: str) -> tuple[ImageSource, ...]:
    for key in IMAGE_KEYS:
        if record.get(key):
            places = record[key] if isinstance(record[key], list) else [record[key]]
            return tuple(_image_at(place, spec, path, where) for place in places)
    return ()


def _image_at(place: Any, spec: SourceSpec, path: Path, where: str) -> ImageSource:
    """A local path (relative to the source's folder), a file: URL or a data: URI."""
    if not isinstance(place, str):
        raise InputError(f"{where}: an image must be a path or a data: URI, not {type(place).__name__}")
    if place.startswith("data:"):
        return _data_uri(place, where)
    if place.startswith("file:"):
        return Path(unquote(urlparse(place).path))
    if "://" in place:
        raise InputError(f"{where}: image {place[:80]!r} is on the network; download it and give its local path")
    return (Path(spec.images) if spec.images is not None else path.parent) / place


def _data_uri(uri: str, where: str) -> EmbeddedImage:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise InputError(f"{where}: only base64 data: URIs are read")

    def read() -> bytes:
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error:
            return b""  # reported as an unreadable image

    return EmbeddedImage(hashlib.sha256(body.encode()).hexdigest(), read)


def _key(image: ImageSource) -> str:
    return image.name if isinstance(image, Path) else image.key


def _renamed(message: Any, where: str) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
    if not isinstance(message, dict) or message.get("from") not in roles:
        raise InputError(f"{where}: 'conversations' must be a list of objects with from (human or gpt) and value")
    return {"role": roles[message["from"]], "content": str(message.get("value", ""))}


def _without_image_marks(text: str) -> str:
    """Data sets write "<image>" where the picture stands; the chat template puts the model's own token there."""
    return text.replace("<image>", "").strip()


def _first_text(record: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    texts = _texts(record, keys)
    return texts[0] if texts else None


def _texts(record: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The texts under the first of `keys` that is there: one, a list, or a list of {"answer": text}."""
    for key in keys:
        value = record.get(key)
        if value is None or value == "":
            continue
        values = value if isinstance(value, list | tuple) else [value]
        texts = [item.get("answer") if isinstance(item, dict) else item for item in values]
        return tuple(str(text).strip() for text in texts if text is not None and str(text).strip())
    return ()


def _id_of(record: Mapping[str, Any], texts: list[str], spec: SourceSpec) -> str:
    """The record's own id, else one made of its content, so that it stays the same when the source grows."""
    own = next((record[key] for key in ID_KEYS if record.get(key) is not None), None)
    stem = Path(spec.path).stem or "sample"
    if own is not None:
        return f"{stem}-{own}"
    return f"{stem}-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
