"""The W4 kernels, run by the emulator from their CUDA sources, against float64."""

import itertools
from collections.abc import Iterable

import pytest
import torch

from tests import emulator
from tests.emulator import Emulator
from tests.kernels.emulated import SEEDS, How, Problem, data_of, entry_of, largest_error, run
from vlmquant.kernels.cuda.catalog import ENTRIES, SKINNY_TOKENS, SKINNY_WIDE_TOKENS, Entry

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)

W4_ENTRIES = {name: entry for name, entry in ENTRIES.items() if name.startswith("w4_")}

SKINNY = [
    (Problem(1, 256, 1024), How("skinny", blocks=4)),
    (Problem(7, 192, 1088, 64), How("skinny", blocks=3)),
    (Problem(3, 70, 500, 32, symmetric=False, dtype="f16"), How("skinny", blocks=2)),
    (Problem(13, 256, 1000, 128, symmetric=False), How("skinny", blocks=3)),
    (Problem(16, 300, 320, 0, dtype="f16"), How("skinny", blocks=2)),
    (Problem(29, 128, 576, 32, bits=3), How("skinny", blocks=1)),
    (Problem(1, 1, 1, 32), How("skinny", blocks=1)),
]
SKINNY_HOPPER = [
    (Problem(1, 512, 1024), How("skinny_hopper", blocks=1, stages=4)),
    (Problem(7, 192, 1088, 64), How("skinny_hopper", blocks=3)),
    (Problem(3, 70, 500, 32, symmetric=False, dtype="f16"), How("skinny_hopper", blocks=3, stages=2)),
    (Problem(5, 256, 2048, 32), How("skinny_hopper", blocks=13, stages=4)),
    (Problem(13, 320, 1000, 128, symmetric=False), How("skinny_hopper", blocks=7)),
    (Problem(16, 300, 640, 0, dtype="f16"), How("skinny_hopper", blocks=4)),
    (Problem(24, 576, 1152, 128), How("skinny_hopper", blocks=4)),
    (Problem(32, 384, 1088, 64, symmetric=False, bits=3), How("skinny_hopper", blocks=5)),
    (Problem(9, 128, 300, 64, bits=3), How("skinny_hopper", blocks=1)),
    (Problem(8, 130, 192, 64), How("skinny_hopper", blocks=20)),  # more blocks than units of work
    (Problem(29, 256, 576, 32, dtype="f16"), How("skinny_hopper", blocks=2, stages=2)),
]
SKINNY_WIDE_HOPPER = [
    (Problem(17, 256, 1024), How("skinny_wide_hopper", blocks=1, stages=4)),
    (Problem(24, 192, 1088, 64), How("skinny_wide_hopper", blocks=3)),
    (Problem(25, 70, 500, 32, symmetric=False, dtype="f16"), How("skinny_wide_hopper", blocks=3, stages=2)),
    (Problem(32, 320, 1000, 128, symmetric=False), How("skinny_wide_hopper", blocks=7, stages=2)),
    (Problem(33, 300, 640, 0, dtype="f16"), How("skinny_wide_hopper", blocks=4)),
    (Problem(40, 256, 576, 64, symmetric=False, bits=3), How("skinny_wide_hopper", blocks=2, stages=5)),
    (Problem(41, 128, 1600, 32), How("skinny_wide_hopper", blocks=1, stages=9)),  # more stages than warps
    (Problem(48, 576, 1152, 128), How("skinny_wide_hopper", blocks=5)),
    (Problem(48, 130, 192, 64, dtype="f16"), How("skinny_wide_hopper", blocks=20)),  # more blocks than units of work
]
GEMM = [
    (Problem(50, 256, 512, 64), How("gemm")),
    (Problem(130, 200, 500, 128, symmetric=False, dtype="f16"), How("gemm")),
    (Problem(33, 128, 320, 0, symmetric=False), How("gemm")),
    (Problem(70, 192, 320, 32, symmetric=False), How("gemm")),  # three strips, of which a block takes two
]
GEMM_HOPPER = [
    (Problem(17, 256, 1088, 64), How("gemm_hopper", blocks=5, stages=4, token_tile=32)),
    (Problem(64, 128, 512, 128), How("gemm_hopper", blocks=1, token_tile=64)),
    (Problem(100, 192, 600, 64, symmetric=False), How("gemm_hopper", blocks=2, token_tile=64, sweep_tiles=1)),
    (Problem(90, 320, 512, 32, dtype="f16"), How("gemm_hopper", blocks=2, token_tile=64, warpgroups=4)),
    (Problem(70, 100, 320, 0, symmetric=False, dtype="f16"), How("gemm_hopper", blocks=3, token_tile=128)),
    (Problem(130, 320, 256, 128), How("gemm_hopper", blocks=2, token_tile=128, warpgroups=4)),
    (Problem(130, 128, 256, 128), How("gemm_hopper", blocks=1, stages=2, token_tile=256)),
    (Problem(1, 64, 64, 0), How("gemm_hopper", blocks=20, token_tile=64)),
]
DEQUANTIZE = [
    (Problem(4, 128, 640, 64, symmetric=False), How("dequantize")),
    (Problem(4, 128, 256, 32, dtype="f16"), How("dequantize")),
    (Problem(3, 70, 130, 128, symmetric=False, dtype="f16"), How("dequantize")),
    (Problem(3, 65, 200, 0), How("dequantize")),
]
CASES = SKINNY + SKINNY_HOPPER + SKINNY_WIDE_HOPPER + GEMM + GEMM_HOPPER + DEQUANTIZE


def load_all(entries: Iterable[Entry]) -> dict[str, Emulator]:
    """One library for each family."""
    families: dict[str, list[Entry]] = {}
    for entry in entries:
        families.setdefault(entry.family, []).append(entry)
    return {family: emulator.load(members) for family, members in families.items()}


@pytest.fixture(scope="module")
def kernels() -> dict[str, Emulator]:
    return load_all(entry_of(problem, how) for problem, how in CASES)


@pytest.fixture(scope="module")
def all_kernels() -> dict[str, Emulator]:
    return load_all(W4_ENTRIES.values())


def check(kernels: dict[str, Emulator], problem: Problem, how: How, seeds: Iterable[int] = SEEDS) -> None:
    results = [run(kernels[how.family], problem, how, seed=seed) for seed in seeds]
    assert results[0].error() <= largest_error(problem)
    assert not results[0].outputs[:, problem.rows :].any()
    for result in results:
        assert torch.equal(result.outputs, results[0].outputs)
        assert result.counters.bank_conflicts == 0


@pytest.mark.parametrize(("problem", "how"), CASES, ids=str)
def test_product_is_that_of_float64(problem: Problem, how: How, kernels: dict[str, Emulator]) -> None:
    """Within rounding, with the same bits whatever the order of warps and blocks; padded rows give zeros."""
    check(kernels, problem, how)


@pytest.mark.parametrize(("problem", "how"), DEQUANTIZE, ids=str)
def test_dequantize_rounds_once(problem: Problem, how: How, kernels: dict[str, Emulator]) -> None:
    dense = run(kernels["dequantize"], problem, how).dense
    exact = data_of(problem).weight.to(dense.dtype)
    assert torch.equal(dense[: problem.rows, : problem.columns], exact)
    assert not dense[problem.rows :].any()
    assert not dense[:, problem.columns :].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", W4_ENTRIES)
def test_every_kernel(name: str, all_kernels: dict[str, Emulator]) -> None:
    """At the fewest and the most tokens of a tile, and one more where several tiles are allowed."""
    entry = ENTRIES[name]
    most = entry.token_tile or 3
    fewest = {
        "skinny_hopper": most - 7,
        "skinny_wide_hopper": most - 7,
        "skinny": most // 2 + 1 if most > 8 else 1,
    }.get(entry.family, 1)
    counts = {fewest, most} if "skinny" in entry.family or entry.family == "dequantize" else {1, most, most + 1}
    for group_size in entry.groups:
        for tokens in sorted(counts):
            problem = Problem(tokens, 200, 456, group_size, entry.symmetric, entry.dtype)
            how = How(entry.family, 3, token_tile=entry.token_tile, warpgroups=entry.row_tile // 64)
            assert entry_of(problem, how) is entry
            check(all_kernels, problem, how)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", range(1, 131))
def test_every_number_of_tokens(tokens: int, all_kernels: dict[str, Emulator]) -> None:
    problem = Problem(tokens, 256, 512, (32, 64, 128, 0)[tokens % 4], tokens % 3 == 0, ("f16", "bf16")[tokens % 2])
    ways = [How("gemm"), How("gemm_hopper", blocks=5, token_tile=64)]
    if tokens <= SKINNY_TOKENS:
        ways += [How("skinny", blocks=1 + tokens % 4), How("skinny_hopper", blocks=1 + tokens % 9)]
    if tokens in SKINNY_WIDE_TOKENS:
        ways += [How("skinny_wide_hopper", 1 + tokens % 9, stages=2 + tokens % 4)]
    for how in ways:
        check(all_kernels, problem, how, seeds=(tokens,))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [17, 23, 24, 25, 31, 32, 33, 39, 40, 41, 47, 48])
def test_skinny_wide_hopper_near_the_borders_of_its_tiles(tokens: int, all_kernels: dict[str, Emulator]) -> None:
    """Every kind of group, row tiles and units that are not whole, and blocks from one to more than there is work."""
    kinds = itertools.product((32, 64, 128, 0), (True, False), ("f16", "bf16"))
    for number, (group_size, symmetric, dtype) in enumerate(kinds):
        problem = Problem(tokens, (320, 130)[number % 2], (576, 1088)[number // 2 % 2], group_size, symmetric, dtype)
        how = How("skinny_wide_hopper", blocks=(1, 2, 3, 5, 8, 20)[number % 6], stages=(2, 3, 4, 9)[number // 4])
        check(all_kernels, problem, how)
