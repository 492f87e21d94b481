"""Which device computes: the one asked for, or the GPU if there is one, else the CPU."""

import functools

from vlmquant.errors import UsageError, first_line, shown
from vlmquant.notices import warn_once
from vlmquant.progress import stderr

AUTO = "auto"
"""The default of every command and function that computes: the GPU if there is one that works, else the CPU."""
GPU, CPU = "cuda", "cpu"
NO_GPU = "torch finds no CUDA device"


def find_device(device: str = AUTO) -> str:
    """The device of that name, or what `auto` stands for here.

    UsageError for one that torch does not know, cannot reach, or that does not compute, such as meta; it says what
    there is.
    """
    if device == AUTO:
        if not (why := _why_not(GPU)):
            return GPU
        if why != NO_GPU:
            warn_once(f"the GPU cannot be used ({why}): the CPU computes")
        return CPU
    if why := _why_not(device):
        raise UsageError(
            f"device {shown(device)}: cannot be used here ({why}); there is {', '.join(devices_here())}: "
            "name one of these, or leave it out"
        )
    return device


def devices_here() -> list[str]:
    """What there is on this machine, for people: `cpu`, `cuda:0 (NVIDIA H200)`."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [CPU, *(f"{GPU}:{index} ({torch.cuda.get_device_name(index)})" for index in gpus)]


@functools.cache
def tell_device(device: str) -> None:
    """Say on stderr, once, where it is computed: the first line of every command that does."""
    import torch

    name = f" ({torch.cuda.get_device_name(torch.device(device))})" if device.partition(":")[0] == GPU else ""
    stderr.print(f"device: {device}{name}", markup=False, highlight=False, soft_wrap=True)


def _why_not(device: str) -> str:
    """Why a device does not compute; empty where it does."""
    import torch

    if device.partition(":")[0] == GPU and not torch.cuda.is_available():
        return NO_GPU
    try:
        torch.ones(1, device=device).item()
    except Exception as error:
        return first_line(error)
    return ""
