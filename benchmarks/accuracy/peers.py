"""Other tools, at the best settings that their documentation has, beside our default: same samples, same scoring.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/peers.py MODEL --calibration SET --test SET --work DIR
        --environments FOLDER [--ours RECIPE] [--rows NAME=DRAW,... ...] [--strata TASK=N,...]
        [--test-strata TASK=N,...] [--out FILE]

RECIPE: what they are held against, our default for 4 bits if not said; they round by groups of its size. Each row of
ROWS is made by peer_TOOL.py, in a process of its own and by FOLDER/TOOL/bin/python, from the inputs that our own run
would make of the draw: one sample a batch, the whole chat with its image and answer. All their passes are in float32,
and checkpoints are read as the tools write them. Beside each stands its difference to ours, on the draws that the row
has. What is done is kept in DIR, as run.py does it. Writes
benchmarks/results/accuracy_peers.{json,md}. In FOLDER there were, each with torch==2.13.0: llmcompressor==0.14.0.1;
auto-round==0.16.1 and pillow; gptqmodel==7.6.0, installed with BUILD_CUDA_EXT=0 and --no-build-isolation.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import RESULTS, make_once, parser_of, quantize, run_apart, score_new, summary, write

from vlmquant.calibration.encode import make_batches
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import load_set
from vlmquant.cli.words import parse_counts
from vlmquant.recipe import CalibrationSpec, load_recipe

HERE = Path(__file__).resolve().parent
OURS = HERE / "recipes" / "gptq-w4-default.yaml"


@dataclass(frozen=True)
class Row:
    tool: str
    settings: dict[str, Any]
    draws: tuple[int, ...]
    why: str


def llmcompressor(
    why: str,
    draws: tuple[int, ...] = (0,),
    *,
    method: str = "gptq",
    bits: int = 4,
    symmetric: bool = True,
    observer: str = "memoryless_mse",
    **options: Any,
) -> Row:
    settings = {"method": method, "bits": bits, "symmetric": symmetric, "observer": observer, **options}
    return Row("llmcompressor", settings, draws, why)


def gptqmodel(why: str, **options: Any) -> Row:
    """mse: the power of the error that scales are searched by; 0, its default, is no search."""
    return Row("gptqmodel", {"bits": 4, "sym": True, "mse": 2.4, **options}, (0,), why)


ROWS = {
    "llmcompressor-gptq-w4-sym": llmcompressor(
        "scales by least squared error; static order of columns, its default", (0, 1, 2), actorder="static"
    ),
    "llmcompressor-gptq-w4-asym": llmcompressor("the same", symmetric=False, actorder="static"),
    "gptqmodel-gptq-w4-sym": gptqmodel(
        "scales searched; order of columns by groups (GAR), its default", act_group_aware=True
    ),
    "gptqmodel-gptaq-w4-sym": gptqmodel(
        "its GPTAQ has no order by groups: by columns, static", desc_act=True, static_groups=True, gptaq={"alpha": 0.25}
    ),
    "autoround-w4-sym": Row(
        "auto_round",
        {"bits": 4, "sym": True, "iters": 200, "amp": False},
        (0,),
        "its default recipe, advised for 4 bits; padding masked",
    ),
    "llmcompressor-awq-w4-sym": llmcompressor(
        "mappings of the language layers alone; both ways of scaling tried", method="awq", duo_scaling="both"
    ),
    "llmcompressor-gptq-w3-sym": llmcompressor("as with 4 bits", bits=3, actorder="static"),
    "llmcompressor-gptq-w4-sym-imatrix": llmcompressor(
        "scales by cubed error weighted by inputs", observer="imatrix_mse", actorder="static"
    ),
}


def save_inputs(model: Path, draw: int, out: Path, *, calibration: Path, strata: str) -> Path:
    """What our own run of the draw calibrates on, one sample a batch, for torch.load."""
    if out.is_file():
        return out
    counts = parse_counts(strata)
    spec = CalibrationSpec(set=str(calibration), seed=draw, samples=sum(counts.values()), strata=counts)
    samples = choose_samples(load_set(spec.set), spec).samples
    batches, _ = make_batches(samples, load_processor(model), max_tokens=spec.max_tokens, batch_size=1)
    torch.save([make().inputs for make in batches], out)
    return out


def settings_of(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Of a row, with our recipe's size of groups."""
    return {**ROWS[name].settings, "group_size": arguments.group_size}


def make(arguments: argparse.Namespace, name: str, draw: int, out: Path) -> dict[str, Any]:
    """The checkpoint of a row, at `out`."""
    chosen = {"calibration": arguments.calibration, "strata": arguments.strata}
    if name == arguments.ours.stem:
        return quantize(arguments.model, str(arguments.ours), draw, out, **chosen)
    row, settings = ROWS[name], settings_of(arguments, name)
    inputs = save_inputs(arguments.model, draw, arguments.work / f"inputs-{draw}.pt", **chosen)
    script, model = HERE / f"peer_{row.tool}.py", arguments.model.resolve()
    words = [arguments.environments / row.tool / "bin" / "python", script, model, inputs, out, json.dumps(settings)]
    text, used = run_apart(list(map(str, words)), cwd=arguments.work)
    for file in arguments.model.iterdir():  # some do not write the processor's
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and not (out / file.name).exists():
            shutil.copy(file, out)
    return json.loads(text.strip().splitlines()[-1]) | used


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows by name, each held against our default on the same draws."""
    found = {name: [arguments.work / f"{name}-{draw}" for draw in draws] for name, draws in arguments.rows.items()}
    for name, outs in found.items():
        for draw, out in zip(arguments.rows[name], outs, strict=True):
            make_once(out, partial(make, arguments, name, draw))
    scored = score_new(arguments, found)
    recipe = arguments.ours.stem
    first = scored.pop(recipe)
    ours = dict(zip(arguments.rows[recipe], first, strict=True))
    rows = {recipe: summary(first, first)}
    for name, runs in scored.items():
        draws = arguments.rows[name]
        told = {"draws": draws, "settings": settings_of(arguments, name), "versions": runs[0]["versions"]}
        rows[name] = summary(runs, [ours[draw] for draw in draws]) | told
    return rows


def notes(rows: dict[str, Any]) -> str:
    lines = ["", "| row | draws | why | with |", "|---|---|---|---|"]
    for name, one in rows.items():
        if name in ROWS:
            versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
            lines.append(f"| {name} | {', '.join(map(str, one['draws']))} | {ROWS[name].why} | {versions} |")
    return "\n".join(lines) + "\n"


def group_size(recipe: Path) -> int | None:
    """Of the language layers."""
    return load_recipe(recipe).components.language.scheme.group_size


def pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value


def main() -> None:
    parser = parser_of(__doc__, RESULTS.with_name("accuracy_peers"))
    parser.add_argument("--environments", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ours", type=Path, default=OURS, metavar="RECIPE")
    parser.add_argument("--rows", nargs="+", type=pair, default=[], metavar="NAME=DRAW,...")
    arguments = parser.parse_args()
    arguments.work, arguments.environments = arguments.work.resolve(), arguments.environments.absolute()
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = {name: tuple(map(int, draws.split(","))) for name, draws in arguments.rows}
    wanted = wanted or {name: row.draws for name, row in ROWS.items()}
    arguments.group_size, draws = (
        group_size(arguments.ours),
        sorted({draw for some in wanted.values() for draw in some}),
    )
    arguments.rows = {arguments.ours.stem: tuple(draws), **wanted}
    rows = measure(arguments)
    write(rows, draws, arguments.out, notes=notes(rows))


if __name__ == "__main__":
    main()
