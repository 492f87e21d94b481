"""A folder in which the commands of README.md and docs/ mean something: a model, and data in every form they name."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from vlmquant import demo
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set

DEMO = Path(demo.__file__).parent
COUNT = 16
"""Samples of each source."""


FAMILY = """vision_encoder: [model.vision_tower]
projector: [model.multi_modal_projector]
language: model.language_model
"""


def some_samples() -> list[Sample]:
    """With one image each, no image twice."""
    found: dict[Path, Sample] = {}
    for sample in load_set(DEMO / "test").samples:
        if len(sample.images) == 1:
            found.setdefault(sample.images[0], sample)
    return list(found.values())[:COUNT]


def furnish(folder: Path) -> None:
    """my-vlm, cat.jpg, chats.jsonl, train.parquet, odd.csv and what else the pages call their examples."""
    shutil.copytree(DEMO / "model", folder / "my-vlm")
    samples = some_samples()
    for name in ("pictures", "photos"):
        (folder / name).mkdir()
    for sample in samples:
        shutil.copyfile(sample.images[0], folder / "pictures" / sample.images[0].name)
        shutil.copyfile(sample.images[0], folder / "photos" / sample.images[0].name)
        (folder / "photos" / sample.images[0].name).with_suffix(".txt").write_text(sample.answers[0])
    Image.open(samples[0].images[0]).convert("RGB").save(folder / "cat.jpg")
    lines(folder / "chats.jsonl", ({"messages": list(chat(one)), "images": [place(one)]} for one in samples))
    lines(folder / "rows.jsonl", ({"image": place(s), "question": s.question, "answer": s.answers[0]} for s in samples))
    (folder / "llava.json").write_text(json.dumps([llava(sample) for sample in samples]))
    (folder / "captions_val2017.json").write_text(json.dumps(coco(samples)))
    for one in samples:
        shutil.copyfile(one.images[0], folder / one.images[0].name)  # COCO's lie beside the file
    parquet(folder / "train.parquet", samples)
    webdataset(folder / "shard-000.tar", samples)
    (folder / "my-family.yaml").write_text(FAMILY)
    with (folder / "odd.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["picture", "meta", "label"])
        table.writerows([one.images[0].name, json.dumps({"q": one.question}), one.answers[0]] for one in samples)


def lines(file: Path, records: Iterator[object]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def place(sample: Sample) -> str:
    return f"pictures/{sample.images[0].name}"


def chat(sample: Sample) -> Iterator[dict[str, object]]:
    yield {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
    yield {"role": "assistant", "content": [{"type": "text", "text": sample.answers[0]}]}


def llava(sample: Sample) -> dict[str, object]:
    turns = [
        {"from": "human", "value": f"<image>\n{sample.question}"},
        {"from": "gpt", "value": sample.answers[0]},
    ]
    return {"id": sample.id, "image": place(sample), "conversations": turns}


def coco(samples: list[Sample]) -> dict[str, object]:
    return {
        "images": [{"id": number, "file_name": one.images[0].name} for number, one in enumerate(samples)],
        "annotations": [
            {"id": number, "image_id": number, "caption": one.answers[0]} for number, one in enumerate(samples)
        ],
    }


def parquet(file: Path, samples: list[Sample]) -> None:
    """As TRL's data sets for vision-language models lie on the hub: `images` and `messages`."""
    rows = [
        {
            "images": [{"bytes": one.images[0].read_bytes(), "path": one.images[0].name}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": one.question}]},
                {"role": "assistant", "content": [{"type": "text", "text": one.answers[0]}]},
            ],
        }
        for one in samples
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def webdataset(file: Path, samples: list[Sample]) -> None:
    with tarfile.open(file, "w") as archive:
        for number, one in enumerate(samples):
            picture = Image.open(one.images[0]).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            held = io.BytesIO()
            picture.save(held, "PNG")
            for name, content in (
                (f"{number:04d}.png", held.getvalue()),
                (f"{number:04d}.txt", one.answers[0].encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
