"""What a run reads: known by its content, so that a run resumes on the same files wherever they lie, and on no others.

Every file is hashed whole, weights too: about 1 GB a second and core, on up to HASHERS of them, in front of a run that
reads the weights at least once more. Sampling would be faster and would miss what lies between the samples.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmquant.checkpoint.companions import Companions, find_companions
from vlmquant.checkpoint.files import sha256_of
from vlmquant.components import CONFIG_NAME, ComponentMap
from vlmquant.errors import InputError
from vlmquant.progress import bar
from vlmquant.shards import INDEX_NAME

HASHERS = 4
"""Threads; a single one does not keep up with a good disk."""

State = tuple[int, int, int, int, int]


class Digests:
    """sha256 of files. One that the system says was not touched meanwhile is not read again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[State, str]] = {}

    def of(self, file: Path) -> str:
        """Raises OSError."""
        before = state_of(file)
        known = self._known.get(file)
        if known is None or known[0] != before:
            known = self._known[file] = (before, sha256_of(file))
        return known[1]


def state_of(file: Path) -> State:
    """What changes whenever a file's content does: the time of its last change cannot be set back."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Inputs:
    """The files of a model that reach the result, and others that the run reads.

    Config and companions are hashed at once, before anybody else reads them; weights when the fingerprint is asked for.
    """

    def __init__(self, components: ComponentMap) -> None:
        self.companions: Companions = find_companions(components)
        model_dir, shards = components.model_dir, components.shards.files
        index = [model_dir / INDEX_NAME] if (model_dir / INDEX_NAME).is_file() else []
        small = [model_dir / CONFIG_NAME, *index, *self.companions.read]
        self._files = {file.relative_to(model_dir).as_posix(): file for file in (*small, *shards)}
        self._digests = Digests()
        self._seen: dict[Path, str] = {}
        for file in small:
            self._see(file)

    def fingerprint(self) -> dict[str, str]:
        """The digest of each of the model's files, by "model file NAME"."""
        unseen = [file for file in self._files.values() if file not in self._seen]
        if unseen:
            pool = ThreadPoolExecutor(HASHERS)
            try:
                with bar("hash the model", total=len(unseen)) as progress:
                    for _ in pool.map(self._see, unseen):
                        progress.step()
            finally:
                pool.shutdown(cancel_futures=True)
        return {f"model file {name}": self._seen[file] for name, file in sorted(self._files.items())}

    def watch(self, files: Iterable[Path]) -> None:
        """Further files, such as the calibration set's images, that must stay as they are until the end."""
        for file in files:
            self._see(file)

    def check_unchanged(self) -> None:
        """InputError naming the first file that is no longer what it was when it was hashed."""
        for file, before in self._seen.items():
            try:
                same = self._digests.of(file) == before
            except OSError:
                same = False
            if not same:
                raise InputError(
                    f"{file}: changed or went away during the run, so the result would be a mixture; nothing was "
                    "written, so leave the model and the data as they are and run again"
                )

    def _see(self, file: Path) -> None:
        try:
            self._seen[file] = self._digests.of(file)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two fingerprints differ."""
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
