"""`vlmquant data` and `calibrate`: what a source holds arrives in the set, or is named; parts share no image."""

import base64
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests.small_set import write_small_set
from vlmquant import cli, pipeline
from vlmquant.calibration import build
from vlmquant.calibration.build import MAX_BAD_FRACTION, build_set
from vlmquant.calibration.sets import load_set, shared_images
from vlmquant.calibration.sources import SourceSpec
from vlmquant.cli import sets
from vlmquant.errors import DoesNotFitError, InputError, UsageError
from vlmquant.recipe import load_recipe

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """run("data", source, ...) in an empty folder; our errors are raised as they are."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Result:
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def png(number: int, *, side: int = 16) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, 12), (number % 256, number // 256, 7)).save(out, "PNG")
    return out.getvalue()


def json_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def questions(folder: Path, count: int, *, each: int = 1, bad: int = 0) -> Path:
    """data.jsonl: `each` questions on every of `count` images in img/, the first `bad` of which are cut short."""
    (folder / "img").mkdir(parents=True)
    for number in range(count):
        content = png(number)
        (folder / "img" / f"{number}.png").write_bytes(content[:50] if number < bad else content)
    records = [
        {"image": f"img/{number}.png", "question": f"which, {turn}?", "answer": f"{number} {turn}"}
        for number in range(count)
        for turn in range(each)
    ]
    return json_lines(folder / "data.jsonl", records)


# What arrives


def test_a_whole_source_arrives_in_its_order(run: Run, tmp_path: Path) -> None:
    result = run("data", questions(tmp_path / "in", 30), "--out", "set")
    assert result.exit_code == 0
    assert re.search(r"data\.jsonl: read as jsonl: .*image from 'image'", result.stdout)
    made = load_set("set")
    assert [sample.answers for sample in made.samples] == [(f"{number} 0",) for number in range(30)]
    assert [sample.images[0].read_bytes() for sample in made.samples] == [png(number) for number in range(30)]


def test_the_set_says_what_was_read_as_what(run: Run, tmp_path: Path) -> None:
    records = [{"picture": f"{number}.png", "q": "?", "label": str(number), "size": 3} for number in range(4)]
    file = json_lines(tmp_path / "in" / "odd.jsonl", records)
    for number in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
    words = ("--map", "image=picture,question=q", "--map", "answer=label", "--images-folder", "photos")
    for command in (("data", file), ("calibrate", "--source", file)):
        result = run(*command, "--out", command[0], *words, "--json")
        (source,) = json.loads(result.stdout)["sources"]
        assert source["read_as"] == {"image": ["picture"], "question": ["q"], "answer": ["label"]}
        assert source["unused"] == ["size"]
        assert (source["records"], source["images"], source["samples_taken"], source["images_taken"]) == (4, 4, 4, 4)
        made = load_set(command[0])
        assert made.manifest is not None
        assert made.manifest["sources"] == [source]
        assert str(tmp_path) not in (tmp_path / command[0] / "manifest.yaml").read_text()


def test_all_references_of_a_question_are_kept(run: Run, tmp_path: Path) -> None:
    """Also of rows that repeat the image under another name."""
    source = questions(tmp_path / "in", 3)
    (tmp_path / "in" / "img" / "copy.png").write_bytes(png(1))
    rows = [("0", "a"), ("1", "b"), ("0", "c"), ("copy", "d"), ("2", "e"), ("0", "a")]
    json_lines(source, [{"image": f"img/{name}.png", "caption": caption} for name, caption in rows])
    result = run("data", source, "--out", "set", "--json")
    assert {sample.answers for sample in load_set("set").samples} == {("a", "c"), ("b", "d"), ("e",)}
    assert json.loads(result.stdout)["sources"][0]["passed_over"] == {"repeated": 3}


def test_fewer_samples_than_asked_for_are_told(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 20)
    result = run("data", source, "--out", "one", "--samples", 200)
    assert result.exit_code == 0
    assert "note: vqa: 20 samples, though 200 were asked for" in result.stdout
    told = json.loads(run("calibrate", "-s", source, "-o", "two", "--samples", 200, "--json").stdout)
    assert (told["asked"], told["samples"]) == (200, 20)
    assert told["notes"] == ["vqa: 20 samples, though 200 were asked for; there are no more"]
    told = json.loads(run("data", source, "-o", "three", "--strata", "vqa=5", "--json").stdout)
    assert (told["asked"], told["samples"], told["notes"]) == (5, 5, [])


def test_sources_with_the_same_ids_are_told_apart(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        questions(tmp_path / name, 4)
        records = [{"id": 1, "question": f"{name} {turn}?", "answer": "x"} for turn in range(2)]
        json_lines(tmp_path / name / "data.jsonl", records)
    run("data", *(tmp_path / name / "data.jsonl" for name in ("a", "b", "c")), "--out", "set")
    assert len(load_set("set").samples) == 6


def test_names_that_are_no_text_are_no_matter(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 2).rename(tmp_path / "in" / os.fsdecode(b"caf\xe9.jsonl"))
    assert run("data", source, "--out", os.fsdecode(b"caf\xe9")).exit_code == 0
    made = load_set(os.fsdecode(b"caf\xe9"))
    assert all(sample.id.isprintable() for sample in made.samples)
    assert made.manifest is not None
    assert made.manifest["sources"][0]["path"] == r"caf\udce9.jsonl"


# What cannot be used


def test_every_unusable_record_is_named(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 100, bad=6)
    records = [json.loads(line) for line in source.read_text().splitlines()]
    records[50] = {"image": "img/50.png", "question": "which?"}
    records[60]["image"] = "img/gone.png"
    json_lines(source, records)
    result = run("data", source, "--out", "set")
    assert result.exit_code == 0
    assert len(load_set("set").samples) == 92
    skipped = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(record["where"] for record in skipped) == sorted(
        f"data.jsonl:{line}" for line in (1, 2, 3, 4, 5, 6, 51, 61)
    )
    reasons = {record["where"]: record["reason"] for record in skipped}
    assert "0.png" in reasons["data.jsonl:1"]
    assert "answer" in reasons["data.jsonl:51"]
    assert "gone.png" in reasons["data.jsonl:61"]
    assert len(re.findall(r"^skipped data\.jsonl:", result.stdout, re.MULTILINE)) == sets.SKIPPED_SHOWN
    assert f"and {8 - sets.SKIPPED_SHOWN} more in set/skipped.jsonl" in result.stdout


def test_too_many_unusable_images_are_named_and_refused(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 20, bad=6)
    with pytest.raises(InputError, match=r"6 of 20 records cannot be used.*10%.*:1: .*0\.png.*:2: .*and 3 more"):
        run("data", source, "--out", "set")
    assert not (tmp_path / "set").exists()
    told = json.loads(run("calibrate", "-s", source, "-o", "set", "--max-bad-fraction", 0.3, "--json").stdout)
    assert len(told["skipped"]) == 6
    assert told["samples"] == 14


def test_the_only_image_says_what_is_wrong_with_it(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 1, bad=1)
    for command in (("data", source), ("calibrate", "--source", source)):
        with pytest.raises(InputError, match=r"1 of 1 records.*img/0\.png: not a readable image"):
            run(*command, "--out", "set")
    with pytest.raises(InputError, match=r"no sample was chosen \(1 .*image"):
        run("data", source, "--out", "set", "--max-bad-fraction", 1)


def test_a_wrong_folder_is_told_by_its_first_missing_file(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 12)
    (tmp_path / "in" / "img").rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match=rf"data\.jsonl:1: .*img/0\.png is not in {re.escape(str(tmp_path))}/in;.*--images-folder"
    ):
        run("data", source, "--out", "set")
    json_lines(source, [{"image": f"{n}.png", "question": "?", "answer": str(n)} for n in range(12)])
    run("data", source, "--out", "set", "--images-folder", tmp_path / "moved")
    assert len(load_set("set").samples) == 12


def test_a_small_source_is_not_lost_beside_a_large_one(run: Run, tmp_path: Path) -> None:
    large, small = questions(tmp_path / "large", 60), questions(tmp_path / "small", 3, bad=3)
    with pytest.raises(InputError, match=r"small/data\.jsonl: 3 of 3 records cannot be used"):
        run("data", large, small, "--out", "set")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_what_is_no_file_is_no_image(kind: str, run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 1)
    image = tmp_path / "in" / "img" / "0.png"
    image.unlink()
    if kind == "pipe":
        os.mkfifo(image)
    elif kind == "folder":
        image.mkdir()
    else:
        image.symlink_to("/dev/zero" if kind == "device" else "0.png")
    with pytest.raises(InputError, match=r"of 1 records.*0\.png"):
        run("data", source, "--out", "set", "--allow-outside")


def test_a_full_disk_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    source = json_lines(tmp_path / "data.jsonl", [{"image": uri, "question": "?", "answer": "x"}])

    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(build.Path, "write_bytes", full)
    with pytest.raises(DoesNotFitError, match="No space left on device; set TMPDIR"):
        run("data", source, "--out", "set")


def test_the_default_share_of_unusable_records_is_the_one_that_help_names(run: Run) -> None:
    for command in ("data", "calibrate"):
        assert f"else {MAX_BAD_FRACTION}" in " ".join(run(command, "--help").stdout.split())


# Parts


@pytest.mark.parametrize("each", [1, 4])
def test_parts_share_no_image(each: int, run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 40, each=each)
    words = ("--split", f"calibration={each * 25},evaluation={each * 15}")
    told = json.loads(run("data", source, "--out", "sets", *words, "--json").stdout)["sets"]
    calibration, evaluation = load_set("sets/calibration"), load_set("sets/evaluation")
    assert shared_images(calibration.samples, evaluation.samples) == []
    assert abs(len(calibration.samples) - 25 * each) < each
    assert abs(len(evaluation.samples) - 15 * each) < each
    assert {name: made["samples"] for name, made in told.items()} == {
        "calibration": len(calibration.samples),
        "evaluation": len(evaluation.samples),
    }
    run("data", source, "--out", "again", *words)
    assert load_set("again/evaluation").samples[0].id == evaluation.samples[0].id
    assert (tmp_path / "again/evaluation/samples.jsonl").read_text() == (
        tmp_path / "sets/evaluation/samples.jsonl"
    ).read_text()


def test_copies_of_an_image_count_as_the_image(run: Run, tmp_path: Path) -> None:
    """Under other names, in other files and formats, embedded or not."""
    records = []
    for number in range(20):
        image = Image.open(io.BytesIO(png(number)))
        bitmap = io.BytesIO()
        image.save(bitmap, "BMP")
        (tmp_path / f"{number}.png").write_bytes(png(number))
        uri = "data:image/bmp;base64," + base64.b64encode(bitmap.getvalue()).decode()
        records.append({"image": f"{number}.png", "question": "first?", "answer": "x"})
        records.append({"image": uri, "question": "second?", "answer": "y"})
    run("data", json_lines(tmp_path / "data.jsonl", records), "--out", "sets", "--split", "a=20,b=20")
    a, b = load_set("sets/a").samples, load_set("sets/b").samples
    assert shared_images(a, b) == []
    assert len(a) + len(b) == 40


def test_a_split_that_cannot_be_leaves_nothing(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 1, each=6)
    with pytest.raises(InputError, match=r"no sample is left for '(a|b)': those that share images stay together"):
        run("data", source, "--out", "sets", "--split", "a=3,b=3")
    assert not (tmp_path / "sets").exists()
    for wrong in ("..=3,b=3", "a/b=3", "a=0", "a", "a=1,a=2", "a=" + "9" * 5000):
        with pytest.raises(UsageError, match="--split"):
            run("data", source, "--out", "sets", "--split", wrong)
    with pytest.raises(UsageError, match="one of --samples, --strata and --split"):
        run("data", source, "--out", "sets", "--split", "a=3", "--samples", 3)


def test_a_split_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 8)
    write_set = build.write_set

    def fails(out_dir: Path, *words: Any, **options: Any) -> Any:
        if out_dir.name == "b":
            raise InputError("the disk is full")
        return write_set(out_dir, *words, **options)

    monkeypatch.setattr(build, "write_set", fails)
    (tmp_path / "there").mkdir()
    for out in ("new", "there"):
        with pytest.raises(InputError, match="the disk is full"):
            run("data", source, "--out", out, "--split", "a=4,b=4")
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").iterdir()) == []


def test_images_of_another_set_are_kept_out(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 20)
    run("data", source, "--out", "test", "--samples", 8)
    told = json.loads(run("data", source, "--out", "rest", "--exclude", "test", "--json").stdout)
    assert told["samples"] == 12
    assert shared_images(load_set("test").samples, load_set("rest").samples) == []
    with pytest.raises(InputError, match=r"no sample was chosen \(20 with an image of the excluded set"):
        run("data", source, "--out", "none", "--exclude", "test", "--exclude", "rest")


# A user's files


def test_what_is_there_stays(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 4)
    out = tmp_path / "mine"
    out.mkdir()
    (out / "photo.jpg").write_text("mine")
    for words in (("--out", out), ("--out", out, "--split", "a=1,b=1"), ("--out", out / "photo.jpg")):
        with pytest.raises(InputError, match="exists and is not empty"):
            run("data", source, *words)
    sheet = tmp_path / "in" / "img" / "0.png"
    with pytest.raises(UsageError, match=r"--sheet .*0\.png: exists"):
        run("data", source, "--out", "set", "--sheet", sheet)
    assert (out / "photo.jpg").read_text() == "mine"
    assert sheet.read_bytes() == png(0)
    assert list(tmp_path.glob(".*")) == []


# The contact sheet


def test_the_sheet_is_one_offline_page_with_every_text_escaped(run: Run, tmp_path: Path) -> None:
    source = questions(tmp_path / "in", 12, bad=1)
    poison = "<script>alert(1)</script><img src=http://x.invalid/a.png>"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    records[5] |= {"question": poison, "answer": poison, "task": poison}
    json_lines(source, records)
    run("data", source, "--out", "set", "--sheet", "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert "Content-Security-Policy" in page
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert re.findall(r"<img src=\"(?!data:image/jpeg;base64,)", page) == []
    assert page.count("<img src=") == 11
    assert "&lt;script&gt;" in page
    assert "10 0" in page
    assert "data.jsonl:1" in page


def test_the_sheet_of_parts_as_a_picture(run: Run, tmp_path: Path) -> None:
    run("data", questions(tmp_path / "in", 12), "--out", "sets", "--split", "a=6,b=6", "--sheet", "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 20) or ()}
    assert {(number, 0, 7) for number in range(12)} <= colours
    with pytest.raises(UsageError, match=r"--sheet sheet\.pdf: must end in"):
        run("data", tmp_path / "in" / "data.jsonl", "--out", "set", "--sheet", "sheet.pdf")


# What the sets are for


def test_a_made_set_is_read_as_it_is(run: Run, tmp_path: Path) -> None:
    small = write_small_set(tmp_path / "small")
    run("data", small, "--out", "set")
    before, after = load_set(small).samples, load_set("set").samples
    assert sorted(s.id.removeprefix("small-") for s in after) == sorted(s.id for s in before)
    assert {s.answers for s in after} == {s.answers for s in before}


def test_a_set_without_images_is_refused_before_work(tiny_llava: Path, run: Run, tmp_path: Path) -> None:
    """And --resume takes the set that is advised."""
    texts = write_small_set(tmp_path / "texts", pairs=0, texts=6)
    with pytest.raises(InputError, match=r"texts: none of its 6 samples has an image.*vision_encoder.*--calibration"):
        pipeline.quantize(tiny_llava, "mixed", tmp_path / "out", calibration=texts)
    assert list(tmp_path.glob("out*")) == []
    good = write_small_set(tmp_path / "good")
    pipeline.quantize(tiny_llava, "mixed", tmp_path / "out", calibration=good, resume=True)


def test_images_that_are_all_too_long_are_missed_before_work(tiny_llava: Path, tmp_path: Path) -> None:
    mixed = load_recipe("mixed")
    short = mixed.model_copy(update={"calibration": mixed.calibration.model_copy(update={"max_tokens": 28})})
    with pytest.raises(InputError, match="has an image"):
        pipeline.quantize(tiny_llava, short, tmp_path / "out", calibration=write_small_set(tmp_path / "set"))
    assert list(tmp_path.glob("out*")) == []


def test_language_layers_that_saw_text_alone_are_told(tiny_llava: Path, tmp_path: Path) -> None:
    texts = write_small_set(tmp_path / "texts", pairs=0, texts=6)
    done = pipeline.quantize(tiny_llava, "gptq-w4", tmp_path / "out", calibration=texts)
    assert any("no sample of" in note and "has an image" in note for note in done.notes)


def test_a_folder_that_is_no_set_names_the_way_to_make_one(run: Run, tmp_path: Path) -> None:
    questions(tmp_path / "raw", 1)
    with pytest.raises(InputError, match=r"raw: no samples\.jsonl in this folder.*vlmquant data .*raw --out"):
        run("eval", tmp_path / "model", "--reference", tmp_path / "model", "--data", tmp_path / "raw")


def test_build_set_is_a_library_function_too(tmp_path: Path) -> None:
    source = SourceSpec(str(questions(tmp_path / "in", 3)), licence="CC0")
    made = build_set([source], None, tmp_path / "set")
    assert (made.sample_set, made.sources[0].images, made.skipped) == (load_set(tmp_path / "set"), 3, ())
