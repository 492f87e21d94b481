"""How a model is scored: one record, the same for the reference and every candidate, stored with the results."""

from dataclasses import dataclass
from typing import Literal

from vlmquant.devices import AUTO
from vlmquant.errors import UsageError
from vlmquant.threads import check_threads

LEAST_TOKENS = 2
"""Of an answer whose speed is measured: the first is not of it."""


@dataclass(frozen=True)
class Settings:
    """Settings of score_model; every default of the evaluation lives here."""

    references_per_caption: int = 2
    """A caption's first so many references are scored by likelihood; BLEU-4 uses all. Other tasks: the first answer."""
    tidy_captions: bool | None = None
    """Score captions in one spelling (calibration.encode.tidy_caption); None: where the set's were split into words."""
    batch_size: int = 16
    """Sequences in one forward pass."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; auto takes what is faster here, the same for all models of one comparison."""
    device: str = AUTO
    """Of all models; auto is the GPU if there is one."""
    threads: int | None = None
    """CPU threads; None keeps torch's own number."""
    generate: bool = True
    """Write captions and short answers greedily, for BLEU-4 and exact match."""
    caption_tokens: int = 32
    """Most tokens of a generated caption."""
    answer_tokens: int = 12
    """Most tokens of a generated short answer."""
    allow_other_inputs: bool = False
    """Score a model whose prompts or image inputs are not the reference's, and say so, instead of refusing it."""
    wrong_image: bool = False
    """Score every answer once more beside another sample's image: a model that looks at the image is then worse."""
    speed_prompts: int = 3
    """The longest prompts, with an image where there is one, on which speed is measured where answers are generated."""
    speed_rounds: int = 10
    """Times that one of them is given to a model, and to the reference in turn: turns.median_ratio can leave out one at
    either end."""
    speed_tokens: int = 16
    """Tokens decoded each time."""

    def __post_init__(self) -> None:
        for name in (
            "references_per_caption",
            "batch_size",
            "caption_tokens",
            "answer_tokens",
            "speed_prompts",
            "speed_rounds",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.speed_tokens < LEAST_TOKENS:
            raise UsageError(f"speed_tokens is {self.speed_tokens}; it must be at least {LEAST_TOKENS}")
        if self.threads is not None:
            check_threads(self.threads)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"dtype is {self.dtype!r}; it must be auto, float32 or bfloat16")
