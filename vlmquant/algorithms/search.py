"""Round to nearest on searched scales.

At 8 bits the min-max grid loses so little that the search only matters for channels with a lone outlier.
"""

from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import QuantizedWeight, quantize_nearest
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Nearest codes on per-channel (or per-group) grids whose scales minimise sum_j E[x_j^2] |d_j|^3."""
    mean_square, grid = stage.mean_square(), stage.grid.fitted(*stage.weights.values())
    return {
        name: quantize_nearest(weight, *search_scales(weight, mean_square, grid, search="weighted"), grid)
        for name, weight in stage.weights.items()
    }
