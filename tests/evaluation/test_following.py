"""What follows prompts from one pass of each, against passes of its own for each answer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import zoo
from tests.test_linear import round_to
from tests.tiny_vlm import PROCESSORS
from tests.zoo_processors import KINDS, add_processor
from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.evaluation import following
from vlmquant.evaluation.following import Followed, Follower, Prompt, apart, prompts_of, together
from vlmquant.evaluation.passes import measure_rows
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model, reading_part
from vlmquant.recipe import SHORT_SCHEMES

QUICK = ("qwen3_5_moe", "gemma4", "minicpmv4_6")
TOLERANCE = 2e-4
"""Nats: float32 sums of a few hundred terms in another order."""


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Prompts of different lengths, with images of different sizes, and with one to three answers."""
    found = []
    for number, words in enumerate((9, 1, 4)):
        image = tmp_path / f"{number}.png"
        Image.effect_noise((40 + 30 * number, 60), 80 + number).convert("RGB").save(image)
        answers = tuple(" ".join(["two dogs"] * length) for length in (2, 3, 1)[: number + 1])
        question = " ".join(["what is in the picture?"] * words)
        found.append(Sample(f"s{number}", "vqa", question, answers, (image,)))
    return found


def loaded(model_dir: Path) -> tuple[Any, Encoder]:
    model = reading_part(load_model(model_dir, dtype=torch.float32).eval())
    return model, Encoder(load_processor(model_dir))


def prompts(encoder: Encoder, samples: list[Sample], *, write: int = 0) -> list[Prompt]:
    pairs = [(sample, answer) for sample in samples for answer in sample.answers]
    owners = [index for index, sample in enumerate(samples) for _ in sample.answers]
    return prompts_of(measure_rows(pairs, encoder), owners, dict.fromkeys(range(len(samples)), write))


def assert_same(found: list[Followed], wanted: list[Followed]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.text == other.text
        for mine, theirs in zip(one.scored, other.scored, strict=True):
            assert mine.row is theirs.row
            assert torch.equal(mine.answer_ids, theirs.answer_ids)
            logprobs = [scored.answer_logits.float().log_softmax(-1) for scored in (mine, theirs)]
            torch.testing.assert_close(*logprobs, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(mine.prompt_nll, theirs.prompt_nll, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.filterwarnings("ignore")
def test_one_pass_gives_what_passes_of_each_answer_give(
    kind: str, tiny: Callable[..., Path], samples: list[Sample]
) -> None:
    model, encoder = loaded(tiny(kind))
    for write in (0, 6):
        asked = prompts(encoder, samples, write=write)
        wanted = apart(model, encoder, asked)
        assert [len(one.scored) for one in wanted] == [1, 2, 3]
        assert all((one.text is not None) == bool(write) for one in wanted)
        assert_same(together(model, encoder, asked), wanted)
        assert Follower(model, encoder).goes_on(asked)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS]
)
@pytest.mark.filterwarnings("ignore")
def test_todays_models_go_on_from_a_prompt(kind: str, tmp_path: Path, samples: list[Sample]) -> None:
    model, encoder = loaded(add_processor(kind, zoo.build(kind, tmp_path / "model", dtype=torch.float32)))
    asked = prompts(encoder, samples, write=6)
    assert_same(together(model, encoder, asked), apart(model, encoder, asked))


def test_prompts_of_text_alone(tiny_llava: Path) -> None:
    model, encoder = loaded(tiny_llava)
    samples = [Sample(f"t{n}", "text", "how many legs " * n, ("four", "none")[:n]) for n in (1, 2)]
    asked = prompts(encoder, samples, write=3)
    assert_same(together(model, encoder, asked), apart(model, encoder, asked))


def test_each_prompt_is_passed_once(tiny_llava: Path, samples: list[Sample]) -> None:
    model, encoder = loaded(tiny_llava)
    asked, seen = prompts(encoder, samples, write=3), list[int]()
    follow = Follower(model, encoder)
    follow(asked)  # with its trial
    tower = model.get_submodule("model.vision_tower")
    tower.register_forward_hook(lambda _, __, output: seen.append(len(output.last_hidden_state)))
    follow(asked)
    assert seen == [3]
    follow([replace(prompt, write=0) for prompt in asked[1:]])
    assert seen == [3, 2]


def test_a_model_that_cannot_go_on_is_passed_anew(
    tiny_llava: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that raises, and one that goes on from another place."""
    model, encoder = loaded(tiny_llava)
    asked = prompts(encoder, samples, write=4)
    wanted, inner = apart(model, encoder, asked), following._continued

    def raises(*_: Any) -> dict[str, Any]:
        raise ValueError("this model has no cache")

    def elsewhere(before: Any, behind: Any) -> dict[str, Any]:
        inputs = inner(before, behind)
        return inputs | {"position_ids": inputs["position_ids"] + 40}

    for broken in (raises, elsewhere):
        monkeypatch.setattr(following, "_continued", broken)
        assert_same(Follower(model, encoder)(asked), wanted)


def test_logits_may_differ_by_what_is_rounded(tiny_llava: Path) -> None:
    """By the dtype of products, and more where inputs are rounded to 8 bits; not by the codes of weights."""
    model, encoder = loaded(tiny_llava)
    alike = [Follower(model, encoder, dtype=dtype).alike for dtype in (None, torch.bfloat16)]
    assert alike[0] < 1e-3 < alike[1] < 0.25
    for name in ("w4a16", "w8a8-dynamic"):
        scheme = SHORT_SCHEMES[name]
        model.lm_head = QuantLinear(round_to(scheme, *model.lm_head.weight.shape), scheme, None)
        alike.append(Follower(model, encoder).alike)
        model, _ = loaded(tiny_llava)
    assert alike[2] == alike[0]
    assert alike[3] > alike[1]


def test_a_full_memory_is_no_reason_to_pass_anew(
    tiny_llava: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = loaded(tiny_llava)

    def full(*_: Any) -> dict[str, Any]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(following, "_continued", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        Follower(model, encoder)(prompts(encoder, samples))


def test_answers_leave_no_trace_in_what_is_written(tiny_llava: Path, samples: list[Sample]) -> None:
    """An answer that is scored does not reach the next one, nor what the model writes behind it."""
    model, encoder = loaded(tiny_llava)
    long = [replace(sample, answers=("a red disc " * 9, "two")) for sample in samples]
    short = [replace(sample, answers=("two",)) for sample in samples]
    both = [together(model, encoder, prompts(encoder, some, write=5)) for some in (long, short)]
    for one, other in zip(*both, strict=True):
        assert one.text == other.text
        torch.testing.assert_close(one.scored[1].answer_logits, other.scored[0].answer_logits, rtol=0, atol=TOLERANCE)
