"""What the layouts for CPUs do around their products, as compiled loops: codes become floats, inputs become codes,
products of codes become outputs. Each is one pass, where torch needs several.

A weight becomes floats some rows at a time, few enough to stay near the CPU, and torch multiplies by them. The products
are operators of our own, which torch.compile takes as a whole. They cannot be differentiated, and are there only where
loops can be compiled: `usable` says so.

Loops that LLVM is to make vectors of have unsigned indices, since numba looks at the sign of others, and integers of 32
bits. They are made once for each constant that shapes their innermost loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmquant import compiled as compiling
from vlmquant.compiled import Loop, compiled
from vlmquant.kernels import blocked
from vlmquant.kernels.form import Product, rows_at_once
from vlmquant.kernels.probe import fastest, measured, needs_gradient, product_dtype
from vlmquant.kernels.reference import ACTIVATION_FLOOR, ACTIVATION_STEPS

EXPANDED_AT_ONCE = 1 << 24
"""Bytes of floats that are made of codes together: few enough to stay near the CPU; each part costs a product."""
OUTPUTS_AT_ONCE = 1 << 20
"""Sums of integer products that lie about before they become outputs."""
VALUES_AT_LEAST = 1 << 17
"""Of inputs or sums, for another thread: to wake one takes as long as fewer of them."""
U, HALF, ONE, SHORT = np.uint64, np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
"""HALF, ONE and SHORT: what rounds the bits of a float32 to those of a bfloat16, ties to even."""
MAGNITUDE = np.uint32(0x7FFFFFFF)
LOW, NIBBLE = np.int32(15), np.int32(4)
INT8_COLUMNS = 32
"""Columns of a weight of int8 codes are padded to a multiple of this: see int8.hold."""
FLOOR, STEPS = np.float32(ACTIVATION_FLOOR), np.float32(ACTIVATION_STEPS)


def usable(inputs: Tensor) -> bool:
    """Whether these inputs can be multiplied by compiled loops."""
    return inputs.device.type == "cpu" and inputs.dtype != torch.float64 and not needs_gradient(inputs) and _available()


@measured
def _available() -> bool:
    return compiling.available()


def faster(loop: Callable[..., object], other: Callable[..., object], *arguments: Any) -> bool:
    """Whether a product by compiled loops takes less time than another with the same arguments."""
    return fastest({"loop": lambda: loop(*arguments), "other": lambda: other(*arguments)}) == "loop"


# Codes to floats


@functools.cache
def _tiles_to_floats(run: int, symmetric: bool, bfloat16: bool) -> Loop:
    """tiles, of which each is a row for the loop -> out (columns, rows); see int4.hold. Every product is exact."""

    def loop(tiles: Any, numbers: Any, table: Any, start: Any, mid: Any, out: Any) -> None:
        count, columns, half = tiles.shape
        groups, width, step = table.shape[0], U(2 * half), U(run)
        size, first = columns // groups, U(numbers[0]) * width
        scales, offsets = np.empty(count * 2 * half, np.float32), np.empty(count * 2 * half, np.float32)
        for g in range(U(groups)):
            for r in range(U(count) * width):
                scale = np.uint32(np.uint32(table[g, U(start) + first + r, U(0)]) << SHORT).view(np.float32)
                scales[r] = scale
                if symmetric:
                    offsets[r] = -mid * scale
                else:
                    offset = np.uint32(np.uint32(table[g, U(start) + first + r, U(1)]) << SHORT).view(np.float32)
                    offsets[r] = (np.rint(offset / (scale if scale != 0 else np.float32(1))) - np.float32(8)) * scale
            for k in range(g * U(size), (g + U(1)) * U(size)):
                for t in range(U(count)):
                    for part in range(U(half) // step):
                        for j in range(step):
                            octet = np.int32(tiles[t, k, part * step + j])
                            low = t * width + part * step + part * step + j
                            high = low + step
                            one = np.float32(np.float32(np.int32(octet & LOW)) * scales[low] + offsets[low])
                            other = np.float32(np.float32(np.int32(octet >> NIBBLE)) * scales[high] + offsets[high])
                            if bfloat16:
                                bits, more = one.view(np.uint32), other.view(np.uint32)
                                out[k, first + low] = (bits + HALF + ((bits >> SHORT) & ONE)) >> SHORT
                                out[k, first + high] = (more + HALF + ((more >> SHORT) & ONE)) >> SHORT
                            else:
                                out[k, first + low] = one
                                out[k, first + high] = other

    return compiled(rows=2, at_least=1, fastmath=True)(loop)


@functools.cache
def _bags_to_floats(bfloat16: bool) -> Loop:
    """table, scales and zeros (columns or groups, 2, rows / 2) -> out (columns, rows) of some rows; see bag4.hold."""

    def loop(table: Any, groups: Any, out: Any, first: Any, scales: Any, zeros: Any) -> None:
        count, half = out.shape[0], out.shape[1] // 2
        for k in range(U(count)):
            g = U(groups[k])
            z = g if zeros.shape[0] > 1 else U(0)
            for j in range(U(half)):
                at = U(first) + j
                octet = np.int32(table[k, at])
                one = np.float32((np.float32(np.int32(octet & LOW)) - zeros[z, U(0), at]) * scales[g, U(0), at])
                other = np.float32((np.float32(np.int32(octet >> NIBBLE)) - zeros[z, U(1), at]) * scales[g, U(1), at])
                if bfloat16:
                    bits, more = one.view(np.uint32), other.view(np.uint32)
                    out[k, j + j] = (bits + HALF + ((bits >> SHORT) & ONE)) >> SHORT
                    out[k, j + j + U(1)] = (more + HALF + ((more >> SHORT) & ONE)) >> SHORT
                else:
                    out[k, j + j] = one
                    out[k, j + j + U(1)] = other

    return compiled(rows=3)(loop)


@functools.cache
def _words_to_floats(bits: int, bfloat16: bool) -> Loop:
    """words, scales and zeros of some rows -> out (rows, columns); see words.hold. zeros: a row may have a sole one."""
    size, mask = U(bits), np.uint32(2**bits - 1)

    def loop(words: Any, scales: Any, zeros: Any, out: Any, group_size: Any) -> None:
        count, columns = out.shape
        for r in range(U(count)):
            for g in range(U(scales.shape[1])):
                scale, zero = scales[r, g], zeros[r, g if zeros.shape[1] > 1 else U(0)]
                start = g * U(group_size)
                for column in range(start, min(start + U(group_size), U(columns))):
                    place = column * size
                    inside = np.uint32(place & U(31))
                    code = np.uint32(words[r, place >> U(5)]) >> inside
                    if inside + np.uint32(bits) > np.uint32(32):
                        code |= np.uint32(words[r, (place >> U(5)) + U(1)]) << (np.uint32(32) - inside)
                    value = np.float32(np.float32(np.int32(np.int32(code & mask) - np.int32(zero))) * scale)
                    if bfloat16:
                        seen = value.view(np.uint32)
                        out[r, column] = (seen + HALF + ((seen >> SHORT) & ONE)) >> SHORT
                    else:
                        out[r, column] = value

    return compiled(rows=4)(loop)


@functools.cache
def _octets_to_floats(bits: int, bfloat16: bool) -> Loop:
    """The same for codes of 4 or 8 bits, of the words' bytes; groups of 4-bit codes have an even size."""

    def loop(octets: Any, scales: Any, zeros: Any, out: Any, group_size: Any) -> None:
        count, columns = out.shape
        for r in range(U(count)):
            for g in range(U(scales.shape[1])):
                scale, start = scales[r, g], g * U(group_size)
                zero = np.float32(zeros[r, g if zeros.shape[1] > 1 else U(0)])
                inside = U(min(start + U(group_size), U(columns))) - start
                if bits == 8:
                    for j in range(inside):
                        value = np.float32((np.float32(np.int32(octets[r, start + j])) - zero) * scale)
                        if bfloat16:
                            seen = value.view(np.uint32)
                            out[r, start + j] = (seen + HALF + ((seen >> SHORT) & ONE)) >> SHORT
                        else:
                            out[r, start + j] = value
                else:
                    half = start // U(2)
                    for j in range((inside + U(1)) // U(2)):
                        octet = np.int32(octets[r, half + j])
                        one = np.float32((np.float32(np.int32(octet & LOW)) - zero) * scale)
                        other = np.float32((np.float32(np.int32(octet >> NIBBLE)) - zero) * scale)
                        if bfloat16:
                            low, high = one.view(np.uint32), other.view(np.uint32)
                            out[r, start + j + j] = (low + HALF + ((low >> SHORT) & ONE)) >> SHORT
                            out[r, start + j + j + U(1)] = (high + HALF + ((high >> SHORT) & ONE)) >> SHORT
                        else:
                            out[r, start + j + j] = one
                            out[r, start + j + j + U(1)] = other

    return compiled(rows=4)(loop)


@functools.cache
def _int8_to_floats(bfloat16: bool) -> Loop:
    """codes (rows, columns) int8 x scales (rows,) -> out (rows, columns)."""

    def loop(codes: Any, scales: Any, out: Any) -> None:
        columns = U(codes.shape[1])
        for r in range(U(codes.shape[0])):
            scale = scales[r]
            for c in range(columns):
                value = np.float32(np.float32(np.int32(codes[r, c])) * scale)
                if bfloat16:
                    bits = value.view(np.uint32)
                    out[r, c] = (bits + HALF + ((bits >> SHORT) & ONE)) >> SHORT
                else:
                    out[r, c] = value

    return compiled(rows=3)(loop)


# Inputs to codes, sums to outputs


@functools.cache
def _rows_to_codes(bfloat16: bool) -> Loop:
    """inputs (tokens, in), bits of float32 or bfloat16 -> reference.activation_codes: codes, padded with 0, and scales.

    given: the scale of all tokens, or 0. Bits without the sign are in the order of the magnitudes, NaN above all.
    """

    def loop(inputs: Any, codes: Any, scales: Any, given: Any) -> None:
        columns, padded = U(inputs.shape[1]), U(codes.shape[1])
        for t in range(U(inputs.shape[0])):
            largest = np.uint32(0)
            for c in range(columns):
                bits = np.uint32(inputs[t, c])
                bits = np.uint32((bits << SHORT if bfloat16 else bits) & MAGNITUDE)
                largest = np.uint32(max(largest, bits))
            scale = np.float32(np.uint32(largest).view(np.float32) / STEPS)
            if scale < FLOOR:
                scale = FLOOR
            if given > 0:
                scale = np.float32(given)
            for c in range(columns):
                bits = np.uint32(inputs[t, c])
                value = np.uint32(bits << SHORT if bfloat16 else bits).view(np.float32)
                code = np.rint(np.float32(value / scale))
                codes[t, c] = np.int8(np.int32(min(max(code, np.float32(-128)), np.float32(127))))
            for c in range(columns, padded):
                codes[t, c] = 0
            scales[t] = scale

    return compiled(rows=3, values_at_least=VALUES_AT_LEAST)(loop)


@functools.cache
def _sums_to_outputs(biased: bool, bfloat16: bool) -> Loop:
    """sums (tokens, rows) x input_scales (tokens,) x scales (rows,) + bias (rows,) -> out (tokens, rows)."""

    def loop(sums: Any, input_scales: Any, out: Any, scales: Any, bias: Any) -> None:
        for t in range(U(sums.shape[0])):
            factor = input_scales[t]
            for r in range(U(sums.shape[1])):
                value = np.float32(np.float32(np.float32(sums[t, r]) * factor) * scales[r])
                if biased:
                    value = np.float32(value + bias[r])
                if bfloat16:
                    bits = value.view(np.uint32)
                    out[t, r] = (bits + HALF + ((bits >> SHORT) & ONE)) >> SHORT
                else:
                    out[t, r] = value

    return compiled(rows=3, values_at_least=VALUES_AT_LEAST)(loop)


# Products


def _multiply(
    inputs: Tensor,
    shape: tuple[int, int],
    expand: Callable[[slice, Tensor], None],
    *,
    by_rows: bool,
    multiple: int = 1,
) -> Tensor:
    """inputs (tokens, in) times a weight of `shape` (out, in), some rows of it at a time -> (tokens, out).

    expand(rows, part): some rows as floats into a part (some, in) or, if not `by_rows`, (in, some); bfloat16 where
    that is the inputs' own and fast, else float32.
    """
    dtype, (rows, columns) = _dtype_for(inputs), shape
    at_once = rows_at_once(columns, EXPANDED_AT_ONCE // dtype.itemsize, multiple=multiple)
    values = inputs.to(dtype)
    outputs, room = values.new_empty(len(values), rows), values.new_empty(min(at_once, rows) * columns)
    for start in range(0, rows, at_once):
        some = slice(start, min(start + at_once, rows))
        count = some.stop - start
        part = room[: count * columns].view((count, columns) if by_rows else (columns, count))
        expand(some, part)
        torch.mm(values, part.T if by_rows else part, out=outputs[:, some])
    return outputs


def _dtype_for(inputs: Tensor) -> torch.dtype:
    return torch.bfloat16 if product_dtype(inputs) == torch.bfloat16 else torch.float32


def tile_product(
    tiles: Tensor, table: Tensor, run: int, mid: int, symmetric: bool, way: str
) -> Callable[[Tensor], Tensor]:
    """inputs (tokens, in) times a weight as `int4.hold` has it -> (tokens, rows of its tiles).

    What depends on the weight alone is worked out here.
    """
    columns, width, middle = tiles.shape[1], 2 * tiles.shape[2], np.float32(mid)
    codes, numbers, scales = compiling.array_of(tiles), np.arange(len(tiles)), compiling.array_of(table.contiguous())
    by_blocks = _block_product(codes, numbers, scales, run, middle, symmetric) if way == "blocks" else None
    shape = (len(tiles) * width, columns)

    def multiply(inputs: Tensor) -> Tensor:
        bfloat16 = _dtype_for(inputs) == torch.bfloat16
        if by_blocks is not None and bfloat16 and len(inputs):
            outputs = by_blocks(inputs)
            if outputs is not None:
                return outputs
        loop = _tiles_to_floats(run, symmetric, bfloat16)

        def expand(rows: slice, part: Tensor) -> None:
            some = slice(rows.start // width, rows.stop // width)
            loop(codes[some], numbers[: some.stop - some.start], scales, rows.start, middle, part)

        return _multiply(inputs, shape, expand, by_rows=False, multiple=width).to(inputs.dtype)

    return multiply


def _block_product(
    codes: Any, numbers: Any, scales: Any, run: int, middle: Any, symmetric: bool
) -> Callable[[Tensor], Tensor | None] | None:
    from vlmquant.kernels.vectors import LANES, tiles_to_blocks

    count, columns, half = codes.shape
    width, block = 2 * half, blocked.rows_of_block()
    if block is None or width % block or run % LANES or block % LANES or columns // len(scales) % 2:
        return None
    loop = tiles_to_blocks(half, run, block, symmetric)

    def make(rows: slice, words: Any) -> None:
        some = slice(rows.start // width, rows.stop // width)
        out = words.reshape(some.stop - some.start, width // block, columns // 2, block)
        loop(codes[some], numbers[: some.stop - some.start], out, scales, rows.start, middle)

    return functools.partial(blocked.multiply, shape=(count * width, columns), multiple=width, make=make)


def _bag_linear(inputs: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, mid: int) -> Tensor:
    columns, (groups, rows) = len(table), scales.shape
    loop = _bags_to_floats(_dtype_for(inputs) == torch.bfloat16)
    halves = [
        values.float().view(-1, rows // 2, 2).transpose(1, 2).contiguous()
        for values in (scales, zeros)
        if values is not None
    ]
    if zeros is None:
        halves.append(torch.full((1, 2, rows // 2), float(mid)))
    group = torch.arange(columns).div_(columns // groups, rounding_mode="floor")

    def expand(some: slice, part: Tensor) -> None:
        loop(table, group, part, some.start // 2, *halves)

    return _multiply(inputs, (rows, columns), expand, by_rows=False, multiple=2).to(inputs.dtype)


def _words_linear(
    inputs: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, mid: int, group_size: int
) -> Tensor:
    rows, columns = len(words), inputs.shape[1]
    plain = bits == 8 or (bits == 4 and group_size % 2 == columns % 2 == 0)
    loop = (_octets_to_floats if plain else _words_to_floats)(bits, _dtype_for(inputs) == torch.bfloat16)
    if plain:
        words = words.view(torch.uint8)

    def expand(some: slice, part: Tensor) -> None:
        subtracted = torch.full((len(part), 1), mid, dtype=torch.uint8) if zeros is None else zeros[some]
        loop(words[some], scales[some].float(), subtracted, part, group_size)

    return _multiply(inputs, (rows, columns), expand, by_rows=True).to(inputs.dtype)


def _int8_linear(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    rows, columns = codes.shape
    loop = _int8_to_floats(_dtype_for(inputs) == torch.bfloat16)

    def expand(some: slice, part: Tensor) -> None:
        loop(codes[some], scales[some], part)

    return _multiply(inputs, (rows, columns), expand, by_rows=True).to(inputs.dtype)


def rounded_product(weight: Tensor, scales: Tensor, input_scale: float | None, way: str) -> Product:
    """With a weight of int8 codes, of inputs that are rounded; what depends on the weight alone is worked out here."""
    sums_of, rows, factors = PRODUCTS[way], len(scales), compiling.array_of(scales)
    given, at_once = np.float32(input_scale or 0), max(1, OUTPUTS_AT_ONCE // rows)

    def multiply(inputs: Tensor, bias: Tensor | None) -> Tensor:
        bfloat16, (tokens, columns) = inputs.dtype == torch.bfloat16, inputs.shape
        values = (inputs if bfloat16 else inputs.float()).contiguous()
        rounded = torch.empty(tokens, columns + -columns % INT8_COLUMNS, dtype=torch.int8)
        input_scales = np.empty(tokens, np.float32)
        bits = values.view(torch.int16 if bfloat16 else torch.int32)
        _rows_to_codes(bfloat16)(bits, rounded, input_scales, given)
        finish = _sums_to_outputs(bias is not None, bfloat16)
        added = factors if bias is None else compiling.array_of(bias.detach().float())
        outputs = values.new_empty(tokens, rows)
        finished = compiling.array_of(outputs)
        for start in range(0, tokens, at_once):
            some = slice(start, start + at_once)
            sums = sums_of(rounded if at_once >= tokens else rounded[some], weight)
            finish(sums, input_scales[some], finished[some], factors, added)
        return outputs if outputs.dtype == inputs.dtype else outputs.to(inputs.dtype)

    return multiply


def _float_sums(rounded: Tensor, codes: Tensor) -> Tensor:
    return _int8_linear(rounded.float(), codes, torch.ones(len(codes)))


def _integer_sums(rounded: Tensor, codes: Tensor) -> Tensor:
    return torch._int_mm(rounded, codes.T)


@functools.cache
def _one_and_zero() -> tuple[Tensor, Tensor]:
    """A weight's scale and zero point where it has none. Nothing that the mode of the first call leaves on them."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)


def onednn_sums(rounded: Tensor, packed: Tensor) -> Tensor:
    """rounded (tokens, in) int8 times a weight as oneDNN packed it -> (tokens, out) float32."""
    one, zero = _one_and_zero()
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(
        rounded, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "floats": _float_sums,
    "integers": _integer_sums,
    "onednn": onednn_sums,
}
"""Ways to multiply int8 by int8 -> the sums (tokens, out), int32 or float32."""


def _tile_linear(inputs: Tensor, *held: Any) -> Tensor:
    return tile_product(*held)(inputs)


def _rounded_linear(
    inputs: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, input_scale: float | None, way: str
) -> Tensor:
    return rounded_product(weight, scales, input_scale, way)(inputs, bias)


OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., int]]] = {
    "tile_linear": (
        "Tensor tiles, Tensor table, int run, int mid, bool symmetric, str way",
        _tile_linear,
        lambda tiles, *_: tiles.shape[0] * tiles.shape[2] * 2,
    ),
    "bag_linear": (
        "Tensor table, Tensor scales, Tensor? zeros, int mid",
        _bag_linear,
        lambda table, scales, *_: scales.shape[1],
    ),
    "words_linear": (
        "Tensor words, Tensor scales, Tensor? zeros, int bits, int mid, int group_size",
        _words_linear,
        lambda words, *_: words.shape[0],
    ),
    "int8_linear": ("Tensor codes, Tensor scales", _int8_linear, lambda codes, *_: codes.shape[0]),
    "rounded_linear": (
        "Tensor weight, Tensor scales, Tensor? bias, float? input_scale, str way",
        _rounded_linear,
        lambda weight, scales, *_: scales.shape[0],
    ),
}
"""Their arguments after `inputs` (tokens, in), what they do, and how many outputs (tokens, out) have."""

LIBRARY: Any = torch.library.Library("vlmquant", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(name: str, arguments: str, function: Callable[..., Tensor], rows: Callable[..., int]) -> None:
    LIBRARY.define(f"{name}(Tensor inputs, {arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CPU")
    LIBRARY.impl(name, function, "MkldnnCPU")
    torch.library.register_fake(
        f"vlmquant::{name}", lambda inputs, *held: inputs.new_empty(len(inputs), rows(*held)), lib=LIBRARY
    )


for _name, _operator in OPERATORS.items():
    _define(_name, *_operator)
