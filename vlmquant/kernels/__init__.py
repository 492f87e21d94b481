"""Matrix products with packed weights. A weight is held once, in the layout chosen for it here.

A layout is a module with four functions: `fits(form, place)`; `hold(weight)`, the buffers that stand for it;
`release(buffers, form)`, the weight again; `matmul(inputs, buffers, form, bias)`. Those of CUDA devices have a fifth,
`prepare(buffers, form, place)`. `reference` defines what all compute.
"""

from types import ModuleType

from torch import Tensor

from vlmquant.kernels import bag4, floats, int4, int8, int8_cuda, vq4, words
from vlmquant.kernels.form import Form, Place

LAYOUTS: dict[str, ModuleType] = {
    "vq4": vq4,
    "int4": int4,
    "bag4": bag4,
    "int8_cuda": int8_cuda,
    "int8": int8,
    "floats": floats,
    "words": words,
}
"""In order of preference."""


ON_CUDA = frozenset({"vq4", "int8_cuda"})
"""Layouts with a `prepare`."""
APPLIES_ACTIVATIONS = frozenset({"int8_cuda"})
"""Layouts whose products of rounded inputs can end with an activation, at no cost: `Form.activation`."""

ROUNDS_INPUTS = frozenset({"int8_cuda", "int8"})
"""Layouts whose `matmul` rounds the inputs as the form says."""


def choose(form: Form, place: Place) -> str:
    """The name of the layout to hold a weight in."""
    return next(name for name, layout in LAYOUTS.items() if layout.fits(form, place))


def prepare(layout: str, held: dict[str, Tensor], form: Form, place: Place) -> None:
    """Compile and load what multiplies a held weight on a GPU, so that a CUDA graph can capture its first product."""
    if layout in ON_CUDA and place.device.type == "cuda":
        LAYOUTS[layout].prepare(held, form, place)
