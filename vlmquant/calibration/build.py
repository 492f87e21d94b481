"""Sets out of a user's own sources (`vlmquant data`, `vlmquant calibrate`), or drawn from a set there is."""

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlmquant.calibration.images import image_format, pixel_sha256
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sampling import Stratum, choose, choose_samples, split
from vlmquant.calibration.sets import SKIPPED, SampleSet, image_hashes, load_set, refuse_filled, write_set
from vlmquant.calibration.sources import BadRecord, Candidate, ImageSource, SourceReading, SourceSpec, read_source
from vlmquant.errors import DoesNotFitError, InputError, UsageError, first_line, shown
from vlmquant.progress import Bar, bar
from vlmquant.recipe import CalibrationSpec
from vlmquant.scratch import scratch_folder

MAX_BAD_FRACTION = 0.1
"""Share of a source's records, and of its samples' images, beyond which unusable ones are taken for a mistake."""
NAMED = 3
"""Unusable records that a refusal names."""
POOL = 4
"""Samples looked at for each that the parts of a split ask for: so many that little moves when the source grows."""
UNUSABLE_IMAGE = "with an unusable image"
EXCLUDED = "with an image of the excluded set"
REPEATED = "repeated"


@dataclass(frozen=True)
class SourceUse:
    """What was read of a source, and what became of it in a set."""

    spec: SourceSpec
    reading: SourceReading
    unusable: dict[str, int]
    """Records that make no sample, by kind."""
    passed_over: dict[str, int]
    """Sound ones that were not wanted, by reason."""
    samples: int
    images: int
    """Taken."""

    @property
    def name(self) -> str:
        """The last part of its path: a set says nothing about the machine it was made on."""
        return shown(Path(self.spec.path).name)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.name,
            "format": self.reading.format,
            "licence": self.spec.licence,
            "read_as": {role: list(keys) for role, keys in self.reading.read_as.items()},
            "unused": list(self.reading.unused),
            "allow_outside": self.spec.allow_outside,
            "records": self.reading.records,
            "images": self.reading.images,
            "unusable": self.unusable,
            "passed_over": self.passed_over,
            "samples_taken": self.samples,
            "images_taken": self.images,
        }


@dataclass(frozen=True)
class Built:
    """A set that was made."""

    path: Path
    sample_set: SampleSet
    strata: tuple[Stratum, ...]
    sources: tuple[SourceUse, ...] = ()
    skipped: tuple[BadRecord, ...] = ()
    """Every record that could not be used, as the set's skipped.jsonl has them."""

    @property
    def skipped_file(self) -> Path | None:
        return self.path / SKIPPED if self.skipped else None

    @property
    def notes(self) -> list[str]:
        """What of it is not as it was asked for."""
        short = [
            f"{shown(row.task)}: {row.got} samples, though {row.asked} were asked for; there are no more"
            for row in self.strata
            if row.got < row.asked
        ]
        outside = [
            f"{use.name}: its images may come from anywhere on this machine (--allow-outside)"
            for use in self.sources
            if use.spec.allow_outside
        ]
        return short + outside

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sha256": self.sample_set.sha256,
            "asked": sum(row.asked for row in self.strata),
            "samples": len(self.sample_set.samples),
            "strata": [asdict(row) for row in self.strata],
            "sources": [use.to_json() for use in self.sources],
            "skipped": [asdict(bad) for bad in self.skipped],
            "skipped_file": self.skipped_file,
            "notes": self.notes,
        }


def build_set(
    sources: Sequence[SourceSpec],
    spec: CalibrationSpec | None,
    out_dir: Path,
    *,
    exclude: Sequence[Sample] = (),
    max_bad_fraction: float | None = None,
) -> Built:
    """Choose samples from the sources as `spec` asks (None takes all) and write them, images copied byte by byte.

    Only images of samples that would be taken are opened. A record or an image that cannot be used is skipped, counted
    and named, and makes room for the next sample; InputError if more than max_bad_fraction of a source's are unusable.
    What shows the same images and asks the same is one sample with the answers of all. Samples with an image of
    `exclude` (another set) are passed over.
    """
    refuse_filled(out_dir)
    with _pool(sources, exclude, max_bad_fraction) as pool:
        spec = spec or CalibrationSpec(order="file").model_copy(update={"samples": len(pool.samples)})
        return pool.write(out_dir, *pool.draw(spec), spec)


def split_sets(
    sources: Sequence[SourceSpec],
    parts: Mapping[str, int],
    out_dir: Path,
    *,
    seed: int,
    exclude: Sequence[Sample] = (),
    max_bad_fraction: float | None = None,
) -> dict[str, Built]:
    """As build_set, a set out_dir/NAME of so many samples for each part; no image is in two of them."""
    for name in parts:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--split: '{shown(name)}' is no name for a folder; use letters, digits, . - and _")
    refuse_filled(out_dir)
    there = out_dir.is_dir()
    built: dict[str, Built] = {}
    with _pool(sources, exclude, max_bad_fraction) as pool:
        spec = CalibrationSpec(seed=seed)
        wanted = min(POOL * sum(parts.values()), len(pool.samples))
        drawn, _ = pool.draw(spec.model_copy(update={"samples": wanted}))
        chosen = {}
        for name, members in split(drawn, parts, seed=seed, images_of=lambda sample: pool.hashes[sample.id]).items():
            part = spec.model_copy(update={"samples": parts[name]})
            chosen[name] = choose(
                members, part, image_of=lambda sample: bool(sample.images), usable=lambda _: True, name=name
            )
            if not chosen[name][0]:
                raise InputError(
                    f"{pool.name}: no sample is left for '{name}': those that share images stay together; "
                    "ask for smaller parts"
                )
        try:
            for name, (samples, strata) in chosen.items():
                built[name] = pool.write(out_dir / name, samples, strata, spec, split=dict(parts))
        except BaseException:
            for done in built.values():
                shutil.rmtree(done.path, ignore_errors=True)
            if not there and out_dir.is_dir() and not any(out_dir.iterdir()):
                out_dir.rmdir()
            raise
    return built


def draw_set(spec: CalibrationSpec, out_dir: Path) -> Built:
    """Write the samples that `spec` chooses from its own set (`spec.set`) to `out_dir`, as a set of their own."""
    refuse_filled(out_dir)
    whole = load_set(spec.set)
    selection = choose_samples(whole, spec)
    manifest = {
        "sources": (whole.manifest or {}).get("sources", [{"path": whole.name, "licence": "not stated"}]),
        "drawn_from": {"name": whole.name, "sha256": whole.sha256},
        "seed": spec.seed,
        "order": spec.order,
        "strata": [asdict(row) for row in selection.strata],
    }
    return Built(out_dir, write_set(out_dir, selection.samples, manifest), selection.strata)


@contextmanager
def _pool(
    sources: Sequence[SourceSpec], exclude: Sequence[Sample], max_bad_fraction: float | None
) -> Iterator["_Pool"]:
    with scratch_folder() as scratch:
        limit = MAX_BAD_FRACTION if max_bad_fraction is None else max_bad_fraction
        pool = _Pool(scratch, frozenset(image_hashes(exclude)), limit)
        for source in sources:
            pool.add(source)
        yield pool


class _Pool:
    """The samples that the sources offer. Opens the images of those about to be taken, and says which to pass over."""

    def __init__(self, scratch: Path, excluded: frozenset[str], max_bad_fraction: float) -> None:
        self._scratch, self._excluded, self._limit = scratch, excluded, max_bad_fraction
        self._sources: list[_Source] = []
        self._of: dict[str, tuple[_Source, Candidate]] = {}
        """By the sample's id."""
        self._first: dict[tuple[Any, ...], str] = {}
        """The first sample's id by what it shows and asks."""
        self._answers: dict[str, dict[str, None]] = {}
        """Those of all samples that show and ask the same, by the id of the first."""
        self._images: dict[str, tuple[Path, ...]] = {}
        """Of the samples found usable, by id; and their pixels' hashes."""
        self.hashes: dict[str, list[str]] = {}

    @property
    def samples(self) -> list[Sample]:
        return [candidate.sample for _, candidate in self._of.values()]

    @property
    def name(self) -> str:
        return shown(", ".join(source.spec.path for source in self._sources))

    def add(self, spec: SourceSpec) -> None:
        """Read a source; InputError if too many of its records make no sample."""
        number = len(self._sources)
        reading = read_source(spec, scratch=self._scratch / f"source{number}")
        source = _Source(spec, reading)
        self._sources.append(source)
        self._refuse_too_many(source, reading.bad, reading.records)
        for candidate in reading.candidates:
            sample = replace(candidate.sample, id=shown(candidate.sample.id))
            while sample.id in self._of:
                sample = replace(sample, id=f"{sample.id}-source{number}")
            places = [str(image) if isinstance(image, Path) else image.key for image in candidate.images]
            if self._is_repeated(sample, (number, *places)):
                source.passed_over[REPEATED] += 1
            else:
                self._of[sample.id] = (source, replace(candidate, sample=sample))

    def _is_repeated(self, sample: Sample, shows: tuple[Any, ...]) -> bool:
        """Whether a sample before it shows and asks the same; that one then takes its answers too."""
        first = self._first.setdefault((shows, sample.question, sample.history, sample.system), sample.id)
        own = self._answers.get(sample.id, sample.answers)
        self._answers.setdefault(first, {}).update(dict.fromkeys(own))
        return first != sample.id

    def draw(self, spec: CalibrationSpec) -> tuple[tuple[Sample, ...], tuple[Stratum, ...]]:
        """As `choose`; InputError if too many of the images that it opened are unusable, or nothing is left."""
        with bar("open images", total=min(spec.count, len(self._of))) as progress:
            chosen, strata = choose(
                self.samples,
                spec,
                image_of=lambda sample: bool(self._of[sample.id][1].images),
                usable=lambda sample: self._usable(sample, progress),
                name=self.name,
            )
        for source in self._sources:
            self._refuse_too_many(source, source.bad_images, source.opened)
        if not chosen:
            bad = [record for source in self._sources for record in source.bad]
            why = ", ".join(f"{n} {kind}" for kind, n in self._reasons().items())
            raise InputError(f"{self.name}: no sample was chosen{f' ({why})' if why else ''}{_named(bad)}")
        return tuple(replace(sample, images=self._images[sample.id]) for sample in chosen), strata

    def _usable(self, sample: Sample, progress: Bar) -> bool:
        progress.step()
        source, candidate = self._of[sample.id]
        source.opened += bool(candidate.images)
        try:
            paths = tuple(self._file(image) for image in candidate.images)
            hashes = [pixel_sha256(path) for path in paths]
        except (InputError, OSError, ValueError) as error:
            source.bad_images.append(BadRecord(candidate.where or sample.id, f"{UNUSABLE_IMAGE}: {first_line(error)}"))
            return False
        if not self._excluded.isdisjoint(hashes):
            source.passed_over[EXCLUDED] += 1
            return False
        if self._is_repeated(sample, tuple(hashes)):
            source.passed_over[REPEATED] += 1
            return False
        self._images[sample.id], self.hashes[sample.id] = paths, hashes
        return True

    def _file(self, image: ImageSource) -> Path:
        """An image as a file; embedded bytes become one, with the suffix of the format found in them."""
        if isinstance(image, Path):
            return Path(os.path.abspath(image))
        data = image.read()
        path = self._scratch / f"{hashlib.sha256(data).hexdigest()}.{image_format(data)}"
        try:
            path.write_bytes(data)
        except OSError as error:
            raise DoesNotFitError(f"{path}: {error.strerror}; set TMPDIR to a folder with more room") from error
        return path

    def _refuse_too_many(self, source: "_Source", bad: Sequence[BadRecord], total: int) -> None:
        if len(bad) <= self._limit * total:
            return
        what = ", ".join(f"{count} {kind}" for kind, count in Counter(record.kind for record in bad).most_common())
        raise InputError(
            f"{shown(source.spec.path)}: {len(bad)} of {total} records cannot be used ({what}); more than "
            f"{self._limit:.0%} (--max-bad-fraction) is taken for a mistake in the data or its format{_named(bad)}"
        )

    def _reasons(self) -> dict[str, int]:
        """Counts of all that is not in the set, by reason."""
        total: Counter[str] = Counter()
        for source in self._sources:
            total.update(record.kind for record in source.bad)
            total.update(source.passed_over)
        return dict(total)

    def write(
        self, out_dir: Path, samples: Sequence[Sample], strata: tuple[Stratum, ...], spec: CalibrationSpec, **more: Any
    ) -> Built:
        """The set of some drawn samples."""
        bad = [record for source in self._sources for record in source.bad]
        uses = tuple(self._use_of(source, samples) for source in self._sources)
        manifest = {
            "sources": [use.to_json() for use in uses],
            "seed": spec.seed,
            "order": spec.order,
            **more,
            "strata": [asdict(row) for row in strata],
            "skipped": self._reasons(),
        }
        answered = [replace(sample, answers=tuple(self._answers[sample.id])) for sample in samples]
        written = write_set(out_dir, answered, manifest, skipped=[asdict(record) for record in bad])
        return Built(out_dir, written, strata, uses, tuple(bad))

    def _use_of(self, source: "_Source", samples: Sequence[Sample]) -> SourceUse:
        taken = [sample for sample in samples if self._of[sample.id][0] is source]
        return SourceUse(
            source.spec,
            source.reading,
            unusable=dict(Counter(record.kind for record in source.bad)),
            passed_over=dict(source.passed_over),
            samples=len(taken),
            images=sum(len(sample.images) for sample in taken),
        )


class _Source:
    """A source as it was read, and what was found when its images were opened."""

    def __init__(self, spec: SourceSpec, reading: SourceReading) -> None:
        self.spec, self.reading = spec, reading
        self.passed_over = Counter(reading.passed_over)
        self.opened = 0
        """Samples whose images were opened."""
        self.bad_images: list[BadRecord] = []

    @property
    def bad(self) -> list[BadRecord]:
        """All that could not be used, its place told from the source's folder on."""
        folder = f"{Path(self.spec.path).parent}/"
        return [
            replace(record, where=shown(record.where.removeprefix(folder)), reason=shown(record.reason, limit=1000))
            for record in (*self.reading.bad, *self.bad_images)
        ]


def _named(bad: Sequence[BadRecord]) -> str:
    """The first records of each kind, and as many more as a message has room for."""
    firsts: dict[str, BadRecord] = {}
    for record in bad:
        firsts.setdefault(record.kind, record)
    named = [*firsts.values(), *(record for record in bad if record is not firsts[record.kind])][:NAMED]
    told = "; ".join(f"{shown(record.where)}: {shown(record.reason, limit=500)}" for record in named)
    more = f"; and {len(bad) - len(named)} more" if len(bad) > len(named) else ""
    return f": {told}{more}" if bad else ""
