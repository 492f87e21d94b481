"""Channel scales for rounding with feedback, judged by what it will lose, which needs no rounding to be known.

GPTQ with H = M D M^T, and G = N C N^T where outputs count by the answers, makes an error of sum_oi C_o D_i e_oi^2, with
e_oi what is rounded away in its turn (`coupled`): taken for drawn evenly from a step of the group's grid, whatever came
before it. With input i scaled by s_i, whose producer is divided by it, H becomes S^-1 H S^-1, M becomes S^-1 M S, and
D becomes D / s^2. Steps are shares of what groups reach. So what is lost goes with

    sum over groups g of  sum_o C_o (max_{i in g} |w_oi| s_i)^2  *  sum_{i in g} D_i / s_i^2.

AWQ (arXiv:2306.00978) scales inputs by how strongly they fire, and judges that by rounding to nearest. Here what is
strong but told by other inputs costs nothing, an output counts as much as the answers say, and as nothing is rounded, s
is not taken from a family of one parameter but goes down a slope.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vlmquant.algorithms.factor import Factor, factorize
from vlmquant.grid import Grid, split_groups
from vlmquant.recipe import GptqOptions
from vlmquant.stream import Stage

Find = Callable[[Factor], Tensor | None]
"""From the factor of H, the channel scales (in,) that the producer can take; None where none are of use."""

ROWS = 256
"""Rows of a linear, evenly drawn, that scales are judged by."""
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of what is best where all of a group's weights are as large: one of these is where the descent begins."""
STEPS, RATE = 40, 0.05
"""Of Adam, by the logarithm of the scales; the rate falls to 0."""
MOST = 8.0
"""A scale is at most so many times, and at least that part of, its group's mean: an input that has hardly fired is not
to be rounded as if it never would."""
LEAST_GAIN = 0.02
"""Scales that gain less are left alone."""


def finder(stage: Stage) -> Find | None:
    """How channel scales of a stage are found; None where nothing takes them, or the grid is none of integers."""
    if not stage.can_fold or stage.grid.kind != "int":
        return None
    parts = []
    for name, weight in stage.weights.items():
        drawn = weight[:: -(-len(weight) // ROWS)]
        if stage.weighs_outputs:
            counts = stage.of_output_moments(name, partial(_counts, stage.options.gptq)).to(weight.device)
            drawn = drawn * counts[:: -(-len(weight) // ROWS)].sqrt()[:, None]
        parts.append(drawn * (len(weight) / len(drawn)) ** 0.5)
    rows, grid = torch.cat(parts), stage.grid

    def find(factor: Factor) -> Tensor | None:
        return find_scales(rows, factor.unexplained(), grid, stage.admissible)

    return find


def _counts(options: GptqOptions, squares: Sequence[Tensor]) -> Tensor:
    """How much each output counts beside what others can make up for: C (out,), of the squares along G's diagonal."""
    return torch.cat([factor.unexplained() for factor in factors_of(squares, options)])


def factors_of(squares: Sequence[Tensor], options: GptqOptions, *, alive: Tensor | None = None) -> list[Factor]:
    """The factors of the squares along G's diagonal, to all of which as much damping is added. alive: bool (out,): what
    puts out nothing is to go on so, and makes up for nothing."""
    rows = sum(map(len, squares))
    mean = sum(square.diagonal().double().sum().item() for square in squares) / rows
    parts = torch.ones(rows, dtype=torch.bool) if alive is None else alive.cpu()
    found = []
    for square, some in zip(squares, torch.split(parts, list(map(len, squares))), strict=True):
        square = square * some * some[:, None]
        own = square.diagonal().double().mean().item()
        damping = options.output_damping * (mean / own if own else 1.0)
        found.append(factorize(square, damping, activation_order=True))
    return found


@torch.no_grad()
def find_scales(rows: Tensor, unexplained: Tensor, grid: Grid, admissible: Callable[[Tensor], Tensor]) -> Tensor | None:
    """rows (out, in) float32, each by the root of how much it counts; unexplained (in,): D. -> s (in,), None for 1.

    `admissible` gives the nearest scales that the producer can take; what it gives is judged again.
    """
    groups, left = split_groups(rows, grid.group_size), split_groups(unexplained[None], grid.group_size)[0]

    def loss(scales: Tensor) -> Tensor:
        own = split_groups(scales[None], grid.group_size)[0]
        scaled = groups * own
        reach = scaled.abs().amax(-1) * 2 if grid.symmetric else _range(scaled)
        costs = left / own.square().clamp_min(torch.finfo(own.dtype).tiny)  # 0 where a short group is filled up
        return (costs.sum(-1) * reach.square().sum(0)).sum()

    strength = unexplained / rows.square().mean(0).clamp_min(torch.finfo(rows.dtype).tiny)
    starts = [_within(strength.clamp_min(0).pow(power / 4), grid.group_size) for power in POWERS]
    best = min(starts, key=lambda scales: loss(scales).item())
    best = _within(_descend(best, loss), grid.group_size)
    scales = admissible(best)
    return scales if loss(scales) < (1 - LEAST_GAIN) * loss(torch.ones_like(best)) else None


def _range(values: Tensor) -> Tensor:
    """From the least to the largest, 0 among them."""
    return values.amax(-1).clamp_min(0) - values.amin(-1).clamp_max(0)


def _within(scales: Tensor, group_size: int) -> Tensor:
    """With a mean of 1 in each group, to which the loss is blind, and none far from it."""
    logs = scales.clamp_min(torch.finfo(scales.dtype).tiny).log()
    sizes = split_groups(torch.ones_like(logs)[None], group_size)[0].sum(-1)
    means = split_groups(logs[None], group_size)[0].sum(-1) / sizes
    logs = logs - means.repeat_interleave(group_size)[: len(logs)]
    most = torch.tensor(MOST).log().item()
    return logs.clamp(-most, most).exp()


def _descend(start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    logs = start.log().requires_grad_(True)
    optimizer = torch.optim.Adam([logs], lr=RATE)
    best, least = start, loss(start).item()
    for step in range(STEPS):
        with torch.enable_grad():
            found = loss(logs.exp())
            (logs.grad,) = torch.autograd.grad(found.log(), [logs])
        if found.item() < least:
            best, least = logs.detach().exp(), found.item()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
    return best
