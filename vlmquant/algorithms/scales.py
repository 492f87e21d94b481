"""Scale search: shrink each group's min-max range until the weighted rounding error is least.

With the weights E[x_j^2] (llama.cpp's importance matrix) and the power 3 (llm-compressor's imatrix_mse observer) this
search is often worth more than the choice of method. It is static: made on the tensor that will be rounded.
"""

from typing import Literal

import torch
from torch import Tensor

from vlmquant.grid import mid_code, minmax_grid, round_scales, split_groups

ScaleSearch = Literal["minmax", "mse", "weighted"]

SHRINK_STEPS = 33
LEAST_SHRINK = {3: 0.4, 4: 0.6, 8: 0.9}
"""Smallest share of the min-max range tried, by bits: the fewer the codes, the more clipping pays."""
CHUNK_ELEMENTS = 1 << 17
"""Weights searched at a time: the working set (about 2 MB) stays in the caches."""


def search_scales(
    weight: Tensor,
    mean_square: Tensor | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    search: ScaleSearch,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of a weight (out, in), float32 (out, groups); zeros is None on a symmetric grid.

    mean_square (in,) is E[x_j^2] of the layer's inputs, needed by search="weighted", which minimises
    sum_j E[x_j^2] |d_j|^3 over a group, d being the rounding error. "mse" minimises sum_j d_j^2; "minmax" does not
    search.
    Every candidate scale is rounded to `scale_dtype` before it is tried, so that what was judged is what is stored.
    """
    groups = split_groups(weight.float(), group_size)
    base, zeros = minmax_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    if search == "minmax":
        return round_scales(base, scale_dtype), None if symmetric else zeros
    if search == "mse":
        importance = weight.new_ones(weight.shape[1])
    elif mean_square is None:
        raise ValueError("a weighted scale search needs the inputs' mean square")
    else:
        importance = mean_square
    importance = split_groups(importance.to(groups)[None], group_size)[0]
    shrinks = torch.linspace(1.0, LEAST_SHRINK[bits], SHRINK_STEPS).tolist()
    rows_at_once = max(1, CHUNK_ELEMENTS // max(1, groups[0].numel()))
    chunks = zip(*(torch.split(whole, rows_at_once) for whole in (groups, base, zeros)), strict=True)
    best = [
        _search_rows(rows, ranges, offsets, importance, shrinks, bits, symmetric, search == "weighted", scale_dtype)
        for rows, ranges, offsets in chunks
    ]
    scales = torch.cat([scale for scale, _ in best])
    return scales, None if symmetric else torch.cat([zero for _, zero in best])


def _search_rows(
    groups: Tensor,
    base: Tensor,
    base_zeros: Tensor,
    importance: Tensor,
    shrinks: list[float],
    bits: int,
    symmetric: bool,
    cubic: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """groups (rows, groups, group_size) -> best scales and zeros (rows, groups)."""
    top = 2**bits - 1
    best_loss = torch.full_like(base, torch.inf)
    best_scales, best_zeros = base.clone(), base_zeros.clone()
    error, power = torch.empty_like(groups), torch.empty_like(groups)
    low = groups.amin(-1).clamp_max(0)
    for shrink in shrinks:
        scales = round_scales(base * shrink, scale_dtype)
        zeros = base_zeros if symmetric else (-low * shrink / scales).round_().clamp_(0, top)
        offset = float(mid_code(bits)) if symmetric else zeros[..., None]
        torch.div(groups, scales[..., None], out=error).round_()
        if symmetric:
            error.clamp_(-mid_code(bits), top - mid_code(bits))
        else:
            error.add_(offset).clamp_(0, top).sub_(offset)
        error.mul_(scales[..., None]).sub_(groups)
        torch.mul(error, error, out=power)
        if cubic:
            power.mul_(error.abs_())
        loss = power.mul_(importance).sum(-1)
        # A later candidate has to be better by more than noise: ties go to the wider range on every machine.
        better = loss < best_loss * (1 - 1e-6)
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return round_scales(best_scales, scale_dtype), best_zeros
