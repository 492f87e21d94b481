"""`vlmquant generate`: the answers of evaluation, in pieces; a conversation remembers; nothing steers a terminal."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.conftest import Run
from vlmquant.calibration.encode import Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.cli import asking
from vlmquant.errors import visible
from vlmquant.evaluation.conversation import Conversation, _Pieces


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for name, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        files.append(folder / f"{name}.png")
    return files


def expected(model_dir: Path, sample: Sample, tokens: int) -> str:
    """By transformers' own model and generate, without our loader."""
    processor = load_processor(model_dir)
    inputs = collate([Encoder(processor).encode(sample, None)], "left").inputs
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    made = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(made, skip_special_tokens=True)).strip()


def test_answers_are_the_models_own_and_earlier_ones_are_remembered(tiny_llava: Path, pictures: list[Path]) -> None:
    talk = Conversation(tiny_llava, dtype=torch.float32, device="cpu", images=pictures)
    pieces: list[str] = []
    first = talk.ask("What is this?", max_new_tokens=6, hear=pieces.append)
    images = tuple(pictures)
    assert first.text == expected(tiny_llava, Sample("a", "vqa", "What is this?", (), images), 6)
    assert "".join(pieces).strip() == first.text
    assert first.tokens <= 6
    assert first.finished == (first.tokens < 6)
    second = talk.ask("Why?", max_new_tokens=4)
    history = (Turn("What is this?", first.text),)
    assert second.text == expected(tiny_llava, Sample("b", "vqa", "Why?", (), images, history), 4)
    assert second.prompt_tokens > first.prompt_tokens


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_are_of_whole_characters() -> None:
    heard: list[str] = []
    pieces = _Pieces(Bytes(), heard.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in "aé日b".encode():
        pieces.put(torch.tensor([byte]))
    pieces.end()
    assert heard == ["a", "é", "日", "b"]
    assert pieces.text == "aé日b"


def test_generate_streams_an_answer(run: Run, tiny_llava: Path, pictures: list[Path]) -> None:
    words = ("generate", tiny_llava, "--image", pictures[0], "--max-new-tokens", 3, "--dtype", "float32")
    code, out, err = run(*words, "What is this?", "--json")
    answer = json.loads(out)
    assert code == 0, err
    assert answer["tokens"] <= 3
    code, out, err = run(*words, "What is this?")
    assert (code, out.strip()) == (0, visible(answer["answer"]))
    assert ("cut after 3 tokens" in err) == (not answer["finished"])


def test_without_a_question_lines_of_standard_input_are_questions(
    run: Run, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n\nThree?\n"))
    code, out, err = run("generate", tiny_llava, "--max-new-tokens", 2, "--json")
    assert code == 0, err
    answers = [json.loads(part + "}") for part in out.split("}\n") if part.strip()]
    assert len(answers) == 2
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--image", "no.png", "What?"), 1, "no.png"),
        (("  ",), 2, "the question is empty"),
        (("--max-new-tokens", "0", "What?"), 2, "--max-new-tokens"),
        (("What is <image>?",), 1, "image token"),
    ],
)
def test_what_cannot_be_asked(run: Run, tiny_llava: Path, words: tuple[str, ...], code: int, message: str) -> None:
    got, out, err = run("generate", tiny_llava, *words)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_an_answer_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    asking.write_piece("a\tb\n\x1b[2J\x07c")
    assert capsys.readouterr().out == "a\tb\n\\x1b[2J\\x07c"
