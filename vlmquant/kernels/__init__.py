"""Matrix products with packed weights. A weight is held once, in the layout chosen for it here.

A layout is a module with four functions: `fits(weight)`; `hold(weight)`, the buffers that stand for it;
`release(buffers, form)`, the weight again; `matmul(inputs, buffers, form)`. `reference` defines what all compute.
"""

from types import ModuleType

from vlmquant.grid import QuantizedWeight
from vlmquant.kernels import int4, int8, int8_cuda, vq4, words

LAYOUTS: dict[str, ModuleType] = {
    "vq4": vq4,
    "int4": int4,
    "int8_cuda": int8_cuda,
    "int8": int8,
    "words": words,
}
"""In order of preference."""
ADD_BIAS = frozenset({"int8_cuda"})
"""Layouts whose `matmul` takes a bias too, as its last argument."""


def choose(weight: QuantizedWeight) -> str:
    """The name of the layout to hold this weight in, on the device where its codes lie."""
    return next(name for name, layout in LAYOUTS.items() if layout.fits(weight))
