"""GPTQ (Frantar et al., arXiv:2210.17323) written as LDLQ (Chee et al., arXiv:2307.13304), which gives the same codes.

The layer's loss is tr(E H E^T), E = W - Q (out, in) and H = E[x x^T] (in, in) of the layer's inputs. With H = M D M^T,
M unit upper triangular and D diagonal, it is sum_i D_i ||E_i + sum_{j<i} E_j M_ji||^2, so column i is best rounded from
W_i + sum_{j<i} E_j M_ji: one Cholesky factor and no inverse. Columns run by falling diagonal of H ("static act-order");
a column's group is that of its place in the original matrix and its grid is fixed before rounding, so that no
permutation is stored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import Grid, QuantizedWeight, split_rows
from vlmquant.recipe import GptqOptions
from vlmquant.stream import Stage

COLUMN_BLOCK = 64
"""Columns rounded between two matrix products that carry the feedback of all earlier ones."""
DAMPING_LADDER = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the damping, tried until the factorisation succeeds; after the last, columns are rounded alone."""
DEAD_FRACTION = 1e-12
"""An input whose mean square is at most this share of the largest never fires: no more is known of it."""
ROWS_PER_THREAD = 8192
"""With fewer rows than this the loop over columns runs on one thread: its steps are too short to be worth a barrier."""


@dataclass(frozen=True)
class Factor:
    """The order of the columns and the feedback matrix M (in, in) float32, unit upper triangular, in that order."""

    order: Tensor
    feedback: Tensor
    damping: float
    """The damping that succeeded; infinite where none did and M is the identity."""


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Quantize all linears of a stage with one Hessian and one factorisation: their rows are independent."""
    options = stage.options.gptq
    hessian = stage.hessian()
    if dead := int(dead_inputs(hessian).sum()):
        stage.note(
            f"{dead} of {len(hessian)} inputs never fired during calibration; their weights were rounded to nearest"
        )
    factor = factorize(hessian, options)
    if factor.damping == float("inf"):
        stage.note("the Hessian stayed singular however it was damped; rounded to nearest, without error feedback")
    elif factor.damping != options.damping:
        stage.note(f"the Hessian is singular at damping {options.damping:g}; used {factor.damping:g}")
    grid = stage.grid.fitted(*stage.weights.values())
    if grid.group_rows > 1:  # blocks of rows end where a linear does
        return {
            name: quantize_weight(weight, hessian, factor, grid, options=options)
            for name, weight in stage.weights.items()
        }
    quantized = quantize_weight(torch.cat(list(stage.weights.values())), hessian, factor, grid, options=options)
    return dict(zip(stage.weights, split_rows(quantized, map(len, stage.weights.values())), strict=True))


def dead_inputs(hessian: Tensor) -> Tensor:
    """bool (in,): the inputs that never fire."""
    diagonal = hessian.diagonal()
    return diagonal <= DEAD_FRACTION * diagonal.max()


def factorize(hessian: Tensor, options: GptqOptions) -> Factor:
    """H (in, in) float32, symmetric -> column order and feedback matrix of the damped H, computed in float64.

    The matrix is equilibrated (unit diagonal) first, which keeps it well conditioned under massive activations.
    """
    exact = hessian.double()
    order = torch.arange(len(exact), device=exact.device)
    if options.activation_order:
        order = torch.argsort(exact.diagonal(), descending=True, stable=True)
    mean = exact.diagonal().mean().item() or 1.0
    exact = exact[order][:, order]
    for factor in DAMPING_LADDER:
        damped = exact.clone()
        damped.diagonal().add_(factor * options.damping * mean)
        scale = damped.diagonal().sqrt()
        damped.div_(scale[:, None]).div_(scale[None, :])
        # Cholesky of the matrix read backwards, read backwards again, is the upper factor: H' = R R^T.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = scale[:, None] * lower.flip(0, 1)
            return Factor(order, (upper / upper.diagonal()).float(), factor * options.damping)
    return Factor(order, torch.eye(len(order), device=order.device), float("inf"))


def quantize_weight(
    weight: Tensor, hessian: Tensor, factor: Factor, grid: Grid, *, options: GptqOptions
) -> QuantizedWeight:
    """weight (out, in) float32 -> codes with error feedback on a grid that was searched before rounding."""
    scales, zeros = search_scales(weight, hessian.diagonal(), grid, search=options.scale_search)
    with _few_threads(rows=len(weight)):
        codes = round_columns(weight, scales, zeros, factor, grid)
    return QuantizedWeight(codes, scales, None if zeros is None else zeros.to(torch.uint8), grid)


def round_columns(weight: Tensor, scales: Tensor, zeros: Tensor | None, factor: Factor, grid: Grid) -> Tensor:
    """float32 weight (out, in), scales and zeros (out, groups) -> uint8 codes (out, in), in the order of the weight.

    Inside, everything is transposed and in processing order, so that a column lies in one piece.
    """
    columns = weight.shape[1]
    target = weight.T[factor.order].contiguous()
    errors, values = torch.empty_like(target), torch.empty_like(target)
    group_of = factor.order // grid.group_size
    scale_of, inverse_of = scales.T.contiguous(), (1.0 / scales).T.contiguous()
    zero_of = None if zeros is None else zeros.T.contiguous()
    bounds_of = [grid.bounds(None if zero_of is None else zero_of[group]) for group in range(scales.shape[1])]
    feedback_to = factor.feedback.T.contiguous()  # row i holds M[:, i]: what earlier errors add to column i
    groups = group_of.tolist()
    for start in range(0, columns, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, columns)
        wanted = torch.addmm(target[start:end], feedback_to[start:end, :start], errors[:start])
        for i in range(start, end):
            group = groups[i]
            value = wanted[i - start]
            if i > start:
                value = torch.addmv(value, errors[start:i].T, feedback_to[i, start:i])
            torch.mul(value, inverse_of[group], out=values[i])
            grid.round_(values[i], *bounds_of[group])
            torch.sub(target[i], values[i] * scale_of[group], out=errors[i])
    codes = grid.encode(values, None if zero_of is None else zero_of[group_of])
    original = torch.empty_like(codes)
    original[factor.order] = codes
    return original.T.contiguous()


@contextmanager
def _few_threads(*, rows: int) -> Iterator[None]:
    """torch on as many threads as this many rows are worth."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, -(-rows // ROWS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
