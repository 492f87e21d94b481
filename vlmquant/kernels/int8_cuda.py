"""8-bit codes with one scale per output channel, on CUDA devices: as int8, but padded and in our kernels' order."""

import torch
from torch import Tensor

from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.kernels import int8
from vlmquant.kernels.cuda import launch
from vlmquant.kernels.cuda.ops import prepare_w8, w8_linear
from vlmquant.kernels.form import Form, Place
from vlmquant.packing import pack_w8, unpack_w8


def fits(form: Form, place: Place) -> bool:
    """As int8, but for static inputs: the kernels find the scales of inputs themselves."""
    return place.device.type == "cuda" and form.inputs != "static-int8" and int8.fits(form, place)


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes (padded out, padded in) int8, centred on zero, as `pack_w8` orders them; scales (out,) float32."""
    return {"codes": pack_w8((weight.codes ^ mid_code(8)).view(torch.int8)), "scales": weight.scales.flatten()}


def prepare(held: dict[str, Tensor], form: Form, place: Place) -> None:
    """Compile and load what multiplies the held weight."""
    if form.int8_inputs and place.dtype in launch.DTYPE_NAMES and launch.unavailable(place.device.index) is None:
        name = launch.DTYPE_NAMES[place.dtype]
        prepare_w8(place.device, form.shape[0], held["codes"].shape[1], name, form.activation)


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    return int8.release(_as_int8(held, form), form)


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype; bias and activation come before outputs are rounded to it."""
    if form.int8_inputs:
        return w8_linear(inputs, held["codes"], held["scales"].float(), bias, activation=form.activation)
    return int8.matmul(inputs, _as_int8(held, form), form, bias)


def _as_int8(held: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    """What int8 holds of the same weight."""
    rows, columns = form.shape
    columns += -columns % int8.COLUMN_MULTIPLE
    return {"codes": unpack_w8(held["codes"], rows, columns), "scales": held["scales"]}
