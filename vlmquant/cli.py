"""The `vlmquant` command: each function parses, calls and prints. Results go to stdout, everything else to stderr."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from vlmquant.errors import EXIT_OK, InputError, UsageError, VlmquantError
from vlmquant.threads import set_threads, wait_without_spinning

app = typer.Typer(
    name="vlmquant",
    help="Quantize vision-language models per component, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="Model directory or hub id.")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Recipe file, or the name of a shipped recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
FamilyOption = Annotated[
    Path | None,
    typer.Option("--family", help="YAML file that says where the parts of a model are that vlmquant does not know."),
]
Data = Annotated[Path, typer.Option("--data", "-d", help="Evaluation set: a folder with samples.jsonl.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many samples, shared among the tasks.")]
Strata = Annotated[
    str | None, typer.Option("--samples", help="Samples per task in file order, such as caption=80,vqa=60.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report as an HTML page.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Also write the report as Markdown.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute dtype: auto (the faster here), float32 or bfloat16.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores if not given.")]
WrongImage = Annotated[
    bool,
    typer.Option("--wrong-image", help="Also measure perplexity with another sample's image: does the model look?"),
]
NoGenerate = Annotated[bool, typer.Option("--no-generate", help="Skip generation: no BLEU, exact match or speed.")]


def load_wanted(recipe: str, family: Path | None) -> Any:
    """The recipe, with the row of a file in place of its own."""
    from vlmquant.recipe import load_family, load_recipe

    wanted = load_recipe(recipe)
    return wanted if family is None else wanted.model_copy(update={"family": load_family(family)})


def emit(value: dict[str, Any]) -> None:
    """A result for machines, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Model directory or hub id.")] = None,
    families: Annotated[
        bool,
        typer.Option("--families", help="The model types of transformers, what of them works and how it was tried."),
    ] = False,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show the component map: parameters, bytes, blocks, quantizable linears, fused groups, experts."""
    from vlmquant.components import locate_model, resolve_components
    from vlmquant.families import from_spec
    from vlmquant.recipe import load_family
    from vlmquant.support import load_support
    from vlmquant.tables import component_summary, component_table, support_table

    if families == (model is not None):
        raise UsageError("give either a model or --families")
    if model is None:
        support = load_support()
        if as_json:
            emit(support)
        else:
            show(support_table(support))
        return
    row = from_spec(load_family(family)) if family else None
    components = resolve_components(locate_model(model), trust_remote_code=trust_remote_code, family=row)
    if as_json:
        emit(component_summary(components))
    else:
        show(component_table(components))


@app.command()
def plan(
    model: Model,
    recipe: RecipeOption,
    every_weight: Annotated[bool, typer.Option("--all", help="One line for every weight.")] = False,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what becomes of every weight, and the bytes before and after. Reads no weights."""
    from vlmquant.pipeline import plan_model
    from vlmquant.tables import plan_lines_table, plan_table

    _, planned = plan_model(model, load_wanted(recipe, family), trust_remote_code=trust_remote_code)
    if as_json:
        emit(planned.to_json())
        return
    if every_weight:
        show(plan_lines_table(planned))
    show(plan_table(planned))


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new set.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            "-s",
            help="PATH, PATH=TASK or FORMAT:PATH=TASK of your own data; several may be given. "
            "Without one, samples are drawn from the recipe's set.",
        ),
    ] = None,
    recipe: RecipeOption = "mixed",
    samples: Annotated[int | None, typer.Option(min=1, help="Samples instead of the recipe's number.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed instead of the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Build a stratified calibration set from your own data; prints its strata."""
    from vlmquant.calibration.build import build_set, draw_set
    from vlmquant.calibration.sources import parse_source
    from vlmquant.recipe import load_recipe
    from vlmquant.tables import strata_table

    spec = load_recipe(recipe).calibration
    changes = {"samples": samples, "seed": seed}
    spec = spec.model_copy(update={key: value for key, value in changes.items() if value is not None})
    built, strata = build_set([parse_source(text) for text in source], spec, out) if source else draw_set(spec, out)
    if as_json:
        rows = [dataclasses.asdict(row) for row in strata]
        emit({"path": str(out), "sha256": built.sha256, "samples": len(built.samples), "strata": rows})
    else:
        show(strata_table(strata))
        typer.echo(f"{out}: {len(built.samples)} samples, sha256 {built.sha256}")


@app.command()
def quantize(
    model: Model,
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the quantized model.")],
    calibration: Annotated[str | None, typer.Option(help="Calibration set instead of the recipe's.")] = None,
    samples: Annotated[str | None, typer.Option(help="As in eval: samples per task in file order.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    device: Annotated[str, typer.Option(help="Where blocks are quantized, such as cpu or cuda:0.")] = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize a model by a recipe."""
    from vlmquant import pipeline
    from vlmquant.tables import plan_table

    wanted = load_wanted(recipe, family)
    if samples is not None:
        strata = parse_counts(samples)
        chosen = wanted.calibration.model_copy(
            update={"strata": strata, "samples": sum(strata.values()), "order": "file"}
        )
        wanted = wanted.model_copy(update={"calibration": chosen})
    set_threads(threads)
    done = pipeline.quantize(
        model,
        wanted,
        out,
        calibration=calibration,
        device=device,
        dtype=parse_dtype(dtype),
        resume=resume,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        emit(done.to_json())
        return
    show(plan_table(done.plan))
    for note in done.notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{done.path}: written in {done.seconds:.0f} s ({done.user_cpu_seconds:.0f} s of user CPU time), "
        f"peak memory {done.peak_bytes / 2**20:.0f} MiB, computed in {done.compute_dtype}"
    )


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of the quantized model.")],
    reference: Annotated[str, typer.Option("--reference", help="The model it was quantized from.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path("report.json"),
    html: Html = None,
    markdown: Markdown = None,
    limit: Limit = None,
    samples: Strata = None,
    wrong_image: WrongImage = False,
    no_generate: NoGenerate = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure what quantization cost: perplexity, KL, flips, BLEU-4, exact match, speed, memory."""
    _evaluate(
        reference, [model], data, out, html, markdown, limit, samples, wrong_image, no_generate, dtype, threads, as_json
    )


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(help="The unquantized model.")],
    models: Annotated[list[Path], typer.Argument(help="Quantized models, one row each.")],
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the report goes.")] = None,
    html: Html = None,
    markdown: Markdown = None,
    limit: Limit = None,
    samples: Strata = None,
    wrong_image: WrongImage = False,
    no_generate: NoGenerate = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Several quantized models against the original, in one table."""
    _evaluate(
        reference, models, data, out, html, markdown, limit, samples, wrong_image, no_generate, dtype, threads, as_json
    )


def _evaluate(
    reference: str,
    models: list[Path],
    data: Path,
    out: Path | None,
    html: Path | None,
    markdown: Path | None,
    limit: int | None,
    samples: str | None,
    wrong_image: bool,
    no_generate: bool,
    dtype: str,
    threads: int | None,
    as_json: bool,
) -> None:
    from vlmquant import pipeline
    from vlmquant.evaluation.settings import Settings
    from vlmquant.report.table import compare_rows, terminal_table

    settings = Settings(
        wrong_image=wrong_image,
        generate=not no_generate,
        dtype=dtype,  # type: ignore[arg-type]  # Settings refuses what it does not know
        threads=threads,
    )
    report = pipeline.evaluate(
        reference,
        models,
        data,
        limit=limit,
        strata=None if samples is None else parse_counts(samples),
        settings=settings,
        command=("vlmquant", *sys.argv[1:]),
    )
    written = pipeline.write_report(report, data=data, out=out, html=html, markdown=markdown)
    if as_json:
        emit({"rows": compare_rows(report), "files": [str(path) for path in written]})
        return
    show(terminal_table(report))
    for path in written:
        typer.echo(f"wrote {path}")


@app.command()
def gate(
    report: Annotated[Path, typer.Argument(help="report.json of `vlmquant eval` or `compare`.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Recipe whose thresholds apply; else those the model was made with."),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write the verdicts as JUnit XML.")] = None,
    as_json: Json = False,
) -> None:
    """Judge a report by thresholds: exit 0 passed, 3 failed, 4 inconclusive."""
    from vlmquant import gate as judging
    from vlmquant import pipeline
    from vlmquant.recipe import load_recipe
    from vlmquant.report.data import read_json, write_text
    from vlmquant.tables import verdict_table

    found = read_json(report)
    spec = load_recipe(recipe).gate if recipe is not None else pipeline.recipe_gate(found)
    if spec is None:
        raise UsageError(f"{report}: its models were not made by recipes with the same gate; give one with --recipe")
    verdicts = judging.judge(found, spec)
    if junit is not None:
        write_text(junit, judging.to_junit(verdicts))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(judging.to_step_summary(verdicts))
    if as_json:
        emit({"verdicts": [dataclasses.asdict(verdict) for verdict in verdicts]})
    else:
        show(verdict_table(verdicts))
    raise typer.Exit(judging.exit_code(verdicts))


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="A directory that vlmquant wrote.")], as_json: Json = False
) -> None:
    """Check a checkpoint against its manifest: checksums, index, shapes, scales."""
    from vlmquant.checkpoint import verify_checkpoint

    problems = verify_checkpoint(model)
    if as_json:
        emit({"path": str(model), "problems": problems})
    else:
        typer.echo("\n".join(problems) if problems else f"{model}: every file is as it was written")
    raise typer.Exit(1 if problems else EXIT_OK)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of everything the demo writes.")] = Path(
        "demo-output"
    ),
    threads: Threads = None,
) -> None:
    """Inspect, plan, quantize, evaluate, report and gate the bundled tiny model, in about a minute."""
    from vlmquant.demo.tour import run

    set_threads(threads)
    raise typer.Exit(run(out))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show this machine, what multiplies packed weights on it and why, and the cache of compiled kernels."""
    from vlmquant.doctor import examine, lines

    found = examine()
    if as_json:
        emit(found)
    else:
        typer.echo("\n".join(lines(found)))


@app.command()
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Outputs x inputs of a weight, such as 4096x11008; several may be given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the CUDA kernels' variants on this GPU; what wins is used from then on."""
    from vlmquant.kernels.cuda import tune as tuning
    from vlmquant.progress import bar

    tuning.require_cuda()
    shapes = [parse_shape(text) for text in shape] if shape else list(tuning.SHAPES)
    with bar("measuring", len(shapes) * len(tuning.TOKENS)) as progress:
        path, rows = tuning.tune(shapes, dtype="bf16", step=progress.step)
    if as_json:
        emit({"path": str(path), "rows": rows})
    else:
        typer.echo(f"{path}: {len(rows)} rows")


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (4096, 11008)."""
    rows, sign, columns = text.partition("x")
    if not (sign and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise UsageError(f"--shape: expected outputs x inputs such as 4096x11008, got '{text}'")
    return int(rows), int(columns)


def parse_counts(text: str) -> dict[str, int]:
    """ "caption=80,vqa=60" -> {"caption": 80, "vqa": 60}."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        task, sign, number = (piece.strip() for piece in part.partition("="))
        if not (task and sign and number.isdecimal() and int(number) > 0) or task in counts:
            raise UsageError(f"--samples: expected task=number pairs such as caption=80,vqa=60, got '{text}'")
        counts[task] = int(number)
    return counts


def parse_dtype(name: str) -> Any:
    """The torch dtype of a name; None for auto."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--dtype: expected auto, float32 or bfloat16, got '{name}'")
    if name == "auto":
        return None
    import torch

    return getattr(torch, name)


def show(table: Any) -> None:
    """Print a table on stdout, as wide as it needs to be where stdout is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def main() -> None:
    """Entry point: turns our errors into one message and an exit code; bugs keep their traceback."""
    wait_without_spinning()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except VlmquantError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_OK)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror or error}", InputError.exit_code)


def fail(message: str, code: int) -> None:
    """One message on stderr, then exit."""
    typer.echo(f"vlmquant: {message}", err=True)
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """End in order: what was finished is kept, and nothing is half-written."""
    raise SystemExit(128 + number)
