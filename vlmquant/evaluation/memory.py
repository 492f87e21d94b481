"""What a model takes of memory, told apart from the process around it: tensors that it holds, and peaks above those."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmquant.budget import resident_bytes
from vlmquant.evaluation.environment import peak_resident_bytes
from vlmquant.kernels import int8_onednn
from vlmquant.loading import give_back_freed_memory

HOST = "cpu"
CLEAR = Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
"""Has VmHWM begin anew from what is resident now: proc_pid_clear_refs(5)."""
PAGE = 4096


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the tensors that a model holds, by device, the host's first: parameters, buffers and packed codes.

    Memory that several of them lie in (tied weights, views) counts once.
    """
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    found: dict[str, int] = defaultdict(int, {HOST: 0})
    for tensor in _tensors(model):
        if tensor.is_mkldnn:  # has no address
            found[str(tensor.device)] += int8_onednn.nbytes(tensor)
        elif tensor.device.type != "meta" and tensor.numel():
            spans[str(tensor.device)].append(_span(tensor))
    for device, mine in spans.items():
        reached = 0
        for start, end in sorted(mine):
            found[device] += max(0, end - max(start, reached))
            reached = max(reached, end)
    return dict(found)


def bring_in(model: nn.Module) -> None:
    """Read a byte of every page of the tensors on the host: transformers leaves weights that need no change in their
    files until they are used, so that loading would seem to take no time and running the model all of the memory."""
    for tensor in _tensors(model):
        if tensor.device.type == HOST and not tensor.is_mkldnn and tensor.numel():
            start, end = _span(tensor)
            pages = torch.empty(0, dtype=torch.uint8).set_(
                tensor.untyped_storage(), start - tensor.untyped_storage().data_ptr(), (end - start,), (1,)
            )
            pages[::PAGE].max()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside a weight, each object once."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for one in (tensor, *_beside(getattr(tensor, "quant_state", None))):
                if one is not None and id(one) not in seen:
                    seen.add(id(one))
                    yield one.data


def _beside(state: Any) -> list[Tensor]:
    """The tensors of a bitsandbytes QuantState, and of the one inside it."""
    if state is None:
        return []
    values = list(vars(state).values())
    own = [value for value in values if isinstance(value, Tensor)]
    return own + [one for value in values if type(value) is type(state) for one in _beside(value)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one after the last, that a tensor's elements lie in."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


class Meter:
    """Peaks of memory above what there is when it starts, of the host and of the GPU that computes."""

    def __init__(self, device: str) -> None:
        self._gpu = device if torch.device(device).type == "cuda" else None
        self.process_peak = 0
        """Resident, of the whole process, so far."""
        self.start()

    def start(self) -> None:
        """From now on: what was freed before is given back first, so that it is not taken for used."""
        give_back_freed_memory()
        self.process_peak = max(self.process_peak, peak_resident_bytes())
        self._before = {HOST: resident_bytes()}
        self._peak_before: int | None = peak_resident_bytes()
        with suppress(OSError):
            CLEAR.write_text(FORGET_PEAK)
            self._peak_before = None
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._gpu)
            self._before[self._gpu_name] = torch.cuda.memory_allocated(self._gpu)

    @property
    def _gpu_name(self) -> str:
        """As tensors there have it, with the number."""
        return str(torch.empty(0, device=self._gpu).device)

    @property
    def before(self) -> int:
        """Bytes resident at the start."""
        return self._before[HOST]

    def above(self) -> dict[str, int | None]:
        """The peaks, by device; None for the host's where the system does not let a peak begin anew and an earlier one
        was higher."""
        peak = peak_resident_bytes()
        self.process_peak = max(self.process_peak, peak)
        known = self._peak_before is None or peak > self._peak_before
        found: dict[str, int | None] = {HOST: max(0, peak - self._before[HOST]) if known else None}
        if self._gpu:
            found[self._gpu_name] = torch.cuda.max_memory_allocated(self._gpu) - self._before[self._gpu_name]
        return found
