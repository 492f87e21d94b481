"""Integer codes to and from bytes, densely: b-bit codes follow each other bit by bit, also across words.

The layout of compressed-tensors' `pack-quantized`: element i of a row occupies bits i*b to i*b + b - 1 of the row,
lowest bit first; words are int32 in little-endian order.
"""

import torch
from torch import Tensor

WORD = 32
"""Bits of one stored word."""


def packed_columns(columns: int, bits: int) -> int:
    """Words that hold `columns` codes."""
    return -(-columns * bits // WORD)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, columns) uint8 in [0, 2**bits) -> (rows, ceil(columns * bits / 32)) int32; spare bits are zero."""
    if bits in (4, 8):
        return _pack_bytes(codes if bits == 8 else _pair_nibbles(codes))
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
        return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)[:, :columns].contiguous()
    # A code lies inside two neighbouring bytes: look at them together.
    first = torch.arange(columns, device=packed.device) * bits
    octets = torch.nn.functional.pad(octets, (0, 1))
    pairs = octets[:, first // 8].to(torch.int16) | (octets[:, first // 8 + 1].to(torch.int16) << 8)
    return ((pairs.to(torch.int32) & 0xFFFF) >> (first % 8).to(torch.int32)).bitwise_and(2**bits - 1).to(torch.uint8)


def _pair_nibbles(codes: Tensor) -> Tensor:
    """(rows, columns) of 4-bit codes -> (rows, ceil(columns / 2)) bytes; the even column is the low nibble."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _pack_bytes(octets: Tensor) -> Tensor:
    """(rows, n) uint8 -> (rows, ceil(n / 4)) int32."""
    rows, count = octets.shape
    # Flattened first: a single row may have any stride, which `view` to another dtype refuses.
    flat = torch.nn.functional.pad(octets, (0, -count % 4)).reshape(-1)
    return flat.view(torch.int32).view(rows, -1)
