"""W* and its shrink against their definitions in float64."""

import pytest
import torch
from torch import Tensor

from vlmquant.algorithms import target as room
from vlmquant.algorithms.factor import estimate_shrinkage, factorize
from vlmquant.algorithms.target import aim
from vlmquant.recipe import GptqOptions
from vlmquant.stream import Moments, Rows

OPTIONS = GptqOptions(target="outputs")


def drawn(tokens: int, *, columns: int, seed: int, shift: float) -> tuple[Tensor, Tensor]:
    """Inputs z and x - z that depend on them, and noise that does not."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=random) @ (mixing + torch.eye(columns))
    inputs[:, 3] *= 8
    moved = shift * inputs @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(99)) / columns**0.5
    return inputs, moved + shift * torch.randn(tokens, columns, generator=random)


def moments_of(inputs: Tensor, shift: Tensor, held: list[Rows]) -> Moments:
    return Moments(inputs.T @ inputs, shift.T @ inputs, float(len(inputs)), held)


def expected(
    weight: Tensor, fit: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], options: GptqOptions
) -> tuple[Tensor, float]:
    """W + alpha D by solving, and alpha by minimising the held-out loss over a fine grid."""

    def correction(inputs: Tensor, shift: Tensor) -> Tensor:
        squares = inputs.T @ inputs / len(inputs)
        own, shrinkage = squares.diagonal(), options.shrinkage
        if shrinkage is None:
            shrinkage = estimate_shrinkage(squares, len(inputs))
        squares = squares + torch.diag(options.damping * own.mean() + shrinkage * own)
        return torch.linalg.solve(squares, (weight.double() @ (shift.T @ inputs / len(inputs))).T).T

    exact = [one.double() for one in fit]
    from_fit = correction(*exact)
    z, d = (one.double() for one in held)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    losses = torch.stack([((z + d) @ weight.double().T - z @ (weight + a * from_fit).T).square().sum() for a in grid])
    alpha = grid[losses.argmin()].item()
    both = torch.cat([exact[0], z]), torch.cat([exact[1], d])
    return weight + alpha * correction(*both), alpha


@pytest.mark.parametrize(("tokens", "shift"), [(40, 0.3), (400, 0.1), (60, 1.0)])
@pytest.mark.parametrize("order", [True, False])
def test_target_is_the_least_squares_one_shrunk_as_held_out_tokens_say(tokens: int, shift: float, order: bool) -> None:
    options = OPTIONS.model_copy(update={"activation_order": order})
    fit, held = (drawn(n, columns=24, seed=seed, shift=shift) for n, seed in ((tokens, 0), (tokens // 4, 1)))
    random = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(rows, 24, generator=random) for name, rows in (("q", 8), ("k", 5))}
    target = aim(weights, moments_of(*fit, [Rows(held[0], None, held[1])]), options)
    together = torch.cat(list(weights.values()))
    wanted, alpha = expected(together, fit, held, options)
    assert target.alpha == pytest.approx(alpha, abs=1e-3)
    torch.testing.assert_close(torch.cat(list(target.weights.values())), wanted.float(), rtol=2e-3, atol=2e-3)
    whole = torch.cat([fit[0], held[0]])
    torch.testing.assert_close(target.factor.mean_square, whole.square().mean(0), rtol=1e-4, atol=1e-5)
    if tokens == 400:
        assert target.alpha > 0.5  # what the inputs tell of the shift is worth it
    assert 0 < target.alpha <= 1


def test_evenly_drawn_rows_say_how_far_a_tall_weight_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, held = (drawn(n, columns=24, seed=seed, shift=0.3) for n, seed in ((60, 0), (20, 1)))
    weight = torch.randn(1000, 24, generator=torch.Generator().manual_seed(5))
    found = aim({"one": weight}, moments_of(*fit, [Rows(held[0], None, held[1])]), OPTIONS)
    every_fourth, alpha = expected(weight[::4], fit, held, OPTIONS)
    assert found.alpha == pytest.approx(alpha, abs=1e-3)
    torch.testing.assert_close(found.weights["one"][::4], every_fourth.float(), rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(room, "ROWS", 1000)
    whole = aim({"one": weight}, moments_of(*fit, [Rows(held[0], None, held[1])]), OPTIONS)
    assert found.alpha == pytest.approx(whole.alpha, rel=0.1)


def test_a_shift_that_inputs_do_not_tell_is_dropped() -> None:
    random = torch.Generator().manual_seed(0)
    fit, held = (torch.randn(n, 16, generator=random) for n in (24, 24))
    shifts = torch.randn(24, 16, generator=random), -0.2 * held
    weight = {"one": torch.randn(4, 16, generator=random)}
    # What the fit learned is of noise, and the held-out shift is what it would have had to be against.
    target = aim(weight, moments_of(fit, 0.2 * fit, [Rows(held, None, shifts[1])]), OPTIONS)
    assert target.alpha == 0
    assert torch.equal(target.weights["one"], weight["one"])


def test_without_samples_held_out_nothing_is_corrected() -> None:
    inputs, shift = drawn(50, columns=16, seed=3, shift=0.5)
    weight = {"one": torch.randn(4, 16)}
    target = aim(weight, moments_of(inputs, shift, []), OPTIONS)
    assert target.alpha == 0
    assert torch.equal(target.weights["one"], weight["one"])


def test_weights_of_tokens_count_in_the_shrink() -> None:
    fit, held = (drawn(n, columns=12, seed=seed, shift=0.5) for n, seed in ((80, 0), (30, 1)))
    weight = {"one": torch.randn(6, 12)}
    counts = torch.ones(30)
    counts[10:] = 0.0
    by_weight = aim(weight, moments_of(*fit, [Rows(held[0], counts, held[1])]), OPTIONS)
    by_rows = aim(weight, moments_of(*fit, [Rows(held[0][:10], None, held[1][:10])]), OPTIONS)
    assert by_weight.alpha == pytest.approx(by_rows.alpha, rel=1e-4)


@pytest.mark.parametrize("columns", [5, 300, 700])
@pytest.mark.parametrize("order", [True, False])
def test_a_factor_solves_and_gives_back_what_it_was_made_of(columns: int, order: bool) -> None:
    inputs, _ = drawn(3 * columns, columns=columns, seed=columns, shift=0.0)
    hessian = inputs.T @ inputs / len(inputs)
    before = hessian.clone()
    factor = factorize(hessian, 0.01, activation_order=order)
    rows = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    damped = before.double() + 0.01 * before.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    wanted = torch.linalg.solve(damped, rows.double().T).T
    torch.testing.assert_close(factor.solve(rows).double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert torch.equal(factor.hessian().triu(), before.triu())
    assert torch.equal(factor.matrix, factor.matrix.T)
