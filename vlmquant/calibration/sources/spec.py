"""What goes into reading a source and what comes out of it, as data."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmquant.calibration.samples import Sample
from vlmquant.errors import InputError, UsageError, shown

ROLES = ("image", "question", "answer", "caption", "conversation", "history", "choices", "system", "id", "task")
"""What a key or column of a record may hold for us."""
KEYS_SHOWN = 12
"""Of a source, in a message."""


@dataclass(frozen=True)
class SourceSpec:
    """Where samples come from."""

    path: str
    """A file, a folder, or a dataset's id on the hub (owner/name)."""
    format: str = "auto"
    """A key of FORMATS, or "auto" to look."""
    task: str | None = None
    """Task of all its samples; None reads it from the records, else caption, vqa or text by what a record holds."""
    licence: str = "not stated"
    """Goes into the set's manifest."""
    images: str | None = None
    """Folder that image paths start from; None for the folder of the file itself."""
    split: str = "train"
    """Of a dataset from the hub."""
    map: Mapping[str, str] = field(default_factory=dict)
    """Role -> the key or column to read it from, where the rules would choose another: a dotted path into nested
    objects; for images several, joined by "+"; empty for none."""
    allow_outside: bool = False
    """Whether images may lie outside the folder that their paths start from."""


def parse_map(text: str) -> dict[str, str]:
    """`image=picture,question=q,answer=label` as SourceSpec.map."""
    roles: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, key = (piece.strip() for piece in part.partition("="))
        if not equals or role not in ROLES:
            raise UsageError(f"--map {shown(part)}: give ROLE=KEY, where ROLE is one of {', '.join(ROLES)}")
        if role in roles:
            raise UsageError(f"--map {shown(text)}: {role} stands twice")
        roles[role] = key
    return roles


@dataclass(frozen=True)
class EmbeddedImage:
    """An encoded image that is not a file of its own."""

    key: str
    """Tells it from others: a hash of it."""
    read: Callable[[], bytes]
    """Reads it anew; UnusableImageError where that fails."""


ImageSource = Path | EmbeddedImage


@dataclass(frozen=True)
class Record:
    """A record as its file holds it, before anybody knows what its keys mean."""

    where: str
    fields: dict[str, Any]
    folder: Path
    """That image paths start from."""
    again: Callable[[], dict[str, Any]] | None = None
    """Reads the fields anew, so that no image stays in memory; None keeps those that hold images."""
    id: str | None = None
    """Of its sample; None makes one."""


@dataclass(frozen=True)
class Candidate:
    """A sample whose images nobody has opened yet (`sample.images` is empty)."""

    sample: Sample
    images: tuple[ImageSource, ...]
    where: str = ""
    """The record it was read from, as in BadRecord."""


@dataclass(frozen=True)
class BadRecord:
    """A record that makes no sample."""

    where: str
    """file:12, "file row 12", "captions.json annotations[4]"."""
    reason: str
    """One line: a kind that can be counted, and where there is more to say a colon and the details."""

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(": ")[0]


class UnusableRecordError(InputError):
    """A record that makes no sample; the message is its BadRecord.reason."""


class NetworkImageError(UnusableRecordError):
    """Its image is not on this machine."""


@dataclass(frozen=True)
class SourceReading:
    """What a source holds, and what was read as what."""

    candidates: list[Candidate]
    bad: tuple[BadRecord, ...]
    passed_over: dict[str, int]
    """Sound records that are not wanted, by reason."""
    format: str
    read_as: dict[str, tuple[str, ...]]
    """Role -> the keys or columns it was read from."""
    unused: tuple[str, ...]
    """Keys or columns that nothing was read from."""
    records: int
    images: int
    """Those that the source says it has, in bad records too."""

    def summary(self) -> str:
        """What was read as what, in a line: "read as jsonl: image from 'img', answer from 'label'; unused: 'size'"."""
        parts = [f"{role} from {_named(keys)}" for role, keys in self.read_as.items()]
        unused = f"; unused: {_named(self.unused)}" if self.unused else ""
        return f"read as {self.format}: {', '.join(parts) or 'nothing'}{unused}"

    def reasons(self) -> str:
        """The kinds of bad records with their counts, the most frequent first: "3 without an answer, 1 ..."."""
        return ", ".join(f"{count} {kind}" for kind, count in Counter(bad.kind for bad in self.bad).most_common())


def _named(keys: tuple[str, ...]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(f"'{shown(key, limit=60)}'" for key in keys[:KEYS_SHOWN]) + more
