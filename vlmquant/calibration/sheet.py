"""A contact sheet: what is in a set, to look at before it is used. One offline HTML page, or one PNG."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmquant.calibration.images import open_image, thumbnail_uri
from vlmquant.calibration.samples import Sample
from vlmquant.errors import UsageError, shown
from vlmquant.pages import render_page

SUFFIXES = (".html", ".png")
SHOWN = 400
"""Samples of a set on the sheet, in the set's order."""
SKIPPED_SHOWN = 100
SIDE = 240
"""Longest side of a thumbnail, pixels."""
COLUMNS = 6
GAP = 16
"""Pixels between the tiles of a PNG."""
TEXT_SIZE, LINE = 13, 17
"""Of a PNG's texts: pixels of the font, and from line to line."""
LINES = 8
"""Under a thumbnail of a PNG."""
PAPER, INK, SOFT = "#ffffff", "#1b1d21", "#5c626d"


def check_sheet(file: Path) -> None:
    """UsageError unless the suffix says HTML or PNG, and nothing is there yet: it could be one of the images."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--sheet {shown(file)}: must end in {' or '.join(SUFFIXES)}")
    if os.path.lexists(file):
        raise UsageError(f"--sheet {shown(file)}: exists; choose another name or remove it")


def contact_sheet(
    file: Path, sets: Mapping[str, Sequence[Sample]], skipped: Sequence[tuple[str, str]] = ()
) -> str | bytes:
    """The sheet of some sets by name, as the file's suffix says; skipped: (where, why) of records left out."""
    if file.suffix.lower() == ".png":
        return _png(sets, skipped)
    return render_page(
        "vlmquant.calibration",
        "sheet.html.j2",
        sets={name: (samples[:SHOWN], len(samples)) for name, samples in sets.items()},
        thumbnail=partial(thumbnail_uri, side=SIDE),
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_count=len(skipped),
    )


def _png(sets: Mapping[str, Sequence[Sample]], skipped: Sequence[tuple[str, str]]) -> bytes:
    font = ImageFont.load_default(TEXT_SIZE)
    rows: list[Image.Image] = []
    for name, samples in sets.items():
        rows.append(_text_row([f"{name}: {_counted(len(samples), SHOWN, 'samples')}"], font, INK))
        tiles = [_tile(sample, font) for sample in samples[:SHOWN]]
        rows += [_beside(tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
    if skipped:
        lines = [f"Skipped: {_counted(len(skipped), SKIPPED_SHOWN, 'records')}"]
        lines += [f"{where}: {why}" for where, why in skipped[:SKIPPED_SHOWN]]
        rows.append(_text_row(lines, font, SOFT))
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(row.height + GAP for row in rows) + GAP), PAPER)
    top = GAP
    for row in rows:
        sheet.paste(row, (GAP, top))
        top += row.height + GAP
    out = BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _counted(count: int, limit: int, what: str) -> str:
    return f"{count} {what}" if count <= limit else f"the first {limit} of {count} {what}"


def _beside(tiles: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (len(tiles) * (SIDE + GAP), max(tile.height for tile in tiles)), PAPER)
    for index, tile in enumerate(tiles):
        row.paste(tile, (index * (SIDE + GAP), 0))
    return row


def _tile(sample: Sample, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """Thumbnails side by side, and below them id, task, question and answers."""
    images = [open_image(path) for path in sample.images]
    for image in images:
        image.thumbnail((max(SIDE // len(images), 1), SIDE))
    texts = [(f"{sample.id} ({sample.task})", SOFT), (f"Q: {sample.question}", INK)]
    texts += [(f"A: {answer}", INK) for answer in sample.answers]
    lines = [(line, colour) for text, colour in texts for line in _wrapped(text, font, SIDE)]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], ("...", SOFT)]
    top = max((image.height for image in images), default=0)
    tile = Image.new("RGB", (SIDE, top + (len(lines) + 1) * LINE), PAPER)
    for index, image in enumerate(images):
        tile.paste(image, (index * SIDE // len(images), 0))
    draw = ImageDraw.Draw(tile)
    for number, (line, colour) in enumerate(lines):
        draw.text((0, top + 2 + number * LINE), line, font=font, fill=colour)
    return tile


def _text_row(lines: Iterable[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, colour: str) -> Image.Image:
    width = COLUMNS * (SIDE + GAP) - GAP
    wrapped = [part for line in lines for part in _wrapped(line, font, width)]
    row = Image.new("RGB", (width, len(wrapped) * LINE), PAPER)
    draw = ImageDraw.Draw(row)
    for number, line in enumerate(wrapped):
        draw.text((0, number * LINE), line, font=font, fill=colour)
    return row


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text, which strangers wrote, in lines that fit; at most LINES of them."""
    rest = shown(" ".join(text.split()), limit=1000)
    lines: list[str] = []
    while rest and len(lines) < LINES:
        end = next((n for n in range(1, len(rest) + 1) if font.getlength(rest[:n]) > width), len(rest) + 1) - 1
        if end < len(rest) and (space := rest.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(rest[: max(end, 1)])
        rest = rest[max(end, 1) :].lstrip()
    return lines
