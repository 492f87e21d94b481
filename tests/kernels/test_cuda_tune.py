"""Tuning with a fake driver: what is measured, what is written, and that dispatch reads it back."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")

from tests.kernels.fake_cuda import A100, H100, FakeDriver, install
from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import build, dispatch, launch, timing, tune
from vlmquant.kernels.cuda.catalog import ENTRIES, SKINNY_WIDE_TOKENS
from vlmquant.kernels.cuda.dispatch import Choice, Gpu, Plan, Problem, plan
from vlmquant.kernels.cuda.timing import Chain, Timing


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return prepared(monkeypatch, tmp_path, H100)


def prepared(monkeypatch: pytest.MonkeyPatch, cache: Path, gpu: Gpu) -> FakeDriver:
    fake, device = install(monkeypatch, gpu)
    monkeypatch.setenv(build.CACHE, str(cache))
    dispatch.overrides.cache_clear()
    monkeypatch.setattr(launch, "device", lambda index: device)
    monkeypatch.setattr(tune, "require_cuda", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "layers_for", lambda size: 3)
    monkeypatch.setattr(tune, "TOKENS", (8, 64))
    monkeypatch.setattr(tune, "ROUNDS", 2)
    return fake


def test_the_fastest_is_written_and_used(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    won = Choice("skinny_hopper", blocks_per_sm=2, ring_kib=110)

    def fixed(chains: dict[str, Chain], rounds: int, device: torch.device) -> dict[str, Timing]:
        problem = Problem(8, 256, 512, 128, True, "bf16")
        names = dict(zip(chains, tune.candidates(problem, H100), strict=False))
        return {name: Timing(5.0 if names.get(name) == won else 9.0, 0, 0, rounds) for name in chains}

    monkeypatch.setattr(tune, "race", fixed)
    steps: list[str] = []
    path, rows = tune.tune([(256, 512)], dtype="bf16", step=steps.append)
    assert steps == ["256x512, 8 tokens", "256x512, 64 tokens"]
    assert [row["tokens"] for row in rows] == [8, 64]
    assert rows[0] == {"tokens": 8, "shape": [256, 512]} | {
        "kernel": "skinny_hopper",
        "blocks_per_sm": 2,
        "ring_kib": 110,
        "grid": "sms",
    }
    assert json.loads(path.read_text())["gpu"] == H100.name
    chosen = dispatch.choose(Problem(3, 256, 512, 128, True, "bf16"), H100)
    assert (chosen.grid, chosen.why) == ((264, 1), f"tuned for {H100.name}")
    # Beyond the last bucket, and for other shapes, the table decides.
    assert dispatch.choose(Problem(65, 256, 512, 128, True, "bf16"), H100).why == "table of sm_90a"


@pytest.mark.parametrize("tokens", tune.TOKENS)
@pytest.mark.parametrize("shape", tune.SHAPES)
@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.arch)
def test_the_tables_own_choice_is_among_the_candidates(gpu: Gpu, shape: tuple[int, int], tokens: int) -> None:
    problem = Problem(tokens, *shape, 128, True, "bf16")
    present = dispatch.choose(problem, gpu, tuned=False)
    plans = [plan(problem, gpu, choice, why=present.why) for choice in tune.candidates(problem, gpu)]
    assert present in plans
    assert all(isinstance(one, Plan) for one in plans)


@pytest.mark.parametrize("tokens", range(1, 65))
def test_skinny_wide_hopper_is_a_candidate_for_what_it_takes(tokens: int) -> None:
    problem = Problem(tokens, 28672, 8192, 128, True, "bf16")
    tried = [choice for choice in tune.candidates(problem, H100) if choice.kernel == "skinny_wide_hopper"]
    assert {choice.blocks_per_sm for choice in tried} == ({1, 2} if tokens in SKINNY_WIDE_TOKENS else set())
    assert not any(choice.kernel == "skinny_wide_hopper" for choice in tune.candidates(problem, A100))


def test_a_tie_stays_with_the_table() -> None:
    problem = Problem(16, 4096, 4096, 128, True, "bf16")
    table, other = Choice("skinny_hopper", ring_kib=76), Choice("skinny_hopper", ring_kib=110)

    def best(ours: float, theirs: float) -> Choice:
        return tune.best(problem, H100, {other: Timing(theirs, 0, 0, 9), table: Timing(ours, 0, 0, 9)})

    assert best(10.1, 10.0) == table
    assert best(10.3, 10.0) == other


def test_other_shapes_of_an_older_file_stay(driver: FakeDriver) -> None:
    tune.tune([(256, 512), (128, 512)], dtype="bf16")
    _, rows = tune.tune([(256, 512)], dtype="bf16")
    assert sorted({tuple(row["shape"]) for row in rows}) == [(128, 512), (256, 512)]
    assert len(rows) == 4
    assert {"skinny", "skinny_hopper", "gemm", "gemm_hopper", "dequantize"} == {
        ENTRIES[started.entry].family for started in driver.started
    }


def test_a_shape_that_cannot_be_measured_is_refused_before_any_work(driver: FakeDriver) -> None:
    with pytest.raises(KernelError, match="100x512: rows must be a multiple of 64 and columns one of 128"):
        tune.tune([(256, 512), (100, 512)], dtype="bf16")
    assert driver.started == []


def test_an_interrupted_run_keeps_the_older_file(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = tune.tune([(256, 512)], dtype="bf16")
    before = path.read_text()

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "race", stop)
    with pytest.raises(KeyboardInterrupt):
        tune.tune([(256, 512)], dtype="bf16")
    assert path.read_text() == before


def test_portable_gpus_have_portable_candidates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = prepared(monkeypatch, tmp_path, A100)
    tune.tune([(256, 512)], dtype="f16")
    assert {ENTRIES[started.entry].family for started in fake.started} == {"skinny", "gemm", "dequantize"}


def test_chains_take_turns_and_count_their_layers() -> None:
    order: list[str] = []
    chains = {name: Chain(lambda name=name: order.append(name), 2) for name in ("a", "b")}  # type: ignore[misc]
    found = timing.race(chains, 3, torch.device("cpu"))
    assert order == ["a", "b"] * (3 + timing.WARM_ROUNDS)
    assert found["a"].rounds == 3
    assert found["a"].low <= found["a"].median <= found["a"].high


def test_weights_of_a_chain_do_not_fit_a_cache() -> None:
    for size in (1 << 20, 8 << 20, 100 << 20, 1 << 30):
        assert timing.layers_for(size) * size >= timing.COLD_BYTES
    assert timing.layers_for(1 << 40) == 3
