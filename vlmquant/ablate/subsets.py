"""Calibration sets that differ in one thing, whether their samples show images: of one set, and of the same size.

Where the set has too few text-only samples, images are taken away from others: a format without placeholders in the
question (samples.py) loses nothing else by that. What a calibration of text is made of is told by `Subset.stripped`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sampling import choose
from vlmquant.calibration.sets import SampleSet
from vlmquant.errors import InputError
from vlmquant.recipe import CalibrationSpec

Kind = Literal["text", "image", "mixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""text: no sample has an image. image: all have. mixed: one half as of image, the other as of text."""


@dataclass(frozen=True)
class Subset:
    """The samples of one kind, in one draw."""

    kind: Kind
    draw: int
    """From 1."""
    samples: tuple[Sample, ...]
    stripped: int
    """Of them, those whose images were taken away."""

    @property
    def name(self) -> str:
        return numbered(self.kind, self.draw)


def numbered(name: str, draw: int) -> str:
    """The first draw goes without a number, so that more of them change no name."""
    return name if draw == 1 else f"{name}-{draw}"


def subset_size(sample_set: SampleSet, kinds: Sequence[Kind], wanted: int) -> int:
    """As many samples as all these kinds can have, at most those wanted.

    InputError where a kind needs images and no sample has any.
    """
    seeing = sum(bool(sample.images) for sample in sample_set.samples)
    if not seeing and (needing := [kind for kind in kinds if kind != "text"]):
        raise InputError(
            f"calibration set {sample_set.name}: none of its {len(sample_set.samples)} samples has an image, which "
            f"calibration on {' and '.join(needing)} needs; take a set with images, or --calibrations text"
        )
    everything = len(sample_set.samples)
    most = {"image": seeing, "mixed": min(2 * seeing, everything), "text": everything}
    return min([wanted, *(most[kind] for kind in kinds)])


def draw_subset(sample_set: SampleSet, spec: CalibrationSpec, kind: Kind, *, size: int, draw: int) -> Subset:
    """`size` samples of a kind, each task in proportion, by the recipe's seed + draw - 1.

    A smaller draw by the same seed is part of a larger one, as far as whole numbers go: the images of `mixed` are
    among those of `image`, and texts that were made of images are made of those of `image`.
    """
    pick = _Pick(sample_set, spec.seed + draw - 1)
    showing = {"image": size, "mixed": (size + 1) // 2, "text": 0}[kind]
    seen = pick.of([sample for sample in sample_set.samples if sample.images], showing)
    own = [sample for sample in sample_set.samples if not sample.images]
    read = pick.of(own, min(size - showing, len(own)))
    taken = {sample.id for sample in seen}
    left = [sample for sample in sample_set.samples if sample.images and sample.id not in taken]
    stripped = [replace(sample, images=()) for sample in pick.of(left, size - showing - len(read))]
    return Subset(kind, draw, (*seen, *read, *stripped), len(stripped))


@dataclass(frozen=True)
class _Pick:
    sample_set: SampleSet
    seed: int

    def of(self, samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
        if not count:
            return ()
        return choose(
            samples,
            CalibrationSpec(samples=count, seed=self.seed),
            image_of=lambda sample: bool(sample.images),
            usable=lambda _: True,
            name=self.sample_set.name,
        )[0]
