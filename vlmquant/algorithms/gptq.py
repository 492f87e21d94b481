"""GPTQ (Frantar et al., arXiv:2210.17323) written as LDLQ (Chee et al., arXiv:2307.13304), which gives the same codes.

The layer's loss is tr(E H E^T), E = W - Q (out, in) and H = E[x x^T] (in, in) of the layer's inputs. With H = M D M^T,
M unit upper triangular and D diagonal, it is sum_i D_i ||E_i + sum_{j<i} E_j M_ji||^2, so column i is best rounded from
W_i + sum_{j<i} E_j M_ji: one Cholesky factor and no inverse. Columns run by falling diagonal of H ("static act-order");
a column's group is that of its place in the original matrix and its grid is fixed before rounding, so that no
permutation is stored.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vlmquant.algorithms import loops
from vlmquant.algorithms.coupled import COLUMN_BLOCK, round_both
from vlmquant.algorithms.factor import Factor
from vlmquant.algorithms.folding import Find, factors_of
from vlmquant.algorithms.scales import search_scales
from vlmquant.algorithms.target import aim_stage, factor_of
from vlmquant.grid import Grid, QuantizedWeight, join_rows
from vlmquant.kernels.cuda import rounding
from vlmquant.recipe import GptqOptions
from vlmquant.stream import Stage, divided

ENERGY_ROWS = 256
"""What a loss is divided by, tr(W H W^T), is taken from at most so many rows, evenly drawn: all of a 7B model's take as
long as their rounding."""
DEAD_FRACTION = 1e-12
"""An input whose mean square is at most this share of the largest never fires: no more is known of it."""


def quantize_stage(stage: Stage, find: Find | None = None) -> dict[str, QuantizedWeight]:
    """Quantize all linears of a stage with one Hessian and one factorization: their rows are independent.

    find: what finds channel scales (in,), by which weights are multiplied and the producer of their inputs is divided.
    """
    options, weights = stage.options.gptq, stage.stored
    if stage.is_aimed:
        target = aim_stage(stage, weights, find=find)
        factor, weights, channel_scales = target.factor, target.weights, target.channel_scales
    else:
        factor, channel_scales = stage.of_hessian(partial(_scaled, options=options, find=find))
        if channel_scales is not None:
            weights = {name: weight.float() * channel_scales for name, weight in weights.items()}
    if channel_scales is not None:
        stage.fold(channel_scales)
    if dead := int(dead_inputs(factor.mean_square).sum()):
        stage.note(
            f"{dead} of {len(factor.order)} inputs never fired during calibration; "
            "their weights were rounded to nearest"
        )
    if factor.damping == float("inf"):
        stage.note("the Hessian stayed singular however it was damped; rounded to nearest, without error feedback")
    elif factor.damping != options.damping:
        stage.note(f"the Hessian is singular at damping {options.damping:g}; used {factor.damping:g}")
    grid, quantized = stage.grid.fitted(*weights.values()), dict[str, QuantizedWeight]()

    def rounded(wanted: Tensor) -> tuple[QuantizedWeight, Tensor]:
        return quantize_weight(wanted.float(), factor, grid, options)

    for name, wanted in weights.items():  # in float32 one is enough at a time
        if stage.weighs_outputs:
            parts = stage.of_output_moments(name, partial(_rounded_for_answers, wanted, factor, grid, options))
        else:
            parts = stage.by_rows(wanted, rounded, work=len(wanted) * wanted.shape[1] ** 2)
        quantized[name] = join_rows([weight for weight, _ in parts])
        some = wanted[:: -(-len(wanted) // ENERGY_ROWS)]
        whole = factor.energy(some.float()).double().mean().item() * len(wanted)
        stage.measured(name, torch.cat([lost for _, lost in parts]).sum().item(), whole)
    return quantized


def _scaled(hessian: Tensor, *, options: GptqOptions, find: Find | None) -> tuple[Factor, Tensor | None]:
    """The factor of H, in its memory, as it is with inputs divided by the channel scales that are found; and these."""
    factor = factor_of(hessian, options)
    scales = None if find is None else find(factor)
    return (factor if scales is None else factor_of(divided(factor.hessian(), scales), options)), scales


def dead_inputs(mean_square: Tensor) -> Tensor:
    """bool (in,): the inputs that never fire."""
    return mean_square <= DEAD_FRACTION * mean_square.max()


def quantize_weight(
    weight: Tensor, factor: Factor, grid: Grid, options: GptqOptions, *, outputs: Factor | None = None
) -> tuple[QuantizedWeight, Tensor]:
    """weight (out, in) float32 -> codes with error feedback on a grid that was searched before rounding.

    And for each row e of their error e H e^T, float64 (out,). outputs: of G, where rows feed each other: see `coupled`.
    """
    scales, zeros = search_scales(
        weight, factor.mean_square, grid, search=options.scale_search, signed=options.signed_scales
    )
    if outputs is None:
        codes, lost = round_columns(weight, scales, zeros, factor, grid)
    else:
        codes, lost = round_both(weight, scales, zeros, factor, outputs, grid)
    return QuantizedWeight(codes, scales, None if zeros is None else zeros.to(torch.uint8), grid), lost


def _rounded_for_answers(
    weight: Tensor, factor: Factor, grid: Grid, options: GptqOptions, squares: Sequence[Tensor]
) -> list[tuple[QuantizedWeight, Tensor]]:
    """quantize_weight of some rows after the other, by the second moments of their gradients: see of_output_moments."""
    device, factor, found = weight.device, factor.to("cpu"), []
    factors = factors_of(squares, options, alive=weight.any(1))
    for rows, outputs in zip(torch.split(weight, list(map(len, squares))), factors, strict=True):
        quantized, lost = quantize_weight(rows.float().cpu(), factor, grid, options, outputs=outputs)
        found.append((quantized.to(device), lost))
    return found


def _loop(weight: Tensor, grid: Grid) -> Callable[..., None]:
    """What rounds a block of a weight's columns here: compiled on a CPU, a kernel on a GPU, or else torch."""
    if loops.fit(weight):
        return loops.round_block
    return rounding.round_block if rounding.fits(weight.device, grid) else rounding.by_torch


def round_columns(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, factor: Factor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """float32 weight (out, in), scales and zeros (out, groups) -> uint8 codes (out, in), in the order of the weight.

    Inside, everything is transposed and in the order of processing, so that a column lies in one piece. The loss comes
    with it, float64 (out,): sum_i D_i (what column i was rounded from, less its value)^2 is that of the damped H.
    """
    rows, columns = weight.shape
    turned, group_of = weight.T, factor.order // grid.group_size
    scales, zeros = scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()
    round_block = _loop(weight, grid)
    errors = torch.empty(columns, rows, device=weight.device)
    codes = torch.empty(columns, rows, device=weight.device, dtype=torch.uint8)
    lost = torch.zeros(rows, device=weight.device, dtype=torch.float64)
    for start in range(0, columns, COLUMN_BLOCK):
        here = slice(start, min(start + COLUMN_BLOCK, columns))
        target = turned[factor.order[here]].contiguous()
        wanted = torch.addmm(target, factor.matrix[here, :start], errors[:start])
        values = torch.empty_like(target)
        round_block(
            wanted,
            target,
            values,
            errors[here],
            factor.matrix[here, here],
            scales,
            zeros,
            group_of[here],
            grid,
        )
        lost += factor.pivots[here].double() @ wanted.double().square_()
        lost -= factor.added[here] @ errors[here].double().square_()
        codes[factor.order[here]] = grid.encode(values, None if zeros is None else zeros[group_of[here]])
    if factor.damping == float("inf"):
        lost = factor.energy(errors[factor.order.argsort()].T).double()
    return codes.T.contiguous(), lost.clamp_(min=0)
