"""Seconds that `vlmquant eval` takes, of this checkout and of an older one, in turns.

    python benchmarks/eval_seconds.py OTHER MODEL --reference DIR --data SET [--limit N] [--rounds N] [-- OPTION ...]

OTHER is a checkout whose packages are those of this environment; what stands after -- goes to both. Each run is a
process of its own. Besides the seconds, the perplexity that either found.
Writes benchmarks/results/eval_seconds.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

RESULTS = Path(__file__).parent / "results" / "eval_seconds"
HERE = Path(__file__).parents[1]


def revision(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %ad", "--date=short"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def run(checkout: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "vlmquant", "eval", arguments.model, "--reference", arguments.reference]
        command += ["--data", arguments.data, "--limit", arguments.limit, "--out", report, *arguments.options]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        start = time.perf_counter()
        subprocess.run(
            [str(word) for word in command], check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        found = json.loads(report.read_text())
    perplexity = _first(found, "perplexity")
    return {"seconds": seconds, "perplexity": perplexity["point"]}


def _first(found: Any, key: str) -> Any:
    """The first value of that key, wherever the report of that day had it."""
    if isinstance(found, dict):
        if key in found:
            return found[key]
        found = list(found.values())
    values = (_first(value, key) for value in found) if isinstance(found, list) else ()
    return next((value for value in values if value is not None), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    checkouts = {"then": arguments.other.resolve(), "now": HERE}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(arguments.rounds):
        for name, checkout in checkouts.items():
            rows[name].append(run(checkout, arguments))
            print(name, rows[name][-1], file=sys.stderr, flush=True)
    result = {**provenance(), "revisions": {name: revision(one) for name, one in checkouts.items()}, "rows": rows}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(rows["then"], rows["now"], strict=True)]
    lines = [
        f"# Seconds of `vlmquant eval`, {arguments.limit} samples",
        "",
        f"`{result['command']}`, {result['date']}, {result['environment']['cpu']}, "
        f"{result['environment']['threads']} threads; runs in turns. Now {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f}).",
        "",
        "| code | seconds | perplexity |",
        "|---|---:|---:|",
    ]
    for name, found in rows.items():
        seconds = ", ".join(f"{one['seconds']:.1f}" for one in found)
        lines.append(f"| {name} ({result['revisions'][name]}) | {seconds} | {found[0]['perplexity']:.3f} |")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
