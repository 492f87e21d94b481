"""GPTQ (Frantar et al., arXiv:2210.17323) written as LDLQ (Chee et al., arXiv:2307.13304), which gives the same codes.

The layer's loss is tr(E H E^T), E = W - Q (out, in) and H = E[x x^T] (in, in) of the layer's inputs. With H = M D M^T, M unit upper
triangular and D diagonal, it is sum_i D_i ||E_i + sum_{j<i} E_j M_ji||^2, so column i is best rounded from
W_i + sum_{j<i} E_j M_ji: one Cholesky factor and no inverse. Columns run by falling diagonal of H ("static act-order"); a
column's group is that of its place in the original matrix and its grid is fixed before rounding, so no permutation is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.recipe import GptqOptions, Scheme
from vlmquant.stream import Stage

COLUMN_BLOCK = 64
"""Columns rounded between two matrix products that carry the feedback of all earlier ones."""
DAMPING_LADDER = (1.0, 10.0, 100.0)
"""Factors on the damping when the Cholesky factorisation fails; after the last, columns are rounded without feedback."""
DEAD_FRACTION = 1e-12
"""An input whose mean square is below this share of the largest never fires: its weight cannot matter and becomes zero."""


@dataclass(frozen=True)
class Factor:
    """The order of the columns and the feedback matrix M (in, in), unit upper triangular, in that order."""

    order: Tensor
    feedback: Tensor
    damping: float
    """The damping that succeeded; infinite where none did and M is the identity."""


def quantize_stage(stage: Stage) -> dict[str, QuantizedWeight]:
    """Quantize all linears of a stage with one Hessian and one factorisation: their rows are independent."""
    scheme, options = stage.scheme, stage.options.gptq
    names = list(stage.weights)
    weight = torch.cat([stage.weights[name] for name in names])
    hessian = stage.hessian()
    factor = factorize(hessian, options)
    if factor.damping != options.damping:
        stage.note(f"Hessian not positive definite at damping {options.damping}; used {factor.damping}")
    quantized = quantize_weight(weight, hessian, factor, scheme=scheme, options=options, scale_dtype=stage.scale_dtype)
    return split_rows(quantized, {name: stage.weights[name].shape[0] for name in names})


def split_rows(quantized: QuantizedWeight, rows: dict[str, int]) -> dict[str, QuantizedWeight]:
    """Undo the concatenation of several linears' rows."""
    parts, start = {}, 0
    for name, count in rows.items():
        part = slice(start, start + count)
        zeros = None if quantized.zeros is None else quantized.zeros[part]
        parts[name] = QuantizedWeight(
            quantized.codes[part], quantized.scales[part], zeros, quantized.bits, quantized.group_size, quantized.scale_dtype
        )
        start += count
    return parts


def factorize(hessian: Tensor, options: GptqOptions) -> Factor:
    """H (in, in) float32, symmetric -> column order and feedback matrix of the damped H, computed in float64.

    The factorisation is of the equilibrated matrix (unit diagonal), which keeps it well conditioned under massive activations.
    """
    exact = hessian.double()
    diagonal = exact.diagonal()
    dead = diagonal <= DEAD_FRACTION * diagonal.max()
    exact = exact.clone()
    exact.diagonal()[dead] = 1.0
    mean = exact.diagonal().mean().item()
    columns = torch.arange(exact.shape[0])
    order = torch.argsort(exact.diagonal(), descending=True, stable=True) if options.activation_order else columns
    exact = exact[order][:, order]
    for factor in DAMPING_LADDER:
        damped = exact.clone()
        damped.diagonal().add_(factor * options.damping * mean)
        scale = damped.diagonal().sqrt()
        damped.div_(scale[:, None]).div_(scale[None, :])
        # Cholesky of the matrix read backwards, read backwards again, is the upper factor: H' = R R^T.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0).flip(1))
        if not failed:
            upper = scale[:, None] * lower.flip(0).flip(1)
            return Factor(order, (upper / upper.diagonal()[None, :]).float(), factor * options.damping)
    return Factor(order, torch.eye(len(columns)), float("inf"))


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    factor: Factor,
    *,
    scheme: Scheme,
    options: GptqOptions,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """weight (out, in) float32 -> codes with error feedback on a grid searched before rounding."""
    rows, columns = weight.shape
    group_size = scheme.group_size or columns
    diagonal = hessian.diagonal()
    weight = weight.masked_fill(diagonal <= DEAD_FRACTION * diagonal.max(), 0.0)
    scales, zeros = search_scales(
        weight,
        diagonal,
        bits=scheme.bits,
        group_size=group_size,
        symmetric=scheme.symmetric,
        search=options.scale_search,
        scale_dtype=scale_dtype,
    )
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    codes[factor.order] = _round_columns(weight, scales, zeros, factor, bits=scheme.bits, group_size=group_size)
    return QuantizedWeight(
        codes.T.contiguous(),
        scales,
        None if zeros is None else zeros.to(torch.uint8),
        scheme.bits,
        group_size,
        scale_dtype,
    )


def _round_columns(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, factor: Factor, *, bits: int, group_size: int
) -> Tensor:
    """uint8 codes (in, out), columns in processing order. Everything is transposed so that a column lies in one piece."""
    columns, rows = weight.shape[1], weight.shape[0]
    target = weight.T[factor.order].contiguous()
    errors = torch.empty_like(target)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    column_group = (factor.order // group_size).tolist()
    scale_of, inverse_of = scales.T.contiguous(), (1.0 / scales).T.contiguous()
    zero_of = None if zeros is None else zeros.T.contiguous()
    middle, top = float(mid_code(bits)), float(2**bits - 1)
    feedback_to = factor.feedback.T.contiguous()  # row i holds M[:, i]: what earlier errors add to column i
    for start in range(0, columns, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, columns)
        wanted = torch.addmm(target[start:end], feedback_to[start:end, :start], errors[:start])
        for i in range(start, end):
            group = column_group[i]
            zero = middle if zero_of is None else zero_of[group]
            value = wanted[i - start]
            if i > start:
                value = torch.addmv(value, errors[start:i].T, feedback_to[i, start:i])
            code = (value * inverse_of[group]).round_().add_(zero).clamp_(0.0, top)
            codes[i] = code
            torch.sub(target[i], code.sub_(zero).mul_(scale_of[group]), out=errors[i])
    return codes
