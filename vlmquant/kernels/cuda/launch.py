"""From a plan to a running kernel, through the driver API: modules, argument blocks, tensor maps, workspaces.

Nothing here is allocated, loaded or encoded twice: a module is loaded once per device (`Device.prepare`, before any
CUDA graph is captured), an argument block is made once per plan and size, a tensor map once per buffer of inputs, and a
stream keeps one workspace at a fixed address. So a launch may be captured into a CUDA graph and replayed.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import build
from vlmquant.kernels.cuda.catalog import ENTRIES, Entry
from vlmquant.kernels.cuda.dispatch import SEMAPHORES, WORKSPACE_FLOATS, Gpu, Plan
from vlmquant.notices import warn_once

DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""As in the entries' names."""
TENSOR_MAP_BYTES = 128
BOX_COLUMNS = 64
"""Columns of one copy from the inputs: the 128 bytes of a swizzle row."""
LAUNCHES_KEPT = 4096
"""Launches kept: one for each weight shape and number of tokens."""
MAPS_KEPT = 4096
"""Tensor maps kept; torch's allocator hands out the same addresses again and again."""
SPARE_WORKSPACES = 2
"""Zeroed and ready for streams not seen before: while a graph is captured, none can be made."""
ALIGNMENT = 16
"""Bytes to which kernels want addresses and rows aligned."""

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT."""

Value = int | ctypes.Array[ctypes.c_char]
"""An address, a number, or an encoded tensor map."""


CELLS: dict[str, Callable[[], Any]] = {
    "pointer": ctypes.c_void_p,
    "int": ctypes.c_int,
    "tensor_map": lambda: ctypes.create_string_buffer(TENSOR_MAP_BYTES),
}
"""What holds an argument of each kind."""


class Arguments:
    """A kernel's argument block: packed once, then only what changes is written again."""

    def __init__(self, entry: Entry) -> None:
        self.names = tuple(name for name, _ in entry.arguments)
        self.cells: list[Any] = [CELLS[kind]() for _, kind in entry.arguments]
        self.addresses = (ctypes.c_void_p * len(self.cells))(*map(ctypes.addressof, self.cells))
        self.places = {name: index for index, name in enumerate(self.names)}

    def takes(self, name: str) -> bool:
        return name in self.places

    def write(self, values: Mapping[str, Value]) -> None:
        """Values by the names that the catalog gives them."""
        for name, value in values.items():
            index = self.places[name]
            if isinstance(value, int):
                self.cells[index].value = value
            else:
                self.cells[index] = value  # keeps it alive
                self.addresses[index] = ctypes.addressof(value)


class Launch:
    """A plan with its function and argument block on one device. May be started from several threads."""

    def __init__(self, plan: Plan, function: Any, context: Any, values: Mapping[str, Value]) -> None:
        driver = _driver()
        self.plan, self.function, self.context = plan, function, context
        self.arguments = Arguments(ENTRIES[plan.entry])
        self.arguments.write(values)
        self.lock = threading.Lock()
        self.config = driver.CUlaunchConfig()
        self.config.gridDimX, self.config.gridDimY = plan.grid
        self.config.blockDimX, self.config.blockDimY = plan.threads, 1
        self.config.gridDimZ = self.config.blockDimZ = 1
        self.config.sharedMemBytes = plan.shared_bytes
        if plan.dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self.config.attrs = [attribute]
            self.config.numAttrs = 1

    def start(self, stream: int, values: Mapping[str, Value]) -> None:
        """Put the kernel on a stream, with the addresses of this call."""
        driver = _driver()
        with self.lock:  # the driver copies the block before it returns
            self.arguments.write(values)
            self.config.hStream = driver.CUstream(stream)
            block = ctypes.addressof(self.arguments.addresses)
            result = driver.cuLaunchKernelEx(self.config, self.function, block, 0)
            if int(result[0]) == INVALID_CONTEXT:  # a thread that torch has not used CUDA in
                _check(driver.cuCtxSetCurrent(self.context), self.plan.entry)
                result = driver.cuLaunchKernelEx(self.config, self.function, block, 0)
            _check(result, self.plan.entry)


class Device:
    """What is kept for one GPU. Its methods expect it to be torch's current device."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.place = torch.device("cuda", index)
        self.gpu = _gpu(index)
        self.context: Any = None
        self.functions: dict[str, Any] = {}
        self.images: list[bytes] = []
        self.ready: dict[tuple[Any, ...], Launch] = {}
        """Launches by what decides on them, see ops.py."""
        self.ready_int8: dict[tuple[Any, ...], tuple[Launch, Launch]] = {}
        self.maps: dict[tuple[Any, ...], ctypes.Array[ctypes.c_char]] = {}
        self.workspaces: dict[int, tuple[Tensor, Tensor]] = {}
        self.spares: list[tuple[Tensor, Tensor]] = []
        self.lock = threading.RLock()

    def prepare(self, entries: Iterable[Entry]) -> None:
        """Compile and load these entries and make spare workspaces, where they have one: what must not happen during a
        graph's capture.
        """
        entries = list(entries)
        with self.lock:
            missing = {entry.name: entry for entry in entries if entry.name not in self.functions}
            if missing:
                if torch.cuda.is_current_stream_capturing():
                    raise KernelError(
                        f"{', '.join(sorted(missing))}: not loaded before a CUDA graph was captured; "
                        "run the model once before capturing"
                    )
                self._enter()
                for name, code in build.load_all(missing.values(), self.gpu.arch).items():
                    self.functions[name] = self._load(name, code)
            if any(("workspace", "pointer") in entry.arguments for entry in entries):
                self._make_spares()

    def _enter(self) -> None:
        """Make the context that torch uses current in this thread."""
        driver = _driver()
        if self.context is None:
            torch.cuda.synchronize(self.index)
            self.context = _check(driver.cuDevicePrimaryCtxRetain(self.index), f"GPU {self.index}: its context")
        _check(driver.cuCtxSetCurrent(self.context), f"GPU {self.index}: its context")

    def _load(self, name: str, code: bytes) -> Any:
        driver = _driver()
        self.images.append(code)
        module = _check(driver.cuModuleLoadData(code), f"{name}: loading it")
        function = _check(driver.cuModuleGetFunction(module, name.encode()), f"{name}: finding it")
        attribute = driver.CUfunction_attribute
        static = _check(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), name)
        dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, dynamic, self.gpu.shared_bytes - static), name)
        return function

    def launch(self, plan: Plan, values: Mapping[str, Value]) -> Launch:
        """A launch of this plan, its entry loaded, with the values that stay."""
        self.prepare([ENTRIES[plan.entry]])
        return Launch(plan, self.functions[plan.entry], self.context, values)

    def workspace(self, stream: int) -> tuple[Tensor, Tensor]:
        """Partial sums (WORKSPACE_FLOATS,) float32 and semaphores (SEMAPHORES,) int32 of a stream.

        Zeroed once; kernels leave the semaphores at zero.
        """
        found = self.workspaces.get(stream)
        if found is None:
            with self.lock:
                if stream in self.workspaces:  # another thread was faster
                    return self.workspaces[stream]
                if not self.spares and torch.cuda.is_current_stream_capturing():
                    raise KernelError(
                        f"more than {SPARE_WORKSPACES} streams began with the capture of a CUDA graph; "
                        "run the model once on each before capturing"
                    )
                self._make_spares()
                found = self.workspaces[stream] = self.spares.pop()
                self._make_spares()
        return found

    def _make_spares(self) -> None:
        if len(self.spares) == SPARE_WORKSPACES or torch.cuda.is_current_stream_capturing():
            return
        while len(self.spares) < SPARE_WORKSPACES:
            sums = torch.zeros(WORKSPACE_FLOATS, dtype=torch.float32, device=self.place)
            self.spares.append((sums, torch.zeros(SEMAPHORES, dtype=torch.int32, device=self.place)))
        # Another stream will use them. And what was packed just now is there before a kernel that does not wait for it.
        torch.cuda.synchronize(self.index)

    def tensor_map(self, inputs: Tensor, box: int) -> ctypes.Array[ctypes.c_char]:
        """How a kernel copies boxes of (box tokens, BOX_COLUMNS) of inputs (tokens, columns); beyond them are zeros."""
        key = (inputs.data_ptr(), inputs.shape, inputs.stride(0), box, inputs.dtype)
        found = self.maps.get(key)
        if found is None:
            if len(self.maps) >= MAPS_KEPT:
                self.maps.clear()
            found = self.maps[key] = encode_map(inputs, box)
        return found


def encode_map(inputs: Tensor, box: int) -> ctypes.Array[ctypes.c_char]:
    """A CUtensorMap of 16-bit (tokens, columns), each row in one piece, in the 128-byte swizzle the kernels read."""
    driver = _driver()
    types = driver.CUtensorMapDataType
    kind = types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    if inputs.dtype == torch.bfloat16:
        kind = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    elif inputs.dtype == torch.int16:
        kind = types.CU_TENSOR_MAP_DATA_TYPE_UINT16
    tokens, columns = inputs.shape
    encoded = _check(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            inputs.data_ptr(),
            [driver.cuuint64_t(columns), driver.cuuint64_t(tokens)],
            [driver.cuuint64_t(inputs.stride(0) * inputs.element_size())],
            [driver.cuuint32_t(BOX_COLUMNS), driver.cuuint32_t(box)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"inputs of {tokens} x {columns}: describing them to the copy engine",
    )
    return ctypes.create_string_buffer(ctypes.string_at(encoded.getPtr(), TENSOR_MAP_BYTES), TENSOR_MAP_BYTES)


@functools.cache
def device(index: int) -> Device:
    """Kept for the process. KernelError where the kernels cannot run."""
    return Device(index)


@functools.cache
def unavailable(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, None if they can."""
    try:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        device(index)
        _driver()
    except KernelError as error:
        return str(error)
    return None


def _gpu(index: int) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    arch = build.arch_for((facts.major, facts.minor))
    if arch == build.PTX_ARCH:
        warn_once(
            f"{facts.name}: no kernels are made for compute capability {facts.major}.{facts.minor} with this NVRTC; "
            f"the driver translates those for {build.PTX_ARCH}, which is slower"
        )
    return Gpu(
        name=facts.name,
        arch=arch,
        sms=facts.multi_processor_count,
        shared_bytes=facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stubs
    )


@functools.cache
def _driver() -> Any:
    """cuda.bindings' view of the driver; a test puts a fake in its place."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError(f"the CUDA kernels need cuda-bindings ({error}); pip install cuda-bindings") from error
    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a call into the driver; KernelError names what failed."""
    status, *values = result
    if int(status) != 0:
        raise KernelError(f"{what}: the CUDA driver says {status.name}")
    return values[0] if len(values) == 1 else values
