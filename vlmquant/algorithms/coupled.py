"""GPTQ where outputs count, and make up for each other, as the gradients of the answers say (YAQA, arXiv:2505.22988).

The loss is tr(G E H E^T), E = W - Q (out, in), H = E[x x^T] (in, in) and G = E[g g^T] (out, out), g being the gradient
of the answers by what the layer puts out. With H = M D M^T and G = N C N^T, M and N unit upper triangular, it is
sum_oi C_o D_i (N^T E M)_oi^2. So what stands in row o and column i is best rounded from

    W_oi + F_oi + sum_{p<o} N_po (E + F)_pi,    F = E M - E:

the feedback of earlier columns, as ever, and that of earlier rows. With G = 1 it is GPTQ.
"""

import torch
from torch import Tensor

from vlmquant.algorithms import loops
from vlmquant.algorithms.factor import Factor
from vlmquant.grid import Grid

COLUMN_BLOCK = 128
"""Columns rounded between two matrix products that carry the feedback of all earlier ones. The kernel takes no more."""


def round_both(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, factor: Factor, outputs: Factor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """float32 weight (out, in), scales and zeros (out, groups), the factors of H and G -> uint8 codes (out, in).

    And the layer's own loss e H e^T of each row, float64 (out,). Row after row: so it is done on the CPU.
    """
    assert weight.device.type == "cpu", "every element waits for its neighbours"
    rows, columns = weight.shape
    round_block = loops.round_block if loops.fit(weight) else by_torch
    group_of = factor.order // grid.group_size
    scales, zeros = scales.T, None if zeros is None else zeros.T
    moved = torch.empty(columns, rows)  # E + F of the rows that are done, in the order of processing, as all below
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    lost = torch.zeros(rows, dtype=torch.float64)
    for start in range(0, rows, loops.TILE):
        tile = outputs.order[start : start + loops.TILE]
        end = start + len(tile)
        target = weight[tile].T[factor.order].contiguous()
        pull = moved[:, :start] @ outputs.matrix[start:end, :start].T
        coupling = outputs.matrix[start:end, start:end].T.contiguous()
        tile_scales, tile_zeros = scales[:, tile].contiguous(), None if zeros is None else zeros[:, tile].contiguous()
        errors, values = torch.empty_like(target), torch.empty_like(target)
        for left in range(0, columns, COLUMN_BLOCK):
            here = slice(left, min(left + COLUMN_BLOCK, columns))
            wanted = torch.addmm(target[here], factor.matrix[here, :left], errors[:left])
            round_block(
                wanted,
                target[here],
                values[here],
                errors[here],
                factor.matrix[here, here],
                tile_scales,
                tile_zeros,
                group_of[here],
                grid,
                pull[here],
                coupling,
            )
            moved[here, start:end] = wanted
            lost[tile] += factor.pivots[here].double() @ wanted.double().square_()
            lost[tile] -= factor.added[here] @ errors[here].double().square_()
        codes[factor.order[:, None], tile] = grid.encode(values, None if tile_zeros is None else tile_zeros[group_of])
        if factor.damping == float("inf"):
            lost[tile] = factor.energy(errors[factor.order.argsort()].T).double()
    return codes.T.contiguous(), lost.clamp_(min=0)


def by_torch(
    wanted: Tensor,
    target: Tensor,
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_of: Tensor,
    grid: Grid,
    pull: Tensor,
    coupling: Tensor,
) -> None:
    """kernels.cuda.rounding.by_torch for rows that feed each other: pull (columns, out) is what earlier rows add, and
    gets more; coupling (out, out) leads there, above its diagonal.

    One diagonal of the block after the other: what stands on it has no more to wait for.
    """
    columns, rows = wanted.shape
    feedback, coupling = feedback.tril(-1), coupling.triu(1)
    for diagonal in range(columns + rows - 1):
        i = torch.arange(max(diagonal - rows + 1, 0), min(diagonal + 1, columns))
        row = diagonal - i
        value, scale = wanted[i, row], scales[group_of[i], row]
        whole = (value + pull[i, row]) * scale.reciprocal()
        grid.round_(whole, *grid.bounds(None if zeros is None else zeros[group_of[i], row]))
        rounded = whole * scale
        values[i, row], errors[i, row], wanted[i, row] = whole, target[i, row] - rounded, value - rounded
        wanted[:, row] += feedback[:, i] * errors[i, row]
        pull[i] += coupling[row] * wanted[i, row][:, None]
