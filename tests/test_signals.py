"""No signal is lost: whoever swallows its exception, wherever it comes, the process says it in the end."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmquant.demo import calibration_set_dir, model_dir

ENTRY = "import sys\nfrom vlmquant.__main__ import main\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(program: str, *, entry: str = "from vlmquant import signals; signals.install()") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a small program in a process of its own."""
    text = f"import os, signal, sys, time\n{entry}\n{program}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


def in_place_of_the_command(body: str) -> tuple[int, str, str]:
    """The entry point, with a function in place of the command line's main."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    program = (
        f"from vlmquant import __main__, cli, signals\ndef command():\n{indented}cli.main = command\n__main__.main()"
    )
    return run(program, entry="me = os.getpid()")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_obeyed_at_the_next_check(number: int) -> None:
    code, out, err = run(
        f"os.kill(os.getpid(), {number}); print('noted', signals.received(), flush=True)\nsignals.check(); print('on')"
    )
    assert (code, out, err) == (128 + number, f"noted {int(number)}\n", "")


def test_an_ignored_signal_stays_ignored() -> None:
    entry = "signal.signal(signal.SIGHUP, signal.SIG_IGN); from vlmquant import signals; signals.install()"
    program = "os.kill(os.getpid(), signal.SIGHUP); signals.check(); print(signals.received())"
    assert run(program, entry=entry) == (0, "None\n", "")


def test_without_a_check_it_is_obeyed_on_the_spot() -> None:
    code, out, err = run("os.kill(os.getpid(), signal.SIGTERM)\nwhile True: time.sleep(0.05)")
    assert (code, out, err) == (143, "", "")


def test_an_import_is_ended_without_an_exception(tmp_path: Path) -> None:
    """C code that calls Python while a module loads may have no way out for an exception: ctypes tells and drops it."""
    tmp_path.joinpath("slow.py").write_text(
        "import ctypes, os, signal, time\n"
        "def wait():\n    os.kill(os.getpid(), signal.SIGTERM)\n    for _ in range(100): time.sleep(0.05)\n"
        "ctypes.CFUNCTYPE(None)(wait)()\n"
    )
    assert run(f"sys.path.insert(0, {str(tmp_path)!r})\nimport slow\nprint('on')") == (143, "", "")


def test_a_second_signal_is_obeyed_at_once() -> None:
    program = "signals.PATIENCE = 30\nfor _ in range(2): os.kill(os.getpid(), signal.SIGINT)\nprint('still here')"
    assert run(program) == (130, "", "")


def test_a_swallowed_exception_is_raised_again() -> None:
    """As C code does that clears errors while it imports."""
    program = (
        "os.kill(os.getpid(), signal.SIGTERM)\nlost = 0\nwhile True:\n"
        "    try:\n        signals.check()\n    except BaseException:\n        lost += 1\n"
        "        if lost == 3: print(lost, flush=True); os._exit(0)\n"
    )
    assert run(program) == (0, "3\n", "")


def test_cleaning_up_is_not_interrupted() -> None:
    """Twice as long as the patience, with the user asking again in the middle of it."""
    program = (
        "signals.PATIENCE = 0.1\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
        "finally:\n    time.sleep(0.2); os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); signals.check()\n"
        "    print('cleaned')\n"
    )
    assert run(program) == (130, "cleaned\n", "")


def test_what_is_held_is_done_as_a_whole() -> None:
    program = (
        "signals.PATIENCE = 0.05\nwith signals.held():\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3)\n"
        "    print('whole', flush=True)\ntime.sleep(5)\nprint('never')"
    )
    assert run(program) == (130, "whole\n", "")


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(me, signal.SIGTERM)",
        "os.kill(me, signal.SIGTERM); sys.exit(0)",
        "os.kill(me, signal.SIGTERM); raise ImportError('half a module')",
        "try:\n    os.kill(me, signal.SIGTERM); signals.check()\nexcept BaseException: print('lost')",
    ],
    ids=["returns", "ends well", "fails", "swallowed"],
)
def test_the_exit_code_says_the_signal_whatever_became_of_it(body: str) -> None:
    code, _, err = in_place_of_the_command(body)
    assert (code, err) == (143, "")


def test_without_a_signal_an_error_of_ours_keeps_its_traceback() -> None:
    code, _, err = in_place_of_the_command("raise KeyError('a bug')")
    assert code == 1
    assert "KeyError: 'a bug'" in err


def test_at_the_interpreters_own_end_signals_are_the_systems() -> None:
    body = "import atexit; atexit.register(lambda: (os.kill(me, signal.SIGTERM), time.sleep(9)))"
    assert in_place_of_the_command(body) == (-signal.SIGTERM, "", "")


def test_the_entry_point_imports_nothing_that_takes_time() -> None:
    code, out, _ = run("import vlmquant.__main__; print(*sys.modules)", entry="")
    slow = {"typing", "json", "dataclasses", "pathlib", "typer", "rich", "pydantic", "torch", "numpy", "transformers"}
    assert code == 0
    assert slow & set(out.split()) <= preloaded()


def preloaded() -> set[str]:
    """What an interpreter of this installation imports by itself."""
    return set(run("print(*sys.modules)", entry="")[1].split())


@pytest.mark.parametrize("attempt", range(4))
def test_signals_at_random_times_end_a_real_run(attempt: int, tmp_path: Path) -> None:
    """From the first moment after the handlers are there, through imports and calibration."""
    chance = random.Random(attempt)
    number, delay = SIGNALS[attempt % 3], chance.uniform(0.05, 1.0) ** 2 * 5
    words = ("quantize", model_dir(), "-r", "mixed", "--calibration", calibration_set_dir(), "-o", tmp_path / "out")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "out.txt").open("wb") as out, (tmp_path / "err.txt").open("wb") as err:
        command = [sys.executable, "-m", "vlmquant", *map(str, words)]
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        time.sleep(0.1 + delay)
        process.send_signal(number)
        code = process.wait(60)
    errors = (tmp_path / "err.txt").read_text()
    if code == 0:
        assert "written in" in (tmp_path / "out.txt").read_text()
    else:
        assert code in (128 + number, -number), errors
    assert "Traceback" not in errors or code == -signal.SIGINT
