"""What a model takes of memory, against bytes that are counted by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests import grids
from vlmquant.evaluation import memory
from vlmquant.evaluation.memory import Meter, bring_in, held_bytes
from vlmquant.linear import QuantEmbedding, QuantLinear, share
from vlmquant.recipe import SHORT_SCHEMES

MEGABYTE = 1 << 20
ROOM = 6 * MEGABYTE
"""Of what allocators and the interpreter take meanwhile."""


def test_tensors_are_counted_once() -> None:
    model = nn.Module()
    model.first = nn.Linear(3, 5)  # 60 + 20 bytes
    model.tied = nn.Linear(3, 5, bias=False)
    model.tied.weight = model.first.weight
    model.rows = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))  # 14
    whole = torch.zeros(100, dtype=torch.uint8)
    model.register_buffer("left", whole[:60], persistent=False)
    model.register_buffer("right", whole[40:])  # together 100
    model.register_buffer("turned", torch.zeros(4, 6).T)  # 96
    model.register_buffer("nothing", torch.zeros(0))
    model.absent = nn.Parameter(torch.zeros(1000, device="meta"))
    model.register_buffer("opaque", torch.randn(8, 8).to_mkldnn())  # 256
    assert held_bytes(model) == {"cpu": 60 + 20 + 14 + 100 + 96 + 256}


def test_packed_codes_are_counted_as_they_are_held() -> None:
    scheme = SHORT_SCHEMES["w4a16-asym"]
    group = scheme.group_size
    embedding = QuantEmbedding(grids.random(scheme, 50, 256), scheme, dtype=torch.bfloat16)
    groups = 50 * 256 // group
    # 4 bits a code in whole 32-bit words; of a group a scale in 16 bits, and a zero
    assert 50 * 128 + 2 * groups < held_bytes(embedding)["cpu"] <= 50 * 128 + (2 + 4) * groups + 256
    alone = [QuantLinear(grids.random(scheme, 64, 256), scheme, None) for _ in range(3)]
    each = held_bytes(nn.ModuleList(alone))["cpu"]
    share(alone)  # one weight behind three modules
    assert held_bytes(nn.ModuleList(alone))["cpu"] == pytest.approx(each, rel=0.02)
    assert each < 3 * 64 * 256  # less than a byte a weight


def test_a_peak_is_what_was_taken_above_the_start() -> None:
    kept = torch.ones(8 * MEGABYTE, dtype=torch.uint8)
    meter = Meter("cpu")
    torch.ones(96 * MEGABYTE, dtype=torch.uint8).max()
    assert meter.above()["cpu"] == pytest.approx(96 * MEGABYTE, abs=ROOM)
    peak = meter.process_peak
    meter.start()  # the earlier peak is forgotten, what is held is not taken for new
    torch.ones(24 * MEGABYTE, dtype=torch.uint8).max()
    assert meter.above()["cpu"] == pytest.approx(24 * MEGABYTE, abs=ROOM)
    assert meter.process_peak == peak > kept.nbytes


def test_a_peak_that_cannot_begin_anew_is_told_only_where_it_rose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.ones(160 * MEGABYTE, dtype=torch.uint8).max()
    monkeypatch.setattr(memory, "CLEAR", tmp_path)  # a folder: nothing can be written there
    meter = Meter("cpu")
    torch.ones(MEGABYTE, dtype=torch.uint8).max()
    assert meter.above() == {"cpu": None}
    torch.ones(256 * MEGABYTE, dtype=torch.uint8).max()
    assert meter.above()["cpu"] == pytest.approx(256 * MEGABYTE, abs=ROOM)


def test_weights_that_lie_in_their_file_are_brought_in(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\x01" * 48 * MEGABYTE)
    model = nn.Module()
    mapped = torch.from_file(str(file), shared=False, size=48 * MEGABYTE, dtype=torch.uint8)
    model.register_buffer("mapped", mapped[: 40 * MEGABYTE].view(torch.float16).view(MEGABYTE, 20))
    meter = Meter("cpu")
    bring_in(model)
    assert meter.above()["cpu"] == pytest.approx(40 * MEGABYTE, abs=ROOM)
    assert held_bytes(model) == {"cpu": 40 * MEGABYTE}
