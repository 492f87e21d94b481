"""The second moments of a layer's inputs, factorized where they lie: H = M D M^T, M unit upper triangular, D diagonal.

H is symmetric, so one matrix holds both: below its diagonal comes M^T, above it stays H. Nothing else of its size is
needed where float32 does.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PANEL = 256
"""Columns factorized between two matrix products; their own small factor is made in float64."""
DAMPING_LADDER = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the damping, tried until the factorization succeeds; after the last, columns are rounded alone."""
TOKENS_ALIKE = 5
"""Tokens that say as much of how inputs go together as one drawn by itself: those of a sample are alike. Measured by
how far second moments of samples held out differ (benchmarks/accuracy/LOG.md)."""
CAUTION = 3
"""Times the shrinkage that comes nearest to the correlations of all tokens: error feedback goes by their inverse, which
errs more than they do."""
MOST_SHRUNK = 0.5
"""Of correlations, where few tokens say next to nothing of them."""
LEAST_PIVOT = 2.0**-8
"""Of float32: an input of which a smaller share (in root mean square) is not told by others is left to float64."""


@dataclass(frozen=True)
class Factor:
    """H, its inputs in the order of processing, and what it is made of once it is damped.

    matrix: float32 (in, in). Row i holds, below the diagonal, what the errors of earlier columns add to column i: M^T.
    """

    order: Tensor
    matrix: Tensor
    mean_square: Tensor
    """The diagonal of H, undamped, float32 (in,), in the order of the weight's columns."""
    pivots: Tensor
    """The diagonal of D, float32 (in,), in the order of processing."""
    damping: float
    """The damping that succeeded, as a share of the mean of the diagonal; infinite where none did: M^T is then 0."""
    added: Tensor
    """What damping and shrinkage have added to the diagonal, float64 (in,), in the order of processing."""

    def unexplained(self) -> Tensor:
        """The diagonal of D in the order of the weight's columns, float32 (in,): of an input's mean square, what those
        processed after it do not tell."""
        return self.pivots[self.order.argsort()]

    def energy(self, rows: Tensor) -> Tensor:
        """rows X (out, in), columns as in the weight -> the diagonal of X H X^T, float32 (out,). Overwrites nothing."""
        found = torch.zeros(len(rows), device=rows.device)
        columns = len(self.order)
        ordered = rows[:, self.order]
        for start, end in _panels(columns):
            here = ordered[:, start:end]
            earlier = ordered[:, :start] @ self.matrix[:start, start:end]
            block = _symmetric(self.matrix[start:end, start:end])
            block.diagonal().copy_(self.mean_square[self.order[start:end]])
            found += ((2 * earlier + here @ block) * here).sum(1)
        return found

    def solve(self, rows: Tensor) -> Tensor:
        """rows B (out, in), columns as in the weight -> B H^-1 of the damped H, float32 (out, in)."""
        if self.damping == float("inf"):
            return torch.zeros_like(rows)
        # B = X M D M^T. Only the triangle below the diagonal is read, and the diagonal taken for 1.
        found: Tensor = torch.linalg.solve_triangular(
            self.matrix, rows[:, self.order], upper=False, left=False, unitriangular=True
        )
        found /= self.pivots
        found = torch.linalg.solve_triangular(self.matrix.T, found, upper=True, left=False, unitriangular=True)
        return found[:, self.order.argsort()]

    def to(self, device: torch.device | str) -> "Factor":
        """The same, on another device."""
        return replace(
            self,
            order=self.order.to(device),
            matrix=self.matrix.to(device),
            mean_square=self.mean_square.to(device),
            pivots=self.pivots.to(device),
            added=self.added.to(device),
        )

    def hessian(self) -> Tensor:
        """H as it was given, undamped, in the memory of the factor, which is used up."""
        for start, end in _panels(len(self.order)):
            self.matrix[start:end, :start] = self.matrix[:start, start:end].T
            self.matrix[start:end, start:end] = _symmetric(self.matrix[start:end, start:end])
        self.matrix.diagonal().copy_(self.mean_square[self.order])
        _reorder(self.matrix, self.order.argsort())
        return self.matrix


def factorize(hessian: Tensor, damping: float, *, activation_order: bool, shrinkage: float = 0.0) -> Factor:
    """H (in, in) float32, symmetric, whose memory the result takes over -> the factor of the damped H.

    activation_order: inputs with the largest mean square come first. shrinkage: what is added to each input's own mean
    square, as a fraction of it, so that all correlations are as much smaller (Schaefer and Strimmer, 2005). The matrix
    is equilibrated (unit diagonal), which keeps it well conditioned under massive activations; where it is not well
    enough for float32, float64 does it.
    """
    diagonal = hessian.diagonal().clone()
    order = torch.arange(len(diagonal), device=hessian.device)
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        _reorder(hessian, order)
    mean = diagonal.double().mean().item() or 1.0
    for factor in DAMPING_LADDER:
        own = diagonal[order].double()
        added = shrinkage * own + factor * damping * mean
        damped = own + added
        for dtype in (torch.float32, torch.float64):
            pivots = _decompose(hessian, damped, dtype)
            if pivots is not None:
                return Factor(order, hessian, diagonal, pivots, factor * damping, added)
    for start, end in _panels(len(order)):
        hessian[start:end, :start] = 0
        hessian[start:end, start:end].triu_()
    return Factor(order, hessian, diagonal, diagonal[order], float("inf"), torch.zeros_like(added))


def estimate_shrinkage(hessian: Tensor, tokens: float) -> float:
    """What `factorize` is to add of each input's own mean square, H (in, in) float32 being that of so many tokens.

    The correlations r of n tokens that are drawn by themselves differ from those of all tokens by about 1 / n in the
    mean square. They come nearest to these as (1 - l) r with l the sum of 1 / n over the sum of r^2, both over all
    pairs of inputs (Schaefer and Strimmer, 2005).
    """
    columns, total = len(hessian), 0.0
    roots = hessian.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(roots > 0, roots.reciprocal(), 0.0)
    for start, end in _panels(columns):
        correlations = hessian[start:end] * inverse[start:end, None] * inverse
        total += correlations.square_().sum(dtype=torch.float64).item()
    told = total - (roots > 0).sum().item()
    noise = TOKENS_ALIKE * columns * (columns - 1) / max(tokens, 1.0)
    share = min(CAUTION * noise / told, MOST_SHRUNK) if told > 0 else 0.0
    return share / (1 - share)


def _panels(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, columns)) for start in range(0, columns, PANEL)]


def _reorder(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of a square matrix in this order, in place."""
    for start, end in _panels(len(order)):
        matrix[:, start:end] = matrix[order, start:end]
    for start, end in _panels(len(order)):
        matrix[start:end] = matrix[start:end, order]


def _symmetric(block: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle this is."""
    return block.triu() + block.triu(1).T


def _decompose(matrix: Tensor, diagonal: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Put M^T below the diagonal of a matrix, given what stands above it and its diagonal (in,) float64; -> D.

    None where the matrix is not positive definite, or not clearly enough so for this dtype. With S = diag(s) for unit
    diagonal, S^-1 H S^-1 = L^T L; panels of L are made from the last to the first, each by one product with those
    behind it (a Cholesky decomposition read backwards, left-looking).
    """
    scale = diagonal.sqrt()
    inverse = scale.reciprocal().to(dtype)
    lower = matrix if dtype == matrix.dtype else torch.empty_like(matrix, dtype=dtype)
    roots = torch.empty_like(diagonal)
    least = LEAST_PIVOT if dtype == torch.float32 else 0.0
    for start, end in reversed(_panels(len(matrix))):
        here = slice(start, end)
        left = (matrix[:start, here].T * inverse[here, None]).mul_(inverse[:start])
        block = _symmetric(matrix[here, here]).double().mul_(inverse[here, None]).mul_(inverse[here])
        block.diagonal().fill_(1.0)
        behind = lower[end:, here]
        if len(behind):
            left.addmm_(behind.T, lower[end:, :start], alpha=-1)
            block -= (behind.T @ behind).double()
        root, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
        root = root.flip(0, 1)  # block = root root^T, upper triangular
        if failed or root.diagonal().min() < least:
            return None
        lower[here, :start] = torch.linalg.solve_triangular(root.to(dtype), left, upper=True)
        roots[here] = root.diagonal()
        _set_lower(lower[here, here], root.T.to(dtype))
    for start, end in _panels(len(matrix)):
        factors = (scale[start:end] * roots[start:end]).reciprocal()
        here = slice(start, end)
        rows = torch.cat([lower[here, :start], lower[here, here].tril()], 1).double()
        rows.mul_(factors[:, None]).mul_(scale[:end])
        matrix[here, :start] = rows[:, :start].to(matrix.dtype)
        _set_lower(matrix[here, here], rows[:, start:].to(matrix.dtype))
    return (scale * roots).square_().to(matrix.dtype)


def _set_lower(block: Tensor, values: Tensor) -> None:
    """Replace what stands below the diagonal."""
    block.triu_().add_(values.tril(-1))
