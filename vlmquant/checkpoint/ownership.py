"""What in a directory is ours: we delete only what a manifest, or the state of an unfinished run, proves we wrote."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from vlmquant.checkpoint.inputs import Digests
from vlmquant.checkpoint.manifest import MANIFEST_NAME, read_manifest
from vlmquant.errors import CheckpointError


def contents(root: Path) -> tuple[list[str], list[str]]:
    """Relative names of all files (links and whatever else is no directory among them) and of all directories."""
    files: list[str] = []
    folders: list[str] = []

    def refuse(error: OSError) -> None:
        raise error

    for place, below, names in os.walk(root, onerror=refuse):
        where = Path(place).relative_to(root)
        links = {name for name in below if os.path.islink(Path(place, name))}
        files += [(where / name).as_posix() for name in (*names, *links)]
        folders += [(where / name).as_posix() for name in below if name not in links]
    return sorted(files), sorted(folders)


def strangers(root: Path, is_ours: Callable[[str], bool], our_folders: Iterable[str]) -> list[str]:
    """What is in a directory beside our files and folders."""
    files, folders = contents(root)
    ours = set(our_folders)
    return [name for name in files if not is_ours(name)] + [f"{name}/" for name in folders if name not in ours]


def folders_of(names: Iterable[str]) -> set[str]:
    """The directories that files of these names lie in."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}


def not_as_written(checkpoint: Path, digests: Digests) -> list[str]:
    """Names in a directory that are not, or not any more, what we wrote into it; all of them without a manifest."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:
        return strangers(checkpoint, lambda _: False, ())
    return unlisted(checkpoint, manifest) + [
        name
        for name in manifest["files"]
        if (checkpoint / name).is_file() and not _same(checkpoint, name, manifest, digests)
    ]


def unlisted(checkpoint: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is in a checkpoint's directory and not in its manifest."""
    names = {*manifest["files"], MANIFEST_NAME}

    def is_ours(name: str) -> bool:
        return name in names

    return strangers(checkpoint, is_ours, folders_of(names))


def _same(checkpoint: Path, name: str, manifest: Mapping[str, Any], digests: Digests) -> bool:
    file, expected = checkpoint / name, manifest["files"][name]
    return bool(file.stat().st_size == expected["bytes"] and digests.of(file) == expected["sha256"])


def remove(root: Path, is_ours: Callable[[str], bool], *, last: str) -> list[str]:
    """Delete our files in a directory, the one that proves it ours last, and the directories that are empty then.

    Returns what stays.
    """
    files, folders = contents(root)
    for name in sorted(filter(is_ours, files), key=lambda name: name == last):
        (root / name).unlink(missing_ok=True)
    for folder in (*sorted(folders, reverse=True), "."):
        with suppress(OSError):
            (root / folder).rmdir()
    return strangers(root, lambda _: False, ()) if root.exists() else []


def remove_checkpoint(checkpoint: Path) -> list[str]:
    """Delete a finished checkpoint, but for what we did not write or what was changed since; what stays."""
    changed = set(not_as_written(checkpoint, Digests()))
    names = {*read_manifest(checkpoint)["files"], MANIFEST_NAME} - changed
    return remove(checkpoint, names.__contains__, last=MANIFEST_NAME)
