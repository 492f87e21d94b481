"""Limits on what strangers' files make us do. Times are not asserted; only that an endless thing ends."""

import os
import signal
import time
from pathlib import Path

import pytest

from vlmquant.limits import Confined, OverLimitError, is_allocation_failure, limited

MIB = 2**20


def count(limit: int) -> int:
    number = 0
    while number != limit:
        number += 1
    return number


def act(what: str) -> str:
    if what == "loop":
        count(-1)
    if what == "power":
        return str(10 ** (10**9) > 0)  # one call into C that no handler interrupts
    if what == "memory":
        return "a" * 10**10
    if what == "raise":
        raise KeyError("mine")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return what * 2


def test_python_code_that_never_ends() -> None:
    with pytest.raises(OverLimitError, match=r"more than 0\.3 s"), limited(seconds=0.3, more_bytes=512 * MIB):
        count(-1)
    assert count(10**6) == 10**6  # and no alarm comes later


def test_memory_in_this_process() -> None:
    with pytest.raises(OverLimitError, match="more than 256 MiB"), limited(seconds=30, more_bytes=256 * MIB):
        bytearray(2**32)
    assert len(bytearray(2**29)) == 2**29  # the limit is gone


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), limited(seconds=30, more_bytes=256 * MIB):
        _ = 1 // 0


def test_confined() -> None:
    confined = Confined(act, seconds=2, more_bytes=256 * MIB)
    assert confined("ab") == "abab"
    child = confined._child
    assert confined("cd") == "cdcd"
    assert confined._child == child
    for what in ("loop", "power"):
        with pytest.raises(OverLimitError, match="more than 2 s"):
            confined(what)
    for what in ("memory", "die"):
        with pytest.raises(OverLimitError, match="256 MiB"):
            confined(what)
    with pytest.raises(KeyError, match="mine"):
        confined("raise")
    assert confined("ef") == "efef"
    confined.close()


def test_the_child_ends_with_its_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        confined = Confined(act, seconds=60, more_bytes=256 * MIB)
        confined("a")
        os.write(write, str(confined._child).encode())
        time.sleep(60)
        os._exit(0)
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_words_of_a_full_memory() -> None:
    assert is_allocation_failure(MemoryError())
    assert is_allocation_failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_allocation_failure(RuntimeError("shapes differ"))
