"""Samples -> model inputs, by the model's own processor and chat template, answers marked; batches by length."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional

from vlmquant.calibration.images import open_image
from vlmquant.calibration.processor import GIB, chat_template, odd_settings, strangers, template_file
from vlmquant.calibration.samples import Sample
from vlmquant.errors import InputError, SentinelError, first_line, shown
from vlmquant.limits import Confined, OverLimitError

DETACHED_STOP = " ."
"""How captions end that were split into words before they were stored, as those of Flickr8k and others."""

TOKEN_ALIGNED = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
)
"""Inputs whose dimension 1 counts tokens. All others are images' and are joined along dimension 0."""

NOT_MODEL_INPUTS = ("labels",)
"""What processors return beside the model's inputs."""

ANSWER_TOKEN_TYPE = {"PaliGemmaProcessor": 1}
"""token_type_ids of answer tokens by processor class, where not 0: PaliGemma reads its prefix in both directions."""

STRIPS = ("pixel_values", "target_sizes")
"""Inputs of MiniCPM-V: one strip (1, 3, patch, patches * patch) of all images one behind the other, and their sizes."""

THINKING = ("enable_thinking", "thinking")
"""What chat templates call the switch of their chain of thought."""

MARKER = "vlmquantmarker"

TEMPLATE_SECONDS = 10
"""A chat template may take this long for one conversation; ordinary ones take a millisecond."""
TEMPLATE_BYTES = GIB // 2
MAX_PROMPT = 10_000_000
"""Characters that a template may make of one conversation."""
KEPT_PROMPTS = 1000
"""A sample is encoded for its length, for its batch and to generate from, and its template runs once."""
PROCESSOR_BYTES = 4 * GIB
"""Memory that a processor may take for one sample, beside a GiB for each image."""


@dataclass(frozen=True)
class Encoded:
    """One sample as a model's inputs."""

    sample: Sample
    inputs: dict[str, Tensor]
    """Batch of one: input_ids and attention_mask (1, tokens), and what the processor adds for its images."""
    answer_mask: Tensor
    """(tokens,) bool: the answer's tokens and the token that ends the turn; all false for a prompt to generate from."""
    pad_id: int
    """Token id that fills shorter rows of a batch."""
    image_id: int | None = None
    """Token id that stands for image features."""

    @property
    def tokens(self) -> int:
        return len(self.answer_mask)


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length; keys as the model's forward takes them."""

    inputs: dict[str, Tensor]
    answer_mask: Tensor
    """(batch, tokens) bool, aligned with input_ids."""
    samples: tuple[Sample, ...]
    image_mask: Tensor | None = None
    """(batch, tokens) bool: where image features take a token's place; None where that is not known."""


def tidy_caption(text: str) -> str:
    """A human caption in one spelling: no detached or missing full stop, a capital first letter.

    "a dog runs ." -> "A dog runs."
    """
    text = text.strip().rstrip(" .").strip()
    return text[:1].upper() + text[1:] + "."


def are_tokenized(samples: Iterable[Sample]) -> bool:
    """Whether a set's captions were split into words: if any ends in a detached full stop, all are to be tidied."""
    answers = (answer for sample in samples if sample.task == "caption" for answer in sample.answers)
    return any(answer.rstrip().endswith(DETACHED_STOP) for answer in answers)


class Encoder:
    """Turns samples into inputs with one model's processor. `prompt_style` says how: "chat template" or "plain"."""

    def __init__(self, processor: Any, *, tidy_captions: bool = False) -> None:
        self.processor, self.tokenizer, self.tidy_captions = processor, processor.tokenizer, tidy_captions
        self.image_token: str | None = getattr(processor, "image_token", None)
        # Gemma 3's processor calls the token that opens an image its image token; the tokenizer's is the feature's.
        own = getattr(self.tokenizer, "image_token_id", None)
        self.image_id: int | None = own if own is not None else getattr(processor, "image_token_id", None)
        self.template = chat_template(processor)
        # Sets hold answers without a chain of thought: a template that would open one at the prompt's end is told so.
        used = (name for name in THINKING if re.search(rf"\b{name} (is|==|!=)|\bnot {name}\b", self.template or ""))
        self._switches = dict.fromkeys(used, False)
        self.prompt_style = "chat template" if self.template else "plain"
        if self.template is None and self.image_token is None:
            raise InputError("the model has neither a chat template nor an image token; add its chat_template.jinja")
        self._rendered = Confined(
            partial(_render, processor, self.template, self._switches),
            seconds=TEMPLATE_SECONDS,
            more_bytes=TEMPLATE_BYTES,
        )
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        self._text_as_parts = True
        self._prompts: dict[Sample, str] = {}
        where = self.tokenizer.name_or_path
        with strangers(f"{where}: the model's tokenizer fails", more_bytes=PROCESSOR_BYTES):
            if not self._ids(MARKER):
                raise InputError(f"{where}: the tokenizer's vocabulary is empty; check tokenizer.json")
            self._lead, self._end_ids = self._probe_turn()

    # The prompt

    def prompt(self, sample: Sample) -> str:
        """The text up to where the answer begins, with one image token per image."""
        if sample not in self._prompts:
            if len(self._prompts) >= KEPT_PROMPTS:
                self._prompts.clear()
            self._prompts[sample] = self._checked_prompt(sample)
        return self._prompts[sample]

    def _checked_prompt(self, sample: Sample) -> str:
        where = f"sample {shown(sample.id)}"
        if self.template:
            text = self._render(_messages(sample, as_parts=self._text_as_parts), where=where)
        else:
            text = self._plain(sample)
        images = text.count(self.image_token) if self.image_token else 0
        if images < len(sample.images):
            raise SentinelError(
                f"{where}: no image tokens in the prompt: it has {images} for {len(sample.images)} image(s); "
                f"it reads {text[:200]!r}; check the model's chat template"
            )
        if images > len(sample.images):
            raise InputError(f"{where}: its text contains the model's image token {self.image_token!r}; take it out")
        for what, part in (("question", sample.question), ("system message", sample.system or "")):
            if part.strip() not in text:
                raise InputError(f"{where}: the model's chat template leaves out the {what}; it reads {text[:200]!r}")
        return text

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = True, where: str = "a test question") -> str:
        """The template's text. InputError for whatever else comes of it: it is a program of whoever made the model."""
        try:
            text, problem = self._rendered(messages, prompt)
        except OverLimitError as error:
            text, problem = "", f"fails: it {error}"
        if problem:
            raise InputError(f"{where}: the model's chat template {problem}; check {template_file(self.processor)}")
        return str(text)

    def _plain(self, sample: Sample) -> str:
        """For models without a chat template: images, then the turns, one a line."""
        turns = [text for turn in sample.history for text in (turn.question, turn.answer)]
        lines = [*([sample.system] if sample.system else []), *turns, sample.question]
        text = (self.image_token or "") * len(sample.images) + "\n".join(lines)
        return text if self._ends_prompt_itself else f"{text}\n"

    @property
    def _ends_prompt_itself(self) -> bool:
        return type(self.processor).__name__ == "PaliGemmaProcessor"  # adds the newline after the prompt

    def _probe_turn(self) -> tuple[str, list[int]]:
        """The spaces that the template puts between generation prompt and answer, and the ids that end a turn."""
        eos = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if self.template is None:
            return "", self._needed(eos)
        for as_parts in (True, False):
            self._text_as_parts = as_parts
            answer = {"role": "assistant", "content": _content(MARKER, as_parts)}
            question = {"role": "user", "content": _content("?", as_parts)}
            try:
                prompt, whole = self._render([question]), self._render([question, answer], prompt=False)
            except InputError:
                if not as_parts:
                    raise
                continue
            if whole.count(MARKER) == 1:
                break
        else:
            raise InputError("the model's chat template leaves out the assistant's messages; check chat_template.jinja")
        before, after = whole.split(MARKER)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return (lead if not lead.strip() else ""), self._needed(self._end_of_turn(after) or eos)

    def _end_of_turn(self, text: str) -> list[int]:
        """Ids of `text` up to and with its first special token; empty if it has none."""
        ids = self._ids(text)
        for position, token in enumerate(ids):
            if token in self._special_ids():
                return ids[: position + 1]
        return []

    def _special_ids(self) -> set[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}

    def _needed(self, end_ids: list[int]) -> list[int]:
        if not end_ids:
            raise InputError("the model's tokenizer has no eos_token and its chat template no end of turn")
        return end_ids

    # The answer

    def answer_text(self, sample: Sample, answer: str) -> str:
        """The answer as it is scored: captions tidied if asked for, all others as they are."""
        return tidy_caption(answer) if self.tidy_captions and sample.task == "caption" else answer

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Token ids of an answer behind a prompt, and the ids that end the turn.

        The ids that follow the prompt's own, when prompt and answer are tokenized together; where a merge across the
        border changes the prompt's ids, the answer is tokenized alone, since the model is given the prompt as it is.
        """
        text = self._lead + answer
        border = prompt if self.template else "\n"
        with strangers(f"{self.tokenizer.name_or_path}: the model's tokenizer fails", more_bytes=PROCESSOR_BYTES):
            before, both = self._ids(border), self._ids(border + text)
            ids = both[len(before) :] if both[: len(before)] == before else self._ids(text)
        return ids + self._end_ids

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    # Both

    def encode(self, sample: Sample, answer: str | None) -> Encoded:
        """Prompt and answer as a batch of one; with answer None, the prompt alone, to generate from.

        Raises InputError for an unreadable image or what the processor refuses, SentinelError if the images do not
        arrive in the prompt. Nothing is cut.
        """
        prompt = self.prompt(sample)
        inputs = self._process(sample, prompt)
        length = inputs["input_ids"].shape[1]
        if sample.images and self.image_id is not None and self.image_tokens(inputs) == 0:
            self.image_id = self._feature_token(prompt, inputs)
        if sample.images and self.image_id is not None and self.image_tokens(inputs) == 0:
            raise SentinelError(
                f"sample {shown(sample.id)}: no image tokens in the prompt after processing; check the processor"
            )
        item = Encoded(sample, inputs, torch.zeros(length, dtype=torch.bool), self.pad_id, self.image_id)
        return item if answer is None else self.followed(item, answer)

    def followed(self, prompt: Encoded, answer: str) -> Encoded:
        """An encoded prompt with an answer behind it, as `encode` gives both."""
        sample = prompt.sample
        ids = self.answer_ids(self.prompt(sample), self.answer_text(sample, answer))
        inputs = {key: self._append(key, value, ids) for key, value in prompt.inputs.items()}
        return replace(prompt, inputs=inputs, answer_mask=torch.cat([prompt.answer_mask, torch.ones(len(ids)).bool()]))

    def image_tokens(self, inputs: dict[str, Tensor]) -> int:
        """How many of the input tokens stand for image features."""
        return int((inputs["input_ids"] == self.image_id).sum()) if self.image_id is not None else 0

    def _feature_token(self, prompt: str, inputs: dict[str, Tensor]) -> int | None:
        """The token that stands for image features where others took the place of the prompt's image token (Ovis2).

        It is the special one that the processor put in most often; the id as it was where it put in none.
        """
        added = set(inputs["input_ids"].flatten().tolist()) - set(self._ids(prompt))
        special = sorted(added & self._special_ids() - set(self._end_ids))
        return max(special, key=lambda token: int((inputs["input_ids"] == token).sum()), default=self.image_id)

    def _process(self, sample: Sample, prompt: str) -> dict[str, Tensor]:
        images = [open_image(path) for path in sample.images]
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        if images:
            options["images"] = [images]
        with strangers(
            f"sample {shown(sample.id)}: the model's processor refuses it",
            more_bytes=PROCESSOR_BYTES + len(images) * GIB,
            hint=partial(odd_settings, self.processor),
        ):
            output = self.processor(text=[prompt], return_tensors="pt", **options)
        inputs = {
            key: value for key, value in output.items() if key not in NOT_MODEL_INPUTS and isinstance(value, Tensor)
        }
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def _append(self, key: str, value: Tensor, ids: list[int]) -> Tensor:
        """A token-aligned input (1, tokens, ...) lengthened by the answer's tokens; others unchanged."""
        if key not in TOKEN_ALIGNED:
            return value
        if key == "cross_attention_mask":  # the answer sees what the prompt's last token sees
            return torch.cat([value, value[:, -1:].expand(-1, len(ids), *value.shape[2:])], dim=1)
        if key == "input_ids":
            tail = value.new_tensor([ids])
        elif key == "attention_mask":
            tail = value.new_ones(1, len(ids))
        else:
            kind = ANSWER_TOKEN_TYPE.get(type(self.processor).__name__, 0) if key == "token_type_ids" else 0
            tail = value.new_full((1, len(ids)), kind)
        return torch.cat([value, tail], dim=1)


def _render(
    processor: Any, template: str | None, switches: dict[str, bool], messages: list[dict[str, Any]], prompt: bool
) -> tuple[str, str]:
    """The text that a template makes of messages and "", or "" and what is wrong."""
    try:
        text = processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False, **switches
        )
    except MemoryError:
        raise
    except Exception as error:  # templates can raise nearly anything
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        return "", f"refuses these messages: {kind}{shown(first_line(error))}"
    if len(text) > MAX_PROMPT:
        return "", f"makes {len(text):,} characters of these messages, more than {MAX_PROMPT:,}"
    return str(text), ""


def _content(text: str, as_parts: bool) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text}] if as_parts else text


def _messages(sample: Sample, *, as_parts: bool) -> list[dict[str, Any]]:
    """A sample's turns as chat messages; the images stand before the first question."""
    messages: list[dict[str, Any]] = []
    if sample.system is not None:
        messages.append({"role": "system", "content": _content(sample.system, as_parts)})
    for turn in sample.history:
        messages.append({"role": "user", "content": _content(turn.question, as_parts)})
        messages.append({"role": "assistant", "content": _content(turn.answer, as_parts)})
    messages.append({"role": "user", "content": _content(sample.question, as_parts)})
    if sample.images:
        first = next(message for message in messages if message["role"] == "user")
        content = first["content"] if as_parts else _content(first["content"], True)
        first["content"] = [*({"type": "image"} for _ in sample.images), *content]
    return messages


def collate(items: Sequence[Encoded], pad_side: str) -> Batch:
    """Pad to one length on the "right" (to score) or the "left" (to generate from), and join.

    Inputs of images are padded at their ends to one shape and joined along dimension 0: (1, 3, H, W) of LLaVA stack,
    Qwen's (patches, features) and image_grid_thw follow one another; MiniCPM-V's strips are joined end to end. All
    items must have the same inputs, that is all have images or none.
    """
    assert items
    assert pad_side in ("left", "right")
    assert len({frozenset(item.inputs) for item in items}) == 1, "items with and without images cannot share a batch"
    tokens = max(item.tokens for item in items)

    def pad_tokens(value: Tensor, fill: int) -> Tensor:
        missing = tokens - value.shape[1]
        edge = (missing, 0) if pad_side == "left" else (0, missing)
        return functional.pad(value, (0, 0) * (value.dim() - 2) + edge, value=fill)

    inputs = {}
    for key in items[0].inputs:
        rows, along = [item.inputs[key] for item in items], 0
        if key in TOKEN_ALIGNED:
            rows = [pad_tokens(row, items[0].pad_id if key == "input_ids" else 0) for row in rows]
        elif key == STRIPS[0] and STRIPS[1] in items[0].inputs:
            along = -1
        else:
            rows = _same_shape(rows)
        inputs[key] = torch.cat(rows, along)
    answer_mask = torch.cat([pad_tokens(item.answer_mask[None], 0) for item in items])
    image_id = items[0].image_id
    image_mask = None if image_id is None else inputs["input_ids"] == image_id
    return Batch(inputs, answer_mask, tuple(item.sample for item in items), image_mask)


def _same_shape(values: list[Tensor]) -> list[Tensor]:
    """Zeros at the ends of all dimensions but the first, up to the largest; joined along the first afterwards."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padding = [
        [edge for size, largest in zip(value.shape[:0:-1], shape[::-1], strict=True) for edge in (0, largest - size)]
        for value in values
    ]
    return [functional.pad(value, edges) if any(edges) else value for value, edges in zip(values, padding, strict=True)]


@dataclass(frozen=True)
class BatchReport:
    """What went into batches and what did not."""

    samples: int
    tokens: int
    """Padding not counted."""
    image_tokens: int
    answer_tokens: int
    prompt_style: str
    """"chat template", or "plain" for a model that has none."""
    too_long: dict[str, int] = field(default_factory=dict)
    """Samples left out because they are longer than max_tokens: id -> tokens."""


@dataclass(frozen=True)
class BatchMaker:
    """Makes one batch when called."""

    encoder: Encoder
    pairs: list[tuple[Sample, str | None]]
    pad_side: str
    longest: int
    """Tokens that each of them has with its padding."""

    def __call__(self) -> Batch:
        return collate([self.encoder.encode(sample, answer) for sample, answer in self.pairs], self.pad_side)

    def split(self, size: int) -> list["BatchMaker"]:
        """The same samples in batches of at most so many."""
        return [replace(self, pairs=self.pairs[start : start + size]) for start in range(0, len(self.pairs), size)]

    def first(self) -> Batch:
        """Its first sample alone."""
        return collate([self.encoder.encode(*self.pairs[0])], self.pad_side)


def make_batches(
    samples: Sequence[Sample], processor: Any, *, max_tokens: int, batch_size: int, batch_tokens: int | None = None
) -> tuple[list[BatchMaker], BatchReport]:
    """Calibration batches: every sample with its first answer, padded on the right; see `batch_pairs`."""
    pairs = [(sample, sample.answers[0]) for sample in samples]
    encoder = Encoder(processor, tidy_captions=are_tokenized(samples))
    return batch_pairs(
        pairs, encoder, max_tokens=max_tokens, batch_size=batch_size, pad_side="right", batch_tokens=batch_tokens
    )


def batch_pairs(
    pairs: Sequence[tuple[Sample, str | None]],
    encoder: Encoder,
    *,
    max_tokens: int,
    batch_size: int,
    pad_side: str,
    batch_tokens: int | None = None,
) -> tuple[list[BatchMaker], BatchReport]:
    """How to make each batch of (sample, answer) pairs; images are opened when a batch is made, so none wait in memory.

    A batch holds samples with the same number of images and of nearly the same length. The order depends on nothing but
    the pairs: samples with most images first, then by length. A sample longer than max_tokens is left out and counted.
    batch_tokens: of a batch with its padding, unless one sample has more.
    Raises InputError if nothing is left.
    """
    kept: list[tuple[int, int, int]] = []
    too_long: dict[str, int] = {}
    tokens = image_tokens = answer_tokens = 0
    for position, (sample, answer) in enumerate(pairs):
        item = encoder.encode(sample, answer)
        if item.tokens > max_tokens:
            too_long[sample.id] = item.tokens
            continue
        kept.append((-len(sample.images), item.tokens, position))
        tokens += item.tokens
        image_tokens += encoder.image_tokens(item.inputs)
        answer_tokens += int(item.answer_mask.sum())
    if not kept:
        why = (
            f"all {len(too_long)} are longer than {max_tokens} tokens; raise max_tokens"
            if too_long
            else "none were given"
        )
        raise InputError(f"no sample is left to make batches of: {why}")
    kept.sort()
    batches: list[BatchMaker] = []
    start = 0
    for end in range(1, len(kept) + 1):
        full = end == len(kept) or end - start == batch_size or kept[end][0] != kept[start][0]
        if full or (batch_tokens is not None and (end + 1 - start) * kept[end][1] > batch_tokens):
            some = [pairs[position] for *_, position in kept[start:end]]
            batches.append(BatchMaker(encoder, some, pad_side, kept[end - 1][1]))
            start = end
    report = BatchReport(len(kept), tokens, image_tokens, answer_tokens, encoder.prompt_style, too_long)
    return batches, report
