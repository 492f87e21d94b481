"""What a resumed run goes on from: the same content, wherever it lies; and input that changes under a run stops it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small_set import write_small_set
from tests.test_checkpoint import Case, content_of, make_case
from tests.test_faults_checkpoint import Stop, stop_after
from vlmquant import pipeline
from vlmquant.checkpoint import Inputs
from vlmquant.errors import InputError, SentinelError, UsageError


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of two shards with all that travels along, to be changed."""
    folder = Path(shutil.copytree(tiny("llava", shards=2), tmp_path / "model"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").write_text("MIT")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture(scope="module")
def begun(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a stopped run."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stop):
        stop_after(make_case(tiny("llava")), folder / "out", 3)
    return folder / "out.partial"


def flip(file: Path, place: float) -> None:
    """Change one bit at that share of the file; its size and the time of its last change stay."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


CHANGES = {
    "model-00001-of-00002.safetensors": (0.5, 0.711, 1.0),
    "model-00002-of-00002.safetensors": (0.4, 0.99),
    "tokenizer.json": (0.5,),
    "tokenizer_config.json": (0.5,),
    "chat_template.jinja": (0.1,),
    "preprocessor_config.json": (0.9,),
    "processor_config.json": (0.9,),
    "generation_config.json": (0.9,),
    "README.md": (0.9,),
    "LICENSE": (0.0,),
    "additional_chat_templates/tools.jinja": (0.5,),
}


def test_a_run_is_not_resumed_on_any_other_content(model: Path, tmp_path: Path) -> None:
    case = make_case(model)
    with pytest.raises(Stop):
        stop_after(case, tmp_path / "out", 2)
    before = content_of(tmp_path / "out.partial")
    for name, places in CHANGES.items():
        for place in places:
            flip(model / name, place)
            with pytest.raises(UsageError, match=f"begun with another model file {name}, so it cannot be resumed"):
                case.run(tmp_path / "out", resume=True)
            flip(model / name, place)
    (model / "special_tokens_map.json").write_text("{}")
    with pytest.raises(UsageError, match=r"begun with another model file special_tokens_map\.json,"):
        case.run(tmp_path / "out", resume=True)
    assert content_of(tmp_path / "out.partial") == before


def test_a_config_of_other_content_is_another_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        stop_after(make_case(model), tmp_path / "out", 2)
    config = json.loads((model / "config.json").read_text())
    config["image_seq_length"] = 5
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"begun with another model file config\.json,"):
        make_case(model).run(tmp_path / "out", resume=True)


def test_the_same_model_elsewhere_is_the_same(model: Path, tmp_path: Path) -> None:
    case = make_case(model)
    case.run(tmp_path / "expected")
    with pytest.raises(Stop):
        stop_after(case, tmp_path / "out", 3)
    moved = Path(shutil.copytree(model, tmp_path / "other" / "model", copy_function=shutil.copy))
    shutil.rmtree(model)
    assert make_case(moved).run(tmp_path / "out", resume=True) == list(case.units)[3:]
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json", "LICENSE"])
@pytest.mark.parametrize("change", ["flip", "replace", "remove"])
def test_a_file_that_changes_during_the_run_is_named_and_nothing_is_put_in_place(
    model: Path, tmp_path: Path, name: str, change: str
) -> None:
    def change_it() -> None:
        if change == "flip":
            flip(model / name, 1.0)
        elif change == "replace":
            shutil.copy(model / name, model / ".new")
            flip(model / ".new", 0.9)
            os.replace(model / ".new", model / name)
        else:
            (model / name).unlink()

    with pytest.raises(InputError, match=name):
        run_with(make_case(model), tmp_path / "out", change_it)
    assert not (tmp_path / "out").exists()


def run_with(case: Case, out: Path, event: Callable[[], None]) -> None:
    """A whole run; the event comes in its middle."""
    with case.writer(out) as writer:
        for number, (block, unit) in enumerate(case.units.items()):
            writer.add(block, *unit)
            if number == 1:
                event()
        writer.finish({})


def test_what_is_only_touched_has_not_changed(model: Path, tmp_path: Path) -> None:
    def touch() -> None:
        for file in model.rglob("*"):
            file.touch()
        shutil.copy(model / "LICENSE", model / ".new")
        os.replace(model / ".new", model / "LICENSE")

    run_with(make_case(model), tmp_path / "out", touch)
    assert (tmp_path / "out").is_dir()


def test_an_image_of_the_calibration_set_that_changes_during_the_run_is_named(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_small_set(tmp_path / "set", pairs=2, texts=0)
    image = sorted((tmp_path / "set" / "images").iterdir())[0]
    work = pipeline.quantize_blocks

    def disturbed(*args: Any, **options: Any) -> Any:
        done = work(*args, **options)
        flip(image, 0.5)
        return done

    monkeypatch.setattr(pipeline, "quantize_blocks", disturbed)
    with pytest.raises(InputError, match=f"{image.name}: changed or went away during the run"):
        pipeline.quantize(tiny("llava"), "gptq-w4", tmp_path / "out", calibration=tmp_path / "set")
    assert not (tmp_path / "out").exists()
    assert data


def test_a_finished_run_that_is_resumed_says_what_it_had_done(tiny: Callable[..., Path], tmp_path: Path) -> None:
    first = pipeline.quantize(tiny("llava"), "rtn-w4", tmp_path / "out")
    before = content_of(tmp_path / "out")
    again = pipeline.quantize(tiny("llava"), "rtn-w4", tmp_path / "out", resume=True)
    assert again.errors == first.errors
    assert again.notes == (*first.notes, "an earlier run had finished this checkpoint")
    assert content_of(tmp_path / "out") == before


def test_files_are_known_by_name_and_content_alone(model: Path, tmp_path: Path) -> None:
    first = Inputs(make_case(model).components).fingerprint()
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert Inputs(make_case(moved).components).fingerprint() == first
    assert {name.removeprefix("model file ") for name in first} == {
        str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()
    }
    assert len({*first.values()}) == len(first)


# The journal


def lines(begun: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (begun / "journal.jsonl").read_text().splitlines()]


def damages(line: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Complete lines that are JSON and no line of a journal, or not of this run's."""
    for key in line:
        for value in (None, 3, [1], {"x": 1}):
            yield f"{key} {value}", {**line, key: value}
        yield f"no {key}", {k: v for k, v in line.items() if k != key}
    yield "path", {**line, "unit": "../units/outside"}
    yield "absolute", {**line, "unit": "/etc/passwd"}
    yield "NUL", {**line, "unit": "a\0b"}
    yield "surrogate", {**line, "unit": "\udc80"}
    yield "long", {**line, "unit": "n" * 5000}
    yield "stranger", {**line, "quantized": ["nobody.weight"]}
    yield "fewer", {**line, "quantized": line["quantized"][1:]}
    yield "changed stranger", {**line, "changed": [*line["changed"], "nobody.weight"]}
    yield "changed one of another block", {**line, "changed": [*line["changed"], "lm_head.weight"]}
    yield "errors", {**line, "record": {**line["record"], "errors": {"x": "y"}}}
    yield "notes", {**line, "record": {**line["record"], "notes": [1]}}
    yield "list", [line]
    yield "further key", {**line, "more": 1}


def test_a_damaged_line_costs_its_unit_and_nothing_else(tiny: Callable[..., Path], begun: Path, tmp_path: Path) -> None:
    case = make_case(tiny("llava"))
    good = lines(begun)
    names = list(case.units)
    work = Path(shutil.copytree(begun, tmp_path / "out.partial"))
    texts = {kind: json.dumps(bad) for kind, bad in damages(good[1])}
    texts |= {"deep": "[" * 100_000 + "]" * 100_000, "digits": '{"unit": ' + "9" * 5000 + "}", "empty": ""}

    def units_found() -> Iterator[str | None]:
        with case.writer(tmp_path / "out", resume=True) as writer:
            yield from [name for name in names if writer.restored(name) is not None]
            raise Stop

    for kind, text in texts.items():
        (work / "journal.jsonl").write_text("\n".join([json.dumps(good[0]), text, json.dumps(good[2]), ""]))
        found = []
        with pytest.raises(Stop):
            found.extend(units_found())
        still_good = kind == "record {'x': 1}"
        assert found == (names[:3] if still_good else [names[0], names[2]]), kind


def test_a_run_resumed_on_a_damaged_journal_writes_the_same(
    tiny: Callable[..., Path], begun: Path, tmp_path: Path
) -> None:
    case = make_case(tiny("llava"))
    case.run(tmp_path / "expected")
    shutil.copytree(begun, tmp_path / "out.partial")
    good = lines(begun)
    bad = [good[0], {**good[1], "quantized": 5}, {**good[2], "unit": good[1]["unit"]}]
    (tmp_path / "out.partial" / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    assert case.run(tmp_path / "out", resume=True) == list(case.units)[1:]
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_an_error_that_is_no_number_names_the_weight(tiny: Callable[..., Path], tmp_path: Path, error: float) -> None:
    case = make_case(tiny("llava"))
    block, (quantized, changed, record) = list(case.units.items())[-1]
    name = next(iter(quantized))
    with (
        pytest.raises(SentinelError, match=f"{name}: its output error is {error}"),
        case.writer(tmp_path / "out") as writer,
    ):
        writer.add(block, quantized, changed, {**record, "errors": {name: error}})
    assert list(tmp_path.iterdir()) == []
