"""Floating point grids: values by hand, and bytes equal to those of compressed-tensors from float32 weights."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import grids
from vlmquant import grid as grid_module
from vlmquant.algorithms.scales import search_scales
from vlmquant.errors import RecipeError
from vlmquant.formats import compressed_tensors
from vlmquant.grid import E8M0, Grid, grid_of, join_rows, quantize_nearest
from vlmquant.recipe import SHORT_SCHEMES, Scheme, parse_recipe

NAMES = ("fp8-dynamic", "fp8-block", "nvfp4a16", "mxfp4a16")
FP4 = Grid(4, 16, torch.float32, kind="float")
FP8 = Grid(8, 16, torch.float32, kind="float")


def test_fp4_by_hand() -> None:
    """Every midpoint goes to the even code: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4."""
    values = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.26, 1.75, 2.5, 2.51, 3.5, 5.0, 5.01, 99.0])
    rounded = [0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0]
    both = torch.cat((values, -values))
    found = FP4.round_(both.clone(), *FP4.bounds())
    assert found.tolist() == rounded + [-value for value in rounded]
    codes = [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    assert FP4.encode(found).tolist() == codes + [8 + code for code in codes]


@pytest.mark.parametrize("grid", [FP4, FP8], ids=["fp4", "fp8"])
def test_every_code_comes_back(grid: Grid) -> None:
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    codes = codes[grid.decode(codes).isfinite()]
    values = grid.decode(codes)
    assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.round_(values.clone(), *grid.bounds()), values)
    assert len(values.unique()) == len(codes) - 1  # 0 and -0


def test_powers_of_two_by_hand() -> None:
    """A mantissa of 1.75 and more is rounded up: 1.74 -> 1, 1.75 -> 2, 3.49 -> 2, 3.5 -> 4, 3.6 / 8 -> .5."""
    grid = Grid(4, 32, E8M0, kind="float")
    scales = torch.tensor([1.0, 1.74, 1.75, 3.49, 3.5, 0.45, 0.0])
    assert grid.round_scales(scales).tolist() == [1.0, 1.0, 2.0, 2.0, 4.0, 0.5, 2.0**-127]
    assert grid.store_scales(scales).view(torch.uint8).tolist() == [127, 127, 128, 128, 129, 126, 0]


def by_the_library(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """What compressed-tensors writes for a float32 weight."""
    found = QuantizationScheme.model_validate(compressed_tensors._group(scheme, ["re:.*"]))
    args, rows, columns = found.weights, *weight.shape
    height, width = scheme.group_rows, scheme.group_size or columns
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    divisor = generate_gparam(weight.amin(), weight.amax()) if scheme.scales == "e4m3" else None
    scales, _ = calculate_qparams(low, high, args, divisor)
    state = {"weight": weight, "weight_scale": scales}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    compressor = BaseCompressor.get_value_from_registry(compressed_tensors.storage_format(scheme))
    return compressor.compress(state, found)


def octets(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 200), groups=st.integers(1, 3), seed=st.integers(0, 2**20), spread=st.floats(0, 4))
def test_bytes_are_those_of_the_library(name: str, rows: int, groups: int, seed: int, spread: float) -> None:
    scheme, random = SHORT_SCHEMES[name], torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * (scheme.group_size or 48), generator=random)
    weight *= torch.exp(spread * torch.randn(rows, 1, generator=random)) * 0.02
    weight[torch.rand(weight.shape, generator=random) < 0.05] = 0
    ours = compressed_tensors.encode("m", grids.nearest(weight, scheme, torch.float32), scheme)
    theirs = by_the_library(weight, scheme)
    assert {name.removeprefix("m.") for name in ours} == theirs.keys()
    for leaf, tensor in theirs.items():
        assert ours[f"m.{leaf}"].dtype == tensor.dtype, leaf
        assert torch.equal(octets(ours[f"m.{leaf}"]), octets(tensor)), leaf


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_zeros_are_those_of_the_library(name: str) -> None:
    scheme = SHORT_SCHEMES[name]
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    weight[:128, :128] = 0
    weight[3] = 0
    ours = grids.nearest(weight, scheme, torch.float32)
    assert (ours.dequantize()[weight == 0] == 0).all()
    theirs = by_the_library(weight, scheme)
    for leaf, tensor in compressed_tensors.encode("m", ours, scheme).items():
        assert torch.equal(octets(tensor), octets(theirs[leaf.removeprefix("m.")])), leaf


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", ["mse", "weighted"])
def test_the_search_lowers_what_it_minimises(name: str, search: str) -> None:
    scheme, random = SHORT_SCHEMES[name], torch.Generator().manual_seed(1)
    weight, mean_square = torch.randn(192, 256, generator=random), torch.rand(256, generator=random) + 0.1
    grid = grid_of(scheme, 256, torch.bfloat16).fitted(weight)
    searched = quantize_nearest(weight, *search_scales(weight, mean_square, grid, search=search), grid)
    importance, power = (mean_square, 3) if search == "weighted" else (torch.ones(256), 2)

    def loss(found: Tensor) -> float:
        return ((found - weight).abs().double().pow(power) * importance).sum().item()

    plain = grids.nearest(weight, scheme)
    assert loss(searched.dequantize()) < loss(plain.dequantize()) * (0.9 if name == "nvfp4a16" else 1)
    blocks = searched.scales[:128] if grid.group_rows > 1 else searched.scales[:1]
    assert (blocks == blocks[0]).all()
    stored = compressed_tensors.encode("m", searched, scheme)
    again = compressed_tensors.decode("m", stored.__getitem__, scheme)
    assert torch.equal(again.dequantize(), searched.dequantize())


def test_the_search_of_powers_of_two_is_exhaustive() -> None:
    """Against every power of two near the largest magnitude, in float64."""
    scheme, weight = SHORT_SCHEMES["mxfp4a16"], torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    grid = grid_of(scheme, 32, torch.bfloat16)
    searched = quantize_nearest(weight, *search_scales(weight, None, grid, search="mse"), grid)
    best = torch.full((64,), torch.inf, dtype=torch.float64)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    for exponent in range(-6, 4):
        near = (weight.double().abs()[..., None] / 2.0**exponent - values).abs().amin(-1) * 2.0**exponent
        best = torch.minimum(best, near.square().sum(1))
    found = (searched.dequantize().double() - weight.double()).square().sum(1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


def test_fp8_is_rounded_as_by_the_dtype() -> None:
    """All values of E4M3, all midpoints between them and their neighbours in float32, zeros of both signs."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(FP8.decode(codes)[values.isfinite()], values[values.isfinite()])
    assert FP8.decode(codes)[~values.isfinite()].isnan().all()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    exact = torch.cat((values, middles, torch.tensor([-0.0, 1e-30, -1e-30, 500.0, -1e9])))
    inputs = torch.cat((exact, exact.nextafter(exact + 1), exact.nextafter(exact - 1)))
    wanted = inputs.clamp(-448, 448).to(torch.float8_e4m3fn)
    rounded = FP8.round_(inputs.clone(), *FP8.bounds())
    assert torch.equal(rounded, wanted.float())
    assert torch.equal(rounded.signbit(), wanted.float().signbit())
    assert torch.equal(FP8.nearest(inputs.clone()), wanted.view(torch.uint8))


def test_fp4_codes_by_their_table() -> None:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(FP4.encode(table), codes)
    assert torch.equal(FP4.decode(codes), table)
    assert torch.equal(FP4.decode(codes).signbit(), table.signbit())
    assert FP4.nearest(torch.tensor([-0.2, 0.2])).tolist() == [8, 0]


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_chunks_are_the_rows_as_a_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = torch.randn(200, 256), SHORT_SCHEMES[name]

    def quantized() -> tuple[Tensor, Tensor, Tensor, float]:
        grid = grid_of(scheme, 256, torch.bfloat16).fitted(weight)
        found = quantize_nearest(weight, *search_scales(weight, None, grid, search="minmax"), grid)
        return found.codes, found.scales, found.dequantize(), found.relative_error(weight)

    *whole, error = quantized()
    monkeypatch.setattr(grid_module, "CHUNK_ELEMENTS", 7 * 256)
    *chunks, same = quantized()
    assert all(map(torch.equal, whole, chunks))
    assert same == pytest.approx(error)
    lost = (whole[2].double() - weight.double()).square().sum() / weight.double().square().sum()
    assert error == pytest.approx(float(lost))


def test_an_error_beyond_float32_is_counted() -> None:
    weight = torch.full((2, 32), 3e25)
    weight[0, 0] = -1e25
    grid = grid_of(SHORT_SCHEMES["fp8-dynamic"], 32, torch.float32)
    found = quantize_nearest(weight, *search_scales(weight, None, grid, search="minmax"), grid)
    assert 0 <= found.relative_error(weight) < 1e-3


def test_weights_that_share_inputs_share_the_global_scale() -> None:
    scheme = SHORT_SCHEMES["nvfp4a16"]
    small, large = torch.randn(16, 32), torch.randn(16, 32) * 50
    grid = grid_of(scheme, 32, torch.bfloat16).fitted(small, large)
    assert grid.global_scale == pytest.approx(448 * 6 / large.abs().max().item())
    assert grid_of(scheme, 32, torch.bfloat16).fitted(small).global_scale != grid.global_scale
    found = [quantize_nearest(one, *search_scales(one, None, grid, search="mse"), grid) for one in (small, large)]
    whole = join_rows(found)
    assert (whole.dequantize() - torch.cat((small, large))).norm() < 0.12 * large.norm()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{type: float, bits: 8, group_size: 64}", "nobody stores"),
        ("{type: float, bits: 6}", "nobody stores"),
        ("{type: float, bits: 4, group_size: 16}", "nobody stores"),
        ("{type: float, bits: 8, group_size: null, symmetric: false}", "nobody stores"),
        ("{bits: 4, group_rows: 2}", "group_rows: 1"),
        ("{bits: 4, scales: e8m0}", "scales: model"),
        ("{bits: 4, group_size: 64, activations: dynamic-fp8}", "group_size: 128"),
        ("{type: float, bits: 8, group_size: null, activations: dynamic-int8}", "type: int"),
        ("{bits: 4, activations: static-int8}", "static-int8 activations need type: int, bits: 8"),
        ("{bits: 8, group_size: null, activations: static-fp8}", "fp8-static"),
        ("{type: float, bits: 8, group_rows: 128, activations: static-fp8}", "do not go with"),
        ("{type: float, bits: 8, group_size: null, activations: dynamic-fp8-g128}", "do not go with"),
        ("{bits: 8, group_size: null, activations: dynamic-fp8-g128}", "schemes fp8-block, fp8-static"),
    ],
)
def test_what_no_file_holds_is_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(f"version: 1\nname: x\ncomponents: {{language: {{scheme: {text}}}}}\n", name="x.yaml")
