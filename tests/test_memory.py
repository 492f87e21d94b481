"""Memory that runs out: a second try with single samples, the same bytes when resumed, else exit code 6."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.small_set import write_small_set
from tests.written import written
from vlmquant import pipeline
from vlmquant.algorithms import ALGORITHMS
from vlmquant.calibration.encode import Batch, BatchMaker
from vlmquant.demo import model_dir
from vlmquant.errors import EXIT_DOES_NOT_FIT, DoesNotFitError
from vlmquant.limits import is_allocation_failure
from vlmquant.recipe import load_recipe
from vlmquant.scratch import circles_freed
from vlmquant.stream import BlockStream, Stage

RECIPE = load_recipe("gptq-w4").model_copy(update={"effort": "fast"})  # nothing of the whole model
FAILURES = {
    "python": MemoryError(),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ..."
    ),
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the system": OSError(12, "Cannot allocate memory"),
    "oneDNN": RuntimeError("could not create a primitive"),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_small_set(tmp_path / "set", pairs=4, texts=2)
    return tmp_path / "set"


class Memory:
    """Stands for GPTQ: in its third stage memory runs out while batches hold more than so many samples."""

    def __init__(self, error: Exception, largest: int) -> None:
        self.error, self.largest = error, largest
        self.sizes: list[int] = []
        self.stages = 0

    def quantize(self, stage: Stage) -> object:
        self.stages += 1
        if self.stages >= 3 and self.sizes[-1] > self.largest:
            raise self.error
        return self.real(stage)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Memory":
        self.real = ALGORITHMS["gptq"]
        collate = BatchMaker.__call__

        def noted(maker: BatchMaker) -> Batch:
            self.sizes.append(len(maker.pairs))
            return collate(maker)

        monkeypatch.setattr(BatchMaker, "__call__", noted)
        monkeypatch.setitem(ALGORITHMS, "gptq", self.quantize)  # type: ignore[arg-type]
        return self


def run(model: Path, data: Path, out: Path, **options: bool) -> pipeline.Quantized:
    return pipeline.quantize(model, RECIPE, out, calibration=data, **options)


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_memory_runs_out_in_many_words(error: Exception) -> None:
    assert is_allocation_failure(error)


def test_a_second_try_takes_one_sample_at_a_time(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(FAILURES["torch on a CPU"], largest=1).install(monkeypatch)
    done = run(tiny("llava"), data, tmp_path / "out")
    assert set(memory.sizes) > {1}
    assert memory.sizes[-1] == 1
    manifest = json.loads((tmp_path / "out" / "vlmquant.json").read_text())
    assert manifest["settings"]["batch_size"] == 1
    told = (
        "memory ran out with 16 samples in a batch, when 2 of 4 blocks were done; the others saw one sample at a time"
    )
    assert [note for note in done.notes if told in note] == [note for note in manifest["notes"] if told in note] != []


def test_resuming_after_the_second_try_gives_the_same_bytes(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is memory enough by then: the blocks that are left are done as the others before them."""
    with monkeypatch.context() as patch:
        Memory(MemoryError(), largest=1).install(patch)
        run(tiny("llava"), data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        memory = Memory(MemoryError(), largest=1).install(patch)

        def interrupted(stage: Stage) -> object:
            if memory.sizes[-1] == 1 and memory.stages >= 6:
                raise InterruptedError
            return memory.quantize(stage)

        patch.setitem(ALGORITHMS, "gptq", interrupted)  # type: ignore[arg-type]
        with pytest.raises(InterruptedError):
            run(tiny("llava"), data, tmp_path / "cut")
    run(tiny("llava"), data, tmp_path / "cut", resume=True)
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


def test_without_memory_for_one_sample_the_run_can_be_resumed_elsewhere(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Memory(MemoryError(), largest=0).install(patch)
        with pytest.raises(DoesNotFitError, match=r"memory ran out .*; .*--resume") as caught:
            run(tiny("llava"), data, tmp_path / "out")
    assert caught.value.exit_code == EXIT_DOES_NOT_FIT
    assert not (tmp_path / "out").exists()
    assert run(tiny("llava"), data, tmp_path / "out", resume=True).path.is_dir()


def test_other_errors_are_not_tried_again(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(RuntimeError("shapes cannot be multiplied"), largest=1).install(monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        run(tiny("llava"), data, tmp_path / "out")
    assert 1 not in memory.sizes
    assert not is_allocation_failure(memory.error)


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_process_that_may_not_take_the_memory_says_so(command: str, tmp_path: Path) -> None:
    """Wherever it runs out: torch's libraries alone need about as much address space."""
    words = [
        command,
        str(model_dir()),
        *(["-r", "rtn-w4", "-o", str(tmp_path / "out")] if command == "quantize" else []),
    ]
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (260 << 20,) * 2)\n"
    program = f"{script}sys.argv = ['vlmquant', *{words!r}]\nfrom vlmquant.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_DOES_NOT_FIT, done.stderr
    assert done.stderr.startswith(f"vlmquant: {command}: memory ran out")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["nothing is frozen", "others' objects are"])
def test_circles_are_freed_once_they_are_left(frozen: bool) -> None:
    class Node:
        me: "Node"

    def circle() -> weakref.ref[Node]:
        node = Node()
        node.me = node
        return weakref.ref(node)

    gc.disable()
    if frozen:
        gc.freeze()
    before = gc.get_freeze_count()
    try:
        with circles_freed():
            inside = circle()
            assert inside() is not None
        assert inside() is None
        assert abs(gc.get_freeze_count() - before) <= before // 10  # what is frozen can still be let go of
    finally:
        gc.unfreeze()
        gc.enable()


def test_what_a_rehearsal_made_is_gone_after_it(tiny_llava: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[weakref.ref[BlockStream]] = []
    rehearse = BlockStream.rehearse

    def listening(stream: BlockStream) -> object:
        streams.append(weakref.ref(stream))
        return rehearse(stream)

    monkeypatch.setattr(BlockStream, "rehearse", listening)
    components, plan = pipeline.plan_model(tiny_llava, RECIPE)
    gc.disable()
    try:
        pipeline.plan_work(components, plan, RECIPE, calibration=data)
        assert [stream() for stream in streams] == [None]
    finally:
        gc.enable()
