"""What helps where inputs are rounded too: large channels moved into the weights, means of errors into the biases.

SmoothQuant (Xiao et al., arXiv:2211.10438): a token's inputs share a scale, so that the largest decides how finely all
are rounded. With inputs divided by s_j, by what produces them, and columns of the weight times s_j, the product is the
same, and less is lost by rounding both.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmquant.algorithms import rtn
from vlmquant.grid import QuantizedWeight
from vlmquant.stream import Rows, Stage

EXPONENTS = (0.25, 0.5, 0.6, 0.75, 0.85)
"""Tried, beside no fold at all: the larger, the more of what is large goes from the inputs into the weights."""
TOKENS = 1024
"""Of calibration, evenly drawn, on which they are judged."""
LEAST_MAGNITUDE = 1e-9
BETTER = 1 - 1e-6
"""A later candidate has to be better by more than noise: ties go to the earlier one on every machine."""


def fold_scales(stage: Stage) -> Tensor | None:
    """The channel scales (in,) that lose least, once the producer of the inputs has taken them; None where none do."""
    if not stage.can_fold:
        return None
    found = [None, *map(stage.admissible, candidates(stage.weights.values(), stage.largest()))]
    ranks, tokens = stage.ranks, stage.drawn(TOKENS)
    wanted = {local: tokens.scaled(tokens.inputs @ weight.T) for local, weight in stage.weights.items()}
    losses = ranks.in_order(
        {place: rounded_error(stage, scales, tokens, wanted) for place, scales in enumerate(found) if ranks.own(place)}
    )
    best, least = found[0], losses[0]
    for scales, loss in zip(found, losses, strict=True):
        if loss < least * BETTER:
            best, least = scales, loss
    best = ranks.first(lambda: best)
    if best is not None:
        stage.fold(best)
    return best


def candidates(weights: Iterable[Tensor], largest: Tensor) -> list[Tensor]:
    """max |x_j|^a / max |W_rj|^(1 - a) (in,) for each exponent a, normalised so that max s * min s = 1."""
    inputs = largest.clamp_min(LEAST_MAGNITUDE)
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(LEAST_MAGNITUDE)
    found = [inputs**exponent / columns ** (1 - exponent) for exponent in EXPONENTS]
    return [scales / (scales.max() * scales.min()).sqrt() for scales in found]


def rounded_error(stage: Stage, channel_scales: Tensor | None, tokens: Rows, wanted: Mapping[str, Tensor]) -> float:
    """The sum of (W x - Q(W s) r(x / s))^2 over tokens and linears, by the grid's min-max scales.

    wanted: W x of each linear, (tokens, out).
    """
    met, total = tokens.scaled(stage.rounding(channel_scales)(tokens.inputs)), 0.0
    for local, weight in stage.weights.items():
        first = 0
        for rows in stage.parts(weight):
            scaled = rows if channel_scales is None else rows * channel_scales
            grid = stage.grid.fitted(scaled)
            error = (met @ rtn.quantize_weight(scaled, grid).dequantize().T).sub_(
                wanted[local][:, first : first + len(rows)]
            )
            total += error.square_().sum(dtype=torch.float64).item()
            first += len(rows)
    return total


def share_lost(stage: Stage, quantized: Mapping[str, QuantizedWeight]) -> float:
    """The sum of (W x - Q r(x / s))^2 over tokens and linears, as a share of that of (W x)^2."""
    tokens, lost, whole = stage.drawn(TOKENS), 0.0, 0.0
    met = tokens.scaled(stage.rounding(stage.channel_scales)(tokens.inputs))
    for local, weight in stage.weights.items():
        wanted = tokens.scaled(tokens.inputs @ weight.T)
        error = (met @ quantized[local].dequantize().T).sub_(wanted)
        lost += error.square_().sum(dtype=torch.float64).item()
        whole += wanted.square_().sum(dtype=torch.float64).item()
    return stage.ranks.first(lambda: lost / max(whole, LEAST_MAGNITUDE))


def correct_biases(
    stage: Stage, quantized: Mapping[str, QuantizedWeight], channel_scales: Tensor | None = None
) -> None:
    """Add E[W x - Q r(x / s)] to the bias of every linear of the stage that has one."""
    biased = [local for local, linear in stage.linears.items() if linear.bias]
    if not biased:
        return
    before, after = stage.means(stage.rounding(channel_scales))
    shifts = stage.ranks.first(
        lambda: {local: stage.weights[local] @ before - quantized[local].dequantize() @ after for local in biased}
    )
    for local, shift in shifts.items():
        stage.correct_bias(local, shift)
