"""What every layout of a packed weight knows besides its buffers, and where it is to be held."""

from dataclasses import dataclass

import torch

from vlmquant.grid import QuantizedWeight

VALUES_AT_ONCE = 1 << 21
"""Codes that become floats together: few enough to stay near the CPU, enough for a product (half or twice: slower)."""


@dataclass(frozen=True)
class Form:
    """A QuantizedWeight without tensors; whether inputs are rounded to int8 per token, and what outputs go through."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    dynamic_int8: bool
    activation: str = ""
    """What the kernel puts its outputs through, a name of `reference.ACTIVATIONS`: int8_cuda only."""


@dataclass(frozen=True)
class Place:
    """Where a weight is to be multiplied, and the dtype of the inputs that are to be expected there."""

    device: torch.device
    dtype: torch.dtype


def form_of(weight: QuantizedWeight, *, dynamic_int8: bool) -> Form:
    return Form(
        shape=weight.shape,
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=weight.symmetric,
        scale_dtype=weight.scale_dtype,
        dynamic_int8=dynamic_int8,
    )


def rows_at_once(columns: int) -> int:
    """Rows of a weight that become floats together."""
    return max(1, VALUES_AT_ONCE // columns)
