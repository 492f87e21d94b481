"""The cache on disk: what is compiled or measured once. Code in it will run, so it is the user's own."""

import errno
import os
import stat
import tempfile
from pathlib import Path

from vlmquant.notices import warn_once

CACHE = "VLMQUANT_CACHE"
"""The folder of compiled kernels and measurements; else vlmquant in the user's cache folder."""


def cache_home() -> Path:
    """VLMQUANT_CACHE, or vlmquant in the user's cache folder."""
    if own := os.environ.get(CACHE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vlmquant"


def read_trusted(path: Path) -> bytes | None:
    """A file of the cache: code that will run, so nobody but this user and root may have been able to write it.

    None if it is missing or not to be trusted, which is told once.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        for place in (path, *folders_of(path)):
            state = os.fstat(descriptor) if place == path else os.stat(place)
            if why := _untrusted(state, stat.S_IFREG if place == path else stat.S_IFDIR):
                warn_once(f"{place}: {why}, so the cache in {path.parent} is not used; make it yours alone")
                return None
        return file.read()


def folders_of(path: Path) -> tuple[Path, Path]:
    """The folders of the cache around one of its files."""
    return path.parent, path.parent.parent


def cache_problem(name: str) -> str | None:
    """Why nothing can be kept in this folder of the cache; None where it can: tried, with a file where the folder is
    there already, else with a folder beside it."""
    home = cache_home()
    try:
        around = next(folder for folder in (home / name, home, *home.parents) if os.path.lexists(folder))
        for folder in (around, around.parent):
            if folder.is_relative_to(home) and (why := _untrusted(os.stat(folder), stat.S_IFDIR)):
                return f"{folder} {why}"
        with tempfile.TemporaryDirectory(dir=around, prefix="vlmquant-"):
            return None
    except OSError as error:
        return error.strerror


def _untrusted(state: os.stat_result, kind: int) -> str | None:
    """What speaks against a file or folder of the cache."""
    if stat.S_IFMT(state.st_mode) != kind:
        return "is no regular file" if kind == stat.S_IFREG else "is no folder"
    if state.st_uid not in (os.geteuid(), 0):
        return "belongs to another user"
    return "can be written to by other users" if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def private_folder(name: str) -> Path:
    """A folder of the cache, made for this user alone. OSError, also where it is there and others could write to it."""
    home = cache_home()
    home.parent.mkdir(parents=True, exist_ok=True)
    for folder in (home, home / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        if why := _untrusted(os.stat(folder), stat.S_IFDIR):
            raise PermissionError(errno.EACCES, f"{folder} {why}", str(folder))
    return home / name


def write_private(path: Path, content: bytes) -> None:
    """Write a file of the cache whole or not at all, it and its folders for this user alone.

    OSError, also where the folders are there and others could write to them.
    """
    inner = private_folder(path.parent.name)
    with tempfile.NamedTemporaryFile(dir=inner, prefix=path.name, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
