"""Every shipped recipe on one model: quantize, score against the unquantized model, one table.

    python benchmarks/reference.py MODEL --calibration SET --test SET [--recipes mixed rtn-w4 ...] [--work DIR]

Each recipe is quantized by the `vlmquant quantize` command in a process of its own, so CPU time and peak memory are
that run's; then one `vlmquant compare` scores them all on the same samples. Writes
benchmarks/results/reference.{json,md,html} and prints the table. Outputs in the work folder are used again if they
are complete, so the script may be stopped and restarted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import command, provenance

from vlmquant.calibration.sets import load_set
from vlmquant.cli import parse_counts
from vlmquant.evaluation.metrics import kl_difference
from vlmquant.evaluation.settings import Settings
from vlmquant.pipeline import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, evaluate
from vlmquant.recipe import shipped
from vlmquant.report.data import Report, build_report, read_json, write_json
from vlmquant.report.html import to_html
from vlmquant.report.table import compare_rows, markdown_table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CALIBRATION_STRATA = "caption=96,vqa=16,object=16"
TEST_STRATA = "caption=80,vqa=60,object=60"
RECIPES = [*sorted(path.stem for path in shipped("recipes").glob("*.yaml")), str(HERE / "int8-vision.yaml")]
PAIRS = (
    ("gptq-w4", "rtn-w4"),
    ("awq-w4", "rtn-w4"),
    ("w3", "rtn-w3"),
    ("awq-w3", "rtn-w3"),
    ("mixed", "gptq-w4"),
    ("nvfp4a16-gptq", "int4-g32-gptq"),
    ("nvfp4a16-gptq", "nvfp4a16-rtn"),
    ("nvfp4a16-search", "nvfp4a16-rtn"),
    ("mxfp4a16-gptq", "mxfp4a16-rtn"),
    ("int8", "fp8-dynamic"),
)
"""Recipes whose KL is compared sample by sample."""


def quantize(model: Path, recipe: str, calibration: Path, out: Path, *, strata: str) -> dict[str, Any]:
    """Run the command; what it says of itself, as data."""
    log = out.with_suffix(".quantize.json")
    if not (out / "vlmquant.json").is_file() or not log.is_file():
        words = ["quantize", str(model), "--recipe", recipe, "--calibration", str(calibration), "--samples", strata]
        done = subprocess.run(
            [sys.executable, "-m", "vlmquant", *words, "--out", str(out), "--force", "--json"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        log.write_text(done.stdout)
    result: dict[str, Any] = json.loads(log.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names of shipped recipes, or files")
    parser.add_argument("--calibration-strata", default=CALIBRATION_STRATA)
    parser.add_argument("--test-strata", default=TEST_STRATA)
    parser.add_argument("--wrong-image", action="store_true", help="also score with other samples' images")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vlmquant-reference")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "reference")
    parser.add_argument("--part", help="only measure these recipes, for a run that joins what several have measured")
    parser.add_argument("--join", nargs="+", help="names of parts, instead of measuring")
    parser.add_argument("--speed-tokens", type=int, default=Settings().speed_tokens)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    outputs, runs = [], {}
    for given in arguments.recipes:
        recipe = Path(given).stem
        out = arguments.work / recipe
        done = quantize(arguments.model, given, arguments.calibration, out, strata=arguments.calibration_strata)
        runs[recipe] = {
            key: done[key]
            for key in ("user_cpu_seconds", "seconds", "peak_bytes", "bytes_after", "bits_per_weight", "compute_dtype")
        }
        outputs.append(out)
        print(recipe, runs[recipe], file=sys.stderr, flush=True)
    strata = parse_counts(arguments.test_strata)
    if arguments.join:
        parts = [read_json(arguments.work / f"report-{name}.json") for name in arguments.join]
        report = joined(parts)
    else:
        report = evaluate(
            arguments.model,
            outputs,
            arguments.test,
            strata=strata,
            settings=Settings(
                dtype=arguments.dtype, wrong_image=arguments.wrong_image, speed_tokens=arguments.speed_tokens
            ),
            command=tuple(command()),
        )
    if arguments.part:
        write_json(report, arguments.work / f"report-{arguments.part}.json")
        return
    work = arguments.work / "report.json"
    write_json(report, work)
    arguments.work.joinpath("report.html").write_text(
        to_html(report, samples=load_set(arguments.test).samples), encoding="utf-8"
    )
    result = {
        **provenance(),
        "calibration_strata": arguments.calibration_strata,
        "test_strata": strata,
        "evaluation_sha256": report.hashes,
        "quantize": runs,
        "rows": compare_rows(report),
        "kl_differences": kl_differences(report),
        "strata": {
            run.label: {
                stratum: {metric: _estimate(value) for metric, value in metrics.items()}
                for stratum, metrics in summary.items()
            }
            for run, summary in zip(report.runs, report.summaries, strict=True)
        },
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"Measured {result['date']} by `{result['command']}`; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "",
        *markdown_table(report),
        "",
        "| recipe | quantize, user CPU s | wall s | peak MiB | bits per weight |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {recipe} | {run['user_cpu_seconds']} | {run['seconds']} | {run['peak_bytes'] / 2**20:.0f} "
            f"| {run['bits_per_weight']:.2f} |"
            for recipe, run in runs.items()
        ),
        "",
        "| KL of | less that of | difference, nats a token (paired 95 % interval) |",
        "|---|---|---:|",
        *(
            f"| {pair['of']} | {pair['less']} | {point:.4f} ({low:.4f} to {high:.4f}) |"
            for pair in result["kl_differences"]
            for point, low, high, _ in [pair["difference"]]
        ),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def joined(parts: list[Report]) -> Report:
    """The candidates of several reports on the same samples, which scored the reference alike."""
    first = parts[0]
    for part in parts:
        if part.hashes != first.hashes or [one.nll for one in part.reference.samples] != [
            one.nll for one in first.reference.samples
        ]:
            raise SystemExit("the parts are of different samples, or of another reference")
    return build_report(
        first.reference,
        [run for part in parts for run in part.candidates],
        command=tuple(command()),
        hashes=first.hashes,
        seed=BOOTSTRAP_SEED,
        resamples=BOOTSTRAP_RESAMPLES,
    )


def kl_differences(report: Report) -> list[dict[str, Any]]:
    """The KL of one recipe less that of another, with a paired interval, for every one of PAIRS that was measured."""
    runs = {run.label: run for run in report.candidates}
    return [
        {
            "of": one,
            "less": other,
            "difference": _estimate(
                kl_difference(runs[one], runs[other], seed=BOOTSTRAP_SEED, resamples=BOOTSTRAP_RESAMPLES)
            ),
        }
        for one, other in PAIRS
        if one in runs and other in runs
    ]


def _estimate(value: Any) -> list[float]:
    return [round(number, 6) for number in (value.point, value.low, value.high)] + [value.n]


if __name__ == "__main__":
    main()
