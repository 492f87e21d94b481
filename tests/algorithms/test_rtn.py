"""Round to nearest: properties that hold for every weight, and numbers worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import grids
from vlmquant.algorithms import rtn
from vlmquant.grid import SCALE_FLOOR, expand_groups, mid_code, quantize_codes
from vlmquant.recipe import Scheme

SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([3, 4, 8]),
    group_size=st.sampled_from([None, 16, 32]),
    symmetric=st.booleans(),
)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(scheme=SCHEMES, shape=SHAPES, seed=st.integers(0, 2**16), size=st.floats(1e-2, 1e3))
def test_error_is_at_most_half_a_scale_inside_the_range(
    scheme: Scheme, shape: tuple[int, int], seed: int, size: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    quantized = grids.nearest(weight, scheme)
    wide = {"group_size": quantized.grid.group_size, "columns": shape[1]}
    scales = expand_groups(quantized.scales, **wide)
    middle = torch.full_like(quantized.scales, mid_code(scheme.bits))
    zeros = expand_groups(middle if quantized.zeros is None else quantized.zeros.float(), **wide)
    inside = (weight >= -zeros * scales) & (weight <= (2**scheme.bits - 1 - zeros) * scales)
    error = (quantized.dequantize() - weight).abs()
    assert (error <= scales * (0.5 + 1e-4))[inside].all()
    # Outside lie only the ends, by at most half a step and what rounding the scale to bfloat16 (2**-8) costs.
    assert (error <= scales * (0.5 + 1.5 * 2**scheme.bits * 2**-8)).all()


@settings(max_examples=40, deadline=None)
@given(scheme=SCHEMES, shape=SHAPES, seed=st.integers(0, 2**16))
def test_quantizing_what_was_quantized_changes_nothing(scheme: Scheme, shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    first = grids.nearest(weight, scheme, torch.float16)
    again = quantize_codes(first.dequantize(), first.scales, first.zeros, first.grid)
    assert torch.equal(again, first.codes)


@settings(max_examples=40, deadline=None)
@given(scheme=SCHEMES, shape=SHAPES, seed=st.integers(0, 2**16), keep=st.floats(0, 1))
def test_zero_is_exact(scheme: Scheme, shape: tuple[int, int], seed: int, keep: float) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * (torch.rand(shape, generator=random) < keep)
    quantized = grids.nearest(weight, scheme)
    assert (quantized.dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_survives(symmetric: bool) -> None:
    weight = torch.ones(2, 32)
    weight[:, 16:] = 0
    scheme = Scheme(bits=4, group_size=16, symmetric=symmetric)
    quantized = grids.nearest(weight, scheme, torch.float16)
    assert quantized.scales[:, 1].tolist() == [SCALE_FLOOR] * 2
    assert (quantized.dequantize()[:, 16:] == 0).all()


def test_numbers_worked_by_hand() -> None:
    weight = torch.tensor([[-1.5, -0.3, 0.11, 1.0]])
    symmetric = grids.nearest(weight, Scheme(bits=4, group_size=None), torch.float32)
    assert symmetric.scales.item() == pytest.approx(0.2)  # 1.5 / 7.5
    assert symmetric.codes.tolist() == [[0, 6, 9, 13]]  # 8 + (-7.5 -> -8, -1.5 -> -2, 0.55 -> 1, 5)
    scheme = Scheme(bits=4, group_size=None, symmetric=False)
    asymmetric = grids.nearest(weight, scheme, torch.float32)
    assert asymmetric.scales.item() == pytest.approx(2.5 / 15)
    assert asymmetric.zeros is not None
    assert asymmetric.zeros.tolist() == [[9]]
    assert asymmetric.codes.tolist() == [[0, 7, 10, 15]]  # 9 + (-9, -1.8 -> -2, 0.66 -> 1, 6)


def test_stage_is_quantized_weight_by_weight(make_stage, make_weight) -> None:
    stage = make_stage({"a": make_weight(3, 32), "b": make_weight(5, 32, seed=2)}, Scheme(bits=4, group_size=16))
    quantized = rtn.quantize_stage(stage)
    assert {name: weight.shape for name, weight in quantized.items()} == {"a": (3, 32), "b": (5, 32)}
