"""CheckpointWriter: units go to OUT.partial as they are done; one rename at the end makes them the checkpoint OUT."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vlmquant.checkpoint import assemble
from vlmquant.checkpoint.files import Lock, disk_errors, sync_directory
from vlmquant.checkpoint.journal import JOURNAL_NAME, OUTSIDE, Journal, count_units
from vlmquant.checkpoint.reader import MANIFEST_NAME
from vlmquant.components import ComponentMap
from vlmquant.errors import DoesNotFitError, SentinelError, UsageError
from vlmquant.formats import compressed_tensors
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import Plan
from vlmquant.progress import stderr
from vlmquant.recipe import Recipe, Scheme
from vlmquant.shards import Shards

PARTIAL_SUFFIX = ".partial"
LOCK_SUFFIX = ".lock"
OUTPUT_NAME = "output"
REPLACED_NAME = "replaced"


class CheckpointWriter:
    """Writes one checkpoint; a context manager.

    fingerprint: what a resumed run must share with the run that it goes on from, by name.
    resume: go on from what an earlier run left in OUT.partial.
    force: replace an existing checkpoint, and start anew where an unfinished run is not to be resumed.

    Raises UsageError for a place that cannot or must not be written to, and DoesNotFitError for a disk that is too
    small, before anything is written; PlanError where the format cannot express the plan.
    Whatever goes wrong later, nothing appears at OUT, and finished units stay for --resume.
    """

    def __init__(
        self,
        out: Path,
        components: ComponentMap,
        recipe: Recipe,
        plan: Plan,
        *,
        fingerprint: Mapping[str, str],
        resume: bool,
        force: bool,
    ) -> None:
        self.out, self.components, self.recipe, self.plan = out, components, recipe, plan
        self._fingerprint, self._resume, self._force = fingerprint, resume, force
        self._work = out.with_name(out.name + PARTIAL_SUFFIX)
        self.partial = self._work / OUTPUT_NAME
        """The directory that becomes OUT; a format that writes its own files puts them here."""
        self._lock = Lock(out.with_name(out.name + LOCK_SUFFIX))
        self._journal = Journal(self._work)
        self._finished = False
        self._quantization_config: dict[str, Any] | None = None
        self._check_place()
        if recipe.output.format == compressed_tensors.METHOD:
            self._quantization_config = compressed_tensors.quantization_config(plan, components)

    def _check_place(self) -> None:
        out, source = self.out.resolve(), self.components.model_dir.resolve()
        if not self.out.name:
            raise UsageError(f"{self.out}: not the name of a new directory; give one")
        for path in (self.out, self._work):
            if path.is_symlink():
                raise UsageError(f"{path}: is a symbolic link; give the directory itself")
        for path in (self._work, self.out, *self.out.parents):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{path}: is a file; give another output directory")
        if out.is_relative_to(source) or source.is_relative_to(out):
            raise UsageError(
                f"{self.out}: the output and the model {self.components.model_dir} lie one in the other; "
                "give a directory outside the model's"
            )
        with disk_errors(self.out):
            if not self.out.exists() or not any(self.out.iterdir()):
                return
        if not self._force:
            raise UsageError(
                f"{self.out}: exists and is not empty; give another output directory, or --force to replace it"
            )
        if not (self.out / MANIFEST_NAME).is_file():
            raise UsageError(
                f"{self.out}: holds files but no {MANIFEST_NAME}, and --force replaces only what vlmquant wrote; "
                "remove it yourself or give another output directory"
            )

    def __enter__(self) -> "CheckpointWriter":
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._undo_replacement()
                self._check_place()
                self._open_work()
                self._check_space()
            except BaseException:
                self._leave()
                raise
        return self

    def _undo_replacement(self) -> None:
        """Give an old checkpoint its place back, where a kill struck between the two renames of `_put_in_place`."""
        replaced = self._work / REPLACED_NAME
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)

    def _open_work(self) -> None:
        if self._work.exists() and any(self._work.iterdir()) and not (self._work / JOURNAL_NAME).is_file():
            raise UsageError(
                f"{self._work}: is in the way and no unfinished run of vlmquant; move it, or give another output"
            )
        done = count_units(self._work)
        if self._resume and done:
            self._journal = Journal.reopen(self._work, self._fingerprint)
        else:
            if done and not self._force:
                raise UsageError(
                    f"{self._work}: an unfinished run is there, with {done} of {self._count_all()} blocks done; "
                    "go on from it with --resume, or start anew with --force"
                )
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(exist_ok=True)
            self._journal = Journal.start(self._work, self._fingerprint)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()

    def _count_all(self) -> int:
        return len(self.components.blocks) + 1

    def _check_space(self) -> None:
        """Units and shards are on disk together for a moment at the end."""
        done = sum(unit.file.stat().st_size for unit in self._journal.units.values())
        units = sum(line.bytes_after for line in self.plan.lines if line.action == "quantize")
        extras = sum(file.stat().st_size for file in assemble.companions(self.components).values())
        needed = self.plan.bytes_after + extras + max(units - done, 0)
        free = shutil.disk_usage(self._work).free
        if needed > free:
            raise DoesNotFitError(
                f"{self.out.parent}: writing this checkpoint takes {needed:,} bytes of disk and {free:,} are free; "
                "free some, or give an output directory on another disk"
            )

    def add(
        self,
        block: str | None,
        quantized: Mapping[str, QuantizedWeight],
        changed: Mapping[str, Tensor],
        record: dict[str, Any],
    ) -> None:
        """Store what became of a block, or (None) of the weights outside all blocks; from then on it survives a kill.

        quantized, changed: by parameter name; `changed` are kept weights whose values are no longer the model's.
        record: plain JSON data to be given back by `restored`.
        Raises SentinelError where a value is not finite or a scale not above 0.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in quantized.items():
            if not bool((weight.scales.isfinite() & (weight.scales > 0)).all()):
                raise SentinelError(f"{name}: a scale is not a finite number above 0; please report this as a bug")
            tensors |= compressed_tensors.encode(self._module_on_disk(name), weight, self._scheme(name))
        for name, value in changed.items():
            if not bool(value.isfinite().all()):
                raise SentinelError(
                    f"{name}: became infinite or NaN when a neighbour was rescaled; use another method for it"
                )
            tensors[self.components.parameter(name).disk] = value
        with disk_errors(self._work):
            self._journal.add(
                block or OUTSIDE, tensors, quantized=tuple(quantized), changed=tuple(changed), record=record
            )

    def restored(
        self, block: str | None
    ) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, Any]] | None:
        """What `add` was given for this block, by this run or the one resumed; None where it is still to be done."""
        unit = self._journal.units.get(block or OUTSIDE)
        if unit is None:
            return None
        read = Shards(unit.entries).read
        quantized = {
            name: compressed_tensors.decode(self._module_on_disk(name), read, self._scheme(name))
            for name in unit.quantized
        }
        changed = {name: read(self.components.parameter(name).disk) for name in unit.changed}
        return quantized, changed, unit.record

    def _module_on_disk(self, name: str) -> str:
        return self.components.parameter(name).disk.removesuffix(".weight")

    def _scheme(self, name: str) -> Scheme:
        scheme = self.plan.line(name).scheme
        assert isinstance(scheme, Scheme), f"{name} is not planned to be quantized"
        return scheme

    def finish(self, manifest: dict[str, Any]) -> Path:
        """Put the checkpoint together and in place; return its path.

        manifest: what the caller adds to vlmquant.json (calibration, errors, notes ...). Where it is the same, two runs
        write the same bytes. A format other than compressed-tensors has put its weights and config into `partial`.
        """
        with disk_errors(self.partial):
            if self._quantization_config is not None:
                assemble.write_weights(self.partial, self.components, self.recipe, self.plan, self._journal.units)
                assemble.write_config(self.partial, self.components, self._quantization_config)
            changed = {name for unit in self._journal.units.values() for name in unit.changed}
            assemble.write_rest(self.partial, self.components, self.recipe, self.plan, manifest, changed=changed)
            self._put_in_place()
        self._finished = True
        return self.out

    def _put_in_place(self) -> None:
        replaced = self._work / REPLACED_NAME
        if self.out.exists() and any(self.out.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        try:
            self.partial.rename(self.out)
        except OSError:
            if replaced.exists():
                replaced.rename(self.out)
            raise
        sync_directory(self.out.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kept = self._leave()
        if kept and not isinstance(error, DoesNotFitError):
            stderr.print(
                f"{self._work} holds {kept} finished blocks; run again with --resume to go on from there",
                soft_wrap=True,
            )

    def _leave(self) -> int:
        """Let go of the lock, and of the work directory unless it holds finished units to resume from: their number."""
        kept = 0 if self._finished else max(len(self._journal.units), count_units(self._work))
        if not kept and (self._work / JOURNAL_NAME).is_file():
            shutil.rmtree(self._work, ignore_errors=True)
        self._lock.release()
        return kept
