"""What a stranger's chat template and processor files do: each ends in one line that names them, soon."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import tiny_vlm
from tests.small_set import write_small_set
from vlmquant import pipeline
from vlmquant.calibration import encode
from vlmquant.calibration.encode import Batch, BatchMaker, Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.errors import InputError

PLAIN = (
    "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}</s>{% endfor %}"
)
ONCE_BIG = PLAIN + "{% if messages | length > 2 %}ACT{% endif %}"
"""Acts up on samples with history only: what the encoder asks of it at first is in order."""
TALK = Sample("talk-7", "text", "and now?", ("yes",), history=(Turn("how many?", "three"),))


@pytest.fixture
def model(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))


def with_template(model: Path, template: str) -> Any:
    (model / "chat_template.jinja").write_text(template)
    return load_processor(model)


BOMBS = {
    "memory": "{{ 'a' * 10**10 }}",
    "a list": "{{ range(10**9) | list }}",
    "a loop": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "folded when it is compiled": "{{ 10**(10**9) }}",
    "a product of loops": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "output": "{{ 'a' * 20000000 }}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_a_template_that_takes_all_time_or_memory_is_stopped(
    bomb: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "TEMPLATE_SECONDS", 1.0)
    with pytest.raises(InputError, match=r"chat template .*(takes|makes|fails).*chat_template\.jinja"):
        Encoder(with_template(model, bomb + PLAIN))


def test_the_next_conversation_is_rendered_after_one_that_was_stopped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "TEMPLATE_SECONDS", 3.0)
    encoder = Encoder(with_template(model, ONCE_BIG.replace("ACT", BOMBS["a loop"])))
    with pytest.raises(InputError, match=r"sample talk-7: the model's chat template fails: it takes more than 3 s"):
        encoder.prompt(TALK)
    assert encoder.prompt(Sample("x", "text", "what is it?", ("no",))) == "what is it?</s>"


@pytest.mark.parametrize(
    "act",
    [
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ nothing.of.it }}",
        "{{ messages[99]['role'] }}",
        "{{ 2.0 ** 100000 }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        "{{ [1] | map('bogus') | list }}",
        "{{ messages | sum(attribute='role') }}",
        "{{ '%d' | format('x') }}",
        "{{ 'x' | center(10, 20, 30) }}",
    ],
)
def test_what_a_template_raises_is_told_of_the_sample(act: str, model: Path) -> None:
    encoder = Encoder(with_template(model, ONCE_BIG.replace("ACT", act)))
    with pytest.raises(InputError, match=r"sample talk-7: the model's chat template refuses these messages: ") as told:
        encoder.prompt(TALK)
    assert "\n" not in str(told.value)
    assert "chat_template.jinja" in str(told.value)


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{", "{% for m in messages %}", "{{ x | nosuch }}", "{% extends 'a' %}"]
)
def test_a_template_that_does_not_compile(template: str, model: Path) -> None:
    with pytest.raises(InputError, match=r"chat template refuses these messages: .*chat_template\.jinja"):
        Encoder(with_template(model, template))


def test_rendering_beside_threads_prints_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The child is forked after the tokenizers library and torch have used threads."""
    processor = load_processor(model)
    processor.tokenizer(["a small dog"] * 50)
    for number in range(3):
        assert Encoder(processor).prompt(Sample(str(number), "text", "two people", ("no",)))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_template_runs_once_for_a_sample(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(load_processor(model))
    rendered, inner = [], encoder._rendered
    monkeypatch.setattr(encoder, "_rendered", lambda *given: rendered.append(given) or inner(*given))
    for answer in ("three", "two", None):
        encoder.encode(TALK, answer)
    assert len(rendered) == 1


# Files


def edit(model: Path, name: str, **values: Any) -> Path:
    file = model / name
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return file


def refused(model: Path, picture: Path) -> str:
    with pytest.raises(InputError) as told:
        Encoder(load_processor(model)).encode(Sample("s-1", "vqa", "what?", ("a",), (picture,)), "a")
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize(
    ("kind", "name", "values", "told"),
    [
        ("llava", "processor_config.json", {"patch_size": None}, r"s-1: .*processor_config.json: patch_size is not"),
        ("llava", "processor_config.json", {"patch_size": 0}, r"s-1: .*processor_config.json: patch_size is 0"),
        ("llava", "preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, r"s-1: .*height 1000000"),
        ("llava", "preprocessor_config.json", {"size": {"shortest_edge": 10**9}}, r"s-1: .*shortest_edge 1000000000"),
        ("llava", "preprocessor_config.json", {"size": {"height": -3, "width": 0}}, r"s-1: .*size\.height -3"),
        ("llava", "preprocessor_config.json", {"image_mean": "red"}, r"s-1: the model's processor refuses it"),
        ("qwen2_5_vl", "preprocessor_config.json", {"patch_size": 0}, r"s-1: .*preprocessor_config.*patch_size 0"),
        ("qwen2_5_vl", "preprocessor_config.json", {"merge_size": 0}, r"s-1: .*preprocessor_config.*merge_size 0"),
    ],
)  # fmt: skip
def test_settings_that_no_image_survives_are_named(
    kind: str,
    name: str,
    values: dict[str, Any],
    told: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    picture: Path,
) -> None:
    model = Path(shutil.copytree(tiny(kind), tmp_path / "model"))
    edit(model, name, **values)
    found = refused(model, picture)
    assert re.search(told, found), found


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "tokenizer_config.json"])
def test_files_of_a_processor_that_are_none(name: str, model: Path, picture: Path) -> None:
    file = model / name
    for content in ("[" * 10**5, '{"a": ' * 500 + "1" + "}" * 500, '{"size": NaN}', "[]", '{"a": 1, "a": 2}', "\x00"):
        file.write_text(content)
        assert str(file) in refused(model, picture)
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: is a named pipe" in refused(model, picture)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_other_files(name: str, model: Path, picture: Path) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert "is a named pipe" in refused(model, picture)


def test_a_regex_of_the_tokenizer_that_never_ends(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": r"(\w+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    file.write_text(json.dumps(content))
    sample = Sample("x", "text", "abcdefghijklmnopqrstuvwxyz" * 3 + "!", ("no",))
    with pytest.raises(InputError, match=r"tokenizer fails|processor refuses"):
        Encoder(load_processor(model)).encode(sample, "no")


def test_an_empty_vocabulary_is_refused(model: Path, picture: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= {"vocab": {}, "merges": []}
    file.write_text(json.dumps(content))
    assert "vocabulary is empty" in refused(model, picture)


# Before any work


@pytest.mark.parametrize(
    ("kind", "name", "values", "told"),
    [
        (
            "llava",
            "processor_config.json",
            {"num_additional_image_tokens": None},
            r"sample pair-\d: 3 image tokens in the prompt, 4 image features.*num_additional_image_tokens",
        ),
        (
            "llava",
            "processor_config.json",
            {"vision_feature_select_strategy": "full"},
            r"sample pair-\d: 5 image tokens in the prompt, 4 image features.*vision_feature_select_strategy",
        ),
        ("qwen2_5_vl", "preprocessor_config.json", {"merge_size": 1}, r"pair-\d: transformers refuses this input"),
        ("qwen3_vl", "preprocessor_config.json", {"patch_size": 8}, r"sample pair-\d: transformers refuses this input"),
    ],
)  # fmt: skip
def test_a_processor_that_does_not_fit_the_tower_is_found_before_any_work(
    kind: str, name: str, values: dict[str, Any], told: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny(kind), tmp_path / "model"))
    edit(model, name, **values)
    with pytest.raises(InputError, match=told):
        pipeline.quantize(model, "mixed", tmp_path / "out", calibration=write_small_set(tmp_path / "set"))
    assert not (tmp_path / "out.partial").exists()


def test_token_ids_beyond_the_embedding_are_named(tmp_path: Path) -> None:
    model = tiny_vlm.build("llava", tmp_path / "model")
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {
        token: number + 1000 if token == "d" else number for token, number in content["model"]["vocab"].items()
    }
    file.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"sample \S+: token id 1\d\d\d is beyond the model's embedding, which has 600 rows"
    ):
        pipeline.quantize(model, "mixed", tmp_path / "out", calibration=write_small_set(tmp_path / "set"))


def test_the_rehearsal_takes_one_sample(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = BatchMaker.first

    def first(self: BatchMaker) -> Batch:
        seen.append(inner(self))
        return seen[-1]

    monkeypatch.setattr(BatchMaker, "first", first)
    pipeline.quantize(tiny_llava, "mixed", tmp_path / "out", calibration=write_small_set(tmp_path / "set"))
    assert {(len(batch.samples), len(batch.samples[0].images)) for batch in seen} == {(1, 1)}
