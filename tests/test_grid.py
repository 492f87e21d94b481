"""The integer grid against numbers worked by hand and its own definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmquant.grid import SCALE_FLOOR, Grid, QuantizedWeight, minmax_grid, quantize_nearest


def nearest(
    weight: torch.Tensor, *, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    grid = Grid(bits, group_size, dtype, symmetric)
    return quantize_nearest(weight, *minmax_grid(weight, grid), grid)


def test_symmetric_codes_by_hand() -> None:
    # max|w| = 1.5, scale = 1.5 / 7.5 = 0.2: w / 0.2 = -7.5 (half to even: -8), -2.5 (-2), 0, 7.5 (8, clamped to 7)
    weight = torch.tensor([[-1.5, -0.5, 0.0, 1.5]], dtype=torch.float64).float()
    quantized = nearest(weight, bits=4, group_size=4, symmetric=True)
    assert quantized.scales.item() == pytest.approx(0.2)
    assert quantized.codes.tolist() == [[0, 6, 8, 15]]
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([[-1.6, -0.4, 0.0, 1.4]]))


def test_asymmetric_codes_by_hand() -> None:
    # range -1 .. 2, scale = 3 / 15 = 0.2, zero = round(1 / 0.2) = 5
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    quantized = nearest(weight, bits=4, group_size=4, symmetric=False)
    assert quantized.zeros is not None
    assert quantized.zeros.tolist() == [[5]]
    assert quantized.codes.tolist() == [[0, 5, 7, 15]]
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([[-1.0, 0.0, 0.4, 2.0]]))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 4, 8]),
    st.sampled_from([4, 16, 40]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rounding_moves_no_weight_by_more_than_a_code(
    seed: int, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 37, generator=generator) * 10 ** torch.randn(5, 1, generator=generator)
    weight[:, 3] = 0
    quantized = nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    scales = quantized.scales.repeat_interleave(group_size, 1)[:, :37]
    error = (quantized.dequantize() - weight).abs()
    # Half a code inside the range; the extremes may lie up to a code outside of what rounding the scale left of it.
    slack = 2.0 ** -torch.finfo(dtype).bits if dtype == torch.float32 else torch.finfo(dtype).eps * 2**bits
    assert (error <= scales * (1.0 + slack)).all()
    assert (quantized.dequantize()[:, 3] == 0).all()
    assert torch.equal(quantized.scales.to(dtype).float(), quantized.scales)


def test_groups_of_zeros_and_constants_survive() -> None:
    weight = torch.tensor([[0.0] * 4 + [0.25] * 4])
    for symmetric in (True, False):
        quantized = nearest(weight, bits=4, group_size=4, symmetric=symmetric, dtype=torch.float16)
        assert torch.equal(quantized.dequantize()[:, :4], torch.zeros(1, 4))
        torch.testing.assert_close(quantized.dequantize()[:, 4:], weight[:, 4:], rtol=0.07, atol=0)
        assert (quantized.scales > 0).all()


def test_scales_stay_inside_their_dtype() -> None:
    scales = Grid(4, 4, torch.float16).round_scales(torch.tensor([0.0, 1e-30, 1e30]))
    assert scales.tolist() == [SCALE_FLOOR, SCALE_FLOOR, 65504.0]


def test_scaled_rows_are_the_weight_times_the_factors() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    quantized = nearest(weight, bits=4, group_size=4, symmetric=True)
    factors = torch.tensor([0.5, 1.0, 2.0, 4.0])
    torch.testing.assert_close(quantized.scale_rows(factors).dequantize(), quantized.dequantize() * factors[:, None])


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"need \(2, 2\)"):
        QuantizedWeight(codes, torch.ones(2, 3), None, Grid(4, 4, torch.float32))
    with pytest.raises(TypeError, match="codes must be uint8"):
        QuantizedWeight(codes.int(), torch.ones(2, 2), None, Grid(4, 4, torch.float32))
