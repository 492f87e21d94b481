"""A CUDA driver that starts nothing, and takes apart what it is given by the catalog; no GPU is asked for anything."""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import emulator
from vlmquant.kernels.cuda import build, launch
from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.kernels.cuda.dispatch import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 227 << 10)
A100 = Gpu("NVIDIA A100", "sm_80", 108, 163 << 10)
HOPPER = Gpu("a small Hopper", "sm_90a", 4, 227 << 10)
AMPERE = Gpu("a small Ampere", "sm_80", 4, 163 << 10)
"""Small ones, for the emulator."""
STREAM = 0x5EED
STATIC_SHARED = 64
"""Bytes of shared memory that the fake says every kernel has besides what a launch asks for."""


@dataclass
class Started:
    """One launch, as the driver saw it."""

    entry: str
    block: int
    """Address of the argument block."""
    values: dict[str, Any]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    stream: int
    dependent: bool


def encoded(described: dict[str, Any]) -> bytes:
    """A tensor map as the CPU emulator reads it."""
    (columns, rows), (row_bytes,) = described["sizes"], described["strides"]
    return struct.pack("=QQQQII88x", described["address"], columns, rows, row_bytes, *described["box"])


@dataclass
class FakeDriver:
    """The calls that launch.py makes. `run` may compute what the kernel would have."""

    run: Callable[[Started], None] | None = None
    started: list[Started] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    shared_limits: dict[str, int] = field(default_factory=dict)
    contexts: list[str] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    """Statuses that the next calls of a function return instead of 0."""

    def __post_init__(self) -> None:
        from cuda.bindings import driver

        self.real = driver

    def __getattr__(self, name: str) -> Any:
        """Structs and enums are the real ones."""
        return getattr(self.real, name)

    def _status(self, name: str) -> Any:
        waiting = self.failures.get(name)
        return self.real.CUresult(waiting.pop(0) if waiting else 0)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, str]:
        return self._status("cuDevicePrimaryCtxRetain"), f"context {device}"

    def cuCtxSetCurrent(self, context: str) -> tuple[Any]:
        self.contexts.append(context)
        return (self._status("cuCtxSetCurrent"),)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, bytes]:
        self.loaded.append(image)
        return self._status("cuModuleLoadData"), image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, str]:
        assert module == b"code of " + name
        return self._status("cuModuleGetFunction"), name.decode()

    def cuFuncGetAttribute(self, attribute: Any, function: str) -> tuple[Any, int]:
        assert attribute == self.real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        return self._status("cuFuncGetAttribute"), STATIC_SHARED

    def cuFuncSetAttribute(self, function: str, attribute: Any, value: int) -> tuple[Any]:
        assert attribute == self.real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.shared_limits[function] = value
        return (self._status("cuFuncSetAttribute"),)

    def cuTensorMapEncodeTiled(self, kind: Any, rank: int, address: int, *rest: Any) -> tuple[Any, Any]:
        sizes, strides, box, steps, interleave, swizzle, promotion, fill = rest
        self.maps.append(
            {
                "kind": kind.name,
                "rank": rank,
                "address": address,
                "sizes": [int(size) for size in sizes],
                "strides": [int(stride) for stride in strides],
                "box": [int(side) for side in box],
                "steps": [int(step) for step in steps],
                "modes": (interleave.name, swizzle.name, promotion.name, fill.name),
            }
        )
        words = ctypes.create_string_buffer(encoded(self.maps[-1]), launch.TENSOR_MAP_BYTES)
        self.kept = words
        return self._status("cuTensorMapEncodeTiled"), SimpleNamespace(getPtr=lambda: ctypes.addressof(words))

    def cuLaunchKernelEx(self, config: Any, function: str, block: int, extra: int) -> tuple[Any]:
        status = self._status("cuLaunchKernelEx")
        if int(status) == 0:
            arguments = ENTRIES[function].arguments
            addresses = (ctypes.c_void_p * len(arguments)).from_address(block)
            values = {}
            for (name, kind), address in zip(arguments, addresses, strict=True):
                if kind == "tensor_map":
                    values[name] = ctypes.string_at(address, launch.TENSOR_MAP_BYTES)
                else:
                    cell = ctypes.c_uint64 if kind == "pointer" else ctypes.c_int32
                    values[name] = cell.from_address(address).value
            dependent = any(
                attribute.id.name == "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
                and attribute.value.programmaticStreamSerializationAllowed == 1
                for attribute in config.attrs or []
            )
            assert config.numAttrs == len(config.attrs or [])
            started = Started(
                function,
                block,
                values,
                (config.gridDimX, config.gridDimY, config.gridDimZ),
                (config.blockDimX, config.blockDimY, config.blockDimZ),
                config.sharedMemBytes,
                int(config.hStream),
                dependent,
            )
            self.started.append(started)
            if self.run is not None:
                self.run(started)
        return (status,)


def install(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, **options: Any) -> tuple[FakeDriver, launch.Device]:
    """The fake in place of the driver, and a Device of this GPU whose memory is the CPU's."""
    fake = FakeDriver(**options)
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    monkeypatch.setattr(launch, "_gpu", lambda index: gpu)
    monkeypatch.setattr(launch, "WORKSPACE_FLOATS", 1 << 20)
    monkeypatch.setattr(
        build, "load_all", lambda entries, arch: {e.name: b"code of " + e.name.encode() for e in entries}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
    device = launch.Device(0)
    device.place = torch.device("cpu")
    return fake, device


def emulate(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> tuple[FakeDriver, launch.Device]:
    """The fake driver, with the emulator behind it; what is launched runs at once, on the very argument block."""

    def run(started: Started) -> None:
        entry = ENTRIES[started.entry]
        library, grid = emulator.load([entry])._library, (ctypes.c_uint32 * 3)(*started.grid)
        how = emulator._Launch(grid, started.threads[0], started.shared_bytes, 0, entry.cluster)
        counters, message = emulator.Counters(), ctypes.create_string_buffer(emulator.MESSAGE_BYTES)
        function = getattr(library, f"emulate_{started.entry}")
        size = ctypes.c_size_t(emulator.MESSAGE_BYTES)
        if function(ctypes.byref(how), ctypes.c_void_p(started.block), ctypes.byref(counters), message, size):
            raise emulator.EmulatorError(message.value.decode())

    fake, device = install(monkeypatch, gpu, run=run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # what the CPU's device index is
    monkeypatch.setattr(launch, "unavailable", lambda index: None)
    monkeypatch.setattr(launch, "device", lambda index: device)
    return fake, device
