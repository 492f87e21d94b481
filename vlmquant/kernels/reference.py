"""What the kernels compute, in plain torch: the definition of the right answer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlmquant.grid import (
    E4M3,
    E4M3_MAX,
    Grid,
    QuantizedWeight,
    minmax_grid,
    nvfp4_divisor,
    round_e4m3_,
    rounded_up,
    split_groups,
)

ACTIVATION_STEPS = 127.5
"""Code of a token's largest magnitude: the symmetric int8 convention of compressed-tensors, (2**8 - 1) / 2."""
ACTIVATION_FLOOR = 1e-12
"""Smallest activation scale; a token of zeros gets it, and its codes are exact zeros."""
NVFP4_GROUP = 16
FP8_GROUP = 128
"""Features of a token that share a scale, where weights are FP8 in blocks."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda values: values,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda values: nn.functional.gelu(values, approximate="tanh"),
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
}
"""What the outputs of a product may go through last, by name; nothing, if empty."""


def activation_codes(inputs: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """inputs (..., features) float -> int8 codes of the same shape, and float32 scales (..., 1), one for each token.

    code = round half to even (input / scale), clamped to [-128, 127]; scale = max|input| / 127.5, if none is given.
    """
    values = inputs.float()
    if scale is None:
        scales = (values.abs().amax(-1, keepdim=True) / ACTIVATION_STEPS).clamp_min(ACTIVATION_FLOOR)
    else:
        scales = values.new_full((*values.shape[:-1], 1), scale)
    return (values / scales).round_().clamp_(-128, 127).to(torch.int8), scales


def round_int8(inputs: Tensor, scale: float | None = None) -> Tensor:
    """inputs (..., features) -> their nearest values on each token's own int8 grid, or on one; same shape and dtype."""
    codes, scales = activation_codes(inputs, scale)
    return (codes.float() * scales).to(inputs.dtype)


def fp8_scales(inputs: Tensor) -> Tensor:
    """inputs (..., features) -> float32 (..., 1): max|input| / 448, as compressed-tensors and engines have it."""
    return (inputs.abs().amax(-1, keepdim=True).float() / E4M3_MAX).clamp_min(ACTIVATION_FLOOR)


def round_fp8(inputs: Tensor, scale: float | None = None) -> Tensor:
    """inputs (..., features) -> their nearest values on each token's own E4M3 grid, or on that of one scale.

    Same shape and dtype; what is beyond 448 scales is cut off.
    """
    scales = fp8_scales(inputs) if scale is None else scale
    return round_e4m3_(inputs.float() / scales).mul_(scales).to(inputs.dtype)


def round_fp8_groups(inputs: Tensor) -> Tensor:
    """round_fp8 with a scale for every 128 features of a token; the last group may be short."""
    groups = split_groups(inputs.reshape(-1, inputs.shape[-1]), FP8_GROUP)
    return round_fp8(groups).flatten(1)[:, : inputs.shape[-1]].reshape(inputs.shape)


def round_nvfp4(inputs: Tensor, divisor: float) -> Tensor:
    """inputs (..., features) -> their nearest values on NVFP4's grid: groups of 16, E4M3 scales below 1 / divisor.

    Scales are chosen anew for every token ("local" in compressed-tensors); same shape and dtype.
    """
    grid = Grid(4, NVFP4_GROUP, E4M3, kind="float", global_scale=divisor)
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    scales = grid.round_scales(minmax_grid(rows, grid)[0])[..., None]
    groups = split_groups(rows, NVFP4_GROUP)
    rounded = grid.round_(groups / scales, *grid.bounds()).mul_(scales)
    return rounded.flatten(1)[:, : rows.shape[1]].to(inputs.dtype).view(inputs.shape)


DYNAMIC: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda inputs: inputs,
    "dynamic-int8": round_int8,
    "dynamic-fp8": round_fp8,
    "dynamic-fp8-g128": round_fp8_groups,
}
"""What inputs are rounded to before they are multiplied, by a scheme's `activations`."""
CALIBRATED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "static-int8": round_int8,
    "static-fp8": round_fp8,
    "nvfp4": round_nvfp4,
}
"""The same, for those that want a number from calibration."""

LARGEST_INPUT = {"static-int8": 127.0, "static-fp8": E4M3_MAX}
"""What the largest input of calibration becomes, where one scale serves all."""


def input_scale(largest: float, kind: str, dtype: torch.dtype) -> Tensor:
    """The number of a rounding in CALIBRATED, for inputs up to `largest`, as it is stored, (1,).

    A scale is rounded up to `dtype`, the model's, so that nothing seen in calibration is cut off.
    """
    if kind == "nvfp4":
        return torch.tensor([nvfp4_divisor(largest)], dtype=torch.float32)
    return rounded_up(torch.tensor([largest / LARGEST_INPUT[kind]], dtype=torch.float64), dtype)


def round_inputs(inputs: Tensor, kind: str, scale: float | None = None) -> Tensor:
    """inputs (..., features), rounded as a scheme's `activations` says; same shape and dtype.

    scale: the QuantizedWeight's input_scale.
    """
    if kind in DYNAMIC:
        return DYNAMIC[kind](inputs)
    assert scale is not None, f"{kind} inputs need the scale of the weight"
    return CALIBRATED[kind](inputs, scale)


def linear(inputs: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, rounded: str = "none") -> Tensor:
    """inputs (..., in) -> (..., out) of the same dtype: round the inputs, dequantize, multiply."""
    inputs = round_inputs(inputs, rounded, weight.input_scale)
    return nn.functional.linear(inputs, weight.dequantize(inputs.dtype), bias)


def add_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """product (..., out) plus bias (out,), if there is one, in place."""
    return product if bias is None else product.add_(bias.to(product.dtype))
