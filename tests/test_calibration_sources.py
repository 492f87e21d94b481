"""A user's own data in every format we read, and what is refused or skipped."""

import base64
import contextlib
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmquant.calibration.build import build_set, draw_set
from vlmquant.calibration.images import UnusableImageError, open_image
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set, write_set
from vlmquant.calibration.sources import (
    CAPTION_QUESTION,
    Candidate,
    EmbeddedImage,
    SourceSpec,
    parse_source,
    read_source,
)
from vlmquant.errors import InputError
from vlmquant.recipe import CalibrationSpec


def png(colour: Any = "red", size: tuple[int, int] = (16, 12), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, red to white, in images/."""
    (tmp_path / "images").mkdir()
    for colour in ("red", "green", "blue", "white"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def json_lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def read(path: Path | str, tmp_path: Path, **options: Any) -> list[Candidate]:
    return read_source(SourceSpec(str(path), **options), scratch=tmp_path / "scratch").candidates


def image_bytes(item: Candidate) -> list[bytes]:
    return [image.read() if isinstance(image, EmbeddedImage) else image.read_bytes() for image in item.images]


# Formats


def test_json_lines_with_an_image_folder(folder: Path, tmp_path: Path) -> None:
    path = json_lines(
        folder / "data.jsonl",
        {"image": "images/red.png", "question": "<image>\nwhich colour?", "answer": "red"},
        {"image": "images/blue.png", "caption": "a blue field"},
        {"question": "2 + 2?", "answers": ["4", "four"], "task": "math"},
        {"images": ["images/red.png", "images/blue.png"], "prompt": "same?", "response": "no", "id": 12},
    )
    items = read(path, tmp_path)
    assert [(item.sample.task, item.sample.question, item.sample.answers) for item in items] == [
        ("vqa", "which colour?", ("red",)),
        ("caption", CAPTION_QUESTION, ("a blue field",)),
        ("math", "2 + 2?", ("4", "four")),
        ("vqa", "same?", ("no",)),
    ]
    assert image_bytes(items[0]) == [png("red")]
    assert len(items[3].images) == 2
    assert items[3].sample.id == "data-12"


def test_ids_without_a_name_come_from_the_content(folder: Path, tmp_path: Path) -> None:
    one = {"question": "a?", "answer": "b"}
    two = {"question": "c?", "answer": "d"}
    short = [item.sample.id for item in read(json_lines(folder / "data.jsonl", one), tmp_path)]
    grown = [item.sample.id for item in read(json_lines(folder / "data.jsonl", two, one, one), tmp_path)]
    assert grown[1] == short[0]
    assert len(set(grown)) == 3


def test_csv(folder: Path, tmp_path: Path) -> None:
    (folder / "data.csv").write_text('image,question,answer\nimages/red.png,"red, or\nblue?",red\n,2+2?,4\n')
    items = read(folder / "data.csv", tmp_path)
    assert [(item.sample.question, item.sample.answers, len(item.images)) for item in items] == [
        ("red, or\nblue?", ("red",), 1),
        ("2+2?", ("4",), 0),
    ]
    (folder / "data.csv").write_text("question,answer\na,b,c\nd,e\nf\n")
    reading = read_source(SourceSpec(str(folder / "data.csv")), scratch=tmp_path)
    assert [item.sample.question for item in reading.candidates] == ["d"]
    assert [(bad.where.rsplit("/")[-1], bad.kind) for bad in reading.bad] == [
        ("data.csv:2", "with more fields than the header names"),
        ("data.csv:4", "with fewer fields than the header names"),
    ]


def test_json_list_and_conversations(folder: Path, tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nwhich colour?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    records = [
        {"image": "images/red.png", "question": "q", "answer": "a"},
        {"image": "images/red.png", "conversations": turns},
    ]
    (folder / "data.json").write_text(json.dumps(records))
    simple, chat = read(folder / "data.json", tmp_path)
    assert simple.sample.question == "q"
    assert chat.sample.question == "sure?"
    assert chat.sample.answers == ("Yes.",)
    assert [(turn.question, turn.answer) for turn in chat.sample.history] == [("which colour?", "Red.")]
    assert image_bytes(chat) == [png("red")]


@pytest.mark.parametrize("place", ["", "images", "val2017", "../val2017"])
def test_coco_captions(tmp_path: Path, place: str) -> None:
    home = tmp_path / "coco" / "annotations"
    (home / place).mkdir(parents=True, exist_ok=True)
    (home / place / "1.png").write_bytes(png())
    content = {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
        "annotations": [
            {"id": 10, "image_id": 1, "caption": "a red field "},
            {"id": 11, "image_id": 1, "caption": "red"},
        ],
    }
    (home / "captions_val2017.json").write_text(json.dumps(content))
    reading = read_source(SourceSpec(str(home / "captions_val2017.json")), scratch=tmp_path)
    (item,) = reading.candidates
    assert item.sample == Sample("coco-1", "caption", CAPTION_QUESTION, ("a red field", "red"))
    assert image_bytes(item) == [png()]
    assert [(bad.where.rsplit("/")[-1], bad.reason) for bad in reading.bad] == [
        ("captions_val2017.json images[1]", "without an answer or caption")
    ]


def test_messages(folder: Path, tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png("green")).decode()
    parts = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": "images/red.png"}},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "are these?"},
    ]
    late = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": parts}]
    path = json_lines(
        folder / "chat.jsonl",
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "colours"},
                {"role": "user", "content": "more?"},
                {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
            ]
        },
        {"messages": [*late, {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "a"}]},
    )
    reading = read_source(SourceSpec(str(path)), scratch=tmp_path)
    (item,) = reading.candidates
    assert item.sample.system == "be brief"
    assert [(turn.question, turn.answer) for turn in item.sample.history] == [("what\nare these?", "colours")]
    assert (item.sample.question, item.sample.answers) == ("more?", ("no",))
    assert image_bytes(item) == [png("red"), png("green")]
    assert [bad.reason for bad in reading.bad] == [
        "with an image after its first question",
        "without an answer or caption",
    ]


def test_an_image_on_the_network_is_refused(folder: Path, tmp_path: Path) -> None:
    for url in ("http://example.org/a.png", "https://example.org/a.png", "s3://b/a.png"):
        path = json_lines(folder / "data.jsonl", {"image": url, "question": "q", "answer": "a"})
        with pytest.raises(InputError, match=r"data\.jsonl:1: with an image on the network: .*; download it"):
            read(path, tmp_path)


def test_parquet_with_images_inside(tmp_path: Path) -> None:
    import datasets

    columns = {
        "picture": [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": "b.png"}, None],
        "question": ["which?", "which one?", "2+2?"],
        "answer": ["red", "blue", "4"],
    }
    features = datasets.Features(
        {"picture": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    items = read(tmp_path / "data", tmp_path)
    assert [item.sample.question for item in items] == columns["question"]
    assert [image_bytes(item) for item in items] == [[png("red")], [png("blue")], []]
    assert [item.sample.task for item in items] == ["vqa", "vqa", "text"]


def test_saved_dataset_with_lists_of_images(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    cells = [[{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]]
    datasets.Dataset.from_dict({"images": cells, "caption": ["two"]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    (item,) = read(tmp_path / "saved", tmp_path)
    assert image_bytes(item) == [png("red"), png("blue")]
    assert item.sample.task == "caption"


def test_image_folder_with_metadata(folder: Path, tmp_path: Path) -> None:
    json_lines(folder / "images" / "metadata.jsonl", {"file_name": "red.png", "text": "a red field"})
    (item,) = read(folder / "images", tmp_path)
    assert item.sample.answers == ("a red field",)
    assert image_bytes(item) == [png("red")]


def test_a_dataset_script_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(InputError, match="cannot tell its format"):
        read(tmp_path / "data", tmp_path)


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no-such\.jsonl: no such file or folder"):
        read("no-such.jsonl", tmp_path)
    with pytest.raises(InputError, match="unknown format 'xml'; known: auto, set, jsonl"):
        read(folder, tmp_path, format="xml")
    with pytest.raises(InputError, match=r"owner/name: no file or folder here, and .* `datasets` cannot load it"):
        read("owner/name", tmp_path)
    (folder / "torn.json").write_text('[{"question": "a",\n "ans')
    with pytest.raises(InputError, match=r"torn\.json:2: not valid JSON"):
        read(folder / "torn.json", tmp_path)
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no record, read as jsonl"):
        read(json_lines(folder / "empty.jsonl"), tmp_path)
    with pytest.raises(InputError, match=r"holds no sample: of 1 records 1 without an answer or caption"):
        read(json_lines(folder / "bad.jsonl", {"question": "a?"}), tmp_path)


@given(
    st.dictionaries(
        st.sampled_from(
            ["question", "answer", "answers", "caption", "text", "id", "task", "conversations", "messages"]
        ),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
            max_leaves=6,
        ),
        max_size=4,
    ),
    st.sampled_from(["jsonl", "messages"]),
)
def test_any_json_object_is_a_sample_or_an_input_error(record: dict[str, Any], format_name: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        path = json_lines(Path(home) / "data.jsonl", record)
        try:
            (item,) = read(path, Path(home), format=format_name)
        except InputError:
            return
        assert item.sample.question
        assert all(item.sample.answers)


# Images


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims these dimensions."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(14_000, 14_000), "has more than 50 megapixels"),
        (bomb(10_000, 5_001), "has more than 50 megapixels"),
        (bomb(100, 100), "not a readable image"),
        (png(size=(64, 64))[:60], "not a readable image"),
        (b"", "not a readable image"),
        (b"GIF89a not really", "not a readable image"),
        (png(size=(1, 1)), "1 x 1 pixels is too small"),
        (png(size=(2000, 10)), "2000 x 10 is longer than 100 to 1"),
    ],
)
def test_unusable_images_say_why(data: bytes, message: str) -> None:
    with pytest.raises(UnusableImageError, match=message):
        open_image(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_image_or_refused(noise: bytes) -> None:
    for data in (noise, png()[:40] + noise):
        with contextlib.suppress(UnusableImageError):
            assert open_image(data).mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("I;16", 257 * 40, (40, 40, 40)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: Any, expected: tuple[int, int, int]) -> None:
    assert open_image(png(colour, mode=mode)).getpixel((3, 3)) == expected


def test_cmyk_palette_and_orientation() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 12), (0, 0, 0, 0)).save(buffer, "JPEG")
    assert open_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (16, 12), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert open_image(buffer.getvalue()).getpixel((0, 0)) == (9, 8, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    picture = Image.new("RGB", (16, 12), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    upright = open_image(buffer.getvalue())
    assert upright.size == (12, 16)
    assert upright.getpixel((11, 0)) == (255, 255, 255)


# Building a set


@pytest.fixture
def many(tmp_path: Path) -> Callable[..., Path]:
    """many(count, bad) -> JSONL of that many pictures, each of its own colour, the first `bad` of them damaged."""

    def make(count: int, bad: int = 0) -> Path:
        home = tmp_path / f"many{count}-{bad}"
        home.mkdir()
        for number in range(count):
            data = png((number, 7, 7))
            (home / f"{number}.png").write_bytes(data[:50] if number < bad else data)
        records = [{"image": f"{number}.png", "question": "which?", "answer": str(number)} for number in range(count)]
        return json_lines(home / "data.jsonl", *records)

    return make


def test_a_set_is_built_from_several_sources(many: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    text = json_lines(folder / "text.jsonl", *({"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(10)))
    sources = [SourceSpec(str(many(30)), licence="CC0"), SourceSpec(str(text))]
    built = build_set(sources, CalibrationSpec(samples=12), tmp_path / "out")
    made, strata = built.sample_set, built.strata
    assert [(row.task, row.asked, row.got, row.with_image, row.text_only) for row in strata] == [
        ("vqa", 9, 9, 9, 0),
        ("text", 3, 3, 0, 3),
    ]
    assert made == load_set(tmp_path / "out")
    assert made.manifest is not None
    assert {**made.manifest["sources"][0], "path": "data.jsonl", "format": "jsonl", "licence": "CC0"} == made.manifest[
        "sources"
    ][0]
    assert made.manifest["skipped"] == {}
    for sample in made.samples:
        if sample.images:
            number = int(sample.answers[0])
            assert sample.images[0].read_bytes() == png((number, 7, 7))  # copied byte by byte, to the right sample
    again = build_set(sources, CalibrationSpec(samples=12), tmp_path / "again" / "out").sample_set
    assert again.sha256 == made.sha256


def test_damaged_images_are_replaced_and_counted(many: Callable[..., Path], tmp_path: Path) -> None:
    source = SourceSpec(str(many(30, bad=2)))
    built = build_set([source], CalibrationSpec(samples=28), tmp_path / "out")
    made, strata = built.sample_set, built.strata
    assert strata[0].got == 28
    assert made.manifest is not None
    assert made.manifest["skipped"] == {"with an unusable image": 2}


def test_too_many_damaged_images_are_an_error(many: Callable[..., Path], tmp_path: Path) -> None:
    source = SourceSpec(str(many(20, bad=6)))
    with pytest.raises(InputError, match=r"6 of 20 records cannot be used \(6 with an unusable image\)"):
        build_set([source], CalibrationSpec(samples=20), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build_set([source], CalibrationSpec(samples=20), tmp_path / "out", max_bad_fraction=0.5)


def test_too_many_records_without_answers_are_an_error(folder: Path, tmp_path: Path) -> None:
    path = json_lines(folder / "data.jsonl", {"question": "a", "answer": "b"}, {"question": "c"})
    with pytest.raises(InputError, match=r"1 of 2 records cannot be used \(1 without an answer or caption\)"):
        build_set([SourceSpec(str(path))], CalibrationSpec(), tmp_path / "out")


def test_repeated_and_excluded_images_are_passed_over(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "copy.png").write_bytes(png("red", compress_level=0))
    records = [
        {"image": f"images/{name}.png", "question": "which?", "answer": name}
        for name in ("red", "copy", "green", "blue")
    ]
    path = json_lines(folder / "data.jsonl", *records)
    blue = Sample("x", "vqa", "?", ("blue",), (folder / "images" / "blue.png",))
    built = build_set([SourceSpec(str(path))], CalibrationSpec(samples=4), tmp_path / "out", exclude=[blue])
    made, (row,) = built.sample_set, built.strata
    assert (row.asked, row.got) == (4, 2)
    assert made.manifest is not None
    assert made.manifest["skipped"] == {"repeated": 1, "with an image of the excluded set": 1}


def test_embedded_images_become_files(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png("green")).decode()
    path = json_lines(tmp_path / "data.jsonl", {"image": uri, "question": "q", "answer": "a"})
    made = build_set([SourceSpec(str(path))], CalibrationSpec(), tmp_path / "out").sample_set
    assert made.samples[0].images[0].suffix == ".png"
    assert made.samples[0].images[0].read_bytes() == png("green")


def test_a_set_is_a_source(tmp_path: Path) -> None:
    written = write_set(tmp_path / "set", [Sample("a", "caption", "?", ("x",))], {})
    made = build_set([SourceSpec(str(tmp_path / "set"), task="other")], CalibrationSpec(), tmp_path / "out").sample_set
    assert made.samples == (Sample("a", "other", "?", ("x",)),)
    assert written.samples[0].task == "caption"


def test_a_drawn_set_says_where_it_came_from(tmp_path: Path) -> None:
    samples = [Sample(str(number), "text", f"{number}?", ("x",)) for number in range(9)]
    whole = write_set(tmp_path / "set", samples, {"sources": [{"path": "mine", "licence": "CC0"}]})
    built = draw_set(CalibrationSpec(set=str(tmp_path / "set"), samples=4), tmp_path / "out")
    drawn, strata = built.sample_set, built.strata
    assert {sample.id for sample in drawn.samples} < {sample.id for sample in samples}
    assert (strata[0].asked, strata[0].got) == (4, 4)
    assert drawn.manifest is not None
    assert drawn.manifest["drawn_from"] == {"name": "set", "sha256": whole.sha256}
    assert drawn.manifest["sources"] == [{"path": "mine", "licence": "CC0"}]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a/b.json", SourceSpec("a/b.json")),
        ("a/b.json=chart", SourceSpec("a/b.json", "auto", "chart")),
        ("coco:a/b.json=caption", SourceSpec("a/b.json", "coco", "caption")),
        ("hub:owner/name", SourceSpec("owner/name", "hub")),
        ("C:/data/x.csv", SourceSpec("C:/data/x.csv")),
    ],
)
def test_a_source_in_one_word(text: str, spec: SourceSpec) -> None:
    assert parse_source(text) == spec


def test_an_existing_path_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "coco:x=y.json"
    path.touch()
    assert parse_source(str(path)) == SourceSpec(str(path))


def test_an_existing_output_is_refused_before_any_reading(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        build_set([SourceSpec("no-such")], CalibrationSpec(), tmp_path / "out")
