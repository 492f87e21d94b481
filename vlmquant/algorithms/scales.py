"""Scale search: shrink each group's min-max range until the weighted rounding error is least.

With the weights E[x_j^2] (llama.cpp's importance matrix) and the power 3 (llm-compressor's imatrix_mse observer) this
search is often worth more than the choice of method. It is static: made on the tensor that will be rounded.
"""

from typing import Literal

import torch
from torch import Tensor

from vlmquant.algorithms import loops
from vlmquant.grid import CHUNK_ELEMENTS, Grid, minmax_grid, split_groups

COMPILED_ELEMENTS = 1 << 21
"""The same, where compiled loops search: their working set is a group."""

ScaleSearch = Literal["minmax", "mse", "weighted"]

STEPS = 33
SHARES = {("int", 2): (1.0, 0.3), ("int", 3): (1.0, 0.4), ("int", 4): (1.0, 0.6), ("float", 4): (1.5, 0.75)}
"""Largest and smallest share of the min-max range tried, by kind and bits: the fewer the codes, the more clipping pays.
Floating point has its codes closer together below the largest power of two: a range above 1 maps the maximum to it."""
OTHER_SHARES = (1.0, 0.9)


def search_scales(
    weight: Tensor, mean_square: Tensor | None, grid: Grid, *, search: ScaleSearch, signed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of a weight (out, in), float32 (out, groups); zeros is None on a symmetric grid.

    mean_square (in,) is E[x_j^2] of the layer's inputs, needed by search="weighted", which minimises
    sum_j E[x_j^2] |d_j|^3 over a group, d being the rounding error. "mse" minimises sum_j d_j^2; "minmax" does not
    search.
    signed: on lopsided grids scales below 0 are tried too.
    Every candidate scale is rounded as it will be stored before it is tried, so that what was judged is what is stored.
    """
    base, zeros = minmax_grid(weight, grid)
    if search == "minmax":
        return grid.round_scales(base), zeros
    groups = split_groups(weight.float(), grid.group_size)
    if search == "mse":
        importance = groups.new_ones(weight.shape[1])
    elif mean_square is None:
        raise ValueError("a weighted scale search needs the inputs' mean square")
    else:
        importance = mean_square
    importance = split_groups(importance.to(groups)[None], grid.group_size)[0]
    shares = torch.linspace(*SHARES.get((grid.kind, grid.bits), OTHER_SHARES), STEPS)
    if signed and grid.is_lopsided:
        shares = torch.cat([shares, -shares])
    searched, elements = _search, CHUNK_ELEMENTS
    if loops.fit(groups) and grid.group_rows == 1:
        searched, elements = _search_compiled, COMPILED_ELEMENTS
    at_once = max(1, elements // max(1, groups[0].numel()))
    at_once += -at_once % grid.group_rows  # rows that share a scale are searched together
    best = [
        searched(
            groups[first : first + at_once],
            base[first : first + at_once],
            None if zeros is None else zeros[first : first + at_once],
            importance,
            shares,
            grid,
            cubic=search == "weighted",
        )
        for first in range(0, len(groups), at_once)
    ]
    scales = torch.cat([scale for scale, _ in best])
    return scales, None if zeros is None else torch.cat([zero for _, zero in best if zero is not None])


def _search(
    groups: Tensor,
    base: Tensor,
    base_zeros: Tensor | None,
    importance: Tensor,
    shares: Tensor,
    grid: Grid,
    *,
    cubic: bool,
) -> tuple[Tensor, Tensor | None]:
    """groups (rows, groups, group_size) -> best scales and zeros (rows, groups)."""
    best_loss = torch.full_like(base, torch.inf)
    best_scales, best_zeros = base.clone(), base_zeros
    ratio, power = torch.empty_like(groups), torch.empty_like(groups)
    low = groups.amin(-1).clamp_max(0)
    zeros = None
    for share in shares.tolist():
        scales = grid.round_scales(base * share)
        if best_zeros is not None:
            zeros = (-low * share / scales).round_().clamp_(0, 2**grid.bits - 1)
        bounds = grid.bounds(None if zeros is None else zeros[..., None])
        torch.div(groups, scales[..., None], out=ratio)
        error = grid.round_(ratio, *bounds).mul_(scales[..., None]).sub_(groups)
        torch.mul(error, error, out=power)
        if cubic:
            power.mul_(error.abs_())
        loss = grid.over_blocks(power.mul_(importance).sum(-1), largest=False)
        # A later candidate has to be better by more than noise: ties go to the wider range on every machine.
        better = loss < best_loss * (1 - 1e-6)
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        if best_zeros is not None and zeros is not None:
            best_zeros = torch.where(better, zeros, best_zeros)
    return grid.round_scales(best_scales), best_zeros


def _search_compiled(
    groups: Tensor,
    base: Tensor,
    base_zeros: Tensor | None,
    importance: Tensor,
    shares: Tensor,
    grid: Grid,
    *,
    cubic: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same as `_search`."""
    scales = grid.round_scales((base[..., None] * shares).flatten(1)).view(*base.shape, len(shares))
    zeros = None
    if base_zeros is not None:
        lows = groups.amin(-1, keepdim=True).clamp_max(0) * shares
        zeros = (-lows / scales).round_().clamp_(0, 2**grid.bits - 1)
    best = torch.empty(base.shape, dtype=torch.int64)
    loops.search_rows(
        groups.flatten(1),
        scales,
        zeros,
        best,
        importance.flatten(),
        grid.group_size,
        *loops.bounds(grid),
        cubic or None,
    )
    found = [None if values is None else values.gather(-1, best[..., None])[..., 0] for values in (scales, zeros)]
    assert found[0] is not None
    return found[0], found[1]
