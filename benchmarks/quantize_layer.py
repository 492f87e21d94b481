"""Where the CPU seconds of GPTQ and AWQ go, shape by shape, and what the blocked column loop gains over the plain one.

    python benchmarks/quantize_layer.py [--threads N] [--repeats N] [--tokens N] [--out FILE]

Weights and inputs are synthetic (seeded, correlated), in the shapes of a 768 wide language model. Times
are medians of user CPU seconds, so that other work on the machine counts little.
"""

import argparse
import datetime
import json
import platform
import resource
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from vlmquant.algorithms import awq, coupled, gptq, loops
from vlmquant.algorithms.factor import factorize
from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import Grid
from vlmquant.recipe import AwqOptions, GptqOptions

SHAPES = {"q,k,v": (1152, 768), "o": (768, 768), "gate,up": (3072, 768), "down": (768, 1536)}
"""Rows of linears that share an input, and inputs."""
GRID, OPTIONS = Grid(4, 128, torch.bfloat16), GptqOptions()
FP8 = Grid(8, 1 << 20, torch.bfloat16, kind="float")
TOGETHER = 768
"""Rows that make up for each other where answers decide."""


def plain_columns(weight: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """The column loop as the GPTQ paper writes it: after each column all later ones are updated."""
    columns = weight.shape[1]
    damped = hessian.double()
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    damped.diagonal().add_(OPTIONS.damping * damped.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True).float()
    rest, codes = weight[:, order].clone(), torch.empty_like(weight, dtype=torch.uint8)
    for i in range(columns):
        scale = scales[:, order[i] // 128]
        code = (rest[:, i] / scale).round().add(8).clamp(0, 15)
        codes[:, order[i]] = code.to(torch.uint8)
        error = (rest[:, i] - (code - 8) * scale) / upper[i, i]
        rest[:, i:] -= torch.outer(error, upper[i, i:])
    return codes


def median_user_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        run()
        times.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - start)
    return statistics.median(times)


def measure(rows: int, columns: int, tokens: int, repeats: int) -> dict[str, float]:
    random = torch.Generator().manual_seed(rows + columns)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=random) @ mixing
    inputs *= torch.exp(torch.randn(columns, generator=random))
    weight = torch.randn(rows, columns, generator=random) * 0.05
    hessian = inputs.T @ inputs / tokens
    factor = factorize(hessian.clone(), OPTIONS.damping, activation_order=True)

    def grid() -> Tensor:
        return search_scales(weight, hessian.diagonal(), GRID, search="weighted")[0]

    def whole() -> Tensor:
        found = factorize(hessian.clone(), OPTIONS.damping, activation_order=True)
        return gptq.quantize_weight(weight, found, GRID, OPTIONS)[0].codes

    def loop() -> Tensor:
        return gptq.round_columns(weight, scales, None, factor, GRID)[0]

    def channel_scales() -> Tensor:
        return awq.search_channel_scales(
            weight, inputs.abs().mean(0), hessian, lambda scales: scales, GRID, options=AwqOptions()
        )

    def clip() -> Tensor:
        return awq.quantize_clipped(weight, hessian, GRID, clip=True).codes

    gradients = torch.randn(2 * TOGETHER, TOGETHER, generator=random) * torch.exp(
        torch.randn(TOGETHER, generator=random)
    )
    outputs = factorize(gradients.T @ gradients, OPTIONS.output_damping, activation_order=True)
    some = weight[:TOGETHER]

    def by_answers(scales: Tensor, grid: Grid) -> Callable[[], Tensor]:
        return lambda: coupled.round_both(some, scales, None, factor, outputs, grid)[0]

    scales = grid()
    of_floats = search_scales(some, hessian.diagonal(), FP8, search="weighted")[0]
    seconds = {
        "gram": median_user_seconds(lambda: inputs.T @ inputs, repeats),
        "factorize": median_user_seconds(
            lambda: factorize(hessian.clone(), OPTIONS.damping, activation_order=True), repeats
        ),
        "scale_search": median_user_seconds(grid, repeats),
        "columns": median_user_seconds(loop, repeats),
        "gptq": median_user_seconds(whole, repeats),
        "plain_columns": median_user_seconds(lambda: plain_columns(weight, scales, hessian), repeats),
        "awq_scales": median_user_seconds(channel_scales, repeats),
        "awq_clip": median_user_seconds(clip, repeats),
        "answers": median_user_seconds(by_answers(scales[:TOGETHER], GRID), repeats),
        "fp8_answers": median_user_seconds(by_answers(of_floats, FP8), repeats),
    }
    with mock.patch.object(loops, "fit", return_value=False):
        seconds["fp8_answers_torch"] = median_user_seconds(by_answers(of_floats, FP8), 1)
    seconds["columns_speedup"] = seconds["plain_columns"] / (seconds["factorize"] + seconds["columns"])
    seconds["equal_codes"] = (plain_columns(weight, scales, hessian) == loop()).float().mean().item()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=22_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantize_layer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = {}
    for name, (rows, columns) in SHAPES.items():
        layers[name] = measure(rows, columns, arguments.tokens, arguments.repeats)
        if name == "q,k,v":
            print(f"{'linears':10}" + "".join(f"{key:>19}" for key in layers[name]))
        print(f"{name:10}" + "".join(f"{value:19.4f}" for value in layers[name].values()), flush=True)
    result = {
        "command": shlex.join(["python", "benchmarks/quantize_layer.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "tokens": arguments.tokens,
        "unit": "median user CPU seconds; columns_speedup: plain_columns / (factorize + columns); "
        f"answers: round_both of {TOGETHER} rows",
        "shapes": SHAPES,
        "layers": layers,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
