"""Matrix products with packed weights. A weight is held once, in the layout chosen for it here.

A layout is a module with four functions: `fits(form, place)`; `hold(weight)`, the buffers that stand for it;
`release(buffers, form)`, the weight again; `matmul(inputs, buffers, form, bias)`. Those of CUDA devices have a fifth,
`prepare(buffers, form, place)`; those of compiled loops `bind(buffers, form)`, a function of inputs and bias that does
the same as `matmul`, for as long as the buffers and their memory stay. `reference` defines what all compute.
"""

from types import ModuleType

from torch import Tensor

from vlmquant.kernels import bag4, floats, fp8_cuda, int4, int8, int8_cuda, int8_onednn, vq4, words
from vlmquant.kernels.form import Form, Place
from vlmquant.notices import tell_once, warn_once

LAYOUTS: dict[str, ModuleType] = {
    "vq4": vq4,
    "int4": int4,
    "bag4": bag4,
    "fp8_cuda": fp8_cuda,
    "int8_cuda": int8_cuda,
    "int8_onednn": int8_onednn,
    "int8": int8,
    "floats": floats,
    "words": words,
}
"""In order of preference."""


EXPANDS = frozenset({"floats", "words"})
"""Layouts whose weights become floats at every product."""
HAS_KERNEL = frozenset({"vq4", "fp8_cuda", "int8_cuda"})
"""Layouts that a GPU multiplies as they are."""
BINDS = frozenset({"int4", "int8_onednn", "int8"})
"""Layouts with a `bind`."""
ON_CUDA = frozenset({"vq4", "int8_cuda"})
"""Layouts with a `prepare`."""
OPAQUE = {"int8_onednn": "int8"}
"""Layouts of tensors that torch can neither copy nor save, and which layout holds the same meanwhile."""
APPLIES_ACTIVATIONS = frozenset({"int8_cuda"})
"""Layouts whose products of rounded inputs can end with an activation, at no cost: `Form.activation`."""

ROUNDS_INPUTS = frozenset({"fp8_cuda", "int8_cuda", "int8_onednn", "int8"})
"""Layouts whose `matmul` rounds the inputs as the form says."""


def choose(form: Form, place: Place) -> str:
    """The name of the layout to hold a weight in.

    What is expanded at every product for want of a kernel is logged, once for each kind of weight: as a warning on a
    GPU, where it is slow.
    """
    chosen = next(name for name, layout in LAYOUTS.items() if layout.fits(form, place))
    if place.device.type == "cuda" and chosen not in HAS_KERNEL:
        warn_once(
            f"no kernel multiplies {form.kind} on a GPU as they are: they are expanded at every call, which is slow"
        )
    elif place.device.type == "cpu" and chosen in EXPANDS:
        tell_once(f"{form.kind} become floats at every call")
    return chosen


def nbytes(held: dict[str, Tensor]) -> int:
    """Bytes of memory that a held weight takes."""
    return sum(int8_onednn.nbytes(tensor) if tensor.is_mkldnn else tensor.nbytes for tensor in held.values())


def prepare(layout: str, held: dict[str, Tensor], form: Form, place: Place) -> None:
    """Compile and load what multiplies a held weight on a GPU, so that a CUDA graph can capture its first product."""
    if layout in ON_CUDA and place.device.type == "cuda":
        LAYOUTS[layout].prepare(held, form, place)
