"""What `vlmquant doctor` finds: this machine, what would multiply packed weights on it and why, and the cache."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import vlmquant
from vlmquant import compiled
from vlmquant.cache import cache_home, cache_problem
from vlmquant.errors import KernelError
from vlmquant.grid import Grid
from vlmquant.kernels import choose
from vlmquant.kernels.cuda import build, dispatch, launch
from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.kernels.cuda.dispatch import Gpu, Plan, Problem
from vlmquant.kernels.cuda.dispatch_int8 import Int8Problem, choose_int8
from vlmquant.kernels.form import Form, Place
from vlmquant.kernels.probe import compute_dtype
from vlmquant.shards import dtype_name

PACKAGES = ("torch", "transformers", "numba", "cuda-bindings", "nvidia-cuda-nvrtc", "bitsandbytes")
SHOWN_SHAPE = (4096, 4096)
"""Rows and columns of the weight that stands for all in the list of kernels."""
SHOWN_TOKENS = (1, 16, 32, 64, 128, 256, 1024)
SHOWN_DTYPES = (torch.float32, torch.bfloat16)
GROUP_SIZE = 128


def examine() -> dict[str, Any]:
    """Everything, as data. Starts no kernel of a GPU and compiles none."""
    return {
        "vlmquant": vlmquant.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "nvrtc": _nvrtc(),
        "cpu": _cpu(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cache": _cache(cache_home()),
    }


def lines(found: dict[str, Any]) -> Iterable[str]:
    """For people."""
    yield f"vlmquant {found['vlmquant']}, Python {found['python']}, {found['system']}"
    yield "packages: " + ", ".join(
        f"{name} {version or 'not installed'}" for name, version in found["packages"].items()
    )
    yield f"torch's CUDA: {found['torch_cuda'] or 'none, this torch is for CPUs'}"
    nvrtc = found["nvrtc"]
    yield f"NVRTC: {nvrtc['version'] or nvrtc['problem']}"
    cpu = found["cpu"]
    layouts = ", ".join(f"{layout} for {dtype}" for dtype, layout in cpu["layouts"].items())
    yield f"CPU: {cpu['threads']} threads, computes fastest in {cpu['dtype']}, holds 4-bit weights as {layouts}"
    yield f"  int8 weights with inputs rounded to int8 as {cpu['int8_layout']}"
    if cpu["loops_problem"]:
        yield f"  no loops can be compiled ({cpu['loops_problem']}): torch expands packed weights, more slowly"
    if not found["gpus"]:
        yield "GPU: torch finds none, so packed weights are multiplied on the CPU"
    for gpu in found["gpus"]:
        yield f"GPU {gpu['index']}: {gpu['name']}, compute capability {gpu['capability']}, {gpu['sms']} SMs"
        if gpu["problem"]:
            yield f"  our kernels do not run: {gpu['problem']}; torch expands weights at every call"
            continue
        yield f"  compiled for {gpu['arch']}{'' if gpu['exact'] else ' (PTX, no exact match: not the fastest kernels)'}"
        yield f"  table: {gpu['table']}. {gpu['provenance']}"
        yield f"  override file: {gpu['overrides']} rows in {gpu['override_file']}"
        shape = "x".join(map(str, SHOWN_SHAPE))
        yield f"  a weight of {shape}, groups of {GROUP_SIZE}, symmetric, bfloat16:"
        for kernel in gpu["kernels"]:
            ready = "compiled" if kernel["compiled"] else "compiled at first use"
            yield f"    {kernel['tokens']:>5} tokens: {kernel['entry']} ({kernel['why']}; {ready})"
        yield f"  an int8 weight of {shape} with inputs rounded to int8, bfloat16:"
        for kernel in gpu["int8_kernels"]:
            ready = "compiled" if kernel["compiled"] else "compiled at first use"
            yield f"    {kernel['tokens']:>5} tokens: {kernel['entry']} ({kernel['why']}; {ready})"
    cache = found["cache"]
    state = (
        "can be written to"
        if cache["writable"]
        else f"CANNOT be written to ({cache['problem']}), every process compiles again"
    )
    yield f"cache: {cache['path']}, {state}; {cache['kernels']} kernels, {cache['bytes'] / 1e6:.1f} MB"
    if cache["damaged"]:
        yield f"  {cache['damaged']} of them damaged, or not yours alone; they are compiled again when needed"


def kernels_for(gpu: Gpu) -> list[dict[str, Any]]:
    """What runs a 4-bit weight of SHOWN_SHAPE in bfloat16 for each number of tokens."""
    return [
        _kernel(tokens, dispatch.choose(Problem(tokens, *SHOWN_SHAPE, GROUP_SIZE, True, "bf16"), gpu), gpu)
        for tokens in SHOWN_TOKENS
    ]


def int8_kernels_for(gpu: Gpu) -> list[dict[str, Any]]:
    """And an int8 weight."""
    return [
        _kernel(tokens, choose_int8(Int8Problem(tokens, *SHOWN_SHAPE, "bf16", ""), gpu)[1], gpu)
        for tokens in SHOWN_TOKENS
    ]


def _kernel(tokens: int, plan: Plan, gpu: Gpu) -> dict[str, Any]:
    """With why, and whether its machine code is in the cache."""
    compiled = build.cache_path(build.program(ENTRIES[plan.entry], gpu.arch)).is_file()
    return {"tokens": tokens, "entry": plan.entry, "why": plan.why, "grid": plan.grid, "compiled": compiled}


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "index": index,
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "sms": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "problem": launch.unavailable(index),
    }
    if found["problem"] is None:
        gpu = launch.device(index).gpu
        table = gpu.arch if gpu.arch in dispatch.table_names() else dispatch.PORTABLE
        found |= {
            "arch": gpu.arch,
            "exact": gpu.arch != build.PTX_ARCH,
            "table": table,
            "provenance": dispatch.provenance(table),
            "overrides": len(dispatch.overrides(gpu.name)),
            "override_file": str(dispatch.override_path(gpu.name)),
            "kernels": kernels_for(gpu),
            "int8_kernels": int8_kernels_for(gpu),
        }
    return found


def _cpu() -> dict[str, Any]:
    form = Form(SHOWN_SHAPE, Grid(4, GROUP_SIZE, torch.bfloat16))
    int8_form = Form(SHOWN_SHAPE, Grid(8, SHOWN_SHAPE[1], torch.bfloat16), "dynamic-int8")
    cpu = torch.device("cpu")
    return {
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(compute_dtype("cpu")),
        "layouts": {dtype_name(dtype): choose(form, Place(cpu, dtype)) for dtype in SHOWN_DTYPES},
        "int8_layout": choose(int8_form, Place(cpu, torch.bfloat16)),
        "loops_problem": compiled.unavailable(),
    }


def _nvrtc() -> dict[str, Any]:
    try:
        version, archs = build.nvrtc_version(), build.nvrtc_archs()
    except KernelError as error:
        return {"version": None, "archs": [], "problem": str(error)}
    return {"version": ".".join(map(str, version)), "archs": list(archs), "problem": None}


def _cache(home: Path) -> dict[str, Any]:
    files = sorted((home / "kernels").glob("*.cubin")) + sorted((home / "kernels").glob("*.ptx"))
    problem = cache_problem("kernels")
    return {
        "path": str(home),
        "writable": problem is None,
        "problem": problem,
        "kernels": len(files),
        "bytes": sum(os.lstat(file).st_size for file in files),
        "damaged": sum(not build.is_whole(file) for file in files),
        "tuned": sorted(path.name for path in (home / "tune").glob("*.json")),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
