"""The loop inside GPTQ on a GPU: a block of columns by one launch, where torch needs half a dozen for each column.

Not timed on a GPU yet. The kernel adds errors in the order of the columns, a matrix-vector product of torch in one of
its own: sums differ in their last bits, and codes where that decides a tie (and behind it).
"""

import functools

import torch
from torch import Tensor

from vlmquant.errors import KernelError
from vlmquant.grid import Grid
from vlmquant.kernels.cuda import launch
from vlmquant.kernels.cuda.catalog import ENTRIES, ROUND_COLUMNS, Entry, shared_bytes
from vlmquant.kernels.cuda.dispatch import Plan
from vlmquant.notices import warn_once


def fits(device: torch.device, grid: Grid) -> bool:
    """Whether the kernel for a grid runs on a device: compiled and loaded. On a GPU it is said once why not."""
    if device.type != "cuda":
        return False
    refused = _refusal(device.index, entry_of(grid).name)
    if refused is not None:
        warn_once(f"GPTQ's columns are rounded by torch, which is slow: {refused}")
    return refused is None


@functools.cache
def _refusal(index: int, name: str) -> str | None:
    refused = launch.unavailable(index)
    if refused is None:
        try:
            with torch.cuda.device(index):
                launch.device(index).prepare([ENTRIES[name]])
        except KernelError as error:
            return str(error)
    return refused


def entry_of(grid: Grid) -> Entry:
    """The kernel of a grid."""
    return ENTRIES[f"round_block_{grid.kind}{'' if grid.symmetric else '_asym'}"]


def round_block(
    wanted: Tensor,
    target: Tensor,
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_of: Tensor,
    grid: Grid,
) -> None:
    """As `by_torch`, of at most ROUND_COLUMNS columns, on a device that `fits`. Rows of all in one piece."""
    index, (columns, rows) = wanted.device.index, wanted.shape
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return round_block(wanted, target, values, errors, feedback, scales, zeros, group_of, grid)
    assert columns <= ROUND_COLUMNS, columns
    assert all(t.is_contiguous() for t in (wanted, target, values, errors, scales, group_of))
    assert zeros is None or zeros.is_contiguous()
    assert feedback.stride(1) == 1
    kept = launch.device(index)
    _launch(kept, entry_of(grid), rows).start(
        torch.cuda.current_stream(kept.index).cuda_stream,
        {
            "wanted": wanted.data_ptr(),
            "target": target.data_ptr(),
            "values": values.data_ptr(),
            "errors": errors.data_ptr(),
            "feedback": feedback.data_ptr(),
            "scales": scales.data_ptr(),
            "zeros": 0 if zeros is None else zeros.data_ptr(),
            "group_of": group_of.data_ptr(),
            "columns": columns,
            "feedback_stride": feedback.stride(0),
            "bits": grid.bits,
        },
    )
    return None


def _launch(device: launch.Device, entry: Entry, rows: int) -> launch.Launch:
    key = (entry.name, rows)
    ready = device.ready.get(key)
    if ready is None:
        if len(device.ready) >= launch.LAUNCHES_KEPT:
            device.ready.clear()
        grid = (-(-rows // entry.row_tile), 1)
        plan = Plan(entry.family, entry.name, grid, entry.threads, shared_bytes(entry), "the only one")
        ready = device.ready[key] = device.launch(plan, {"rows": rows})
    return ready


def by_torch(
    wanted: Tensor,
    target: Tensor,
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_of: Tensor,
    grid: Grid,
) -> None:
    """Round the columns of a block, (columns, out): values gets what they become, errors what target loses by it.

    wanted: what they are to be rounded from but for the errors made in this block, to which feedback (columns, columns)
    leads, below its diagonal; it gets what they were rounded from, less their values. scales, zeros: (groups, out)
    float32; group_of (columns,) int64.
    """
    inverses, groups = scales.reciprocal(), group_of.tolist()
    bounds = {group: grid.bounds(None if zeros is None else zeros[group]) for group in set(groups)}
    for i, group in enumerate(groups):
        value = wanted[i] if i == 0 else torch.addmv(wanted[i], errors[:i].T, feedback[i, :i])
        torch.mul(value, inverses[group], out=values[i])
        grid.round_(values[i], *bounds[group])
        rounded = values[i] * scales[group]
        torch.sub(target[i], rounded, out=errors[i])
        torch.sub(value, rounded, out=wanted[i])
