"""Sets as folders: what is written is read back, what is wrong is named, what is chosen stays chosen."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmquant.calibration.samples import Sample, Turn
from vlmquant.calibration.sampling import choose_samples, shares, split
from vlmquant.calibration.sets import SampleSet, image_hashes, load_set, shared_images, write_set
from vlmquant.errors import InputError
from vlmquant.recipe import CalibrationSpec


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (16, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    red, blue = picture(tmp_path / "in" / "red.png"), picture(tmp_path / "in" / "BLUE.PNG", "blue")
    return [
        Sample("a", "caption", "describe", ("a red field", "rouge é"), (red,)),
        Sample("b", "vqa", "same?", ("no",), (red, blue), (Turn("hm?", "hm."),), "be brief"),
        Sample("c", "text", "2 + 2?", ("4",)),
    ]


def write_lines(folder: Path, *records: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


GOOD = {"id": "a", "task": "vqa", "question": "?", "answers": ["yes"]}


# Folders


def test_a_written_set_reads_back_the_same(samples: list[Sample], tmp_path: Path) -> None:
    written = write_set(tmp_path / "out", samples, {"seed": 3, "licences": {"mine": "CC0"}})
    read = load_set(tmp_path / "out")
    assert read == written
    assert read.name == "out"
    assert read.manifest is not None
    assert read.manifest["seed"] == 3
    assert len(read.manifest["files"]) == 3  # samples.jsonl and two images, the shared one once
    for before, after in zip(samples, read.samples, strict=True):
        assert replace(after, images=before.images) == before
        assert [path.read_bytes() for path in after.images] == [path.read_bytes() for path in before.images]
        assert all(path.is_relative_to(tmp_path / "out" / "images") for path in after.images)
    assert list(tmp_path.glob(".*")) == []


def test_a_plain_folder_is_a_set(tmp_path: Path) -> None:
    picture(tmp_path / "mine" / "images" / "x.png")
    write_lines(tmp_path / "mine", GOOD | {"image": "images/x.png", "source": "somewhere"}, "", GOOD | {"id": "b"})
    read = load_set(str(tmp_path / "mine"))
    assert read.manifest is None
    assert [sample.id for sample in read.samples] == ["a", "b"]
    assert read.samples[0].images == ((tmp_path / "mine" / "images" / "x.png").resolve(),)


def test_a_changed_file_is_named(samples: list[Sample], tmp_path: Path) -> None:
    written = write_set(tmp_path / "out", samples, {})
    image = written.samples[0].images[0]
    picture(image, "green")
    with pytest.raises(InputError, match=rf"{re.escape(str(image))}: differs from its sha256 in manifest\.yaml"):
        load_set(tmp_path / "out")
    image.unlink()
    with pytest.raises(InputError, match=rf"file 'images/{image.name}' is missing"):
        load_set(tmp_path / "out")


def test_an_image_outside_of_the_manifest_is_named(samples: list[Sample], tmp_path: Path) -> None:
    write_set(tmp_path / "out", samples, {})
    manifest = tmp_path / "out" / "manifest.yaml"
    lines = manifest.read_text().splitlines()
    image = next(line.split(":")[0].strip() for line in lines if "images/" in line)
    manifest.write_text("\n".join(line for line in lines if image not in line))
    with pytest.raises(InputError, match=rf"{image}: is in samples\.jsonl but not in manifest\.yaml"):
        load_set(tmp_path / "out")


def test_the_hash_of_a_set_sees_texts_and_images(samples: list[Sample], tmp_path: Path) -> None:
    first = write_set(tmp_path / "1", samples, {})
    assert write_set(tmp_path / "2" / "1", samples, {}).sha256 == first.sha256
    other = [replace(samples[0], question="what?"), *samples[1:]]
    assert write_set(tmp_path / "3", other, {}).sha256 != first.sha256
    picture(samples[0].images[0], "pink")
    assert write_set(tmp_path / "4", samples, {}).sha256 != first.sha256


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "2: not valid JSON"),
        ("[1]", "2: input should be an object"),
        ('{"id": "b", "id": "c"}', "2: not valid JSON \\(key id stands twice"),
        ("[" * 100_000, "2: nested more than 64 deep"),
        ('{"id": ' + "9" * 5000 + "}", "2: not valid JSON"),
        (json.dumps(GOOD | {"question": "\ud800"}), "2: text .* holds half of a surrogate pair"),
        ({key: GOOD[key] for key in GOOD if key != "question"}, "2: question: field required"),
        ({key: GOOD[key] for key in GOOD if key != "answers"}, "2: answers: field required; a line is {id, task"),
        (GOOD | {"id": 7}, "2: id: input should be a valid string"),
        (GOOD | {"answers": "yes"}, "2: answers: input should be a valid (list|array)"),
        (GOOD | {"answers": []}, "2: answers: list should have at least 1 item"),
        (GOOD | {"answers": ["a", " "]}, "2: answers.1: string should match"),
        (GOOD | {"image": 3}, "2: image: input should be a valid string"),
        (GOOD | {"image": "no.png"}, "2: image 'no.png' is missing from"),
        (GOOD | {"image": ""}, "is a directory and no regular file"),
        (GOOD | {"image": "../../etc/hosts"}, "2: image '../../etc/hosts' leads out of"),
        (GOOD | {"image": "/etc/hosts"}, "2: image '/etc/hosts' leads out of"),
        (GOOD | {"image": "away.png"}, "2: image 'away.png' leads out of"),
        (GOOD | {"image": "loop.png"}, "2: image 'loop.png' "),
        (GOOD | {"image": "pipe.png"}, "pipe.png: is a named pipe and no regular file"),
        (GOOD | {"image": "a\0b"}, "2: image 'a.+x00b' leads out of"),
        (GOOD | {"image": "x" * 5000}, "2: image 'x+...' "),
        (GOOD | {"image": "a", "images": ["b"]}, "2: give 'image' or 'images', not both"),
        (GOOD | {"history": ["x"]}, "2: history.0: input should be an object"),
        (GOOD | {"history": [{"question": "x"}]}, "2: history.0.answer: field required"),
        (GOOD, "samples.jsonl: sample id 'a' stands twice"),
    ],
)
def test_a_malformed_line_is_named(record: dict[str, Any] | str, message: str, tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "mine", GOOD, record)
    (folder / "away.png").symlink_to(picture(tmp_path / "elsewhere.png"))
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match=message) as caught:
        load_set(folder)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 3000, "nest"),
        ("- 1", "input should be an object"),
        ("name: x", "files: field required"),
        ("files: [a]", "files: input should be"),
        ("files: {samples.jsonl: 3}", "files.samples.jsonl: input should be a valid string"),
        ("files: {a\\0b: x}", "not valid YAML|is missing|leads out"),
        ('files: {"a\\0b": x}', "leads out of"),
        ("files: {../x: x}", "leads out of"),
        ("when: 2001-99-99", "not valid YAML"),
        ("x: !!python/name:os.system", "not valid YAML"),
        ("files: !!set {a}", "holds what is no plain value|input should be"),
    ],
)
def test_a_malformed_manifest_is_named(text: str, message: str, tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "mine", GOOD)
    (folder / "manifest.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"manifest\.yaml.*({message})"):
        load_set(folder)


@pytest.mark.parametrize("name", ["manifest.yaml", "samples.jsonl"])
def test_no_pipe_is_waited_for(name: str, tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "mine", GOOD)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=rf"{name}: is a named pipe"):
        load_set(folder)


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "mine", GOOD | {"question": "wo? \u2028 da"})
    content = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\\u2028", "\u2028".encode()))
    assert load_set(folder).samples[0].question == "wo? \u2028 da"


def test_missing_and_empty_sets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the set is empty"):
        load_set(write_lines(tmp_path / "empty", ""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"no samples\.jsonl in this folder.*`?vlmquant data .*folder --out"):
        load_set(tmp_path / "folder")
    (tmp_path / "data.csv").write_text("image,caption\n")
    with pytest.raises(InputError, match=r"data\.csv: is no set; make one of it: vlmquant data"):
        load_set(tmp_path / "data.csv")
    write_lines(tmp_path / "sets" / "default", GOOD)
    monkeypatch.setattr("vlmquant.calibration.sets.shipped", lambda kind: tmp_path / "sets")
    assert load_set("default").samples[0].id == "a"
    with pytest.raises(InputError, match=r"defualt: no such set or folder, did you mean 'default'\?"):
        load_set("defualt")


def test_nothing_is_overwritten_or_left_half_written(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    missing = replace(samples[0], images=(tmp_path / "gone.png",))
    with pytest.raises(InputError, match="the set cannot be written"):
        write_set(out, [samples[2], missing], {})
    assert not out.exists()
    assert list(tmp_path.glob(".*")) == []
    write_set(out, samples, {})
    with pytest.raises(InputError, match="exists and is not empty"):
        write_set(out, samples, {})
    with pytest.raises(InputError, match="there are no samples to write"):
        write_set(tmp_path / "none", [], {})


def test_a_set_has_the_mode_that_its_user_asks_for(samples: list[Sample], tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_set(tmp_path / "private", samples, {})
        os.umask(0o002)
        write_set(tmp_path / "shared", samples, {})
    finally:
        os.umask(before)
    for name, folder, file in (("private", 0o700, 0o600), ("shared", 0o775, 0o664)):
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert modes == {file}
        assert (tmp_path / name).stat().st_mode & 0o777 == folder
        assert (tmp_path / name / "images").stat().st_mode & 0o777 == folder


def test_an_empty_folder_that_is_there_is_filled_and_not_replaced(samples: list[Sample], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(home)
    before = home.stat()
    write_set(tmp_path / "link", samples, {}, skipped=[{"where": "a:1", "reason": "no answer"}])
    after = home.stat()
    assert (tmp_path / "link").is_symlink()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert sorted(path.name for path in home.iterdir()) == ["images", "manifest.yaml", "samples.jsonl", "skipped.jsonl"]
    (home / "skipped.jsonl").write_text("")
    with pytest.raises(InputError, match=r"skipped\.jsonl: differs from its sha256"):
        load_set(home)


def test_a_failed_run_leaves_an_empty_folder_empty(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="the set cannot be written"):
        write_set(tmp_path / "out", [samples[2], replace(samples[0], images=(tmp_path / "gone.png",))], {})
    assert list((tmp_path / "out").iterdir()) == []


# Shared images


def test_shared_images_are_found_by_their_pixels(tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png")
    Image.open(red).save(tmp_path / "copy.bmp")
    blue = picture(tmp_path / "blue.png", "blue")
    tall = picture(tmp_path / "tall.png", "red", size=(12, 16))
    ours = [Sample("a", "vqa", "?", ("x",), (red,)), Sample("b", "vqa", "?", ("x",), (blue,))]
    theirs = [Sample("y", "vqa", "?", ("x",), (tall, tmp_path / "copy.bmp")), Sample("z", "text", "?", ("x",))]
    assert shared_images(ours, theirs) == [("a", "y")]
    assert shared_images(ours[1:], theirs) == []
    assert sorted(image_hashes(ours + theirs).values()) == ["a", "b", "y"]


# Sampling


def set_of(sizes: dict[str, int], text_only: float = 0.0, image: Path | None = None) -> SampleSet:
    samples = [
        Sample(f"{task}-{number}", task, "?", ("x",), () if image is None or number < text_only * size else (image,))
        for task, size in sizes.items()
        for number in range(size)
    ]
    return SampleSet("made", tuple(samples), None, "0")


def test_quotas_are_in_proportion_or_as_asked() -> None:
    made = set_of({"caption": 60, "vqa": 30, "chart": 10})
    table = {row.task: (row.asked, row.got) for row in choose_samples(made, CalibrationSpec(samples=20)).strata}
    assert table == {"caption": (12, 12), "vqa": (6, 6), "chart": (2, 2)}
    selection = choose_samples(made, CalibrationSpec(strata={"chart": 12, "vqa": 3}))
    assert [(row.task, row.asked, row.got) for row in selection.strata] == [("chart", 12, 10), ("vqa", 3, 3)]
    assert [(row.task, row.asked - row.got) for row in selection.short] == [("chart", 2)]


def test_an_unknown_stratum_is_named() -> None:
    with pytest.raises(InputError, match=r"set made: has no task 'captoin', did you mean 'caption'\?"):
        choose_samples(set_of({"caption": 3}), CalibrationSpec(strata={"captoin": 3}))
    with pytest.raises(InputError, match="no sample was chosen"):
        choose_samples(set_of({"caption": 3}), CalibrationSpec(strata={"caption": 0}))


def test_text_only_samples_keep_their_share(tmp_path: Path) -> None:
    made = set_of({"vqa": 40}, text_only=0.25, image=picture(tmp_path / "x.png"))
    (row,) = choose_samples(made, CalibrationSpec(samples=8)).strata
    assert (row.with_image, row.text_only) == (6, 2)


def test_file_order_takes_the_first_of_each_stratum() -> None:
    made = set_of({"caption": 5, "vqa": 5})
    spec = CalibrationSpec(strata={"vqa": 2, "caption": 1}, order="file")
    assert [sample.id for sample in choose_samples(made, spec).samples] == ["vqa-0", "vqa-1", "caption-0"]


def test_the_choice_depends_on_the_seed_only() -> None:
    made = set_of({"caption": 50, "vqa": 50})
    first = choose_samples(made, CalibrationSpec(samples=10))
    assert choose_samples(made, CalibrationSpec(samples=10)) == first
    assert choose_samples(replace(made, samples=made.samples[::-1]), CalibrationSpec(samples=10)).strata != ()
    other = choose_samples(made, CalibrationSpec(samples=10, seed=1))
    assert other.samples != first.samples
    assert other.sha256 != first.sha256


def test_a_grown_set_keeps_most_of_its_choice() -> None:
    """Ranks do not move: what is chosen from the grown set is either new or was chosen before."""
    spec = CalibrationSpec(strata={"caption": 20})
    before = {sample.id for sample in choose_samples(set_of({"caption": 100}), spec).samples}
    after = {sample.id for sample in choose_samples(set_of({"caption": 130}), spec).samples}
    old = {f"caption-{number}" for number in range(100)}
    assert after & old <= before
    assert len(after & before) >= 10


def grouped(counts: dict[str, int], together: int) -> tuple[list[Sample], Callable[[Sample], list[str]]]:
    """Samples of which so many in a row show the same image."""
    made = list(set_of(counts).samples)
    shows = {sample.id: [f"image {number // together}"] for number, sample in enumerate(made)}
    return made, lambda sample: shows[sample.id]


@pytest.mark.parametrize("together", [1, 3])
def test_parts_hold_what_they_ask_for_and_share_no_image(together: int) -> None:
    made, images_of = grouped({"caption": 40, "vqa": 20}, together)
    parts = split(made, {"a": 36, "b": 24}, seed=0, images_of=images_of)
    assert sorted(sample.id for part in parts.values() for sample in part) == sorted(sample.id for sample in made)
    shown = {name: {image for sample in part for image in images_of(sample)} for name, part in parts.items()}
    assert shown["a"].isdisjoint(shown["b"])
    assert all(abs(len(parts[name]) - count) < together for name, count in (("a", 36), ("b", 24)))
    assert split(made, {"a": 36, "b": 24}, seed=0, images_of=images_of) == parts
    assert split(made, {"a": 36, "b": 24}, seed=1, images_of=images_of) != parts


def test_samples_joined_through_others_stay_together() -> None:
    shows = {"s1": ["x"], "s2": ["x", "y"], "s3": ["z", "y"], "s4": ["z"], "s5": ["w"], "s6": [], "s7": []}
    made = [Sample(name, "vqa", "?", ("x",)) for name in ("s4", "s1", "s5", "s3", "s6", "s2", "s7")]
    for seed in range(20):
        parts = split(made, {"a": 4, "b": 3}, seed=seed, images_of=lambda sample: shows[sample.id])
        ids = {name: {sample.id for sample in part} for name, part in parts.items()}
        assert any({"s1", "s2", "s3", "s4"} <= part for part in ids.values())
        assert ids["a"] | ids["b"] == set(shows)


def test_a_grown_set_moves_few_images_to_another_part() -> None:
    grown, images_of = grouped({"vqa": 1000}, 1)
    first = split(grown[:800], {"a": 100, "b": 100}, seed=0, images_of=images_of)
    second = split(grown, {"a": 100, "b": 100}, seed=0, images_of=images_of)
    moved = {sample.id for sample in first["a"]} & {sample.id for sample in second["b"]}
    assert len(moved) < 20


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 10_000), min_size=1), st.integers(1, 10_000))
def test_shares_add_up_and_are_within_one_of_proportion(sizes: dict[str, int], total: int) -> None:
    result = shares(sizes, total)
    assert sum(result.values()) == total
    for key, size in sizes.items():
        assert abs(result[key] - size * total / sum(sizes.values())) < 1
        assert total > sum(sizes.values()) or result[key] <= size
