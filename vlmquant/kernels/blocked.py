"""bfloat16 weights in the blocks that oneDNN multiplies, written there straight from codes, so that it packs nothing.

For a product of bfloat16 oneDNN packs the weight, at every call, into blocks of rows in which pairs of columns lie side
by side. To make a weight of 4-bit codes in that form takes about as long as that packing: with some hundred tokens its
product takes about as long as that of a dense weight.

A weight is (rows / block, columns / 2, block, 2). How many rows a block has depends on the CPU: `rows_of_block` asks.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmquant.kernels.form import rows_at_once
from vlmquant.kernels.probe import measured

AT_ONCE = 1 << 23
"""Values that are made before they are multiplied: each hand-over from one to the other costs."""
ROOMS = 8
"""Weights, of as many shapes, whose memory a thread keeps to make the next ones in."""
MANY_TOKENS = 256
"""Blocks can depend on how many tokens oneDNN is told to expect."""
BLOCKS = (16, 32, 48, 64)
PROBE_SHAPE = (192, 64)
"""Outputs and inputs of a weight that has whole blocks of all these."""


class Room:
    """A weight of any values, and its memory as numpy sees it: (blocks, columns / 2, block) uint32."""

    def __init__(self, weight: Tensor, columns: int, block: int) -> None:
        self.weight = weight
        self.words = _memory(weight, np.uint32).reshape(-1, columns // 2, block)


class _Rooms(threading.local):
    """A thread's own, by shape; the one that was not used for longest goes first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[int, int], Room | None] = OrderedDict()


_rooms = _Rooms()


def room(rows: int, columns: int) -> Room | None:
    """Where a weight of this shape can be made; None where oneDNN does not pack it as `rows_of_block` says."""
    kept, key = _rooms.kept, (rows, columns)
    if key not in kept:
        block = rows_of_block()
        weight = None if block is None else _packed_as_told(rows, columns, block)
        kept[key] = None if block is None or weight is None else Room(weight, columns, block)
        while len(kept) > ROOMS:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def multiply(
    inputs: Tensor, shape: tuple[int, int], multiple: int, make: Callable[[slice, Any], None]
) -> Tensor | None:
    """inputs (tokens, in) bfloat16 times a weight of `shape` (out, in) -> (tokens, out); None if it has no such blocks.

    make(rows, words): some rows of the weight, a multiple of `multiple` of them, into the words of their blocks.
    """
    rows, columns = shape
    at_once = min(rows_at_once(columns, AT_ONCE, multiple=multiple), rows)
    if room(at_once, columns) is None or (rows % at_once and room(rows % at_once, columns) is None):
        return None
    parts = []
    for start in range(0, rows, at_once):
        some = slice(start, min(start + at_once, rows))
        place = room(some.stop - start, columns)
        assert place is not None, "seen above"
        make(some, place.words)
        parts.append(_product(inputs, place.weight))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@measured
def rows_of_block() -> int | None:
    """None if oneDNN has no such blocks for bfloat16 here, or torch does not show them."""
    try:
        return next((block for block in BLOCKS if _packed_as_told(*PROBE_SHAPE, block) is not None), None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def _packed_as_told(rows: int, columns: int, block: int) -> Tensor | None:
    """A packed weight of this shape, of some numbers; None unless it has such blocks, and nothing else."""
    if rows % block or columns % 2:
        return None
    numbers = (torch.arange(rows * columns) * 40503 % 16381).to(torch.int16).view(rows, columns)  # finite as bfloat16
    packed = _pack(numbers.view(torch.bfloat16))
    if torch.ops.mkldnn._nbytes(packed) != 2 * rows * columns:
        return None
    expected = numbers.view(-1, block, columns // 2, 2).transpose(1, 2).reshape(-1)
    return packed if np.array_equal(_memory(packed, np.int16), expected.numpy()) else None


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, MANY_TOKENS)
    return packed


def _memory(packed: Tensor, dtype: Any) -> Any:
    """What lies in a packed tensor, which has to outlive it."""
    count = int(torch.ops.mkldnn._nbytes(packed)) // np.dtype(dtype).itemsize
    pointer = ctypes.cast(torch.ops.mkldnn.data_ptr(packed), ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype)))
    return np.ctypeslib.as_array(pointer, (count,))


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return product
