"""Scratch space that outlives nobody: files without a name, and folders that the next run removes if it has to."""

import ctypes
import fcntl
import gc
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "vlmquant-"
LOCK_NAME = ".vlmquant-scratch"
"""Locked by the process that the folder belongs to, as long as that lives."""


@contextmanager
def unnamed_file() -> Iterator[Path]:
    """An empty file in TMPDIR that has no name: the system frees it with the last process that has it open.

    The path names it by its descriptor: for this process, and for children that inherit the descriptor.
    """
    with tempfile.TemporaryFile(prefix=PREFIX) as file:
        yield Path(f"/dev/fd/{file.fileno()}")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in TMPDIR, removed in the end; those that killed processes of this user left behind are removed now."""
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / f"{LOCK_NAME}.new").open("x") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(lock.name, folder / LOCK_NAME)  # under this name it is never seen unlocked
            yield folder


def remove_abandoned() -> None:
    """Delete the scratch folders of this user whose owner is gone: nothing but what `scratch_folder` made."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def mapped_copy(value: "Tensor", folder: Path) -> "Tensor":
    """A copy of a CPU tensor in a file of this folder that has no name; its pages leave memory when others need it.

    The file goes with the tensor, or with the process, however that ends. OSError where the disk has no room.
    """
    import torch

    with tempfile.TemporaryFile(prefix=PREFIX, dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, value.nbytes)  # or a full disk is a SIGBUS
        copy = torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=value.numel(), dtype=value.dtype)
    copy.copy_(value.flatten())
    leave_memory(copy)
    return copy.view(value.shape)


def leave_memory(copy: "Tensor") -> None:
    """Take the pages of a `mapped_copy` out of this process; what they hold stays in the file."""
    address, size = copy.data_ptr(), copy.nbytes
    start = address - address % mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), ctypes.c_int(mmap.MADV_DONTNEED))


@contextmanager
def circles_freed() -> Iterator[None]:
    """Free what was made inside and is not referred to from outside, circles too, as soon as it is left.

    What was there before is passed over, which in a process with torch and transformers are most objects by far.
    """
    passed_over = not gc.get_freeze_count()  # else somebody has frozen objects, which nobody could freeze again
    if passed_over:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if passed_over:
            gc.unfreeze()
