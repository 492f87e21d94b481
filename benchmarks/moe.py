"""What rounding costs a trained mixture of experts, and what its experts should be calibrated on.

    python benchmarks/moe.py --model DIR [--draws 3]

DIR is what train_moe_model.py writes. The first table scores round-to-nearest, GPTQ and AWQ at 3 and 4 bits, groups of
128, on the whole language model and on its routed experts alone, against the unquantized model on vlmquant/demo/test.
The second is about `calibration.experts`: with few calibration samples, how much is lost when an expert is calibrated
on its own tokens, on others' as well, or on all; several draws each, on the same test scenes. Its default was chosen by
this table, and nothing else was. Writes benchmarks/results/moe.{json,md}.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import provenance

from vlmquant.evaluation.metrics import kl_difference, summarize
from vlmquant.evaluation.settings import Settings
from vlmquant.pipeline import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, Quantized, evaluate, quantize
from vlmquant.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "moe"
CALIBRATION, TEST = ROOT / "vlmquant/demo/calibration", ROOT / "vlmquant/demo/test"
SAMPLES = 96
FEW = (2, 6, 16, 48)
CHOICES = {
    "routed": "tokens: routed",
    "two for each input": "enough_tokens: 256",
    "two for each input, others count 1/4": "enough_tokens: 256, others_count: 0.25",
    "eight for each input, others count 1/4": "enough_tokens: 1024, others_count: 0.25",
    "all": "tokens: all",
}
"""What experts are calibrated on, as it stands in a recipe."""


def recipe(
    method: str, bits: int, *, samples: int, seed: int = 0, experts: str = "", only_experts: bool = False
) -> Recipe:
    keep = ", keep: ['*self_attn']" if only_experts else ""
    text = f"""version: 1
name: moe
components:
  language: {{scheme: {{bits: {bits}, group_size: 128}}, method: {method}{keep}}}
calibration:
  set: {CALIBRATION}
  samples: {samples}
  seed: {seed}
  experts: {{max_starving: 1.0{", " + experts if experts else ""}}}
"""
    return parse_recipe(text, name="moe")


def methods(model: Path, scratch: Path, settings: Settings) -> list[dict[str, Any]]:
    """Scores of every method, with the paired difference to rounding to nearest."""
    made: dict[str, Quantized] = {}
    for only_experts in (False, True):
        for bits in (3, 4):
            for method in ("rtn", "gptq", "awq"):
                name = f"{'experts' if only_experts else 'language'}-{method}-w{bits}"
                wanted = recipe(method, bits, samples=SAMPLES, only_experts=only_experts)
                made[name] = quantize(model, wanted, scratch / name)
    report = evaluate(model, [one.path for one in made.values()], TEST, settings=settings)
    runs = {run.label: run for run in report.candidates}
    rows = []
    for label, run in runs.items():
        what, method, bits = label.split("-")
        found = summarize(run, report.reference, seed=BOOTSTRAP_SEED, resamples=BOOTSTRAP_RESAMPLES)["all"]
        nearest = runs[f"{what}-rtn-{bits}"]
        gain = kl_difference(run, nearest, seed=BOOTSTRAP_SEED, resamples=BOOTSTRAP_RESAMPLES)
        rows.append(
            {
                "what": what,
                "method": f"{method}-{bits}",
                "kl": asdict(found["kl"]),
                "exact_match": asdict(found["exact_match"]),
                "against_rtn": asdict(gain),
                "seconds": made[label].user_cpu_seconds,
            }
        )
    return rows


def choices(model: Path, draws: int, scratch: Path, settings: Settings) -> list[dict[str, Any]]:
    """KL by number of calibration samples and choice, one value per draw."""
    made: dict[str, Quantized] = {}
    for count, seed in ((count, seed) for count in FEW for seed in range(draws)):
        for number, experts in enumerate(CHOICES.values()):
            name = f"{count}-{number}-{seed}"
            made[name] = quantize(model, recipe("gptq", 3, samples=count, seed=seed, experts=experts), scratch / name)
    report = evaluate(model, [one.path for one in made.values()], TEST, settings=settings)
    loss = {
        run.label: sum(one.kl or 0.0 for one in run.samples) / sum(one.tokens for one in run.samples)
        for run in report.candidates
    }
    rows = []
    for count in FEW:
        tokens = [note for name, one in made.items() if name.startswith(f"{count}-0-") for note in one.notes]
        for number, choice in enumerate(CHOICES):
            values = [loss[f"{count}-{number}-{seed}"] for seed in range(draws)]
            rows.append({"samples": count, "choice": choice, "kl": values, "experts": tokens[-1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    settings = Settings(threads=1, dtype="float32", speed_prompts=1, speed_tokens=2)
    with tempfile.TemporaryDirectory() as folder:
        scored = methods(arguments.model, Path(folder), settings)
        chosen = choices(arguments.model, arguments.draws, Path(folder), settings)
    content = {**provenance(), "methods": scored, "choices": chosen}
    RESULTS.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    lines = ["# A trained mixture of experts", "", f"`{content['command']}`, {content['date']}", ""]
    lines += [
        "| weights | method | KL (nats) | against rtn | exact match | user CPU |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in scored:
        gain, kl = row["against_rtn"], row["kl"]
        told = "" if "rtn" in row["method"] else f"{gain['point']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
        lines.append(
            f"| {row['what']} | {row['method']} | {kl['point']:.4f} ({kl['low']:.4f} to {kl['high']:.4f}) | {told} "
            f"| {row['exact_match']['point']:.1f} % | {row['seconds']:.0f} s |"
        )
    lines += [
        "",
        f"Experts calibrated on few samples, GPTQ at 3 bits, {arguments.draws} draws, the same scenes:",
        "",
    ]
    lines += [
        "| samples | tokens of an expert | calibrated on | KL (nats), each draw | mean |",
        "|---:|---|---|---|---:|",
    ]
    for row in chosen:
        least = row["experts"].split("each: ")[-1].split(";")[0]
        values = " ".join(f"{value:.4f}" for value in row["kl"])
        lines.append(f"| {row['samples']} | {least} | {row['choice']} | {values} | {statistics.mean(row['kl']):.4f} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
