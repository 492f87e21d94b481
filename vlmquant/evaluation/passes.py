"""Passes through a model: known answers teacher-forced, new answers greedily, and how long they take."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vlmquant import signals
from vlmquant.calibration.encode import Batch, Encoder, collate
from vlmquant.calibration.refusals import passing
from vlmquant.calibration.samples import Sample
from vlmquant.components import GENERATION_NAME
from vlmquant.evaluation.inputs import digests
from vlmquant.reading import check, read_json

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What evaluation takes from a model's generation settings."""
PLAIN: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
"""What it decodes by."""


@dataclass(frozen=True)
class Row:
    """One sequence to run: a sample's prompt, with one of its answers or without."""

    key: int
    """The caller's number for it."""
    sample: Sample
    answer: str | None
    tokens: int
    answer_tokens: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digests of its inputs, where asked for."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """What it is put among others by, to be padded to their length."""
        return (self.tokens,)


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


def measure_rows(
    pairs: Sequence[tuple[Sample, str | None]], encoder: Encoder, *, with_digests: bool = False
) -> list[Row]:
    """A row for each (sample, answer), keyed by position; encodes each sample once to learn its length."""
    rows: list[Row] = []
    prompt = None
    for key, (sample, answer) in enumerate(pairs):
        if prompt is None or prompt.sample != sample:
            prompt = encoder.encode(sample, None)
        item = prompt if answer is None else encoder.followed(prompt, answer)
        inputs = digests(item) if with_digests else {}
        rows.append(Row(key, sample, answer, item.tokens, int(item.answer_mask.sum()), inputs))
        signals.check()
    return rows


class Measured(Protocol):
    """What batches are made of: a row, or a prompt with all that follows it."""

    @property
    def key(self) -> int: ...
    @property
    def sample(self) -> Sample: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...


Some = TypeVar("Some", bound=Measured)


def batches_of(rows: Sequence[Some], batch_size: int) -> list[list[Some]]:
    """Rows of like length together, longest first, so that memory peaks at once; all of a batch have as many images."""
    ordered = sorted(rows, key=lambda row: (len(row.sample.images), row.lengths, -row.key), reverse=True)
    batches: list[list[Some]] = []
    for row in ordered:
        fits = batches and len(batches[-1]) < batch_size
        if fits and len(batches[-1][0].sample.images) == len(row.sample.images):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def to_model(batch: Batch, model: Any) -> dict[str, Tensor]:
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.inputs.items()
    }


@torch.inference_mode()
def teacher_forced(model: Any, encoder: Encoder, rows: Sequence[Row]) -> Iterator[Scored]:
    """One right-padded forward pass over the rows of a batch. The head runs only where a text token is predicted."""
    batch = collate([encoder.encode(row.sample, row.answer) for row in rows], "right")
    ids, answers = batch.inputs["input_ids"], batch.answer_mask
    predicted = predicted_tokens(batch, encoder)
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


def predicted_tokens(batch: Batch, encoder: Encoder) -> Tensor:
    """bool (batch, tokens): the tokens of text that something comes before: of each row all but its first."""
    there = batch.inputs["attention_mask"].bool()
    predicted = there & (there.cumsum(1) > 1)
    return predicted if encoder.image_id is None else predicted & (batch.inputs["input_ids"] != encoder.image_id)


def answer_logits(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    around: Callable[[Batch], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """The logits that predict each row's answer tokens (answer tokens, vocabulary), by one right-padded pass whose
    gradients can be asked for. around: the context that the pass of a batch is made in."""
    batch = with_answers(encoder, rows)
    with around(batch):
        logits = logits_of_answers(model, batch)
    return list(torch.split(logits, batch.answer_mask.sum(1).tolist()))


def with_answers(encoder: Encoder, rows: Sequence[Row]) -> Batch:
    """Rows as one right-padded batch."""
    return collate([encoder.encode(row.sample, row.answer) for row in rows], "right")


def logits_of_answers(model: Any, batch: Batch) -> Tensor:
    """The logits that predict a batch's answer tokens, row after row: (answer tokens, vocabulary)."""
    return _logits(model, batch, batch.answer_mask.roll(-1, dims=1).to(model.device))


def _logits(model: Any, batch: Batch, keep: Tensor) -> Tensor:
    """(kept tokens, vocabulary): from the head alone where the model can be asked for some tokens, else from all."""
    asked = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with passing(batch, model):
        logits: Tensor = model(**to_model(batch, model), **asked, use_cache=False).logits
    return logits[keep] if logits.shape[:-1] == keep.shape else logits


def special_tokens(model_dir: Path) -> GenerationConfig | None:
    """What evaluation takes from a model's generation_config.json; None without one. InputError where it is damaged.

    transformers refuses some files that only mean another way of decoding.
    """
    file = model_dir / GENERATION_NAME
    if not file.exists():
        return None
    settings = read_json(file)
    ids = {name: settings.get(name) for name in TOKENS}
    for name, value in ids.items():
        check(int | list[int] | None, value, where=f"{file}: {name}")
    return GenerationConfig(**ids)


def set_aside(model_dir: Path, model: Any) -> list[str]:
    """The names of a model's own generation settings that evaluation does not follow: all but its special tokens.

    Those of the model are looked at where it has no file of them: transformers takes them from config.json then.
    """
    file = model_dir / GENERATION_NAME
    settings = read_json(file) if file.exists() else vars(model.generation_config)
    kept = (*TOKENS, "transformers_version")
    return sorted(
        name
        for name, value in settings.items()
        if value is not None and value != PLAIN.get(name) and name not in kept and not name.startswith("_")
    )


def greedy(model: Any, encoder: Encoder, *, max_new_tokens: int, min_new_tokens: int = 0) -> GenerationConfig:
    """Plain greedy decoding, whatever the model's own generation settings ask for beside its special tokens."""
    own = {name: getattr(model.generation_config, name, None) for name in TOKENS}
    if own["eos_token_id"] is None:
        own["eos_token_id"] = encoder.tokenizer.eos_token_id
    return GenerationConfig(
        **own | {"pad_token_id": encoder.pad_id},
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        **PLAIN,
    )


def decode(model: Any, batch: Batch, inputs: dict[str, Tensor], config: GenerationConfig, **options: Any) -> Tensor:
    """The ids that `generate` gives by `config` alone: it fills what that leaves open from the model's own settings."""
    own = model.generation_config
    model.generation_config = config
    try:
        with passing(batch, model):
            output: Tensor = model.generate(**inputs, generation_config=config, **options)
    finally:
        model.generation_config = own
    return output


@torch.inference_mode()
def generate(model: Any, encoder: Encoder, rows: Sequence[Measured], *, max_new_tokens: int) -> list[str]:
    """The greedy answers to rows of one batch (left-padded), special tokens dropped, stripped."""
    batch = collate([encoder.encode(row.sample, None) for row in rows], "left")
    config = greedy(model, encoder, max_new_tokens=max_new_tokens)
    return written(encoder, batch, decode(model, batch, to_model(batch, model), config))


def written(encoder: Encoder, batch: Batch, output: Tensor) -> list[str]:
    """What `decode` has put behind the prompts of a batch, special tokens dropped, stripped."""
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
    batch = collate([encoder.encode(sample, None)], "left")
    inputs = to_model(batch, model)
    clock = _Clock()
    config = greedy(model, encoder, max_new_tokens=tokens, min_new_tokens=tokens)
    start = time.perf_counter()
    decode(model, batch, inputs, config, stopping_criteria=StoppingCriteriaList([clock]))
    return clock.times[0] - start, (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])
