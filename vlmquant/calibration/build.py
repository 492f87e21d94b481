"""`vlmquant calibrate`: a stratified set out of a user's own sources, or drawn from a set there is."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmquant.calibration.images import UnusableImageError, image_format, pixel_sha256
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sampling import Stratum, choose, choose_samples
from vlmquant.calibration.sets import SampleSet, image_hashes, load_set, write_set
from vlmquant.calibration.sources import Candidate, ImageSource, SourceSpec, read_source
from vlmquant.errors import InputError
from vlmquant.recipe import CalibrationSpec

MAX_BAD_FRACTION = 0.1
"""Share of unusable records or images beyond which a source is refused rather than thinned out in silence."""


def build_set(
    sources: Sequence[SourceSpec],
    spec: CalibrationSpec,
    out_dir: Path,
    *,
    exclude: Sequence[Sample] = (),
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> tuple[SampleSet, tuple[Stratum, ...]]:
    """Choose samples from the sources as `spec` asks and write them to `out_dir`, images copied byte by byte.

    Only images of samples that would be taken are opened; one that cannot be used makes room for the next sample, and
    so does one whose image and question are already in, or whose image is in `exclude` (an evaluation set). All of them
    are counted in the manifest under `skipped`. Raises InputError if more than max_bad_fraction of a source's records
    or of the opened images are unusable.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: exists and is not empty; choose another folder or remove it")
    with tempfile.TemporaryDirectory(prefix="vlmquant-", ignore_cleanup_errors=True) as scratch:
        skipped: dict[str, int] = {}
        candidates: dict[str, Candidate] = {}
        for number, source in enumerate(sources):
            found, bad = read_source(source, scratch=Path(scratch) / f"source{number}")
            _refuse_too_many(bad, sum(bad.values()) + len(found), max_bad_fraction, where=source.path)
            for reason, count in bad.items():
                skipped[reason] = skipped.get(reason, 0) + count
            for item in found:
                if item.sample.id in candidates:
                    item = replace(item, sample=replace(item.sample, id=f"{item.sample.id}-source{number}"))
                candidates[item.sample.id] = item
        opener = _Opener(candidates, Path(scratch), frozenset(image_hashes(exclude)))
        chosen, strata = choose(
            [item.sample for item in candidates.values()],
            spec,
            image_of=lambda sample: bool(candidates[sample.id].images),
            usable=opener.usable,
            name=", ".join(source.path for source in sources),
        )
        _refuse_too_many(opener.unusable, opener.opened, max_bad_fraction, where=opener.first_bad)
        skipped |= opener.unusable | opener.passed_over
        manifest = {
            "sources": [
                {"path": Path(source.path).name, "format": source.format, "licence": source.licence}
                for source in sources
            ],
            "seed": spec.seed,
            "order": spec.order,
            "strata": [vars(row) for row in strata],
            "skipped": skipped,
        }
        return write_set(out_dir, [opener.filled[sample.id] for sample in chosen], manifest), strata


def draw_set(spec: CalibrationSpec, out_dir: Path) -> tuple[SampleSet, tuple[Stratum, ...]]:
    """Write the samples that `spec` chooses from its own set (`spec.set`) to `out_dir`, as a set of their own."""
    whole = load_set(spec.set)
    selection = choose_samples(whole, spec)
    manifest = {
        "sources": (whole.manifest or {}).get("sources", [{"path": whole.name, "licence": "not stated"}]),
        "drawn_from": {"name": whole.name, "sha256": whole.sha256},
        "seed": spec.seed,
        "order": spec.order,
        "strata": [vars(row) for row in selection.strata],
    }
    return write_set(out_dir, selection.samples, manifest), selection.strata


def _refuse_too_many(bad: dict[str, int], total: int, limit: float, *, where: str) -> None:
    if sum(bad.values()) > limit * total:
        what = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        raise InputError(
            f"{where}: {sum(bad.values())} of {total} records cannot be used ({what}); "
            f"more than {limit:.0%} is taken for a mistake in the data or its format"
        )


class _Opener:
    """Opens the images of candidates that are about to be taken, and says which to pass over."""

    def __init__(self, candidates: dict[str, Candidate], scratch: Path, excluded: frozenset[str]) -> None:
        self._candidates, self._scratch, self._excluded = candidates, scratch, excluded
        self._contents: set[tuple[str, ...]] = set()
        self.filled: dict[str, Sample] = {}
        """The usable samples with their images, by id."""
        self.opened = 0
        self.first_bad = ""
        self.unusable: dict[str, int] = {}
        """Faults of the data."""
        self.passed_over: dict[str, int] = {}
        """Sound samples that are not wanted."""

    def usable(self, sample: Sample) -> bool:
        self.opened += 1
        try:
            paths = tuple(self._file(image) for image in self._candidates[sample.id].images)
            hashes = [pixel_sha256(path) for path in paths]
        except (UnusableImageError, OSError) as error:
            self.first_bad = self.first_bad or str(error)
            return _count(self.unusable, "with an unusable image")
        if not self._excluded.isdisjoint(hashes):
            return _count(self.passed_over, "with an image of the excluded set")
        content = (*hashes, sample.question, *(turn.question for turn in sample.history))
        if content in self._contents:
            return _count(self.passed_over, "repeated")
        self._contents.add(content)
        self.filled[sample.id] = replace(sample, images=paths)
        return True

    def _file(self, image: ImageSource) -> Path:
        """An image as a file; embedded bytes become one, with the suffix of the format found in them."""
        if isinstance(image, Path):
            return image.resolve()
        data = image.read()
        path = self._scratch / f"image{self.opened}-{hashlib.sha256(data).hexdigest()[:16]}.{image_format(data)}"
        path.write_bytes(data)
        return path


def _count(reasons: dict[str, int], reason: str) -> bool:
    reasons[reason] = reasons.get(reason, 0) + 1
    return False
