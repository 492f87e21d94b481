"""Every layout in every container: the images that arrive are those that the source has, each beside its own text."""

import base64
import csv
import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmquant.calibration.images import open_image
from vlmquant.calibration.sources import Candidate, SourceReading, SourceSpec, parse_map, parse_source, read_source
from vlmquant.errors import InputError, UsageError

COUNT = 5
"""Records of each source here."""


def png(number: int) -> bytes:
    """A picture that shows its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (10 * number, 7, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def shown_numbers(item: Candidate) -> list[int]:
    """The numbers in the pictures that have arrived."""
    found = [open_image(image if isinstance(image, Path) else image.read()) for image in item.images]
    return [image.getpixel((0, 0))[0] // 10 for image in found]  # type: ignore[index, operator]


def told_numbers(item: Candidate) -> list[int]:
    """The numbers that its first texts name."""
    sample = item.sample
    first = f"{sample.history[0].question} {sample.history[0].answer}" if sample.history else None
    return [int(number) for number in re.findall(r"#(\d+)", first or f"{sample.question} {' '.join(sample.answers)}")]


def read(path: Path, **options: Any) -> SourceReading:
    return read_source(SourceSpec(str(path), **options), scratch=path.parent / "scratch")


def assert_whole(reading: SourceReading, *, images: int = COUNT, samples: int = COUNT) -> None:
    """All has arrived, and beside its own text."""
    assert [(bad.where, bad.reason) for bad in reading.bad] == []
    assert len(reading.candidates) == reading.records == samples
    assert sum(len(item.images) for item in reading.candidates) == reading.images == images
    for item in reading.candidates:
        assert shown_numbers(item) == told_numbers(item)
        assert item.sample.question
        assert all(item.sample.answers)
    assert len({item.sample.id for item in reading.candidates}) == samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the pictures in pictures/."""
    (tmp_path / "pictures").mkdir()
    for number in range(COUNT):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
    return tmp_path


# What stands for an image


def path_of(number: int, folder: Path) -> Any:
    return f"pictures/{number}.png"


def encoded(number: int, folder: Path) -> str:
    return base64.b64encode(png(number)).decode()


TEXT_FORMS: dict[str, Callable[[int, Path], Any]] = {
    "path": path_of,
    "absolute": lambda number, folder: str(folder / path_of(number, folder)),
    "file-url": lambda number, folder: (folder / path_of(number, folder)).as_uri(),
    "base64": encoded,
    "data-url": lambda number, folder: f"data:image/png;base64,{encoded(number, folder)}",
}
FORMS: dict[str, Callable[[int, Path], Any]] = {
    **TEXT_FORMS,
    "list": lambda number, folder: [path_of(number, folder)],
    "nested": lambda number, folder: [[path_of(number, folder)]],
    "url": lambda number, folder: {"url": path_of(number, folder)},
    "image_url": lambda number, folder: {"image_url": {"url": f"data:image/png;base64,{encoded(number, folder)}"}},
    "path-object": lambda number, folder: {"bytes": None, "path": path_of(number, folder)},
    "base64-object": lambda number, folder: [{"bytes": encoded(number, folder), "path": "x.png"}],
}
BINARY_FORMS: dict[str, Callable[[int, Path], Any]] = {
    "bytes": lambda number, folder: png(number),
    "struct": lambda number, folder: {"bytes": png(number), "path": "elsewhere.png"},
    "structs": lambda number, folder: [{"bytes": png(number), "path": None}],
}

# Layouts: (an image's place, its number) -> a record


def chat(*exchanges: tuple[str, str], speaker: str = "role", said: str = "content") -> list[dict[str, str]]:
    names = ("user", "assistant") if speaker == "role" else ("human", "gpt")
    return [{speaker: name, said: text} for exchange in exchanges for name, text in zip(names, exchange, strict=True)]


LAYOUTS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "simple": lambda place, n: {"image": place, "question": f"what is #{n}?", "answer": n},
    "marked": lambda place, n: {"image": place, "question": f"<image>\nwhat is #{n}?", "answers": ["red", "dark"]},
    "caption": lambda place, n: {"img_path": place, "caption": f"a field #{n}"},
    "camel": lambda place, n: {"imageUrl": place, "text": f"a field #{n}", "width": 16, "imageId": n},
    "picture": lambda place, n: {"picture": place, "query": "which?", "response": f"#{n}", "is_red": True},
    "chartqa": lambda place, n: {"image": place, "query": "which?", "label": [f"#{n}"], "human_or_machine": 0},
    "problem": lambda place, n: {"images": place, "problem": f"<image>#{n}?", "solution": "<answer>4</answer>"},
    "alpaca": lambda place, n: {"instruction": "which?", "input": f"of #{n}", "output": "red", "images": place},
    "trl": lambda place, n: {"images": place, "messages": chat((f"<image>which #{n}?", "red"))},
    "cauldron": lambda place, n: {
        "images": place,
        "texts": [
            {"user": f"which? #{n}", "assistant": "red", "source": "s"},
            {"user": "sure?", "assistant": "yes", "source": "s"},
        ],
    },
    "llava": lambda place, n: {
        "id": f"{n:012}",
        "image": place,
        "conversations": chat((f"<image>\nwhich? #{n}", "red"), ("sure?", "yes"), speaker="from", said="value"),
    },
    "sharegpt-roles": lambda place, n: {"image": place, "conversations": chat((f"which? #{n}", "red"))},
    "prompt-completion": lambda place, n: {
        "images": place,
        "prompt": [{"role": "user", "content": f"which? #{n}"}],
        "completion": [{"role": "assistant", "content": "red"}],
    },
    "preference": lambda place, n: {"image": place, "question": f"#{n}?", "chosen": "red", "rejected": "blue"},
    "choices": lambda place, n: {"image": place, "question": f"#{n}?", "choices": ["red", "blue"], "answer": 1},
}
LAYOUTS |= {
    "vqa": lambda place, n: {
        "question_id": 10 + n,
        "question": f"which? #{n}",
        "image": place,
        "image_id": n,
        "multiple_choice_answer": "red",
        "answers": [{"answer": "red", "answer_confidence": "yes"}, {"answer": "dark", "answer_confidence": "no"}],
    },
    "two-forms": lambda place, n: {
        "pid": n,
        "image": "images/1.jpg",
        "decoded_image": place,
        "query": f"#{n}?",
        "answer": 1,
    },
    "mmmu": lambda place, n: {
        "id": f"x_{n}",
        "question": f"<image 1> which? #{n}",
        "options": "['red', 'blue <image 1>']",
        "image_1": place,
        "image_2": None,
        "img_type": "['Photographs']",
        "answer": "A",
    },
    "open-choices": lambda place, n: {
        "image": place,
        "question": f"#{n}?",
        "choices": ["red", "blue"],
        "direct_answers": ["dark red", "crimson"],
    },
    "prefix": lambda place, n: {"image": place, "prefix": f"caption #{n}", "suffix": "red"},
    "pairs": lambda place, n: {
        "image": place,
        "qa": [{"question": f"#{n}?", "answer": "red"}, {"question": "b?", "answer": "c"}],
    },
    "lists": lambda place, n: {"image": place, "questions": [f"#{n}?", "sure?"], "answers": ["red", "yes"]},
    "preference-chat": lambda place, n: {
        "images": place,
        "conversations": [{"from": "human", "value": f"<image>#{n}?"}],
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "blue"},
    },
    "history": lambda place, n: {
        "query": "sure?",
        "response": "yes",
        "images": place,
        "history": [[f"#{n}?", "red"]],
    },
    "languages": lambda place, n: {"image": place, "query": {"de": "was?", "en": f"#{n}?"}, "answers": ["red"]},
}
PARTS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "gemini": lambda place, n: {
        "contents": [
            {"role": "user", "parts": [{"fileData": {"mimeType": "image/png", "fileUri": place}}, {"text": f"#{n}?"}]},
            {"role": "model", "parts": [{"text": "red"}]},
        ]
    },
    "image-in-text-part": lambda place, n: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"#{n}?", "image": place}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
    },
    "untyped": lambda place, n: {
        "messages": [
            {"role": "user", "content": [{"image": place, "text": f"#{n}?"}]},
            {"role": "assistant", "content": [{"text": "red"}]},
        ]
    },
    "slots": lambda place, n: {
        "images": place,
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"which? #{n}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    },
    "openai": lambda place, n: {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": f"which? #{n}"},
                    {"type": "image_url", "image_url": {"url": place}},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
    },
    "qwen": lambda place, n: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": place}, {"type": "text", "text": f"#{n}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
    },
    "in-message": lambda place, n: {
        "messages": [
            {"role": "user", "content": f"which? #{n}", "images": [place]},
            {"role": "assistant", "content": "red"},
        ]
    },
    "in-turn": lambda place, n: {"texts": [{"user": f"which? #{n}", "assistant": "red", "image": place}]},
    "anthropic": lambda place, n: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "data": place}},
                    {"type": "text", "text": f"#{n}?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
    },
    "qwen-mark": lambda place, n: {
        "conversations": chat((f"Picture 1: <img>{place}</img>\nwhich? #{n}", "red"), speaker="from", said="value")
    },
}

# Containers: writes records to a file of its kind


def as_jsonl(records: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, records)).encode())
    return path


def as_json(records: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps(records, indent=1))
    return folder / "data.json"


def as_wrapped_json(records: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps({"version": 1, "data": records}))
    return folder / "data.json"


def as_json_by_id(records: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps({f"r{n}": record for n, record in enumerate(records)}))
    return folder / "data.json"


def as_gzip(records: list[dict[str, Any]], folder: Path) -> Path:
    with gzip.open(folder / "data.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, records)))
    return folder / "data.jsonl.gz"


def as_table(records: list[dict[str, Any]], path: Path, delimiter: str) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        for record in records:
            cells = {
                key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in record.items()
            }
            writer.writerow(cells)
    return path


def as_csv(records: list[dict[str, Any]], folder: Path) -> Path:
    return as_table(records, folder / "data.csv", ",")


def as_semicolons(records: list[dict[str, Any]], folder: Path) -> Path:
    return as_table(records, folder / "data.csv", ";")


def as_tsv(records: list[dict[str, Any]], folder: Path) -> Path:
    return as_table(records, folder / "data.tsv", "\t")


def as_parquet(records: list[dict[str, Any]], folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "data.parquet", row_group_size=2)
    return folder / "data.parquet"


def as_arrow(records: list[dict[str, Any]], folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    return folder / "saved"


TEXT_CONTAINERS = [as_jsonl, as_json, as_wrapped_json, as_json_by_id, as_gzip, as_csv, as_semicolons, as_tsv]
BINARY_CONTAINERS = [as_parquet, as_arrow]


def assert_read(name: str, make: Callable[[int], dict[str, Any]], container: Callable[..., Path], folder: Path) -> None:
    """Records of one kind arrive whole."""
    home = folder / name
    home.mkdir()
    path = container([make(number) for number in range(COUNT)], home)
    try:
        assert_whole(read(path, images=str(folder)))
    except Exception as error:
        raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("container", [*TEXT_CONTAINERS, *BINARY_CONTAINERS])
def test_each_layout_in_each_container(container: Callable[..., Path], folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        assert_read(name, lambda number, made=layout: made(path_of(number, folder), number), container, folder)


@pytest.mark.parametrize("container", [as_jsonl, as_json, as_parquet, as_arrow])
def test_images_in_messages(container: Callable[..., Path], folder: Path) -> None:
    for name, layout in PARTS.items():
        assert_read(name, lambda number, made=layout: made(path_of(number, folder), number), container, folder)


@pytest.mark.parametrize("container", [*TEXT_CONTAINERS, *BINARY_CONTAINERS])
def test_each_form_of_an_image_in_each_container(container: Callable[..., Path], folder: Path) -> None:
    for name, form in (FORMS if container in TEXT_CONTAINERS else FORMS | BINARY_FORMS).items():
        for layout in ("simple", "llava"):
            assert_read(
                f"{layout}-{name}",
                lambda number, made=LAYOUTS[layout], form=form: made(form(number, folder), number),
                container,
                folder,
            )


# Other containers


def as_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_webdataset(name: str, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(COUNT):
        members[f"a/{number:03}.png"] = png(number)
        if number % 2:
            members[f"a/{number:03}.txt"] = f"a field #{number}".encode()
        else:
            said = {"caption": f"a field #{number}", "url": "https://x.org/a.png", "sha256": "x", "original_width": 16}
            members[f"a/{number:03}.json"] = json.dumps(said).encode()
    assert_whole(read(as_tar(tmp_path / name, members)))
    as_tar(tmp_path / name, members | {"b.png": png(1), "c.txt": b"alone"})
    assert [bad.reason for bad in read(tmp_path / name).bad] == [
        "without an answer or caption",
        "without a question or an image",
    ]


def test_shards_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(COUNT):
        members = {"x.jpg": png(number), "x.json": json.dumps({"question": f"#{number}?", "answer": "red"}).encode()}
        as_tar(tmp_path / "shards" / f"{number}.tar", members)
    assert_whole(read(tmp_path / "shards"))


def test_a_torn_archive_is_refused(tmp_path: Path) -> None:
    path = as_tar(tmp_path / "x.tar", {f"{number}.png": png(number) * 20 for number in range(COUNT)})
    for size in (100, 700, 3000, path.stat().st_size - 12_000):
        torn = tmp_path / f"torn{size}.tar"
        torn.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match=r"torn\d+\.tar"):
            read(torn)


def test_images_with_texts_beside_them(folder: Path) -> None:
    for number in range(COUNT):
        text = folder / "pictures" / f"{number}.txt"
        text.write_text(f"a field #{number}\n")
    (folder / "pictures" / "1.txt").unlink()
    (folder / "pictures" / "1.json").write_text(json.dumps({"question": "#1?", "answer": "red"}))
    assert_whole(read(folder / "pictures"))
    (folder / "pictures" / "sub").mkdir()
    (folder / "pictures" / "sub" / "9.png").write_bytes(png(9))
    (folder / "pictures" / "sub" / "8.txt").write_text("alone")
    assert [bad.reason for bad in read(folder / "pictures").bad] == [
        "without a text file of the same name",
        "without an image of the same name",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_image_folders(kind: str, folder: Path) -> None:
    make = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}[kind]
    records = [{"file_name": f"{number}.png", "text": f"a field #{number}", "size": 16} for number in range(COUNT)]
    make(records, folder / "pictures").rename(folder / "pictures" / f"metadata.{kind}")
    assert_whole(read(folder / "pictures"))
    (folder / "top").mkdir()
    (folder / "pictures").rename(folder / "top" / "train")
    assert_whole(read(folder / "top"))


def test_a_folder_with_one_file_of_records(folder: Path) -> None:
    as_json([LAYOUTS["simple"](path_of(number, folder), number) for number in range(COUNT)], folder)
    assert_whole(read(folder))
    as_csv([{"question": "a", "answer": "b"}], folder)
    with pytest.raises(InputError, match=r"holds 2 files of records \(data\.csv, data\.json\); name one of them"):
        read(folder)


def test_tsv_without_a_header(folder: Path) -> None:
    lines = [f'a "field #{number}\tpictures/{number}.png' for number in range(COUNT)]
    (folder / "data.tsv").write_text("\n".join(lines))
    assert_whole(read(folder / "data.tsv"))
    (folder / "wide.tsv").write_text("\n".join(f"x\t{line}" for line in lines))
    with pytest.raises(InputError, match=r"--map image=KEY.*"):
        read(folder / "wide.tsv")
    assert_whole(read(folder / "wide.tsv", map=parse_map("image=3,caption=2")))
    (folder / "web.tsv").write_text("a cat\thttp://x.org/1\na dog\thttp://x.org/2\n")
    with pytest.raises(InputError, match=r"2 with an image on the network .*download it"):
        read(folder / "web.tsv")


def test_tsv_with_base64_and_lettered_choices(folder: Path) -> None:
    columns = {"A": "red", "B": "blue", "answer": "B", "category": "x"}
    records = [
        {"index": number, "image": encoded(number, folder), "question": f"which? #{number}", **columns}
        for number in range(COUNT)
    ]
    reading = read(as_tsv(records, folder))
    assert_whole(reading)
    assert reading.candidates[0].sample.question.startswith("which? #0\nA. red\nB. blue\nAnswer")
    assert reading.candidates[0].sample.answers == ("B",)
    assert reading.unused == ("category",)


def test_parquet_of_several_shards_and_row_groups(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for shard in range(2):
        home = tmp_path / "data" / str(shard)
        home.mkdir()
        as_parquet(
            [LAYOUTS["trl"]([{"bytes": png(n), "path": None}], n) for n in range(5 * shard, 5 * shard + 5)], home
        )
    assert_whole(read(tmp_path / "data"), images=10, samples=10)


def test_nested_columns_and_rows_as_columns(folder: Path) -> None:
    columns = {
        "image": [path_of(number, folder) for number in range(COUNT)],
        "question": [f"#{number}?" for number in range(COUNT)],
        "answer": ["red"] * COUNT,
    }
    (folder / "columns.json").write_text(json.dumps(columns))
    assert_whole(read(folder / "columns.json"))
    (folder / "frame.json").write_text(json.dumps({key: dict(enumerate(values)) for key, values in columns.items()}))
    assert_whole(read(folder / "frame.json"))
    records = [
        {"data": {"shot": path_of(number, folder), "ask": f"#{number}?"}, "out": {"say": "red"}}
        for number in range(COUNT)
    ]
    with pytest.raises(InputError, match="name what holds what"):
        read(as_jsonl(records, folder))
    assert_whole(read(as_jsonl(records, folder), map=parse_map("image=data.shot, question=data.ask, answer=out.say")))


def test_a_data_set_of_the_hub_and_of_several_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    cells = [{"bytes": png(number), "path": None} for number in range(COUNT)]
    columns = {"image": cells, "question": [f"#{number}?" for number in range(COUNT)], "answer": ["red"] * COUNT}
    texts = {name: datasets.Value("string") for name in ("question", "answer")}
    whole = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), **texts}))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: whole)
    assert_whole(read_source(SourceSpec("owner/name"), scratch=tmp_path))
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "saved")
    assert_whole(read(tmp_path / "saved"))
    assert_whole(read(tmp_path / "saved" / "test"))
    datasets.DatasetDict({"dev": whole, "test": whole}).save_to_disk(tmp_path / "odd")
    with pytest.raises(InputError, match=r"has the splits dev, test; name the folder of one, .*/odd/dev"):
        read(tmp_path / "odd")


# COCO


def coco(folder: Path, ids: list[Any], image_ids: list[Any], **more: Any) -> Path:
    images = [{"id": key, "file_name": f"pictures/{number}.png"} for number, key in enumerate(ids)]
    annotations = [{"image_id": key, "caption": f"a field #{number}"} for number, key in enumerate(image_ids)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return folder / "captions.json"


def test_coco_ids(folder: Path) -> None:
    assert_whole(read(coco(folder, [5, 6, 7, 8, 9], [5, 6, 7, 8, 9])))
    assert_whole(read(coco(folder, [5, 6, 7, 8, 9], ["5", "6", "7", "8", "000009"])))
    with pytest.raises(
        InputError, match=r"images\[4\]: image id 5 stands twice, for pictures/0\.png and pictures/4\.png"
    ):
        read(coco(folder, [5, 6, 7, 8, 5], [5, 6, 7, 8, 5]))
    with pytest.raises(
        InputError, match=r"no image_id .* \(image ids are numbers, such as 5; image_ids are text, such as 'a'\)"
    ):
        read(coco(folder, [5, 6], ["a", "b"]))
    reading = read(coco(folder, [5, 6, 7, 8, 9], [5, 6, 77, 88]))
    assert [(bad.where.rpartition("/")[2], bad.kind) for bad in reading.bad] == [
        ("captions.json annotations[2]", "with an image_id that no image has"),
        ("captions.json annotations[3]", "with an image_id that no image has"),
        ("captions.json images[2]", "without an answer or caption"),
        ("captions.json images[3]", "without an answer or caption"),
        ("captions.json images[4]", "without an answer or caption"),
    ]
    assert reading.images == 5
    assert [shown_numbers(item) for item in reading.candidates] == [[0], [1]]


def test_an_image_that_coco_lists_twice_is_one(folder: Path) -> None:
    path = coco(folder, [1, 1], [1])
    content = json.loads(path.read_text())
    content["images"][1] = content["images"][0]
    path.write_text(json.dumps(content))
    assert_whole(read(path), images=1, samples=1)


# Records that say they have an image, and have none


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image": "pictures/7.png"}, r"with a missing image: pictures/7\.png is not in .*--images-folder"),
        ({"image_file_path": "none.png"}, r"with a missing image: none\.png is not in "),
        ({"photo": "https://x.org/1"}, "with an image on the network: https://x.org/1; download it"),
        ({"imageUrl": {"url": "s3://bucket/1.png"}}, "with an image on the network"),
        ({"image": ["pictures/0.png", "pictures/8.png"]}, "with a missing image: pictures/8"),
        ({"image": "file://[/a.png"}, "with an image outside its folder: /a.png leads out"),
        ({"image": "a\0.png"}, "with a missing image"),
        ({"image": 7}, "with an image that is none: a number"),
        ({"image": {"height": 3, "width": 4}}, "with an image that is none: a dict of height, width"),
        ({"image": "pictures"}, "with an image that is none: pictures is a directory"),
        ({"image": "data:image/png;base64,AAA!"}, "with a damaged image"),
        ({"image": "data:image/svg+xml,<svg/>"}, "with an image that is none: of data: URLs"),
        ({"image_id": 12}, "with an image that is not there: nothing under 'image_id'"),
        ({"num_images": 2}, "with an image that is not there: nothing under 'num_images'"),
        ({"extra": {"meta": {"picture": "a.png"}}}, "with an image that is not there: nothing under 'extra'"),
        ({"shot": "pictures/9.png"}, "with a missing image: pictures/9.png"),
        ({"question": "<image>\nwhich?"}, "with an image that is not there: its text marks 1 and there are 0"),
        ({"question": "<|image|>which?"}, "with an image that is not there"),
        ({"question": "see <image_1> and <image 2>", "image": "pictures/0.png"}, "its text marks 2 and there are 1"),
        ({"question": "<|vision_start|><|image_pad|><|vision_end|>which?"}, "its text marks 1 and there are 0"),
        ({"question": "[IMG] which?"}, "its text marks 1"),
        ({"answer": "<image>"}, "with an image in a message of role 'assistant'"),
        ({"picture": "pictures/0.png", "mask": "pictures/1.png"}, "under more than one key: picture and mask; name"),
        ({"image": "none.png", "photo": "pictures/1.png"}, "with a missing image: none.png"),
        ({"image": "pictures/0.png", "picture": "pictures/1.png"}, "--map image=image, or both, --map image=image"),
        ({"question": {"de": "was?"}}, "with a key for a text that holds none: 'question' is a dict"),
        ({"questions": ["a", "b", "c"], "question": None, "answer": ["d", "e"]}, "do not pair: 3 questions, 2 answers"),
        ({"caption": "a cat", "question": None, "answer": None}, "without a question or an image"),
        ({"choices": ["a", "b"], "answer": "7"}, "with an answer that is none of its choices: 7"),
        ({"video": "a.mp4"}, "with a video or sound, which is not read"),
        ({"question": "<video>which?", "image": "pictures/0.png"}, "with a video or sound"),
    ],
)
def test_an_image_that_is_not_there_costs_its_record(fields: dict[str, Any], reason: str, folder: Path) -> None:
    sound = {"question": "2 + 2?", "answer": "4"}
    nothing = {"image": " ", "images": [], "photo": [None], "picture": {"bytes": None, "path": None}, "num_images": 0}
    reading = read(as_jsonl([sound | nothing, sound | fields, sound | {"image": None, "has_image": False}], folder))
    (bad,) = reading.bad
    assert bad.where.endswith("data.jsonl:2")
    assert re.search(reason, bad.reason), bad.reason
    assert [item.images for item in reading.candidates] == [(), ()]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": None, "tool_calls": [{"id": "x"}]}], "with a tool call"),
        ([*chat(("a", "b")), {"role": "tool", "content": "x"}], "with a tool call"),
        (chat(("a", "b"), ("<image>c", "d")), "with an image after its first question"),
        ([{"role": "user", "content": [{"type": "image"}]}, *chat(("a", "b"))], "marks 1 and there are 0"),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}],
            "part of a message that is no text or image",
        ),
        ([{"role": ["user"], "content": "a"}], "with a message of an unknown role"),
        ([{"from": 3, "value": "a"}], "with a message of an unknown role"),
        (["a", "b"], "without an answer or caption"),
        (chat(("a", "")), "with an empty answer"),
        ([{"role": "assistant", "content": "a"}], "of role 'assistant' out of place"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x.org/a"}}]}], "network"),
    ],
)
def test_a_bad_message_costs_its_record(messages: Any, reason: str, folder: Path) -> None:
    sound = {"messages": chat(("a", "b"))}
    messages = messages if len(messages) > 1 else [*messages, {"role": "assistant", "content": "x"}]
    reading = read(as_json([sound, {"messages": messages}, sound], folder))
    assert [(bad.where.rpartition("/")[2], reason in bad.reason) for bad in reading.bad] == [
        ("data.json record 2", True)
    ]
    assert len(reading.candidates) == 2


def test_a_line_that_is_no_record_costs_itself(folder: Path) -> None:
    sound = json.dumps({"question": "a", "answer": "b"}).encode()
    lines = [
        sound,
        b'{"question": "a"',
        b"[1]",
        b"\xff\xfe",
        b'{"a": 1, "a": 2}',
        b"[" * 5000,
        b'{"answer": NaN}',
        sound,
    ]
    (folder / "data.jsonl").write_bytes(b"\r\n".join(lines))
    reading = read(folder / "data.jsonl")
    assert [bad.where.rpartition(":")[2] for bad in reading.bad] == ["2", "3", "4", "5", "6", "7"]
    assert all(bad.kind == "unreadable" for bad in reading.bad)
    assert len(reading.candidates) == 2


# Which image is meant


def test_numbered_keys_are_images_of_one_record(folder: Path) -> None:
    names = [f"pictures/{number}.png" for number in range(3)]
    for keys in (["image_2", "image_0", "image_1"], ["image", "image1", "image2"], ["img_a", "img_b", "img_c"]):
        record = {**dict(zip(keys, names, strict=True)), "question": "same?", "answer": "no"}
        (item,) = read(as_jsonl([record], folder)).candidates
        order = sorted(range(3), key=lambda index: keys[index])
        assert shown_numbers(item) == order


def test_one_image_in_several_forms_is_one(folder: Path) -> None:
    texts = {"question": "#1?", "answer": "red"}
    for fields in (
        {"image": encoded(1, folder), "image_path": "pictures/1.png"},
        {"image": "pictures/1.png", "images": ["pictures/1.png"]},
        {"image_url": "https://x.org/1.png", "image_path": "pictures/1.png"},
        {"image": "pictures/1.png", "coco_url": "https://x.org/1.png", "source": "not-here/1.png"},
    ):
        assert_whole(read(as_jsonl([fields | texts], folder)), images=1, samples=1)


def test_a_map_says_what_is_meant(folder: Path) -> None:
    records = [
        {
            "picture": path_of(n, folder),
            "mask": "pictures/mask.png",
            "q": f"#{n}?",
            "r": "red",
            "question": "no",
            "text": "no",
        }
        for n in range(COUNT)
    ]
    (folder / "pictures" / "mask.png").write_bytes(png(9))
    path = as_csv(records, folder)
    with pytest.raises(
        InputError, match=r"more than one key: picture and mask; .*read as csv: .*unused: 'mask', 'q', 'r'"
    ):
        read(path)
    reading = read(path, map=parse_map("image=picture,question=q,answer=r"))
    assert_whole(reading)
    assert reading.read_as == {"question": ("q",), "answer": ("r",), "image": ("picture",)}
    assert reading.unused == ("mask", "question", "text")
    both = read(path, map=parse_map("image=picture+mask,question=q,answer=r"))
    assert [shown_numbers(item) for item in both.candidates] == [[n, 9] for n in range(COUNT)]
    none = read(path, map=parse_map("image=,question=q,answer=r"))
    assert [item.images for item in none.candidates] == [()] * COUNT
    with pytest.raises(InputError, match="--map answer=says: no record has this key; there are picture, mask, q, r"):
        read(path, map={"answer": "says"})
    with pytest.raises(UsageError, match="ROLE is one of image, question"):
        parse_map("pictures=x")


@pytest.mark.parametrize("answer", [1, "1", "B", "(b)", "B.", "blue"])
def test_the_answer_to_choices_is_a_letter(answer: Any, folder: Path) -> None:
    texts = {"question": "which?", "answer": answer}
    for choices in ({"choices": ["red", "blue"]}, {"options": '["red", "blue"]'}, {"A": "red", "B": "blue"}):
        (item,) = read(as_jsonl([texts | choices], folder)).candidates
        assert item.sample.answers == ("B",)
        assert item.sample.question.startswith("which?\nA. red\nB. blue\n")


def test_each_slot_is_given_the_image_of_its_number(folder: Path) -> None:
    content = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "same?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    record = {"images": ["pictures/0.png", "pictures/1.png"], "messages": messages}
    (item,) = read(as_jsonl([record], folder)).candidates
    assert shown_numbers(item) == [1, 0]


# Out of the folder


def test_images_outside_are_refused_unless_that_is_said(folder: Path) -> None:
    home = folder / "data"
    home.mkdir()
    (home / "link.png").symlink_to(folder / "pictures" / "2.png")
    places = [
        "../pictures/0.png",
        str(folder / "pictures" / "1.png"),
        "link.png",
        (folder / "pictures" / "3.png").as_uri(),
    ]
    records = [LAYOUTS["simple"](place, number) for number, place in enumerate(places)]
    for path in (as_jsonl(records, home), as_parquet(records, home)):
        with pytest.raises(InputError, match=r"4 with an image outside its folder .*--images-folder.*--allow-outside"):
            read(path)
        assert_whole(read(path, allow_outside=True), images=4, samples=4)
        named = read(path, images=str(folder / "pictures"))
        assert [item.sample.question for item in named.candidates] == ["what is #0?", "what is #1?", "what is #3?"]


def test_linked_files_of_a_folder_obey_the_same_rule(folder: Path) -> None:
    home = folder / "data"
    home.mkdir()
    (home / "0.png").write_bytes(png(0))
    (folder / "secret").write_text("a field #0")
    (home / "0.txt").symlink_to(folder / "secret")
    with pytest.raises(InputError, match=r"0\.txt: is a link that leads out of .*--allow-outside"):
        read(home)
    assert_whole(read(home, allow_outside=True), images=1, samples=1)
    (home / "0.txt").unlink()
    (home / "0.png").unlink()
    (home / "loop").symlink_to(home)
    record = LAYOUTS["simple"](str(folder / path_of(0, folder)), 0)
    as_parquet([record], folder).rename(folder / "shard")
    (home / "shard.parquet").symlink_to(folder / "shard")
    for form in ("auto", "parquet"):
        with pytest.raises(InputError, match=r"shard\.parquet: is a link"):
            read(home, format=form)
        assert_whole(read(home, format=form, allow_outside=True), images=1, samples=1)


def test_gzip_files_of_one_name_and_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(COUNT):
        (tmp_path / "shards" / str(number)).mkdir(parents=True)
        as_tar(tmp_path / "shards" / str(number) / "x.tar.gz", {"x.png": png(number), "x.txt": f"#{number}".encode()})
    assert_whole(read(tmp_path / "shards"))
    monkeypatch.setattr("vlmquant.calibration.sources.files.MAX_UNPACKED_BYTES", 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(InputError, match=r"bomb\.jsonl\.gz: unpacks to more than"):
        read(tmp_path / "bomb.jsonl.gz")


def test_what_is_no_regular_file_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.jsonl")
    reading = read(as_jsonl([LAYOUTS["simple"](place, 0) for place in ("pipe.png", "pictures/0.png")], folder))
    assert [bad.reason for bad in reading.bad] == [
        "with an image that is none: pipe.png is a named pipe and no regular file"
    ]
    with pytest.raises(InputError, match=r"pipe\.jsonl: is a named pipe"):
        read(folder / "pipe.jsonl")


# What is no source


@pytest.mark.parametrize(
    "text", ["a/b.jsonl", "a/b.tsv.gz", "./owner/name", "a/b/c", "~/name", "here/name", "x.parquet"]
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("asked of the hub"))
    with pytest.raises(InputError, match="no such file or folder"):
        read_source(parse_source(text), scratch=Path("scratch"))


def test_a_mistyped_path_is_corrected(folder: Path) -> None:
    as_jsonl([{"question": "a", "answer": "b"}], folder)
    with pytest.raises(InputError, match=r"dta\.jsonl: no such file or folder; did you mean .*/data\.jsonl"):
        read(folder / "dta.jsonl")


def test_what_fits_is_listed_where_nothing_does(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds 5 x \.png, and no metadata.*FORMAT:PATH, one of set, jsonl"):
        read(folder)
    (folder / "data.xml").touch()
    with pytest.raises(InputError, match=r"known: \.jsonl, .*FORMAT:PATH"):
        read(folder / "data.xml")


def test_unknown_keys_are_told(folder: Path) -> None:
    with pytest.raises(InputError, match=r"read as jsonl: nothing; unused: 'q', 'a'; .*--map image=KEY"):
        read(as_jsonl([{"q": "x", "a": "y"}], folder))
