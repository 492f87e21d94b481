"""Round to nearest on searched scales.

At 8 bits the min-max grid loses so little that the search only matters for channels with a lone outlier.
"""

from torch import Tensor

from vlmquant.algorithms.scales import STEPS, search_scales
from vlmquant.grid import QuantizedWeight, join_rows, quantize_nearest
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Nearest codes on per-channel (or per-group) grids whose scales minimise sum_j E[x_j^2] |d_j|^3."""
    mean_square, grid = stage.mean_square(), stage.grid.fitted(*stage.weights.values())

    def nearest(rows: Tensor) -> QuantizedWeight:
        return quantize_nearest(rows, *search_scales(rows, mean_square, grid, search="weighted"), grid)

    return {
        name: join_rows(stage.by_rows(weight, nearest, work=STEPS * weight.numel()))
        for name, weight in stage.weights.items()
    }
