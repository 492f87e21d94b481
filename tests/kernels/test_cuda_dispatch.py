"""Which kernel runs: every problem gets an entry that exists and fits, as measured where it was; never garbage."""

import itertools
import json
from pathlib import Path

import pytest

from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import build, dispatch
from vlmquant.kernels.cuda.catalog import ENTRIES, SKINNY_WIDE_TOKENS, shared_bytes
from vlmquant.kernels.cuda.dispatch import Choice, Gpu, Plan, Problem, choose, even_grid, plan, split_count

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 227 << 10)
GPUS = [
    H100,
    Gpu("NVIDIA A100", "sm_80", 108, 163 << 10),
    Gpu("NVIDIA GeForce RTX 3090", "sm_86", 82, 99 << 10),
    Gpu("NVIDIA L4", "sm_89", 58, 99 << 10),
    Gpu("NVIDIA B200", "sm_100", 148, 227 << 10),
    Gpu("NVIDIA RTX PRO 6000", "sm_120", 188, 99 << 10),
    Gpu("NVIDIA of tomorrow", build.PTX_ARCH, 200, 227 << 10),
]
SHAPES = [(64, 64), (64, 8192), (192, 1088), (4096, 4096), (8192, 28672), (28672, 8192), (152064, 3584)]
TOKENS = [1, 8, 9, 16, 17, 24, 25, 32, 33, 64, 65, 128, 129, 256, 257, 1024, 5000, 100_000]
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_prototypes_h100.json"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    dispatch.overrides.cache_clear()


def problems() -> list[Problem]:
    kinds = itertools.product(TOKENS, SHAPES, (32, 64, 128, 256, None), (True, False), ("f16", "bf16"))
    found = []
    for tokens, (rows, columns), group, symmetric, dtype in kinds:
        size = columns if group is None or group > columns else group
        if columns % size == 0:
            found.append(Problem(tokens, rows, columns, size, symmetric, dtype))
    return found


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_every_problem_has_a_kernel_that_exists_and_fits(gpu: Gpu) -> None:
    for problem in problems():
        found = choose(problem, gpu)
        entry = ENTRIES[found.entry]
        assert ("sm_80" if gpu.arch == build.PTX_ARCH else gpu.arch) in entry.archs
        assert entry.family == found.kernel
        assert (entry.dtype, entry.symmetric) == (problem.dtype, problem.symmetric)
        kind = problem.group_size if problem.group_size in (32, 64) else 128
        assert kind in entry.groups or entry.family == "dequantize"
        assert found.shared_bytes <= gpu.shared_bytes
        assert found.threads == entry.threads
        assert 0 < found.grid[0] < 2**31
        assert 0 < found.grid[1] < 2**16
        if found.token_box:
            assert found.dependent
            assert 2 <= found.stages <= 32
            assert found.token_box == entry.token_tile
        if entry.family == "skinny":
            assert problem.tokens <= entry.token_tile


def test_wgmma_runs_on_its_architecture_alone() -> None:
    for gpu in GPUS:
        kernels = {choose(problem, gpu).kernel for problem in problems()}
        assert kernels.isdisjoint({"skinny_hopper", "gemm_hopper"}) == (gpu.arch != "sm_90a")


def row_name(row: dict) -> str:
    return f"{row['shape']}-{row['tokens']}"


@pytest.mark.parametrize("row", json.loads(MEASURED.read_text())["results"], ids=row_name)
def test_h100_runs_what_was_measured_there(row: dict) -> None:
    problem = Problem(row["tokens"], row["rows"], row["columns"], 128, True, "bf16")
    found = choose(problem, H100)
    assert found.kernel == row["kernel"]
    entry = ENTRIES[found.entry]
    # Ring and grid as the prototypes' launcher computed them.
    if row["kernel"] == "skinny_hopper":
        tiles = -(-row["tokens"] // 8)
        stage = -(-(2 * tiles * 1024 + 16384 + 4 * 128) // 1024) * 1024
        assert found.entry == f"w4_skinny_hopper_bf16_m{tiles}_g128"
        assert found.grid == (132 * row["blocks_per_sm"], 1)
    else:
        tokens, strips = row["tile_tokens"], row["warpgroups"]
        stage = -(-(2 * tokens * 128 + strips * 4096 + strips * 128) // 1024) * 1024
        assert found.entry == f"w4_gemm_hopper_bf16_n{tokens}_c{strips}"
        if row["grid"] == "sms":
            assert found.grid == (132, 1)
        assert found.sweep_tiles == 1024 // tokens
    assert found.stages == (row["ring_kib"] * 1024 - 2048) // stage
    assert found.shared_bytes == 2048 + found.stages * stage
    assert entry.archs == ("sm_90a",)


@pytest.mark.parametrize(
    ("tokens", "tiles", "blocks", "ring_kib", "stages"),
    [
        (17, 3, 1, 226, 9),
        (24, 3, 2, 110, 4),
        (32, 4, 2, 110, 4),
        (40, 5, 2, 110, 4),
        (41, 6, 2, 110, 3),
        (48, 6, 1, 226, 7),
    ],
)
def test_skinny_wide_hopper_is_planned(tokens: int, tiles: int, blocks: int, ring_kib: int, stages: int) -> None:
    """A stage holds 2 KiB of inputs for a tile of 8 tokens, 16 KiB of codes and 512 bytes of scales, in whole KiB."""
    choice = Choice("skinny_wide_hopper", blocks_per_sm=blocks, ring_kib=ring_kib)
    found = plan(Problem(tokens, 28672, 8192, 128, True, "bf16"), H100, choice)
    assert isinstance(found, Plan)
    assert (found.kernel, found.entry) == ("skinny_wide_hopper", f"w4_skinny_wide_hopper_bf16_m{tiles}_g128")
    assert (found.grid, found.threads, found.dependent) == ((132 * blocks, 1), 256, True)
    assert (found.token_box, found.stages) == (8 * tiles, stages)
    assert found.shared_bytes == 2048 + stages * (2 * tiles + 16 + 1) * 1024
    assert blocks * (found.shared_bytes + 1024) <= 228 << 10  # of an SM, which keeps 1 KiB for each block


@pytest.mark.parametrize("tokens", [1, 16, 49])
def test_skinny_wide_hopper_takes_17_to_48_tokens(tokens: int) -> None:
    assert tokens not in SKINNY_WIDE_TOKENS
    found = plan(Problem(tokens, 28672, 8192, 128, True, "bf16"), H100, Choice("skinny_wide_hopper"))
    assert found == f"there is no w4_skinny_wide_hopper_bf16_m{-(-tokens // 8)}_g128"


@pytest.mark.parametrize(
    ("tiles", "blocks", "grid"),
    [
        (264, 132, 132),  # two full waves
        (128, 132, 128),  # 97 % of one
        (110, 132, 132),  # 83 %: too empty, the tiles are shared
        (230, 132, 115),  # two waves of 87 %
        (300, 132, 132),  # three of 76 %
        (396, 132, 132),
        (375, 132, 125),  # three of 95 %
        (1, 132, 132),
    ],
)
def test_whole_waves_where_they_fill_the_gpu(tiles: int, blocks: int, grid: int) -> None:
    assert even_grid(tiles, blocks) == grid


def test_columns_are_split_until_the_gpu_is_full_or_parts_get_short() -> None:
    assert split_count(64, 32, 132) == 4  # 32 units: four parts of eight
    assert split_count(448, 64, 132) == 2  # 896 blocks >= 4 * 132
    assert split_count(2048, 64, 132) == 1
    assert split_count(1, 8, 132) == 1


def test_columns_are_split_further_only_until_the_inputs_fit_shared_memory() -> None:
    entry = ENTRIES["w4_skinny_bf16_m4_g128"]
    problem = Problem(32, 64 * 600, 28672, 128, True, "bf16")  # more strips than the GPU needs blocks
    found = plan(problem, GPUS[1], Choice("skinny"))
    assert isinstance(found, str)  # 19 parts exceed the workspace
    problem = Problem(32, 64 * 500, 8192, 128, True, "bf16")
    found = plan(problem, GPUS[1], Choice("skinny"))
    assert isinstance(found, Plan)
    splits = found.grid[1]

    def shared(splits: int) -> int:
        return shared_bytes(entry, tokens=32, columns=8192, splits=splits)

    assert shared(splits) <= 96 << 10 < shared(splits - 1)


def test_what_cannot_be_planned_says_why() -> None:
    good = Problem(4, 128, 256, 128, True, "bf16")
    assert isinstance(plan(good, H100, Choice("skinny")), Plan)
    assert plan(Problem(33, 128, 256, 128, True, "bf16"), H100, Choice("skinny")) == "takes at most 32 tokens"
    assert plan(Problem(4, 128, 256, 48, True, "bf16"), H100, Choice("skinny")) == "there is no kernel for groups of 48"
    assert "multiples of 64" in str(plan(Problem(4, 100, 256, 128, True, "bf16"), H100, Choice("skinny")))
    assert "there is no w4_skinny_f32" in str(plan(Problem(4, 128, 256, 128, True, "f32"), H100, Choice("skinny")))
    odd = plan(Problem(64, 192, 256, 32, True, "bf16"), H100, Choice("gemm"))
    assert isinstance(odd, Plan)
    assert (odd.entry, odd.grid) == ("w4_gemm_bf16_m64_g32", (2, 1))
    a100 = GPUS[1]
    hopper = Choice("gemm_hopper", tile_tokens=64, warpgroups=2)
    assert plan(good, a100, hopper) == "w4_gemm_hopper_bf16_n64_c2 does not run on sm_80"
    small = Choice("gemm_hopper", tile_tokens=256, warpgroups=2, ring_kib=100)
    assert "no room for two stages" in str(plan(good, H100, small))
    tiny_gpu = Gpu("tiny", "sm_80", 10, 8 << 10)
    assert "bytes of shared memory" in str(plan(Problem(64, 128, 256, 128, True, "bf16"), tiny_gpu, Choice("gemm")))
    with pytest.raises(KernelError, match="groups of 48; hold this weight in another layout"):
        choose(Problem(4, 128, 192, 48, True, "bf16"), H100)


def test_skinny_stays_inside_the_workspace() -> None:
    for gpu in GPUS:
        for problem in problems():
            found = plan(problem, gpu, Choice("skinny"))
            if isinstance(found, Plan) and found.grid[1] > 1:
                assert found.grid[1] * problem.tokens * problem.rows <= dispatch.WORKSPACE_FLOATS


def test_a_weight_that_no_row_can_run_is_expanded_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "table", lambda name: (dispatch.Row(Choice("skinny")),))
    problem = Problem(64, 64 * 37, 256, 128, True, "bf16")
    for _ in range(2):
        found = choose(problem, GPUS[1])
        assert found.kernel == "dequantize"
        assert found.why == "skinny: takes at most 32 tokens"
    assert caplog.text.count("is expanded at every call") == 1


def write_override(rows: list[dict], gpu: str = H100.name) -> Path:
    path = dispatch.override_path(H100.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu, "rows": rows}))
    dispatch.overrides.cache_clear()
    return path


def test_an_override_goes_before_the_table_for_its_shape_alone() -> None:
    write_override([{"tokens": 16, "shape": [4096, 4096], "kernel": "skinny"}])
    found = choose(Problem(1, 4096, 4096, 128, True, "bf16"), H100)
    assert (found.kernel, found.why) == ("skinny", f"tuned for {H100.name}")
    assert choose(Problem(1, 8192, 4096, 128, True, "bf16"), H100).kernel == "skinny_hopper"
    assert choose(Problem(1, 4096, 4096, 128, True, "bf16"), GPUS[1]).why == "table of portable"


@pytest.mark.parametrize(
    ("rows", "gpu"),
    [
        ([{"kernel": "skinny", "ring": 3}], H100.name),
        ([{"kernel": "turbo"}], H100.name),
        ([{"kernel": "gemm_hopper", "tile_tokens": "64", "warpgroups": 2}], H100.name),
        ([{"kernel": "skinny_hopper", "blocks_per_sm": 0}], H100.name),
        ([{"tokens": "many", "kernel": "skinny"}], H100.name),
        ([{"shape": 7, "kernel": "skinny"}], H100.name),
        ([{"shape": "ab", "kernel": "skinny"}], H100.name),
        ([{"kernel": ["skinny"]}], H100.name),
        ([{"kernel": "skinny", "grid": {}}], H100.name),
        ([[1, 2]], H100.name),
        ([{"tokens": 4}], H100.name),
        (["skinny"], H100.name),
        ([], "another GPU"),
    ],
)
def test_a_damaged_override_is_named_and_not_used(rows: list, gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_override(rows, gpu)
    assert choose(Problem(1, 4096, 4096, 128, True, "bf16"), H100).why == "table of sm_90a"
    assert str(path) in caplog.text
    assert "vlmquant tune" in caplog.text


def test_an_override_file_that_is_no_json_is_named(caplog: pytest.LogCaptureFixture) -> None:
    write_override([]).write_text("{")
    assert dispatch.overrides(H100.name) == ()
    assert "not used" in caplog.text


def test_an_override_file_that_others_could_have_written_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    write_override([]).chmod(0o666)
    assert dispatch.overrides(H100.name) == ()
    assert "can be written to by other users" in caplog.text


def test_rows_survive_writing() -> None:
    for name in ("sm_90a", "portable"):
        for row in dispatch.table(name):
            assert dispatch.parse_row(dispatch.write_row(row)) == row


def test_tables_say_where_they_come_from() -> None:
    assert MEASURED.name in dispatch.provenance("sm_90a")
    assert "Not measured" in dispatch.provenance("portable")
