"""GPTQ that feeds errors from row to row, against a plain greedy search in float64 and numbers worked by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.algorithms.test_loops import GRIDS
from vlmquant import stream
from vlmquant.algorithms import coupled, gptq, loops
from vlmquant.algorithms.coupled import round_both
from vlmquant.algorithms.factor import factorize
from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import Grid
from vlmquant.recipe import ComponentSpec, GptqOptions, Scheme

TINY = 1e-9  # damping that leaves hand-worked numbers as they are
INTEGERS = Grid(4, 2, torch.float32)


def moments(size: int, *, seed: int = 0, samples: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(samples or 3 * size, size, generator=random) @ torch.randn(size, size, generator=random)
    return rows.T @ rows / len(rows)


def test_two_rows_by_hand() -> None:
    # G = N C N^T with N = [[1, .5], [0, 1]]: row 0 comes first, and half of its error is added to row 1.
    # Row 0: .4 -> 0, error .4. Row 1: .4 + .2 = .6 -> 1, where nearest would give 0. Loss e G e^T:
    # (.4, -.6): 2 (.16) + 2 (.36) + 2 (-.24) = .56, not 2 (.16) + 2 (.16) + 2 (.16) = .96.
    weight, one = torch.tensor([[0.4, 0.0], [0.4, 0.0]]), torch.eye(2)
    inputs = factorize(one.clone(), TINY, activation_order=False)
    outputs = factorize(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), TINY, activation_order=False)
    codes, _ = round_both(weight, torch.ones(2, 1), None, inputs, outputs, INTEGERS)
    assert (codes.int() - 8).tolist() == [[0, 0], [1, 0]]


def test_rows_and_columns_by_hand() -> None:
    # H as G: M = N = [[1, .5], [0, 1]]. (0,0): .4 -> 0, e = .4. (0,1): 0 + .5 x .4 = .2 -> 0, e = 0, e + f = .2.
    # (1,0): .4 + .5 x .4 = .6 -> 1, e = -.6. (1,1): .3 + .5 x -.6 + .5 x .2 = .1 -> 0.
    weight, both = torch.tensor([[0.4, 0.0], [0.4, 0.3]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    factor = factorize(both.clone(), TINY, activation_order=False)
    codes, lost = round_both(weight, torch.ones(2, 1), None, factor, factor, INTEGERS)
    assert (codes.int() - 8).tolist() == [[0, 0], [1, 0]]
    # Rows by H alone: (.4, 0): 2 (.16) = .32; (-.6, .3): 2 (.36) + 2 (.09) - 2 (.18) = .54.
    torch.testing.assert_close(lost, torch.tensor([0.32, 0.54], dtype=torch.float64), rtol=1e-5, atol=0)


def greedy(weight: Tensor, scales: Tensor, zeros: Tensor | None, factor: Any, outputs: Any, grid: Grid) -> Tensor:
    """Element after element in float64: each where tr(G E H E^T) is least, as all later ones may make up for it."""
    rows, columns = weight.shape
    triangle = [
        (one.matrix.double().tril(-1) + torch.eye(len(one.order), dtype=torch.float64)).T for one in (factor, outputs)
    ]
    m, n = triangle
    target = weight.double()[outputs.order][:, factor.order]
    error = torch.zeros(rows, columns, dtype=torch.float64)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    for o in range(rows):
        for i in range(columns):
            row, group = int(outputs.order[o]), int(factor.order[i]) // grid.group_size
            known = error[: o + 1, : i + 1].clone()
            known[o, i] = 0
            pull = n[: o + 1, o] @ known @ m[: i + 1, i]  # (N^T E M)_oi without its own error
            scale = scales[row, group].double()
            zero = None if zeros is None else zeros[row, group : group + 1].float()
            value = ((target[o, i] + pull) / scale)[None].float()
            grid.round_(value, *grid.bounds(zero))
            error[o, i] = target[o, i] - value.double().item() * scale
            codes[row, factor.order[i]] = grid.encode(value, zero).item()
    return codes


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    rows=st.integers(1, 80),
    columns=st.integers(1, 20),
    seed=st.integers(0, 99),
    compiled=st.booleans(),
)
def test_codes_are_those_of_a_greedy_search(name: str, rows: int, columns: int, seed: int, compiled: bool) -> None:
    grid, random = GRIDS[name], torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.05
    factor = factorize(moments(columns, seed=seed), 0.01, activation_order=True)
    outputs = factorize(moments(rows, seed=seed + 1), 0.3, activation_order=True)
    scales, zeros = search_scales(weight, factor.mean_square, grid, search="minmax")
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(loops, "fit", lambda weight: False)
        codes, _ = round_both(weight, scales, zeros, factor, outputs, grid)
    expected = greedy(weight, scales, zeros, factor, outputs, grid)
    # A tie that falls otherwise changes what comes behind it, of which there is little only near the end.
    same = codes == expected
    assert same.float().mean() >= 0.98 or _loss(weight, codes, scales, zeros, factor, outputs, grid) <= 1.05 * _loss(
        weight, expected, scales, zeros, factor, outputs, grid
    )


def _values(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    columns, size = codes.shape[1], grid.group_size
    wide = None if zeros is None else zeros.float().repeat_interleave(size, 1)[:, :columns]
    return grid.decode(codes, wide) * scales.repeat_interleave(size, 1)[:, :columns]


def _hessian(factor: Any) -> Tensor:
    m = (factor.matrix.double().tril(-1) + torch.eye(len(factor.order), dtype=torch.float64)).T
    found = m @ factor.pivots.double().diag() @ m.T
    back = factor.order.argsort()
    return found[back][:, back]


def _loss(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, factor: Any, outputs: Any, grid: Grid
) -> float:
    error = (weight - _values(codes, scales, zeros, grid)).double()
    return float((_hessian(outputs) @ error @ _hessian(factor) * error).sum())


@pytest.mark.parametrize("columns", [96, 300])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_where_outputs_are_alike_it_is_gptq(name: str, columns: int, make_weight: Callable[..., Tensor]) -> None:
    grid, weight = GRIDS[name], make_weight(150, columns)
    factor = factorize(moments(columns), 0.01, activation_order=True)
    outputs = factorize(torch.eye(150), 1.0, activation_order=True)
    scales, zeros = search_scales(weight, factor.mean_square, grid, search="minmax")
    codes, lost = round_both(weight, scales, zeros, factor, outputs, grid)
    expected, lost_alone = gptq.round_columns(weight, scales, zeros, factor, grid)
    same = (codes == expected).all(1)
    assert (~same).sum() <= 3  # a tie, and what follows from it
    torch.testing.assert_close(lost[same], lost_alone[same], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("rows", [64, 130])
def test_it_loses_less_by_its_own_measure(
    rows: int, compiled: bool, make_weight: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, weight = Grid(3, 32, torch.bfloat16), make_weight(rows, 160)
    factor = factorize(moments(160), 0.01, activation_order=True)
    outputs = factorize(moments(rows, seed=3, samples=rows // 4), 0.3, activation_order=True)
    scales, zeros = search_scales(weight, factor.mean_square, grid, search="weighted")
    if not compiled:
        monkeypatch.setattr(loops, "fit", lambda weight: False)
    ours, _ = round_both(weight, scales, zeros, factor, outputs, grid)
    alone, _ = gptq.round_columns(weight, scales, zeros, factor, grid)
    lost = [_loss(weight, codes, scales, zeros, factor, outputs, grid) for codes in (ours, alone)]
    assert lost[0] < 0.7 * lost[1]


def test_both_ways_give_the_same_codes(make_weight: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight = Grid(4, 32, torch.bfloat16, symmetric=False), make_weight(100, 200)
    factor = factorize(moments(200), 0.01, activation_order=True)
    outputs = factorize(moments(100, seed=5), 1.0, activation_order=True)
    scales, zeros = search_scales(weight, factor.mean_square, grid, search="minmax")
    ours, _ = round_both(weight, scales, zeros, factor, outputs, grid)
    monkeypatch.setattr(loops, "fit", lambda weight: False)
    theirs, _ = round_both(weight, scales, zeros, factor, outputs, grid)
    assert (ours == theirs).float().mean() > 0.98


def test_a_stage_is_told_what_its_outputs_do(make_stage, make_inputs, make_weight) -> None:
    options = ComponentSpec(gptq=GptqOptions(output_damping=0.5))
    weights, inputs = {"q": make_weight(48, 128), "k": make_weight(32, 128, seed=2)}, make_inputs(512, 128)
    told = {"q": [moments(48, seed=1)], "k": [torch.zeros(32, 32)]}
    plain = gptq.quantize_stage(make_stage(weights, Scheme(bits=4, group_size=32), inputs, options=options))
    stage = make_stage(weights, Scheme(bits=4, group_size=32), inputs, options=options, output_moments=told)
    found = gptq.quantize_stage(stage)
    factor = factorize(stage.hessian().clone(), 0.01, activation_order=True)
    outputs = factorize(told["q"][0].clone(), 0.5, activation_order=True)
    expected, _ = coupled.round_both(weights["q"], found["q"].scales, None, factor, outputs, found["q"].grid)
    assert torch.equal(found["q"].codes, expected)
    assert not torch.equal(found["q"].codes, plain["q"].codes)
    assert torch.equal(found["k"].codes, plain["k"].codes)  # outputs that do nothing to the answers
    assert torch.equal(found["q"].scales, plain["q"].scales)
    error = (found["q"].dequantize() - weights["q"]).double()
    exact = float((error @ stage.hessian().double() * error).sum())
    assert stage.losses["q"][0] == pytest.approx(exact, rel=1e-3)


def test_rows_of_different_parts_do_not_make_up_for_each_other(make_stage, make_inputs, make_weight) -> None:
    """As where nothing outside of the squares is known of G, and what is added to its diagonal is the same for all."""
    options = ComponentSpec(gptq=GptqOptions(output_damping=0.5))
    weights, inputs = {"q": make_weight(80, 128)}, make_inputs(512, 128)
    squares = [moments(48, seed=1), 4 * moments(32, seed=2)]
    asked: dict[str, Any] = {"options": options}
    parts, whole = (
        gptq.quantize_stage(
            make_stage(weights, Scheme(bits=4, group_size=32), inputs, output_moments={"q": told}, **asked)
        )["q"]
        for told in (squares, [torch.block_diag(*squares)])
    )
    assert torch.equal(parts.scales, whole.scales)
    assert (parts.codes == whole.codes).float().mean() > 0.995  # sums in another order
    alone = gptq.quantize_stage(
        make_stage(
            {"q": weights["q"][48:]}, Scheme(bits=4, group_size=32), inputs, output_moments={"q": squares[1:]}, **asked
        )
    )["q"]
    assert not torch.equal(parts.codes[48:], alone.codes)


@pytest.mark.parametrize(
    ("rows", "wanted"), [(1, [1]), (1024, [1024]), (1536, [768, 768]), (1025, [640, 385]), (11008, [1024] * 10 + [768])]
)
def test_parts_are_even_shares(rows: int, wanted: list[int]) -> None:
    assert stream.rows_together(rows) == wanted


def test_outputs_that_are_nothing_stay_so_and_change_no_other(make_stage, make_inputs, make_weight) -> None:
    weight, inputs, told = make_weight(48, 128), make_inputs(512, 128), moments(48, seed=1)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[0, 5, 47]] = True
    weight[dead] = 0
    scheme, mean = Scheme(bits=4, group_size=32), told.diagonal().double().mean()

    def rounded(kept: Tensor) -> Tensor:
        square = told[kept][:, kept]
        damping = 0.1 * float(mean / square.diagonal().double().mean())  # adds as much
        options = ComponentSpec(gptq=GptqOptions(output_damping=damping))
        stage = make_stage({"q": weight[kept]}, scheme, inputs, options=options, output_moments={"q": [square]})
        return gptq.quantize_stage(stage)["q"].dequantize()

    whole, some = rounded(torch.ones_like(dead)), rounded(~dead)
    assert not whole[dead].any()
    assert (whole[~dead] == some).float().mean() > 0.995  # sums in another order
