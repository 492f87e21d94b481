"""Where a checkpoint goes: OUT, and beside it OUT.partial and OUT.lock; what is there already and must stay."""

import os
from pathlib import Path
from typing import NoReturn

from vlmquant.checkpoint.files import disk_errors
from vlmquant.checkpoint.inputs import Digests
from vlmquant.checkpoint.manifest import MANIFEST_NAME, read_manifest
from vlmquant.checkpoint.ownership import not_as_written
from vlmquant.errors import CheckpointError, UsageError
from vlmquant.shards import some


def work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def lock_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.lock")


def check_output(out: Path, model_dir: Path, *, resume: bool, force: bool, over: bool = False) -> None:
    """UsageError for a place that no checkpoint can be put at, as far as one sees without reading what is there.

    over: whether it may be that of the model itself, which is a checkpoint to be replaced.
    """
    if out.name in ("", ".."):
        raise UsageError(f"{out}: not the name of a new directory; give one")
    work = work_of(out)
    with disk_errors(out):
        for path in (out, work, lock_of(out)):
            if path.is_symlink():
                raise UsageError(f"{path}: is a symbolic link; give the directory itself")
            if os.path.ismount(path):
                raise UsageError(
                    f"{path}: is a mount point, which no rename can replace; give a directory inside it, such as "
                    f"{path / 'model'}"
                )
        for path in (work, out, *out.parents):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{path}: is a file; give another output directory")
        target, source = out.resolve(), model_dir.resolve()
    apart = over and target == source
    if not apart and (target.is_relative_to(source) or source.is_relative_to(target)):
        raise UsageError(
            f"{out}: the output and the model {model_dir} lie one in the other; give a directory outside the model's"
        )
    if is_taken(out) and not (resume or force):
        refuse_taken(out)


def is_taken(out: Path) -> bool:
    with disk_errors(out):
        return out.exists() and any(out.iterdir())


def refuse_taken(out: Path) -> NoReturn:
    raise UsageError(f"{out}: exists and is not empty; give another output directory, or --force to replace it")


def refuse_irreplaceable(out: Path, digests: Digests) -> None:
    """UsageError unless all there is as vlmquant wrote it: the rest is the user's, or was worked on."""
    if not (out / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{out}: holds files but no {MANIFEST_NAME}, and --force replaces only what vlmquant wrote; "
            "remove it yourself or give another output directory"
        )
    try:
        read_manifest(out)
    except CheckpointError as error:
        raise UsageError(
            f"{out}: --force replaces only what vlmquant wrote, and no manifest proves that here ({error}); "
            "remove it yourself or give another output directory"
        ) from error
    if names := not_as_written(out, digests):
        raise UsageError(
            f"{out}: holds what vlmquant did not write there, or what was changed since: {some(names)}; "
            "--force would delete it, so move it away first"
        )
