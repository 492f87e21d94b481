"""Round to nearest on each group's min-max grid: needs no data, and is the baseline of every other method."""

import torch
from torch import Tensor

from vlmquant.grid import QuantizedWeight, minmax_grid, quantize_nearest
from vlmquant.recipe import Scheme
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Quantize each linear of the stage alone; the stage's inputs are not looked at."""
    return {
        name: quantize_weight(weight, scheme=stage.scheme, scale_dtype=stage.scale_dtype)
        for name, weight in stage.weights.items()
    }


def quantize_weight(weight: Tensor, *, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """weight (out, in) float32 -> nearest codes on the min-max grid of each group."""
    group_size = scheme.group_size or weight.shape[1]
    scales, zeros = minmax_grid(weight, bits=scheme.bits, group_size=group_size, symmetric=scheme.symmetric)
    return quantize_nearest(
        weight,
        scales,
        None if scheme.symmetric else zeros,
        bits=scheme.bits,
        group_size=group_size,
        scale_dtype=scale_dtype,
    )
