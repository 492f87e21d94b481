"""From CUDA C++ source to machine code, at first use: NVRTC, then a cache on disk. Needs no nvcc and no GPU.

One program holds one entry, so that a model compiles the dozen kernels it runs and not the hundreds there are (0.2 s
each where a whole source takes half a minute). A known architecture gets exact machine code (cubin); any newer one
gets PTX for compute_80, which the driver translates.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmquant.cache import CACHE, cache_home, read_trusted, write_private
from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import catalog
from vlmquant.kernels.cuda.catalog import Entry
from vlmquant.notices import LOGGER, warn_once

EXACT_ARCHS = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100",
    (12, 0): "sm_120",
}
"""Compute capability -> NVRTC's architecture. sm_90a runs on 9.0 alone: never gate on "at least"."""
PTX_ARCH = "compute_80"
OLDEST = (8, 0)
"""bfloat16 products and asynchronous copies begin with this capability."""
OPTIONS = ("--std=c++17", "--ptxas-options=-v")
"""-v makes the log say registers, spills and, for wgmma, whether ptxas had to serialize it."""
SERIALIZED = re.compile(r"\bC75\d\d\b|serializ", re.IGNORECASE)
"""ptxas says so when it waits after every wgmma: right results at half the speed."""
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
MAGIC = b"vlmquant-kernel-1\n"
THREADS = 8
"""Programs compiled at once, at most."""


@dataclass(frozen=True)
class Program:
    """What NVRTC gets: one entry, with every header it may include."""

    entry: str
    text: str
    headers: tuple[tuple[str, str], ...]
    arch: str

    @property
    def options(self) -> tuple[str, ...]:
        return (f"--gpu-architecture={self.arch}", *OPTIONS)

    @property
    def binary(self) -> str:
        """cubin or ptx."""
        return "ptx" if self.arch.startswith("compute_") else "cubin"

    def key(self) -> str:
        """A digest of all that the machine code depends on."""
        parts = [self.entry, self.text, *(part for header in self.headers for part in header), *self.options]
        parts.append(".".join(map(str, nvrtc_version())))
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def arch_for(capability: tuple[int, int]) -> str:
    """What to compile for on a GPU of this compute capability: its exact architecture, or PTX_ARCH."""
    if capability < OLDEST:
        raise KernelError(f"compute capability {_dotted(capability)}: the CUDA kernels need {_dotted(OLDEST)} or newer")
    exact = EXACT_ARCHS.get(capability)
    if exact is not None and int(re.sub(r"\D", "", exact)) in nvrtc_archs():
        return exact
    return PTX_ARCH


def program(entry: Entry, arch: str) -> Program:
    """The program that makes one entry."""
    text = catalog.program([entry])
    return Program(entry.name, text, _included(text), arch)


@functools.cache
def _included(text: str) -> tuple[tuple[str, str], ...]:
    """The files of SOURCES that a text includes, and those that they include. Others belong to the CPU emulator."""
    found: dict[str, str] = {}
    todo = INCLUDE.findall(text)
    while todo:
        name = todo.pop()
        if name not in found and (catalog.SOURCES / name).is_file():
            found[name] = _read(name)
            todo += INCLUDE.findall(found[name])
    return tuple(sorted(found.items()))


@functools.cache
def _read(name: str) -> str:
    return (catalog.SOURCES / name).read_text(encoding="utf-8")


def compile_program(wanted: Program) -> tuple[bytes, str]:
    """Machine code (or PTX) of a program, and the compiler's log. KernelError with the log if it does not compile."""
    nvrtc = _nvrtc()
    names = [name.encode() for name, _ in wanted.headers]
    texts = [text.encode() for _, text in wanted.headers]
    handle = _check(
        nvrtc.nvrtcCreateProgram(wanted.text.encode(), f"{wanted.entry}.cu".encode(), len(names), texts, names)
    )
    try:
        options = [option.encode() for option in wanted.options]
        status = nvrtc.nvrtcCompileProgram(handle, len(options), options)[0]
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle).decode(errors="replace")
        log = log.rstrip("\0").strip()
        if int(status) != 0:
            raise KernelError(
                f"{wanted.entry} for {wanted.arch}: NVRTC {_dotted(nvrtc_version())} refuses it: {log or status.name}"
            )
        if wanted.binary == "ptx":
            code = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, handle)
        else:
            code = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    if SERIALIZED.search(log):
        warn_once(f"{wanted.entry} for {wanted.arch}: this NVRTC waits after every wgmma, which is slow: {log}")
    return code, log


def load(entry: Entry, arch: str) -> bytes:
    """Machine code of an entry, from the cache if it is there and whole, else compiled and put there."""
    wanted = program(entry, arch)
    path = cache_path(wanted)
    code = read_cached(path)
    if code is None:
        LOGGER.info("compiling %s for %s", entry.name, arch)
        code, _ = compile_program(wanted)
        write_cached(path, code)
    return code


def load_all(entries: Iterable[Entry], arch: str) -> dict[str, bytes]:
    """`load` of several entries by name, compiled side by side."""
    entries = list(entries)
    if len(entries) < 2:
        return {entry.name: load(entry, arch) for entry in entries}
    with ThreadPoolExecutor(min(THREADS, len(entries), os.cpu_count() or 1)) as pool:
        codes = list(pool.map(lambda entry: load(entry, arch), entries))
    return dict(zip((entry.name for entry in entries), codes, strict=True))


def cache_path(wanted: Program) -> Path:
    return cache_home() / "kernels" / f"{wanted.entry}-{wanted.arch}-{wanted.key()[:32]}.{wanted.binary}"


def read_cached(path: Path) -> bytes | None:
    """What `write_cached` put there; None if it is missing, damaged, or could be another user's."""
    data = read_trusted(path)
    code = None if data is None else _verified(data)
    if data is not None and code is None:
        LOGGER.warning("%s: damaged; it is compiled again", path)
    return code


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is as it was written, by this user."""
    data = read_trusted(path)
    return data is not None and _verified(data) is not None


def _verified(data: bytes) -> bytes | None:
    head = len(MAGIC) + hashlib.sha256().digest_size
    code = data[head:]
    return code if data[:head] == MAGIC + hashlib.sha256(code).digest() else None


def write_cached(path: Path, code: bytes) -> None:
    """Put code into the cache, whole or not at all; without a place to write, go on without a cache."""
    try:
        write_private(path, MAGIC + hashlib.sha256(code).digest() + code)
    except OSError as error:
        warn_once(
            f"{path.parent}: compiled kernels cannot be kept ({error.strerror}); every process compiles them again. "
            f"Set {CACHE} to a folder of yours that can be written to"
        )


def nvrtc_version() -> tuple[int, int]:
    """KernelError if there is no NVRTC."""
    return _compiler()[0]


def nvrtc_archs() -> tuple[int, ...]:
    """The architectures NVRTC can compile for, such as 80 and 90."""
    return _compiler()[1]


@functools.cache
def _compiler() -> tuple[tuple[int, int], tuple[int, ...]]:
    nvrtc = _nvrtc()
    try:
        version = _check(nvrtc.nvrtcVersion())
        archs = _check(nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:  # the bindings' own, when the library cannot be opened
        raise KernelError(f"NVRTC cannot be loaded: {error}; install nvidia-cuda-nvrtc") from error
    return (version[0], version[1]), tuple(archs)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(f"the CUDA kernels need cuda-bindings ({error}); pip install cuda-bindings") from error
    return nvrtc


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call into NVRTC; KernelError names what went wrong."""
    status, *values = result
    if int(status) != 0:
        raise KernelError(f"NVRTC: {status.name}; install a matching nvidia-cuda-nvrtc and cuda-bindings")
    return values[0] if len(values) == 1 else values


def _text(size: Any, read: Any, handle: Any) -> bytes:
    count: int = _check(size(handle))
    # NVRTC writes into the bytes object. It must be ours alone: Python shares those of one byte, such as b" ".
    buffer = bytes(count + 16)
    _check(read(handle, buffer))
    return buffer[:count]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
