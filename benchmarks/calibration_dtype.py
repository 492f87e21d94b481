"""What calibrating in bfloat16 instead of float32 costs, on samples of the calibration set that calibration left over.

    python benchmarks/calibration_dtype.py MODEL --calibration SET [--recipe mixed] [--seeds 0 1 2] [--held-out N]

For every seed of the calibration draw, the recipe is quantized in both dtypes and both are scored, in float32, against
the unquantized model on the same held-out samples. Writes benchmarks/results/calibration_dtype.{json,md}. This decides
`pipeline.calibration_dtype`; no test sample is looked at.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import image_hashes, load_set, pixel_sha256, write_set
from vlmquant.cli import parse_counts
from vlmquant.evaluation.metrics import kl_difference
from vlmquant.evaluation.settings import Settings
from vlmquant.pipeline import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, evaluate, quantize
from vlmquant.recipe import Recipe, load_recipe
from vlmquant.shards import dtype_name

RESULTS = Path(__file__).parent / "results" / "calibration_dtype"
DTYPES = (torch.float32, torch.bfloat16)


def hold_out(calibration: Path, recipes: list[Recipe], count: int, out: Path) -> None:
    """Write `count` samples, spread over the set, that no recipe is calibrated on and whose images none has seen."""
    whole = load_set(calibration)
    used = [sample for recipe in recipes for sample in choose_samples(whole, recipe.calibration).samples]
    ids, seen = {sample.id for sample in used}, image_hashes(used)
    left = [
        sample
        for sample in whole.samples
        if sample.id not in ids and sample.images and not any(pixel_sha256(path) in seen for path in sample.images)
    ]
    write_set(out, left[:: max(1, len(left) // count)][:count], {"of": calibration.name, "held_out": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--strata", default="caption=96,vqa=16,object=16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    drawn = {"set": str(arguments.calibration), "strata": parse_counts(arguments.strata)}
    recipes = [
        recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={**drawn, "seed": seed})})
        for seed in arguments.seeds
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "held-out"
        hold_out(arguments.calibration, recipes, arguments.held_out, data)
        for seed, one in zip(arguments.seeds, recipes, strict=True):
            names = [dtype_name(dtype) for dtype in DTYPES]
            made = [
                quantize(arguments.model, one, Path(scratch, f"{seed}-{name}"), dtype=dtype)
                for name, dtype in zip(names, DTYPES, strict=True)
            ]
            report = evaluate(
                arguments.model, [done.path for done in made], data, settings=Settings(dtype="float32", generate=False)
            )
            kl = [summary["all"]["kl"] for summary in report.summaries[1:]]
            exact, coarse = report.candidates
            difference = kl_difference(coarse, exact, seed=BOOTSTRAP_SEED, resamples=BOOTSTRAP_RESAMPLES)
            rows.append(
                {
                    "seed": seed,
                    "kl": {name: [value.point, value.low, value.high] for name, value in zip(names, kl, strict=True)},
                    "difference": [difference.point, difference.low, difference.high],
                    "user_cpu_seconds": {name: done.user_cpu_seconds for name, done in zip(names, made, strict=True)},
                }
            )
            print(rows[-1], flush=True)
    result = {**provenance(), "held_out": arguments.held_out, "rows": rows}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"Measured {result['date']} by `{result['command']}`: KL in nats a token, 95 % intervals; user CPU seconds.",
        "",
        "| seed of the draw | float32 | bfloat16 | bfloat16 - float32, paired | seconds, float32 / bfloat16 |",
        "|---:|---|---|---|---|",
        *(
            f"| {row['seed']} | {_shown(row['kl']['float32'])} | {_shown(row['kl']['bfloat16'])} "
            f"| {_shown(row['difference'])} "
            f"| {row['user_cpu_seconds']['float32']:.0f} / {row['user_cpu_seconds']['bfloat16']:.0f} |"
            for row in rows
        ),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _shown(estimate: list[float]) -> str:
    point, low, high = estimate
    return f"{point:.4f} ({low:.4f} to {high:.4f})"


if __name__ == "__main__":
    main()
