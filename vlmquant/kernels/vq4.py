"""Codes of up to 4 bits in the layout of our CUDA kernels, on CUDA devices."""

from torch import Tensor

from vlmquant.grid import QuantizedWeight
from vlmquant.kernels.cuda import launch, ops
from vlmquant.kernels.cuda.dispatch import group_fits
from vlmquant.kernels.form import Form, Place
from vlmquant.notices import warn_once
from vlmquant.packing import VQ4_ZERO, order_vq4, pack_vq4, restore_vq4, unpack_vq4, vq4_shape


def fits(form: Form, place: Place) -> bool:
    """On a GPU that our kernels run on; why they do not run on another is logged once."""
    if place.device.type != "cuda" or not packs(form):
        return False
    refused = launch.unavailable(place.device.index)
    if refused is not None:
        warn_once(f"no kernel of ours multiplies 4-bit weights here, which is slow: {refused}")
    return refused is None


def packs(form: Form) -> bool:
    """Whether the layout has these codes, groups and scales, on whatever device."""
    packed = vq4_shape(*form.shape, form.grid.group_size)
    return (
        form.grid.kind == "int"
        and form.grid.bits <= 4
        and form.grid.scale_dtype in launch.DTYPE_NAMES
        and group_fits(packed.group_size, packed.columns)
    )


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes (strips, k-blocks, 4, 32, 4) int32; scales (strips, groups, 4, 8, 2), zeros uint8 likewise."""
    packed = vq4_shape(*weight.shape, weight.grid.group_size)
    held = {
        "codes": pack_vq4(weight.codes, weight.zeros, bits=weight.grid.bits, group_size=weight.grid.group_size),
        "scales": order_vq4(weight.scales.to(weight.grid.scale_dtype), packed, padding=0),
    }
    if weight.zeros is not None:
        held["zeros"] = order_vq4(weight.zeros, packed, padding=VQ4_ZERO)
    return held


def prepare(held: dict[str, Tensor], form: Form, place: Place) -> None:
    """Compile and load what multiplies the held weight; kernels want inputs in the dtype of the scales."""
    if place.dtype == form.grid.scale_dtype:
        packed, name = vq4_shape(*form.shape, form.grid.group_size), launch.DTYPE_NAMES[place.dtype]
        ops.prepare_w4(place.device, packed.rows, packed.columns, packed.group_size, form.grid.symmetric, name)


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    rows, columns = form.shape
    groups = -(-columns // form.grid.group_size)
    return QuantizedWeight(
        unpack_vq4(held["codes"], rows, columns, bits=form.grid.bits, symmetric=form.grid.symmetric),
        restore_vq4(held["scales"], rows, groups).float(),
        restore_vq4(held["zeros"], rows, groups) if "zeros" in held else None,
        form.grid,
    )


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype."""
    group_size = vq4_shape(*form.shape, form.grid.group_size).group_size
    return ops.w4_linear(inputs, held["codes"], held["scales"], held.get("zeros"), bias, form.shape[0], group_size)
