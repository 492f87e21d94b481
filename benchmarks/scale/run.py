"""Memory and time of `quantize` against the size of a model, beside what was planned.

    python benchmarks/scale/run.py --work DIR [--sizes "0.1 GB" ...] [--limit 3GiB] [--limited "8 GB"] [--out FILE]
                                   [--peer PYTHON] [--models NAME=DIR ...] [--part NAME | --join NAME ...]

Models of benchmarks/scale/models.py, calibrated on those of the demo's samples that have an image. Each size is
quantized by --recipe, with --effort fast, in a process of its own, with all the memory that it wants; those that are
limited once more under a hard limit of their address space (as `ulimit -v` sets it) with the same --memory-limit, and
both must write the same weights. With --peer, the Python of an environment that has llm-compressor, its GPTQ (peer.py)
gets the same batches of each size up to PEER_BYTES, and the loss of both is measured on the demo's test set. The table
ends with what budget.predict says of models of which only the headers exist, for SAMPLES samples of TOKENS tokens.
Sizes may be measured in parts, which are joined; a size measured again without the peer keeps what that did. --models
are real ones, quantized by the recipe as it is, with its own effort, on the demo's calibration set.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance
from scale.models import CALIBRATION, LARGE, SHAPES, TEST, build, headers_only

from vlmquant.budget import WAYS, predict
from vlmquant.calibration.encode import make_batches
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set
from vlmquant.cli.words import parse_bytes
from vlmquant.evaluation.settings import Settings
from vlmquant.pipeline import BATCH_SIZE, BATCH_TOKENS, evaluate, plan_model
from vlmquant.recipe import load_recipe
from vlmquant.report.table import compare_rows
from vlmquant.stream import Footprint, Place

RESULTS = Path(__file__).parents[1] / "results"
PEER = Path(__file__).parent / "peer.py"
PEER_BYTES = 2 << 30
"""Of the largest model that the peer is given: it takes longer than our patience on larger ones."""
TEST_SAMPLES = 48


def digest(out: Path) -> str:
    """Of all weights, in the order of their files."""
    whole = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def samples() -> list[Sample]:
    """The demo's that have an image: the peer cannot take those that have none among them."""
    return [sample for sample in load_set(CALIBRATION).samples if sample.images]


def children_cpu() -> float:
    """User CPU seconds of processes that have ended, with their start."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def quantize(model: Path, out: Path, *, recipe: str, limit: int | None, as_peer: bool = True) -> dict[str, Any]:
    """as_peer: as the peer does it, in one pass through the model, on samples that all have an image."""
    words = ["quantize", str(model), "-r", recipe, "--calibration", str(CALIBRATION), "-o", str(out), "--json"]
    if as_peer:
        counts = Counter(one.task for one in samples())
        words += ["--effort", "fast", "--samples", ",".join(f"{task}={count}" for task, count in counts.items())]
    if limit is not None:
        words += ["--memory-limit", f"{limit}B"]

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    shutil.rmtree(out, ignore_errors=True)
    before = children_cpu()
    done = subprocess.run(
        [sys.executable, "-m", "vlmquant", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=confine,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    cpu = children_cpu() - before
    said = json.loads(done.stdout)
    return {
        "model_bytes": said["bytes_before"],
        "passes": said["planned"]["passes"],
        "planned_peak_bytes": said["planned"]["peak_bytes"],
        "peak_bytes": said["peak_bytes"],
        "planned_seconds": said["planned"]["seconds"],
        "seconds": said["seconds"],
        "user_cpu_seconds": round(cpu, 1),
        "sha256": digest(out),
    }


def give_peer(python: Path, model: Path, ours: Path, *, work: Path) -> dict[str, Any]:
    """The peer on the same model and samples, one at a time as it has them; and the loss of both."""
    out = work / "peer"
    batches, _ = make_batches(samples(), load_processor(model), max_tokens=1 << 20, batch_size=1)
    torch.save([make().inputs for make in batches], work / "batches.pt")
    shutil.rmtree(out, ignore_errors=True)
    before = children_cpu()
    done = subprocess.run(
        [str(python), str(PEER), str(model), str(work / "batches.pt"), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["user_cpu_seconds"] = round(children_cpu() - before, 1)
    found["losses"] = losses(model, {"vlmquant": ours, "peer": out})
    return found


def losses(model: Path, candidates: dict[str, Path]) -> dict[str, Any]:
    """Rows of a comparison by name, on the demo's test set."""
    settings = Settings(generate=False, dtype="float32", threads=torch.get_num_threads())
    report = evaluate(model, list(candidates.values()), TEST, limit=TEST_SAMPLES, settings=settings)
    return dict(zip(("original", *candidates), compare_rows(report), strict=True))


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
        found[component] = Place(
            rows, width, rows * width * dtype.itemsize, min(BATCH_SIZE * tokens, max(BATCH_TOKENS, tokens))
        )
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


def peer_row(name: str, found: dict[str, Any]) -> str:
    other = found["peer"]
    if "failed" in other:
        return f"| {name} | {found['user_cpu_seconds']:.0f} | ended with {other['failed']} | | | | | | |"
    ours, theirs = (
        "{point:.4f} ({low:.4f} to {high:.4f})".format_map((found.get("losses", {}) | other["losses"])[who]["KL"])
        for who in ("vlmquant", "peer")
    )
    return (
        f"| {name} | {found['user_cpu_seconds']:.0f} | {other['user_cpu_seconds']:.0f} "
        f"| {other['user_cpu_seconds'] / found['user_cpu_seconds']:.1f} | {found['peak_bytes'] / 2**20:.0f} "
        f"| {other['peak_bytes'] / 2**20:.0f} | {other['peak_bytes'] / found['peak_bytes']:.1f} | {ours} | {theirs} |"
    )


def measure(arguments: argparse.Namespace, results: dict[str, Any], saved: Path) -> None:
    """Add a run for each size, one more for each that is limited; what is measured is saved as it comes."""
    for name in arguments.sizes:
        model, out = build(arguments.work / name.replace(" ", ""), SHAPES[name]), arguments.work / "out"
        found = None
        if not arguments.only_limited:
            found = results["runs"][name] = quantize(model, out, recipe=arguments.recipe, limit=None)
            print(row(name, found), file=sys.stderr, flush=True)
            saved.write_text(json.dumps(results, indent=1) + "\n")
        if arguments.score and found:
            found["losses"] = losses(model, {"vlmquant": out})
        if arguments.peer and found and found["model_bytes"] <= PEER_BYTES:
            found["peer"] = give_peer(arguments.peer, model, out, work=arguments.work)
            print(peer_row(name, found), file=sys.stderr, flush=True)
            saved.write_text(json.dumps(results, indent=1) + "\n")
        if name in arguments.limited:
            limit = parse_bytes(arguments.limit, "--limit")
            label = f"{name}, {arguments.limit} of address space"
            try:
                again = quantize(model, out, recipe=arguments.recipe, limit=limit)
            except subprocess.CalledProcessError as error:
                print(f"{label}: ended with {error.returncode}", file=sys.stderr, flush=True)
                shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
                continue
            results["runs"][label] = again
            if found:
                again["same_weights"] = again["sha256"] == found["sha256"]
            print(row(label, again), file=sys.stderr, flush=True)
        saved.write_text(json.dumps(results, indent=1) + "\n")
        shutil.rmtree(model)


def measure_real(arguments: argparse.Namespace, results: dict[str, Any], saved: Path) -> None:
    for one in arguments.models:
        name, _, folder = one.partition("=")
        out = arguments.work / "out"
        results["runs"][name] = quantize(Path(folder), out, recipe=arguments.recipe, limit=None, as_peer=False)
        print(row(name, results["runs"][name]), file=sys.stderr, flush=True)
        saved.write_text(json.dumps(results, indent=1) + "\n")


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of several parts, each of which says how it was made."""
    made = [{key: value for key, value in part.items() if key != "runs"} for part in parts]
    runs: dict[str, Any] = {}
    for part in parts:
        for name, run in part["runs"].items():
            peer = runs.get(name, {}).get("peer")
            if peer and "peer" not in run and "losses" in run:  # measured again, without the peer
                kept = {"original": peer["losses"]["original"], "peer": peer["losses"]["peer"]}
                run = {**run, "peer": {**peer, "losses": kept}}
            runs[name] = run
    for name, run in runs.items():
        whole = runs.get(name.partition(",")[0])
        if whole is not None and whole is not run:
            run["same_weights"] = run["sha256"] == whole["sha256"]
    return {**provenance(), **{key: parts[0][key] for key in ("threads", "recipe")}, "parts": made, "runs": runs}


def to_markdown(results: dict[str, Any]) -> str:
    threads = results["threads"]
    lines = [
        f"Measured {part['date']} by `{part['command']}`; {threads} thread(s); "
        + ", ".join(f"{package} {number}" for package, number in part["versions"].items())
        for part in results.get("parts", [results])
    ]
    if "parts" in results:
        lines.append(f"Joined {results['date']} by `{results['command']}`.")
    lines += [
        "",
        "| model | GB | passes | planned MiB | peak MiB | off | planned s | s | user CPU s | per GB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        *(row(name, found) for name, found in results["runs"].items()),
    ]
    for name, found in results["runs"].items():
        if "same_weights" in found:
            lines += ["", f"{name}: {'the same' if found['same_weights'] else 'DIFFERENT'} weights as without it."]
    if beside := {name: found for name, found in results["runs"].items() if "peer" in found}:
        versions: dict[str, str] = next(
            (found["peer"]["versions"] for found in beside.values() if "versions" in found["peer"]), {}
        )
        lines += [
            "",
            "Beside llm-compressor's GPTQ (its search for scales by least squared error), the same batches; KL in "
            f"nats a token with 95 % interval. {', '.join(f'{name} {number}' for name, number in versions.items())}",
            "",
            "| model | user CPU s | peer | ratio | peak MiB | peer | ratio | KL | peer |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(peer_row(name, found) for name, found in beside.items()),
            *(f"\n{name}: {found['peer']['note']}." for name, found in beside.items() if "note" in found["peer"]),
        ]
    lines += [
        "",
        f"Planned, not measured: {SAMPLES} samples of {TOKENS} tokens, products in float32 on this machine's "
        f"{threads} thread(s).",
        "",
        "| model | GB before | after | all kept, GiB | rerun | rerun, on disk | hours, rerun on disk |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {one['before'] / 1e9:.0f} | {one['after'] / 1e9:.0f} | {one['kept'] / 2**30:.1f} "
            f"| {one['rerun'] / 2**30:.1f} | {one['spilled'] / 2**30:.1f} | {one['hours'][0]} to {one['hours'][1]} |"
            for name, one in results["projection"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--limit", default="3GiB", help="of the second run of those that are limited")
    parser.add_argument("--limited", nargs="*", default=["8 GB"], choices=list(SHAPES))
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=DIR", help="real models, instead of sizes")
    parser.add_argument("--only-limited", action="store_true", help="no run of a size without the limit")
    parser.add_argument("--peer", type=Path, help="Python of an environment that has llm-compressor")
    parser.add_argument("--score", action="store_true", help="measure the loss of ours without the peer, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", help="only measure, for a run that joins what several have measured")
    parser.add_argument("--join", nargs="+", help="names of parts, instead of measuring")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**provenance(), "threads": arguments.threads, "recipe": arguments.recipe, "runs": {}}
    saved = arguments.out.with_suffix(".json")
    if arguments.join:
        results = joined([json.loads((arguments.work / f"part-{name}.json").read_text()) for name in arguments.join])
    else:
        part = arguments.work / f"part-{arguments.part}.json"
        saving = part if arguments.part else saved
        measure_real(arguments, results, saving)
        if not arguments.models:
            measure(arguments, results, saving)
        if arguments.part:
            return
    results["runs"] = dict(sorted(results["runs"].items(), key=lambda run: run[1]["model_bytes"]))
    base = min(found["planned_peak_bytes"] for found in results["runs"].values())
    results["projection"] = {name: project(name, arguments.work, base=base) for name in LARGE}
    saved.write_text(json.dumps(results, indent=1) + "\n")
    saved.with_suffix(".md").write_text(to_markdown(results))
    print(to_markdown(results))


if __name__ == "__main__":
    main()
