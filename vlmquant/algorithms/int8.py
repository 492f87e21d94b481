"""INT8 weights, a scale per output channel; with `activations: dynamic-int8` inputs are rounded per token at run time.

At 8 bits the min-max grid loses so little that the search below only matters for channels with a lone outlier.
"""

from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import QuantizedWeight, quantize_nearest
from vlmquant.stream import Stage


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Nearest codes on per-channel (or per-group) grids whose scales minimise sum_j E[x_j^2] |d_j|^3."""
    scheme, mean_square = stage.scheme, stage.mean_square()
    quantized = {}
    for name, weight in stage.weights.items():
        group_size = scheme.group_size or weight.shape[1]
        scales, zeros = search_scales(
            weight,
            mean_square,
            bits=scheme.bits,
            group_size=group_size,
            symmetric=scheme.symmetric,
            search="weighted",
            scale_dtype=stage.scale_dtype,
        )
        quantized[name] = quantize_nearest(
            weight, scales, zeros, bits=scheme.bits, group_size=group_size, scale_dtype=stage.scale_dtype
        )
    return quantized
