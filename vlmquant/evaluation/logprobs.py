"""A reference model's log-probabilities at every answer token, on disk: reference and candidate never share memory."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmquant.errors import DoesNotFitError, InputError

BYTES = 4
"""float32: KL between good 4-bit models and their reference is .01 to .1 nats, and INT8 vision costs .0001."""


@dataclass(frozen=True)
class LogProbs:
    """Natural log-probabilities (answer tokens, vocabulary) float32 of every sample, memory-mapped from a .npy file."""

    path: Path
    rows: Mapping[str, tuple[int, int]]
    """Sample id -> first row and number of rows; a sample's references follow one another."""

    @classmethod
    def create(cls, path: Path, tokens: Mapping[str, int], vocabulary: int) -> "LogProbs":
        """An empty file for `tokens[id]` rows of each sample, and its index beside it.

        Raises DoesNotFitError where the disk is too small.
        """
        total = sum(tokens.values())
        free = shutil.disk_usage(path.parent).free
        if total * vocabulary * BYTES > free:
            raise DoesNotFitError(
                f"{path.parent}: the reference's log-probabilities need {total * vocabulary * BYTES:,} bytes, {free:,} "
                "are free; score fewer samples, or set TMPDIR to a larger disk"
            )
        rows, start = {}, 0
        for sample, count in tokens.items():
            rows[sample] = (start, count)
            start += count
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(total, vocabulary)).flush()
        _index(path).write_text(json.dumps(rows))
        return cls(path, rows)

    @classmethod
    def open(cls, path: Path) -> "LogProbs":
        """Inverse of create; InputError if there is no such pair of files."""
        try:
            rows = json.loads(_index(path).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no log-probabilities of a reference model here: {error}") from error
        return cls(path, {sample: (start, count) for sample, (start, count) in rows.items()})

    def map(self, mode: str = "r") -> NDArray[np.float32]:
        """All rows (tokens, vocabulary), memory-mapped; mode "r" or "r+"."""
        array: NDArray[np.float32] = np.load(self.path, mmap_mode="r+" if mode == "r+" else "r")
        return array

    def remove(self) -> None:
        """Delete both files."""
        self.path.unlink(missing_ok=True)
        _index(self.path).unlink(missing_ok=True)


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
