"""What the kernels compute, in plain torch: the definition of the right answer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlmquant.grid import QuantizedWeight

ACTIVATION_STEPS = 127.5
"""Code of a token's largest magnitude: the symmetric int8 convention of compressed-tensors, (2**8 - 1) / 2."""
ACTIVATION_FLOOR = 1e-12
"""Smallest activation scale; a token of zeros gets it, and its codes are exact zeros."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda values: values,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda values: nn.functional.gelu(values, approximate="tanh"),
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
}
"""What the outputs of a product may go through last, by name; nothing, if empty."""


def activation_codes(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """inputs (..., features) float -> int8 codes of the same shape, and float32 scales (..., 1), one for each token.

    code = round half to even (input / scale), clamped to [-128, 127]; scale = max|input| / 127.5.
    """
    values = inputs.float()
    scales = (values.abs().amax(-1, keepdim=True) / ACTIVATION_STEPS).clamp_min(ACTIVATION_FLOOR)
    return (values / scales).round_().clamp_(-128, 127).to(torch.int8), scales


def round_activations(inputs: Tensor) -> Tensor:
    """inputs (..., features) -> their nearest values on each token's own int8 grid, same shape and dtype."""
    codes, scales = activation_codes(inputs)
    return (codes.float() * scales).to(inputs.dtype)


def linear(inputs: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, dynamic_int8: bool) -> Tensor:
    """inputs (..., in) -> (..., out) of the same dtype: dequantize, then multiply.

    dynamic_int8: the inputs are rounded per token first.
    """
    if dynamic_int8:
        inputs = round_activations(inputs)
    return nn.functional.linear(inputs, weight.dequantize(inputs.dtype), bias)


def add_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """product (..., out) plus bias (out,), if there is one, in place."""
    return product if bias is None else product.add_(bias.to(product.dtype))
