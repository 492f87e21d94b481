"""The factorization against float64 numpy, on matrices as calibration gives them and on hard ones."""

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmquant.algorithms import factor
from vlmquant.algorithms.factor import (
    CAUTION,
    LEAST_PIVOT,
    MOST_SHRUNK,
    PANEL,
    TOKENS_ALIKE,
    Factor,
    estimate_shrinkage,
    factorize,
)
from vlmquant.algorithms.gptq import quantize_weight
from vlmquant.grid import grid_of
from vlmquant.recipe import SHORT_SCHEMES, GptqOptions


def second_moments(columns: int, *, rank: int | None = None, massive: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Of inputs with fewer directions than columns where a rank is given, and with channels a thousand times as large
    that fire together, once."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, rank or columns, generator=random) @ torch.randn(
        rank or columns, columns, generator=random
    )
    inputs[0, list(massive)] = 1e4 * inputs.std()
    return inputs.T @ inputs / len(inputs)


def reference(
    hessian: Tensor, damping: float, order: Tensor, shrinkage: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M^T, D and H in the order, float64, by numpy's Cholesky decomposition of the matrix read backwards."""
    whole = hessian.double().numpy()
    whole = whole[np.ix_(order.numpy(), order.numpy())]
    damped = whole + np.diag(damping * whole.diagonal().mean() + shrinkage * whole.diagonal())
    root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return (root / root.diagonal()).T, root.diagonal() ** 2, whole


def check(
    hessian: Tensor, damping: float, *, activation_order: bool = True, within: float = 2e-3, shrinkage: float = 0.0
) -> Factor:
    order = torch.arange(len(hessian))
    if activation_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    feedback, pivots, whole = reference(hessian, damping, order, shrinkage)
    found = factorize(hessian.clone(), damping, activation_order=activation_order, shrinkage=shrinkage)
    assert torch.equal(found.order, order)
    assert found.damping == damping
    np.testing.assert_array_equal(found.mean_square, hessian.diagonal())
    np.testing.assert_allclose(found.pivots, pivots, rtol=within)
    # M^T as errors meet it: those of an input count as much as that is large.
    added = damping * whole.diagonal().mean() + shrinkage * whole.diagonal()
    np.testing.assert_allclose(found.added, added, rtol=1e-6)
    sizes = np.sqrt(whole.diagonal() + added)
    ours = np.tril(found.matrix.numpy(), -1)
    np.testing.assert_allclose(
        ours * sizes[:, None] / sizes, np.tril(feedback, -1) * sizes[:, None] / sizes, atol=within
    )
    np.testing.assert_array_equal(torch.triu(found.matrix, 1), np.triu(hessian[order][:, order].numpy(), 1))
    return found


@pytest.mark.parametrize("columns", [1, 2, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 77])
@pytest.mark.parametrize("activation_order", [True, False])
def test_every_number_of_panels(columns: int, activation_order: bool) -> None:
    check(second_moments(columns), 0.01, activation_order=activation_order)


@settings(deadline=None, max_examples=25)
@given(columns=st.integers(1, 40), rank=st.integers(1, 40), panel=st.integers(1, 9), seed=st.integers(0, 1000))
def test_any_shape_and_panel(columns: int, rank: int, panel: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor, "PANEL", panel)
        check(second_moments(columns, rank=rank, seed=seed), 0.01)


@pytest.mark.parametrize("damping", [0.01, 0.001])
def test_few_directions_and_massive_activations(damping: float) -> None:
    check(second_moments(300, rank=20), damping)
    check(second_moments(300, rank=20), damping, shrinkage=0.3)
    check(second_moments(300, rank=20, massive=(3, 77, 201)), damping, shrinkage=0.1)
    check(second_moments(300, rank=20, massive=(3, 77, 201)), damping)


@pytest.mark.parametrize("columns", [2, 40, PANEL + 3])
@pytest.mark.parametrize("tokens", [50.0, 3000.0, 1e6])
def test_shrinkage_is_that_of_the_formula(columns: int, tokens: float) -> None:
    """By numpy in float64, over all pairs; with inputs that never fire, and massive ones."""
    hessian = second_moments(columns, rank=columns // 2 + 1, massive=(1,))
    if columns > 2:
        hessian[3] = hessian[:, 3] = 0
    sizes = np.sqrt(np.maximum(hessian.double().numpy().diagonal(), 1e-300))
    pairs = hessian.double().numpy() / sizes / sizes[:, None]
    squares = (pairs[~np.eye(columns, dtype=bool)] ** 2).sum()
    share = CAUTION * TOKENS_ALIKE * columns * (columns - 1) / tokens / squares
    share = min(share, MOST_SHRUNK)
    assert estimate_shrinkage(hessian, tokens) == pytest.approx(share / (1 - share), rel=1e-4)


def test_shrunk_correlations_are_nearer_to_those_of_all_tokens() -> None:
    """Where tokens are drawn one by one, so that neither TOKENS_ALIKE nor CAUTION is called for: of all shares, that of
    the formula comes nearest."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=random) * torch.linspace(2, 0.1, 64) ** 2

    def correlations(count: int) -> torch.Tensor:
        tokens = torch.randn(count, 64, generator=random) @ mixing.T
        moments = tokens.T @ tokens / count
        roots = moments.diagonal().rsqrt()
        return moments * roots * roots[:, None]

    every, few = correlations(400_000), correlations(100)
    plain = estimate_shrinkage(few, 100 * TOKENS_ALIKE * CAUTION)
    off = {
        share: (few.div(1 + share) - every).fill_diagonal_(0).square().sum().item() for share in (0, plain, 9 * plain)
    }
    assert min(off, key=off.__getitem__) == plain


def test_what_says_nothing_is_not_shrunk() -> None:
    assert estimate_shrinkage(torch.zeros(5, 5), 10) == 0
    assert estimate_shrinkage(torch.ones(1, 1), 10) == 0
    assert estimate_shrinkage(second_moments(20), float("inf")) == 0


def test_float64_takes_over_where_float32_would_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Massive channels that tell each other: of the later ones nearly nothing is left to know."""
    used: list[torch.dtype] = []
    real = factor._decompose

    def noted(matrix: Tensor, diagonal: Tensor, dtype: torch.dtype) -> Tensor | None:
        used.append(dtype)
        return real(matrix, diagonal, dtype)

    monkeypatch.setattr(factor, "_decompose", noted)
    check(second_moments(200), 0.01)
    assert used == [torch.float32]
    check(second_moments(200, rank=8, massive=(3, 77, 101, 150)), 1e-3)
    assert used == [torch.float32, torch.float32]
    monkeypatch.setattr(factor, "LEAST_PIVOT", 2.0**-5)
    check(second_moments(200, rank=8, massive=(3, 77, 101, 150)), 1e-3)
    assert used == [*[torch.float32] * 3, torch.float64]


def test_float32_loses_no_more_than_float64_as_far_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of codes that either factor leads to, over random matrices whose inputs mostly tell each other."""
    grid, options, real = grid_of(SHORT_SCHEMES["w4a16"], 256, torch.bfloat16), GptqOptions(), factor._decompose
    ratios, least = [], []

    def noted(matrix: Tensor, diagonal: Tensor, dtype: torch.dtype) -> Tensor | None:
        if dtype == wanted and (pivots := real(matrix, diagonal, dtype)) is not None:
            least.append((pivots.double() / diagonal).sqrt().min().item())
            return pivots
        return None

    monkeypatch.setattr(factor, "_decompose", noted)
    for seed in range(24):
        hessian = second_moments(256, rank=60, seed=seed)
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
        losses = []
        for wanted in (torch.float32, torch.float64):  # noqa: B007  # `noted` asks for it
            found = factorize(hessian.clone(), 3e-5, activation_order=True)
            assert found.damping == 3e-5
            rounded, _ = quantize_weight(weight, found, grid, options)
            error = (rounded.dequantize() - weight).double()
            losses.append((error @ hessian.double() * error).sum().item())
        ratios.append(losses[0] / losses[1] - 1)
    assert LEAST_PIVOT < min(least) < 2 * LEAST_PIVOT
    assert abs(statistics.mean(ratios)) < 3 * statistics.stdev(ratios) / len(ratios) ** 0.5 + 1e-4


def test_a_matrix_without_a_factor_gives_no_feedback() -> None:
    hessian = torch.tensor([[1.0, 20.0], [20.0, 1.5]])
    found = factorize(hessian.clone(), 0.01, activation_order=True)
    assert found.damping == float("inf")
    assert found.order.tolist() == [1, 0]
    assert found.matrix[1, 0] == 0
    rows = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    torch.testing.assert_close(found.energy(rows), ((rows @ hessian) * rows).sum(1))


@pytest.mark.parametrize("columns", [1, PANEL, PANEL + 30])
def test_energy_is_that_of_the_undamped_matrix(columns: int) -> None:
    hessian, rows = second_moments(columns), torch.randn(7, columns)
    found = factorize(hessian.clone(), 0.5, activation_order=True)
    expected = ((rows.double() @ hessian.double()) * rows).sum(1)
    torch.testing.assert_close(found.energy(rows).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
