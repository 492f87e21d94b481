"""Which scheme each unit gets under a budget: a multiple-choice knapsack, solved exactly.

Units are taken one after the other. Of all choices for those so far only the ones are kept that no other beats in both
bytes and loss (Nemhauser and Ullmann, Management Science 15, 1969): what is left at the end are the least losses for
all numbers of bytes. Layers repeat their shapes, so that the sums of bytes are few.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 400_000
"""Kept for the units so far. Where there would be more, bytes are rounded up to multiples of what leaves as many."""


@dataclass(frozen=True)
class Option:
    """One way to store a unit."""

    nbytes: int
    loss: float


@dataclass(frozen=True)
class Frontier:
    """The choices that no other beats in both bytes and loss."""

    nbytes: NDArray[np.int64]
    """(points,), rising; where not `exact`, bounds from above."""
    losses: NDArray[np.float64]
    """(points,), falling."""
    exact: bool
    _steps: tuple[tuple[NDArray[np.int32], NDArray[np.int32]], ...]
    """For each unit and point after it: the point before it, and the unit's option."""

    def within_bytes(self, most: float) -> int | None:
        """The point of the least loss within so many bytes; None where all take more."""
        point = int(np.searchsorted(self.nbytes, most, side="right")) - 1
        return point if point >= 0 else None

    def within_loss(self, most: float) -> int | None:
        """The point of the fewest bytes that loses no more; None where all lose more."""
        point = int(np.searchsorted(-self.losses, -most, side="left"))
        return point if point < len(self.losses) else None

    def options(self, point: int) -> list[int]:
        """The option of each unit at a point."""
        found = []
        for parents, options in reversed(self._steps):
            found.append(int(options[point]))
            point = int(parents[point])
        return found[::-1]


def frontier(units: Sequence[Sequence[Option]], *, most_points: int = MOST_POINTS) -> Frontier:
    """All that is worth choosing: one option for every unit, each of which has one at least. Of equal choices the one
    with earlier options for later units is kept."""
    step = 1
    nbytes, losses = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for options in units:
        more_bytes = np.array([one.nbytes for one in options], np.int64)
        more_loss = np.array([one.loss for one in options], np.float64)
        sums, lost = (nbytes[:, None] + more_bytes).ravel(), (losses[:, None] + more_loss).ravel()
        sums = -(-sums // step) * step
        kept = _unbeaten(sums, lost)
        while len(kept) > most_points:
            step = max(2 * step, -(-int(sums[kept[-1]] - sums[kept[0]]) // most_points))
            sums = -(-sums // step) * step
            kept = _unbeaten(sums, lost)
        nbytes, losses = sums[kept], lost[kept]
        steps.append(((kept // len(options)).astype(np.int32), (kept % len(options)).astype(np.int32)))
    return Frontier(nbytes, losses, step == 1, tuple(steps))


def _unbeaten(nbytes: NDArray[np.int64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """The indices of what nothing with as few bytes beats or equals in loss, by rising bytes."""
    order = np.lexsort((losses, nbytes))
    ordered = losses[order]
    least = np.minimum.accumulate(ordered)
    better = np.concatenate([[True], ordered[1:] < least[:-1]])
    return np.asarray(order[better])


def monotone(options: Sequence[Option]) -> list[Option]:
    """The options with losses that do not rise with bytes: the nearest such ones, in squares (isotonic regression)."""
    order = sorted(range(len(options)), key=lambda index: (options[index].nbytes, -options[index].loss))
    pools: list[tuple[float, list[int]]] = []  # mean loss, members
    for index in order:
        pools.append((options[index].loss, [index]))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (first, before), (second, after) = pools[-2:]
            together = before + after
            pools[-2:] = [((first * len(before) + second * len(after)) / len(together), together)]
    losses = {index: mean for mean, members in pools for index in members}
    return [Option(one.nbytes, losses[index]) for index, one in enumerate(options)]
