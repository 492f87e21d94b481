"""Integer grids: `QuantizedWeight` is the seam between algorithms and everything that stores or runs weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Smallest scale we store. A group of zeros gets it, and its codes are exact zeros. Above the smallest normal float16.
SCALE_FLOOR = 2.0**-14


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight as integer codes on a per-group affine grid.

    codes   (out, in)     uint8 in [0, 2**bits)
    scales  (out, groups) float32 > 0, every value exactly representable in `scale_dtype`
    zeros   (out, groups) uint8 in [0, 2**bits), or None: the grid is symmetric about code 2**(bits - 1)
    Input column j belongs to group j // group_size, and groups == ceil(in / group_size); one group is "per channel".
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    scale_dtype: torch.dtype

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = -(-columns // self.group_size)
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.float32:
            raise TypeError(f"codes must be uint8 and scales float32, got {self.codes.dtype} and {self.scales.dtype}")
        if self.scales.shape != (rows, groups) or (self.zeros is not None and self.zeros.shape != (rows, groups)):
            raise ValueError(
                f"codes {tuple(self.codes.shape)} with group size {self.group_size} need ({rows}, {groups})"
            )

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, first: int, count: int) -> "QuantizedWeight":
        """The weight of these output channels alone."""
        some = slice(first, first + count)
        zeros = None if self.zeros is None else self.zeros[some]
        return replace(self, codes=self.codes[some], scales=self.scales[some], zeros=zeros)

    def to(self, device: torch.device) -> "QuantizedWeight":
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) in `dtype`: (code - zero) * scale, computed in float32. The definition of what the codes mean."""
        return dequantize_codes(self.codes, self.scales, self.zeros, bits=self.bits, group_size=self.group_size).to(
            dtype
        )

    def scale_rows(self, factors: Tensor) -> "QuantizedWeight":
        """The weight with row r multiplied by factors[r] > 0: only the scales change (rounded to `scale_dtype`)."""
        scales = round_scales(self.scales * factors.float()[:, None], self.scale_dtype)
        return replace(self, scales=scales)


def join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same inputs, bits, groups and symmetry, one behind the other."""
    first = weights[0]
    return replace(
        first,
        codes=torch.cat([one.codes for one in weights]),
        scales=torch.cat([one.scales for one in weights]),
        zeros=None if first.zeros is None else torch.cat([one.zeros for one in weights if one.zeros is not None]),
    )


def mid_code(bits: int) -> int:
    """The code that means zero on a symmetric grid."""
    return 1 << (bits - 1)


def round_scales(scales: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """float32 scales rounded to what `scale_dtype` can hold, from SCALE_FLOOR up to the dtype's largest value.

    Rounding before the codes are chosen keeps codes and stored scales in agreement.
    """
    limit = torch.finfo(scale_dtype).max
    return scales.clamp(SCALE_FLOOR, limit).to(scale_dtype).float()


def minmax_grid(weight: Tensor, *, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> scales and zeros, both float32 (out, groups), from each group's extremes; scales unrounded.

    Symmetric: scale = max|w| / ((2**bits - 1) / 2) and zero = mid code (the convention of compressed-tensors).
    Asymmetric: the range always contains 0, so that 0 is exact, and zeros are integers in [0, 2**bits).
    """
    groups = split_groups(weight.float(), group_size)
    top = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(-1) / (top / 2)
        return scales.clamp_min(SCALE_FLOOR), torch.full_like(scales, mid_code(bits))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / top).clamp_min(SCALE_FLOOR)
    return scales, (-low / scales).round().clamp(0, top)


def split_groups(matrix: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> (rows, groups, group_size), zero-padded where the last group is short."""
    short = -matrix.shape[1] % group_size
    padded = torch.nn.functional.pad(matrix, (0, short)) if short else matrix
    return padded.reshape(matrix.shape[0], -1, group_size)


def expand_groups(values: Tensor, *, group_size: int, columns: int) -> Tensor:
    """(rows, groups) -> (rows, columns): each group's value under each of its columns."""
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def quantize_codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """(out, in) float -> uint8 codes: round half to even of w / scale, plus zero, clamped to [0, 2**bits)."""
    columns = weight.shape[1]
    ratio = weight.float() / expand_groups(scales, group_size=group_size, columns=columns)
    offset: Tensor | float = mid_code(bits)
    if zeros is not None:
        offset = expand_groups(zeros.float(), group_size=group_size, columns=columns)
    return (ratio.round() + offset).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize_codes(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """uint8 codes (out, in) -> float32 (out, in)."""
    columns = codes.shape[1]
    offset: Tensor | float = mid_code(bits)
    if zeros is not None:
        offset = expand_groups(zeros.float(), group_size=group_size, columns=columns)
    return (codes.float() - offset) * expand_groups(scales, group_size=group_size, columns=columns)


def quantize_nearest(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Round every weight to its nearest code on the given grid (scales are rounded to `scale_dtype` first)."""
    scales = round_scales(scales, scale_dtype)
    codes = quantize_codes(weight, scales, zeros, bits=bits, group_size=group_size)
    return QuantizedWeight(
        codes, scales, None if zeros is None else zeros.to(torch.uint8), bits, group_size, scale_dtype
    )
