"""FP8 and FP4 codes in bytes; their values are made of their bits by shifts, some rows at a time.

Scales of whole rows follow the product. Faster on a CPU than torch's own conversions by ten times (torch 2.13 makes
them one by one), and nothing but elementwise operations, which use all threads.
"""

import torch
from torch import Tensor, nn

from vlmquant.grid import E2M1_BITS, E2M1_UNIT, E4M3_UNIT, QuantizedWeight, e4m3_values, scale_groups_
from vlmquant.kernels import words
from vlmquant.kernels.form import Form, Place
from vlmquant.kernels.probe import product_dtype
from vlmquant.kernels.reference import add_bias

VALUES_AT_ONCE = 1 << 19
"""Codes that become floats together: with their copies of 2 and 4 bytes they stay in a CPU's second cache."""
WIDE_RANGE = (torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which sums of products with values up to 448 do not overflow."""


def fits(form: Form, place: Place) -> bool:
    """Floats on a CPU, in groups none of which is short."""
    grid, columns = form.grid, form.shape[1]
    whole = grid.group_size >= columns or columns % grid.group_size == 0
    return grid.kind == "float" and place.device.type == "cpu" and whole and (grid.bits == 8 or columns % 2 == 0)


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes uint8 (out, in) of FP8; of FP4 (out, in / 2): column j in the low four bits, j + in / 2 in the high ones.

    scales (out, groups) as stored, those of a byte as uint8.
    """
    codes = weight.codes
    if weight.grid.bits == 4:
        low, high = codes.chunk(2, dim=1)
        codes = low | (high << 4)
    return {"codes": codes, "scales": words.hold_scales(weight)}


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    codes = held["codes"]
    if form.grid.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=1)
    return QuantizedWeight(codes, words.load_scales(held["scales"], form.grid), None, form.grid)


def _halves(codes: Tensor) -> Tensor:
    """`grid.e2m1_values` of both halves."""
    signed = codes.view(torch.int8).to(torch.int16)
    low = signed.bitwise_left_shift(12).bitwise_right_shift_(3)
    moved = torch.cat((low, signed.bitwise_left_shift_(5)), dim=1)
    return moved.bitwise_and_(E2M1_BITS).view(torch.float16).float()


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype."""
    values = inputs.to(product_dtype(inputs))
    outputs = inputs.new_empty(len(inputs), form.shape[0])
    decode, unit = (e4m3_values, E4M3_UNIT) if form.grid.bits == 8 else (_halves, E2M1_UNIT)
    scales = words.load_scales(held["scales"], form.grid) / unit
    scales_follow = scales.shape[1] == 1 and values.dtype in WIDE_RANGE
    at_once = max(1, VALUES_AT_ONCE // form.shape[1])
    for start in range(0, form.shape[0], at_once):
        rows = slice(start, start + at_once)
        weight = decode(held["codes"][rows])
        if not scales_follow:
            scale_groups_(weight, scales[rows], form.grid.group_size)
        product = nn.functional.linear(values, weight.to(values.dtype))
        outputs[:, rows] = product.float().mul_(scales[rows, 0]) if scales_follow else product
    return add_bias(outputs, bias)
