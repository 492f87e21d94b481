"""A loop whose vectors are written out, since LLVM finds half of what there is in it: codes in tiles become bfloat16.

numba is imported with this module, so only what runs such a loop imports it. Vectors have LANES lanes on every CPU, and
LLVM cuts them to what the CPU has.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vlmquant.compiled import Loop, compiled

LANES = 16
OCTETS_AT_LEAST = 1 << 18
"""Of some ten microseconds, as it takes to wake another thread: fewer are done in one."""
U, SHORT = np.uint64, np.uint32(16)
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _splat(number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, LANES), [number] * LANES)


def _rounded_pair(builder: Any, first: Any, second: Any) -> Any:
    """Two vectors of float32 -> one of both as bfloat16, ties to even, the first in the low halves."""
    low, high = (builder.bitcast(value, ir.VectorType(_I32, LANES)) for value in (first, second))
    low, high = (
        builder.add(builder.add(bits, _splat(0x7FFF)), builder.and_(builder.lshr(bits, _splat(16)), _splat(1)))
        for bits in (low, high)
    )
    return builder.or_(builder.lshr(low, _splat(16)), builder.and_(high, _splat(0xFFFF0000)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _expand_pairs(
    _: Any, octets: Any, scales: Any, offsets: Any, out: Any, span: Any, pairs: Any, half: Any, run: Any, block: Any
) -> tuple[Any, Callable[..., Any]]:
    """Columns of a tile, two by two, become bfloat16 in blocks: codes x scales + offsets.

    octets, scales, offsets, out: addresses of (2 pairs, half) bytes, of (2 half,) float32 twice, and of the pairs in
    the first of the tile's blocks; span: bytes from a block to the next. half, run, block: constants of the CPU, see
    `int4` and `blocked`.
    """
    wide = [types.uint64] * 6
    constants = [half, run, block]
    if not all(isinstance(one, types.IntegerLiteral) for one in constants):
        return None, None  # type: ignore[return-value]  # numba's way to say that it does not fit
    octets_of_column, rows_of_run, rows_of_block = (one.literal_value for one in constants)

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        source, scales, offsets, target, span, pairs = arguments[:6]

        def place(base: Any, offset: int, kind: ir.Type) -> Any:
            moved = builder.add(base, ir.Constant(_I64, offset))
            return builder.inttoptr(moved, ir.VectorType(kind, LANES).as_pointer())

        def floats(base: Any, row: int) -> Any:
            return builder.load(place(base, 4 * row, _F32), align=4)

        # The first octet, and for either of an octet's codes: its shift, and the first of its rows with their scales
        # and offsets.
        pieces: list[tuple[int, list[tuple[int, int, Any, Any]]]] = []
        for first in range(0, octets_of_column, LANES):
            low = first // rows_of_run * 2 * rows_of_run + first % rows_of_run
            rows = [(0, low), (4, low + rows_of_run)]
            pieces.append((first, [(shift, row, floats(scales, row), floats(offsets, row)) for shift, row in rows]))
        blocks = [
            builder.add(target, builder.mul(span, ir.Constant(_I64, number)))
            for number in range(2 * octets_of_column // rows_of_block)
        ]
        with cgutils.for_range(builder, pairs) as loop:
            column = builder.add(source, builder.mul(loop.index, ir.Constant(_I64, 2 * octets_of_column)))
            moved = builder.mul(loop.index, ir.Constant(_I64, 4 * rows_of_block))
            for first, parts in pieces:
                both = [
                    builder.zext(
                        builder.load(place(column, first + other * octets_of_column, _I8), align=1),
                        ir.VectorType(_I32, LANES),
                    )
                    for other in (0, 1)
                ]
                for shift, row, scale, offset in parts:
                    codes = [
                        builder.lshr(one, _splat(shift)) if shift else builder.and_(one, _splat(15)) for one in both
                    ]
                    values = [
                        builder.fadd(
                            builder.fmul(builder.sitofp(code, ir.VectorType(_F32, LANES)), scale, flags=["contract"]),
                            offset,
                            flags=["contract"],
                        )
                        for code in codes
                    ]
                    start = builder.add(blocks[row // rows_of_block], moved)
                    builder.store(
                        _rounded_pair(builder, *values), place(start, 4 * (row % rows_of_block), _I32), align=4
                    )
        return cgutils.get_null_value(ir.IntType(8).as_pointer())

    return types.void(*wide, *constants), generate


@functools.cache
def tiles_to_blocks(half: int, run: int, block: int, symmetric: bool) -> Loop:
    """tiles (some, columns, half) -> out (some, blocks, columns / 2, block) uint32; see int4.hold and `blocked`.

    Every product of a code and a scale is exact, and so is its sum with an offset: what is rounded is the value.
    """

    def loop(tiles: Any, numbers: Any, out: Any, table: Any, start: Any, mid: Any) -> None:
        count, columns, _ = tiles.shape
        groups, width = table.shape[0], U(2 * half)
        size = U(columns // groups)
        scales, offsets = np.empty(2 * half, np.float32), np.empty(2 * half, np.float32)
        span = U(columns // 2 * block * 4)
        for t in range(U(count)):
            source, target = U(tiles[t].ctypes.data), U(out[t].ctypes.data)
            first = U(start) + U(numbers[t]) * width
            for g in range(U(groups)):
                for r in range(width):
                    scale = np.uint32(np.uint32(table[g, first + r, U(0)]) << SHORT).view(np.float32)
                    scales[r] = scale
                    if symmetric:
                        offsets[r] = -mid * scale
                    else:
                        offset = np.uint32(np.uint32(table[g, first + r, U(1)]) << SHORT).view(np.float32)
                        zero = np.rint(offset / (scale if scale != 0 else np.float32(1))) - np.float32(8)
                        offsets[r] = zero * scale
                _expand_pairs(
                    source + g * size * U(half),
                    U(scales.ctypes.data),
                    U(offsets.ctypes.data),
                    target + g * (size // U(2)) * U(4 * block),
                    span,
                    size // U(2),
                    half,
                    run,
                    block,
                )

    return compiled(rows=3, at_least=1, values_at_least=OCTETS_AT_LEAST, fastmath=True)(loop)
