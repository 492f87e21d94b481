"""Several processes share a quantization: the same codes as one makes, and an end for all where one of them ends.

The ranks are forked, so that none imports torch anew, and meet over Gloo on the loopback interface.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import zoo
from tests.small_set import write_small_set
from tests.test_calibrated_families import balance
from tests.zoo_processors import add_processor
from vlmquant import __main__, pipeline, ranks, stream
from vlmquant.algorithms import gptq
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.errors import EXIT_RANK_LOST, EXIT_SENTINEL, EXIT_USAGE, SentinelError, UsageError
from vlmquant.ranks import ALONE, Ranks, join, refuse_different

LEAST_EQUAL = 0.9999
"""Share of codes that several processes must have in common with one; here it is all of them."""
BATCH_SIZE = 4
SOON = 20.0
"""Seconds within which all processes end where one is gone: it takes one or two, on an idle machine."""

RECIPES = {
    "gptq-cache": """
components:
  vision_encoder: {scheme: w8a8-dynamic, method: search}
  language: {scheme: w4a16, method: gptq, gptq: {loss: layer}}
kv_cache: {dtype: fp8}
""",
    "auto": """
components:
  language: {scheme: w4a16, method: auto}
""",
    "answers": """
components:
  language: {scheme: w4a16, method: gptq, gptq: {loss: answers}}
""",
    "awq-static": """
components:
  vision_encoder: {scheme: w8a8-static, method: search}
  language: {scheme: w4a16, method: awq}
""",
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("calibration") / "set", pairs=14, texts=4)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches, one of them of text alone: uneven for all."""
    monkeypatch.setattr(pipeline, "BATCH_SIZE", BATCH_SIZE)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"version: 1\nname: test\n{text}")
    return lambda name: folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def alone(
    tiny_llava: Path,
    calibration: Path,
    recipe: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """alone(recipe) -> what one process makes by it. Not to be written to."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("alone") / name
            made[name] = pipeline.quantize(tiny_llava, recipe(name), out, calibration=calibration).path
        return made[name]

    return make


class Forked:
    """size processes that do the same work, each as one of the ranks; what they wrote to stderr, and how they ended."""

    def __init__(self, size: int, work: Callable[[int], object], folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.files = [folder / f"stderr-{rank}" for rank in range(size)]
        self.children = [self._start(rank, size, port, work) for rank in range(size)]

    def _start(self, rank: int, size: int, port: int, work: Callable[[int], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside torch's idle threads
            child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            output = os.open(self.files[rank], os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            warnings.simplefilter("ignore")
            work(rank)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> list[int]:
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]

    def told(self, rank: int) -> str:
        return self.files[rank].read_text()


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> Callable[[int], object]:
    """The command line, as the work of a rank."""
    monkeypatch.setattr(sys, "argv", ["vlmquant", *map(str, words)])
    return lambda rank: __main__.main()


def equal_share(ours: Path, theirs: Path) -> float:
    """Of the numbers of two checkpoints."""
    one, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert one.keys() == other.keys()
    equal = sum(int((one[name] == other[name]).sum()) for name in one)
    return equal / sum(value.numel() for value in one.values())


def assert_same(ours: Path, theirs: Path) -> None:
    assert equal_share(ours, theirs) >= LEAST_EQUAL
    assert verify_checkpoint(ours) == []
    mine, other = read_manifest(ours), read_manifest(theirs)
    assert mine["notes"] == other["notes"]
    assert mine["fingerprint"] == other["fingerprint"]
    assert mine["errors"] == pytest.approx(other["errors"], rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_make_what_one_makes(
    name: str,
    tiny_llava: Path,
    calibration: Path,
    recipe: Callable[[str], Path],
    alone: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "WORTH", 1e6)  # so that rows are shared out in so small a model, too
    words = ("quantize", tiny_llava, "-r", recipe(name), "--calibration", calibration, "-o", tmp_path / "two")
    forked = Forked(2, command(monkeypatch, *words), tmp_path)
    assert forked.wait() == [0, 0], forked.told(0) + forked.told(1)
    assert_same(tmp_path / "two", alone(name))
    one, two = read_manifest(alone(name)), read_manifest(tmp_path / "two")
    assert one.get("kv_cache") == two.get("kv_cache")
    assert ("kv_cache" in one) == ("kv_cache" in RECIPES[name])
    assert (one["work"]["processes"], two["work"]["processes"]) == (1, 2)
    assert "written in" in forked.told(0)
    assert forked.told(1) == ""


def test_more_processes_that_keep_nothing_of_a_pass_make_the_same(
    tiny_llava: Path,
    calibration: Path,
    recipe: Callable[[str], Path],
    alone: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "WORTH", 1e6)
    monkeypatch.setattr(stream, "SPILL_BYTES", 1 << 10)

    def work(rank: int) -> None:
        if rank == 1:  # one that has less memory than the others decides for all
            monkeypatch.setattr(pipeline.budget, "available_bytes", lambda: 1 << 20)
        with join() as joined:
            done = pipeline.quantize(
                tiny_llava, recipe("gptq-cache"), tmp_path / "many", calibration=calibration, ranks=joined
            )
            assert done.planned.passes.rerun
            assert done.planned.passes.spill

    forked = Forked(3, work, tmp_path)
    assert forked.wait() == [0] * 3, "".join(map(forked.told, range(3)))
    assert equal_share(tmp_path / "many", alone("gptq-cache")) >= LEAST_EQUAL


@pytest.mark.slow
def test_experts_see_the_tokens_of_all_processes(tmp_path: Path, calibration: Path) -> None:
    model = zoo.make_model("qwen3_vl_moe", dtype=torch.bfloat16)
    balance(model, None)
    model.save_pretrained(tmp_path / "model")
    model_dir = add_processor("qwen3_vl_moe", tmp_path / "model")
    file = tmp_path / "test.yaml"
    file.write_text(
        "version: 1\nname: test\ncomponents: {language: {scheme: {bits: 4, group_size: 32}, method: gptq}}\n"
        "calibration: {experts: {max_starving: 1.0}}\n"
    )
    alone = pipeline.quantize(model_dir, file, tmp_path / "one", calibration=calibration)

    def work(rank: int) -> None:
        with join() as joined:
            pipeline.quantize(model_dir, file, tmp_path / "two", calibration=calibration, ranks=joined)

    forked = Forked(2, work, tmp_path)
    assert forked.wait() == [0, 0], forked.told(0) + forked.told(1)
    assert read_manifest(tmp_path / "two")["experts"] == read_manifest(alone.path)["experts"]
    assert_same(tmp_path / "two", alone.path)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_all_and_one_alone_resumes(
    victim: int,
    tiny_llava: Path,
    calibration: Path,
    recipe: Callable[[str], Path],
    alone: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = recipe("gptq-cache"), tmp_path / "two"
    words = ("quantize", tiny_llava, "-r", file, "--calibration", calibration, "-o", out)
    run = command(monkeypatch, *words)
    killed = tmp_path / "killed"

    def work(rank: int) -> None:
        if rank == victim:
            whole, calls = stream.Stage.finish, []

            def finish(self: stream.Stage, *given: Any) -> None:
                calls.append(self.method)
                if calls.count("gptq") == 6:  # of the four stages in each of two blocks
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                whole(self, *given)

            monkeypatch.setattr(stream.Stage, "finish", finish)
        run(rank)

    forked = Forked(2, work, tmp_path)
    codes = forked.wait()
    assert time.time() - killed.stat().st_mtime < SOON
    survivor = 1 - victim
    assert codes[victim] == -signal.SIGKILL
    assert codes[survivor] == EXIT_RANK_LOST, forked.told(survivor)
    assert re.search(r"gone.*run again with --resume", forked.told(survivor).replace("\n", " "))
    assert not out.exists()
    pipeline.quantize(tiny_llava, file, out, calibration=calibration, resume=True)
    assert_same(out, alone("gptq-cache"))


@pytest.mark.slow
def test_a_run_of_one_is_resumed_by_two(
    tiny_llava: Path,
    calibration: Path,
    recipe: Callable[[str], Path],
    alone: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = recipe("awq-static"), tmp_path / "two"
    whole = stream.Stage.finish

    def finish(self: stream.Stage, *given: Any) -> None:
        if self.block.info.index == 1 and self.block.info.component == "language":
            raise SentinelError("stop here")
        whole(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(stream.Stage, "finish", finish)
        with pytest.raises(SentinelError, match="stop here"):
            pipeline.quantize(tiny_llava, file, out, calibration=calibration)
    words = ("quantize", tiny_llava, "-r", file, "--calibration", calibration, "-o", out, "--resume")
    forked = Forked(2, command(monkeypatch, *words), tmp_path)
    assert forked.wait() == [0, 0], forked.told(0) + forked.told(1)
    assert_same(out, alone("awq-static"))
    again = Forked(2, command(monkeypatch, *words), tmp_path)
    assert again.wait() == [0, 0], again.told(0) + again.told(1)
    assert "an earlier run had finished this checkpoint" in again.told(0)


def test_an_error_in_one_process_is_told_once(
    tiny_llava: Path,
    calibration: Path,
    recipe: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = command(
        monkeypatch,
        *("quantize", tiny_llava, "-r", recipe("gptq-cache"), "--calibration", calibration, "-o", tmp_path / "out"),
    )

    def work(rank: int) -> None:
        if rank == 1:

            def broken(*given: Any) -> None:
                raise SentinelError("the inputs of this rank are broken")

            monkeypatch.setattr(gptq, "quantize_weight", broken)
        run(rank)

    forked = Forked(3, work, tmp_path)
    assert forked.wait() == [EXIT_SENTINEL] * 3
    assert "vlmquant: the inputs of this rank are broken" in forked.told(1)
    assert "vlmquant:" not in forked.told(0) + forked.told(2)
    assert not (tmp_path / "out").exists()


def test_silence_is_taken_for_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BEAT", 0.1)
    monkeypatch.setattr(ranks, "SILENCE", 1.0)
    monkeypatch.setattr(ranks, "GRACE", 0.2)

    def work(rank: int) -> None:
        with join() as joined:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            joined.gather(rank)

    forked = Forked(2, work, tmp_path)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(forked.children[0], 0)[1]) == EXIT_RANK_LOST
    assert time.monotonic() - started < SOON
    assert "rank 1 of 2 has given no sign of life" in forked.told(0)
    os.kill(forked.children[1], signal.SIGKILL)
    os.waitpid(forked.children[1], 0)


def test_values_errors_and_tensors_reach_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with join() as joined:
            part = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T + rank  # not in one piece
            got = joined.gather({"rank": rank, "part": part, "twice": (part, part), "none": torch.empty(0, 3)})
            for other, one in enumerate(got):
                assert one["rank"] == other
                assert torch.equal(one["part"], part - rank + other)
                assert one["twice"][0] is one["twice"][1]
                assert one["none"].shape == (0, 3)
            assert joined.made_by(2, lambda: rank) == 2
            with pytest.raises(UsageError, match="not like this"):
                joined.first(refuse)
            assert joined.in_order({2 - rank: f"of {rank}"}) == ["of 2", "of 1", "of 0"]
            with pytest.raises(UsageError, match=r"rank [01] runs with threads"):
                refuse_different(joined, {"threads": "1" if rank else "2", "recipe": "same"})

    def refuse() -> None:
        raise UsageError("not like this")

    forked = Forked(3, work, tmp_path)
    assert forked.wait() == [0] * 3, "".join(map(forked.told, range(3)))


def test_a_sum_is_made_in_the_order_of_the_batches(tmp_path: Path) -> None:
    """Float32 sums of numbers of very different sizes: any other order gives others."""
    parts = [torch.randn(40, 40, generator=torch.Generator().manual_seed(n)) * 10.0 ** (n % 5) for n in range(11)]
    numbers = [0, 1, 2, 5, 6, 8, 10]  # some batches do not come here, and one follows another on the same rank
    expected = torch.zeros(40, 40)
    for number in numbers:
        expected += parts[number]
    backwards = torch.zeros(40, 40)
    for number in reversed(numbers):
        backwards += parts[number]
    assert not torch.equal(expected, backwards)

    def work(rank: int) -> None:
        with join() as joined:
            total = torch.zeros(40, 40)
            pieces = [total[:10, 5:], total[10:, :]]
            relay = joined.relay(numbers)
            for turn, number in zip(relay, [one for one in numbers if joined.own(one)], strict=True):
                for piece, part in zip(pieces, (parts[number][:10, 5:], parts[number][10:, :]), strict=True):
                    with turn.adding(piece):
                        piece += part
            joined.spread(pieces, relay.last)
            assert torch.equal(total[:10, 5:], expected[:10, 5:])
            assert torch.equal(total[10:], expected[10:])

    forked = Forked(4, work, tmp_path)
    assert forked.wait() == [0] * 4, "".join(map(forked.told, range(4)))


def test_rows_are_shared_in_whole_steps() -> None:
    assert Ranks(0, 3).shares(500, step=64, work=1e12) == [slice(0, 192), slice(192, 384), slice(384, 500)]
    assert Ranks(0, 3).shares(100, step=64, work=1e12) == [slice(0, 64), slice(64, 100), slice(100, 100)]
    assert Ranks(0, 3).shares(500, step=64, work=1e3) == [slice(0, 500), slice(500, 500), slice(500, 500)]
    assert ALONE.shares(500, step=64, work=1e12) == [slice(0, 500)]


def test_a_process_alone_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(ranks, "_store", None)
    with join("cpu") as joined:
        assert (type(joined), joined.size, joined.device) == (Ranks, 1, "cpu")
        total: Tensor = torch.zeros(2)
        for turn in joined.relay([0, 1]):
            with turn.adding(total):
                total += 1
        assert total.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_PORT is ''"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_variables_that_mean_nothing_are_named(
    environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(told)), join():
        pass


def test_more_processes_than_batches_are_refused(
    tiny_llava: Path, recipe: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write_small_set(tmp_path / "few", pairs=2, texts=0)
    words = ("quantize", tiny_llava, "-r", recipe("gptq-cache"), "--calibration", few, "-o", tmp_path / "out")
    forked = Forked(2, command(monkeypatch, *words), tmp_path)
    assert forked.wait() == [EXIT_USAGE] * 2
    told = forked.told(0) + forked.told(1)
    assert told.replace("\n", " ").count("2 processes cannot share 1 batches") == 1


@pytest.mark.slow
def test_torchrun_starts_them(
    tiny_llava: Path, calibration: Path, recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    """As in the README; three processes of torchrun's start-up take most of the time."""
    words = ("quantize", tiny_llava, "-r", recipe("gptq-cache"), "--calibration", calibration, "-o", tmp_path / "two")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29755"]
    done = subprocess.run([*run, "-m", "vlmquant", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert verify_checkpoint(tmp_path / "two") == []
    assert read_manifest(tmp_path / "two")["work"]["processes"] == 2
    assert done.stdout.count("written in") == 1
