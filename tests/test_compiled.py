"""Compiled loops: what they compute, how rows are shared out, and where nothing can be compiled or kept."""

import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmquant import compiled, notices
from vlmquant.cache import CACHE


def scaled_sums(values: Any, factors: Any, out: Any, power: Any) -> None:
    for row in range(values.shape[0]):
        total = 0.0
        for column in range(values.shape[1]):
            total += values[row, column] ** power
        out[row] = total * factors[row]


def loop() -> compiled.Loop:
    return compiled.Loop(scaled_sums, rows=3, fastmath=False)


def check(one: compiled.Loop, rows: int = 37) -> None:
    values, factors = torch.randn(rows, 5, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    out = torch.full((rows,), torch.nan, dtype=torch.float64)
    one(values, factors, out, 2)
    torch.testing.assert_close(out, (values**2).sum(1) * factors)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    notices.warn_once.cache_clear()
    compiled.unavailable.cache_clear()
    yield
    compiled.unavailable.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 16, 17, 24, 25, 1000])
def test_every_row_is_done_once_however_rows_are_shared_out(rows: int) -> None:
    check(loop(), rows)


def test_what_numba_has_no_type_for_is_seen_as_bits() -> None:
    def bits(values: Any, out: Any) -> None:
        for i in range(len(values)):
            out[i] = values[i]

    out = torch.zeros(2, dtype=torch.int64)
    for dtype, one in ((torch.bfloat16, 0x3F80), (torch.float16, 0x3C00), (torch.float8_e4m3fn, 0x38)):
        compiled.Loop(bits, rows=0, fastmath=False)(torch.tensor([1.0, -1.0]).to(dtype), out)
        sign = 1 << (8 * dtype.itemsize - 1)
        assert out.tolist() == [one, one | sign]


def test_it_is_kept_and_found_again(tmp_path: Path) -> None:
    check(loop())
    [kept] = (tmp_path / "cache" / "loops").rglob("*.nbc")
    before = kept.stat().st_mtime_ns
    again = loop()
    check(again)
    assert again._machine.stats.cache_hits
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("end", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["cut", "noise", "another pickle", "empty"])
def test_a_damaged_cache_is_said_and_not_used(
    tmp_path: Path, end: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    check(loop())
    [kept] = (tmp_path / "cache" / "loops").rglob(f"*{end}")
    content = kept.read_bytes()
    kept.write_bytes(
        {"cut": content[:-9], "noise": b"\x93" * 40, "another pickle": pickle.dumps([1, 2]), "empty": b""}[damage]
    )
    check(loop())  # a whole pickle of the index reads as another version's, and is written anew
    assert ("not used" in caplog.text) == ((end, damage) != (".nbi", "another pickle"))


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    check(loop())
    assert "can be written to by other users" in caplog.text
    assert CACHE in caplog.text
    assert not list((tmp_path / "cache").rglob("*.nb?"))


def test_an_error_inside_a_loop_arrives() -> None:
    def refuse(values: Any) -> None:
        if values[0] > 0:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        compiled.Loop(refuse, rows=0, fastmath=False)(torch.ones(1))


@pytest.mark.usefixtures("threads")
def test_a_child_of_fork_has_threads_of_its_own() -> None:
    one = loop()
    check(one)
    if not (child := os.fork()):
        try:
            check(one)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_where_it_is_switched_off_or_numba_is_broken_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.available()
    compiled.unavailable.cache_clear()
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.unavailable() == f"{compiled.SWITCH} is 0"
    compiled.unavailable.cache_clear()
    monkeypatch.delenv(compiled.SWITCH)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "numba does not work here: ModuleNotFoundError" in str(compiled.unavailable())
    assert not compiled.available()


@pytest.mark.usefixtures("threads")
def test_an_error_in_another_threads_rows_arrives_after_all_are_done() -> None:
    def refuse(values: Any, out: Any) -> None:
        for row in range(len(values)):
            if values[row] > 0:
                raise ValueError("no")
            out[row] = 1

    one = compiled.Loop(refuse, rows=2, fastmath=False)
    for bad in (0, 20, 29):
        values, out = torch.zeros(30), torch.zeros(30)
        values[bad] = 1
        with pytest.raises(ValueError, match="no"):
            one(values, out)
        assert out.count_nonzero() >= 20
    check(loop())  # and helpers are there for others


@pytest.mark.usefixtures("threads")
def test_python_threads_call_at_the_same_time() -> None:
    one = loop()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check(one, 1000), range(40)))


def test_gradients_do_not_stand_in_the_way() -> None:
    values = torch.randn(3, 2, requires_grad=True)
    out = torch.zeros(3)
    loop()(values, torch.ones(3), out, 1)
    expected: Tensor = values.detach().sum(1)
    torch.testing.assert_close(out, expected)
