"""Every layout that a CPU may choose, against dequantizing at every call and against an ordinary linear.

    python benchmarks/cpu_layouts.py [--threads N] [--rounds N] [--isa avx2] [--schemes NAME ...] [--out FILE]

`packed` is QuantLinear as a loaded model has it; `per call` dequantizes the words on disk, then multiplies, at every
call; `dense` is a product with the dequantized weight in the same dtype. They take turns, and each time is the median
of the rounds. --isa avx2 keeps torch, oneDNN and compiled loops from everything newer, as on a CPU without 16-bit
floats. Writes benchmarks/results/cpu_layouts[_ISA].{json,md}.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from provenance import provenance, run_with

from vlmquant.grid import grid_of
from vlmquant.threads import cpu_environment

RESULTS = Path(__file__).parent / "results"
SHAPES = {"768 wide": (2304, 768), "4096 wide": (4096, 4096), "vision": (4304, 1152)}
"""Rows and columns: the query, key and value of a small language model; a linear of a large one, and of a vision
encoder (SigLIP so400m)."""
TOKENS = (1, 4, 16, 64, 256, 729)
"""An image of 384 x 384 pixels in patches of 14 has 729."""
SCHEMES = ("w4a16", "w4a16-asym", "w3a16", "w8a16", "w8a8-dynamic")
DTYPES = ("bfloat16", "float32", "float16")
ISA = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "",
    },
}
LEAST_SECONDS = 0.02
"""A candidate's turn takes at least so long."""


def compare(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of one call of each."""
    import torch

    from vlmquant.kernels.cuda.timing import chain, race
    from vlmquant.kernels.probe import seconds

    cpu = torch.device("cpu")
    chains = {name: chain([run] * max(1, round(LEAST_SECONDS / seconds(run))), 1, cpu) for name, run in runs.items()}
    return {name: timing.median / 1e3 for name, timing in race(chains, rounds, cpu).items()}


def candidates(linear: Any, weight: Any, inputs: Any) -> dict[str, Callable[[], object]]:
    from torch.nn.functional import linear as multiply

    from vlmquant.kernels import words
    from vlmquant.kernels.reference import round_inputs

    on_disk, dense, form = words.hold(weight), weight.dequantize(inputs.dtype), linear.form

    def per_call() -> object:
        rounded = round_inputs(inputs, form.inputs, form.input_scale)
        return multiply(rounded, words.release(on_disk, form).dequantize(inputs.dtype))

    return {"packed": lambda: linear(inputs), "per_call": per_call, "dense": lambda: multiply(inputs, dense)}


def measure(rounds: int, shapes: Sequence[str], schemes: Sequence[str]) -> list[dict[str, Any]]:
    import torch

    from vlmquant.algorithms.rtn import quantize_weight
    from vlmquant.linear import QuantLinear
    from vlmquant.recipe import SHORT_SCHEMES

    found = []
    for shape_name, scheme, dtype in itertools.product(shapes, schemes, DTYPES):
        shape = SHAPES[shape_name]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        weight = quantize_weight(values, grid_of(SHORT_SCHEMES[scheme], values.shape[1], torch.bfloat16).fitted(values))
        linear = QuantLinear(weight, SHORT_SCHEMES[scheme], None, dtype=getattr(torch, dtype))
        row = {"shape": shape_name, "scheme": scheme, "dtype": dtype, "layout": linear.layout}
        for tokens in TOKENS:
            inputs = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(linear.dtype)
            found.append({**row, "tokens": tokens, **compare(candidates(linear, weight, inputs), rounds)})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def to_markdown(result: dict[str, Any]) -> str:
    rows, machine = result["rows"], result["environment"]
    slower = [row for row in rows if row["packed"] > row["per_call"]]
    lines = [
        f"Measured {result['date']} by `{result['command']}`: {machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}. Milliseconds, medians of {result['rounds']} rounds.",
        f"Slower than dequantizing at every call: {len(slower)} of {len(rows)} rows.",
        "Largest time as a multiple of dense's, by scheme, for 256 tokens and more, in bfloat16 and float32: "
        + "; ".join(
            f"{scheme} {', '.join(_largest(rows, scheme, dtype) for dtype in DTYPES[:2])}"
            for scheme in dict.fromkeys(row["scheme"] for row in rows)
        )
        + ".",
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        height, width = SHAPES[shape]
        head = "".join(f" {tokens} | |" for tokens in TOKENS)
        lines += ["", f"{height} x {width}, packed and (dense) by tokens:", "", f"| scheme | dtype | layout |{head}"]
        lines += ["|---|---|---|" + "---:|---:|" * len(TOKENS)]
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            for dtype in DTYPES:
                chosen = [row for row in rows if (row["shape"], row["scheme"], row["dtype"]) == (shape, scheme, dtype)]
                cells = "".join(f" {row['packed']:.2f} | ({row['dense']:.2f}) |" for row in chosen)
                lines.append(f"| {scheme} | {dtype} | {chosen[0]['layout']} |{cells}")
    return "\n".join(lines) + "\n"


def _largest(rows: list[dict[str, Any]], scheme: str, dtype: str) -> str:
    chosen = [row for row in rows if (row["scheme"], row["dtype"]) == (scheme, dtype) and row["tokens"] >= 256]
    return f"{max(row['packed'] / row['dense'] for row in chosen):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", choices=sorted(ISA))
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    run_with(cpu_environment(os.environ) | ISA.get(arguments.isa, {}))
    from vlmquant.threads import set_threads

    set_threads(arguments.threads)
    rows = measure(arguments.rounds, arguments.shapes, arguments.schemes)
    result = {**provenance(), "rounds": arguments.rounds, "rows": rows}
    out = arguments.out or RESULTS / ("cpu_layouts" + (f"_{arguments.isa}" if arguments.isa else ""))
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(to_markdown(result))
    print(to_markdown(result))


if __name__ == "__main__":
    main()
