"""Round to nearest on each group's min-max grid: needs no data, and is the baseline of every other method."""

from torch import Tensor

from vlmquant.grid import Grid, QuantizedWeight, minmax_grid, quantize_nearest
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Quantize each linear of the stage alone; the stage's inputs are not looked at."""
    grid = stage.grid.fitted(*stage.weights.values())
    return {name: quantize_weight(weight, grid) for name, weight in stage.weights.items()}


def quantize_weight(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """weight (out, in) float32 -> nearest codes on the min-max grid of each group."""
    return quantize_nearest(weight, *minmax_grid(weight, grid), grid)
