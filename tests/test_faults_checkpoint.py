"""What can go wrong while a checkpoint is written: kills at every step, full disks, rivals, places not to write to."""

import errno
import os
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_checkpoint import RECIPE, Case, content_of, make_case
from vlmquant.checkpoint import verify_checkpoint
from vlmquant.checkpoint.files import disk_errors
from vlmquant.errors import CheckpointError, DoesNotFitError, InputError, UsageError, VlmquantError

STEPS = ("fsync", "replace", "rename")
"""The system calls through which writing becomes durable or visible; a kill is tried before and after each."""


@pytest.fixture(scope="module")
def case(tiny: Callable[..., Path]) -> Case:
    return make_case(tiny("llava"))


@pytest.fixture(scope="module")
def expected(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed run, by name, with their sha256."""
    out = tmp_path_factory.mktemp("expected") / "out"
    case.run(out)
    return content_of(out)


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_after(case: Case, out: Path, units: int, error: BaseException | None = None, **options: Any) -> None:
    """A run that ends with an error after so many units."""
    with case.writer(out, **options) as writer:
        for block, unit in list(case.units.items())[:units]:
            writer.add(block, *unit)
        raise error or Stop


def in_child(work: Callable[[], object]) -> int:
    """Do it in a forked process; its exit status as of os.waitstatus_to_exitcode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside torch's idle threads
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], object]) -> int:
    """Do it in a child that kills itself with SIGKILL at that call of STEPS, each counted twice: before and after."""

    def watched() -> None:
        left = step

        def tick() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        for name in STEPS:
            original = getattr(os, name)

            def wrapped(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                tick()
                result = _original(*args, **kwargs)
                tick()
                return result

            setattr(os, name, wrapped)
        work()

    return in_child(watched)


# 39, 40, 51: kills


STRIDE = 11
"""Of the steps that are tried; no divisor in common with the calls that a unit (8) or a file at the end (6) takes."""


def test_a_run_killed_at_any_step_resumes_to_the_same_bytes(
    case: Case, expected: dict[str, str], tmp_path: Path
) -> None:
    step, resumed = 0, 0
    while True:
        out = tmp_path / str(step) / "out"
        status = killed_at(step, lambda out=out: case.run(out))  # type: ignore[misc]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if out.exists():  # killed after the last rename: everything is there
            assert content_of(out) == expected
        else:
            done = case.run(out, resume=True)
            resumed += len(done) < len(case.units)
            assert content_of(out) == expected
            assert [path.name for path in out.parent.iterdir()] == ["out"]
        step += STRIDE
    assert step > 4 * len(case.units)
    assert resumed > step / STRIDE / 2


def test_a_run_killed_again_and_again_gets_there(case: Case, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    kills = 0
    while not out.exists():
        assert killed_at(14 + 10 * kills, lambda: case.run(out, resume=True)) in (0, -signal.SIGKILL)
        kills += 1
        assert kills < 50
    assert kills > 2
    assert content_of(out) == expected


def test_replacing_a_checkpoint_survives_a_kill_at_any_step(
    case: Case, expected: dict[str, str], tmp_path: Path
) -> None:
    """At every moment, the old or the new checkpoint is there after the next run began."""
    out = tmp_path / "out"
    case.run(out)

    def killed(step: int) -> bool:
        status = killed_at(step, lambda: case.run(out, force=True, resume=True))
        assert status in (0, -signal.SIGKILL)
        if status:
            with pytest.raises(UsageError, match="--force"), case.writer(out, resume=True):
                pass  # pragma: no cover
        assert content_of(out) == expected
        return status != 0

    end = 0
    while killed(end):
        end += STRIDE
    # Around the two renames, which come last, every step counts.
    assert [killed(step) for step in range(end - STRIDE - 8, end)].count(True) >= 8


# 41: a torn journal; 40: a unit that is not what the journal says


def test_a_torn_journal_line_is_ignored_and_its_unit_done_again(
    case: Case, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stop_after(case, out, 3)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert case.run(out, resume=True) == list(case.units)[2:]
    assert content_of(out) == expected


def test_a_damaged_unit_is_done_again_and_left_over_tmp_files_are_ignored(
    case: Case, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stop_after(case, out, 3)
    units = tmp_path / "out.partial" / "units"
    block = list(case.units)[1]
    content = bytearray((units / f"{block}.safetensors").read_bytes())
    content[-1] ^= 1
    (units / f"{block}.safetensors").write_bytes(content)
    (units / "x.safetensors.tmp").write_text("half")
    assert case.run(out, resume=True) == [block, *list(case.units)[3:]]
    assert content_of(out) == expected


# 42: resuming what was begun otherwise


def test_resuming_with_other_settings_says_which(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        stop_after(case, tmp_path / "out", 2)
    with (
        pytest.raises(UsageError, match="begun with another recipe, torch, so it cannot be resumed"),
        case.writer(tmp_path / "out", resume=True, recipe="r2", torch="t2"),
    ):
        pass  # pragma: no cover
    assert case.run(tmp_path / "out", resume=True) == list(case.units)[2:]


def test_an_unfinished_run_is_neither_continued_nor_removed_without_a_word(
    case: Case, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        stop_after(case, out, 2)
    with pytest.raises(UsageError, match=f"2 of {len(case.units)} blocks done.*--resume.*--force"):
        case.run(out)
    assert case.run(out, force=True) == list(case.units)
    assert content_of(out) == expected


# 43: interrupts and errors


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), Stop(), InputError("x")], ids=repr)
def test_an_interrupted_run_keeps_its_units_and_says_so(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    with pytest.raises(type(error)):
        stop_after(case, tmp_path / "out", 1, error)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert "holds 1 finished blocks; run again with --resume" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_that_ends_before_its_first_unit_leaves_nothing(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        stop_after(case, tmp_path / "out", 0)
    assert list(tmp_path.iterdir()) == []


# 44, 45: full disks


def test_a_disk_too_small_is_refused_before_any_work(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": case.plan.bytes_after})
    monkeypatch.setattr("vlmquant.checkpoint.writer.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DoesNotFitError, match="bytes of disk and") as caught, case.writer(tmp_path / "out"):
        pass  # pragma: no cover
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", range(0, 36, 3))
def test_a_disk_that_fills_up_gives_one_line_and_can_be_resumed(
    case: Case, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "out"
    left = step

    def full(descriptor: int, _fsync: Callable[[int], None] = os.fsync) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DoesNotFitError, match=r"^.*No space left on device; free some space .* --resume.*$"):
            case.run(out)
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    case.run(out, resume=True)
    assert content_of(out) == expected


def test_a_write_cut_short_by_the_system_leaves_no_unit(case: Case, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: write() itself fails in the middle of a file."""
    import resource

    out = tmp_path / "out"

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            case.run(out)
        except VlmquantError as error:
            os._exit(7 if "File too large" in str(error) else 1)

    assert in_child(work) == 7
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))


# 47, 49: places


def test_an_existing_output_is_replaced_only_with_force(case: Case, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    case.run(out)
    with pytest.raises(UsageError, match=r"exists and is not empty.*--force"):
        case.run(out)
    with pytest.raises(UsageError, match=r"exists and is not empty.*--force"):
        case.run(out, resume=True)
    case.run(out, force=True)
    assert content_of(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_leaves_the_old_checkpoint(case: Case, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    case.run(out)
    with pytest.raises(Stop):
        stop_after(case, out, len(case.units), force=True)
    assert content_of(out) == expected


def test_an_empty_directory_is_a_fine_output(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    case.run(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out") == []


def test_force_does_not_replace_what_vlmquant_did_not_write(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"no vlmquant.json"):
        case.run(tmp_path / "out", force=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").write_text("years of work")
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(UsageError, match="no unfinished run of vlmquant"):
            case.run(tmp_path / "new", **options)
    assert len(list(tmp_path.rglob("thesis.tex"))) == 2


def test_an_output_inside_the_model_or_around_it_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "around" / "model"
    model.mkdir(parents=True)
    for file in tiny("llava").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    case, before = make_case(model, RECIPE), content_of(tmp_path)
    (tmp_path / "alias").symlink_to(model)
    for out in (model, model / "out", model.parent, tmp_path / "alias" / "out"):
        with pytest.raises(UsageError, match="one in the other"):
            case.run(out, force=True)
    assert content_of(model) == {name.removeprefix("around/model/"): digest for name, digest in before.items()}


def test_symbolic_links_and_files_are_refused_as_outputs(case: Case, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("x")
    for name, message in (("link", "symbolic link"), ("linked", "symbolic link"), ("file", "is a file")):
        with pytest.raises(UsageError, match=message):
            case.run(tmp_path / name, force=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file: is a file"):
        case.run(tmp_path / "file" / "out")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UsageError, match="Read-only file system; choose a place that you may write to"):
        case.run(tmp_path / "out")


def test_memory_that_runs_out_is_not_told_as_a_fault_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"), disk_errors(tmp_path):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    with pytest.raises(CheckpointError, match="mend the cause"), disk_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


# 48: two processes


def test_a_second_process_on_the_same_output_is_refused(case: Case, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def rival() -> None:
        try:
            case.run(out, force=True)
        except UsageError as error:
            os._exit(7 if f"process {os.getppid()} on {socket.gethostname()}" in str(error) else 1)

    with case.writer(out) as writer:
        for block, unit in case.units.items():
            writer.add(block, *unit)
        assert in_child(rival) == 7
        writer.finish({})
    assert verify_checkpoint(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_dead_process_is_taken_over(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text(f"process 999999999 on {socket.gethostname()}\n")
    case.run(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_from_another_machine_is_respected(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text("process 1 on some-other-machine\n")
    with pytest.raises(UsageError, match=r"locked by process 1 on some-other-machine.*remove this file"):
        case.run(tmp_path / "out")
