"""What an FP8 KV cache costs: with scales from calibration, and with the scale 1 that engines take without any.

    OMP_NUM_THREADS=1 python benchmarks/kv_cache.py MODEL --calibration SET --test SET [--work DIR]

On the model itself: the recipe `mixed` with a scale for each head, with one for each layer, and without the cache.
Then on the same model with large keys: every k_proj of the language model is multiplied by 256 and every q_proj divided
by it, both exact in bfloat16, so that it computes the same with keys far beyond 448; its weights are kept. A recipe's
codes are the same with and without `kv_cache` (tests/test_kv_cache.py), so each is quantized once, by head, and the
other caches are written from the maxima in its manifest; the difference of two KLs, sample by sample, is the cache's.
Writes benchmarks/results/kv_cache.{json,md} and prints the table.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from safetensors.torch import load_file, save_file

from vlmquant.checkpoint import read_manifest
from vlmquant.cli import parse_counts
from vlmquant.evaluation.metrics import EVERYTHING, kl_difference
from vlmquant.evaluation.settings import Settings
from vlmquant.grid import E4M3_MAX, rounded_up
from vlmquant.kvcache import LEAVES
from vlmquant.pipeline import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, evaluate, quantize
from vlmquant.recipe import Components, KvCacheSpec, Recipe, load_recipe
from vlmquant.report.data import Report

RESULTS = Path(__file__).parent / "results" / "kv_cache"
CALIBRATION_STRATA = "caption=96,vqa=16,object=16"
TEST_STRATA = "caption=60,vqa=30,object=30"
FACTOR = 256.0
"""A power of two, so that the model with large keys is the same model."""
PROJECTION = re.compile(r"language_model\..*\.self_attn\.(q|k)_proj\.(weight|bias)$")


def enlarge_keys(model: Path, out: Path, factor: float) -> None:
    """Write the model whose keys are `factor` times as large, and whose queries as many times smaller."""
    shutil.copytree(model, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if found := PROJECTION.search(name):
                tensors[name] = value * factor if found[1] == "k" else value / factor
        save_file(tensors, file, {"format": "pt"})


def with_cache(checkpoint: Path, out: Path, cache: str) -> Path:
    """Write a checkpoint, made with a scale for each head, with another cache.

    cache: tensor, for a scale for each layer; "one" as an engine reads it that finds none; none.
    """
    if out.is_dir():
        return out
    maxima = read_manifest(checkpoint)["kv_cache"]["maxima"]
    shutil.copytree(checkpoint, out)
    (out / "vlmquant.json").unlink()  # it is no longer what that file says
    config = json.loads((out / "config.json").read_text())
    scheme = config["quantization_config"]["kv_cache_scheme"] | {"strategy": "tensor"}
    config["quantization_config"]["kv_cache_scheme"] = None if cache == "none" else scheme
    (out / "config.json").write_text(json.dumps(config))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for layer in maxima.values():
            for kind, leaf in LEAVES.items():
                name = f"{layer['disk']}.{leaf}"
                if name not in tensors:
                    continue
                scale = tensors.pop(name)
                if cache == "tensor":
                    whole = torch.tensor([max(layer[kind])], dtype=torch.float64)
                    tensors[name] = rounded_up(whole / E4M3_MAX, scale.dtype)
                elif cache == "one":
                    tensors[name] = torch.ones(1, dtype=scale.dtype)
        save_file(tensors, file, {"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--calibration-strata", default=CALIBRATION_STRATA)
    parser.add_argument("--strata", default=TEST_STRATA)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vlmquant-kv-cache")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    drawn = {"set": str(arguments.calibration), "strata": parse_counts(arguments.calibration_strata)}
    strata = parse_counts(arguments.strata)

    def by_head(model: Path, recipe: Recipe, name: str) -> Path:
        calibration = recipe.calibration.model_copy(update=drawn)
        cache = KvCacheSpec(dtype="fp8", strategy="head")
        recipe = recipe.model_copy(update={"name": name, "kv_cache": cache, "calibration": calibration})
        out: Path = arguments.work / name
        if not (out / "vlmquant.json").is_file():
            quantize(model, recipe, out, resume=True, dtype=torch.float32)
        return out

    large = arguments.work / "large-keys"
    if not large.is_dir():
        enlarge_keys(arguments.model, large, FACTOR)
    mixed = by_head(arguments.model, load_recipe("mixed"), "mixed-kv-head")
    kept = by_head(large, Recipe(name="kept", components=Components()), "large-keys-kv-head")
    own = [
        with_cache(mixed, arguments.work / "mixed", "none"),
        with_cache(mixed, arguments.work / "mixed-kv-tensor", "tensor"),
        mixed,
    ]
    enlarged = [
        with_cache(kept, arguments.work / "large-keys-kv-tensor", "tensor"),
        kept,
        with_cache(kept, arguments.work / "large-keys-kv-scale-1", "one"),
    ]
    settings = Settings(dtype="float32", generate=False, references_per_caption=1, speed_prompts=1, speed_tokens=2)
    reports = [
        evaluate(reference, models, arguments.test, strata=strata, settings=settings)
        for reference, models in ((arguments.model, own), (large, enlarged))
    ]
    result = {
        **provenance(),
        "calibration_strata": arguments.calibration_strata,
        "test_strata": strata,
        "factor": FACTOR,
        "rows": [row for report in reports for row in rows(report)],
        "caches": [cache_of(path) for path in (mixed, kept)],
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n".join(markdown(result)) + "\n"
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def rows(report: Report) -> list[dict[str, Any]]:
    """KL, its increase over the same weights without the cache, perplexity and flips of every model of a report."""
    runs = {run.label: run for run in report.candidates}
    found = []
    for run, summary in zip(report.runs, report.summaries, strict=True):
        metrics = {name: estimate(value) for name, value in summary[EVERYTHING].items()}
        increase = None
        if "-kv-" in run.label and (base := runs.get(run.label.partition("-kv-")[0])):
            increase = estimate(kl_difference(run, base, seed=BOOTSTRAP_SEED, resamples=BOOTSTRAP_RESAMPLES))
        found.append(
            {
                "model": run.label,
                **{name: metrics.get(name) for name in ("kl", "perplexity", "flip_rate")},
                "kl_increase": increase if increase or "-kv-" not in run.label else metrics.get("kl"),
            }
        )
    return found


def estimate(value: Any) -> list[float]:
    return [value.point, value.low, value.high]


def cache_of(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says of a checkpoint's cache, its maxima in short."""
    cache = read_manifest(checkpoint)["kv_cache"]
    largest = {kind: [max(layer[kind]) for layer in cache["maxima"].values()] for kind in LEAVES}
    return {"model": checkpoint.name, **{key: value for key, value in cache.items() if key != "maxima"}, **largest}


def spread(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def markdown(result: dict[str, Any]) -> list[str]:
    def cell(value: list[float] | None, digits: int) -> str:
        return "–" if value is None else f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"

    return [
        f"Measured {result['date']} by `{result['command']}`; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "",
        "| model | KL | of it the cache's | perplexity | flips, % |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {row['model']} | {cell(row['kl'], 5)} | {cell(row['kl_increase'], 5)} | {cell(row['perplexity'], 3)} "
            f"| {cell(row['flip_rate'] and [100 * one for one in row['flip_rate']], 2)} |"
            for row in result["rows"]
        ),
        "",
        "KL in nats an answer token, with 95 % intervals over images; the cache's is the paired difference to the same "
        f"weights without it. large-keys: keys {result['factor']:g} times as large, queries as many times smaller. "
        "scale-1: the scale that engines take without any.",
        "",
        "| model | bytes a token, before | after | largest key of a layer | largest value of a layer |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {one['model']} | {one['bytes_per_token_before']:,} | {one['bytes_per_token_after']:,} "
            f"| {spread(one['keys'])} | {spread(one['values'])} |"
            for one in result["caches"]
        ),
    ]


if __name__ == "__main__":
    main()
