"""Kills, signals and full disks at random moments of real runs on the bundled model.

    python benchmarks/faults.py [kills] [spills] [signals] [disk] [memory] [--kills 50] [--signals 200] [--memories 20]

kills     SIGKILL at a random time of `vlmquant quantize`, some several in a row, with and without an older output to
          replace; then `--resume` until it is done: every file as in an uninterrupted run, nothing left beside it,
          and the older output as it was until it is replaced
spills    the same of runs that keep what waits between blocks on disk
signals   SIGINT, SIGTERM and SIGHUP from the first millisecond on, also of `vlmquant eval`: the exit code says the
          signal (0 only where the last line had been printed before), no traceback, no process and no temporary file
          left, resume exact
disk      limits on the size of a file, places that cannot be written to, a full stdout: one line, nothing half done
memory    limits on the address space: it works or exits with 6, and a run with more of it goes on to the same bytes,
          or to those of single samples, if blocks were done so, and then it says so

Prints a table and writes results/faults.json and faults.md.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenance import provenance

from vlmquant.checkpoint import verify_checkpoint
from vlmquant.checkpoint.manifest import MANIFEST_NAME, SEAL
from vlmquant.demo import calibration_set_dir, model_dir, test_set_dir

RESULTS = Path(__file__).parent / "results"
ENTRY = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]["vlmquant"]
SCRIPT = "import sys; from {} import {}; sys.argv[0] = 'vlmquant'; sys.exit({}())".format(
    *ENTRY.split(":"), ENTRY.partition(":")[2]
)
"""What the installed script does."""
SPILLING = "import vlmquant.budget as budget; budget.WAYS = budget.WAYS[-1:]; "
"""What has its calibration passes run as if there were memory for no other way."""
RECIPE = "mixed"
OLDER_RECIPE = "rtn-w4"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EARLY_SECONDS = 1.5
"""Half of the signals come in this time from the start, while modules are imported."""
PATIENCE_SECONDS = 120.0
LAST_LINE = "written in"
"""Stands in the last line that `quantize` prints."""
ADDRESS_SPACE = (500 * 2**20, 1900 * 2**20)
"""From what does for no import of torch to what does for the whole run."""


@dataclass
class Table:
    """What was tried, and what went wrong."""

    tried: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)


@dataclass
class Run:
    """A started command, in a session of its own, its output in files."""

    process: subprocess.Popen[bytes]
    home: Path

    @property
    def out(self) -> str:
        return (self.home / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.home / "stderr").read_text(errors="replace")

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


def start(home: Path, *words: object, setup: Callable[[], None] | None = None, before: str = "") -> Run:
    home.mkdir(parents=True, exist_ok=True)
    (home / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(home / "tmp"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", before + SCRIPT, *map(str, words)],
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=setup,
        )
    return Run(process, home)


def quantize(home: Path, recipe: str, *options: str, setup: Callable[[], None] | None = None, before: str = "") -> Run:
    calibration = ("--calibration", calibration_set_dir()) if recipe == RECIPE else ()
    words = (
        "quantize",
        model_dir(),
        "-r",
        recipe,
        *calibration,
        "-o",
        home / "place" / "out",
        "--threads",
        "1",
        *options,
    )
    (home / "place").mkdir(parents=True, exist_ok=True)
    return start(home, *words, setup=setup, before=before)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path, but for what a run took; empty where there is no such folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(content_of(file)).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def content_of(file: Path) -> bytes:
    """Of a manifest without seconds and memory, and without the seal, which is over them too."""
    if file.name != MANIFEST_NAME:
        return file.read_bytes()
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("work", SEAL)}
    return json.dumps(kept).encode()


def leftovers(home: Path) -> list[str]:
    """What lies beside the output, and what is left of temporary files."""
    return [path.name for path in (home / "place").iterdir() if path.name != "out"] + temporaries(home)


def temporaries(home: Path) -> list[str]:
    """What a command left of temporary files; torch makes an empty folder of its own there and leaves it."""
    return [path.name for path in (home / "tmp").iterdir() if not path.name.startswith("torchinductor_")]


def processes_of(session: int) -> list[int]:
    """Those of a session that are there and no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(session: int, *, seconds: float = 5.0) -> bool:
    """Whether all processes of a session end by themselves in time; those that do not are killed."""
    end = time.monotonic() + seconds
    while processes_of(session):
        if time.monotonic() > end:
            for process in processes_of(session):
                os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


@dataclass
class Expected:
    """Uninterrupted runs."""

    new: dict[str, str]
    older: Path
    seconds: float

    @classmethod
    def make(cls, home: Path, before: str = "") -> "Expected":
        begun = time.monotonic()
        run = quantize(home / "new", RECIPE, before=before)
        if run.wait():
            sys.exit(f"an undisturbed run failed: {run.err}")
        seconds = time.monotonic() - begun
        older = quantize(home / "older", OLDER_RECIPE)
        if older.wait():
            sys.exit(f"an undisturbed run failed: {older.err}")
        print(f"an undisturbed run takes {seconds:.1f} s", flush=True)
        return cls(digests(home / "new" / "place" / "out"), home / "older" / "place" / "out", seconds)


def finish(table: Table, home: Path, expected: Expected, options: tuple[str, ...], what: str, before: str = "") -> None:
    """Resume until it is done, and look at what is there then."""
    out = home / "place" / "out"
    if digests(out) != expected.new:
        run = quantize(home, RECIPE, "--resume", *options, before=before)
        code = run.wait()
        table.check(code == 0, f"{what}: --resume ended with {code}: {run.err[-500:]}")
    table.check(digests(out) == expected.new, f"{what}: the output differs from that of an undisturbed run")
    table.check(not (left := leftovers(home)), f"{what}: left behind {left}")


def kills(home: Path, expected: Expected, count: int, dice: random.Random, before: str = "") -> Table:
    table = Table()
    for number in range(count):
        place, out = home / f"kill{number}", home / f"kill{number}" / "place" / "out"
        replacing, row = number % 2 == 1, 3 if number % 5 == 4 else 1
        options: tuple[str, ...] = ()
        older: dict[str, str] = {}
        if replacing:
            shutil.copytree(expected.older, out)
            options, older = ("--force",), digests(out)
        for attempt in range(row):
            after = dice.uniform(0, expected.seconds)
            what = f"kill {number}.{attempt} after {after:.2f} s{' replacing' if replacing else ''}"
            run = quantize(place, RECIPE, *(("--resume",) if attempt else ()), *options, before=before)
            time.sleep(after)
            run.process.kill()
            run.wait()
            table.tried["killed" if run.process.returncode == -signal.SIGKILL else "had ended before"] += 1
            found = digests(out)
            table.check(
                found in (older, expected.new), f"{what}: the output is neither the older nor the new one, nor none"
            )
            table.check(gone(run.process.pid), f"{what}: left a process running")
        finish(table, place, expected, options, f"kills {number}", before)
        if before:
            passes = json.loads((out / MANIFEST_NAME).read_text())["work"]["passes"]
            table.check(passes.endswith("on disk"), f"kills {number}: {passes}")
        table.tried["outputs compared"] += 1
        shutil.rmtree(place)
    return table


def told(code: int, number: int) -> bool:
    return code in (128 + number, -number)


def signals(home: Path, expected: Expected, count: int, dice: random.Random) -> Table:
    table = Table()
    for number in range(count):
        which = SIGNALS[number % len(SIGNALS)]
        evaluating = number % 5 == 3
        place = home / f"signal{number}"
        if evaluating:
            begun = start(
                place,
                *(
                    "eval",
                    expected.older,
                    "--reference",
                    model_dir(),
                    "--data",
                    test_set_dir(),
                    "-o",
                    place / "report.json",
                ),
                *("--limit", 4, "--threads", 1),
            )
            seconds, last = 2 * expected.seconds, "wrote "
            (place / "place").mkdir()
        else:
            begun = quantize(place, RECIPE)
            seconds, last = expected.seconds, LAST_LINE
        after = dice.uniform(0, EARLY_SECONDS if number % 2 else seconds)
        what = f"{which.name} {number} after {after:.3f} s of {'eval' if evaluating else 'quantize'}"
        time.sleep(after)
        printed = last in begun.out
        if begun.process.poll() is None:
            begun.process.send_signal(which)
        else:
            printed = True
        code = begun.wait()
        # Before it reads a line of ours, Python tells of a SIGINT in its own words.
        unborn = which == signal.SIGINT and "Traceback" in begun.err and "vlmquant/" not in begun.err
        outcome = "while Python started" if unborn else "told" if told(code, which) else f"ended with {code}"
        table.tried[f"{which.name} {'had ended before' if code == 0 and printed else outcome}"] += 1
        good = told(code, which) or (code == 0 and printed) or unborn
        table.check(good, f"{what}: ended with {code}; {begun.err[-300:]}")
        table.check("Traceback" not in begun.err or unborn, f"{what}: traceback: {begun.err[-1500:]}")
        table.check(gone(begun.process.pid), f"{what}: left a process running")
        table.check(not (left := temporaries(place)), f"{what}: left temporary files {left}")
        if not evaluating:
            out = place / "place" / "out"
            table.check(digests(out) in ({}, expected.new), f"{what}: left half an output")
            if (place / "place" / "out.partial").exists() or number % 10 == 0:
                finish(table, place, expected, (), what)
                table.tried["outputs compared"] += 1
        shutil.rmtree(place)
    return table


def disk(home: Path, expected: Expected, dice: random.Random) -> Table:
    table = Table()

    def limit(size: int) -> Callable[[], None]:
        def set_limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return set_limit

    for number, size in enumerate((1000, 30_000, 100_000, 300_000, 600_000, dice.randrange(1000, 600_000))):
        place = home / f"limit{number}"
        run = quantize(place, RECIPE, setup=limit(size))
        code = run.wait()
        what = f"files of at most {size} bytes"
        table.tried[f"file size limit: exit {code}"] += 1
        table.check(code in (1, 6) and "Traceback" not in run.err, f"{what}: exit {code}: {run.err[-500:]}")
        table.check(not (place / "place" / "out").exists(), f"{what}: promoted an output")
        table.check(not list(place.rglob("*.tmp")), f"{what}: left a .tmp file")
        finish(table, place, expected, (), what)
        shutil.rmtree(place)
    report = home / "report" / "report.json"
    made = start(
        home / "report",
        *("eval", expected.older, "--reference", model_dir(), "--data", test_set_dir(), "-o", report, "--limit", 4),
    )
    table.check(made.wait() == 0, f"eval failed: {made.err[-500:]}")
    for words in (
        ("quantize", model_dir(), "-r", OLDER_RECIPE, "-o", "/proc/vlmquant/out"),
        ("gate", report, "--junit", "/proc/vlmquant.xml"),
        ("gate", report, "--junit", "/dev/full"),
    ):
        run = start(home / "places", *words)
        code = run.wait()
        table.tried[f"{words[0]} to {words[-1]}: exit {code}"] += 1
        table.check(code in (1, 2, 6) and "Traceback" not in run.err, f"{words}: exit {code}: {run.err[-500:]}")
    table.check(Path("/dev/full").is_char_device(), "/dev/full is no device any more")
    for words in (("gate", report), ("verify", expected.older), ("plan", model_dir(), "-r", RECIPE), ("doctor",)):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, *map(str, words)], stdout=full, stderr=subprocess.PIPE, check=False
            )
        table.tried[f"{words[0]} with stdout full: exit {done.returncode}"] += 1
        table.check(
            done.returncode not in (0, -signal.SIGBUS) and b"Traceback" not in done.stderr,
            f"{words} with stdout full: exit {done.returncode}: {done.stderr[-500:].decode(errors='replace')}",
        )
    return table


def memory(home: Path, expected: Expected, count: int, dice: random.Random) -> Table:
    table = Table()
    for number in range(count):
        size = dice.randrange(*ADDRESS_SPACE)
        place = home / f"memory{number}"
        run = quantize(place, RECIPE, setup=lambda size=size: resource.setrlimit(resource.RLIMIT_AS, (size, size)))
        code = run.wait()
        what = f"{size / 2**20:.0f} MiB of address space"
        table.tried[f"exit {code}"] += 1
        table.check(code in (0, 6) and "Traceback" not in run.err, f"{what}: exit {code}: {run.err[-500:]}")
        out = place / "place" / "out"
        table.check(code == 0 or not out.exists(), f"{what}: promoted an output")
        if code != 0:
            resumed = quantize(place, RECIPE, "--resume")
            table.check(resumed.wait() == 0, f"{what}: --resume: {resumed.err[-500:]}")
        manifest = json.loads((out / MANIFEST_NAME).read_text())
        if digests(out) == expected.new:
            table.tried["outputs as undisturbed"] += 1
        else:  # the second, smaller try adds up in another order, and says so
            table.tried["outputs from single samples"] += 1
            said = any("one sample at a time" in note for note in manifest["notes"])
            table.check(said and manifest["settings"]["batch_size"] == 1, f"{what}: differs without a word")
            table.check(verify_checkpoint(out) == [], f"{what}: does not verify")
        table.check(not (left := leftovers(place)), f"{what}: left behind {left}")
        shutil.rmtree(place)
    return table


def versions(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in row["versions"].items())


def save(results: dict[str, Any]) -> None:
    (RESULTS / "faults.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["# Kills, signals and full disks", "", "`python benchmarks/faults.py`, on the bundled model.", ""]
    lines += ["| campaign | what happened | times | wrong |", "|---|---|---:|---:|"]
    for name, row in results.items():
        for number, (what, times) in enumerate(sorted(row["tried"].items())):
            lines.append(f"| {'' if number else name} | {what} | {times} | {'' if number else len(row['wrong'])} |")
    lines += ["", *(f"{name}: `{row['command']}`, {row['date']}; {versions(row)}." for name, row in results.items())]
    (RESULTS / "faults.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "campaigns", nargs="*", choices=["kills", "spills", "signals", "disk", "memory", []], default=[]
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--memories", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for number in SIGNALS:  # in a script's background they come ignored, and what we start would inherit that
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    saved = RESULTS / "faults.json"
    results = json.loads(saved.read_text()) if saved.is_file() else {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="vlmquant-faults-") as folder:
        home = Path(folder)
        expected = Expected.make(home / "expected")
        for name in options.campaigns or ("kills", "spills", "signals", "disk", "memory"):
            dice = random.Random(f"{name} {options.seed}")
            if name in ("kills", "spills"):
                undisturbed = Expected.make(home / "spilled", SPILLING) if name == "spills" else expected
                table = kills(home, undisturbed, options.kills, dice, SPILLING if name == "spills" else "")
                same = undisturbed.new | {MANIFEST_NAME: ""} == expected.new | {MANIFEST_NAME: ""}
                table.check(same, "another way of the passes gives other files")  # a manifest says which way
            elif name == "signals":
                table = signals(home, expected, options.signals, dice)
            elif name == "memory":
                table = memory(home, expected, options.memories, dice)
            else:
                table = disk(home, expected, dice)
            for what, times in sorted(table.tried.items()):
                print(f"{name}: {what}: {times}")
            print(f"{name}: {len(table.wrong)} wrong", flush=True)
            results[name] = {**provenance(), "seed": options.seed, "tried": dict(table.tried), "wrong": table.wrong}
            failed = failed or bool(table.wrong)
            save(results)
    sys.exit(failed)


if __name__ == "__main__":
    main()
