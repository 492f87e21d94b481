"""Packing against bytes worked out by hand, against compressed-tensors' own, and as a round trip."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmquant.packing import pack_codes, packed_columns, unpack_codes

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
