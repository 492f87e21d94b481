"""What an unfinished run has done: a safetensors file per unit, and a journal with a line for each that is complete."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmquant.checkpoint.files import TensorSpec, sha256_of, write_safetensors, write_text
from vlmquant.errors import InputError, UsageError
from vlmquant.shards import TensorEntry, read_header

JOURNAL_NAME = "journal.jsonl"
FINGERPRINT_NAME = "fingerprint.json"
UNITS_NAME = "units"
OUTSIDE = "outside"
"""The unit of the weights that lie in no block."""


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
        (work / JOURNAL_NAME).touch()  # first, as the sign that the directory is ours
        (work / UNITS_NAME).mkdir()
        write_text(work / FINGERPRINT_NAME, json.dumps(dict(fingerprint), indent=1) + "\n")
        return cls(work)

    @classmethod
    def reopen(cls, work: Path, fingerprint: Mapping[str, str]) -> "Journal":
        """Go on from an earlier run. UsageError names what that run did not share with this one."""
        before = _read_fingerprint(work)
        if before != dict(fingerprint):
            names = sorted({*before, *fingerprint})
            differ = [name for name in names if before.get(name) != fingerprint.get(name)]
            raise UsageError(
                f"{work}: was begun with another {', '.join(differ)}, so it cannot be resumed; "
                "run it as it was begun, or pass --force to start anew"
            )
        journal = cls(work)
        for line in _complete_lines(work / JOURNAL_NAME):
            name, unit = line["unit"], _intact_unit(work, line)
            journal.units.pop(name, None)
            if unit:
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
        file = self.work / UNITS_NAME / f"{name}.safetensors"
        specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
        digest = write_safetensors(file, specs, tensors.__getitem__)
        line = {"unit": name, "sha256": digest, "quantized": quantized, "changed": changed, "record": record}
        text = json.dumps(line, allow_nan=False)
        self._append(text.encode() + b"\n")
        # Parsed back, so that a resumed run and this one hold the same record.
        self.units[name] = Unit(file, _entries(file), quantized, changed, json.loads(text)["record"])

    def _append(self, line: bytes) -> None:
        with (self.work / JOURNAL_NAME).open("r+b", buffering=0) as stream:
            # What a kill, or a full disk, left of a line would spoil this one.
            length = stream.readall().rfind(b"\n") + 1
            stream.truncate(length)
            stream.seek(length)
            while line:
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())


def count_units(work: Path) -> int:
    """How many units an earlier run finished, by its journal alone."""
    return len({line["unit"] for line in _complete_lines(work / JOURNAL_NAME)})


def _read_fingerprint(work: Path) -> dict[str, str]:
    try:
        value = json.loads((work / FINGERPRINT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{work}: its {FINGERPRINT_NAME} cannot be read; pass --force to start anew") from error
    return value if isinstance(value, dict) else {}


def _complete_lines(journal: Path) -> list[dict[str, Any]]:
    """The journal's lines, without any that a kill or a bad disk left unreadable."""
    lines = []
    try:
        content = journal.read_bytes()
    except FileNotFoundError:
        return []
    for text in content.split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() == {"unit", "sha256", "quantized", "changed", "record"}:
            lines.append(line)
    return lines


def _intact_unit(work: Path, line: dict[str, Any]) -> Unit | None:
    """The unit of a journal line, if its file is still what was written."""
    file = work / UNITS_NAME / f"{line['unit']}.safetensors"
    try:
        if sha256_of(file) != line["sha256"]:
            return None
        return Unit(file, _entries(file), tuple(line["quantized"]), tuple(line["changed"]), line["record"])
    except (OSError, InputError):
        return None


def _entries(file: Path) -> dict[str, TensorEntry]:
    return {entry.name: entry for entry in read_header(file)}
