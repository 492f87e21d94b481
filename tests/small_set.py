"""A folder of a few image-text pairs, drawn on the spot: enough to calibrate and score the tiny models."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def write_small_set(folder: Path, *, pairs: int = 6, offset: int = 0, texts: int = 2) -> Path:
    """`pairs` images of a coloured disc with a caption or a question each, and some text-only samples."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(offset, offset + pairs):
        colour = COLOURS[number % len(COLOURS)]
        image = Image.new("RGB", (40 + 2 * (number % 5), 40), (number * 37 % 256, number * 91 % 256, 128))
        ImageDraw.Draw(image).ellipse((8, 8, 30, 30), fill=colour)
        name = f"images/{number}.png"
        image.save(folder / name)
        sample = {"id": f"pair-{number}", "image": name}
        if number % 2:
            sample |= {
                "task": "caption",
                "question": "Describe the image.",
                "answers": [f"A {colour} disc.", "A disc."],
            }
        else:
            sample |= {"task": "vqa", "question": "What colour is the disc?", "answers": [colour]}
        lines.append(sample)
    for number in range(texts):
        question = f"What is {number} plus one?"
        lines.append({"id": f"text-{number}", "task": "text", "question": question, "answers": [str(number + 1)]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
