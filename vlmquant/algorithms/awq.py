"""AWQ (Lin et al., arXiv:2306.00978): scale input channels by how strongly they fire, fold the scales into what produces the
inputs, then search the clipping of every group.

Both searches minimise the layer's output error tr(E H E^T), E = Q - W, H = E[x x^T]; computing it from H needs no forward
pass per candidate.
"""

import torch
from torch import Tensor

from vlmquant.grid import QuantizedWeight, minmax_grid, quantize_codes, dequantize_codes, quantize_nearest, round_scales, split_groups
from vlmquant.recipe import AwqOptions, Scheme
from vlmquant.stream import Stage

CLIP_STEPS = 20
LEAST_CLIP = 0.5
"""Clipping tries 20 shares of each group's range from 1 down to this (the reference implementation's grid)."""
LEAST_CHANNEL_SCALE = 1e-4


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Scale and fold where the inputs have a producer that can take the scales; clip; round to nearest."""
    options = stage.options.awq
    names = list(stage.weights)
    weight = torch.cat([stage.weights[name] for name in names])
    hessian = stage.hessian()
    if options.damping:
        hessian = hessian + options.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    if stage.can_fold:
        channel_scales = search_channel_scales(
            weight, stage.mean_abs(), hessian, scheme=stage.scheme, options=options, scale_dtype=stage.scale_dtype
        )
        stage.fold(channel_scales)
        weight = weight * channel_scales
        hessian = hessian / channel_scales[:, None] / channel_scales[None, :]
    quantized = {}
    for name, part in zip(names, weight.split([stage.weights[name].shape[0] for name in names]), strict=True):
        quantized[name] = quantize_clipped(
            part, hessian, scheme=stage.scheme, clip=options.clip, scale_dtype=stage.scale_dtype
        )
    return quantized


def search_channel_scales(
    weight: Tensor,
    mean_abs: Tensor,
    hessian: Tensor,
    *,
    scheme: Scheme,
    options: AwqOptions,
    scale_dtype: torch.dtype,
) -> Tensor:
    """The channel scales s (in,) among m^r / v^(1-r), r on a grid, and s = 1, with the least output error.

    m_j is the mean |x_j| and v_j the mean over rows of |W_rj| / (its group's largest), as in the reference implementation's
    duo scaling. s is normalised to sqrt(max s * min s) = 1 and takes the values of a power-of-two-free float32.
    """
    group_size = scheme.group_size or weight.shape[1]
    groups = split_groups(weight.abs(), group_size)
    relative = (groups / groups.amax(-1, keepdim=True).clamp_min(1e-9)).flatten(1)[:, : weight.shape[1]].mean(0)
    best, best_loss = torch.ones(weight.shape[1]), output_error(
        _nearest(weight, scheme, scale_dtype) - weight, hessian
    )
    for step in range(options.grid_points):
        ratio = step / options.grid_points
        scales = mean_abs.clamp_min(1e-9).pow(ratio) / relative.clamp_min(1e-9).pow(1 - ratio)
        scales = scales.clamp_min(LEAST_CHANNEL_SCALE)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = _nearest(weight * scales, scheme, scale_dtype) / scales - weight
        loss = output_error(error, hessian)
        if loss < best_loss * (1 - 1e-6):
            best, best_loss = scales, loss
    return best


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) of an error (out, in)."""
    return torch.einsum("oi,oi->", error @ hessian, error).item()


def _nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    group_size = scheme.group_size or weight.shape[1]
    scales, zeros = minmax_grid(weight, bits=scheme.bits, group_size=group_size, symmetric=scheme.symmetric)
    chosen = None if scheme.symmetric else zeros
    return quantize_nearest(
        weight, scales, chosen, bits=scheme.bits, group_size=group_size, scale_dtype=scale_dtype
    ).dequantize()


def quantize_clipped(
    weight: Tensor, hessian: Tensor, *, scheme: Scheme, clip: bool, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Nearest codes on grids whose ranges were shrunk, group by group, to the least error e H_gg e^T within the group."""
    columns = weight.shape[1]
    group_size = scheme.group_size or columns
    base, base_zeros = minmax_grid(weight, bits=scheme.bits, group_size=group_size, symmetric=scheme.symmetric)
    scales, zeros = round_scales(base, scale_dtype), base_zeros
    if clip:
        scales, zeros = _clip(weight, base, base_zeros, hessian, scheme=scheme, scale_dtype=scale_dtype)
    return quantize_nearest(
        weight,
        scales,
        None if scheme.symmetric else zeros,
        bits=scheme.bits,
        group_size=group_size,
        scale_dtype=scale_dtype,
    )


def _clip(
    weight: Tensor, base: Tensor, base_zeros: Tensor, hessian: Tensor, *, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    columns = weight.shape[1]
    group_size = scheme.group_size or columns
    starts = range(0, columns, group_size)
    low = split_groups(weight, group_size).amin(-1).clamp_max(0)
    best_scales, best_zeros = round_scales(base, scale_dtype), base_zeros
    best_loss = torch.full_like(base, torch.inf)
    for step in range(CLIP_STEPS):
        shrink = 1 - (1 - LEAST_CLIP) * step / CLIP_STEPS
        scales = round_scales(base * shrink, scale_dtype)
        zeros = base_zeros if scheme.symmetric else (-low * shrink / scales).round().clamp(0, 2**scheme.bits - 1)
        chosen = None if scheme.symmetric else zeros
        codes = quantize_codes(weight, scales, chosen, bits=scheme.bits, group_size=group_size)
        error = dequantize_codes(codes, scales, chosen, bits=scheme.bits, group_size=group_size) - weight
        loss = torch.stack(
            [
                ((error[:, a : a + group_size] @ hessian[a : a + group_size, a : a + group_size]) * error[:, a : a + group_size]).sum(1)
                for a in starts
            ],
            dim=1,
        )
        better = loss < best_loss * (1 - 1e-6)
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
