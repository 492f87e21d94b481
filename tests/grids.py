"""Weights on the grid of a scheme, for tests."""

from dataclasses import replace

import torch
from torch import Tensor

from vlmquant.algorithms import rtn
from vlmquant.grid import Grid, QuantizedWeight, grid_of
from vlmquant.kernels.reference import CALIBRATED, input_scale
from vlmquant.recipe import Scheme


def nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    """weight (out, in) rounded to nearest; dtype: the model's. Where inputs are calibrated, 5 is their largest."""
    made = rtn.quantize_weight(weight.float(), grid_of(scheme, weight.shape[1], dtype).fitted(weight))
    calibrated = scheme.activations in CALIBRATED
    return replace(made, input_scale=input_scale(5.0, scheme.activations, dtype).item() if calibrated else None)


def random(scheme: Scheme, rows: int, columns: int, *, seed: int = 0) -> QuantizedWeight:
    """Normal weights of a bfloat16 model, rounded to nearest; half the scales of integers are turned round."""
    made = nearest(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), scheme)
    return made if scheme.type == "float" else turned(made, seed=seed)


def turned(weight: QuantizedWeight, *, seed: int = 0) -> QuantizedWeight:
    """The same codes with the scales of about half the groups below 0, as a search for scales may find them."""
    signs = torch.randint(2, weight.scales.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return replace(weight, scales=weight.scales * signs)


def whole(bits: int, group_size: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Grid:
    """An integer grid."""
    return Grid(bits, group_size, dtype, symmetric)
