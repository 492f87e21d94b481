"""8-bit codes with one scale per output channel, on CUDA devices: as int8, but padded as integer products want them."""

import torch
from torch import Tensor, nn

from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.kernels import int8
from vlmquant.kernels.cuda import launch
from vlmquant.kernels.cuda.ops import prepare_w8, w8_linear
from vlmquant.kernels.form import Form

MULTIPLE = 64
"""Rows and columns are padded to multiples of this with zeros."""


def fits(weight: QuantizedWeight) -> bool:
    return weight.codes.device.type == "cuda" and int8.fits(weight)


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes (padded out, padded in) int8, centred on zero; scales (out,) float32."""
    rows, columns = weight.shape
    codes = (weight.codes ^ mid_code(8)).view(torch.int8)
    padded = nn.functional.pad(codes, (0, -columns % MULTIPLE, 0, -rows % MULTIPLE)).contiguous()
    device = padded.device
    if device.type == "cuda" and launch.unavailable(device.index) is None:
        prepare_w8(device, rows, padded.shape[1], launch.DTYPE_NAMES.get(weight.scale_dtype, "bf16"))
    return {"codes": padded, "scales": weight.scales.flatten()}


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    return int8.release(_unpadded(held, form), form)


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype."""
    if not form.dynamic_int8:
        return int8.matmul(inputs, _unpadded(held, form), form)
    return w8_linear(inputs, held["codes"], held["scales"].float())


def _unpadded(held: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    rows, columns = form.shape
    return {"codes": held["codes"][:rows, :columns], "scales": held["scales"]}
