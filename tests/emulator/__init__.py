"""Runs our CUDA kernels on the CPU: compiles their sources against emulator.h and launches them on torch tensors.

`load(entries)` gives an `Emulator`; `guarded(tensor)` a copy that ends where memory ends, so that reading or writing
beyond it is an error. Libraries are kept in build/emulator, named by a hash of everything that goes into them. What the
emulator checks is said in emulator.h.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmquant.kernels.cuda.catalog import SOURCES, Entry, program

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "emulator"
FLAGS = ("-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-Wall", "-Werror", "-DVQ_EMULATOR")
NO_COMPILER = "the emulator needs Linux and a C++ compiler (set CXX, or install g++ or clang++)"
MESSAGE_BYTES = 4096
INCLUDE = re.compile(r'#include "(.*?)"')


class EmulatorError(Exception):
    """A launch broke a rule: what, and where."""


class Counters(ctypes.Structure):
    """What the emulator counted in one launch; see emulator.h."""

    _fields_ = [
        (name, ctypes.c_uint64) for name in ("products", "matrix_loads", "bank_conflicts", "stream_loads", "switches")
    ]
    products: int
    matrix_loads: int
    bank_conflicts: int


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
    ]


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("columns", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("row_bytes", ctypes.c_uint64),
        ("box_columns", ctypes.c_uint32),
        ("box_rows", ctypes.c_uint32),
        ("unused", ctypes.c_ubyte * 88),
    ]


@dataclass(frozen=True)
class TensorMap:
    """inputs (tokens, columns) of 16-bit elements, fetched in boxes of 64 columns and `box_rows` tokens."""

    inputs: Tensor
    box_rows: int

    def encoded(self) -> _TensorMap:
        tokens, columns = self.inputs.shape
        return _TensorMap(self.inputs.data_ptr(), columns, tokens, self.inputs.stride(0) * 2, 64, self.box_rows)


@functools.cache
def compiler() -> str | None:
    if sys.platform != "linux":
        return None
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Change:
    """A bug to inject: a text of a file in sources/ is replaced wherever it stands, and must be there."""

    file: str
    old: str
    new: str


def load(entries: Iterable[Entry], change: Change | None = None) -> "Emulator":
    """Compiles kernels of one family."""
    chosen = {entry.name: entry for entry in entries}
    names = sorted(chosen)
    text = '#include "emulator_hopper.h"\n' + program(chosen[name] for name in names)
    text += "".join(f"VQ_EMULATED({name})\n" for name in names)
    sources = {path.name: path.read_text() for path in sorted([*SOURCES.iterdir(), *HERE.glob("*.h")])}
    if change:
        assert change.old in sources[change.file], f"{change.file} does not contain: {change.old}"
        sources[change.file] = sources[change.file].replace(change.old, change.new)
    return Emulator(chosen, _compiled(text, _included(text, sources)))


def _included(text: str, sources: Mapping[str, str]) -> dict[str, str]:
    """Those of the sources that a text includes, directly or not."""
    found: dict[str, str] = {}
    wanted = INCLUDE.findall(text)
    while wanted:
        name = wanted.pop()
        if name in sources and name not in found:
            found[name] = sources[name]
            wanted += INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


def _compiled(text: str, sources: Mapping[str, str]) -> Path:
    cxx = compiler()
    assert cxx is not None, NO_COMPILER
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([text, *sources.values(), *FLAGS, version]).encode()).hexdigest()[:24]
    library = CACHE / f"{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=CACHE, prefix=f"{key}-"))
        for name, source in sources.items():
            (folder / name).write_text(source)
        (folder / "program.cpp").write_text(text)
        made = subprocess.run(
            [cxx, *FLAGS, "-o", "made.so", "program.cpp"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stderr
        (folder / "made.so").replace(library)
        shutil.rmtree(folder)
    return library


class Emulator:
    """Kernels that can be launched."""

    def __init__(self, entries: Mapping[str, Entry], library: Path) -> None:
        self.entries = dict(entries)
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        shared_bytes: int,
        arguments: Mapping[str, Tensor | TensorMap | int | None],
        *,
        seed: int = 0,
    ) -> Counters:
        """Runs a kernel to its end, or raises EmulatorError. Arguments by name: None is a null pointer."""
        entry = self.entries[name]
        assert [*arguments] == [argument for argument, _ in entry.arguments], f"{name} takes {entry.arguments}"
        values = [_value(arguments[argument], kind) for argument, kind in entry.arguments]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        how = _Launch(
            (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))), entry.threads, shared_bytes, seed, entry.cluster
        )
        counters, message = Counters(), ctypes.create_string_buffer(MESSAGE_BYTES)
        function = getattr(self._library, f"emulate_{name}")
        if function(ctypes.byref(how), parameters, ctypes.byref(counters), message, ctypes.c_size_t(MESSAGE_BYTES)):
            raise EmulatorError(message.value.decode())
        return counters


def _value(argument: Tensor | TensorMap | int | None, kind: str) -> ctypes.c_int | ctypes.c_void_p | _TensorMap:
    if kind == "int":
        assert isinstance(argument, int)
        return ctypes.c_int(argument)
    if kind == "tensor_map":
        assert isinstance(argument, TensorMap)
        return argument.encoded()
    assert kind == "pointer"
    assert argument is None or (isinstance(argument, Tensor) and argument.is_contiguous())
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def guarded(tensor: Tensor) -> Tensor:
    """A copy between two pages that nobody may touch; it ends at the second (up to alignment to 16 bytes)."""
    page = mmap.PAGESIZE
    inside = -(-tensor.nbytes // page) * page
    region = mmap.mmap(-1, inside + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    for address in (first, first + page + inside):
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + inside - -(-tensor.nbytes // 16) * 16
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)
