"""Grids of weights. `QuantizedWeight` is the seam between algorithms and everything that stores or runs weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:  # recipes need packages that running a layer does not
    from vlmquant.recipe import Scheme

SCALE_FLOOR = 2.0**-14
"""Smallest scale of an integer grid: a group of zeros gets it. Above the smallest normal float16."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of 4-bit floating point, by code; a sign bit stands before them (OCP Microscaling Formats 1.0, 5.3.3)."""
E4M3 = torch.float8_e4m3fn
ONE_EIGHTH = 0x20
"""The code of E4M3's eps, 0.125."""
E8M0 = torch.float8_e8m0fnu
"""Powers of two (OCP Microscaling Formats 1.0, 5.4.1)."""
E4M3_MAX = torch.finfo(E4M3).max
"""448."""
CHUNK_ELEMENTS = 1 << 17
"""Weights that are handled at a time on a CPU: what is made on the way stays in the caches."""
LARGEST: dict[int, float] = {4: E2M1[-1], 8: E4M3_MAX}
"""Of a floating point grid, by bits."""
MX_RANGE = 4.0
"""The largest power of two of E2M1, which a power of two as a scale maps that of a group to."""
MX_ROUND_UP = 1.75
"""The mantissa from which on a scale is rounded up to the next power of two (as compressed-tensors does it)."""


@dataclass(frozen=True)
class Grid:
    """What the codes of a weight stand for: a code is a value, and a weight is its value times the scale of its group.

    bits, kind: int: value = code - zero, codes in [0, 2**bits). float: E2M1 at 4 bits, E4M3 at 8, sign bit first.
    symmetric: an int grid whose zero is the code 2**(bits - 1) everywhere.
    group_size, group_rows: columns and rows of the weight that share a scale; the last group of a row may be short.
    scale_dtype: what scales are stored in, and rounded to before codes are chosen. E8M0: a power of two. E4M3: a scale
    is what is stored divided by global_scale, a float32 number that holds for the whole weight (NVFP4).
    """

    bits: int
    group_size: int
    scale_dtype: torch.dtype
    symmetric: bool = True
    kind: Literal["int", "float"] = "int"
    group_rows: int = 1
    global_scale: float | None = None

    @property
    def half_range(self) -> float:
        """The value that the largest magnitude of a group is mapped to, where nothing is clipped."""
        if self.kind == "int":
            return float(2**self.bits - 1) / 2
        return MX_RANGE if self.scale_dtype == E8M0 else LARGEST[self.bits]

    @property
    def steps(self) -> tuple[float, float]:
        """Of floats: the least power of two that has steps of its own, and a step by the power of two below a value."""
        return FLOAT_STEPS[self.bits]

    @property
    def is_lopsided(self) -> bool:
        """Whether its values reach one step further down than up, and with a scale below 0 the other way round."""
        return self.kind == "int" and self.symmetric

    def bounds(self, zeros: Tensor | None = None) -> tuple[Tensor | float, Tensor | float]:
        """The least and the largest value; zeros: float, of an asymmetric grid."""
        if self.kind == "float":
            return -LARGEST[self.bits], LARGEST[self.bits]
        top = float(2**self.bits - 1)
        if zeros is None:
            return -float(mid_code(self.bits)), top - mid_code(self.bits)
        return -zeros, top - zeros

    def round_(self, ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """float32 weights / scales -> the nearest values within `bounds`, ties to the even code; in place."""
        if self.kind == "int":
            return ratio.round_().clamp_(low, high)  # type: ignore[arg-type]  # both are floats, or both tensors
        return _round_by_steps_(ratio.clamp_(low, high), *self.steps)  # type: ignore[arg-type]

    def nearest(self, ratio: Tensor, zeros: Tensor | None = None) -> Tensor:
        """float32 weights / scales, which are changed -> the codes of the nearest values within `bounds`."""
        low, high = self.bounds(zeros)
        if self.kind == "float" and self.bits == 8:  # where the dtype itself rounds
            return self.encode(ratio.clamp_(low, high))  # type: ignore[arg-type]
        return self.encode(self.round_(ratio, low, high), zeros)

    def encode(self, values: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Values on the grid -> uint8 codes of the same shape."""
        if self.kind == "int":
            return (values + (mid_code(self.bits) if zeros is None else zeros)).to(torch.uint8)
        if self.bits == 8:
            return values.to(E4M3).view(torch.uint8)
        halves = values.half().view(torch.int16)  # sign, 5 bits of exponent, 10 of mantissa
        magnitudes = halves & 0x7FFF
        codes = (magnitudes >> 9).sub_(28).clamp_(min=0).add_(magnitudes == 0x3800)  # 0.5 is not normal in E2M1
        return codes.bitwise_or_((halves >> 12) & 8).to(torch.uint8)

    def decode(self, codes: Tensor, zeros: Tensor | None = None) -> Tensor:
        """uint8 codes -> float32 values of the same shape. The inverse of `encode`."""
        if self.kind == "int":
            return codes.float() - (mid_code(self.bits) if zeros is None else zeros)
        if self.bits == 8:
            missing = codes.bitwise_and(E4M3_NAN).eq_(E4M3_NAN).view(torch.bool)
            return e4m3_values(codes).mul_(1 / E4M3_UNIT).masked_fill_(missing, torch.nan)
        return e2m1_values(codes).mul_(1 / E2M1_UNIT)

    def round_scales(self, scales: Tensor) -> Tensor:
        """float32 scales (rows, groups) -> the nearest that can be stored and are not 0; floats' are above it.

        Rounding before the codes are chosen keeps codes and stored scales in agreement.
        """
        if self.kind == "int":
            sizes = scales.abs().clamp(SCALE_FLOOR, torch.finfo(self.scale_dtype).max).to(self.scale_dtype).float()
            return sizes.copysign(scales)
        return self.load_scales(self.store_scales(scales))

    def store_scales(self, scales: Tensor) -> Tensor:
        """float32 scales -> how they are stored, `scale_dtype`."""
        if self.scale_dtype == E8M0:
            mantissa, exponent = torch.frexp(scales)  # in [.5, 1)
            exponent += (mantissa * 2 >= MX_ROUND_UP).to(exponent.dtype) + 126
            return exponent.mul_(scales > 0).clamp_(0, 254).to(torch.uint8).view(E8M0)
        if self.global_scale is not None:
            scales = scales * self.global_scale
        limits = torch.finfo(self.scale_dtype)
        stored = scales.clamp(max=limits.max).to(self.scale_dtype)
        if self.scale_dtype == E4M3:  # compressed-tensors' own way with groups of zeros, here and below
            codes = stored.view(torch.uint8)
            return torch.where(codes & 0x7F == 0, ONE_EIGHTH, codes).view(E4M3)
        if self.kind == "float":
            stored = torch.where(stored.float() == 0, torch.tensor(limits.eps).to(stored.device), stored.float()).to(
                self.scale_dtype
            )
        return stored

    def load_scales(self, stored: Tensor) -> Tensor:
        """The inverse of `store_scales`."""
        if stored.dtype == E8M0:
            return torch.exp2(stored.view(torch.uint8).float() - 127)
        if stored.dtype == E4M3:
            loaded = e4m3_values(stored.view(torch.uint8)).mul_(1 / E4M3_UNIT)
        else:
            loaded = stored.float()
        return loaded if self.global_scale is None else loaded / self.global_scale

    def fitted(self, *weights: Tensor) -> "Grid":
        """The grid of weights (out, in) that share a global scale, where the grid has one."""
        if self.scale_dtype != E4M3:
            return self
        largest = max(float(weight[rows].abs().amax()) for weight in weights for rows in row_chunks(weight))
        return replace(self, global_scale=nvfp4_divisor(largest))

    def over_blocks(self, values: Tensor, *, largest: bool) -> Tensor:
        """(rows, groups) -> the same shape: the largest, or the sum, over the rows that share a scale."""
        if self.group_rows == 1:
            return values
        rows = len(values)
        padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % self.group_rows))
        blocks = padded.view(-1, self.group_rows, values.shape[1])
        joined = blocks.amax(1) if largest else blocks.sum(1)
        return joined.repeat_interleave(self.group_rows, dim=0)[:rows]


FLOAT_STEPS = {8: (2.0**-6, 2.0**-3), 4: (1.0, 0.5)}
"""By bits, E4M3 and E2M1: see Grid.steps."""
FLOAT32_EXPONENT = 0x7F800000
"""The bits of a float32 that are those of its power of two."""


def round_e4m3_(values: Tensor) -> Tensor:
    """float32 values -> the nearest of E4M3 within +-448, ties to the even code; in place.

    The same as `.clamp(-448, 448).to(torch.float8_e4m3fn).float()`, which torch 2.13 does one by one on a CPU: ten
    times slower.
    """
    return _round_by_steps_(values.clamp_(-E4M3_MAX, E4M3_MAX), *FLOAT_STEPS[8])


def _round_by_steps_(values: Tensor, least: float, step: float) -> Tensor:
    """float32 values -> the nearest multiples of `step` times the power of two, at least `least`, below; in place."""
    steps = values.view(torch.int32).bitwise_and(FLOAT32_EXPONENT).view(torch.float32)
    steps = steps.clamp_min_(least).mul_(step)
    return values.div_(steps).round_().mul_(steps)


# A code's bits, moved to where a float16 has sign, exponent and mantissa, are its value times a power of two. Shifts
# are vectorized everywhere, and float16 has room for all values, the smallest included.

E4M3_UNIT, E2M1_UNIT = 2.0**-8, 2.0**-14
"""What the values of `e4m3_values` and `e2m1_values` are multiples of, for a code of 1."""
E4M3_BITS, E2M1_BITS = 0xBF80 - (1 << 16), 0x8E00 - (1 << 16)
"""As int16: the bits of a float16 where theirs go."""
E4M3_NAN = 0x7F
"""The code of NaN, but for its sign; none that is stored."""


def e4m3_values(codes: Tensor) -> Tensor:
    """uint8 E4M3 codes, none of them NaN -> float32 of the same shape: their values times E4M3_UNIT."""
    moved = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return moved.bitwise_and_(E4M3_BITS).view(torch.float16).float()


def e2m1_values(codes: Tensor) -> Tensor:
    """uint8 E2M1 codes, in the low four bits -> float32 of the same shape: their values times E2M1_UNIT."""
    moved = codes.to(torch.int16).bitwise_left_shift_(12).bitwise_right_shift_(3)
    return moved.bitwise_and_(E2M1_BITS).view(torch.float16).float()


SCALE_DTYPES = {"e4m3": E4M3, "e8m0": E8M0}


def grid_of(scheme: "Scheme", columns: int, model_dtype: torch.dtype) -> Grid:
    """The grid of a scheme for weights of so many columns."""
    return Grid(
        scheme.bits,
        scheme.group_size or columns,
        SCALE_DTYPES.get(scheme.scales, model_dtype),
        scheme.symmetric,
        scheme.type,
        scheme.group_rows,
    )


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight as codes on a grid.

    codes   (out, in)     uint8 in [0, 2**bits)
    scales  (out, groups) float32, not 0, as rounded by the grid; rows that share one repeat it
    zeros   (out, groups) uint8 in [0, 2**bits), or None: the grid is symmetric
    Input column j belongs to group j // group_size, and groups == ceil(in / group_size); one group is "per channel".
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: Grid
    input_scale: float | None = None
    """Of inputs that are rounded by a number from calibration: their scale, or NVFP4's global one, which divides."""

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = -(-columns // self.grid.group_size)
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.float32:
            raise TypeError(f"codes must be uint8 and scales float32, got {self.codes.dtype} and {self.scales.dtype}")
        if self.scales.shape != (rows, groups) or (self.zeros is not None and self.zeros.shape != (rows, groups)):
            raise ValueError(
                f"codes {tuple(self.codes.shape)} with group size {self.grid.group_size} need ({rows}, {groups})"
            )
        if self.grid.symmetric != (self.zeros is None):
            raise ValueError("zeros belong to asymmetric grids, and to them only")

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
        """(out, in) in `dtype`: value * scale, computed in float32. The definition of what the codes mean."""
        return dequantize_codes(self.codes, self.scales, self.zeros, self.grid).to(dtype)

    def relative_error(self, weight: Tensor) -> float:
        """|W' - W|^2 / |W|^2 for the weight W (out, in) that it stands for."""
        lost, whole = 0.0, 0.0
        for rows in row_chunks(weight):
            mine, theirs = self.rows(rows.start, rows.stop - rows.start).dequantize(), weight[rows].float()
            lost += _sum_of_squares(mine.sub_(theirs))
            whole += _sum_of_squares(theirs)
        return lost / max(whole, 1e-30)

    def scale_rows(self, factors: Tensor) -> "QuantizedWeight":
        """The weight with row r multiplied by factors[r] > 0: only the scales change (and are rounded)."""
        return replace(self, scales=self.grid.round_scales(self.scales * factors.float()[:, None]))


def _sum_of_squares(values: Tensor) -> float:
    total = float(values.square().sum())
    return total if isfinite(total) else float(values.double().square().sum())


def join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same inputs and on the same grid, one behind the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    return replace(
        first,
        codes=torch.cat([one.codes for one in weights]),
        scales=torch.cat([one.scales for one in weights]),
        zeros=None if first.zeros is None else torch.cat([one.zeros for one in weights if one.zeros is not None]),
    )


def split_rows(weight: QuantizedWeight, counts: Iterable[int]) -> list[QuantizedWeight]:
    """Undo `join_rows`."""
    parts, start = [], 0
    for count in counts:
        parts.append(weight.rows(start, count))
        start += count
    return parts


def nvfp4_divisor(largest: float) -> float:
    """The global scale that maps the largest magnitude to the largest product of an E2M1 and an E4M3 number.

    A float32 number; 1 where it would be none (all zeros), as compressed-tensors has it.
    """
    divisor = float(torch.tensor(largest).reciprocal() * (LARGEST[8] * LARGEST[4]))
    return divisor if isfinite(divisor) else 1.0


BITS_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive numbers as the next ones of `dtype` that are not smaller; infinite where there are none."""
    exact = values.double()
    nearest = exact.to(dtype)
    above = (nearest.view(BITS_SAME_WIDTH[dtype.itemsize]) + 1).view(dtype)
    return torch.where(nearest.double() < exact, above, nearest)


def scale_problem(scale: Tensor) -> str | None:
    """What is wrong with a scale, None where nothing is."""
    values = scale.detach().double()
    if not bool(values.isfinite().all()):
        return "is NaN or infinite"
    if bool((values <= 0).any()):
        return "is 0 or less"
    if bool((values >= torch.finfo(scale.dtype).max).any()):
        return f"is saturated (the largest value of {str(scale.dtype).removeprefix('torch.')})"
    return None


def mid_code(bits: int) -> int:
    """The code that means zero on a symmetric integer grid."""
    return 1 << (bits - 1)


def minmax_grid(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """weight (out, in) -> scales and zeros, float32 (out, groups), from each group's extremes; scales unrounded.

    Symmetric: scale = max|w| / half_range (the convention of compressed-tensors), and zeros is None.
    Asymmetric: the range always contains 0, so that 0 is exact, and zeros are integers in [0, 2**bits).
    """
    parts = (split_groups(weight[rows].float(), grid.group_size) for rows in row_chunks(weight))
    if grid.symmetric:
        largest = torch.cat([groups.abs().amax(-1) for groups in parts])
        scales = grid.over_blocks(largest, largest=True) / grid.half_range
        return (scales.clamp_min(SCALE_FLOOR) if grid.kind == "int" else scales), None
    top = 2**grid.bits - 1
    ends = [(groups.amin(-1), groups.amax(-1)) for groups in parts]
    low = torch.cat([least for least, _ in ends]).clamp_max(0)
    high = torch.cat([most for _, most in ends]).clamp_min(0)
    scales = ((high - low) / top).clamp_min(SCALE_FLOOR)
    return scales, (-low / scales).round().clamp(0, top)


def split_groups(matrix: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> (rows, groups, group_size), zero-padded where the last group is short."""
    short = -matrix.shape[1] % group_size
    padded = torch.nn.functional.pad(matrix, (0, short)) if short else matrix
    return padded.reshape(matrix.shape[0], -1, group_size)


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that are handled one after the other; on another device than the CPU all rows at once."""
    rows = len(matrix)
    step = max(1, CHUNK_ELEMENTS // max(1, matrix.shape[1])) if matrix.device.type == "cpu" else rows
    yield from (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def expand_groups(values: Tensor, *, group_size: int, columns: int) -> Tensor:
    """(rows, groups) -> (rows, columns): each group's value under each of its columns."""
    if values.shape[1] == 1:
        return values.expand(-1, columns)
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def quantize_codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """(out, in) float -> uint8 codes of the values nearest to w / scale."""
    size, columns = grid.group_size, weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight):
        ratio = weight[rows].float() / expand_groups(scales[rows], group_size=size, columns=columns)
        offsets = None if zeros is None else expand_groups(zeros[rows].float(), group_size=size, columns=columns)
        codes[rows] = grid.nearest(ratio, offsets)
    return codes


def dequantize_codes(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """uint8 codes (out, in) -> float32 (out, in)."""
    size, columns = grid.group_size, codes.shape[1]
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in row_chunks(codes):
        offsets = None if zeros is None else expand_groups(zeros[rows].float(), group_size=size, columns=columns)
        values[rows] = scale_groups_(grid.decode(codes[rows], offsets), scales[rows], size)
    return values


def scale_groups_(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """values (rows, columns) times the scales (rows, groups) of their groups, in place."""
    (rows, columns), groups = values.shape, scales.shape[1]
    if groups == 1 or groups * group_size == columns:  # no group is short
        values.view(rows, groups, -1).mul_(scales[..., None])
        return values
    return values.mul_(expand_groups(scales, group_size=group_size, columns=columns))


def quantize_nearest(weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> QuantizedWeight:
    """Round every weight to its nearest code on the given grid (scales are rounded first)."""
    scales = grid.round_scales(scales)
    codes = quantize_codes(weight, scales, zeros, grid)
    return QuantizedWeight(codes, scales, None if zeros is None else zeros.to(torch.uint8), grid)
