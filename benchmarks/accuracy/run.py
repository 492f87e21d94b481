"""Loss of recipes over several draws of the calibration samples, on the same held-out samples: what decides a default.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/run.py MODEL --calibration SET --test SET --work DIR
        [--recipes NAME_OR_FILE ...] [--draws 0 1 2] [--polish SAMPLES] [--out FILE]
        [--strata TASK=N,...] [--test-strata TASK=N,...]

Each recipe is quantized once for each draw (the seed of the choice of samples), in a process of its own, and scored
teacher-forced in float32. Where no strata are given: by 96 captions, 16 vqa and 16 object samples, on 80 captions with
two references each, 60 vqa and 60 object samples; at effort high by four times as many as given. --polish: each is then
also polished, on so many samples of the set, and scored again; its time is that of polishing alone. Beside each stands
its difference to the first recipe: KL by KL on the same samples, all draws together. What is done is kept in DIR and
not done again; all checkpoints are scored at once, in the end. Writes benchmarks/results/accuracy.{json,md}.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance

from vlmquant.cli.words import parse_counts
from vlmquant.evaluation.settings import Settings
from vlmquant.pipeline import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, evaluate
from vlmquant.recipe import SAMPLES, load_recipe

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
CALIBRATION_STRATA = "caption=96,vqa=16,object=16"
TEST_STRATA = "caption=80,vqa=60,object=60"
RECIPES = tuple(
    str(Path(__file__).parent / "recipes" / f"{name}.yaml")
    for name in ("gptq-w4-plain", "gptq-w4-fast", "gptq-w4-default")
)
"""What was the default, and what is at both efforts."""


def quantize(model: Path, recipe: str, draw: int, out: Path, *, calibration: Path, strata: str) -> dict[str, Any]:
    """Seconds of user CPU and the peak of memory. strata: at effort high, so many times as many as it takes more."""
    wanted = load_recipe(recipe)
    times = SAMPLES[wanted.effort] // SAMPLES["default"]
    counts = {task: times * count for task, count in parse_counts(strata).items()}
    chosen = {"seed": draw, "samples": sum(counts.values()), "strata": counts}
    spec = wanted.calibration.model_copy(update=chosen)
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(wanted.model_copy(update={"calibration": spec}).model_dump(mode="json")))
    words = ["quantize", str(model), "-r", str(file), "--calibration", str(calibration), "-o", str(out)]
    return run_and_measure(words, {"notes", "bits_per_weight"})


def polish(model: Path, checkpoint: Path, samples: int, out: Path, *, calibration: Path) -> dict[str, Any]:
    words = ["polish", str(checkpoint), "--reference", str(model), "--samples", str(samples)]
    return run_and_measure([*words, "--calibration", str(calibration), "-o", str(out)], {"notes"})


def run_and_measure(words: list[str], kept: set[str]) -> dict[str, Any]:
    """A command of ours: what it says, of this, and what it used."""
    text, used = run_apart([sys.executable, "-m", "vlmquant", *words, "--json", "--force", "--device", "cpu"])
    said = json.loads(text)
    return {name: said[name] for name in kept} | used


def run_apart(words: list[str], *, cwd: Path | None = None) -> tuple[str, dict[str, Any]]:
    """A process of its own: what it prints, and its user CPU seconds and its peak."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd)
    assert done.stdout is not None
    text = done.stdout.read()
    _, status, used = os.wait4(done.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: ended with {os.waitstatus_to_exitcode(status)}")
    return text, {"user_cpu_seconds": round(used.ru_utime, 1), "peak_bytes": used.ru_maxrss * 1024}


def score(model: Path, candidates: list[Path], *, test: Path, strata: str) -> list[dict[str, Any]]:
    """Of each, by sample, and by task: nats, flips and tokens."""
    settings = Settings(generate=False, dtype="float32", threads=1)
    report = evaluate(model, candidates, test, strata=parse_counts(strata), settings=settings)
    reference = sum(one.nll for one in report.reference.samples)
    return [
        {
            "samples": [[one.task, one.kl, one.tokens, one.flips, one.nll, list(one.images)] for one in run.samples],
            "reference_nll": reference,
        }
        for run in report.candidates
    ]


def make(arguments: argparse.Namespace, recipe: str, draw: int) -> list[str]:
    """The checkpoints of a recipe, by name: as it writes it, and polished."""
    name, work = Path(recipe).stem, arguments.work
    steps: dict[str, Callable[[Path], dict[str, Any]]] = {
        name: lambda out: quantize(
            arguments.model, recipe, draw, out, calibration=arguments.calibration, strata=arguments.strata
        )
    }
    if samples := arguments.polish:
        first = work / f"{name}-{draw}"
        steps[f"{name} polished on {samples}"] = lambda out: polish(
            arguments.model, first, samples, out, calibration=arguments.calibration
        )
    for step, what in steps.items():
        make_once(work / f"{step}-{draw}", what)
    return list(steps)


def make_once(out: Path, what: Callable[[Path], dict[str, Any]]) -> None:
    """A checkpoint, and beside it what making it took, unless that is there."""
    made = out.with_name(f"{out.name}.made.json")
    if not made.is_file():
        made.write_text(json.dumps(what(out)))


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By name, what was made of each draw and what it loses; all that is new is scored together."""
    work, steps = arguments.work, dict[str, None]()
    for recipe in arguments.recipes:
        for draw in arguments.draws:
            steps |= dict.fromkeys(make(arguments, recipe, draw))
    found = {step: [work / f"{step}-{draw}" for draw in arguments.draws] for step in steps}
    return score_new(arguments, found)


def score_new(arguments: argparse.Namespace, found: dict[str, list[Path]]) -> dict[str, list[dict[str, Any]]]:
    """By name, of each checkpoint what making it took and what it loses; one that is scored is removed."""
    new = [out for outs in found.values() for out in outs if not _scored(out).is_file()]
    scores = score(arguments.model, new, test=arguments.test, strata=arguments.test_strata) if new else []
    for out, scored in zip(new, scores, strict=True):
        _scored(out).write_text(json.dumps(json.loads(out.with_name(f"{out.name}.made.json").read_text()) | scored))
        shutil.rmtree(out)
    return {step: [json.loads(_scored(out).read_text()) for out in outs] for step, outs in found.items()}


def _scored(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def kl_of(samples: list[list[Any]], task: str | None = None) -> float:
    chosen = [one for one in samples if task in (None, one[0])]
    return float(sum(one[1] for one in chosen) / sum(one[2] for one in chosen))


def difference(ours: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[float]:
    """KL of one recipe less that of the first, all draws together: the point, and a 95 % interval over images."""
    images = [one[5][0] if one[5] else f"text {place}" for place, one in enumerate(ours[0]["samples"])]
    clusters = np.unique(images, return_inverse=True)[1]
    tokens = np.array([one[2] for one in ours[0]["samples"]], dtype=float)
    nats = np.mean(
        [
            [a[1] - b[1] for a, b in zip(mine["samples"], theirs["samples"], strict=True)]
            for mine, theirs in zip(ours, first, strict=True)
        ],
        axis=0,
    )
    summed = np.stack([np.bincount(clusters, weights=what) for what in (nats, tokens)])
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(summed.shape[1], size=(BOOTSTRAP_RESAMPLES, summed.shape[1]))
    resampled = summed[:, draws].sum(-1)
    low, high = np.quantile(resampled[0] / resampled[1], [0.025, 0.975])
    return [float(nats.sum() / tokens.sum()), float(low), float(high)]


def summary(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    tasks = dict.fromkeys(one[0] for one in runs[0]["samples"])
    tokens = sum(one[2] for one in runs[0]["samples"])
    return {
        "kl": [kl_of(run["samples"]) for run in runs],
        "kl_by_task": {task: statistics.mean(kl_of(run["samples"], task) for run in runs) for task in tasks},
        "flips": statistics.mean(sum(one[3] for one in run["samples"]) / tokens for run in runs),
        "perplexity": statistics.mean(float(np.exp(sum(one[4] for one in run["samples"]) / tokens)) for run in runs),
        "reference_perplexity": float(np.exp(runs[0]["reference_nll"] / tokens)),
        "user_cpu_seconds": [run["user_cpu_seconds"] for run in runs],
        "peak_bytes": [run["peak_bytes"] for run in runs],
        "to_the_first": None if runs is first else difference(runs, first),
    }


def to_markdown(results: dict[str, Any]) -> str:
    tasks = list(next(iter(results["recipes"].values()))["kl_by_task"])
    draws = ", ".join(map(str, results["draws"]))
    lines = [
        f"Measured {results['date']} by `{results['command']}`; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "",
        f"| recipe | KL, mean | draws {draws} | to the first, 95 % | {' | '.join(tasks)} | flips | perplexity "
        "| user CPU s | MiB |",
        f"|---|---:|---|---|{'---:|' * len(tasks)}---:|---:|---:|---:|",
    ]
    for name, one in results["recipes"].items():
        paired = one["to_the_first"]
        told = "–" if paired is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*paired)
        lines.append(
            f"| {name} | {statistics.mean(one['kl']):.4f} | {' '.join(f'{kl:.4f}' for kl in one['kl'])} | {told} | "
            + " | ".join(f"{one['kl_by_task'][task]:.4f}" for task in tasks)
            + f" | {one['flips']:.2%} | {one['perplexity']:.3f} | {statistics.mean(one['user_cpu_seconds']):.0f} "
            f"| {max(one['peak_bytes']) / 2**20:.0f} |"
        )
    reference = next(iter(results["recipes"].values()))["reference_perplexity"]
    lines += ["", f"KL(original || quantized) in nats an answer token; the original's perplexity is {reference:.3f}."]
    return "\n".join(lines) + "\n"


def parser_of(text: str | None, out: Path) -> argparse.ArgumentParser:
    """Of the options that all such tables have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--strata", default=CALIBRATION_STRATA)
    parser.add_argument("--test-strata", default=TEST_STRATA)
    parser.add_argument("--out", type=Path, default=out)
    return parser


def write(rows: dict[str, Any], draws: Sequence[int], out: Path, *, notes: str = "") -> None:
    results = {**provenance(), "draws": draws, "recipes": rows}
    text = to_markdown(results) + notes
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(text)


def main() -> None:
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--polish", type=int, default=0, metavar="SAMPLES")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    measured = measure(arguments)
    first = next(iter(measured.values()))
    write({name: summary(runs, first) for name, runs in measured.items()}, arguments.draws, arguments.out)


if __name__ == "__main__":
    main()
