"""CheckpointWriter: units go to OUT.partial as they are done; one rename at the end makes them the checkpoint OUT."""

import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vlmquant import kvcache, signals
from vlmquant.checkpoint import assemble
from vlmquant.checkpoint.files import Lock, disk_errors, sync_directory
from vlmquant.checkpoint.inputs import Digests, Inputs
from vlmquant.checkpoint.journal import OUTSIDE, Journal, Unit, count_units, is_begun_with
from vlmquant.checkpoint.manifest import MANIFEST_NAME, digest_of, read_manifest
from vlmquant.checkpoint.ownership import remove
from vlmquant.checkpoint.place import check_output, is_taken, lock_of, refuse_irreplaceable, refuse_taken, work_of
from vlmquant.checkpoint.work import OUTPUT_NAME, REPLACED_NAME, Work
from vlmquant.components import ComponentMap
from vlmquant.errors import CheckpointError, DoesNotFitError, SentinelError, UsageError
from vlmquant.formats import FORMATS, Format
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import Plan
from vlmquant.progress import stderr
from vlmquant.recipe import Recipe, Scheme
from vlmquant.shards import Shards


class AlreadyFinishedError(UsageError):
    """The run to be resumed has put its checkpoint in place; only its end was killed, or nothing at all."""


class CheckpointWriter:
    """Writes one checkpoint; a context manager.

    fingerprint: what a resumed run must share with the run that it goes on from, by name, beside the model's files.
    inputs: those files, and others that must stay as they are until the end.
    resume: go on from what an earlier run left in OUT.partial; AlreadyFinishedError where OUT is its result already.
    force: replace an existing checkpoint, and start anew where an unfinished run is not to be resumed.
    resumable: whether finished units are kept when the run fails. scale_dtype: of scales, where the format leaves a
    choice; None for the model's.

    Raises UsageError for a place that cannot or must not be written to, and DoesNotFitError for a disk that is too
    small, before anything is written; PlanError where the format cannot express the plan.
    Whatever goes wrong later, nothing appears at OUT, and finished units stay for --resume. Nothing is deleted but what
    a manifest or the state of an unfinished run proves that vlmquant wrote, and that is as it was written.
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
        inputs: Inputs | None = None,
        resumable: bool = True,
        scale_dtype: torch.dtype | None = None,
        over: bool = False,
    ) -> None:
        check_output(out, components.model_dir, resume=resume, force=force, over=over)
        self._over = over
        self.out, self.components, self.recipe, self.plan = out, components, recipe, plan
        self._resume, self._force, self._resumable = resume, force, resumable
        self._scale_dtype = scale_dtype or components.dtype
        self._settings = fingerprint
        self._fingerprint: dict[str, str] = {}
        self._inputs = inputs or Inputs(components)
        self._digests = Digests()
        blocks = [info.name for info in components.blocks]
        self._work = Work(work_of(out), blocks, self._inputs.companions.copied, self._digests)
        self.partial = self._work.path / OUTPUT_NAME
        """The directory that becomes OUT; a format that writes its own files puts them here."""
        self._finished = False
        self._lock = Lock(lock_of(out))
        self._journal = Journal(self._work.path)
        self._opened = False
        self._quantization_config: dict[str, Any] | None = None
        self._format = FORMATS.get(recipe.output.format)
        if self._format is not None:
            self._quantization_config = self._format.quantization_config(plan, components)

    def __enter__(self) -> "CheckpointWriter":
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._work.undo_replacement(self.out)
                check_output(
                    self.out, self.components.model_dir, resume=self._resume, force=self._force, over=self._over
                )
                if is_taken(self.out) and self._force:
                    refuse_irreplaceable(self.out, self._digests)
                self._fingerprint = {**self._settings, **self._inputs.fingerprint()}
                if is_taken(self.out) and not self._force:
                    self._refuse_finished()
                    refuse_taken(self.out)
                self._open_work()
                self._check_space()
            except BaseException:
                self._leave()
                raise
        return self

    def _refuse_finished(self) -> None:
        """AlreadyFinishedError where OUT is what the run to be resumed was to write; what is left of it is removed."""
        try:
            manifest = read_manifest(self.out)
        except CheckpointError:
            return
        files = {self.out / name: entry["bytes"] for name, entry in manifest["files"].items()}
        whole = all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in files.items())
        if whole and manifest["fingerprint"] == digest_of(self._fingerprint):
            self._finished = True
            self._opened = is_begun_with(self._work.path, self._fingerprint)
            raise AlreadyFinishedError(
                f"{self.out}: exists and is not empty: an earlier run finished it, so nothing is left to resume; "
                "give another output directory, or --force to replace it"
            )

    def _open_work(self) -> None:
        self._work.refuse_strangers()
        work = self._work.path
        done = count_units(work)
        if self._resume and done:
            self._journal = Journal.reopen(work, self._fingerprint, fits=self._fits)
            self._opened = True
            if self.partial.exists():
                remove(self.partial, lambda _: True, last=MANIFEST_NAME)  # no strangers: it was looked through
        else:
            if done and not self._force:
                resuming = "go on from it with --resume, or " if self._resumable else ""
                raise UsageError(
                    f"{work}: an unfinished run is there, with {done} of {self._count_all()} blocks done; "
                    f"{resuming}start anew with --force"
                )
            self._work.clear()
            work.mkdir(exist_ok=True)
            self._journal = Journal.start(work, self._fingerprint)
            self._opened = True
        self.partial.mkdir()

    def _fits(self, name: str, unit: Unit) -> bool:
        """Whether a unit of an earlier run holds what the plan has for its block, and nothing else."""
        inside = {info.name: f"{info.name}." for info in self.components.blocks}
        if name != OUTSIDE and name not in inside:
            return False
        start = inside.get(name)
        others = tuple(inside.values())
        planned = {
            line.name
            for line in self.plan.lines
            if line.action == "quantize"
            and (line.name.startswith(start) if start else not line.name.startswith(others))
        }
        if set(unit.quantized) != planned or not all(map(self._may_change, unit.changed)):
            return False
        if self.plan.cache and {one.name for one in self.plan.cache.inside(name)} != set(unit.record.get("cache", {})):
            return False
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for name in unit.changed:
            disk = self.components.parameter(name).disk
            expected[disk] = (unit.entries[disk].dtype if disk in unit.entries else None, self.plan.line(name).shape)
        for weight in unit.quantized:
            line = self.plan.line(weight)
            rows, columns = line.shape
            expected |= self._codec.encoded_shapes(
                self._module_on_disk(weight), (rows, columns), self._scheme(weight), self._scale_dtype
            )
        return expected == {key: (entry.dtype, entry.shape) for key, entry in unit.entries.items()}

    def _may_change(self, name: str) -> bool:
        return self.components.holds(name) and self.plan.line(name).action == "keep"

    def _count_all(self) -> int:
        return len(self.components.blocks) + 1

    def _check_space(self) -> None:
        """Units and shards are on disk together for a moment at the end."""
        done = sum(unit.file.stat().st_size for unit in self._journal.units.values())
        units = sum(line.bytes_after for line in self.plan.lines if line.action == "quantize")
        needed = self.plan.bytes_after + self._inputs.companions.nbytes + max(units - done, 0)
        free = shutil.disk_usage(self._work.path).free
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
        Raises SentinelError where a value is not finite or a scale is 0, CacheScaleError for one of the cache.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in quantized.items():
            if not bool((weight.scales.isfinite() & (weight.scales != 0)).all()):
                raise SentinelError(f"{name}: a scale is 0 or no finite number; please report this as a bug")
            tensors |= self._codec.encode(self._module_on_disk(name), weight, self._scheme(name))
        for name, value in changed.items():
            if not bool(value.isfinite().all()):
                raise SentinelError(
                    f"{name}: became infinite or NaN when a neighbour was rescaled; use another method for it"
                )
            tensors[self.components.parameter(name).disk] = value
        for name, error in record.get("errors", {}).items():
            if not isfinite(error):
                raise SentinelError(
                    f"{name}: its output error is {error}; its weights or inputs are too large to be quantized, so "
                    "list it under `keep` in the recipe"
                )
        if self.plan.cache and block:
            maxima = kvcache.from_record(record)
            kvcache.require_maxima(self.plan.cache, (one.name for one in self.plan.cache.inside(block)), maxima)
            kvcache.make_scales(self.plan.cache, maxima)
        with disk_errors(self._work.path):
            self._journal.add(
                block or OUTSIDE, tensors, quantized=tuple(quantized), changed=tuple(changed), record=record
            )

    def records(self) -> list[dict[str, Any]]:
        """The records of what is done so far."""
        return [unit.record for unit in self._journal.units.values()]

    @property
    def finished(self) -> frozenset[str]:
        """The blocks that are done so far."""
        return frozenset(self._journal.units)

    def restored(
        self, block: str | None
    ) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, Any]] | None:
        """What `add` was given for this block, by this run or the one resumed; None where it is still to be done."""
        unit = self._journal.units.get(block or OUTSIDE)
        if unit is None:
            return None
        read = Shards(unit.entries).read
        quantized = {
            name: self._codec.decode(self._module_on_disk(name), read, self._scheme(name))[0] for name in unit.quantized
        }
        changed = {name: read(self.components.parameter(name).disk) for name in unit.changed}
        return quantized, changed, unit.record

    @property
    def _codec(self) -> Format:
        assert self._format is not None, f"{self.recipe.output.format} writes its own weights"
        return self._format

    def _module_on_disk(self, name: str) -> str:
        return self.components.parameter(name).disk.removesuffix(".weight")

    def _scheme(self, name: str) -> Scheme:
        scheme = self.plan.line(name).scheme
        assert isinstance(scheme, Scheme), f"{name} is not planned to be quantized"
        return scheme

    def finish(self, manifest: dict[str, Any]) -> Path:
        """Put the checkpoint together and in place; return its path.

        manifest: what the caller adds to vlmquant.json (calibration, errors, notes ...). Where it is the same, two runs
        write the same bytes. A format that is not in FORMATS has put its weights and config into `partial`.
        """
        maxima = self._cache_maxima()
        if self.plan.cache:
            manifest = manifest | {"kv_cache": kvcache.manifest_record(self.plan.cache, maxima)}
        with disk_errors(self.partial):
            digests: dict[str, str] = {}
            if self._quantization_config is not None:
                digests = assemble.write_weights(
                    self.partial, self.components, self.recipe, self.plan, self._journal.units, maxima
                )
                assemble.write_config(self.partial, self.components, self._quantization_config)
            changed = {name for unit in self._journal.units.values() for name in unit.changed}
            assemble.write_rest(
                self.partial,
                self.components,
                self.recipe,
                self.plan,
                {"fingerprint": digest_of(self._fingerprint), **manifest},
                companions=self._inputs.companions,
                changed=changed,
                digests=digests,
            )
            self._inputs.check_unchanged()
            self._put_in_place()
        self._finished = True
        return self.out

    def _cache_maxima(self) -> dict[str, kvcache.Maxima]:
        """Of all attention modules, from the blocks' records, in the model's order."""
        if self.plan.cache is None:
            return {}
        found = {name: one for record in self.records() for name, one in kvcache.from_record(record).items()}
        kvcache.require_maxima(self.plan.cache, self.plan.cache.attentions, found)
        return {name: found[name] for name in self.plan.cache.attentions}

    def _put_in_place(self) -> None:
        replaced = self._work.path / REPLACED_NAME
        if self.out.exists():
            self._take_over_mode()
        if is_taken(self.out):
            refuse_irreplaceable(self.out, self._digests)
            self._work.clear_replaced()
        with signals.held():
            if is_taken(self.out):
                self.out.rename(replaced)
            try:
                self.partial.rename(self.out)
            except OSError:
                if replaced.exists():
                    replaced.rename(self.out)
                raise
        sync_directory(self.out.parent)

    def _take_over_mode(self) -> None:
        """A directory that is there already stays as open, or as closed, as its owner made it."""
        before = self.out.stat()
        with suppress(PermissionError):
            os.chown(self.partial, before.st_uid, before.st_gid)
        self.partial.chmod(stat.S_IMODE(before.st_mode))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kept = self._leave()
        if kept and not isinstance(error, DoesNotFitError):
            stderr.print(
                f"{self._work.path} holds {kept} finished blocks; run again with --resume to go on from there",
                soft_wrap=True,
                markup=False,
            )

    def _leave(self) -> int:
        """Let go of the lock, and of the work directory unless it holds finished units to resume from: their number."""
        gone = self._finished or not self._resumable
        kept = 0 if gone else max(len(self._journal.units), count_units(self._work.path))
        if not kept and self._opened:
            self._work.clear()
        self._lock.release()
        return kept
