"""Files that survive a kill: written whole or not at all, locked, and safetensors written one tensor at a time."""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vlmquant import signals
from vlmquant.errors import CheckpointError, DoesNotFitError, InputError, UsageError
from vlmquant.limits import is_allocation_failure
from vlmquant.shards import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 8
"""Bytes; tensor data begins at a multiple of it, as the safetensors library has it."""
CHUNK_BYTES = 16 * 1024 * 1024
"""Copied or written at a time."""
HASHED_BYTES = 1 << 20
"""Hashed at a time, while they are still in the processor's cache."""
TMP_SUFFIX = ".tmp"
"""Ending of a file that is being written; one left behind means nothing."""
OWNER = re.compile(r"(process \d+ on [^\n]*\n)?")
"""What a lock says; nothing between its making and its taking."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Say in our words what the operating system has against writing at `place`."""
    try:
        yield
    except OSError as error:
        if is_allocation_failure(error):
            raise  # no fault of the place: told, and answered, as memory that ran out
        what = f"{place}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFitError(f"{what}; free some space and run again with --resume to go on from here") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"{what}; choose a place that you may write to") from error
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise UsageError(f"{what}; choose another place") from error
        raise CheckpointError(f"{what}; mend the cause and run again") from error


def sync_directory(path: Path) -> None:
    """Make renames and new files in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open for writing a file that appears under its name complete and durable, or not at all."""
    tmp = path.with_name(path.name + TMP_SUFFIX)
    try:
        with tmp.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as stream:
        stream.write(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """InputError where the source cannot be read."""
    try:
        stream = source.open("rb")
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
    with stream, written_whole(target) as out:
        while chunk := stream.read(CHUNK_BYTES):
            out.write(chunk)


def sha256_of(path: Path) -> str:
    """Ends where a signal asks for it: it may take minutes."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASHED_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            signals.check()
    return digest.hexdigest()


def write_safetensors(path: Path, specs: Iterable[TensorSpec], read: Callable[[str], Tensor]) -> str:
    """Write the tensors, read one at a time, and return the file's sha256.

    In the file they lie by falling element size and else in the order given, so that each is aligned to its elements
    (as the safetensors library has it). ValueError where a tensor is not what its spec says.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    digest = hashlib.sha256()
    with written_whole(path) as stream:
        for part in _parts(text, ordered, read):
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def _parts(header: bytes, specs: Iterable[TensorSpec], read: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for spec in specs:
        signals.check()
        value = read(spec.name)
        if value.dtype != spec.dtype or tuple(value.shape) != spec.shape:
            raise ValueError(f"{spec.name}: expected {spec.dtype} {spec.shape}, got {value.dtype} {tuple(value.shape)}")
        octets = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(octets), CHUNK_BYTES):
            yield octets[start : start + CHUNK_BYTES]


class Lock:
    """A file that one process at a time holds. The kernel lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """UsageError names the process that holds it, or says that the file there is none of ours."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                owner = self._take(descriptor)
                if self._is_current(descriptor):
                    self._claim(descriptor, owner)
                    self._descriptor = descriptor
                    return
            finally:
                if self._descriptor is None:  # refused; or removed by its former owner between our open and our lock
                    os.close(descriptor)

    def _take(self, descriptor: int) -> str:
        """Lock it; its last owner's words."""
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        owner = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") if regular else ""
        if not regular or not OWNER.fullmatch(owner):
            raise UsageError(f"{self.path}: is in the way and no lock of vlmquant; move it, or give another output")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{self.path}: another vlmquant writes this output ({owner.strip()}); wait for it to end"
            ) from error
        return os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()

    def _claim(self, descriptor: int, owner: str) -> None:
        host = socket.gethostname()
        if owner and not owner.endswith(f" on {host}"):  # a lock that does not reach across machines
            raise UsageError(
                f"{self.path}: locked by {owner}, of which this machine cannot tell whether it lives; "
                "if it has ended, remove this file"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {host}\n".encode(), 0)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return self.path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
