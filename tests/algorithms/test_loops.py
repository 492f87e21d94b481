"""The compiled loops against what torch does in their place."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmquant import compiled
from vlmquant.algorithms import gptq, loops, scales
from vlmquant.algorithms.factor import factorize
from vlmquant.grid import Grid, quantize_nearest

GRIDS = {
    "w2": Grid(2, 16, torch.bfloat16),
    "w3-asym": Grid(3, 32, torch.float16, symmetric=False),
    "w4": Grid(4, 32, torch.bfloat16),
    "w4-asym": Grid(4, 16, torch.float32, symmetric=False),
    "w8": Grid(8, 1000, torch.bfloat16),
    "nvfp4": Grid(4, 16, torch.float8_e4m3fn, kind="float", global_scale=900.0),
    "mxfp4": Grid(4, 32, torch.float8_e8m0fnu, kind="float"),
    "fp8": Grid(8, 64, torch.float32, kind="float"),
    "fp8-rows": Grid(8, 1000, torch.bfloat16, kind="float"),
    "fp8-blocks": Grid(8, 32, torch.float32, kind="float", group_rows=16),
}


def both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """With the loops, and with torch."""
    assert compiled.available()
    with pytest.MonkeyPatch.context() as patch:
        ours = run()
        patch.setattr(loops, "fit", lambda weight: False)
        return ours, run()


def test_loops_are_for_weights_on_a_cpu() -> None:
    assert loops.fit(torch.zeros(2, 2))
    assert not loops.fit(torch.zeros(2, 2, device="meta"))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    search=st.sampled_from(["mse", "weighted"]),
    seed=st.integers(0, 10_000),
)
def test_scales_that_are_found_lose_as_little(name: str, rows: int, columns: int, search: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.05
    weight[torch.rand(weight.shape, generator=random) < 0.1] = 0
    grid = GRIDS[name]
    importance = torch.rand(columns, generator=random).square()

    def run() -> Tensor:
        """What the scales that it finds lose, in float64."""
        found, zeros = scales.search_scales(weight, importance, grid, search=search)
        rounded = quantize_nearest(weight, found, zeros, grid).dequantize(torch.float64)
        error = (rounded - weight).abs() ** (3 if search == "weighted" else 2)
        return (error * (importance if search == "weighted" else 1)).sum(1)

    ours, theirs = both(run)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9 * float(weight.abs().max()))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(GRIDS)), rows=st.integers(1, 150), columns=st.integers(1, 150), seed=st.integers(0, 99)
)
def test_columns_become_the_same_codes(name: str, rows: int, columns: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.05
    inputs = torch.randn(2 * columns, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    factor = factorize(inputs.T @ inputs / len(inputs), 0.01, activation_order=True)
    found, zeros = scales.search_scales(weight, factor.mean_square, GRIDS[name], search="minmax")

    def run() -> Tensor:
        codes, lost = gptq.round_columns(weight, found, zeros, factor, GRIDS[name])
        return torch.cat([codes.double(), lost[:, None]], 1)

    ours, theirs = both(run)
    differ = (ours[:, :-1] != theirs[:, :-1]).any(1)
    assert differ.float().mean() <= 0.02 or differ.sum() <= 1  # a tie, and what follows from it
    torch.testing.assert_close(ours[~differ], theirs[~differ], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_the_loss_comes_with_the_codes(name: str, make_stage, make_inputs, make_weight) -> None:
    """tr(E H E^T) and tr(W H W^T), in float64 from the weights that come out."""
    grid = GRIDS[name]
    weight, inputs = make_weight(48, 160), make_inputs(640, 160).double()
    hessian = (inputs.T @ inputs) / len(inputs)
    factor = factorize(hessian.float(), 0.01, activation_order=True)
    found, zeros = scales.search_scales(weight, factor.mean_square, grid, search="minmax")
    codes, lost = gptq.round_columns(weight, found, zeros, factor, grid)
    values = grid.decode(codes, None if zeros is None else zeros.repeat_interleave(grid.group_size, 1)[:, :160])
    size = grid.group_size
    error = (values * found.repeat_interleave(size, 1)[:, :160] - weight).double()
    torch.testing.assert_close(lost, ((error @ hessian) * error).sum(1), rtol=1e-3, atol=1e-9)
