"""Memory and time of `quantize` against the size of a model, beside what was planned.

    python benchmarks/scale/run.py --work DIR [--sizes "0.1 GB" ...] [--limit 3GiB] [--out FILE]

Models of benchmarks/scale/models.py, calibrated on the demo's set. Each size is quantized by `mixed` in a process of
its own, with all the memory that it wants; the largest once more under a hard limit of its address space (as
`ulimit -v` sets it) with the same --memory-limit, and both must write the same weights. The table ends with what
budget.predict says of models of which only the headers exist, for SAMPLES samples of TOKENS tokens.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance
from scale.models import CALIBRATION, LARGE, SHAPES, build, headers_only

from vlmquant.budget import WAYS, predict
from vlmquant.cli import parse_bytes
from vlmquant.pipeline import BATCH_SIZE, plan_model
from vlmquant.recipe import load_recipe
from vlmquant.stream import Footprint, Place

RESULTS = Path(__file__).parents[1] / "results"


def digest(out: Path) -> str:
    """Of all weights, in the order of their files."""
    whole = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def quantize(model: Path, out: Path, *, recipe: str, limit: int | None) -> dict[str, Any]:
    words = ["quantize", str(model), "-r", recipe, "--calibration", str(CALIBRATION), "-o", str(out), "--json"]
    if limit is not None:
        words += ["--memory-limit", f"{limit}B"]

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "vlmquant", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=confine,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = json.loads(done.stdout)
    return {
        "model_bytes": said["bytes_before"],
        "passes": said["planned"]["passes"],
        "planned_peak_bytes": said["planned"]["peak_bytes"],
        "peak_bytes": said["peak_bytes"],
        "planned_seconds": said["planned"]["seconds"],
        "seconds": said["seconds"],
        "user_cpu_seconds": round(after.ru_utime - before.ru_utime, 1),
        "sha256": digest(out),
    }


SAMPLES, TOKENS, IMAGE_TOKENS = 128, 1200, 1000
"""Of the projection: tokens of a sample, and of its image in the vision encoder."""


def project(name: str, folder: Path, *, base: int) -> dict[str, Any]:
    """What is planned for a model as large as one that people have, by the way that keeps least."""
    components, plan = plan_model(headers_only(name, folder / "headers"), load_recipe("mixed"))
    dtype, found = torch.float32, {}
    for component, tokens in (("vision_encoder", IMAGE_TOKENS), ("language", TOKENS)):
        shapes = [one for one in components.linears if one.component == component]
        width = min(one.in_features for one in shapes)
        rows = SAMPLES * tokens
        found[component] = Place(rows, width, rows * width * dtype.itemsize, BATCH_SIZE * tokens)
    footprint = Footprint(found, SAMPLES * 3 * 1024 * 1024 * dtype.itemsize)
    ways = [predict(components, plan, footprint, base=base, dtype=dtype, passes=way) for way in WAYS]
    shutil.rmtree(folder / "headers")
    return {
        "before": plan.bytes_before,
        "after": plan.bytes_after,
        "kept": ways[0].peak_bytes,
        "rerun": ways[1].peak_bytes,
        "spilled": ways[2].peak_bytes,
        "hours": [round(second / 3600, 1) for second in ways[2].seconds],
    }


def row(name: str, found: dict[str, Any]) -> str:
    least, most = found["planned_seconds"]
    passes = found["passes"]
    way = ("rerun" if passes["rerun"] else "kept") + (", on disk" if passes["spill"] else "")
    off = found["planned_peak_bytes"] / found["peak_bytes"] - 1
    return (
        f"| {name} | {found['model_bytes'] / 1e9:.2f} | {way} | {found['planned_peak_bytes'] / 2**20:.0f} "
        f"| {found['peak_bytes'] / 2**20:.0f} | {off:+.0%} | {least:.0f} to {most:.0f} | {found['seconds']:.0f} "
        f"| {found['user_cpu_seconds']:.0f} | {found['user_cpu_seconds'] / found['model_bytes'] * 1e9:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--limit", default="3GiB", help="of the largest model's second run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    saved = arguments.out.with_suffix(".json")
    results: dict[str, Any] = {**provenance(), "threads": arguments.threads, "recipe": arguments.recipe, "runs": {}}
    for name in arguments.sizes:
        model = build(arguments.work / name.replace(" ", ""), SHAPES[name])
        limits = [None, parse_bytes(arguments.limit, "--limit")] if name == arguments.sizes[-1] else [None]
        for limit in limits:
            label = name if limit is None else f"{name}, {arguments.limit} of address space"
            found = quantize(model, arguments.work / "out", recipe=arguments.recipe, limit=limit)
            results["runs"][label] = found
            print(row(label, found), file=sys.stderr, flush=True)
            saved.write_text(json.dumps(results, indent=1) + "\n")
        if len(limits) == 2:
            two = [results["runs"][label]["sha256"] for label in list(results["runs"])[-2:]]
            results["same_weights"] = two[0] == two[1]
        shutil.rmtree(model)
    saved.write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        f"Measured {results['date']} by `{results['command']}`; {arguments.threads} thread(s); "
        + ", ".join(f"{package} {number}" for package, number in results["versions"].items()),
        "",
        "| model | GB | passes | planned MiB | peak MiB | off | planned s | s | user CPU s | per GB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        *(row(name, found) for name, found in results["runs"].items()),
    ]
    base = min(found["planned_peak_bytes"] for found in results["runs"].values())
    results["projection"] = {name: project(name, arguments.work, base=base) for name in LARGE}
    saved.write_text(json.dumps(results, indent=1) + "\n")
    if "same_weights" in results:
        lines += ["", f"With and without the limit: {'the same' if results['same_weights'] else 'DIFFERENT'} weights."]
    lines += [
        "",
        f"Planned, not measured: {SAMPLES} samples of {TOKENS} tokens, products in float32 on this machine's "
        f"{arguments.threads} thread(s).",
        "",
        "| model | GB before | after | all kept, GiB | rerun | rerun, on disk | hours, rerun on disk |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {one['before'] / 1e9:.0f} | {one['after'] / 1e9:.0f} | {one['kept'] / 2**30:.1f} "
            f"| {one['rerun'] / 2**30:.1f} | {one['spilled'] / 2**30:.1f} | {one['hours'][0]} to {one['hours'][1]} |"
            for name, one in results["projection"].items()
        ),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
