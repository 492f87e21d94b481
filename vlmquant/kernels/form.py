"""What every layout of a packed weight knows besides its buffers, and where it is to be held."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmquant.grid import Grid, QuantizedWeight

VALUES_AT_ONCE = 1 << 21
"""Codes that become floats together: few enough to stay near the CPU, enough for a product (half or twice: slower)."""

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Of inputs (tokens, in), with a held weight, and a bias (out,) or None -> (tokens, out) in the inputs' dtype."""


@dataclass(frozen=True)
class Form:
    """A QuantizedWeight without tensors; what inputs are rounded to, and what outputs go through."""

    shape: tuple[int, int]
    grid: Grid
    inputs: str = "none"
    """What `reference.round_inputs` makes of them."""
    input_scale: float | None = None
    """That of the QuantizedWeight."""
    activation: str = ""
    """What the kernel puts its outputs through, a name of `reference.ACTIVATIONS`: int8_cuda only."""

    @property
    def kind(self) -> str:
        """For people, such as 4-bit weights in groups of 16 (floating point) or 8-bit weights (symmetric)."""
        grid = self.grid
        groups = "" if grid.group_size >= self.shape[1] else f" in groups of {grid.group_size}"
        inputs = "" if self.inputs == "none" else f" with {self.inputs} inputs"
        what = "floating point" if grid.kind == "float" else "symmetric" if grid.symmetric else "asymmetric"
        return f"{grid.bits}-bit weights{groups} ({what}){inputs}"

    @property
    def int8_inputs(self) -> bool:
        return self.inputs.endswith("-int8")


@dataclass(frozen=True)
class Place:
    """Where a weight is to be multiplied, and the dtype of the inputs that are to be expected there."""

    device: torch.device
    dtype: torch.dtype


def form_of(weight: QuantizedWeight, inputs: str = "none") -> Form:
    return Form(weight.shape, weight.grid, inputs, weight.input_scale)


def rows_at_once(columns: int, values: int = VALUES_AT_ONCE, *, multiple: int = 1) -> int:
    """Rows of a weight that become floats together: so many that they have about as many values."""
    return max(1, values // (columns * multiple)) * multiple
