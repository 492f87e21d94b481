"""Codes of any width and group size, held in the words they have on disk and dequantized some rows at a time."""

import torch
from torch import Tensor, nn

from vlmquant.grid import QuantizedWeight, dequantize_codes
from vlmquant.kernels.form import Form, Place, rows_at_once
from vlmquant.kernels.probe import product_dtype
from vlmquant.kernels.reference import add_bias
from vlmquant.packing import pack_codes, unpack_codes


def fits(form: Form, place: Place) -> bool:
    """Every weight fits, on every device."""
    return True


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """words (out, ceil(in * bits / 32)) int32, scales (out, groups) in the scales' dtype, zeros (out, groups) uint8."""
    held = {"words": pack_codes(weight.codes, weight.bits), "scales": weight.scales.to(weight.scale_dtype)}
    return held if weight.zeros is None else held | {"zeros": weight.zeros}


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    codes = unpack_codes(held["words"], form.bits, form.shape[1])
    return QuantizedWeight(
        codes, held["scales"].float(), held.get("zeros"), form.bits, form.group_size, form.scale_dtype
    )


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype."""
    values = inputs.to(product_dtype(inputs))
    outputs = inputs.new_empty(len(inputs), form.shape[0])
    at_once = rows_at_once(form.shape[1])
    for start in range(0, form.shape[0], at_once):
        rows = slice(start, start + at_once)
        part = {name: tensor[rows] for name, tensor in held.items()}
        weight = dequantize_codes(
            unpack_codes(part["words"], form.bits, form.shape[1]),
            part["scales"].float(),
            part.get("zeros"),
            bits=form.bits,
            group_size=form.group_size,
        )
        outputs[:, rows] = nn.functional.linear(values, weight.to(values.dtype))
    return add_bias(outputs, bias)


def read_rows(indices: Tensor, held: dict[str, Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """The dequantized rows at `indices` (any shape) -> (*indices.shape, in) in `dtype`."""
    flat = indices.flatten()
    weight = QuantizedWeight(
        unpack_codes(held["words"][flat], form.bits, form.shape[1]),
        held["scales"][flat].float(),
        held["zeros"][flat] if "zeros" in held else None,
        form.bits,
        form.group_size,
        form.scale_dtype,
    )
    return weight.dequantize(dtype).view(*indices.shape, form.shape[1])
