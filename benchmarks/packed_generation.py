"""Generation with packed weights against the same weights dequantized: same tokens? how fast? how much memory?

    python benchmarks/packed_generation.py MODEL --data SET [--original DIR] [--samples N] [--tokens N] [--dtype NAME]

MODEL is a directory that vlmquant wrote. Each variant runs in a process of its own: `packed` as `vlmquant.load` gives
it, `dequantized` with every packed linear replaced by an ordinary one of the same values (inputs still rounded
where the recipe says so), and `original` the unquantized model. Writes benchmarks/results/packed_generation.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from provenance import provenance

from vlmquant.threads import cpu_environment, set_threads

RESULTS = Path(__file__).parent / "results" / "packed_generation"
WARM_UP = 1
"""Samples that are generated and not counted: kernels are chosen during the first."""


def dequantize_linears(model: Any, dtype: Any) -> None:
    """Replace every packed linear by an ordinary one that holds what its codes mean."""
    import torch

    from vlmquant.kernels.reference import round_inputs
    from vlmquant.linear import QuantLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            dense = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            dense.weight = torch.nn.Parameter(module.dequantize(dtype), requires_grad=False)
            dense.bias = None if module.bias is None else torch.nn.Parameter(module.bias.clone(), requires_grad=False)
            if module.form.inputs != "none":
                rounding = partial(round_inputs, kind=module.form.inputs, scale=module.form.input_scale)
                dense.register_forward_pre_hook(lambda _, inputs, rounding=rounding: (rounding(inputs[0]), *inputs[1:]))
            model.set_submodule(name, dense)


def forget_peak() -> None:
    """Let the peak of resident memory begin anew, so that it is that of generating and not of loading (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate in this process: the greedy answers, their speed, and the memory that the model and its passes take."""
    import psutil
    import torch

    from vlmquant.calibration.encode import Encoder
    from vlmquant.calibration.processor import load_processor
    from vlmquant.calibration.sets import load_set
    from vlmquant.evaluation.environment import peak_resident_bytes
    from vlmquant.evaluation.passes import generate, measure_rows, time_decoding
    from vlmquant.loading import load_model

    set_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    directory = arguments.original if variant == "original" else arguments.model
    process = psutil.Process()
    before = process.memory_info().rss
    model = load_model(directory, dtype=dtype)
    if variant == "dequantized":
        dequantize_linears(model, dtype)
    forget_peak()
    encoder = Encoder(load_processor(directory))
    pictured = [sample for sample in load_set(arguments.data).samples if sample.images]
    chosen = pictured[:: max(1, len(pictured) // arguments.samples)][: arguments.samples]
    timed = [time_decoding(model, encoder, sample, tokens=arguments.tokens) for sample in [*chosen[:WARM_UP], *chosen]]
    first, speeds = zip(*timed[WARM_UP:], strict=True)
    rows = measure_rows([(sample, None) for sample in chosen], encoder)
    return {
        "answers": [generate(model, encoder, [row], max_new_tokens=arguments.tokens)[0] for row in rows],
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "first_token_seconds": statistics.median(first),
        "peak_bytes": peak_resident_bytes() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="variants take turns so many times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments)))
        return
    variants = ["packed", "dequantized", *(["original"] if arguments.original else [])]
    rounds: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for _ in range(arguments.rounds):
        for variant in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            environment = cpu_environment(os.environ)
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True)
            rounds[variant].append(json.loads(done.stdout.splitlines()[-1]))
    answers = {variant: found[0]["answers"] for variant, found in rounds.items()}
    pairs = list(zip(answers["packed"], answers["dequantized"], strict=True))
    result = {
        **provenance(),
        "equal_answers": sum(one == other for one, other in pairs),
        "answers": len(pairs),
        "different": [pair for pair in pairs if pair[0] != pair[1]],
        "rounds": {
            variant: [{key: value for key, value in one.items() if key != "answers"} for one in found]
            for variant, found in rounds.items()
        },
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"Measured {result['date']} by `{result['command']}`; medians of {arguments.rounds} rounds.",
        "Memory: the process's peak while it generates, less what it had before it loaded the model.",
        f"{result['equal_answers']} of {len(pairs)} greedy answers are equal, packed against dequantized.",
        "",
        "| weights | tokens/s (slowest to fastest round) | seconds to the first token (same) | peak memory, MiB |",
        "|---|---:|---:|---:|",
        *(_row(variant, found) for variant, found in rounds.items()),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _row(variant: str, found: list[dict[str, Any]]) -> str:
    speeds, first, peaks = (
        [one[key] for one in found] for key in ("tokens_per_second", "first_token_seconds", "peak_bytes")
    )
    return (
        f"| {variant} | {statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f}) "
        f"| {statistics.median(first):.3f} ({max(first):.3f} to {min(first):.3f}) "
        f"| {statistics.median(peaks) / 2**20:.0f} |"
    )


if __name__ == "__main__":
    main()
