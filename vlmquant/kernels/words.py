"""Codes of any width and group size, held in the words they have on disk and dequantized some rows at a time."""

import torch
from torch import Tensor, nn

from vlmquant.grid import Grid, QuantizedWeight, dequantize_codes, mid_code
from vlmquant.kernels import loops
from vlmquant.kernels.form import Form, Place, form_of, rows_at_once
from vlmquant.kernels.probe import measured, product_dtype
from vlmquant.kernels.reference import add_bias
from vlmquant.packing import pack_codes, unpack_codes

PROBE_SHAPE = (1024, 1024)
"""Outputs and inputs of the probe weight."""


def fits(form: Form, place: Place) -> bool:
    """Every weight fits, on every device."""
    return True


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """words (out, ceil(in * bits / 32)) int32, scales (out, groups) as stored, those of a byte as uint8; zeros (out,
    groups) uint8 if asymmetric.
    """
    held = {"words": pack_codes(weight.codes, weight.grid.bits), "scales": hold_scales(weight)}
    return held if weight.zeros is None else held | {"zeros": weight.zeros}


def hold_scales(weight: QuantizedWeight) -> Tensor:
    """Scales (out, groups) as stored, those of a byte as uint8, which every operation of torch takes."""
    scales = weight.grid.store_scales(weight.scales)
    return scales.view(torch.uint8) if scales.itemsize == 1 else scales


def load_scales(held: Tensor, grid: Grid) -> Tensor:
    """float32: the inverse of `hold_scales`."""
    return grid.load_scales(held.view(grid.scale_dtype) if held.dtype == torch.uint8 else held)


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    codes = unpack_codes(held["words"], form.grid.bits, form.shape[1])
    return QuantizedWeight(codes, load_scales(held["scales"], form.grid), held.get("zeros"), form.grid)


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype."""
    if form.grid.kind == "int" and loops.usable(inputs) and _loops_win(form.grid.bits):
        return add_bias(_loop_matmul(inputs, held, form), bias)
    return add_bias(_torch_matmul(inputs, held, form), bias)


def _loop_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    bits, size = form.grid.bits, min(form.grid.group_size, form.shape[1])
    outputs: Tensor = torch.ops.vlmquant.words_linear(
        inputs, held["words"], held["scales"], held.get("zeros"), bits, mid_code(bits), size
    )
    return outputs


def _torch_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    values = inputs.to(product_dtype(inputs))
    outputs = inputs.new_empty(len(inputs), form.shape[0])
    at_once = rows_at_once(form.shape[1])
    for start in range(0, form.shape[0], at_once):
        rows = slice(start, start + at_once)
        part = {name: tensor[rows] for name, tensor in held.items()}
        weight = dequantize_codes(
            unpack_codes(part["words"], form.grid.bits, form.shape[1]),
            load_scales(part["scales"], form.grid),
            part.get("zeros"),
            form.grid,
        )
        outputs[:, rows] = nn.functional.linear(values, weight.to(values.dtype))
    return outputs


@measured
def _loops_win(bits: int) -> bool:
    """Whether a compiled loop makes floats of integer codes faster than torch."""
    codes, scales = torch.zeros(PROBE_SHAPE, dtype=torch.uint8), torch.ones(PROBE_SHAPE[0], 1)
    weight = QuantizedWeight(codes, scales, None, Grid(bits, PROBE_SHAPE[1], torch.float32))
    inputs = torch.ones(1, PROBE_SHAPE[1])
    return loops.faster(_loop_matmul, _torch_matmul, inputs, hold(weight), form_of(weight))


def read_rows(indices: Tensor, held: dict[str, Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """The dequantized rows at `indices` (any shape) -> (*indices.shape, in) in `dtype`."""
    flat = indices.flatten()
    weight = QuantizedWeight(
        unpack_codes(held["words"][flat], form.grid.bits, form.shape[1]),
        load_scales(held["scales"][flat], form.grid),
        held["zeros"][flat] if "zeros" in held else None,
        form.grid,
    )
    return weight.dequantize(dtype).view(*indices.shape, form.shape[1])
