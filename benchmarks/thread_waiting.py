"""What it costs how OpenMP's threads wait for each other: seconds to the first token, alone and beside another.

    python benchmarks/thread_waiting.py MODEL --data SET [--samples N] [--rounds N] [--passes N] [--threads N]

Ways are `sleep` (at once), `ours` (vlmquant.threads), and `torch's` (nothing said to it). Each is measured in processes
of its own: one alone, and two at the same time, which have the machine's cores twice. Ways take turns; medians over the
samples, and over rounds and processes. Writes benchmarks/results/thread_waiting.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from provenance import provenance

from vlmquant.threads import WAITING, cpu_environment, set_threads

RESULTS = Path(__file__).parent / "results" / "thread_waiting"
WAYS = {"sleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "ours": WAITING, "torch's": {}}
TOGETHER = (1, 2)
"""Processes at the same time."""


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds of wall and CPU time to the first token."""
    from vlmquant.calibration.encode import Encoder
    from vlmquant.calibration.processor import load_processor
    from vlmquant.calibration.sets import load_set
    from vlmquant.evaluation.passes import time_decoding
    from vlmquant.loading import load_model

    set_threads(arguments.threads)
    model, encoder = load_model(arguments.model), Encoder(load_processor(arguments.model))
    samples = [sample for sample in load_set(arguments.data).samples if sample.images][: arguments.samples]
    taken: list[float] = []
    cpu = 0.0
    for number in range(arguments.passes + 1):
        before = time.process_time()
        seconds = [time_decoding(model, encoder, sample, tokens=2)[0] for sample in samples]
        if number:  # kernels are chosen during the first
            taken += seconds
            cpu += time.process_time() - before
    return {"first_token": statistics.median(taken), "cpu": cpu / len(taken)}


def run(way: str, count: int) -> list[dict[str, float]]:
    own = {name: value for name, value in os.environ.items() if name not in WAITING} | WAYS[way]
    environment = cpu_environment(own) if way != "torch's" else own
    command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(count)]
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise SystemExit(process.returncode)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    rows: list[dict[str, Any]] = [
        {"way": way, "processes": count, "round": number, **found}
        for number in range(arguments.rounds)
        for count in TOGETHER
        for way in WAYS
        for found in run(way, count)
    ]
    result = {**provenance(), "ways": WAYS, "rows": rows}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# How OpenMP's threads wait for each other",
        "",
        f"`{result['command']}`, {result['date']}, {result['environment']['cpu']}, "
        f"{result['environment']['threads']} threads a process. Milliseconds: medians (least to most).",
        "",
        "| threads | processes | to the first token | CPU time of a sample |",
        "|---|---:|---:|---:|",
    ]
    for count in TOGETHER:
        for way in WAYS:
            mine = [row for row in rows if (row["way"], row["processes"]) == (way, count)]
            lines.append(f"| {way} | {count} | {_span(mine, 'first_token')} | {_span(mine, 'cpu')} |")
    lines += [
        "",
        *(f"{way}: `{' '.join(f'{k}={v}' for k, v in said.items()) or 'unset'}`" for way, said in WAYS.items()),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _span(rows: list[dict[str, Any]], key: str) -> str:
    found = [1e3 * row[key] for row in rows]
    return f"{statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f})"


if __name__ == "__main__":
    main()
