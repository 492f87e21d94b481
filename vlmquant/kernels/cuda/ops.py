"""Products with packed weights as operators of torch: `torch.ops.vlmquant.w4_linear` and `w8_linear`.

Being operators, they pass through `torch.compile(fullgraph=True)` and can be captured into a CUDA graph. On a GPU the
planned kernel runs; everywhere else, and where no kernel can, torch computes the same more slowly, which is the
definition of the answer. Weights are padded, 4-bit ones in the layout VQ4 of packing.py; inputs and outputs are not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vlmquant.errors import KernelError
from vlmquant.grid import Grid, dequantize_codes
from vlmquant.kernels.cuda import launch
from vlmquant.kernels.cuda.catalog import ENTRIES, STRIP_ROWS
from vlmquant.kernels.cuda.dispatch import Choice, Plan, Problem, choose, entries_for, plan
from vlmquant.kernels.cuda.dispatch_int8 import Int8Problem, choose_int8, int8_entries
from vlmquant.kernels.reference import ACTIVATIONS, activation_codes, add_bias
from vlmquant.notices import warn_once
from vlmquant.packing import VQ4_TILE, restore_vq4, unpack_vq4, unpack_w8

INT_MM_TOKENS, INT_MM_MULTIPLE = 17, 8
"""What torch's integer product on CUDA wants: so many tokens at least; rows and columns in such multiples."""
STRIPS_AT_ONCE = 64
"""Strips expanded together where no kernel runs: 4096 rows."""

LIBRARY: Any = torch.library.Library("vlmquant", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "w4_linear(Tensor inputs, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int rows, int group_size) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "w8_linear(Tensor inputs, Tensor codes, Tensor scales, Tensor? bias=None, str activation='') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def w4_linear(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group_size: int,
) -> Tensor:
    """The operator: see `w4_expanded` for what it computes."""
    product: Tensor = torch.ops.vlmquant.w4_linear(inputs, codes, scales, zeros, bias, rows, group_size)
    return product


def w8_linear(
    inputs: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *, activation: str = ""
) -> Tensor:
    """The operator: see `w8_by_torch` for what it computes."""
    product: Tensor = torch.ops.vlmquant.w8_linear(inputs, codes, scales, bias, activation)
    return product


def w4_expanded(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group_size: int,
) -> Tensor:
    """inputs (..., columns) -> (..., rows) of the same dtype: expand the weight, then multiply. On any device.

    codes (strips, k-blocks, 4, 32, 4) int32, scales and zeros (strips, groups, 4, 8, 2) as vlmquant.packing orders
    them, group_size of the packed weight, bias (rows,) or None.
    """
    columns, groups = inputs.shape[-1], scales.shape[1]
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    for start in range(0, len(codes), STRIPS_AT_ONCE):
        part = slice(start, start + STRIPS_AT_ONCE)
        some = slice(start * VQ4_TILE, min(rows, (start + STRIPS_AT_ONCE) * VQ4_TILE))
        count = some.stop - some.start
        weight = dequantize_codes(
            unpack_vq4(codes[part], count, columns, bits=4, symmetric=zeros is None),
            restore_vq4(scales[part], count, groups).float(),
            None if zeros is None else restore_vq4(zeros[part], count, groups),
            Grid(4, group_size, scales.dtype, zeros is None),
        )
        outputs[..., some] = nn.functional.linear(inputs, weight.to(inputs.dtype))
    return add_bias(outputs, bias)


def w4_linear_cuda(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group_size: int,
) -> Tensor:
    """As `w4_expanded`, by the kernel that dispatch.py plans."""
    index = codes.device.index
    if inputs.device != codes.device:
        raise KernelError(f"inputs are on {inputs.device} and the weight on {codes.device}; move one to the other")
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return w4_linear_cuda(inputs, codes, scales, zeros, bias, rows, group_size)
    refused = launch.unavailable(index)
    if inputs.dtype not in launch.DTYPE_NAMES or inputs.dtype != scales.dtype:
        refused = f"no kernel for {inputs.dtype} inputs with {scales.dtype} scales"
    if refused is None:
        try:
            return _run_w4(launch.device(index), inputs, codes, scales, zeros, bias, rows, group_size)
        except _NoKernelError as error:
            refused = str(error)
    warn_once(f"weights are expanded by torch at every call, which is slow: {refused}")
    return w4_expanded(inputs, codes, scales, zeros, bias, rows, group_size)


class _NoKernelError(Exception):
    """This product has no kernel on this GPU."""


def _run_w4(
    device: launch.Device,
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group_size: int,
) -> Tensor:
    columns = inputs.shape[-1]
    flat = inputs if inputs.dim() == 2 else inputs.reshape(-1, columns)
    tokens, (strips, blocks) = flat.shape[0], codes.shape[:2]
    padded_rows, padded_columns = strips * STRIP_ROWS, blocks * STRIP_ROWS
    outputs = inputs.new_empty((tokens, padded_rows))
    if tokens:
        key = (tokens, padded_rows, padded_columns, group_size, zeros is None, inputs.dtype)
        ready = device.ready.get(key)
        if ready is None:
            problem = Problem(*key[:-1], launch.DTYPE_NAMES[inputs.dtype])
            found = ready_for(problem, device)
            if isinstance(found, str):
                raise _NoKernelError(found)
            if len(device.ready) >= launch.LAUNCHES_KEPT:
                device.ready.clear()
            ready = device.ready[key] = found
        start_w4(device, ready, aligned(flat, padded_columns), codes, scales, zeros, outputs)
    if padded_rows != rows:
        outputs = outputs[:, :rows].contiguous()
    add_bias(outputs, bias)
    return outputs if inputs.dim() == 2 else outputs.view(*inputs.shape[:-1], rows)


def start_w4(
    device: launch.Device,
    ready: launch.Launch,
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    outputs: Tensor,
) -> None:
    """Put one product on the current stream: inputs (tokens, packed columns), outputs (tokens, packed rows)."""
    stream = torch.cuda.current_stream(device.index).cuda_stream
    values: dict[str, launch.Value] = {
        "codes": codes.data_ptr(),
        "scales": scales.data_ptr(),
        "zeros": 0 if zeros is None else zeros.data_ptr(),
    }
    if ready.plan.kernel == "dequantize":
        dense = inputs.new_empty(outputs.shape[1], inputs.shape[1])
        ready.start(stream, values | {"dense": dense.data_ptr()})
        torch.mm(inputs, dense.T, out=outputs)
        return
    box = ready.plan.token_box
    values["inputs"] = device.tensor_map(inputs, box) if box else inputs.data_ptr()
    values["outputs"] = outputs.data_ptr()
    if ready.arguments.takes("workspace"):
        sums, semaphores = device.workspace(stream)
        values["workspace"], values["semaphores"] = sums.data_ptr(), semaphores.data_ptr()
    ready.start(stream, values)


def make_launch(device: launch.Device, chosen: Plan, problem: Problem) -> launch.Launch:
    """A plan's launch, loaded, with the arguments that plan and problem settle."""
    known: dict[str, launch.Value] = {
        "tokens": problem.tokens,
        "rows": problem.rows,
        "columns": problem.columns,
        "group_size": problem.group_size,
        "stages": chosen.stages,
        "sweep_tiles": chosen.sweep_tiles,
        "first_strip": 0,
    }
    return device.launch(chosen, _taken(chosen, known))


def ready_for(problem: Problem, device: launch.Device) -> launch.Launch | str:
    """The launch of the chosen kernel; of the one that expands, if that does not load; else why there is none."""
    try:
        chosen = choose(problem, device.gpu)
    except KernelError as error:
        return str(error)
    try:
        return make_launch(device, chosen, problem)
    except KernelError as error:
        if torch.cuda.is_current_stream_capturing():
            raise
        warn_once(f"{chosen.entry} does not run here: {error}")
    expanding = plan(problem, device.gpu, Choice("dequantize"), why=f"{chosen.entry} does not run here")
    try:
        return expanding if isinstance(expanding, str) else make_launch(device, expanding, problem)
    except KernelError as error:
        return str(error)


def prepare_w4(device: torch.device, rows: int, columns: int, group_size: int, symmetric: bool, name: str) -> None:
    """Compile and load what products with a packed weight of this kind will run, so that graphs can be captured."""
    with torch.cuda.device(device):
        kept = launch.device(torch.cuda.current_device())
        try:
            kept.prepare(ENTRIES[entry] for entry in entries_for(rows, columns, group_size, symmetric, name, kept.gpu))
        except KernelError as error:
            warn_once(f"kernels are not ready before their first use: {error}")
        # A dependent launch reads the weight before the kernel ahead of it has ended, which must not be the packing.
        torch.cuda.synchronize()


def aligned(inputs: Tensor, columns: int) -> Tensor:
    """(tokens, n) -> (tokens, columns), padded with zeros, rows in one piece, aligned as the kernels read them."""
    if inputs.shape[1] != columns:
        return nn.functional.pad(inputs, (0, columns - inputs.shape[1]))
    inputs = inputs.contiguous()
    return inputs.clone() if inputs.data_ptr() % launch.ALIGNMENT else inputs


def _w4_fake(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group_size: int,
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], rows)


def w8_by_torch(
    inputs: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, activation: str = ""
) -> Tensor:
    """inputs (..., columns) -> (..., rows) of the same dtype: round the inputs per token, multiply integers, scale.

    codes (padded rows, padded columns) int8 as `pack_w8` orders them; scales (rows,) float32; bias (rows,) or None;
    activation: a name of ACTIVATIONS, applied before the result is rounded to the inputs' dtype. On any device.
    """
    if activation not in ACTIVATIONS:
        raise KernelError(
            f"w8_linear has no activation {activation!r}; there are {', '.join(filter(None, ACTIVATIONS))}"
        )
    columns, rows = inputs.shape[-1], len(scales)
    rounded, input_scales = activation_codes(inputs.reshape(-1, columns))
    product = unpack_w8(_integer_product(rounded, codes).T, rows, len(rounded)).T  # its columns are the weight's rows
    outputs = product.float().contiguous() * input_scales * scales
    return ACTIVATIONS[activation](add_bias(outputs, bias)).to(inputs.dtype).view(*inputs.shape[:-1], rows)


def _integer_product(rounded: Tensor, codes: Tensor) -> Tensor:
    """(tokens, columns) int8 times codes (padded rows, padded columns) int8 -> (tokens, padded rows), exact."""
    tokens, columns = rounded.shape
    short = max(0, INT_MM_TOKENS - tokens) if rounded.is_cuda else 0
    padded = nn.functional.pad(rounded, (0, codes.shape[1] - columns, 0, short))
    if codes.shape[0] % INT_MM_MULTIPLE or codes.shape[1] % INT_MM_MULTIPLE or not tokens:
        return padded.double() @ codes.double().T
    return torch._int_mm(padded, codes.T)[:tokens]


def w8_linear_cuda(
    inputs: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, activation: str = ""
) -> Tensor:
    """As `w8_by_torch`, by the kernels that dispatch_int8.py plans."""
    index = codes.device.index
    if inputs.device != codes.device:
        raise KernelError(f"inputs are on {inputs.device} and the weight on {codes.device}; move one to the other")
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return w8_linear_cuda(inputs, codes, scales, bias, activation)
    refused = launch.unavailable(index)
    if inputs.dtype not in launch.DTYPE_NAMES:
        refused = f"no kernel for {inputs.dtype} inputs"
    if refused is None:
        try:
            return _run_w8(launch.device(index), inputs, codes, scales, bias, activation)
        except _NoKernelError as error:
            refused = str(error)
    warn_once(f"int8 products are put together by torch, which is slow: {refused}")
    return w8_by_torch(inputs, codes, scales, bias, activation)


def _run_w8(
    device: launch.Device, inputs: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    columns, rows = inputs.shape[-1], scales.shape[0]
    flat = inputs.reshape(-1, columns).contiguous()
    tokens, packed_columns = flat.shape[0], codes.shape[1]
    outputs = inputs.new_empty((tokens, rows))
    if tokens:
        key = (tokens, rows, columns, packed_columns, activation, inputs.dtype)
        ready = device.ready_int8.get(key)
        if ready is None:
            problem = Int8Problem(tokens, rows, packed_columns, launch.DTYPE_NAMES[inputs.dtype], activation)
            if len(device.ready_int8) >= launch.LAUNCHES_KEPT:
                device.ready_int8.clear()
            ready = device.ready_int8[key] = _ready_w8(device, problem, columns)
        start_w8(device, ready, flat, codes, scales, bias, outputs)
    return outputs.view(*inputs.shape[:-1], rows)


def _ready_w8(device: launch.Device, problem: Int8Problem, columns: int) -> tuple[launch.Launch, launch.Launch]:
    try:
        return make_w8(device, problem, columns, *choose_int8(problem, device.gpu))
    except KernelError as error:
        if torch.cuda.is_current_stream_capturing():
            raise
        raise _NoKernelError(str(error)) from error


def make_w8(
    device: launch.Device, problem: Int8Problem, columns: int, quantize: Plan, multiply: Plan
) -> tuple[launch.Launch, launch.Launch]:
    """Both plans' launches, loaded, with the arguments that plans and problem settle; columns of the inputs."""
    known: dict[str, launch.Value] = {
        "tokens": problem.tokens,
        "rows": problem.rows,
        "columns": problem.columns,
        "packed_columns": problem.columns,
        "stages": multiply.stages,
        "sweep_tiles": multiply.sweep_tiles,
        "split_tiles": multiply.split_tiles,
    }
    first = device.launch(quantize, _taken(quantize, known | {"columns": columns}))
    return first, device.launch(multiply, _taken(multiply, known))


def start_w8(
    device: launch.Device,
    ready: tuple[launch.Launch, launch.Launch],
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    outputs: Tensor,
) -> None:
    """Put both kernels on the current stream: inputs (tokens, columns), outputs (tokens, rows)."""
    stream = torch.cuda.current_stream(device.index).cuda_stream
    quantize, multiply = ready
    input_codes = torch.empty((inputs.shape[0], codes.shape[1]), dtype=torch.int8, device=inputs.device)
    input_scales = torch.empty(inputs.shape[0], dtype=torch.float32, device=inputs.device)
    bias = None if bias is None else _aligned_row(bias.to(outputs.dtype))
    scales = _aligned_row(scales)
    quantize.start(
        stream,
        {"inputs": inputs.data_ptr(), "codes": input_codes.data_ptr(), "scales": input_scales.data_ptr()},
    )
    values: dict[str, launch.Value] = {
        "input_codes": input_codes.data_ptr(),
        "codes": codes.data_ptr(),
        "input_scales": input_scales.data_ptr(),
        "scales": scales.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "outputs": outputs.data_ptr(),
    }
    if multiply.plan.token_box:  # as pairs of bytes
        values["input_codes"] = device.tensor_map(input_codes.view(torch.int16), multiply.plan.token_box)
        values["codes"] = device.tensor_map(codes.view(torch.int16), multiply.plan.row_box)
        sums, semaphores = device.workspace(stream)
        values["workspace"], values["semaphores"] = sums.data_ptr(), semaphores.data_ptr()
    multiply.start(stream, values)


def _aligned_row(values: Tensor) -> Tensor:
    """(n,), in one piece and at an address as kernels want it."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % launch.ALIGNMENT else values


def prepare_w8(device: torch.device, rows: int, columns: int, name: str, activation: str) -> None:
    """Compile and load what products with an int8 weight (rows, packed columns) will run."""
    with torch.cuda.device(device):
        kept = launch.device(torch.cuda.current_device())
        try:
            kept.prepare(ENTRIES[entry] for entry in int8_entries(rows, columns, name, activation, kept.gpu))
        except KernelError as error:
            warn_once(f"kernels are not ready before their first use: {error}")
        torch.cuda.synchronize()  # as in prepare_w4


def _taken(chosen: Plan, values: dict[str, launch.Value]) -> dict[str, launch.Value]:
    """Those of the values that a plan's entry has arguments for."""
    names = {name for name, _ in ENTRIES[chosen.entry].arguments}
    return {name: value for name, value in values.items() if name in names}


def _w8_fake(inputs: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, activation: str = "") -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], scales.shape[0])


LIBRARY.impl("w8_linear", w8_by_torch, "CPU")
LIBRARY.impl("w8_linear", w8_linear_cuda, "CUDA")
torch.library.register_fake("vlmquant::w8_linear", _w8_fake, lib=LIBRARY)
LIBRARY.impl("w4_linear", w4_expanded, "CPU")
LIBRARY.impl("w4_linear", w4_linear_cuda, "CUDA")
torch.library.register_fake("vlmquant::w4_linear", _w4_fake, lib=LIBRARY)
