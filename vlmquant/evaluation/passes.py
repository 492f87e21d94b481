"""Passes through a model: known answers teacher-forced, new answers greedily, and how long they take."""

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vlmquant.calibration.encode import Batch, Encoder, collate
from vlmquant.calibration.samples import Sample


@dataclass(frozen=True)
class Row:
    """One sequence to run: a sample's prompt, with one of its answers or without."""

    key: int
    """The caller's number for it."""
    sample: Sample
    answer: str | None
    tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Scored:
    """A row after its pass."""

    row: Row
    answer_ids: Tensor
    """(answer tokens,) int64, the end of the turn included."""
    answer_logits: Tensor
    """(answer tokens, vocabulary), in the model's dtype: the logits that predict them."""
    prompt_nll: Tensor
    """(text tokens of the prompt but its first,) float32, nats."""


def measure_rows(pairs: Sequence[tuple[Sample, str | None]], encoder: Encoder) -> list[Row]:
    """A row for each (sample, answer), keyed by position; encodes each once to learn its length."""
    rows = []
    for key, (sample, answer) in enumerate(pairs):
        item = encoder.encode(sample, answer)
        rows.append(Row(key, sample, answer, item.tokens, int(item.answer_mask.sum())))
    return rows


def batches_of(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Rows of like length together, longest first, so that memory peaks at once; all of a batch have as many images."""
    ordered = sorted(rows, key=lambda row: (-len(row.sample.images), -row.tokens, row.key))
    batches: list[list[Row]] = []
    for row in ordered:
        fits = batches and len(batches[-1]) < batch_size
        if fits and len(batches[-1][0].sample.images) == len(row.sample.images):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _to_model(batch: Batch, model: Any) -> dict[str, Tensor]:
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.inputs.items()
    }


@torch.inference_mode()
def teacher_forced(model: Any, encoder: Encoder, rows: Sequence[Row]) -> Iterator[Scored]:
    """One right-padded forward pass over the rows of a batch. The head runs only where a text token is predicted."""
    batch = collate([encoder.encode(row.sample, row.answer) for row in rows], "right")
    ids, answers = batch.inputs["input_ids"], batch.answer_mask
    predicted = batch.inputs["attention_mask"].bool()
    if encoder.image_id is not None:
        predicted &= ids != encoder.image_id
    predicted[:, 0] = False
    keep = predicted.roll(-1, dims=1)  # the logits that predict token t stand at t - 1
    logits = _logits(model, batch, keep.to(model.device))
    ids, answers = ids[predicted], answers[predicted]
    assert logits.shape[:-1] == ids.shape, "the model did not take logits_to_keep as a mask"
    start = 0
    for row, count in zip(rows, predicted.sum(dim=1).tolist(), strict=True):
        mine, own, answer = logits[start : start + count], ids[start : start + count], answers[start : start + count]
        prompt = torch.nn.functional.cross_entropy(
            mine[~answer].float(), own[~answer].to(mine.device), reduction="none"
        )
        yield Scored(row, own[answer], mine[answer], prompt)
        start += count


def _logits(model: Any, batch: Batch, keep: Tensor) -> Tensor:
    """(kept tokens, vocabulary): from the head alone where the model can be asked for some tokens, else from all."""
    asked = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(**_to_model(batch, model), **asked, use_cache=False).logits
    return logits[keep] if logits.shape[:-1] == keep.shape else logits


def greedy(model: Any, encoder: Encoder, *, max_new_tokens: int, min_new_tokens: int = 0) -> GenerationConfig:
    """Plain greedy decoding, whatever penalties and sampling the model's own generation settings ask for."""
    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else encoder.tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        bos_token_id=own.bos_token_id,
        eos_token_id=end,
        pad_token_id=encoder.pad_id,
    )


@torch.inference_mode()
def generate(model: Any, encoder: Encoder, rows: Sequence[Row], *, max_new_tokens: int) -> list[str]:
    """The greedy answers to rows of one batch (left-padded), special tokens dropped, stripped."""
    batch = collate([encoder.encode(row.sample, None) for row in rows], "left")
    config = greedy(model, encoder, max_new_tokens=max_new_tokens)
    output = model.generate(**_to_model(batch, model), generation_config=config)
    answers = output[:, batch.inputs["input_ids"].shape[1] :].cpu()
    return [str(encoder.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token was there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def time_decoding(model: Any, encoder: Encoder, sample: Sample, *, tokens: int) -> tuple[float, float]:
    """Seconds to the first token (image included, preprocessing not) and tokens a second after it, at batch size 1."""
    inputs = _to_model(collate([encoder.encode(sample, None)], "left"), model)
    clock = _Clock()
    config = greedy(model, encoder, max_new_tokens=tokens, min_new_tokens=tokens)
    start = time.perf_counter()
    model.generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList([clock]))
    return clock.times[0] - start, (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])
