"""AWQ (Lin et al., arXiv:2306.00978): scale input channels by how strongly they fire, fold the scales into what
produces the inputs, then search the clipping of every group.

Both searches minimise the layer's output error tr(E H E^T), E = Q - W (out, in) and H = E[x x^T] (in, in); from H it
costs no forward pass per candidate.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vlmquant.algorithms import gptq
from vlmquant.algorithms.folding import finder
from vlmquant.algorithms.rtn import quantize_weight
from vlmquant.algorithms.target import aim_stage
from vlmquant.grid import (
    Grid,
    QuantizedWeight,
    dequantize_codes,
    join_rows,
    minmax_grid,
    quantize_codes,
    quantize_nearest,
    split_groups,
)
from vlmquant.ranks import ALONE, Ranks
from vlmquant.recipe import AwqOptions
from vlmquant.stream import Stage, divided

CLIP_STEPS = 20
LEAST_CLIP = 0.5
"""Clipping tries 20 shares of each group's range from 1 down towards this one (the authors' own grid)."""
LEAST_CHANNEL_SCALE = 1e-4
"""Channel scales below this, before they are normalised, are raised to it (as in the authors' code)."""
BETTER = 1 - 1e-6
"""A later candidate has to be better by more than noise: ties go to the earlier one on every machine."""


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Scale and fold where the inputs have a producer that can take the scales; clip; round to nearest."""
    options, weights, channel_scales = stage.options.awq, stage.weights, fold_scales(stage)
    if channel_scales is not None:
        weights = {name: weight * channel_scales for name, weight in weights.items()}
    if stage.is_aimed:
        target = aim_stage(stage, weights, channel_scales)
        weights, hessian = target.weights, _damped(target.factor.hessian(), options)
    else:
        hessian = divided(_damped(stage.hessian(), options).clone(), channel_scales)
    grid = stage.grid.fitted(*weights.values())
    make = partial(rounded, hessian=hessian, grid=grid, options=options)
    work = CLIP_STEPS * grid.group_size
    return {
        name: join_rows(stage.by_rows(weight, make, work=work * weight.numel())) for name, weight in weights.items()
    }


def rounded(weight: Tensor, hessian: Tensor, grid: Grid, options: AwqOptions) -> QuantizedWeight:
    """weight (out, in), scaled, and the second moments of its inputs, divided -> codes."""
    return quantize_clipped(weight, hessian, grid, clip=options.clip, signed=options.signed_scales)


def quantize_stage_with_feedback(stage: Stage) -> dict[str, QuantizedWeight]:
    """Scale and fold by what GPTQ will lose, which is known on grids of integers, and round by it."""
    if stage.grid.kind == "int" or not stage.can_fold:
        return gptq.quantize_stage(stage, finder(stage))
    known = find_scales(stage, stage.mean_abs(), stage.hessian(), ranks=stage.ranks)
    return gptq.quantize_stage(stage, lambda factor: known)


def _damped(hessian: Tensor, options: AwqOptions) -> Tensor:
    if not options.damping:
        return hessian
    return hessian + options.damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)


def fold_scales(stage: Stage) -> Tensor | None:
    """Find the channel scales (in,) and have the producer of the inputs take them; None where none are of use."""
    if not stage.can_fold:
        return None
    channel_scales = find_scales(stage, stage.mean_abs(), stage.hessian(), ranks=stage.ranks)
    if channel_scales is not None:
        stage.fold(channel_scales)
    return channel_scales


def find_scales(stage: Stage, mean_abs: Tensor, hessian: Tensor, *, ranks: Ranks = ALONE) -> Tensor | None:
    """The channel scales (in,) that the producer can take, from E|x_j| (in,) and E[x x^T] (in, in); None where none are
    of use."""
    options = stage.options.awq
    channel_scales = search_channel_scales(
        torch.cat(list(stage.weights.values())),
        mean_abs,
        _damped(hessian, options),
        stage.admissible,
        stage.grid,
        options=options,
        ranks=ranks,
    )
    if not channel_scales.isfinite().all() or channel_scales.min() <= 0:
        raise AssertionError("admissible channel scales must be finite and positive")
    return None if (channel_scales == 1).all() else channel_scales


def search_channel_scales(
    weight: Tensor,
    mean_abs: Tensor,
    hessian: Tensor,
    admissible: Callable[[Tensor], Tensor],
    grid: Grid,
    *,
    options: AwqOptions,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The channel scales s (in,) float32 with the least output error, among s = 1 and m^r / v^(1 - r) for r on a grid.

    m_j is the mean |x_j| and v_j the mean over rows of |W_rj| / (its group's largest): the authors' duo scaling; s is
    normalised so that max s * min s = 1. `admissible` replaces every candidate by the nearest scales that the producer
    can take without rounding before it is tried, so that what was judged is what is stored. ranks: who
    shares the tries.
    """
    found = channel_scale_candidates(weight, mean_abs, group_size=grid.group_size, grid_points=options.grid_points)
    candidates = [torch.ones_like(mean_abs), *map(admissible, found)]

    def loss_of(scales: Tensor) -> float:
        scaled = weight * scales
        rounded = quantize_weight(scaled, grid.fitted(scaled)).dequantize()
        return output_error(rounded.div_(scales).sub_(weight), hessian)

    losses = ranks.in_order({place: loss_of(one) for place, one in enumerate(candidates) if ranks.own(place)})
    best, best_loss = candidates[0], torch.inf
    for scales, loss in zip(candidates, losses, strict=True):
        if loss < best_loss * BETTER:
            best, best_loss = scales, loss
    return ranks.first(lambda: best)


def channel_scale_candidates(weight: Tensor, mean_abs: Tensor, *, group_size: int, grid_points: int) -> list[Tensor]:
    """Channel scales (in,) for the exponents 0, 1 / grid_points, ... below 1."""
    groups = split_groups(weight.abs(), group_size)
    relative = (groups / groups.amax(-1, keepdim=True).clamp_min(1e-9)).flatten(1)[:, : weight.shape[1]].mean(0)
    strength, relative = mean_abs.clamp_min(1e-9), relative.clamp_min(1e-9)
    candidates = []
    for step in range(grid_points):
        ratio = step / grid_points
        scales = (strength.pow(ratio) / relative.pow(1 - ratio)).clamp_min(LEAST_CHANNEL_SCALE)
        candidates.append(scales / (scales.max() * scales.min()).sqrt())
    return candidates


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) of an error (out, in)."""
    return (error @ hessian).mul_(error).sum(dtype=torch.float64).item()


def quantize_clipped(
    weight: Tensor, hessian: Tensor, grid: Grid, *, clip: bool, signed: bool = False
) -> QuantizedWeight:
    """Nearest codes on grids whose ranges shrink, group by group, to the least error e H_gg e^T within the group.

    signed: on lopsided grids scales below 0 are tried too.
    """
    if not clip:
        return quantize_weight(weight, grid)
    base, zeros = minmax_grid(weight, grid)
    low = split_groups(weight, grid.group_size).amin(-1).clamp_max(0)
    best_loss = torch.full_like(base, torch.inf)
    best_scales, best_zeros = base, zeros
    shrinks = [1 - (1 - LEAST_CLIP) * step / CLIP_STEPS for step in range(CLIP_STEPS)]
    if signed and grid.is_lopsided:
        shrinks += [-shrink for shrink in shrinks]
    for shrink in shrinks:
        scales = grid.round_scales(base * shrink)
        if zeros is not None:
            zeros = (-low * shrink / scales).round().clamp(0, 2**grid.bits - 1)
        codes = quantize_codes(weight, scales, zeros, grid)
        error = dequantize_codes(codes, scales, zeros, grid).sub_(weight)
        loss = grid.over_blocks(_group_errors(error, hessian, grid.group_size), largest=False)
        better = loss < best_loss * BETTER
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        if zeros is not None and best_zeros is not None:
            best_zeros = torch.where(better, zeros, best_zeros)
    return quantize_nearest(weight, best_scales, best_zeros, grid)


def _group_errors(error: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """e H_gg e^T (out, groups) of an error (out, in), inputs of other groups left aside."""
    spans = [slice(start, start + group_size) for start in range(0, error.shape[1], group_size)]
    return torch.stack([((error[:, span] @ hessian[span, span]) * error[:, span]).sum(1) for span in spans], dim=1)
