"""One image-text sample, as calibration and evaluation sets hold it."""

from dataclasses import dataclass
from pathlib import Path

TASKS = ("caption", "vqa", "document", "chart", "reasoning", "text")
"""The tasks of the shipped sets. A user's set may name others; a task is a stratum."""


@dataclass(frozen=True)
class Turn:
    """One earlier exchange of a conversation."""

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A question about zero or more images, with one or more right answers (a caption has several references)."""

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    images: tuple[Path, ...] = ()
    """Absolute paths; they stand before the question in the first user turn, in this order."""
    history: tuple[Turn, ...] = ()
    """Earlier turns, oldest first; the images belong to the first of them if there is one."""
    system: str | None = None
