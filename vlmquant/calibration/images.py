"""Opening images that strangers made: under limits, upright, RGB."""

import base64
import hashlib
import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmquant.errors import InputError, first_line, shown
from vlmquant.reading import read_bytes

MAX_FILE_BYTES = 512_000_000
"""Of an image's file: more than any image within MAX_PIXELS needs."""
MAX_PIXELS = 50_000_000
"""A larger image is refused before it is decoded: a few kilobytes of PNG can hold gigabytes of pixels."""
MIN_SIDE = 8
"""Pixels; a smaller image shows nothing, and some image processors cannot resize it."""
MAX_ASPECT_RATIO = 100
"""Long side by short side; processors refuse or crop away nearly all of a longer strip."""
BITS_16_TO_8 = 257.0
"""65535 / 255."""
THUMBNAIL_QUALITY = 80
"""Of JPEG."""
PROGRAMS = ("EPS", "WMF")
"""Formats that Pillow gives to other programs; nobody's training set needs them."""


class UnusableImageError(InputError):
    """These bytes are no image we can show a model; the message says why."""


def open_image(source: Path | bytes, *, name: str | None = None) -> Image.Image:
    """The image in a file or in bytes: RGB, EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    `name` stands for the image in messages. Raises UnusableImageError for what is no image, damaged, beyond MAX_PIXELS
    or MAX_ASPECT_RATIO, or smaller than MIN_SIDE.
    """
    where = name or (str(source) if isinstance(source, Path) else "image")
    content = _content(source, where) if isinstance(source, Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning and EXIF complaints: our own limits decide
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if min(width, height) < MIN_SIDE:
                    raise UnusableImageError(
                        f"{where}: {width} x {height} pixels is too small; both sides need at least {MIN_SIDE}"
                    )
                if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                    raise UnusableImageError(
                        f"{where}: {width} x {height} is longer than {MAX_ASPECT_RATIO} to 1; cut the image up"
                    )
                image.load()
                return _as_rgb(ImageOps.exif_transpose(image))
    except UnusableImageError:
        raise
    except Image.DecompressionBombError as error:  # ours, or Pillow's own on opening
        raise UnusableImageError(f"{where}: has more than {MAX_PIXELS // 10**6} megapixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"{where}: not a readable image (format unknown); replace or remove it") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = shown(first_line(error))
        raise UnusableImageError(f"{where}: not a readable image ({reason}); replace or remove it") from error


def thumbnail(path: Path, side: int) -> Image.Image:
    """The image as `open_image` gives it, scaled down to at most so many pixels on its longer side."""
    image = open_image(path)
    image.thumbnail((side, side))
    return image


def thumbnail_uri(path: Path, side: int) -> str:
    """A thumbnail as a data: URI, for a page that loads nothing."""
    out = io.BytesIO()
    thumbnail(path, side).save(out, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def image_format(data: bytes) -> str:
    """Pillow's name of the format in some bytes, in lower case, such as "png". Raises UnusableImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return str(image.format).lower()
    except Exception as error:  # as in open_image
        raise UnusableImageError("embedded image: not a readable image; replace or remove it") from error


def _content(file: Path, where: str) -> bytes:
    """A regular file's bytes: a named pipe would be waited for."""
    try:
        return read_bytes(file, max_bytes=MAX_FILE_BYTES, remedy="replace or remove it")
    except InputError as error:
        raise UnusableImageError(str(error).replace(str(file), where, 1)) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in PROGRAMS)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = _from_floats(image)
    if image.mode.startswith("I"):
        gray = np.asarray(image, dtype=np.float32)
        scaled = gray / BITS_16_TO_8 if gray.max(initial=0) > 255 else gray
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    """Gray floats from 0 to 1, 255 or 65535 (whichever is the first to hold them all) as 8 bits."""
    gray = np.asarray(image, dtype=np.float32)
    low, high = float(gray.min()), float(gray.max())
    white = next((white for white in (1.0, 255.0, 65535.0) if high <= white), None)
    if white is None or not low >= 0:
        raise ValueError(f"its pixels are floats from {low:g} to {high:g}, which no shade of gray is known for")
    return Image.fromarray((gray * (255 / white)).round().astype(np.uint8))


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixel_sha256(path: Path) -> str:
    """Of an image's size and decoded RGB pixels: equal for copies that differ in name, metadata or lossless format."""
    image = open_image(path)
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).hexdigest()
