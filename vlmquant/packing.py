"""Integer codes to and from bytes: `pack_codes`, the layout on disk, and `pack_vq4`, that of our CUDA kernels.

On disk, as in compressed-tensors' `pack-quantized`, b-bit codes follow each other densely, also across words: element i
of a row occupies bits i*b to i*b + b - 1 of the row, lowest bit first; words are int32 in little-endian order.

VQ4 is one layout for all kernels and architectures: a word is what one lane of a warp multiplies at once. A weight of
`rows` x `columns` codes is cut into tiles of 64 x 64; the tiles of the same rows are a strip, and lie one after another
along the columns, so that any stretch of columns of a strip is contiguous. With all indices counted from 0:

    words   int32 [strip][k-block][sub-tile][lane][step]        rows / 64, columns / 64, 4, 32, 4
    scales  [strip][group][sub-tile][row][bottom]               rows / 64, groups, 4, 8, 2; in the inputs' dtype
    zeros   uint8, same order; only if asymmetric

A sub-tile is 16 rows of a tile, a step 16 of its columns. Word `step` of `lane` has eight nibbles, the lowest first:
nibble 4*half + 2*upper + bottom is the code of row lane // 4 + 8*bottom of the sub-tile and of column
2 * (lane % 4) + half + 8*upper of the step. That is the A fragment of mma.m16n8k16, and of wgmma with A in registers:
register 2*upper + bottom holds two neighbouring columns, `half` 0 in its low half.

Rows are padded to a multiple of 64, columns to one of 64 and of the group size; a padded weight is exactly 0, and has
scale 0 where its whole group is padding. A group as long as a row or longer becomes one group of all packed columns.
The symmetric kernels know one zero, 8: symmetric codes of fewer than 4 bits are stored raised, so that their mid code
becomes 8.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlmquant.grid import mid_code

WORD = 32
"""Bits of one stored word."""


def packed_columns(columns: int, bits: int) -> int:
    """Words that hold `columns` codes."""
    return -(-columns * bits // WORD)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, columns) uint8 in [0, 2**bits) -> (rows, ceil(columns * bits / 32)) int32; spare bits are zero."""
    if bits in (4, 8):
        return _pack_bytes(codes if bits == 8 else pair_nibbles(codes))
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes[..., None] >> shifts) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).view(len(codes), -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return _pack_bytes((stream << places).sum(-1, dtype=torch.uint8))


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, ceil(columns * bits / 32)) int32 -> codes (rows, columns) uint8. The inverse of `pack_codes`."""
    octets = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[:, :columns].contiguous()
    if bits == 4:
        return split_nibbles(octets)[:, :columns].contiguous()
    # A code lies inside two neighbouring bytes: look at them together.
    first = torch.arange(columns, device=packed.device) * bits
    octets = torch.nn.functional.pad(octets, (0, 1))
    pairs = octets[:, first // 8].to(torch.int16) | (octets[:, first // 8 + 1].to(torch.int16) << 8)
    return ((pairs.to(torch.int32) & 0xFFFF) >> (first % 8).to(torch.int32)).bitwise_and(2**bits - 1).to(torch.uint8)


def pair_nibbles(codes: Tensor) -> Tensor:
    """(rows, columns) of 4-bit codes -> (rows, ceil(columns / 2)) bytes; the even column is the low nibble."""
    rows, columns = codes.shape
    # Flattened first: a single row may have any stride, and begin anywhere, which `view` to another dtype refuses.
    flat = (torch.nn.functional.pad(codes, (0, 1)) if columns % 2 else codes).reshape(-1)
    pairs = (flat.clone() if flat.storage_offset() % 2 else flat).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).view(rows, -1)


def split_nibbles(octets: Tensor) -> Tensor:
    """(rows, n) bytes -> (rows, 2 n) of 4-bit codes. The inverse of `pair_nibbles` for an even number of columns."""
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def _pack_bytes(octets: Tensor) -> Tensor:
    """(rows, n) uint8 -> (rows, ceil(n / 4)) int32."""
    rows, count = octets.shape
    # Flattened first: a single row may have any stride, which `view` to another dtype refuses.
    flat = torch.nn.functional.pad(octets, (0, -count % 4)).reshape(-1)
    return flat.view(torch.int32).view(rows, -1)


VQ4_TILE = 64
"""Rows, and columns, of a tile."""
VQ4_ZERO = 8
"""The code that means zero on a symmetric grid, whatever the bits."""


class VQ4Shape(NamedTuple):
    """Sizes of a weight as it is packed."""

    rows: int
    columns: int
    group_size: int

    @property
    def groups(self) -> int:
        return self.columns // self.group_size


def vq4_shape(rows: int, columns: int, group_size: int) -> VQ4Shape:
    """The padded sizes of a weight (rows, columns) with groups of `group_size` columns, the last one maybe short."""
    rows += -rows % VQ4_TILE
    if group_size >= columns:
        columns += -columns % VQ4_TILE
        return VQ4Shape(rows, columns, columns)
    return VQ4Shape(rows, columns + -columns % math.lcm(VQ4_TILE, group_size), group_size)


def pack_vq4(codes: Tensor, zeros: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """codes (rows, columns) uint8 in [0, 2**bits), bits <= 4 -> words (strips, k-blocks, 4, 32, 4) int32.

    zeros (rows, groups) uint8 or None if symmetric: padding takes its zero from them. See the module's docstring.
    """
    rows, columns = codes.shape
    packed = vq4_shape(rows, columns, group_size)
    if zeros is None:
        filled = codes.new_full((packed.rows, packed.columns), VQ4_ZERO)
        filled[:rows, :columns] = codes + (VQ4_ZERO - mid_code(bits))
    else:
        filled = _pad_groups(zeros, packed, VQ4_ZERO).repeat_interleave(packed.group_size, dim=1)
        filled[:rows, :columns] = codes
    parts = filled.view(packed.rows // VQ4_TILE, 4, 2, 8, packed.columns // VQ4_TILE, 4, 2, 4, 2)
    # strip, sub-tile, bottom, row, k-block, step, upper, pair, half -> as the docstring orders them, nibbles last
    nibbles = parts.permute(0, 4, 1, 3, 7, 5, 8, 6, 2)
    return pack_codes(nibbles.reshape(-1, 8), 4).view(parts.shape[0], parts.shape[4], 4, 32, 4)


def unpack_vq4(words: Tensor, rows: int, columns: int, *, bits: int, symmetric: bool) -> Tensor:
    """words (strips, k-blocks, 4, 32, 4) int32 -> codes (rows, columns) uint8. The inverse of `pack_vq4`."""
    strips, k_blocks = words.shape[:2]
    nibbles = unpack_codes(words.reshape(-1, 1), 4, 8).view(strips, k_blocks, 4, 8, 4, 4, 2, 2, 2)
    filled = nibbles.permute(0, 2, 8, 3, 1, 5, 7, 4, 6).reshape(strips * VQ4_TILE, k_blocks * VQ4_TILE)
    codes = filled[:rows, :columns].contiguous()
    return codes - (VQ4_ZERO - mid_code(bits)) if symmetric else codes


def order_vq4(values: Tensor, packed: VQ4Shape, *, padding: int) -> Tensor:
    """Scales or zeros (rows, groups) -> (strips, packed groups, 4, 8, 2), same dtype, with `padding` where none is."""
    filled = _pad_groups(values, packed, padding)
    parts = filled.view(packed.rows // VQ4_TILE, 4, 2, 8, packed.groups)
    return parts.permute(0, 4, 1, 3, 2).contiguous()


def restore_vq4(ordered: Tensor, rows: int, groups: int) -> Tensor:
    """(strips, packed groups, 4, 8, 2) -> (rows, groups), same dtype. The inverse of `order_vq4`."""
    strips, packed_groups = ordered.shape[:2]
    return ordered.permute(0, 2, 4, 3, 1).reshape(strips * VQ4_TILE, packed_groups)[:rows, :groups].contiguous()


def _pad_groups(values: Tensor, packed: VQ4Shape, padding: int) -> Tensor:
    """(rows, groups) -> (packed rows, packed groups)."""
    rows, groups = values.shape
    return torch.nn.functional.pad(values, (0, packed.groups - groups, 0, packed.rows - rows), value=padding)


W8_TILE = 64
"""Rows and columns of a packed int8 weight are multiples of this."""


def pack_w8(codes: Tensor) -> Tensor:
    """codes (rows, columns) int8 -> the same, padded with zeros to multiples of W8_TILE, rows in the kernels' order.

    In every group of 32, row 8 p + 2 j + e goes to place 8 j + 2 p + e (p and j below 4, e below 2): the tensor cores
    give a lane places 2 p and 2 p + 1 of each 8, which so are 8 neighbouring rows and leave it with one store.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % W8_TILE, 0, -rows % W8_TILE))
    return _swap_w8(padded).contiguous()


def unpack_w8(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_w8`."""
    return _swap_w8(packed)[:rows, :columns]


def _swap_w8(lines: Tensor) -> Tensor:
    """Exchanges p and j in the places 8 j + 2 p + e of the first dimension: its own inverse."""
    return lines.view(len(lines) // 32, 4, 4, 2, *lines.shape[1:]).transpose(1, 2).reshape(lines.shape)
