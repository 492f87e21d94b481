"""For each stage the method that loses least on samples held out.

Every candidate rounds the weights by what the other samples say. Its loss is that of the layer's outputs, on tokens
that none of them has seen, |W x - Q z|^2: z is what the quantized model gives the layer, x what the original does. The
best then rounds them anew, by all samples.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmquant.algorithms import awq, gptq, search
from vlmquant.algorithms.folding import Find, finder
from vlmquant.algorithms.target import aim, factor_of
from vlmquant.grid import QuantizedWeight
from vlmquant.recipe import AIMING, WITH_FEEDBACK
from vlmquant.stream import Moments, Rows, Stage

METHODS = {
    "gptq": gptq.quantize_stage,
    "awq+gptq": awq.quantize_stage_with_feedback,
    "awq": awq.quantize_stage,
    "search": search.quantize_stage,
}
"""Tried in this order: a later one has to lose less."""


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Quantize all linears of a stage by one of METHODS; by the first where no sample is held out."""
    mean_abs, find, aimed = stage.mean_abs() if stage.can_fold else None, finder(stage), stage.is_aimed
    losses = stage.of_moments(lambda moments: held_losses(stage, moments, mean_abs, aimed=aimed, find=find))
    method = min(losses, key=losses.__getitem__)
    stage.chosen(method)
    return METHODS[method](stage)


def held_losses(
    stage: Stage, moments: Moments, mean_abs: Tensor | None, *, aimed: bool, find: Find | None = None
) -> dict[str, float]:
    """By method, summed over tokens and outputs; mean_abs (in,): E|x_j|, None where scales cannot be folded.

    aimed: whether methods are to be told the original's outputs. find: what finds scales for awq+gptq. One process runs
    this: nothing here may ask others.
    """
    absent = {"awq": mean_abs is None, "awq+gptq": find is None}
    methods = [method for method in METHODS if not absent.get(method)]
    fit, judges = _apart(moments)
    if not judges or not fit.tokens:
        return dict.fromkeys(methods, 0.0)
    return {
        method: _loss(stage.weights, _rounded(stage, method, fit, mean_abs, find, aimed), judges) for method in methods
    }


def _apart(moments: Moments) -> tuple[Moments, list[Rows]]:
    """What methods may see, and the later half of the tokens that were held out, by which they are judged. The other
    half says how far the target moves."""
    tokens = sum(len(rows.inputs) for rows in moments.held)
    shown, judges, seen = list[Rows](), list[Rows](), 0
    for rows in moments.held:
        cut = min(max(tokens // 2 - seen, 0), len(rows.inputs))
        seen += len(rows.inputs)
        shown += [rows.part(slice(0, cut))] if cut else []
        judges += [rows.part(slice(cut, None))] if cut < len(rows.inputs) else []
    return Moments(moments.squares, moments.cross, moments.tokens, shown), judges


def _rounded(
    stage: Stage, method: str, fit: Moments, mean_abs: Tensor | None, find: Find | None, aimed: bool
) -> dict[str, Tensor]:
    """What weights (out, in) become, as their inputs meet them."""
    options, weights, channel_scales = stage.options, stage.weights, None
    seen = Moments(fit.squares.clone(), fit.cross.clone(), fit.tokens, fit.held)
    if method == "awq":
        assert mean_abs is not None
        channel_scales = awq.find_scales(stage, mean_abs, fit.squares / fit.tokens)
        seen = seen.divided(channel_scales)
    elif method == "awq+gptq" and not aimed:
        assert find is not None
        channel_scales = find(factor_of(fit.squares / fit.tokens, options.gptq))
        seen = seen.divided(channel_scales)
    if channel_scales is not None:
        weights = {name: weight * channel_scales for name, weight in weights.items()}
    factor = None
    if aimed and method in AIMING:
        target = aim(weights, seen, options.gptq, find=find if method == "awq+gptq" else None)
        weights, factor = target.weights, target.factor
        channel_scales = channel_scales if target.channel_scales is None else target.channel_scales
    else:
        seen.squares.div_(fit.tokens)
    grid = stage.grid.fitted(*weights.values())
    if method in WITH_FEEDBACK:
        factor = factor or factor_of(seen.squares, options.gptq)
        codes = {name: gptq.quantize_weight(one, factor, grid, options.gptq)[0] for name, one in weights.items()}
    else:
        hessian = factor.hessian() if factor else seen.squares
        codes = {
            name: awq.rounded(one, hessian, grid, options.awq)
            if method == "awq"
            else search.quantize_weight(one, hessian.diagonal(), grid)
            for name, one in weights.items()
        }
    values = {name: weight.dequantize() for name, weight in codes.items()}
    return values if channel_scales is None else {name: value / channel_scales for name, value in values.items()}


def _loss(weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor], judges: Iterable[Rows]) -> float:
    total = 0.0
    for rows in judges:
        for name, weight in weights.items():
            lost = rows.inputs @ (weight - rounded[name]).T
            if rows.shift is not None:
                lost += rows.shift @ weight.T
            total += rows.scaled(lost).square_().sum(dtype=torch.float64).item()
    return total
