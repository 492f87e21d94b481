"""Runs cases: in a child process, one after the other, under a watchdog. A case is (reader, seed, number), no more.

A finding is whatever a user must not meet: an exception that is not ours; a message that is too long, or that no
terminal can show; more than SECONDS or BYTES; a file written outside the reader's folder, or read where nothing may be
read; another program started, a connection made.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.readers import READERS, Form
from vlmquant.errors import VlmquantError, printable

SECONDS = 8.0
"""Of CPU time for one case."""
WALL_SECONDS = 40.0
"""For a case that waits instead of working; more than CPU time, since machines are shared."""
BYTES = 2 << 30
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the files of the cases lie: in memory, where fsync takes no time."""
CHARACTERS = 5000
"""Of a message."""
STRUCTURE = 0.6
"""Share of cases that change the structure of a document that has one."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: accepted, refused, or (with `where`) a finding."""

    number: int
    kind: str
    where: str = ""
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("accepted", "refused")


@dataclass
class Tally:
    """All cases of a reader."""

    reader: str
    seed: int
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.accepted += outcome.kind == "accepted"
        self.refused += outcome.kind == "refused"
        if outcome.is_finding:
            self.findings.append(outcome)

    def kinds(self) -> dict[tuple[str, str], list[Outcome]]:
        """The findings by kind and place, most frequent first."""
        counts = Counter((one.kind, one.where) for one in self.findings)
        return {key: [one for one in self.findings if (one.kind, one.where) == key] for key, _ in counts.most_common()}


def repeat_command(reader: str, seed: int, number: int) -> str:
    return f"python benchmarks/fuzz.py --reader {reader} --seed {seed} --case {number}"


class Bench:
    """A reader's valid files in a folder, and cases made of them."""

    def __init__(self, reader: str, folder: Path) -> None:
        self.name, self.reader, self.folder = reader, READERS[reader], folder
        forms = self.reader.prepare(folder)
        self.valid = {name: (folder / name).read_bytes() for name in forms}
        self.forms: dict[str, Form | None] = forms
        self.structures = {name: form.load(self.valid[name]) for name, form in forms.items() if form}

    def change(self, seed: int, number: int) -> tuple[str, bytes]:
        """The file that a case changes, and what it holds then."""
        random = Random(f"{self.name} {seed} {number}")
        name = random.choice(sorted(self.valid))
        form, valid = self.forms[name], self.valid[name]
        if form is None or random.random() >= STRUCTURE:
            return name, mutate.change_bytes(valid, random)
        value = mutate.change_structure(mutate.parse(self.structures[name]), random)
        if form.pieces and isinstance(value, list) and random.random() < 0.7:
            value.insert(random.randrange(len(value) + 1), random.choice(form.pieces))
        return name, form.dump(value, valid)

    def run(self, seed: int, number: int) -> Outcome:
        name, content = self.change(seed, number)
        return self.outcome(number, name, content)

    def unfit(self) -> str:
        """What becomes of the valid files, where they are not accepted: cases made of them would show little."""
        found = {name: self.outcome(0, name, content) for name, content in self.valid.items()}
        expected = "refused" if self.reader.refuses else "accepted"
        return "; ".join(f"{name}: {outcome}" for name, outcome in found.items() if outcome.kind != expected)

    def outcome(self, number: int, name: str, content: bytes) -> Outcome:
        file = self.folder / name
        replace(file, content)
        try:
            said = self.reader.read(self.folder, name) or ""
            wrong = (found for line in said.split("\n") if (found := problem(number, line)))
            return next(wrong, Outcome(number, "accepted"))
        except VlmquantError as error:
            return problem(number, str(error)) or Outcome(number, "refused", "", str(error))
        except BaseException as error:
            return Outcome(
                number, type(error).__name__, where(error), "".join(traceback.format_exception(error))[-6000:]
            )
        finally:
            replace(file, self.valid[name])


def replace(file: Path, content: bytes) -> None:
    """As a new file, since the old one may have hard links."""
    with suppress(FileNotFoundError):
        file.unlink()
    file.write_bytes(content)


def problem(number: int, message: str) -> Outcome | None:
    """What is wrong with text that would be printed."""
    if len(message) > CHARACTERS:
        return Outcome(number, "message longer than 5000", "", message[:300])
    shown = printable(message)
    if any(not line.isprintable() for line in shown.split("\n")):
        return Outcome(number, "message with control characters", "", repr(shown[:300]))
    try:
        shown.encode()
    except UnicodeEncodeError:
        return Outcome(number, "message cannot be encoded", "", repr(shown[:300]))
    return None


def where(error: BaseException) -> str:
    """The innermost place in vlmquant that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/vlmquant/" in frame.filename] or frames
    last = ours[-1]
    return f"{last.filename.rpartition('/vlmquant/')[2]}:{last.name}"


# What a case may not touch

_log: int | None = None
_home = ""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
}
CALLS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Note in the log what leads out of the folder; a file, so that children of the child tell as well."""
    if _log is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or path is None:
            return
        if flags & WRITING:
            _note_outside("writes", path)
        elif f"/{mutate.OUTSIDE}/" in (real := os.path.realpath(os.fsdecode(path))) or real == "/etc/passwd":
            os.write(_log, f"reads {real}\n".encode("utf-8", "replace"))
    elif event in CHANGES:
        for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if event != "os.symlink" and isinstance(path, str | bytes | os.PathLike):
                _note_outside(event, path)
    elif event in CALLS:
        os.write(_log, f"{event} {arguments!r:.200}\n".encode("utf-8", "replace"))


def _note_outside(what: str, path: Any) -> None:
    assert _log is not None
    with suppress(ValueError):
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith((_home, "/dev/null", "/proc/self")):
            os.write(_log, f"{what} {real}\n".encode("utf-8", "replace"))


def _serve(reader: str, seed: int, start: int, stop: int, home: Path, pipe: Connection) -> None:
    """The child: prepares a reader and runs cases, telling each before and after."""
    global _log, _home
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    folder = home / reader
    folder.mkdir()
    (home / mutate.OUTSIDE).mkdir(exist_ok=True)
    Path(home, mutate.OUTSIDE, "secret.png").write_bytes(b"secret")
    os.chdir(folder)
    os.environ["TMPDIR"] = str(home)
    tempfile.tempdir = None
    try:
        bench = Bench(reader, folder)
        unfit = bench.unfit()
    except Exception:
        unfit = traceback.format_exc()
    pipe.send(unfit)
    log = os.open(home / "log", os.O_CREAT | os.O_APPEND | os.O_RDWR)
    _home = os.path.realpath(home) + "/"
    sys.addaudithook(_audit)
    before = _peak()
    for number in range(start, stop):
        pipe.send(number)
        os.ftruncate(log, 0)
        _log = log
        outcome = bench.run(seed, number)
        _log = None
        if not outcome.is_finding and (trespass := os.pread(log, 2000, 0).decode("utf-8", "replace")):
            what = trespass.partition(" ")[0]
            if what != "reads" or not bench.reader.looks_outside:
                outcome = Outcome(number, f"{what} outside", "", trespass)
        peak = _peak()
        if peak - before > BYTES:
            pipe.send(Outcome(number, "memory", "", f"{peak - before:,} bytes; {outcome}"))
            return
        pipe.send(outcome)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def campaign(reader: str, *, seed: int, cases: int, start: int = 0) -> Tally:
    """That many cases of a reader from number `start` on."""
    tally, begun = Tally(reader, seed), time.monotonic()
    for outcome in _outcomes(reader, seed, start, start + cases):
        tally.add(outcome)
    tally.seconds = time.monotonic() - begun
    return tally


def _outcomes(reader: str, seed: int, start: int, stop: int) -> Iterator[Outcome]:
    """The child is begun anew after a case that hangs, dies or takes too much."""
    while start < stop:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SCRATCH, ignore_cleanup_errors=True) as home:
            ours, theirs = multiprocessing.Pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside torch's idle threads
                child = multiprocessing.get_context("fork").Process(
                    target=_serve, args=(reader, seed, start, stop, Path(home), theirs), daemon=True
                )
                child.start()
            theirs.close()
            try:
                if not ours.poll(120) or (unfit := ours.recv()):
                    raise RuntimeError(f"{reader}: its valid files are not read: {unfit}")
                while start < stop:
                    try:
                        ours.recv()
                        outcome = _answer(ours, child.pid or 0, start)
                    except EOFError:
                        child.join()
                        if child.exitcode == 1:
                            raise RuntimeError(f"{reader}: case {start} could not be begun") from None
                        outcome = Outcome(start, f"process ended ({child.exitcode})")
                    yield outcome
                    start += 1
                    if outcome.kind in ("hang", "memory") or outcome.kind.startswith("process ended"):
                        break
            finally:
                child.kill()
                child.join()
                ours.close()


def _answer(pipe: Connection, child: int, number: int) -> Outcome:
    """The outcome of a case that has begun; a hang where it takes too long."""
    begun, cpu = time.monotonic(), _cpu_seconds(child)
    while not pipe.poll(1.0):
        if _cpu_seconds(child) - cpu > SECONDS or time.monotonic() - begun > WALL_SECONDS:
            return Outcome(number, "hang")
    outcome: Outcome = pipe.recv()
    return outcome


def _cpu_seconds(process: int) -> float:
    """Of a process and its children."""
    total = 0.0
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += _cpu_seconds(int(child))
    return total
