"""Every layout against float64, over shapes that fit it and shapes that do not."""

import pytest
import torch
from torch import Tensor

from vlmquant.grid import QuantizedWeight, minmax_grid, quantize_nearest
from vlmquant.kernels import LAYOUTS, choose, int4, int8
from vlmquant.kernels.form import form_of
from vlmquant.kernels.reference import activation_codes

RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Of the output's norm. bfloat16 keeps 8 bits: half a unit of 2**-8 for the weight and as much for the output."""

# rows, columns, bits, group size, symmetric, dtype of the scales, and the layout expected
CASES = [
    (64, 128, 4, 128, True, torch.bfloat16, "int4"),
    (192, 256, 4, 64, False, torch.bfloat16, "int4"),
    (1100, 64, 4, 32, True, torch.bfloat16, "int4"),  # more than one pass of 512 rows, the last tile padded
    (70, 256, 4, 128, False, torch.float16, "int4"),
    (130, 96, 3, 32, True, torch.bfloat16, "int4"),
    (64, 512, 4, 512, False, torch.bfloat16, "int4"),  # one group, which the op gets in two halves
    (96, 384, 3, 384, True, torch.float32, "int4"),
    (33, 100, 4, 20, True, torch.bfloat16, "words"),  # the op has no groups of 20
    (64, 64, 4, 16, False, torch.bfloat16, "words"),
    (17, 130, 4, 128, True, torch.bfloat16, "words"),  # a short last group
    (600, 64, 8, 32, False, torch.bfloat16, "words"),
    (96, 64, 8, 64, True, torch.bfloat16, "int8"),
    (700, 101, 8, 101, True, torch.float16, "int8"),
    (5, 1, 8, 1, True, torch.bfloat16, "int8"),
]


def packed(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    scales, zeros = minmax_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    return quantize_nearest(
        weight, scales, None if symmetric else zeros, bits=bits, group_size=group_size, scale_dtype=scale_dtype
    )


def tokens(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_is_chosen_by_shape(case: tuple) -> None:
    assert choose(packed(*case[:-1])) == case[-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_release_inverts_hold(case: tuple) -> None:
    weight = packed(*case[:-1])
    layout = LAYOUTS[case[-1]]
    released = layout.release(layout.hold(weight), form_of(weight, dynamic_int8=False))
    assert torch.equal(released.codes, weight.codes)
    assert torch.equal(released.scales, weight.scales)
    assert (weight.zeros is None and released.zeros is None) or torch.equal(released.zeros, weight.zeros)
    assert (released.bits, released.group_size, released.scale_dtype) == (
        weight.bits,
        weight.group_size,
        weight.scale_dtype,
    )


@pytest.fixture(autouse=True)
def _every_way_has_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four tokens go to what is meant for few, on whatever machine this runs."""
    monkeypatch.setattr(int4, "_op_tokens", lambda threads: 4)
    monkeypatch.setattr(int4, "_code_tokens", lambda threads: 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 150])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_is_that_of_float64(case: tuple, count: int, dtype: torch.dtype) -> None:
    weight = packed(*case[:-1])
    layout, inputs = LAYOUTS[case[-1]], tokens(count, weight.shape[1], dtype)
    found = layout.matmul(inputs, layout.hold(weight), form_of(weight, dynamic_int8=False))
    assert found.dtype == dtype
    assert relative(found, inputs.double() @ weight.dequantize().double().T) < RELATIVE_ERROR[dtype]


def test_all_ways_through_int4_tiles_agree() -> None:
    for symmetric in (True, False):
        weight = packed(128, 256, 4, 64, symmetric, torch.bfloat16)
        held, form, inputs = int4.hold(weight), form_of(weight, dynamic_int8=False), tokens(5, 256, torch.bfloat16)
        exact = inputs.double() @ weight.dequantize().double().T
        for product in (int4._op_matmul(inputs, held), int4._tile_matmul(inputs, held, form)):
            assert relative(product, exact) < RELATIVE_ERROR[torch.bfloat16]
        for multiply in (int4._code_matmul, int4._tile_matmul):
            assert relative(multiply(inputs.float(), held, form), exact) < RELATIVE_ERROR[torch.float32]


def test_a_weight_is_held_once() -> None:
    weight = packed(1024, 1024, 4, 128, True, torch.bfloat16)
    held = sum(tensor.nbytes for tensor in int4.hold(weight).values())
    codes, table = 1024 * 1024 // 2, 1024 * 8 * 2 * 2
    assert held == codes + table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integers", [True, False])
def test_dynamic_int8_multiplies_the_rounded_inputs(
    dtype: torch.dtype, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_integers_win", lambda threads, dtype: integers)
    weight, inputs = packed(96, 128, 8, 128, True, torch.bfloat16), tokens(9, 128, dtype)
    codes, scales = activation_codes(inputs)
    exact = (codes.double() * scales.double()) @ weight.dequantize().double().T
    found = int8.matmul(inputs, int8.hold(weight), form_of(weight, dynamic_int8=True))
    assert relative(found, exact) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("columns", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("dynamic", [True, False])
def test_int8_rows_that_torch_cannot_multiply_are_right_all_the_same(columns: int, dynamic: bool) -> None:
    weight, inputs = packed(12, columns, 8, columns, True, torch.bfloat16), tokens(3, columns, torch.bfloat16)
    values = inputs.double()
    if dynamic:
        codes, scales = activation_codes(inputs)
        values = codes.double() * scales.double()
    found = int8.matmul(inputs, int8.hold(weight), form_of(weight, dynamic_int8=dynamic))
    assert relative(found, values @ weight.dequantize().double().T) < RELATIVE_ERROR[torch.bfloat16]


def test_tiles_are_left_alone_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "_tile_shape", lambda: None)
    assert choose(packed(64, 128, 4, 128, True, torch.bfloat16)) == "words"


def test_an_unknown_tile_order_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    convert = int4._convert
    monkeypatch.setattr(int4, "_convert", lambda codes: convert(codes[rows]))
    assert int4._tile_shape.__wrapped__() is None
