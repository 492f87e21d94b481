"""8-bit codes with one scale per output channel, held as oneDNN packs them for its product of int8 and int8.

That product is the fastest there is on CPUs with AMX, and packs no weight at every call. On others oneDNN has only its
plain reference for it: `fits` measures. The packed weight is a tensor without a storage, which torch can neither copy
nor save: PackedRows holds it as int8 does meanwhile.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vlmquant import compiled
from vlmquant.grid import QuantizedWeight
from vlmquant.kernels import int8, loops
from vlmquant.kernels.form import Form, Place, Product
from vlmquant.kernels.probe import fastest, measured, seconds

PROBE_SHAPE = (256, 1024, 1024)
"""Tokens, outputs and inputs of the probe: an image has hundreds of tokens. For few, all ways take about as long."""
SMALL_SECONDS = 1e-3
"""The product of int8.extreme_codes takes some microseconds, by oneDNN's reference several milliseconds; it would take
seconds for the probe."""


def fits(form: Form, place: Place) -> bool:
    return (
        form.int8_inputs
        and place.device.type == "cpu"
        and place.dtype != torch.float64
        and int8.fits(form, place)
        and _wins()
    )


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """packed, of int8's codes (out, padded in); scales (out,) float32."""
    held = int8.hold(weight)
    return {"packed": _pack(held["codes"]), "scales": held["scales"]}


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    return int8.release(as_int8(held), form)


def as_int8(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """What int8 holds of the same weight."""
    return {"codes": _unpack(held["packed"]), "scales": held["scales"]}


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype; bias is added before outputs are rounded to it."""
    if not loops.usable(inputs):
        return int8.matmul(inputs, as_int8(held), form, bias)
    outputs: Tensor = torch.ops.vlmquant.rounded_linear(
        inputs, held["packed"], held["scales"].float(), bias, form.input_scale, "onednn"
    )
    return outputs


def bind(held: dict[str, Tensor], form: Form) -> Product:
    """`matmul`, with what depends on the weight alone worked out."""
    by_loops = loops.rounded_product(held["packed"], held["scales"].float(), form.input_scale, "onednn")

    def multiply(inputs: Tensor, bias: Tensor | None) -> Tensor:
        return by_loops(inputs, bias) if loops.usable(inputs) else matmul(inputs, held, form, bias)

    return multiply


def nbytes(packed: Tensor) -> int:
    """Bytes of memory that a packed tensor takes."""
    return int(torch.ops.mkldnn._nbytes(packed))


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def _unpack(packed: Tensor) -> Tensor:
    return packed.to_dense().T.contiguous()


@measured
def _wins() -> bool:
    """Whether there are such tensors here, and their product is the fastest."""
    if not compiled.available() or not is_right():
        return False
    rounded, extreme = int8.extreme_codes()
    packed = _pack(extreme)
    if seconds(lambda: loops.onednn_sums(rounded, packed)) > SMALL_SECONDS:
        return False
    return fastest({way: _product(way) for way in loops.PRODUCTS}) == "onednn"


@measured
def is_right() -> bool:
    """Whether torch has the operators here, they are exact, and what they pack can be unpacked."""
    rounded, extreme = int8.extreme_codes()
    all_codes = torch.arange(64 * 128).remainder(255).sub(127).to(torch.int8).view(64, 128)
    try:
        found, unpacked = loops.onednn_sums(rounded, _pack(extreme)), _unpack(_pack(all_codes))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(found.double(), rounded.double() @ extreme.double().T) and torch.equal(unpacked, all_codes)


def _product(way: str) -> Callable[[], Tensor]:
    tokens, rows, columns = PROBE_SHAPE
    rounded, codes = (torch.ones(count, columns, dtype=torch.int8) for count in (tokens, rows))
    weight = _pack(codes) if way == "onednn" else codes
    return lambda: loops.PRODUCTS[way](rounded, weight)
