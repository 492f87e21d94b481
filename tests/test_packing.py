"""Packing against bytes worked out by hand, against compressed-tensors' own, and as a round trip."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmquant.packing import (
    order_vq4,
    pack_codes,
    pack_vq4,
    packed_columns,
    pair_nibbles,
    restore_vq4,
    unpack_codes,
    unpack_vq4,
    vq4_shape,
)

BITS = (3, 4, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "codes", "octets"),
    [
        (4, [0x3, 0xA], [0xA3, 0, 0, 0]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 9], [0x21, 0x43, 0x65, 0x87, 9, 0, 0, 0]),
        (8, [1, 2, 3, 4, 255], [1, 2, 3, 4, 255, 0, 0, 0]),
        # 1 | 2 << 3 | 7 << 6 = 0b1_1101_0001: the third code lies in two bytes.
        (3, [1, 2, 7], [0b1101_0001, 0b1, 0, 0]),
        # Eleven codes are 33 bits: the last one, 4 = 0b100, has its two low bits in the first word.
        (3, [0] * 10 + [0b111], [0, 0, 0, 0b1100_0000, 0b1, 0, 0, 0]),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], octets: list[int]) -> None:
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.view(torch.uint8).tolist() == [octets]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 2**bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 2, 7, 10, 11, 31, 32, 33, 127, 128, 130])
def test_bytes_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack_codes(codes, bits), theirs)
    assert torch.equal(unpack_from_int32(pack_codes(codes, bits), bits, torch.Size([5, columns])), signed)
    assert torch.equal(unpack_codes(theirs, bits, columns), codes)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 6])
def test_a_view_packs_like_its_copy(bits: int, columns: int) -> None:
    codes = random_codes(16, columns, bits).T
    copy = torch.tensor(codes.tolist(), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, bits), pack_codes(copy, bits))
    assert torch.equal(unpack_codes(pack_codes(codes, bits).T.contiguous().T, bits, 16), copy)


def random_zeros(rows: int, groups: int, bits: int) -> torch.Tensor:
    return random_codes(rows, groups, bits, seed=rows + groups)


def vq4_code(words: torch.Tensor, row: int, column: int) -> int:
    """The code of one weight, by the rules of vlmquant.packing's docstring, worked out one by one."""
    strip, in_strip = divmod(row, 64)
    sub_tile, in_sub_tile = divmod(in_strip, 16)
    k_block, in_block = divmod(column, 64)
    step, in_step = divmod(in_block, 16)
    bottom, row_of_8 = divmod(in_sub_tile, 8)
    upper, in_8 = divmod(in_step, 8)
    pair, half = divmod(in_8, 2)
    word = int(words[strip, k_block, sub_tile, row_of_8 * 4 + pair, step])
    return word >> (4 * (4 * half + 2 * upper + bottom)) & 15


def test_vq4_golden_words() -> None:
    # All codes 8 (zero) but those that lane 0 holds for step 0 of the first sub-tile: rows 0 and 8, columns 0, 1, 8, 9.
    codes = torch.full((64, 64), 8, dtype=torch.uint8)
    for nibble, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8), (0, 1), (8, 1), (0, 9), (8, 9)]):
        codes[row, column] = nibble
    words = pack_vq4(codes, None, bits=4, group_size=64)
    assert words.shape == (1, 1, 4, 32, 4)
    assert words.dtype == torch.int32
    assert words[0, 0, 0, 0, 0].item() == 0x76543210
    assert (words.flatten()[1:].view(torch.uint8) == 0x88).all()
    # The last weight of the tile: row 15 of sub-tile 3, column 15 of step 3; the top nibble of lane 31.
    codes[63, 63] = 1
    words = pack_vq4(codes, None, bits=4, group_size=64)
    assert words[0, 0, 3, 31, 3].item() == 0x18888888


def test_vq4_scales_of_a_strip_and_group_lie_together() -> None:
    values = torch.arange(64 * 2).view(64, 2)  # value 2 * row + group
    ordered = order_vq4(values, vq4_shape(64, 256, 128), padding=0)
    assert ordered.shape == (1, 2, 4, 8, 2)
    assert ordered[0, 1, 0, 0].tolist() == [1, 17]  # rows 0 and 8 of group 1
    assert ordered[0, 0, 3, 7].tolist() == [110, 126]  # rows 55 and 63 of group 0


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 300),
    group_size=st.sampled_from([16, 32, 64, 128, 1000]),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_vq4_round_trip(rows: int, columns: int, group_size: int, bits: int, symmetric: bool, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    groups = -(-columns // group_size)
    zeros = None if symmetric else random_zeros(rows, groups, bits)
    packed = vq4_shape(rows, columns, group_size)
    words = pack_vq4(codes, zeros, bits=bits, group_size=group_size)
    assert words.shape == (packed.rows // 64, packed.columns // 64, 4, 32, 4)
    assert torch.equal(unpack_vq4(words, rows, columns, bits=bits, symmetric=symmetric), codes)
    scales = torch.rand(rows, groups)
    assert torch.equal(restore_vq4(order_vq4(scales, packed, padding=0), rows, groups), scales)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(64, 64, 64), (65, 100, 32), (70, 130, 128), (3, 200, 200)]
)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_vq4_places_every_code_and_pads_with_zero(
    rows: int, columns: int, group_size: int, bits: int, symmetric: bool
) -> None:
    codes = random_codes(rows, columns, bits)
    zeros = None if symmetric else random_zeros(rows, -(-columns // group_size), bits)
    packed = vq4_shape(rows, columns, group_size)
    assert packed.rows % 64 == packed.columns % 64 == packed.columns % packed.group_size == 0
    words = pack_vq4(codes, zeros, bits=bits, group_size=group_size)
    raised = 2 ** (bits - 1) - 8 if symmetric else 0
    for row in range(packed.rows):
        for column in range(0, packed.columns, 7):
            if row < rows and column < columns:
                expected = int(codes[row, column]) - raised
            elif zeros is not None and row < rows and column // packed.group_size < zeros.shape[1]:
                expected = int(zeros[row, column // packed.group_size])
            else:
                expected = 8
            assert vq4_code(words, row, column) == expected


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        ((64, 64, 32), (64, 64, 32)),
        ((1, 1, 128), (64, 64, 64)),  # one group of all columns
        ((100, 1088, 128), (128, 1152, 128)),  # whole groups
        ((100, 1088, 1088), (128, 1088, 1088)),
        ((64, 96, 32), (64, 128, 32)),
        ((64, 300, 48), (64, 384, 48)),
    ],
)
def test_vq4_shape(shape: tuple[int, int, int], packed: tuple[int, int, int]) -> None:
    assert vq4_shape(*shape) == packed


def test_vq4_of_stacked_weights_is_their_words_stacked() -> None:
    """Queries, keys and values, or gate and up, run as one weight."""
    first, second = random_codes(128, 192, 4), random_codes(64, 192, 4, seed=1)
    parts = [pack_vq4(codes, None, bits=4, group_size=64) for codes in (first, second)]
    assert torch.equal(torch.cat(parts), pack_vq4(torch.cat((first, second)), None, bits=4, group_size=64))


def test_nibbles_are_paired_wherever_a_row_begins() -> None:
    codes = torch.arange(14, dtype=torch.uint8)[None]
    assert pair_nibbles(codes[:, 1:5]).tolist() == [[0x21, 0x43]]
    assert pair_nibbles(codes[:, 1:4]).tolist() == [[0x21, 0x03]]
    assert pair_nibbles(codes[:, 8:12].T.contiguous().T).tolist() == [[0x98, 0xBA]]
    assert pair_nibbles(codes.view(2, 7)[:, ::2]).tolist() == [[0x20, 0x64], [0x97, 0xDB]]
