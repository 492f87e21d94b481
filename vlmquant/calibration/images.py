"""Opening images that strangers made: under limits, upright, RGB."""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlmquant.errors import InputError

MAX_PIXELS = 50_000_000
"""A larger image is refused before it is decoded: a few kilobytes of PNG can hold gigabytes of pixels."""
MIN_SIDE = 8
"""Pixels; a smaller image shows nothing, and some image processors cannot resize it."""
MAX_ASPECT_RATIO = 100
"""Long side by short side; processors refuse or crop away nearly all of a longer strip."""
BITS_16_TO_8 = 257.0
"""65535 / 255."""


class UnusableImageError(InputError):
    """These bytes are no image we can show a model; the message says why."""


def open_image(source: Path | bytes, *, name: str | None = None) -> Image.Image:
    """The image in a file or in bytes: RGB, EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    `name` stands for the image in messages. Raises UnusableImageError for what is no image, damaged, beyond MAX_PIXELS
    or MAX_ASPECT_RATIO, or smaller than MIN_SIDE.
    """
    where = name or (str(source) if isinstance(source, Path) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning and EXIF complaints: our own limits decide
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
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
    except FileNotFoundError as error:
        raise UnusableImageError(f"{where}: there is no such image file") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnusableImageError(f"{where}: not a readable image ({reason}); replace or remove it") from error


def image_format(data: bytes) -> str:
    """Pillow's name of the format in some bytes, in lower case, such as "png". Raises UnusableImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return str(image.format).lower()
    except Exception as error:  # as in open_image
        raise UnusableImageError("embedded image: not a readable image; replace or remove it") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        gray = np.asarray(image, dtype=np.float32)
        scaled = gray / BITS_16_TO_8 if gray.max(initial=0) > 255 else gray
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixel_sha256(path: Path) -> str:
    """Of an image's size and decoded RGB pixels: equal for copies that differ in name, metadata or lossless format."""
    image = open_image(path)
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).hexdigest()
