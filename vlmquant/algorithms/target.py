"""What is rounded so that a layer puts out what the original model's does, from inputs that are not the original's.

With Z (in, tokens) the inputs in the quantized model, X those in the original one, H = Z Z^T and C = (X - Z) Z^T, the
squared error of Q Z against W X is tr((W* - Q) H (W* - Q)^T) and a constant, with W* = W + W C H^-1: the layer makes up
for the errors of those before it. GPTAQ (arXiv:2504.02692), QEP (arXiv:2504.09629) and Qronos round a form of W*.

The correction D = W C H^-1 is fitted to few tokens and holds less on others. So it is shrunk: alpha D. For samples that
D was not fitted to, the loss of W + alpha D is a parabola in alpha, least at tr(W C_h D^T) / tr(D H_h D^T).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmquant.algorithms.factor import Factor, estimate_shrinkage, factorize
from vlmquant.algorithms.folding import Find
from vlmquant.recipe import GptqOptions
from vlmquant.stream import Moments, Rows, Stage

ROWS = 256
"""Rows of a weight, evenly drawn, that alpha is found by."""


@dataclass(frozen=True)
class Target:
    """What the linears of a stage are to be rounded from."""

    factor: Factor
    """Of the second moments of all samples."""
    weights: dict[str, Tensor]
    """By local name, W + alpha D, float32 (out, in)."""
    alpha: float
    """The share of the correction that pays on samples that it was not fitted to, 0 to 1."""
    channel_scales: Tensor | None = None
    """(in,): what was found to scale inputs by; the factor and the weights are as they are with it."""


def aim(stored: Mapping[str, Tensor], moments: Moments, options: GptqOptions, *, find: Find | None = None) -> Target:
    """stored: weights (out, in) of linears that share their inputs. moments: which are used up. find: what finds
    channel scales."""
    squares, cross, held = moments.squares, moments.cross, moments.held
    tokens = moments.tokens + sum(rows.count for rows in held)
    weights = {name: weight.float() for name, weight in stored.items()}
    alpha, channel_scales = 0.0, None
    if (held or find) and moments.tokens:
        factor = factor_of(squares.div_(moments.tokens), options, tokens=moments.tokens)
        cross.div_(moments.tokens)
        some = (weight[:: -(-len(weight) // ROWS)] for weight in weights.values())
        alpha = shrink(some, lambda weight: _correction(weight, cross, factor), held)
        channel_scales = None if find is None else find(factor)
        squares, cross = factor.hessian().mul_(moments.tokens), cross.mul_(moments.tokens)
    if channel_scales is not None:
        moments = Moments(squares, cross, moments.tokens, held).divided(channel_scales)
        squares, cross, held = moments.squares, moments.cross, moments.held
        weights = {name: weight * channel_scales for name, weight in weights.items()}
    for rows in held:
        inputs = rows.scaled(rows.inputs)
        squares.addmm_(inputs.T, inputs)
        if rows.shift is not None:
            cross.addmm_(rows.scaled(rows.shift).T, inputs)
    factor = factor_of(squares.div_(tokens or 1), options, tokens=tokens)
    if alpha:
        cross.div_(tokens or 1)
        for name, weight in weights.items():
            weights[name] = _correction(weight, cross, factor).mul_(alpha).add_(weight)
    return Target(factor, weights, alpha, channel_scales)


def aim_stage(
    stage: Stage, weights: Mapping[str, Tensor], channel_scales: Tensor | None = None, *, find: Find | None = None
) -> Target:
    """What a stage's weights, multiplied by channel_scales (in,) where there are any, are to be rounded from.

    find: what finds channel scales, where they are not known.
    """
    options = stage.options.gptq
    target = stage.of_moments(lambda moments: aim(weights, moments.divided(channel_scales), options, find=find))
    stage.aimed(target.alpha)
    return target


def factor_of(hessian: Tensor, options: GptqOptions, *, tokens: float | None = None) -> Factor:
    """In the memory of H (in, in). tokens: that it was found from, where it is to be shrunk by their number."""
    shrinkage = options.shrinkage
    if shrinkage is None:
        shrinkage = 0.0 if tokens is None else estimate_shrinkage(hessian, tokens)
    return factorize(hessian, options.damping, activation_order=options.activation_order, shrinkage=shrinkage)


def _correction(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """W C H^-1 (out, in), H damped."""
    return factor.solve(weight @ cross)


def shrink(weights: Iterable[Tensor], correction_of: Callable[[Tensor], Tensor], held: list[Rows]) -> float:
    """alpha_h of linears that share their inputs, from the tokens held out; one linear's correction at a time."""
    gained = lost = 0.0
    for weight in weights:
        correction = correction_of(weight)
        for rows in held:
            if rows.shift is not None:
                moved = rows.scaled(rows.inputs) @ correction.T
                gained += (moved * (rows.scaled(rows.shift) @ weight.T)).sum(dtype=torch.float64).item()
                lost += moved.square_().sum(dtype=torch.float64).item()
        del correction
    share = gained / lost if lost > 0 else 0.0
    return min(share, 1.0) if share > 0 else 0.0  # also where it is no number
