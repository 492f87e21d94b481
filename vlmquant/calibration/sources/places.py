"""Whatever stands for an image in a record -> the image: a path, base64 text, bytes, objects and lists of such."""

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vlmquant.calibration.images import UnusableImageError
from vlmquant.calibration.sources.chats import json_inside
from vlmquant.calibration.sources.keys import claims_image, is_empty
from vlmquant.calibration.sources.spec import EmbeddedImage, ImageSource, NetworkImageError, UnusableRecordError
from vlmquant.errors import InputError, shown
from vlmquant.reading import KINDS, is_inside

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".jp2",
)
"""Of image files."""
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*"
    rb"|....ftyp(?:avif|heic|mif1)|....jP  ",
    re.S,
)
"""What encoded images begin with."""
INSIDE = (
    *("bytes", "image_url", "url", "image", "path", "base64", "b64_json", "b64", "data", "file_name", "source"),
    *("uri", "fileUri", "file_uri", "src"),
)
"""Keys of an object that stands for an image, the first that holds something counts."""
BASE64 = re.compile(r"[A-Za-z0-9+/\-_\s]{48,}={0,2}\s*")
URL = re.compile(r"[A-Za-z][\w+.-]{1,20}://")
FILE_URL = re.compile(r"^file:(?://[^/]*)?", re.IGNORECASE)
HEAD = 64
"""Characters of base64 text, or bytes, that tell an image."""


def leaves(value: Any, *, depth: int = 8) -> Iterator[Any]:
    """The texts and bytes in a value that stands for images, in order; what is empty stands for none."""
    if is_empty(value):
        return
    if depth == 0:
        raise UnusableRecordError("with an image nobody can find: lists and objects nested too deep")
    value = json_inside(value)
    if isinstance(value, dict):
        key = next((name for name in INSIDE if not is_empty(value.get(name))), None)
        if key is not None:
            yield from leaves(value[key], depth=depth - 1)
        elif all(claims_image(str(name).strip("<>|")) for name in value):  # {"<image_00>": place, ...}
            for item in value.values():
                yield from leaves(item, depth=depth - 1)
        else:
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, depth=depth - 1)
    else:
        yield value


def is_embedded(leaf: Any) -> bool:
    """Whether a text or bytes are an encoded image, by what they begin with."""
    if isinstance(leaf, bytes | bytearray | memoryview):
        return MAGIC.match(bytes(leaf[:HEAD])) is not None
    if not isinstance(leaf, str):
        return False
    if leaf[:11].lower() == "data:image/":
        return True
    if not BASE64.fullmatch(leaf[: 4 * HEAD]):
        return False
    try:
        return (
            MAGIC.match(base64.b64decode("".join(leaf[: 4 * HEAD].split())[:HEAD], altchars=_altchars(leaf)))
            is not None
        )
    except (binascii.Error, ValueError):
        return False


def is_image_name(leaf: Any) -> bool:
    """Whether a text is a path or URL that ends as image files do."""
    if not isinstance(leaf, str) or len(leaf) > 4096 or "\n" in leaf.strip():
        return False
    name = leaf.strip().lower()
    return name.partition("?")[0].endswith(SUFFIXES) if "://" in name[:12] else name.endswith(SUFFIXES)


def shows_image(value: Any) -> bool:
    """Whether a value is an image, or lists of such, by its content."""
    try:
        found = list(leaves(value))
    except UnusableRecordError:
        return False
    return bool(found) and all(is_embedded(leaf) or is_image_name(leaf) for leaf in found)


def hides_image(value: Any, *, depth: int = 6) -> bool:
    """Whether there is an image somewhere inside an object, by its content or its key."""
    if depth == 0 or is_empty(value):
        return False
    if isinstance(value, dict):
        return any(
            (isinstance(key, str) and claims_image(key) and not is_empty(item)) or hides_image(item, depth=depth - 1)
            for key, item in value.items()
        )
    if isinstance(value, list | tuple):
        return any(hides_image(item, depth=depth - 1) for item in value)
    return is_embedded(value)


class Resolver:
    """Turns what stands for an image into the image, under the one rule on what leads out of a folder."""

    def __init__(self, *, allow_outside: bool) -> None:
        self._allow_outside = allow_outside
        self._inside: dict[tuple[Path, Path], bool] = {}

    def image(self, leaf: Any, folder: Path, read: Callable[[], Any]) -> ImageSource:
        """The image that a text or bytes stand for. UnusableRecordError says why it is none.

        folder: that paths start from. read: gets the leaf anew, for an embedded image.
        """
        if isinstance(leaf, bytes | bytearray):
            return EmbeddedImage(hashlib.sha256(leaf).hexdigest(), _reader(read))
        if not isinstance(leaf, str):
            kind = "a number" if isinstance(leaf, int | float) else f"a {type(leaf).__name__}"
            keys = f" of {', '.join(shown(key, limit=30) for key in list(leaf)[:6])}" if isinstance(leaf, dict) else ""
            raise UnusableRecordError(f"with an image that is none: {kind}{keys}, not a path, base64 text or bytes")
        place = leaf.strip()
        if place[:5].lower() == "data:" or is_embedded(place):
            decode(place)
            return EmbeddedImage(hashlib.sha256(_body(place).encode()).hexdigest(), _reader(read))
        if place[:5].lower() == "file:":
            place = unquote(FILE_URL.sub("", place))
        elif URL.match(place):
            raise NetworkImageError(
                f"with an image on the network: {shown(place, limit=80)}; download it and give its local path"
            )
        return self._file(place, folder)

    def _file(self, place: str, folder: Path) -> Path:
        file = folder / place
        if "\\" in place and not os.path.lexists(file):
            file = folder / place.replace("\\", "/")
        if not self._allow_outside and not self._is_inside(file, folder):
            raise UnusableRecordError(
                f"with an image outside its folder: {shown(place)} leads out of {folder}; name the folder that holds "
                "the images with --images-folder, or read them wherever they are with --allow-outside"
            )
        try:
            mode = os.stat(file).st_mode
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UnusableRecordError(
                f"with a missing image: {shown(place)} is not in {folder}; if the images are elsewhere, name their "
                "folder with --images-folder"
            ) from error
        if not stat.S_ISREG(mode):
            kind = KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
            raise UnusableRecordError(f"with an image that is none: {shown(place)} is {kind} and no regular file")
        return file

    def _is_inside(self, file: Path, folder: Path) -> bool:
        """reading.is_inside, asked once for all files of a folder that are no links themselves."""
        if file.name == ".." or os.path.islink(file):
            return is_inside(file, folder)
        key = (file.parent, folder)
        if key not in self._inside:
            self._inside[key] = is_inside(*key)
        return self._inside[key]


def decode(text: str) -> bytes:
    """The bytes of base64 text or a data: URL."""
    if text[:5].lower() == "data:" and ";base64" not in text[:200].partition(",")[0].lower():
        raise UnusableRecordError("with an image that is none: of data: URLs only those in base64 are read")
    body = "".join(_body(text).split())
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), altchars=_altchars(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnusableRecordError(f"with a damaged image: its base64 text cannot be decoded ({error})") from error


def _body(text: str) -> str:
    return text.partition(",")[2] if text[:5].lower() == "data:" else text


def _altchars(text: str) -> bytes | None:
    return b"-_" if "-" in text or "_" in text else None


def _reader(read: Callable[[], Any]) -> Callable[[], bytes]:
    def content() -> bytes:
        try:
            leaf = read()
            return decode(leaf.strip()) if isinstance(leaf, str) else bytes(leaf)
        except (InputError, OSError, LookupError, TypeError, ValueError) as error:
            raise UnusableImageError(f"embedded image: cannot be read again ({shown(error)})") from error

    return content
