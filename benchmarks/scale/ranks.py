"""One process against several that share a quantization: seconds, user CPU, memory, and whether the codes are equal.

    python benchmarks/scale/ranks.py [--model DIR] [--recipe mixed] [--processes 2] [--rounds 3]

Every run is a `vlmquant quantize` of its own, of one thread each, so that the cores of a small machine suffice; runs of
one and of several take turns. Seconds are of the work without the start of Python, and of all with it; the medians of
the rounds are told, and the load of the machine beside them, since others may use it. User CPU is of all processes
together. Writes benchmarks/results/ranks_<model>.{json,md}.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CALIBRATION = ROOT / "vlmquant" / "demo" / "calibration"
MEBIBYTE = 2**20


def start(processes: int, words: list[str]) -> list[subprocess.Popen[str]]:
    """The command in so many processes, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(processes)
    ]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "vlmquant", *words],
            env=common | ({key: str(value) for key, value in own.items()} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for own in ranks
    ]


def run(processes: int, model: Path, options: list[str], out: Path) -> dict[str, Any]:
    words = ["quantize", str(model), *options, "-o", str(out), "--json"]
    load, started, cpu = os.getloadavg()[0], time.monotonic(), children_cpu()
    children = start(processes, words)
    told = [child.communicate()[0] for child in children]
    if codes := [child.returncode for child in children if child.returncode]:
        raise SystemExit(f"{processes} processes: exit codes {codes}")
    done = json.loads(told[0])
    return {
        "processes": processes,
        "seconds": done["seconds"],
        "seconds_with_start": round(time.monotonic() - started, 1),
        "user_cpu_seconds": done["user_cpu_seconds"],
        "user_cpu_seconds_with_start": round(children_cpu() - cpu, 1),
        "peak_mebibytes_of_the_first": round(done["peak_bytes"] / MEBIBYTE),
        "load_before": round(load, 2),
    }


def children_cpu() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How many of the numbers stored in two checkpoints are equal, and whether all bytes of their weights are."""
    equal = total = 0
    bytes_equal = True
    for file in sorted(one.glob("*.safetensors")):
        bytes_equal &= file.read_bytes() == (other / file.name).read_bytes()
        left, right = load_file(file), load_file(other / file.name)
        equal += sum(int(torch.eq(left[name], right[name]).sum()) for name in left)
        total += sum(value.numel() for value in left.values())
    return {"numbers": total, "equal_share": equal / total, "same_bytes": bytes_equal}


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "vlmquant" / "demo" / "model")
    parser.add_argument("--name", help="of the results; else demo, or the model's folder")
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--samples", help="As in quantize.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    name = wanted.name or ("demo" if wanted.model == parser.get_default("model") else wanted.model.resolve().name)
    options = ["-r", wanted.recipe, "--calibration", str(wanted.calibration)]
    options += ["--samples", wanted.samples] if wanted.samples else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(wanted.rounds):
            for processes in (1, wanted.processes):
                out = Path(scratch) / f"{processes}-{number}"
                rows.append(run(processes, wanted.model, options, out))
                print(rows[-1], file=sys.stderr)
        compared = compare(Path(scratch) / "1-0", Path(scratch) / f"{wanted.processes}-0")
    medians = [median([row for row in rows if row["processes"] == count]) for count in (1, wanted.processes)]
    result = provenance() | {
        "model": name,
        "recipe": wanted.recipe,
        "cores": os.cpu_count(),
        "runs": rows,
        "medians": medians,
        "speedup": round(medians[0]["seconds"] / medians[1]["seconds"], 2),
        "codes": compared,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"ranks_{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(to_markdown(result))
    print(to_markdown(result))


def to_markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# {result['model']}, recipe {result['recipe']}: one process against several",
        "",
        f"`{result['command']}`, {result['date']}, {result['cores']} cores, one thread in each process; medians of "
        f"{len(result['runs']) // 2} runs each, which took turns.",
        "",
        "| processes | seconds | with the start of Python | user CPU s | with the start | MiB of the first | load |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['processes']:.0f} | {row['seconds']:.1f} | {row['seconds_with_start']:.1f} | "
        f"{row['user_cpu_seconds']:.1f} | {row['user_cpu_seconds_with_start']:.1f} | "
        f"{row['peak_mebibytes_of_the_first']:.0f} | {row['load_before']:.1f} |"
        for row in result["medians"]
    ]
    codes = result["codes"]
    lines += [
        "",
        f"{codes['equal_share']:.4%} of {codes['numbers']:,} stored numbers are equal"
        + ("; the files of weights are the same, byte by byte." if codes["same_bytes"] else "."),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
