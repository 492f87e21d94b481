"""Round to nearest on searched scales.

At 8 bits the min-max grid loses so little that the search only matters for channels with a lone outlier. What rounding
the inputs costs, folds and biases make less (`rounded`).
"""

from functools import partial

from torch import Tensor

from vlmquant.algorithms import rounded
from vlmquant.algorithms.scales import STEPS, search_scales
from vlmquant.grid import Grid, QuantizedWeight, join_rows, quantize_nearest
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Nearest codes on per-channel (or per-group) grids whose scales minimise sum_j E[x_j^2] |d_j|^3."""
    options, inputs = stage.options.search, stage.scheme.activations
    folds = inputs == "static-int8" if options.fold is None else options.fold and inputs != "none"
    weights, mean_square = stage.weights, stage.mean_square()
    channel_scales = rounded.fold_scales(stage) if folds else None
    if channel_scales is not None:
        weights = {name: weight * channel_scales for name, weight in weights.items()}
        mean_square = mean_square / channel_scales**2
    nearest = partial(quantize_weight, mean_square=mean_square, grid=stage.grid.fitted(*weights.values()))

    quantized = {
        name: join_rows(stage.by_rows(weight, nearest, work=STEPS * weight.numel())) for name, weight in weights.items()
    }
    if options.correct_bias and inputs != "none":
        rounded.correct_biases(stage, quantized, channel_scales)
    return quantized


def quantize_weight(weight: Tensor, mean_square: Tensor, grid: Grid) -> QuantizedWeight:
    """weight (out, in) and E[x_j^2] of its inputs (in,) -> nearest codes on the scales that lose least by them."""
    return quantize_nearest(weight, *search_scales(weight, mean_square, grid, search="weighted"), grid)
