"""What an unfinished run has done: a safetensors file per unit, and a journal with a line for each that is complete."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from vlmquant import signals
from vlmquant.checkpoint.files import TMP_SUFFIX, TensorSpec, sha256_of, write_safetensors, write_text
from vlmquant.checkpoint.inputs import differing
from vlmquant.errors import InputError, UsageError, VlmquantError
from vlmquant.reading import check, inside, parse_json, read_bytes, read_json
from vlmquant.shards import TensorEntry, read_header, some

JOURNAL_NAME = "journal.jsonl"
FINGERPRINT_NAME = "fingerprint.json"
UNITS_NAME = "units"
UNIT_SUFFIX = ".safetensors"
OUTSIDE = "outside"
"""The unit of the weights that lie in no block."""
Mark = Literal["an unfinished run of vlmquant; --resume goes on from here"]
"""What the fingerprint of a work directory says first, and no other file does."""
(MARK,) = get_args(Mark)


class _Begun(BaseModel):
    """The fingerprint's file, the first in a work directory and the last to go."""

    model_config = ConfigDict(extra="forbid")
    what: Mark
    fingerprint: dict[str, str]


class CacheRecord(BaseModel):
    """Absolute maxima of an attention module's keys and values, for each head."""

    keys: tuple[float, ...]
    values: tuple[float, ...]


class _Record(BaseModel):
    """What is read of a unit's record."""

    errors: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    experts: dict[str, tuple[int, ...]] = {}
    cache: dict[str, CacheRecord] = {}
    batch_size: Annotated[int, Field(ge=1)] | None = None


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")
    unit: str
    sha256: str
    quantized: tuple[str, ...]
    changed: tuple[str, ...]
    record: _Record


@dataclass(frozen=True)
class Unit:
    """A finished unit on disk."""

    file: Path
    entries: dict[str, TensorEntry]
    """Its tensors by the names they have in the final shards."""
    quantized: tuple[str, ...]
    """Names of the parameters it holds as codes."""
    changed: tuple[str, ...]
    """Names of the parameters it holds as they are."""
    record: dict[str, Any]


class Journal:
    """The finished units in a work directory."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.units: dict[str, Unit] = {}

    @classmethod
    def start(cls, work: Path, fingerprint: Mapping[str, str]) -> "Journal":
        """Begin in an empty directory."""
        begun = {"what": MARK, "fingerprint": dict(fingerprint)}
        write_text(work / FINGERPRINT_NAME, json.dumps(begun, indent=1) + "\n")
        (work / UNITS_NAME).mkdir()
        (work / JOURNAL_NAME).touch()
        return cls(work)

    @classmethod
    def reopen(
        cls, work: Path, fingerprint: Mapping[str, str], *, fits: Callable[[str, Unit], bool] = lambda *_: True
    ) -> "Journal":
        """Go on from an earlier run. UsageError names what that run did not share with this one.

        fits: whether a unit can be the one of that name; one that is damaged or does not fit is to be done again.
        """
        if differ := differing(_begun(work).fingerprint, fingerprint):
            raise UsageError(
                f"{work}: was begun with another {some(differ)}, so it cannot be resumed; "
                "run it as it was begun, or pass --force to start anew"
            )
        journal = cls(work)
        for line in _complete_lines(work / JOURNAL_NAME):
            name, unit = line["unit"], _intact_unit(work, line)
            journal.units.pop(name, None)
            if unit and fits(name, unit):
                journal.units[name] = unit
        return journal

    def add(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        quantized: tuple[str, ...],
        changed: tuple[str, ...],
        record: dict[str, Any],
    ) -> None:
        """Store a unit; it is done once this returns, and not before."""
        file = self.work / UNITS_NAME / f"{name}{UNIT_SUFFIX}"
        specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
        digest = write_safetensors(file, specs, tensors.__getitem__)
        line = {"unit": name, "sha256": digest, "quantized": quantized, "changed": changed, "record": record}
        text = json.dumps(line, allow_nan=False)
        self._append(text.encode() + b"\n")
        # Parsed back, so that a resumed run and this one hold the same record.
        self.units[name] = Unit(file, _entries(file), quantized, changed, json.loads(text)["record"])

    def _append(self, line: bytes) -> None:
        with signals.held(), (self.work / JOURNAL_NAME).open("r+b", buffering=0) as stream:
            # What a kill, or a full disk, left of a line would spoil this one.
            length = stream.readall().rfind(b"\n") + 1
            stream.truncate(length)
            stream.seek(length)
            while line:
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())


def count_units(work: Path) -> int:
    """How many units an earlier run finished, by its journal alone."""
    return len(unit_names(work))


def unit_names(work: Path) -> set[str]:
    return {line["unit"] for line in _complete_lines(work / JOURNAL_NAME)}


def is_unfinished_run(work: Path) -> bool:
    """Whether the directory holds what `Journal.start` put there, or the part of it that a kill let it write."""
    tmp = work / (FINGERPRINT_NAME + TMP_SUFFIX)
    if (work / FINGERPRINT_NAME).exists() or not tmp.exists():
        try:
            return bool(_begun(work))
        except UsageError:
            return False
    start = json.dumps({"what": MARK}, indent=1)[:-2].encode()
    try:
        content = read_bytes(tmp)
    except InputError:
        return False
    return content.startswith(start) or start.startswith(content)


def is_begun_with(work: Path, fingerprint: Mapping[str, str]) -> bool:
    """Whether the directory is of a run that began with all of this."""
    try:
        return not differing(_begun(work).fingerprint, fingerprint)
    except UsageError:
        return False


def _begun(work: Path) -> Any:
    remedy = "move the directory away"
    return read_json(work / FINGERPRINT_NAME, _Begun, error=UsageError, remedy=remedy)


def _complete_lines(journal: Path) -> list[dict[str, Any]]:
    """The journal's lines, without any that a kill or a bad disk left unreadable."""
    lines = []
    try:
        content = read_bytes(journal)
    except InputError:
        return []
    for text in content.split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
        try:
            line = parse_json(text, where=str(journal))
            check(_Line, line, where=str(journal))
        except VlmquantError:
            continue
        lines.append(line)
    return lines


def _intact_unit(work: Path, line: dict[str, Any]) -> Unit | None:
    """The unit of a journal line, if its file is still what was written."""
    try:
        file = inside(work / UNITS_NAME, line["unit"] + UNIT_SUFFIX, where=JOURNAL_NAME)
        if sha256_of(file) != line["sha256"]:
            return None
        return Unit(file, _entries(file), tuple(line["quantized"]), tuple(line["changed"]), line["record"])
    except (OSError, InputError):
        return None


def _entries(file: Path) -> dict[str, TensorEntry]:
    return {entry.name: entry for entry in read_header(file)}
