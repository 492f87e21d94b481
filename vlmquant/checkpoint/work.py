"""The directory of an unfinished run, OUT.partial: which files in it are ours, and how it goes away."""

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from vlmquant.checkpoint.assemble import SHARD
from vlmquant.checkpoint.companions import BASE_CARD_NAME, CARD_NAME
from vlmquant.checkpoint.files import TMP_SUFFIX
from vlmquant.checkpoint.inputs import Digests
from vlmquant.checkpoint.journal import (
    FINGERPRINT_NAME,
    JOURNAL_NAME,
    OUTSIDE,
    UNIT_SUFFIX,
    UNITS_NAME,
    is_unfinished_run,
    unit_names,
)
from vlmquant.checkpoint.manifest import MANIFEST_NAME, read_manifest
from vlmquant.checkpoint.ownership import folders_of, not_as_written, remove, strangers
from vlmquant.components import CONFIG_NAME, GENERATION_NAME
from vlmquant.errors import CheckpointError, UsageError
from vlmquant.progress import stderr
from vlmquant.shards import INDEX_NAME, some

OUTPUT_NAME = "output"
"""The checkpoint that is being put together."""
REPLACED_NAME = "replaced"
"""The old checkpoint, once the new one takes its place."""
WRITTEN = (CONFIG_NAME, INDEX_NAME, CARD_NAME, BASE_CARD_NAME, MANIFEST_NAME, GENERATION_NAME)


class Work:
    """blocks: of the model. copied: names of what travels with it."""

    def __init__(self, path: Path, blocks: Collection[str], copied: Collection[str], digests: Digests) -> None:
        self.path = path
        self._blocks, self._copied, self._digests = blocks, copied, digests

    def undo_replacement(self, out: Path) -> None:
        """Give an old checkpoint its place back, where a kill struck between the renames of the old and the new one."""
        replaced = self.path / REPLACED_NAME
        if replaced.is_dir() and not out.exists() and is_unfinished_run(self.path):
            with suppress(CheckpointError):
                read_manifest(replaced)
                replaced.rename(out)

    def refuse_strangers(self) -> None:
        """UsageError where the directory is none of a run of ours, or holds what no run left there."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not is_unfinished_run(self.path):
            raise UsageError(
                f"{self.path}: is in the way and no unfinished run of vlmquant; move it, or give another output"
            )
        copied = {f"{OUTPUT_NAME}/{folder}" for folder in folders_of(self._copied)}
        replaced = {f"{REPLACED_NAME}/{folder}" for folder in folders_of(self._in_replaced())}
        folders = {UNITS_NAME, OUTPUT_NAME, REPLACED_NAME} | copied | replaced
        if names := strangers(self.path, self._ours(), folders):
            raise UsageError(
                f"{self.path}: holds what no run of vlmquant left there: {some(names)}; move it away, or give another "
                "output"
            )

    def clear(self) -> None:
        """Delete the directory, but for what is not ours."""
        if not self.path.exists():
            return
        self.clear_replaced()
        with suppress(OSError):
            if left := remove(self.path, self._ours(), last=FINGERPRINT_NAME):
                stderr.print(
                    f"{self.path}: holds what vlmquant did not write, which stays: {some(left)}",
                    soft_wrap=True,
                    markup=False,
                )

    def clear_replaced(self) -> None:
        if names := self._in_replaced():
            remove(self.path / REPLACED_NAME, names.__contains__, last=MANIFEST_NAME)

    def _in_replaced(self) -> set[str]:
        """The files of an old checkpoint whose place was taken, as far as they are as they were written."""
        replaced = self.path / REPLACED_NAME
        if not replaced.is_dir():
            return set()
        try:
            names = {*read_manifest(replaced)["files"], MANIFEST_NAME}
        except CheckpointError:
            return set()
        return names - set(not_as_written(replaced, self._digests))

    def _ours(self) -> Callable[[str], bool]:
        """Whether a run of ours gives a file in the directory such a name, or left it there half written."""
        units = {f"{UNITS_NAME}/{name}{UNIT_SUFFIX}" for name in {OUTSIDE, *self._blocks, *unit_names(self.path)}}
        output = {f"{OUTPUT_NAME}/{name}" for name in {*WRITTEN, *self._copied}}
        replaced = {f"{REPLACED_NAME}/{name}" for name in self._in_replaced()}
        whole = {FINGERPRINT_NAME, JOURNAL_NAME} | units | output

        def is_ours(name: str) -> bool:
            plain, (folder, _, rest) = name.removesuffix(TMP_SUFFIX), name.partition("/")
            shard = folder == OUTPUT_NAME and SHARD.fullmatch(rest.removesuffix(TMP_SUFFIX)) is not None
            half = folder == UNITS_NAME and name.endswith(UNIT_SUFFIX + TMP_SUFFIX)
            return plain in whole or name in replaced or shard or half

        return is_ours
