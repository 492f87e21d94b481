"""Which samples of a set are used: stratified by task, the same for the same seed, stable when the set grows."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlmquant.calibration.images import file_sha256
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import SampleSet
from vlmquant.errors import InputError, shown
from vlmquant.nearest import did_you_mean
from vlmquant.recipe import CalibrationSpec


@dataclass(frozen=True)
class Stratum:
    """One row of the table that says what was asked for and what there was."""

    task: str
    asked: int
    got: int
    with_image: int
    text_only: int


@dataclass(frozen=True)
class Selection:
    """The chosen samples, task after task."""

    samples: tuple[Sample, ...]
    strata: tuple[Stratum, ...]
    sha256: str
    """Of the samples' texts and image files, in order."""

    @property
    def short(self) -> tuple[Stratum, ...]:
        """The strata that got fewer samples than were asked for."""
        return tuple(row for row in self.strata if row.got < row.asked)


def choose_samples(sample_set: SampleSet, spec: CalibrationSpec) -> Selection:
    """The samples of a set that a recipe's calibration asks for.

    Raises InputError for a stratum that the set does not have, or if nothing is chosen.
    """
    chosen, strata = choose(
        sample_set.samples, spec, image_of=lambda s: bool(s.images), usable=lambda _: True, name=sample_set.name
    )
    if not chosen:
        raise InputError(
            f"set {sample_set.name}: no sample was chosen; check calibration.strata and calibration.samples"
        )
    return Selection(chosen, strata, samples_sha256(chosen))


def choose(
    samples: Sequence[Sample],
    spec: CalibrationSpec,
    *,
    image_of: Callable[[Sample], bool],
    usable: Callable[[Sample], bool],
    name: str,
) -> tuple[tuple[Sample, ...], tuple[Stratum, ...]]:
    """Take from each task as many as its quota, in the order of `rank`, passing over what is not `usable`.

    Inside a task, samples with image and text-only ones are taken in proportion to their numbers (not in file order,
    which takes the first ones as they come). `usable` is asked only about samples that would be taken.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    quotas = _quotas({task: len(members) for task, members in by_task.items()}, spec, name=name)
    chosen: list[Sample] = []
    strata = []
    for task, asked in quotas.items():
        taken = _take(by_task[task], asked, spec, image_of=image_of, usable=usable)
        with_image = sum(map(image_of, taken))
        strata.append(Stratum(task, asked, len(taken), with_image, len(taken) - with_image))
        chosen += taken
    return tuple(chosen), tuple(strata)


def _quotas(sizes: Mapping[str, int], spec: CalibrationSpec, *, name: str) -> dict[str, int]:
    if spec.strata is None:
        return shares(sizes, spec.count)
    for task in spec.strata:
        if task not in sizes:
            hint = shown(did_you_mean(task, sizes))
            tasks = shown(", ".join(sizes))
            raise InputError(f"set {name}: has no task '{shown(task)}'{hint}; its tasks: {tasks}")
    return {task: quota for task, quota in spec.strata.items() if quota > 0}


def shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers in proportion to `sizes` that add up to `total`; largest remainders are rounded up, ties by order.

    A share exceeds its size only where total exceeds the sum of sizes.
    """
    everything = sum(sizes.values()) or 1
    exact = {key: size * total / everything for key, size in sizes.items()}
    result = {key: size * total // everything for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: result[key] - exact[key])
    for key in by_remainder[: total - sum(result.values())]:
        result[key] += 1
    return result


def split(
    samples: Sequence[Sample],
    parts: Mapping[str, int],
    *,
    seed: int,
    images_of: Callable[[Sample], Sequence[str]],
) -> dict[str, list[Sample]]:
    """All samples, dealt to parts that are to hold so many each; those that share an image go to the same part.

    A hash of seed and image says to which, in proportion to `parts`, so that a sample seldom moves when the set grows;
    a part that is full gives way to those that are not.
    """
    names = [name for name, count in parts.items() for _ in range(count)]
    dealt: dict[str, list[Sample]] = {name: [] for name in parts}
    groups = _sharing(samples, images_of)
    for key in sorted(groups, key=lambda key: rank(seed, key)):
        name = names[int(rank(seed, f"part of {key}"), 16) % len(names)]
        wanting = [other for other, count in parts.items() if len(dealt[other]) < count]
        if wanting and name not in wanting:
            name = wanting[0]
        dealt[name] += groups[key]
    return dealt


def _sharing(samples: Sequence[Sample], images_of: Callable[[Sample], Sequence[str]]) -> dict[str, list[Sample]]:
    """Samples that are joined by images they share, directly or through others, by the least of their images."""
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while above.setdefault(key, key) != key:
            above[key] = key = above[above[key]]
        return key

    keys = [list(images_of(sample)) or [f"text {sample.id}"] for sample in samples]
    for first, *others in keys:
        for other in others:
            low, high = sorted((top(first), top(other)))
            above[high] = low
    groups: dict[str, list[Sample]] = {}
    for sample, (first, *_) in zip(samples, keys, strict=True):
        groups.setdefault(top(first), []).append(sample)
    return groups


def _take(
    members: list[Sample],
    asked: int,
    spec: CalibrationSpec,
    *,
    image_of: Callable[[Sample], bool],
    usable: Callable[[Sample], bool],
) -> list[Sample]:
    if spec.order == "file":
        return _first(members, asked, usable)
    ranked = sorted(members, key=lambda sample: rank(spec.seed, sample.id))
    kinds = {kind: [sample for sample in ranked if image_of(sample) == kind] for kind in (True, False)}
    sizes = {str(kind): len(pool) for kind, pool in kinds.items() if pool}
    quotas = shares(sizes, min(asked, len(members)))
    return [s for kind, pool in kinds.items() if pool for s in _first(pool, quotas[str(kind)], usable)]


def _first(ranked: list[Sample], count: int, usable: Callable[[Sample], bool]) -> list[Sample]:
    taken: list[Sample] = []
    for sample in ranked:
        if len(taken) == count:
            break
        if usable(sample):
            taken.append(sample)
    return taken


def rank(seed: int, sample_id: str) -> str:
    """A sample's place among its task's: depends on nothing but seed and id, so new samples only slip in between."""
    return hashlib.sha256(f"{seed}\n{sample_id}".encode()).hexdigest()


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Of everything that reaches a model: texts, and the bytes of the images."""
    digest = hashlib.sha256()
    for sample in samples:
        texts = [sample.id, sample.task, sample.question, list(sample.answers), sample.system]
        history = [[turn.question, turn.answer] for turn in sample.history]
        images = [file_sha256(path) for path in sample.images]
        digest.update(json.dumps([*texts, history, images], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
