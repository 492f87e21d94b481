"""COCO captions: images and annotations that belong together by an image's id."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmquant.calibration.sources.chats import text_of
from vlmquant.calibration.sources.files import MAX_FILE_BYTES, Items
from vlmquant.calibration.sources.spec import BadRecord, Record, SourceSpec
from vlmquant.errors import InputError, shown
from vlmquant.reading import check, parse_json, read_text

IMAGE, CAPTION = "images.file_name", "annotations.caption"
ROLES = {"image": IMAGE, "caption": CAPTION}
"""The keys of its records."""


def is_coco(content: Any) -> bool:
    """Whether a JSON file's content has COCO's lists."""
    return isinstance(content, dict) and "annotations" in content and "images" in content


def read_coco_records(spec: SourceSpec, path: Path, origin: Path) -> Items:
    """One record for each image with all its captions, and for what fits nothing. origin: where the file lies."""
    content = parse_json(read_text(path, max_bytes=MAX_FILE_BYTES), where=spec.path)
    if not is_coco(content):
        raise InputError(f"{spec.path}: not COCO captions: needs the lists images and annotations")
    images: list[Any] = check(list[Any], content["images"], where=f"{spec.path}: images")
    annotations: list[Any] = check(list[Any], content["annotations"], where=f"{spec.path}: annotations")
    files: dict[Any, str] = {}
    places: dict[Any, str] = {}
    for index, image in enumerate(images):
        where = f"{spec.path} images[{index}]"
        key, name = _id(image, "id"), image.get("file_name") if isinstance(image, dict) else None
        if key is None or not isinstance(name, str) or not name.strip():
            yield BadRecord(where, "without an id or a file_name")
        elif files.setdefault(key, name) != name:
            raise InputError(
                f"{where}: image id {shown(repr(key), limit=60)} stands twice, for {shown(files[key])} and "
                f"{shown(name)}; captions could belong to either, so give each image an id of its own"
            )
        else:
            places.setdefault(key, where)
    captions: dict[Any, list[str]] = {key: [] for key in files}
    known = _known(files, annotations, spec.path)
    for index, annotation in enumerate(annotations):
        where = f"{spec.path} annotations[{index}]"
        key = known.get(_id(annotation, "image_id"))
        text = text_of(annotation.get("caption")) if isinstance(annotation, dict) else None
        if key is None:
            found = annotation.get("image_id") if isinstance(annotation, dict) else annotation
            yield BadRecord(where, f"with an image_id that no image has: {shown(repr(found), limit=60)}")
        elif text is None:
            yield BadRecord(where, "without a caption")
        else:
            captions[key].append(text)
    folder = _image_folder(origin, spec, next(iter(files.values()), ""))
    for key, texts in captions.items():
        yield Record(places[key], {IMAGE: files[key], CAPTION: texts}, folder, id=f"coco-{shown(key, limit=100)}")


def _id(item: Any, key: str) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else None


def _known(files: Mapping[Any, str], annotations: list[Any], told: str) -> Mapping[Any, Any]:
    """id as annotations have it -> id as images have it: the same, or where none is, the same written as a number."""
    wanted = {_id(annotation, "image_id") for annotation in annotations} - {None}
    if not wanted or not wanted.isdisjoint(files):
        return {key: key for key in files}
    numbers: dict[int, Any] = {}
    for key in files:
        number = _number(key)
        if number is None or numbers.setdefault(number, key) != key:
            break
    else:
        if matched := {
            key: numbers[number] for key in wanted if (number := _number(key)) in numbers and number is not None
        }:
            return matched
    kinds = [
        ", ".join(sorted({"text" if isinstance(key, str) else "numbers" for key in keys})) for keys in (files, wanted)
    ]
    raise InputError(
        f"{told}: no image_id of the annotations is among the ids of the images (image ids are {kinds[0]}, such as "
        f"{shown(repr(next(iter(files), None)), limit=60)}; image_ids are {kinds[1]}, such as "
        f"{shown(repr(min(wanted, key=str)), limit=60)}); these files do not belong together"
    )


def _number(key: Any) -> int | None:
    if isinstance(key, int):
        return key
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 40 else None


def _image_folder(path: Path, spec: SourceSpec, first: str) -> Path:
    """The folder of the images: beside the file, in images/, or in the split's folder as COCO unpacks."""
    if spec.images is not None:
        return Path(spec.images)
    split = path.stem.removeprefix("captions_")
    folders = (path.parent, path.parent / "images", path.parent / split, path.parent.parent / split)
    try:
        found = next((folder for folder in folders if (folder / first).is_file()), None)
    except (OSError, ValueError):
        found = None
    if found is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise InputError(
            f"{spec.path}: found no folder with its images: {shown(first)} is in none of {looked}; name it with "
            "--images-folder"
        )
    return found
