"""Progress where stderr is no terminal: plain lines, at least every 30 seconds, with what is done and what is left."""

import subprocess
import sys
import time

import pytest

from vlmquant import notices, progress
from vlmquant.progress import INTERVAL, Log, bar, duration, working


class Clock:
    """Told what time it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> list[str]:
    return []


def test_a_line_at_least_every_interval_with_done_total_and_eta(lines: list[str]) -> None:
    clock = Clock()
    log = Log(lines.append, clock)
    task = log.begin("quantize", 24)
    for _ in range(600):  # ten minutes, a step every 60 seconds, looked at each second
        clock.now += 1
        if (clock.now - 1000) % 60 == 0:
            task.done += 1
        log.tick()
    assert lines[0] == "quantize: 0/24, 30 s\n"
    assert lines[1] == "quantize: 1/24, 1 min, about 23 min left\n"
    assert lines[-1] == "quantize: 10/24, 10 min, about 14 min left\n"
    assert len(lines) == 600 / INTERVAL


def test_what_is_inside_speaks_and_the_end_is_told(lines: list[str]) -> None:
    clock = Clock()
    log = Log(lines.append, clock)
    outer = log.begin("eval")
    inner = log.begin("generate", 2)
    clock.now += 31
    log.tick()
    inner.done = 2
    log.end(inner, tell=True)
    clock.now += 29
    assert log.tick() == pytest.approx(1)
    clock.now += 1
    log.tick()
    log.end(outer, tell=False)
    clock.now += 100
    log.tick()
    assert lines == ["generate: 0/2, 31 s\n", "generate: 2/2, 31 s\n", "eval: at work, 1 min 1 s\n"]


def test_silent_while_another_process_tells(lines: list[str]) -> None:
    clock = Clock()
    log = Log(lines.append, clock)
    log.begin("eval")
    with log.silent():
        clock.now += 100
        assert log.tick() > 0
    clock.now += 29
    assert log.tick() == pytest.approx(1)
    assert lines == []
    clock.now += 1
    log.tick()
    assert lines == ["eval: at work, 2 min 10 s\n"]


def test_lines_say_what_the_process_is_for(quick: None, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_subject", "")
    progress.speak_of("mixed")
    with bar("generate", 1) as moved:
        moved.step()
    with bar("quantize", 1) as moved:
        moved.step("quantize vision")
    assert lines == ["mixed: generate: 1/1, 0 s\n", "mixed: quantize vision: 1/1, 0 s\n"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (130, "2 min 10 s"), (900, "15 min"), (3600, "1 h"), (12000, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    monkeypatch.setattr(progress, "log", Log(lines.append))
    monkeypatch.setattr(progress, "in_terminal", lambda: False)


def test_lines_come_while_one_step_takes_long(quick: None, lines: list[str]) -> None:
    with working("eval"), bar("score", 2) as moved:
        moved.step()
        before, until = len(lines), time.monotonic() + 20
        while len(lines) < before + 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(lines) >= before + 3
    assert all(line.startswith("score: 1/2, ") for line in lines[before:])


def test_quiet_is_quiet(quick: None, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notices.QUIET, "1")
    with working("eval"), bar("score", 1) as moved:
        moved.step()
        time.sleep(0.2)
    assert lines == []


def test_no_control_codes_where_there_is_no_terminal() -> None:
    """Even where FORCE_COLOR says that logs show colours, as CI systems do."""
    program = "from vlmquant.progress import bar\nwith bar('work', 3) as b:\n    for _ in range(3): b.step('more')"
    environment = {"FORCE_COLOR": "1", "PATH": "/usr/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == "more: 3/3, 0 s\n"
    assert done.stdout == ""
