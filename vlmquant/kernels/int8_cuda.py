"""8-bit codes with one scale per output channel, on CUDA devices: as int8, but padded and in our kernels' order."""

import torch
from torch import Tensor

from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.kernels import int8
from vlmquant.kernels.cuda import launch
from vlmquant.kernels.cuda.ops import prepare_w8, w8_linear
from vlmquant.kernels.form import Form
from vlmquant.packing import pack_w8, unpack_w8


def fits(weight: QuantizedWeight) -> bool:
    return weight.codes.device.type == "cuda" and int8.fits(weight)


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes (padded out, padded in) int8, centred on zero, as `pack_w8` orders them; scales (out,) float32."""
    packed = pack_w8((weight.codes ^ mid_code(8)).view(torch.int8))
    device = packed.device
    if device.type == "cuda" and launch.unavailable(device.index) is None:
        prepare_w8(device, weight.shape[0], packed.shape[1], launch.DTYPE_NAMES.get(weight.scale_dtype, "bf16"))
    return {"codes": packed, "scales": weight.scales.flatten()}


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    return int8.release(_unpadded(held, form), form)


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype; bias (out,) or None is added before outputs are rounded."""
    if form.dynamic_int8:
        return w8_linear(inputs, held["codes"], held["scales"].float(), bias)
    outputs = int8.matmul(inputs, _unpadded(held, form), form)
    return outputs if bias is None else outputs + bias.to(outputs.dtype)


def _unpadded(held: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    return {"codes": unpack_w8(held["codes"], *form.shape), "scales": held["scales"]}
