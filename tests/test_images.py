"""Image files as strangers make them: what is no regular file, floats, bombs inside chunks, programs."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.images import UnusableImageError, image_format, open_image, pixel_sha256
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pipes_devices_and_folders_are_not_opened(tiny_llava: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path, what in ((pipe, "named pipe"), (Path("/dev/zero"), "device"), (tmp_path, "directory")):
        for look in (open_image, pixel_sha256):
            with pytest.raises(UnusableImageError, match=f"{path}.*{what}"):
                look(path)
    sample = Sample("x", "vqa", "what?", ("a",), (pipe,))
    with pytest.raises(UnusableImageError, match=r"pipe\.png: is a named pipe"):
        Encoder(load_processor(tiny_llava)).encode(sample, "a")


@pytest.mark.parametrize(("value", "white"), [(0.5, 1.0), (127.5, 255.0), (32767.5, 65535.0)])
def test_gray_floats_keep_their_shade(value: float, white: float) -> None:
    pixels = np.full((10, 12), value, dtype=np.float32)
    pixels[0, 0] = white
    image = open_image(saved(Image.fromarray(pixels), "TIFF"))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((5, 5)) in {(127,) * 3, (128,) * 3}


@pytest.mark.parametrize("value", [-1.0, 1e9, float("nan"), float("inf")])
def test_other_floats_are_refused(value: float) -> None:
    pixels = np.zeros((10, 12), dtype=np.float32)
    pixels[3, 3] = value
    with pytest.raises(UnusableImageError, match="its pixels are floats from"):
        open_image(saved(Image.fromarray(pixels), "TIFF"))


def test_formats_that_run_other_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **options: pytest.fail("a program ran"))
    data = saved(Image.new("RGB", (20, 20)), "EPS")
    for look in (open_image, image_format):
        with pytest.raises(UnusableImageError, match="not a readable image"):
            look(data)


def test_bombs_in_the_chunks_of_a_png_are_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 100_000_000, zip=True)
    with pytest.raises(UnusableImageError, match="not a readable image"):
        open_image(saved(Image.new("RGB", (20, 20)), "PNG", pnginfo=text))


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = open_image(data).getpixel((5, 5))  # type: ignore[misc]
        assert red > 250
        assert max(green, blue) < 5, kind


def test_messages_hold_no_address() -> None:
    with pytest.raises(UnusableImageError) as told:
        open_image(b"no image at all", name="one.png")
    assert str(told.value) == "one.png: not a readable image (format unknown); replace or remove it"
