"""Where a number was measured, and how much memory this process has used."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import vlmquant

STATUS = Path("/proc/self/status")
CPUINFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """Versions, processor, threads and memory of this machine, for the report."""
    found: dict[str, Any] = {
        "vlmquant": vlmquant.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not say."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far.

    From VmHWM where there is one: getrusage's ru_maxrss survives exec on Linux, so a small process that a large one
    started would report its parent's peak.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
