"""Scale search against trying every candidate in float64."""

import numpy as np
import pytest
import torch

from vlmquant.algorithms.scales import OTHER_SHARES, SHARES, STEPS, search_scales
from vlmquant.grid import Grid, grid_of, quantize_nearest
from vlmquant.recipe import SHORT_SCHEMES


def losses_of_all(weight, importance, *, bits, group_size, symmetric, power):
    """float64 losses (candidates, rows, groups) and scales of the same shape, written out plainly."""
    top, columns = 2**bits - 1, weight.shape[1]
    spans = [slice(a, min(a + group_size, columns)) for a in range(0, columns, group_size)]
    losses = np.zeros((STEPS, len(weight), len(spans)))
    scales = np.zeros_like(losses)
    for k, shrink in enumerate(np.linspace(*SHARES.get(("int", bits), OTHER_SHARES), STEPS)):
        for r, row in enumerate(weight):
            for g, span in enumerate(spans):
                w = row[span]
                low, high = min(w.min(), 0), max(w.max(), 0)
                scale = max(high, -low) / (top / 2) if symmetric else (high - low) / top
                scale = torch.tensor(scale * shrink).bfloat16().double().item()
                zero = 2 ** (bits - 1) if symmetric else np.clip(np.rint(-low * shrink / scale), 0, top)
                codes = np.clip(np.rint(w / scale) + zero, 0, top)
                losses[k, r, g] = (importance[span] * np.abs((codes - zero) * scale - w) ** power).sum()
                scales[k, r, g] = scale
    return losses, scales


@pytest.mark.parametrize("search", ["mse", "weighted"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "columns"), [(4, 16, 48), (3, 16, 40), (8, 40, 40)])
def test_no_candidate_is_better(make_weight, bits, group_size, columns, symmetric, search) -> None:
    weight, importance = make_weight(6, columns), make_weight(1, columns, seed=3)[0].square()
    scales, zeros = search_scales(
        weight,
        importance,
        Grid(bits, group_size, torch.bfloat16, symmetric),
        search=search,
    )
    losses, candidates = losses_of_all(
        weight.double().numpy(),
        importance.double().numpy() if search == "weighted" else np.ones(columns),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        power=3 if search == "weighted" else 2,
    )
    assert (zeros is None) == symmetric
    chosen = np.where(candidates == scales.double().numpy(), losses, np.inf).min(0)
    assert (chosen <= losses.min(0) * (1 + 1e-4)).all()  # 1e-4: float32 sums against float64
    assert (chosen < losses[0]).any(), "the search never left the min-max range, so this proves nothing"


def test_ties_keep_the_widest_range(make_weight) -> None:
    weight = make_weight(4, 32)
    grid = Grid(4, 16, torch.bfloat16)
    unused = search_scales(weight, torch.zeros(32), grid, search="weighted")[0]
    widest = search_scales(weight, None, grid, search="minmax")[0]
    assert torch.equal(unused, widest)


def test_chunks_do_not_matter(make_weight, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = make_weight(33, 48), torch.ones(48)
    grid = Grid(4, 16, torch.float16, symmetric=False)
    whole = search_scales(weight, importance, grid, search="weighted")
    monkeypatch.setattr("vlmquant.algorithms.scales.CHUNK_ELEMENTS", 100)
    pieces = search_scales(weight, importance, grid, search="weighted")
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", ["mse", "weighted"])
def test_scales_below_0_are_the_search_on_the_weight_turned_round(make_weight, bits, search) -> None:
    """A group with a scale of -s has the codes that its mirror image has with s."""
    weight, importance = make_weight(9, 64), make_weight(1, 64, seed=3)[0].square()
    grid = Grid(bits, 32, torch.bfloat16)

    def loss(scales: torch.Tensor) -> torch.Tensor:
        values = (weight.double().view(9, 2, 32) / scales.double()[..., None]).round()
        errors = values.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scales.double()[..., None]
        cubes = (errors - weight.double().view(9, 2, 32)).abs() ** (3 if search == "weighted" else 2)
        return (cubes * (importance.double().view(2, 32) if search == "weighted" else 1)).sum(-1)

    plain, _ = search_scales(weight, importance, grid, search=search)
    mirrored, _ = search_scales(-weight, importance, grid, search=search)
    signed, _ = search_scales(weight, importance, grid, search=search, signed=True)
    best = torch.minimum(loss(plain), loss(-mirrored))
    torch.testing.assert_close(loss(signed), best, rtol=1e-4, atol=0)
    assert (signed < 0).any()
    assert (signed > 0).any()


def test_a_lone_outlier_above_gets_a_scale_below_0() -> None:
    """-8 x -s reaches 8 s; with s above 0 the largest value is 7 s."""
    weight = torch.tensor([[8.0, -1.0, 1.0, 2.0, -7.0, 3.0, 5.0, -4.0]])
    grid = Grid(4, 8, torch.float32)
    scales, _ = search_scales(weight, None, grid, search="mse", signed=True)
    rounded = quantize_nearest(weight, scales, None, grid)
    assert scales.item() == pytest.approx(-1.0, rel=0.07)
    turned, _ = search_scales(-weight, None, grid, search="mse", signed=True)
    assert torch.equal(turned, -scales)
    assert rounded.codes[0, 0] == 0


@pytest.mark.parametrize(
    "grid", [Grid(4, 16, torch.bfloat16, symmetric=False), grid_of(SHORT_SCHEMES["mxfp4a16"], 32, torch.bfloat16)]
)
def test_grids_that_gain_nothing_keep_their_scales(make_weight, grid: Grid) -> None:
    weight = make_weight(4, 32)
    plain = search_scales(weight, torch.ones(32), grid, search="weighted")
    signed = search_scales(weight, torch.ones(32), grid, search="weighted", signed=True)
    assert torch.equal(plain[0], signed[0])


@pytest.mark.parametrize("scale", [-3.0, -1e-9, 1e-9, 7.0])
def test_rounding_a_scale_keeps_its_sign(scale: float) -> None:
    stored = Grid(4, 16, torch.float16).round_scales(torch.tensor([[scale]])).item()
    assert stored == pytest.approx(max(abs(scale), 2.0**-14) * (1 if scale > 0 else -1))
