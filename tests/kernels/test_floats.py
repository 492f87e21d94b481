"""FP8 and FP4 on a CPU: values made by shifts, against torch's own float8 and float64."""

import pytest
import torch

from tests import grids
from vlmquant.grid import E2M1, E4M3, Grid, e2m1_values, e4m3_values, round_e4m3_
from vlmquant.kernels import LAYOUTS, choose, floats
from vlmquant.kernels.form import Place, form_of
from vlmquant.recipe import SHORT_SCHEMES

NAMES = ("fp8-dynamic", "fp8-block", "nvfp4a16", "mxfp4a16")
CPU = torch.device("cpu")


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def test_values_of_all_codes_are_those_of_the_formats() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(E4M3).float()
    known = ~theirs.isnan()
    assert torch.equal(bits(e4m3_values(codes) * 2**8)[known], bits(theirs)[known])
    ours = e2m1_values(codes[:16]) * 2**14
    assert torch.equal(bits(ours), bits(torch.tensor([*E2M1, *(-one for one in E2M1)])))


def test_e4m3_rounding_is_that_of_torch() -> None:
    """Over the patterns of all float32 numbers, thinly, and every tie with its neighbours."""
    patterns = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = values[values.isfinite()].sort().values
    ties = (values[1:] + values[:-1]) / 2
    below, above = (torch.nextafter(ties, torch.full_like(ties, way)) for way in (-torch.inf, torch.inf))
    for given in (patterns, values, ties, below, above):
        theirs, ours = given.clamp(-448, 448).to(E4M3).float(), round_e4m3_(given.clone())
        missing = given.isnan()
        assert torch.equal(bits(ours)[~missing], bits(theirs)[~missing])
        assert ours[missing].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_goes_in_and_comes_out(name: str) -> None:
    weight = grids.random(SHORT_SCHEMES[name], 130, 384)
    form = form_of(weight)
    held = floats.hold(weight)
    assert held["codes"].nbytes == weight.codes.numel() * weight.grid.bits // 8
    again = floats.release(held, form)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert again.grid == weight.grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(130, 384), (3000, 256)], ids=str)  # the latter in more than one pass
@pytest.mark.parametrize("name", NAMES)
def test_product_is_that_of_float64(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = grids.random(SHORT_SCHEMES[name], *shape)
    inputs = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
    form = form_of(weight)
    assert choose(form, Place(CPU, dtype)) == "floats"
    held = floats.hold(weight)
    before = {leaf: tensor.clone() for leaf, tensor in held.items()}
    outputs = floats.matmul(inputs, held, form, bias)
    exact = inputs.double() @ weight.dequantize().double().T + bias
    assert outputs.dtype == dtype
    allowed = {torch.bfloat16: 5e-3, torch.float16: 6e-4}.get(dtype, 3e-6)
    assert (outputs.double() - exact).norm() < allowed * exact.norm()
    assert all(torch.equal(tensor, before[leaf]) for leaf, tensor in held.items())


def test_float16_products_do_not_overflow_where_weights_are_small() -> None:
    weight = grids.nearest(torch.full((4, 4096), 1e-3), SHORT_SCHEMES["fp8-dynamic"], torch.float16)
    inputs = torch.full((1, 4096), 100.0, dtype=torch.float16)
    outputs = floats.matmul(inputs, floats.hold(weight), form_of(weight))
    torch.testing.assert_close(outputs.float(), inputs.float() @ weight.dequantize().T, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("bits", "group", "rows", "columns", "layout"),
    [
        (8, 128, 128, 200, "words"),  # the last group is short
        (8, 101, 1, 101, "floats"),  # one group of odd length
        (4, 16, 1, 24, "words"),
        (4, 32, 1, 64, "floats"),
    ],
)
def test_short_groups_stay_in_words(bits: int, group: int, rows: int, columns: int, layout: str) -> None:
    weight = grids.rtn.quantize_weight(torch.randn(8, columns), Grid(bits, group, torch.bfloat16, True, "float", rows))
    form = form_of(weight)
    assert choose(form, Place(CPU, torch.bfloat16)) == layout
    assert choose(form, Place(torch.device("cuda", 0), torch.bfloat16)) == "words"
    inputs = torch.randn(2, columns)
    outputs = LAYOUTS[layout].matmul(inputs, LAYOUTS[layout].hold(weight), form)
    torch.testing.assert_close(outputs, inputs @ weight.dequantize().T, rtol=1e-4, atol=1e-4)
