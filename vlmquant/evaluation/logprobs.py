"""A reference model's log-probabilities at every answer token, on disk: reference and candidate never share memory."""

import errno
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vlmquant.errors import DoesNotFitError, InputError, first_line
from vlmquant.evaluation.inputs import Digests
from vlmquant.reading import check, parse_json

BYTES = 4
"""float32: KL between good 4-bit models and their reference is .01 to .1 nats, and INT8 vision costs .0001."""
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class _Index:
    """What stands before the rows, as JSON."""

    vocabulary: int
    rows: dict[str, tuple[int, int]]
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class LogProbs:
    """Natural log-probabilities (answer tokens, vocabulary) float32 of every sample, in a file that is read by rows.

    The file: 8 bytes, the length of the index; the index; the rows. It is read and written by calls, not mapped: a full
    disk or a cut file is then an error and no signal.
    """

    path: Path
    vocabulary: int
    rows: Mapping[str, tuple[int, int]]
    """Sample id -> first row and number of rows; a sample's references follow one another."""
    inputs: Mapping[str, Digests]
    """Sample id -> what the reference was given for it."""
    start: int
    """Byte at which the rows begin."""

    @classmethod
    def create(
        cls,
        path: Path,
        tokens: Mapping[str, int],
        vocabulary: int,
        inputs: Mapping[str, Mapping[str, str]] | None = None,
    ) -> "LogProbs":
        """A file with room for `tokens[id]` rows of each sample. DoesNotFitError where the disk has none."""
        rows, total = {}, 0
        for sample, count in tokens.items():
            rows[sample] = (total, count)
            total += count
        given = {sample: dict(found) for sample, found in (inputs or {}).items()}
        index = json.dumps({"vocabulary": vocabulary, "rows": rows, "inputs": given}).encode()
        start = LENGTH.size + len(index)
        needed = start + total * vocabulary * BYTES
        with path.open("r+b" if path.exists() else "x+b") as file:
            file.truncate(0)
            status = os.fstatvfs(file.fileno())
            free = status.f_bavail * status.f_frsize
            try:
                if needed > free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.posix_fallocate(file.fileno(), 0, needed)
            except OSError as error:
                raise DoesNotFitError(
                    f"{_place(path)}: the reference's log-probabilities need {needed:,} bytes, {free:,} are free "
                    f"({error.strerror}); score fewer samples, or set TMPDIR to a larger disk"
                ) from error
            file.write(LENGTH.pack(len(index)) + index)
        return cls(path, vocabulary, rows, given, start)

    @classmethod
    def open(cls, path: Path) -> "LogProbs":
        """Inverse of create; InputError if there is no such file."""
        where = f"{path}: no log-probabilities of a reference model here"
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                (length,) = LENGTH.unpack(file.read(LENGTH.size))
                content = file.read(min(length, size))
        except (OSError, struct.error) as error:
            raise InputError(f"{where}: {first_line(error)}") from error
        index: _Index = check(_Index, parse_json(content, where=where), where=where)
        return cls(path, index.vocabulary, index.rows, index.inputs, LENGTH.size + length)

    def read(self, sample: str, offset: int, count: int) -> Tensor:
        """(count, vocabulary): rows of a sample, from its row `offset` on."""
        values = torch.empty(count, self.vocabulary)
        with self.path.open("rb") as file:
            file.seek(self._at(sample, offset))
            if file.readinto(values.numpy()) != values.nbytes:  # type: ignore[arg-type]
                raise InputError(
                    f"{_place(self.path)}: the reference's log-probabilities are cut short; score it again"
                )
        return values

    def write(self, sample: str, offset: int, values: Tensor) -> None:
        """Inverse of read."""
        try:
            with self.path.open("r+b") as file:
                file.seek(self._at(sample, offset))
                file.write(values.contiguous().numpy())  # type: ignore[arg-type]
        except OSError as error:
            raise DoesNotFitError(
                f"{_place(self.path)}: the reference's log-probabilities cannot be written: {first_line(error)}; "
                "set TMPDIR to another disk"
            ) from error

    def _at(self, sample: str, offset: int) -> int:
        return self.start + (self.rows[sample][0] + offset) * self.vocabulary * BYTES


def _place(path: Path) -> Path:
    """Where a file takes its room, also one without a name."""
    return Path(tempfile.gettempdir()) if path.parent == Path("/dev/fd") else path.parent
