"""`vlmquant quantize` on GPUs: one process on the CPU, one on a GPU, and one for each GPU there is, by torchrun.

    python benchmarks/gpu/quantize.py [--model DIR] [--recipe mixed] [--dry-run]

NOT MEASURED YET: no machine with a GPU was at hand when it was written. What of this ran is its dry run, which takes
the CPU (and Gloo) for every device. So nothing is known of NCCL: `ranks` sends what lies on a GPU by it, when each rank
has a GPU of its own.

For each way to run it: seconds, the peak of the process's memory and the share of stored numbers that are equal to one
GPU's, which all GPUs must share to LEAST_EQUAL; the CPU's are told beside them, as its float32 sums are others. With
one GPU, two processes share it over Gloo. Writes benchmarks/results/gpu_quantize_<device>.json; exit code 1 where codes
differ. Needs a CUDA build of torch and vlmquant's dependencies; a few minutes for the demo model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance
from scale.ranks import CALIBRATION, RESULTS, ROOT, compare

LEAST_EQUAL = 0.9999
LIMIT = 1800
"""Seconds that one run may take."""


def quantize(processes: int, device: str, model: Path, recipe: str, calibration: Path, out: Path) -> dict[str, Any]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["quantize", model, "-r", recipe, "--calibration", calibration, "--device", device, "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [*start, "-m", "vlmquant", *map(str, words), "-o", str(out), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        raise SystemExit(f"{processes} on {device}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    told = json.loads(done.stdout)
    return {
        "processes": processes,
        "device": device,
        "seconds": told["seconds"],
        "seconds_with_start": round(time.monotonic() - started, 1),
        "user_cpu_seconds": told["user_cpu_seconds"],
        "peak_bytes": told["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "vlmquant" / "demo" / "model")
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--dry-run", action="store_true", help="The CPU for every device; writes no results.")
    wanted = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not (gpus or wanted.dry_run):
        parser.error("torch finds no GPU here; --dry-run tries the script on the CPU")
    one = "cpu" if wanted.dry_run else "cuda:0"
    ways = [(1, "cpu"), (1, one), (2, one) if gpus < 2 else (gpus, "cuda")]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(place) for place in range(len(ways))]
        for (processes, device), out in zip(ways, folders, strict=True):
            row = quantize(processes, device, wanted.model, wanted.recipe, wanted.calibration, out)
            rows.append(
                row | {"of_one_gpu": compare(folders[1], out) if out.exists() and folders[1].exists() else None}
            )
            print(rows[-1], file=sys.stderr)
        rows[0]["of_one_gpu"] = compare(folders[1], folders[0])
    name = "cpu" if wanted.dry_run else torch.cuda.get_device_name().replace(" ", "_")
    result = provenance() | {"device": name, "gpus": gpus, "recipe": wanted.recipe, "runs": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if not wanted.dry_run:
        (RESULTS / f"gpu_quantize_{name}.json").write_text(text + "\n")
    if rows[-1]["of_one_gpu"]["equal_share"] < LEAST_EQUAL:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
