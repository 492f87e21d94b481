"""What an interruption costs: a run killed when half of its blocks are done and resumed, against one that is not.

    OMP_NUM_THREADS=1 python benchmarks/scale/resume.py --work DIR [--size "0.4 GB"] [--recipe mixed] [--rounds 3]

A model of benchmarks/scale/models.py. Runs take turns; user CPU seconds, with the start of Python, are told as medians.
Beyond the work of the block that was cut off, a resumed run starts, hashes the model, encodes the samples and walks
its calibration passes through the finished blocks again. Writes benchmarks/results/resume.{json,md}.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance
from scale.models import CALIBRATION, SHAPES, build

from vlmquant.checkpoint.journal import count_units
from vlmquant.checkpoint.place import work_of
from vlmquant.components import resolve_components

RESULTS = Path(__file__).parents[1] / "results" / "resume"


def children_cpu() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def start(model: Path, recipe: str, out: Path, *more: str) -> subprocess.Popen[bytes]:
    words = ["quantize", str(model), "-r", recipe, "--calibration", str(CALIBRATION), "-o", str(out), "-q", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "vlmquant", *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        sys.exit(f"quantize ended with {process.returncode}")


def digest(out: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        whole.update(file.read_bytes())
    return whole.hexdigest()


def uninterrupted(model: Path, recipe: str, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    before, begun = children_cpu(), time.monotonic()
    finish(start(model, recipe, out))
    return {"cpu": children_cpu() - before, "seconds": time.monotonic() - begun, "sha256": digest(out)}


def interrupted(model: Path, recipe: str, out: Path, *, units: int) -> dict[str, Any]:
    """Killed when so many units are in the journal."""
    shutil.rmtree(out, ignore_errors=True)
    before, begun = children_cpu(), time.monotonic()
    process = start(model, recipe, out)
    while process.poll() is None and not ((work := work_of(out)).is_dir() and count_units(work) >= units):
        time.sleep(0.05)
    process.kill()
    process.wait()
    done, cut = count_units(work_of(out)), children_cpu() - before
    finish(start(model, recipe, out, "--resume"))
    return {
        "cpu": children_cpu() - before,
        "until_the_kill": cut,
        "seconds": time.monotonic() - begun,
        "units": done,
        "sha256": digest(out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="0.4 GB", choices=list(SHAPES))
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model, out = build(arguments.work / "model", SHAPES[arguments.size]), arguments.work / "out"
    units = len(resolve_components(model).blocks) // 2 + 1  # and that of what lies outside blocks
    whole, cut = [], []
    for _ in range(arguments.rounds):
        whole.append(uninterrupted(model, arguments.recipe, out))
        cut.append(interrupted(model, arguments.recipe, out, units=units))
    plain, resumed = (statistics.median(run["cpu"] for run in runs) for runs in (whole, cut))
    same = len({run["sha256"] for run in (*whole, *cut)}) == 1
    results = {**provenance(), "size": arguments.size, "whole": whole, "interrupted": cut, "same_weights": same}
    RESULTS.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = (
        f"Measured {results['date']} by `{results['command']}`; vlmquant {results['versions']['vlmquant']}, torch "
        f"{results['versions']['torch']}; {arguments.rounds} rounds in turns, medians of user CPU seconds.\n\n"
        f"| model | uninterrupted | killed after {cut[0]['units']} units and resumed | more | the same weights |\n"
        "|---|---:|---:|---:|---|\n"
        f"| {arguments.size} | {plain:.1f} | {resumed:.1f} | {resumed / plain - 1:+.0%} | {'yes' if same else 'NO'} |\n"
    )
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
