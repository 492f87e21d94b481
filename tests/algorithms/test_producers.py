"""Which channel scales a linear in front can take without rounding what it stores."""

from types import SimpleNamespace

import torch

from tests import grids
from vlmquant.grid import SCALE_FLOOR
from vlmquant.recipe import SHORT_SCHEMES, Scheme
from vlmquant.stream import Block


def block_with(quantized, value=None):
    """A block of which only the producer `up` exists."""
    block = Block.__new__(Block)
    block.info, block.quantized, block.changed = SimpleNamespace(name="b"), quantized, {}
    block.stream = SimpleNamespace(read=lambda name: value)
    return block


def test_a_quantized_producer_takes_what_leaves_scales_above_the_smallest() -> None:
    weight = torch.full((3, 16), 0.05)
    weight[1] = SCALE_FLOOR * 7.5 * 4  # scale: four times the smallest
    quantized = grids.nearest(weight, Scheme(bits=4, group_size=16))
    block = block_with({"b.up.weight": quantized})
    assert block.divides("up", torch.tensor([8.0, 8.0, 0.125])).tolist() == [True, False, True]
    assert block.divides("up", torch.tensor([8.0, 4.0, 3.0])).tolist() == [True, True, True]


def test_scales_of_few_bits_are_divided_by_powers_of_two_alone() -> None:
    """Those of NVFP4, of which a third is no number that they can be stored as."""
    quantized = grids.nearest(torch.linspace(-1, 1, 192).view(3, 64), SHORT_SCHEMES["nvfp4a16"])
    block = block_with({"b.up.weight": quantized})
    assert block.divides("up", torch.tensor([3.0, 2.0, 1.0])).tolist() == [False, True, True]


def test_a_float16_producer_must_not_overflow() -> None:
    value = torch.tensor([[1.0, -3.0], [40000.0, 1.0], [2.0**-24, 1.0]], dtype=torch.float16)
    block = block_with({}, value)
    assert block.divides("up", torch.full((3,), 0.5)).tolist() == [True, False, True]
    assert block.divides("up", torch.full((3,), 2.0)).tolist() == [True, True, False]
