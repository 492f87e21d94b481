"""The inner loops of the algorithms, compiled: torch needs a pass over memory for each of their steps."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmquant.compiled import available, compiled
from vlmquant.grid import FLOAT32_EXPONENT, Grid

TILE = 64
"""Rows whose errors in a block of columns fill half of a first-level cache."""


EXPONENT, TWICE_ONE = np.uint32(FLOAT32_EXPONENT), np.uint32(0x7F000000)
"""Of the bits of a float32: those of its power of two; and those of 1, twice, from which a power's bits leave those of
its inverse."""


def fit(weight: Tensor) -> bool:
    """Whether a weight can be rounded here: on a CPU where loops can be compiled."""
    return weight.device.type == "cpu" and available()


def bounds(grid: Grid) -> tuple[int | None, np.float32, np.float32, np.float32, np.float32]:
    """A grid as the loops take it: 1 for integers, least and largest value where the zero is 0, and of floats what
    Grid.steps says.

    Flags are 1 or None: numba leaves out what a None excludes.
    """
    low, high = grid.bounds() if grid.symmetric else (0, 2**grid.bits - 1)
    least, step = (np.float32(1), np.float32(1)) if grid.kind == "int" else map(np.float32, grid.steps)
    return 1 if grid.kind == "int" else None, np.float32(low), np.float32(high), least, step


@compiled(rows=4, fastmath=True)
def search_rows(
    weight: Any,
    candidates: Any,
    zeros: Any,
    best: Any,
    importance: Any,
    size: Any,
    integers: Any,
    low: Any,
    high: Any,
    least: Any,
    step: Any,
    cubic: Any,
) -> None:
    """Which candidate scale loses least, group by group: sum_j importance_j |d_j|^3, or d_j^2 where it is not cubic.

    weight (rows, in) float32; candidates (rows, groups, steps) float32; zeros the same, None on a symmetric grid; best
    (rows, groups) int64 gets the index; importance (in,) float32; then `values`. A later candidate has to be better by
    more than noise: ties go to the wider range.
    """
    rows, columns = weight.shape
    groups, steps = candidates.shape[1], candidates.shape[2]
    for row in range(rows):
        for group in range(groups):
            begin, end = group * size, min((group + 1) * size, columns)
            values, weights = weight[row, begin:end], importance[begin:end]  # so that numba knows no index is negative
            lowest, found = np.float32(np.inf), 0
            for number in range(steps):
                scale = candidates[row, group, number]
                inverse = np.float32(1) / scale
                bottom, top, loss = low, high, np.float32(0)
                if zeros is not None:
                    bottom, top = low - zeros[row, group, number], high - zeros[row, group, number]
                for column in range(len(values)):
                    value = values[column]
                    if integers is not None:
                        error = abs(min(max(np.rint(value * inverse), bottom), top) * scale - value)
                    else:
                        value = abs(value)
                        ratio = np.float32(min(value * inverse, top))
                        power = np.uint32(ratio.view(np.uint32) & EXPONENT).view(np.float32)
                        unit = np.float32(max(power, least) * step)
                        finer = np.uint32(TWICE_ONE - unit.view(np.uint32)).view(np.float32)
                        error = abs(np.rint(ratio * finer) * unit * scale - value)
                    if cubic is not None:
                        loss += error * error * error * weights[column]
                    else:
                        loss += error * error * weights[column]
                if loss < lowest:
                    lowest, found = loss * np.float32(1 - 1e-6), number
            best[row, group] = found


def round_block(
    wanted: Tensor,
    target: Tensor,
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_of: Tensor,
    grid: Grid,
    pull: Tensor | None = None,
    coupling: Tensor | None = None,
) -> None:
    """What kernels.cuda.rounding.by_torch does, row by row; with pull and coupling what coupled.by_torch does."""
    assert coupling is None or len(coupling) <= TILE
    tiles = torch.arange(0, wanted.shape[1], TILE)
    _round_tiles(
        tiles, wanted, target, values, errors, feedback, scales, zeros, group_of, *bounds(grid), pull, coupling
    )


@compiled(rows=1, fastmath=True)
def _round_tiles(
    tiles: Any,
    wanted: Any,
    target: Any,
    values: Any,
    errors: Any,
    feedback: Any,
    scales: Any,
    zeros: Any,
    group_of: Any,
    integers: Any,
    low: Any,
    high: Any,
    least: Any,
    step: Any,
    pull: Any,
    coupling: Any,
) -> None:
    """tiles (tiles,) int64: where each begins, of the rows that stay in the caches together."""
    for first in tiles:
        for i in range(len(wanted)):
            value, goal = wanted[i, first : first + TILE], target[i, first : first + TILE]
            value_of, error = values[i, first : first + TILE], errors[i, first : first + TILE]
            for j in range(i):
                factor, earlier = feedback[i, j], errors[j, first : first + TILE]
                for row in range(len(value)):
                    value[row] += factor * earlier[row]
            scale = scales[group_of[i], first : first + TILE]
            if zeros is not None:
                zero = zeros[group_of[i], first : first + TILE]
            if coupling is not None:
                pulled = pull[i]
            for row in range(len(value)):
                start = value[row]
                if coupling is not None:
                    start += pulled[row]
                ratio = start * (np.float32(1) / scale[row])
                if integers is not None:
                    if zeros is not None:
                        whole = min(max(np.rint(ratio), low - zero[row]), high - zero[row])
                    else:
                        whole = min(max(np.rint(ratio), low), high)
                else:
                    ratio = np.float32(min(max(ratio, low), high))
                    power = np.uint32(ratio.view(np.uint32) & EXPONENT).view(np.float32)
                    unit = np.float32(max(power, least) * step)
                    finer = np.uint32(TWICE_ONE - unit.view(np.uint32)).view(np.float32)
                    whole = np.rint(ratio * finer) * unit
                value_of[row] = whole
                error[row] = goal[row] - whole * scale[row]
                value[row] -= whole * scale[row]
                if coupling is not None:
                    for later in range(row + 1, len(value)):
                        pulled[later] += coupling[row, later] * value[row]
