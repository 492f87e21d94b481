"""Round to nearest on each group's min-max grid: needs no data, and is the baseline of every other method.

`scale_search: mse` searches the range of each group for the least error of its weights; that needs none either.
"""

from torch import Tensor

from vlmquant.algorithms.scales import STEPS, search_scales
from vlmquant.grid import Grid, QuantizedWeight, join_rows, quantize_nearest
from vlmquant.recipe import RtnOptions
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Quantize each linear of the stage alone; the stage's inputs are not looked at."""
    grid, options = stage.grid.fitted(*stage.stored.values()), stage.options.rtn
    return {
        name: join_rows(
            stage.by_rows(weight, lambda rows: quantize_weight(rows, grid, options), work=STEPS * weight.numel())
        )
        for name, weight in stage.stored.items()
    }


def quantize_weight(weight: Tensor, grid: Grid, options: RtnOptions | None = None) -> QuantizedWeight:
    """weight (out, in) -> nearest codes on the grid of each group; options: None for the recipe's defaults."""
    search = (options or RtnOptions()).scale_search
    return quantize_nearest(weight, *search_scales(weight, None, grid, search=search), grid)
