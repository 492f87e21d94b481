"""Passes through tiny models: likelihoods against transformers' own loss, and nothing depends on the batch."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlmquant.calibration.encode import Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.evaluation import passes
from vlmquant.evaluation.passes import (
    Scored,
    batches_of,
    generate,
    measure_rows,
    teacher_forced,
    time_decoding,
)

KINDS = ("llava", "qwen2_5_vl", "qwen3_vl")
BATCH_TOLERANCE = 2e-4
"""Nats: float32 sums of a few hundred terms in another order."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, tiny: Callable[..., Path]) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny(kind), dtype=torch.float32).eval()


@pytest.fixture
def encoder(kind: str, tiny: Callable[..., Path]) -> Encoder:
    return Encoder(load_processor(tiny(kind)))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Questions and answers of different lengths, with images of different sizes, and one without."""
    found = []
    for number, words in enumerate((1, 12, 4)):
        image = tmp_path / f"{number}.png"
        Image.effect_noise((40 + 30 * number, 60), 80 + number).convert("RGB").save(image)
        question = " ".join(["what is in the picture?"] * words)
        found.append(Sample(f"s{number}", "vqa", question, (" ".join(["two dogs"] * (number + 1)),), (image,)))
    return [*found, Sample("text", "text", "how many legs has a dog?", ("four",))]


def score(model: Any, encoder: Encoder, samples: list[Sample], batch_size: int) -> list[Scored]:
    rows = measure_rows([(sample, sample.answers[0]) for sample in samples], encoder)
    found = [scored for batch in batches_of(rows, batch_size) for scored in teacher_forced(model, encoder, batch)]
    return sorted(found, key=lambda scored: scored.row.key)


def nll(scored: Scored) -> float:
    return float(torch.nn.functional.cross_entropy(scored.answer_logits, scored.answer_ids, reduction="sum"))


def test_likelihoods_equal_the_models_own_loss(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    for scored, sample in zip(score(model, encoder, samples, 1), samples, strict=True):
        item = encoder.encode(sample, sample.answers[0])
        ids = item.inputs["input_ids"]
        with torch.no_grad():
            loss = model(**item.inputs, labels=ids.masked_fill(~item.answer_mask, -100)).loss
            text = ids.masked_fill((ids == encoder.image_id), -100)
            text_loss = model(**item.inputs, labels=text).loss
        assert nll(scored) / len(scored.answer_ids) == pytest.approx(float(loss), rel=1e-5)
        text_tokens = int((text[:, 1:] != -100).sum())
        assert len(scored.prompt_nll) + len(scored.answer_ids) == text_tokens
        assert nll(scored) + float(scored.prompt_nll.sum()) == pytest.approx(float(text_loss) * text_tokens, rel=1e-5)


def test_answers_hold_their_end_and_nothing_of_the_prompt(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    for scored in score(model, encoder, samples, 4):
        assert encoder.tokenizer.decode(scored.answer_ids) == f"{scored.row.answer}</s>"
        assert scored.row.answer_tokens == len(scored.answer_ids) == len(scored.answer_logits)


def test_batch_and_padding_change_no_likelihood(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    alone, together = score(model, encoder, samples, 1), score(model, encoder, samples, 4)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(
            one.answer_logits.log_softmax(-1), other.answer_logits.log_softmax(-1), atol=BATCH_TOLERANCE
        )
        assert torch.allclose(one.prompt_nll, other.prompt_nll, atol=BATCH_TOLERANCE)


def test_perplexity_of_uniform_logits_is_the_vocabulary_size(
    model: Any, encoder: Encoder, samples: list[Sample]
) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    for scored in score(model, encoder, samples, 4):
        assert math.exp(nll(scored) / len(scored.answer_ids)) == pytest.approx(model.lm_head.weight.shape[0], rel=1e-5)


def test_generation_does_not_depend_on_the_batch(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    rows = measure_rows([(sample, None) for sample in samples[:3]], encoder)
    together = generate(model, encoder, rows, max_new_tokens=6)
    assert together == [generate(model, encoder, [row], max_new_tokens=6)[0] for row in rows]
    assert all(together)


def test_generation_is_the_argmax_of_the_forward_pass(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    prompt = collate([encoder.encode(samples[0], None)], "left").inputs
    with torch.no_grad():
        first = model(**prompt).logits[0, -1].argmax()
    rows = measure_rows([(samples[0], None)], encoder)
    assert generate(model, encoder, rows, max_new_tokens=1) == [encoder.tokenizer.decode(first).strip()]


def test_the_models_own_penalties_do_not_reach_greedy_decoding(
    model: Any, encoder: Encoder, samples: list[Sample]
) -> None:
    rows = measure_rows([(samples[0], None)], encoder)
    plain = generate(model, encoder, rows, max_new_tokens=6)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    assert generate(model, encoder, rows, max_new_tokens=6) == plain


def test_speed_is_measured_over_the_tokens_asked_for(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    prefill, speed = time_decoding(model, encoder, samples[0], tokens=5)
    assert prefill > 0
    assert 1 < speed < 1e5


def test_speed_by_a_planted_clock(
    model: Any, encoder: Encoder, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that takes 3 s for the prompt with its image and half a second for each token after the first."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(passes, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        clock.now += 3.0 if inputs["input_ids"].shape[1] > 1 else 0.5

    model.register_forward_pre_hook(slow, with_kwargs=True)
    assert time_decoding(model, encoder, samples[0], tokens=5) == (3.0, 2.0)


def test_batches_hold_like_lengths_longest_first(encoder: Encoder, samples: list[Sample]) -> None:
    rows = measure_rows([(sample, sample.answers[0]) for sample in samples], encoder)
    batches = batches_of(rows, 2)
    assert [[row.sample.id for row in batch] for batch in batches][-1] == ["text"]
    with_image = [row.tokens for batch in batches[:-1] for row in batch]
    assert with_image == sorted(with_image, reverse=True)
    assert [len(batch) for batch in batches] == [2, 1, 1]
