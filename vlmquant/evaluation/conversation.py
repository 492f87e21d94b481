"""Questions to a model, one after the other: prompts as calibration makes them, answers decoded as evaluation does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from vlmquant import signals
from vlmquant.calibration.encode import Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.components import locate_model
from vlmquant.evaluation.passes import decode, greedy, special_tokens, to_model
from vlmquant.loading import load_model, reading_part

HALF = "\ufffd"
"""What a tokenizer gives for a character of which only some bytes are there yet."""


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    """Those of images included."""
    tokens: int
    seconds: float
    """From the first step to the last token; images are prepared before."""
    finished: bool
    """Whether the model ended it; else it was cut at the number of tokens that was asked for."""

    def to_json(self) -> dict[str, Any]:
        return {
            "answer": self.text,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "finished": self.finished,
        }


class Conversation:
    """A model, quantized or not (a directory or hub id), that remembers what was asked before.

    dtype: of what is not quantized; None for the model's own. images: of the first question. Raises what load_model and
    load_processor do.
    """

    def __init__(
        self, model: str | Path, *, dtype: torch.dtype | None, device: str, images: Sequence[Path] = ()
    ) -> None:
        directory = locate_model(model)
        self.encoder = Encoder(load_processor(directory))
        tokens = special_tokens(directory)
        self.model = reading_part(load_model(directory, dtype=dtype, device=device, generation=tokens).eval())
        self.images, self.history = tuple(images), list[Turn]()

    @torch.inference_mode()
    def ask(self, question: str, *, max_new_tokens: int, hear: Callable[[str], object] = lambda piece: None) -> Answer:
        """The greedy answer. hear: is given it piece by piece while it is made."""
        number = f"question {len(self.history) + 1}"
        sample = Sample(number, "vqa", question, (), self.images, tuple(self.history))
        batch = collate([self.encoder.encode(sample, None)], "left")
        config = greedy(self.model, self.encoder, max_new_tokens=max_new_tokens)
        pieces = _Pieces(self.encoder.tokenizer, hear)
        started = time.perf_counter()
        output = decode(self.model, batch, to_model(batch, self.model), config, streamer=pieces)
        seconds = time.perf_counter() - started
        prompt = batch.inputs["input_ids"].shape[1]
        made = output[0, prompt:].tolist()
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.history.append(Turn(question, pieces.text.strip()))
        return Answer(pieces.text.strip(), prompt, len(made), seconds, bool(made) and made[-1] in ends)


class _Pieces(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Tokens as `generate` makes them -> pieces of text, each made of whole characters."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], object]) -> None:
        self.tokenizer, self.hear = tokenizer, hear
        self.ids: list[int] | None = None
        self.text = ""

    def put(self, value: Tensor) -> None:
        signals.check()
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._tell(last=False)

    def end(self) -> None:
        self._tell(last=True)

    def _tell(self, *, last: bool) -> None:
        text = str(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))
        if not last and (text.endswith(HALF) or not text.startswith(self.text)):
            return
        piece, self.text = text.removeprefix(self.text) if text.startswith(self.text) else "", text
        if piece:
            self.hear(piece)
