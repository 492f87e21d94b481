"""What follows prompts, from one pass of each: the likelihoods of its answers, and the answer that the model writes.

A prompt with its image is nearly all that is passed, and each of its references, and generation, would pass it anew.
`generate` makes the pass, as for any answer; behind it, before the first token is chosen, the answers are passed each
by itself on a copy of its cache.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmquant.calibration.encode import TOKEN_ALIGNED, Batch, Encoded, Encoder, collate
from vlmquant.calibration.samples import Sample
from vlmquant.evaluation.passes import (
    Row,
    Scored,
    batches_of,
    decode,
    generate,
    greedy,
    predicted_tokens,
    teacher_forced,
    to_model,
    written,
)
from vlmquant.kvcache import ARGUMENTS
from vlmquant.limits import memory_ran_out
from vlmquant.linear import PackedRows
from vlmquant.notices import LOGGER

ALIKE = 2
"""A trial's logits may differ by so many times the square root of the dtype's precision, of their own spread: of passes
that are the same but for rounding, a hundredth of that was seen in float32, a third in bfloat16."""
ROUNDED_ALIKE = 0.5
"""Where inputs are rounded to 8 bits: a quarter was seen."""


@dataclass(frozen=True)
class Prompt:
    """A sample's prompt, and what is wanted behind it."""

    key: int
    """The caller's number for it."""
    sample: Sample
    tokens: int
    rows: tuple[Row, ...]
    """One for each answer whose likelihood is wanted; at least one."""
    write: int = 0
    """Most tokens that the model is to write; 0 for none."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """What it is put among others by: all prompts of a batch are padded to one length, and then their answers."""
        return (self.tokens, *sorted((row.answer_tokens for row in self.rows), reverse=True))


@dataclass(frozen=True)
class Followed:
    """What was found behind a prompt."""

    scored: tuple[Scored, ...]
    text: str | None
    """What the model wrote greedily, special tokens dropped, stripped; None where nothing was asked for."""


def prompts_of(rows: Sequence[Row], owners: Sequence[int], write: Mapping[int, int]) -> list[Prompt]:
    """A prompt for each owner of rows, whose number is its key. owners: of each row; write: as of Prompt, by owner."""
    mine: dict[int, list[Row]] = {}
    for row, owner in zip(rows, owners, strict=True):
        mine.setdefault(owner, []).append(row)
    return [
        Prompt(owner, of[0].sample, of[0].tokens - of[0].answer_tokens, tuple(of), write.get(owner, 0))
        for owner, of in mine.items()
    ]


def batches_of_prompts(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Prompts behind which as much is to be written together, most first."""
    return [
        batch
        for write in sorted({prompt.write for prompt in prompts}, reverse=True)
        for batch in batches_of([prompt for prompt in prompts if prompt.write == write], batch_size)
    ]


class Follower:
    """Passes batches of prompts, all of a batch with one `write`.

    The first batch tells whether the model can go on from a prompt that was passed: of its longest and its shortest
    prompt, the answers are also passed whole. Where it cannot, or gives other logits, all are.
    """

    def __init__(self, model: Any, encoder: Encoder, *, dtype: torch.dtype | None = None) -> None:
        """dtype: of the model's products, where that is not the model's."""
        self.model, self.encoder = model, encoder
        rounds = any(
            module.scheme.activations != "none" for module in model.modules() if isinstance(module, PackedRows)
        )
        self.alike = ROUNDED_ALIKE if rounds else ALIKE * torch.finfo(dtype or model.dtype).eps ** 0.5
        self._follow: Callable[[Any, Encoder, Sequence[Prompt]], list[Followed]] | None = None

    def __call__(self, prompts: Sequence[Prompt]) -> list[Followed]:
        if self._follow is None:
            self._follow = together if self.goes_on([prompts[0], *prompts[1:][-1:]]) else apart
        return self._follow(self.model, self.encoder, prompts)

    def goes_on(self, prompts: Sequence[Prompt]) -> bool:
        """Whether the model says the same of answers behind prompts that were passed."""
        prompts = [replace(prompt, rows=prompt.rows[:1], write=0) for prompt in prompts]
        whole = apart(self.model, self.encoder, prompts)
        try:
            problem = _difference(together(self.model, self.encoder, prompts), whole, self.alike)
        except Exception as error:  # models can raise nearly anything where they are asked to go on
            if memory_ran_out(error):
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem:
            LOGGER.info("prompts are passed anew for each of their answers: %s", problem)
        return not problem


def _difference(found: Sequence[Followed], wanted: Sequence[Followed], alike: float) -> str:
    """By how much logits differ, in words; empty where that is little."""
    mine, other = (
        torch.cat([one.scored[0].answer_logits for one in all_]).float().log_softmax(-1) for all_ in (found, wanted)
    )
    share = float((mine - other).norm() / (other - other.mean(-1, keepdim=True)).norm())
    return "" if share <= alike else f"logits differ by {share:.2g} of their spread"


def apart(model: Any, encoder: Encoder, prompts: Sequence[Prompt]) -> list[Followed]:
    """Each answer by a pass of its own, prompt and all, and generation by another."""
    scored: list[list[Scored]] = [[] for _ in prompts]
    for number in range(max(len(prompt.rows) for prompt in prompts)):
        having = [index for index, prompt in enumerate(prompts) if len(prompt.rows) > number]
        rows = [prompts[index].rows[number] for index in having]
        for index, found in zip(having, teacher_forced(model, encoder, rows), strict=True):
            scored[index].append(found)
    write = prompts[0].write
    texts = generate(model, encoder, prompts, max_new_tokens=write) if write else [None] * len(prompts)
    return [Followed(tuple(mine), text) for mine, text in zip(scored, texts, strict=True)]


@torch.inference_mode()
def together(model: Any, encoder: Encoder, prompts: Sequence[Prompt]) -> list[Followed]:
    """All answers, and generation, from one left-padded pass of the prompts."""
    items = [encoder.encode(prompt.sample, None) for prompt in prompts]
    batch, write = collate(items, "left"), prompts[0].write
    behind = _Behind(encoder, prompts, items, batch)
    config = greedy(model, encoder, max_new_tokens=max(write, 1))
    with behind.of(model):
        output = decode(model, batch, to_model(batch, model), config)
    texts = written(encoder, batch, output) if write else [None] * len(prompts)
    return [Followed(tuple(mine), text) for mine, text in zip(behind.scored, texts, strict=True)]


class _Behind:
    """The answers to a batch of prompts, passed as soon as `generate` has passed the prompts."""

    def __init__(self, encoder: Encoder, prompts: Sequence[Prompt], items: Sequence[Encoded], batch: Batch) -> None:
        self.encoder, self.prompts, self.items, self.batch = encoder, prompts, items, batch
        self.orders = [sorted(range(len(mine.rows)), key=lambda row: -mine.rows[row].answer_tokens) for mine in prompts]
        """Of each prompt's answers, so that long ones are passed with long ones."""
        self.scored: list[list[Scored]] = [[] for _ in prompts]
        self.predicted = predicted_tokens(batch, encoder)
        self.keep = self.predicted.roll(-1, dims=1)  # the logits that predict token t stand at t - 1
        self.keep[:, -1] = True  # those of the answer's first token

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Inside, the first pass of a model is followed by the passes of the answers."""
        self._waits = True
        handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, model: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._waits and "logits_to_keep" in inputs:
            inputs = inputs | {"logits_to_keep": self.keep.to(model.device)}
        return arguments, inputs

    def _after(self, model: Any, arguments: Any, inputs: dict[str, Any], output: Any) -> Any:
        if not self._waits:
            return None
        self._waits = False
        logits = output.logits
        if logits.shape[:-1] == self.keep.shape:  # all of them
            logits = logits[self.keep.to(logits.device)]
        counts = self.keep.sum(1).tolist()
        assert len(logits) == sum(counts), "the model did not take logits_to_keep as a mask"
        of_rows = torch.split(logits, counts)
        prompt_nll = [
            functional.cross_entropy(mine[:-1].float(), ids[known].to(mine.device), reduction="none")
            for mine, ids, known in zip(of_rows, self.batch.inputs["input_ids"], self.predicted, strict=True)
        ]
        name, cache = next(
            (name, found[name]) for found in (inputs, output) for name in ARGUMENTS if found.get(name) is not None
        )
        most = max(len(prompt.rows) for prompt in self.prompts)
        for number in range(most):
            used_up = number + 1 == most and not self.prompts[0].write
            behind = self._answers(number)
            ids = behind["input_ids"]
            passed = model(
                **_continued(inputs, behind), **{name: cache if used_up else copy.deepcopy(cache)}, use_cache=True
            ).logits
            for index, (prompt, order) in enumerate(zip(self.prompts, self.orders, strict=True)):
                if number < len(order):
                    row = prompt.rows[order[number]]
                    mine = torch.cat([of_rows[index][-1:], passed[index, : row.answer_tokens - 1]])
                    self.scored[index].append(Scored(row, ids[index, : row.answer_tokens], mine, prompt_nll[index]))
        for order, scored in zip(self.orders, self.scored, strict=True):
            scored[:] = [scored[order.index(row)] for row in range(len(order))]
        output.logits = torch.stack([mine[-1:] for mine in of_rows])
        return output

    def _answers(self, number: int) -> dict[str, Tensor]:
        """Inputs of the answers with this number in their order, those aligned with tokens: (batch, tokens), padded on
        the right.

        Where a prompt has no such answer, its shortest stands in.
        """
        items = []
        for prompt, order, item in zip(self.prompts, self.orders, self.items, strict=True):
            whole = self.encoder.followed(item, prompt.rows[order[min(number, len(order) - 1)]].answer or "")
            tail = {key: value[:, item.tokens :] for key, value in whole.inputs.items() if key in TOKEN_ALIGNED}
            items.append(replace(whole, inputs=tail, answer_mask=whole.answer_mask[item.tokens :]))
        return collate(items, "right").inputs


def _continued(before: Mapping[str, Any], behind: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is given for tokens behind those that it was given before; its cache not among it.

    As `generate` goes on: the mask covers both, positions count on from the last, all else is of the new tokens.
    """
    device = before["input_ids"].device
    inputs: dict[str, Any] = {key: value.to(device) for key, value in behind.items() if key in before}
    ids = inputs["input_ids"]
    if (mask := before.get("attention_mask")) is not None:  # what is padded now stands behind all that is looked at
        inputs["attention_mask"] = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
    if (positions := before.get("position_ids")) is not None:
        inputs["position_ids"] = positions[..., -1:] + 1 + torch.arange(ids.shape[1], device=positions.device)
    return inputs
