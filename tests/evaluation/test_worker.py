"""The process a model is scored in: what it leaves behind, however it or its owner ends, and how that is told."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.small_set import write_small_set
from vlmquant import progress, scratch
from vlmquant.calibration.sets import load_set
from vlmquant.errors import DoesNotFitError, InputError, VlmquantError
from vlmquant.evaluation import process, remote
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.process import Worker
from vlmquant.evaluation.remote import score_model
from vlmquant.evaluation.settings import Settings

SLOW = """
import os, resource, sys, time
sys.path.insert(0, {root!r})
from vlmquant.evaluation import worker
import types
scoring = types.ModuleType("vlmquant.evaluation.scoring")
class Answering:
    def __call__(self, request):
        with open(request["seen"], "w") as file:
            file.write(str(os.getpid()))
        {what}
        return {{"run": 1}}
scoring.Answering = Answering
sys.modules["vlmquant.evaluation.scoring"] = scoring
utils = types.ModuleType("transformers.utils")
utils.logging = types.SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
sys.modules |= {{"transformers": types.ModuleType("transformers"), "transformers.utils": utils}}
{before}
worker.main(int(sys.argv[-1]))
"""
"""The worker with its heavy part replaced."""
ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have Worker start one that does something else than scoring."""

    def replace(what: str, before: str = "") -> None:
        script = tmp_path / "worker.py"
        script.write_text(SLOW.format(root=ROOT, what=what, before=before))
        monkeypatch.setattr(process, "COMMAND", (str(script),))

    return replace


def wait_for(condition: Callable[[], object], seconds: float = 60) -> object:
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            pytest.fail("it did not happen")
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def written(file: Path) -> int:
    return int(wait_for(lambda: file.exists() and file.read_text()))  # type: ignore[call-overload]


# How it ends


@pytest.mark.parametrize(
    ("number", "error", "match"),
    [
        (signal.SIGKILL, DoesNotFitError, "ended by signal 9, as the system does when memory runs out"),
        (signal.SIGBUS, DoesNotFitError, "SIGBUS.*TMPDIR"),
        (signal.SIGSEGV, VlmquantError, "crashed .SIGSEGV"),
        (signal.SIGABRT, VlmquantError, "crashed .SIGABRT"),
        (signal.SIGTERM, VlmquantError, "ended by somebody else .SIGTERM"),
    ],
)
def test_a_worker_ended_by_a_signal(
    number: signal.Signals,
    error: type[Exception],
    match: str,
    act: Callable[..., None],
    tiny_llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    act(f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), {int(number)}); time.sleep(60)")
    inner = Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda self, request: inner(self, {"seen": str(tmp_path / "seen")}))
    samples = load_set(write_small_set(tmp_path / "set", pairs=1)).samples
    with pytest.raises(error, match=match) as told:
        score_model(tiny_llava, samples, Settings(threads=1, dtype="float32"), reference=None, record=None)
    assert type(told.value) is error


def test_a_worker_that_fails_is_a_bug_of_ours(act: Callable[..., None], tmp_path: Path) -> None:
    act("raise KeyError('x')")
    with Worker() as worker:
        assert worker.ask({"seen": str(tmp_path / "seen")}) == b""
        assert worker.status() == 1
    with pytest.raises(RuntimeError, match="traceback stands above"):
        raise remote.ended(tmp_path, 1)


def test_answers_and_requests_of_any_size(act: Callable[..., None], tmp_path: Path) -> None:
    act("return {'echo': request['long'] * 3}")
    with Worker() as worker:
        for times in (10**6, 1, 10**5):
            answer = worker.ask({"seen": str(tmp_path / "seen"), "long": "aé\n" * times})
            assert json.loads(answer) == {"echo": "aé\n" * 3 * times}
    assert worker.status() == 0  # nothing was under way: it ended by itself


def test_a_worker_sleeps_while_it_is_not_asked(act: Callable[..., None], tmp_path: Path) -> None:
    act("return {'cpu': time.process_time()}")
    with Worker() as worker:
        used = [json.loads(worker.ask({"seen": str(tmp_path / "seen")}))["cpu"] for _ in range(3)]
        time.sleep(1)
        after = json.loads(worker.ask({"seen": str(tmp_path / "seen")}))["cpu"]
    assert after - used[-1] < 0.05  # a thread that spins takes the whole second


TELLING = """
from vlmquant import progress
progress.INTERVAL = 0.05
progress.in_terminal = lambda: False
"""


def test_one_of_the_two_tells_how_far_it_is(
    act: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where stderr is no terminal, as in CI: the worker of its load and score, whoever asks of turns."""
    act("(what,) = request; time.sleep(0.6); return {what: {'prompts': [0], 'seconds': 1}}", TELLING)
    source = Path(process.COMMAND[0])
    source.write_text(source.read_text().replace('with open(request["seen"], "w") as file:', "if False:"))
    lines: list[str] = []
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    monkeypatch.setattr(progress, "log", progress.Log(lines.append))
    monkeypatch.setattr(progress, "in_terminal", lambda: False)
    monkeypatch.setattr(remote, "Timing", dict)
    told = []
    with progress.working("eval"), remote.Remote(tmp_path, label="mixed") as model:
        for ask in (lambda: model.load([], Settings()), lambda: model.time_alone(Settings(speed_rounds=1))):
            lines.clear()
            ask()
            told.append(([*lines], capfd.readouterr().err.splitlines()))
    (here, there), (turns_here, turns_there) = told
    assert here == []
    assert len(there) > 2
    assert {line.rpartition(", ")[0] for line in there} == {"mixed: load: at work"}
    assert {line.partition(", ")[0] for line in turns_here} == {"mixed: speed: 0/1", "mixed: speed: 1/1"}
    assert turns_there == []


def test_an_exception_here_ends_the_worker(
    act: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act("time.sleep(600)")
    seen = tmp_path / "seen"

    def interrupted() -> None:
        if seen.exists() and seen.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(process.signals, "check", interrupted)
    with pytest.raises(KeyboardInterrupt), Worker() as worker:
        worker.ask({"seen": str(seen)})
    assert not is_alive(int(seen.read_text()))


OWNER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from vlmquant import signals
from vlmquant.evaluation import process
from vlmquant.scratch import unnamed_file
signals.install()
process.COMMAND = ({script!r},)
with unnamed_file() as path, path.open("r+b") as file:
    file.write(b"x" * 1000)
    with process.Worker([file.fileno()]) as worker:
        if worker.ask({{"seen": {seen!r}}}):
            while not signals.check():
                signals.time.sleep(0.05)
"""


@pytest.fixture
def owner(
    request: pytest.FixtureRequest, act: Callable[..., None], tmp_path: Path
) -> Iterator[tuple["subprocess.Popen[str]", Path, Path]]:
    """A process that waits for a worker; where that notes its pid; and their TMPDIR."""
    before, what = getattr(request, "param", ("", BUSY))
    act(what, before=before)
    seen, place = tmp_path / "seen", tmp_path / "tmp"
    place.mkdir()
    code = OWNER.format(root=ROOT, script=str(tmp_path / "worker.py"), seen=str(seen))
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(place)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield started, seen, place
    if started.poll() is None:
        started.kill()
    started.communicate()


WITHOUT_DEATH_SIGNAL, WITHOUT_PIPE = "worker.end_with_parent = lambda: None", "worker._listen = lambda *_: None"
BUSY, IDLE = "time.sleep(600)", "pass"
"""What the worker does when its owner is ended: it answers, or it has answered and sleeps."""


@pytest.mark.parametrize(
    ("whom", "owner"),
    [
        ("owner", (WITHOUT_DEATH_SIGNAL, BUSY)),
        ("owner", (WITHOUT_DEATH_SIGNAL, IDLE)),
        ("owner", (WITHOUT_PIPE, BUSY)),
        ("worker", ("", BUSY)),
        ("both", ("", BUSY)),
    ],
    indirect=["owner"],
)
def test_nothing_is_left_behind_by_a_kill(whom: str, owner: tuple["subprocess.Popen[str]", Path, Path]) -> None:
    started, seen, place = owner
    worker = written(seen)
    if whom == "both":
        os.killpg(started.pid, signal.SIGKILL)
    else:
        os.kill(worker if whom == "worker" else started.pid, signal.SIGKILL)
    started.wait(60)
    wait_for(lambda: not is_alive(worker))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to_both", [False, True], ids=["owner", "group"])
@pytest.mark.parametrize("owner", [("", BUSY), ("", IDLE)], ids=["busy", "idle"], indirect=True)
def test_a_signal_ends_both_without_a_word(
    number: signal.Signals, to_both: bool, owner: tuple["subprocess.Popen[str]", Path, Path]
) -> None:
    started, seen, place = owner
    worker = written(seen)
    (os.killpg if to_both else os.kill)(started.pid, number)
    output, _ = started.communicate(timeout=60)
    assert (output, started.returncode) == ("", 128 + number)
    wait_for(lambda: not is_alive(worker))
    assert list(place.iterdir()) == []


# The file of log-probabilities


def test_rows_come_back(tmp_path: Path) -> None:
    import torch

    made = LogProbs.create(tmp_path / "lp", {"a": 2, "é": 3}, 5, {"a": {"prompt ids": "3 x"}})
    values = torch.randn(5, 5)
    made.write("é", 1, values[:2])
    made.write("a", 0, values[2:4])
    found = LogProbs.open(tmp_path / "lp")
    assert found == made
    assert torch.equal(found.read("é", 1, 2), values[:2])
    assert torch.equal(found.read("a", 0, 2), values[2:4])
    with scratch.unnamed_file() as path:
        LogProbs.create(path, {"a": 1}, 5).write("a", 0, values[:1])
        assert torch.equal(LogProbs.open(path).read("a", 0, 1), values[:1])


@pytest.mark.parametrize("cut", [0, 5, 30, 100])
def test_a_cut_file_is_an_error_and_no_signal(cut: int, tmp_path: Path) -> None:
    made = LogProbs.create(tmp_path / "lp", {"a": 9}, 7)
    os.truncate(made.path, cut)
    with pytest.raises(InputError, match=r"log-probabilities"):
        LogProbs.open(made.path).read("a", 0, 9)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"need [\d,]+ bytes, [\d,]+ are free .*TMPDIR"):
        LogProbs.create(tmp_path / "lp", {"a": 10**9}, 10**6)
    with pytest.raises(InputError, match="no log-probabilities"):
        LogProbs.open(tmp_path / "none")


# Scratch folders


def test_folders_of_dead_owners_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    user = tmp_path / "vlmquant-notes"
    user.mkdir()
    (user / "photo.jpg").write_text("mine")
    os.symlink(user, tmp_path / "vlmquant-link")
    code = (
        f"import sys, os, tempfile; sys.path.insert(0, {ROOT!r}); tempfile.tempdir = {str(tmp_path)!r}\n"
        "from vlmquant.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'big').write_text('x'); print(folder, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    dead = Path(done.stdout.strip())
    assert (dead / "big").is_file()
    with scratch.scratch_folder() as mine:
        assert not dead.exists()
        scratch.remove_abandoned()
        assert mine.is_dir()
        assert (user / "photo.jpg").read_text() == "mine"
    assert not mine.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vlmquant-link", "vlmquant-notes"]


def test_the_command_names_the_worker() -> None:
    assert re.fullmatch(r"-P -m vlmquant\.evaluation\.worker", " ".join(process.COMMAND))
