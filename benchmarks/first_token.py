"""Seconds to the first token of a packed model against the original, in one process and in turns, sample by sample.

    python benchmarks/first_token.py MODEL --original DIR --data SET [--samples N] [--rounds N] [--dtype NAME]

What the machine does meanwhile meets both, so that a few percent can be told, where processes of their own (as
packed_generation.py has them) differ by more. Writes benchmarks/results/first_token.{json,md}.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from provenance import provenance, run_with

from vlmquant.threads import cpu_environment, set_threads

RESULTS = Path(__file__).parent / "results" / "first_token"


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from vlmquant.calibration.encode import Encoder
    from vlmquant.calibration.processor import load_processor
    from vlmquant.calibration.sets import load_set
    from vlmquant.evaluation.passes import time_decoding
    from vlmquant.loading import load_model

    set_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    models = {
        "original": load_model(arguments.original, dtype=dtype),
        "packed": load_model(arguments.model, dtype=dtype),
    }
    encoder = Encoder(load_processor(arguments.original))
    samples = [sample for sample in load_set(arguments.data).samples if sample.images][: arguments.samples]
    rows = []
    for number in range(arguments.rounds + 1):
        for place, sample in enumerate(samples):
            taken = {name: time_decoding(model, encoder, sample, tokens=2)[0] for name, model in models.items()}
            if number:  # kernels are chosen during the first
                rows.append({"round": number, "sample": place, **taken})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    run_with(cpu_environment(os.environ))
    rows = measure(arguments)
    result = {**provenance(), "rows": rows}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    quarters = statistics.quantiles((row["packed"] / row["original"] for row in rows), n=4)
    medians = {name: 1e3 * statistics.median(row[name] for row in rows) for name in ("original", "packed")}
    text = (
        "# First token of a packed model, against the original's\n\n"
        f"`{result['command']}`, {result['date']}, {result['environment']['cpu']}, "
        f"{result['environment']['threads']} threads, {arguments.dtype}.\n\n"
        "| original, ms | packed, ms | packed by original, sample by sample: median (half of them) |\n"
        "|---:|---:|---:|\n"
        f"| {medians['original']:.1f} | {medians['packed']:.1f} "
        f"| {quarters[1]:.3f} ({quarters[0]:.3f} to {quarters[2]:.3f}) |\n"
    )
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
