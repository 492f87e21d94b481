"""Loops over CPU tensors, compiled by numba at first use and kept in the cache; `available` says where that can be.

For what torch can only do with one pass over memory per step: a loop of a dozen lines that stays in registers is then
ten times as fast. numba's own threads are not used (they may not be entered from two Python threads at once): rows are
shared out here among as many threads as torch has, which run without Python's lock.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmquant.cache import CACHE, private_folder
from vlmquant.notices import LOGGER, warn_once

SWITCH = "VLMQUANT_COMPILED"
"""Set to 0, no loop is compiled: torch does everything."""
AS_WORDS = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}
"""What numba has no type for reaches a loop as its bits."""
ROWS_AT_LEAST = 8
"""Fewer rows than this are not worth another thread, where a loop does not say otherwise."""

_compiling = threading.Lock()


@functools.cache
def unavailable() -> str | None:
    """Why no loop can be compiled here; None where one can. Found out once, by compiling one."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    try:
        if Loop(_three, rows=0, fastmath=False)() == 3:
            return None
    except Exception as error:  # LLVM and its binding fail in as many ways as there are platforms
        return f"numba does not work here: {type(error).__name__}: {error}".splitlines()[0]
    return "numba gives wrong results here"


def available() -> bool:
    """Whether loops can be compiled here; where not, callers do the same with torch."""
    return unavailable() is None


def compiled(
    *, rows: int = 0, at_least: int = ROWS_AT_LEAST, values_at_least: int = 1, fastmath: bool = False
) -> Callable[[Callable[..., Any]], "Loop"]:
    """A function over arrays, in the Python that numba takes, becomes a `Loop`.

    rows: so many of the first arguments have one row per row of the result, or are None; those may be cut along their
    first axis. at_least: fewer rows than this are not worth another thread, nor are fewer values of the first argument
    than values_at_least.
    fastmath: sums may be made in another order, and no value is infinite or NaN.
    """

    def loop(function: Callable[..., Any]) -> Loop:
        return Loop(function, rows=rows, at_least=at_least, values_at_least=values_at_least, fastmath=fastmath)

    return loop


class Loop:
    """A compiled function. Called with tensors in CPU memory, which it sees as numpy arrays, with those (`array_of`),
    and with plain values."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        rows: int,
        fastmath: bool,
        at_least: int = ROWS_AT_LEAST,
        values_at_least: int = 1,
    ) -> None:
        self._function, self._rows, self._fastmath = function, rows, fastmath
        self._at_least, self._values_at_least = at_least, values_at_least
        self._machine: Any = None
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        values = [array_of(value) for value in arguments]
        machine = self._machine or self._compile()
        if not self._rows:
            return self._run(machine, values)
        count = len(values[0])
        parts = max(1, min(torch.get_num_threads(), count // self._at_least, values[0].size // self._values_at_least))
        if parts == 1:
            return self._run(machine, values)
        step = -(-count // parts)
        cuts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        shares = [
            [*(None if value is None else value[cut] for value in values[: self._rows]), *values[self._rows :]]
            for cut in cuts
        ]
        helpers = [_helper() for _ in shares[1:]]
        for helper, share in zip(helpers, shares[1:], strict=True):
            helper.begin(functools.partial(self._run, machine, share))
        try:
            self._run(machine, shares[0])
        finally:
            errors = [helper.finish() for helper in helpers]
            _free.extend(helpers)
        for error in errors:
            if error is not None:
                raise error
        return None

    def _run(self, machine: Any, values: list[Any]) -> Any:
        """numba reads its cache, or compiles, under a lock of its own, when it first meets arguments of these types."""
        try:
            return machine(*values)
        except Exception as error:  # what is kept is pickled: damaged, it can raise anything, before the loop has begun
            folder = machine.stats.cache_path
            if folder is None:
                raise
            warn_once(f"{folder}: not used ({type(error).__name__}: {error}); delete it")
            self._machine = self._jit(cache=False)
            return self._machine(*values)

    def _compile(self) -> Any:
        with _compiling:
            if self._machine is None:
                self._machine = self._jit(cache=True)
            return self._machine

    def _jit(self, *, cache: bool) -> Any:
        import numba

        options = {"nogil": True, "fastmath": self._fastmath, "error_model": "numpy"}
        if cache:
            kept = numba.config.CACHE_DIR
            try:
                numba.config.CACHE_DIR = str(private_folder("loops"))
                return numba.njit(cache=True, **options)(self._function)
            except (OSError, RuntimeError) as error:
                warn_once(
                    f"compiled loops cannot be kept ({error}); every process compiles them again. "
                    f"Set {CACHE} to a folder of yours that can be written to"
                )
            finally:
                numba.config.CACHE_DIR = kept
        LOGGER.info("%s is compiled without a cache", self._function.__qualname__)
        return numba.njit(**options)(self._function)


def _three() -> int:
    return 3


def array_of(value: Any) -> Any:
    """A tensor in CPU memory as a loop sees it, of the same memory; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad:
        value = value.detach()
    words = AS_WORDS.get(value.dtype)
    return (value if words is None else value.view(words)).numpy()


class _Helper(threading.Thread):
    """A thread that sleeps until it gets a share of rows. Two locks hand it over: a loop takes some ten microseconds,
    and a pool's queue and futures would take longer."""

    def __init__(self) -> None:
        super().__init__(name="vlmquant-rows", daemon=True)
        self._begun, self._done = threading.Lock(), threading.Lock()
        self._begun.acquire()
        self._done.acquire()
        self._work: Callable[[], object] | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        while True:
            self._begun.acquire()
            assert self._work is not None, "a helper wakes for work"
            try:
                self._work()
            except BaseException as error:
                self._error = error
            self._work = None
            self._done.release()

    def begin(self, work: Callable[[], object]) -> None:
        self._work = work
        self._begun.release()

    def finish(self) -> BaseException | None:
        """Wait until the work is done: what it raised."""
        self._done.acquire()
        error, self._error = self._error, None
        return error


_free: list[_Helper] = []
"""Helpers that sleep. Who takes one has it alone, whatever other threads do."""


def _helper() -> _Helper:
    try:
        return _free.pop()
    except IndexError:
        return _Helper()


def _after_fork() -> None:
    """A child has none of its parent's threads, and none that would open a lock."""
    global _compiling
    _compiling = threading.Lock()
    _free.clear()


os.register_at_fork(after_in_child=_after_fork)
