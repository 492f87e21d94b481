"""Weights made in oneDNN's blocks: they lie as oneDNN lays them, or are not used."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_layouts import packed
from vlmquant.kernels import blocked, int4, loops
from vlmquant.kernels.form import form_of
from vlmquant.kernels.vectors import tiles_to_blocks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_rooms", blocked._Rooms())
    monkeypatch.setattr(loops, "_available", lambda: True)
    monkeypatch.setattr(loops, "product_dtype", lambda inputs: inputs.dtype)


def tiles_of(codes: Tensor, half: int, run: int) -> Tensor:
    """codes (rows, columns) as int4 holds them: a byte has the code of a row, and above it that of `run` rows later."""
    rows, columns = codes.shape
    parts = codes.view(rows // (2 * half), half // run, 2, run, columns)
    octets = parts[:, :, 0] | parts[:, :, 1] << 4
    return octets.permute(0, 3, 1, 2).reshape(-1, columns, half).contiguous()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(("half", "run"), [(32, 32), (32, 16), (16, 16)])
def test_every_cpu_s_tiles_become_every_cpu_s_blocks(half: int, run: int, block: int, symmetric: bool) -> None:
    if 2 * half % block:
        pytest.skip("a block is part of a tile")
    generator = torch.Generator().manual_seed(half + run + block)
    rows, columns, groups = 4 * half, 192, 3
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.full((groups, rows), 8) if symmetric else torch.randint(0, 16, (groups, rows), generator=generator)
    scales = torch.randn(groups, rows, generator=generator).bfloat16()
    table = torch.stack((scales, ((8.0 - zeros) * scales).bfloat16()), dim=-1)
    out = np.zeros((2, 2 * half // block, columns // 2, block), np.uint32)
    tiles_to_blocks(half, run, block, symmetric)(
        tiles_of(codes, half, run), torch.arange(2), out, table, 0, np.float32(8)
    )
    exact = (codes.view(rows, groups, -1).double() - zeros.T[:, :, None]) * scales.T.double()[:, :, None]
    expected = exact.to(torch.float32).to(torch.bfloat16).view(rows // block, block, columns // 2, 2).transpose(1, 2)
    assert torch.equal(torch.from_numpy(out.view(np.int16)).flatten().view(torch.bfloat16), expected.reshape(-1))


def test_onednn_s_own_packing_is_what_is_made_here() -> None:
    """The memory of a weight that oneDNN packed, against that of the same weight made of codes."""
    if blocked.rows_of_block() is None:
        pytest.skip("oneDNN has no such blocks for bfloat16 here")
    weight = packed(320, 256, 4, 128, False, torch.bfloat16)
    int4._loop_matmul(torch.ones(40, 256, dtype=torch.bfloat16), int4.hold(weight), form_of(weight), "blocks")
    own = blocked._pack(weight.dequantize(torch.bfloat16))
    room = blocked.room(320, 256)
    assert room is not None
    made, expected = (
        torch.from_numpy(one).view(torch.bfloat16)
        for one in (room.words.view(np.int16).reshape(-1), blocked._memory(own, np.int16))
    )
    assert torch.equal(made, expected)  # as values: there are two zeros


@pytest.mark.parametrize("broken", ["laid otherwise", "padded", "no such operator", "no blocks"])
def test_what_lies_otherwise_is_not_made(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(192, 128, 4, 64, True, torch.bfloat16)
    inputs, held, form = torch.randn(40, 128).bfloat16(), int4.hold(weight), form_of(weight)
    monkeypatch.setattr(blocked, "rows_of_block", blocked.rows_of_block.__wrapped__)
    pack, nbytes = blocked._pack, torch.ops.mkldnn._nbytes
    if broken == "laid otherwise":
        monkeypatch.setattr(blocked, "_pack", lambda values: pack(values.flip(1).contiguous()))
    elif broken == "padded":
        monkeypatch.setattr(torch.ops.mkldnn, "_nbytes", lambda packed: nbytes(packed) + 64)
    elif broken == "no such operator":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    else:
        monkeypatch.setattr(blocked, "BLOCKS", ())
    assert blocked.room(192, 128) is None
    found = int4._loop_matmul(inputs, held, form, "blocks")
    assert torch.equal(found, int4._loop_matmul(inputs, held, form, "floats"))


def test_few_rooms_are_kept() -> None:
    for columns in range(64, 64 * 14, 64):
        blocked.room(64, columns)
        assert blocked.room(64, 64) is blocked.room(64, 64)
    assert len(blocked._rooms.kept) == blocked.ROOMS
    assert (64, 64) in blocked._rooms.kept


def test_python_threads_have_rooms_of_their_own() -> None:
    weights = [packed(256, 256, 4, 128, True, torch.bfloat16), packed(256, 256, 4, 128, False, torch.bfloat16)]
    held, identity = [int4.hold(weight) for weight in weights], torch.eye(256, dtype=torch.bfloat16)

    def right(number: int) -> bool:
        which = number % 2
        found = int4._loop_matmul(identity, held[which], form_of(weights[which]), "blocks")
        return torch.equal(found.T, weights[which].dequantize(torch.bfloat16))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(60)))


def test_no_tokens_have_no_outputs() -> None:
    weight = packed(64, 64, 4, 64, True, torch.bfloat16)
    found = int4._loop_matmul(torch.ones(0, 64, dtype=torch.bfloat16), int4.hold(weight), form_of(weight), "blocks")
    assert found.shape == (0, 64)
