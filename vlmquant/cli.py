"""The `vlmquant` command: each function parses, calls and prints. Results go to stdout, everything else to stderr."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vlmquant import streams
from vlmquant.errors import (
    EXIT_DOES_NOT_FIT,
    EXIT_ERROR,
    EXIT_OK,
    InputError,
    UsageError,
    VlmquantError,
    first_line,
    printable,
    shown,
)
from vlmquant.limits import is_allocation_failure
from vlmquant.threads import MAX_THREADS, set_threads, wait_without_spinning

SKIPPED_SHOWN = 5
"""Records that could not be used, of those a set names in its skipped.jsonl."""

PATH_SHOWN = 4096
"""Characters; the longest path that Linux opens."""

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
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        "-d",
        help='Evaluation set, as `vlmquant data` makes it: a folder with samples.jsonl, a line {"id", "task", "image", '
        '"question", "answers": [...]}.',
    ),
]
KeyMap = Annotated[
    list[str] | None,
    typer.Option("--map", help="Which key or column to read as what, such as image=picture,question=q,answer=label."),
]
ImagesFolder = Annotated[
    Path | None, typer.Option("--images-folder", help="Folder that image paths start from; else that of the file.")
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Read images from outside that folder too (../, absolute, links).")
]
MaxBadFraction = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Share of a source's records that may be unusable, else 0.1; they are skipped and named."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many samples, shared among the tasks.")]
Strata = Annotated[
    str | None, typer.Option("--samples", help="Samples per task in file order, such as caption=80,vqa=60.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report as an HTML page.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Also write the report as Markdown.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute dtype: auto (the faster here), float32 or bfloat16.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help="CPU threads; all cores if not given.")
]
WrongImage = Annotated[
    bool,
    typer.Option("--wrong-image", help="Also measure perplexity with another sample's image: does the model look?"),
]
NoGenerate = Annotated[bool, typer.Option("--no-generate", help="Skip generation: no BLEU, exact match or speed.")]
OtherInputs = Annotated[
    bool,
    typer.Option("--allow-other-inputs", help="Compare models whose prompts or image inputs differ, and say so."),
]


def load_wanted(recipe: str, family: Path | None) -> Any:
    """The recipe, with the row of a file in place of its own."""
    from vlmquant.recipe import load_family, load_recipe

    wanted = load_recipe(recipe)
    return wanted if family is None else wanted.model_copy(update={"family": load_family(family)})


def emit(value: dict[str, Any]) -> None:
    """A result for machines, on stdout: JSON in ASCII, in which a number that is not finite is a word."""
    from vlmquant.report.data import spelled

    with streams.printing():
        typer.echo(json.dumps(spelled(value), indent=2, allow_nan=False))


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
    from vlmquant.families import from_spec
    from vlmquant.pipeline import find_components
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
    components = find_components(model, trust_remote_code=trust_remote_code, family=row)
    if as_json:
        emit(component_summary(components))
    else:
        show(component_table(components))


@app.command()
def plan(
    model: Model,
    recipe: RecipeOption,
    every_weight: Annotated[bool, typer.Option("--all", help="One line for every weight.")] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU that is to serve it, such as 24GB: what fits on it?")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences served at once, else 1.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of text in a sequence, prompt and answer, else 4096.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=0, help="Images in a sequence, else 1; their tokens are added.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(help="Their width and height in pixels, else 1024x768.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, max=1024, help="GPUs that share the model, else 1.")] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Memory that quantizing may hold, such as 20GiB: would it fit, and in which time?"),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Calibration set for that, instead of the recipe's.")] = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what becomes of every weight, and the bytes before and after. Reads no weights.

    Where the recipe has a target, also whether its engine takes the result: exit 1 if it does not. With --gpu-memory,
    --batch, --context, --images, --image-size or --tp, also what serving it takes; with --memory-limit, what quantizing
    takes, for which one sample is sent through the vision encoder. Exit 6 if that does not fit.
    """
    from vlmquant.budget import choose
    from vlmquant.pipeline import check_target, plan_model, plan_work
    from vlmquant.serving import Wish, serve
    from vlmquant.tables import engine_table, plan_lines_table, plan_table, serving_table, work_table

    wanted = load_wanted(recipe, family)
    asked: dict[str, Any] = {
        "gpu_memory": None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory"),
        "batch": batch,
        "text_tokens": context,
        "images": images,
        "image_size": None if image_size is None else parse_size(image_size, "--image-size"),
        "tp": tp,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    components, planned = plan_model(model, wanted, trust_remote_code=trust_remote_code)
    contract = check_target(components, planned, wanted)
    serving = serve(components, planned, Wish(**asked)) if asked else None
    limit = None if memory_limit is None else parse_bytes(memory_limit, "--memory-limit")
    ways = [] if limit is None else plan_work(components, planned, wanted, calibration=calibration)
    if as_json:
        extra = {} if contract is None else {"target": contract.to_json()}
        extra |= {} if serving is None else {"serving": serving.to_json()}
        emit(planned.to_json() | extra | ({"quantizing": [way.to_json() for way in ways]} if ways else {}))
    else:
        if every_weight:
            show(plan_lines_table(planned))
        show(plan_table(planned))
        if contract is not None:
            show(engine_table(contract))
        if serving is not None:
            show(serving_table(serving))
        if limit is not None:
            show(work_table(ways, limit))
    if limit is not None:
        choose(ways, limit)
    if contract is not None and not contract.fits:
        raise typer.Exit(EXIT_ERROR)
    raise typer.Exit(EXIT_OK if serving is None or serving.fits else EXIT_DOES_NOT_FIT)


@app.command()
def data(
    source: Annotated[
        list[str],
        typer.Argument(
            help="PATH, PATH=TASK or FORMAT:PATH=TASK of your data: a file, a folder, or a data set's id on the hub; "
            "several may be given."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new set, or of one folder for each part.")],
    samples: Annotated[int | None, typer.Option(min=1, help="So many, shared among the tasks; else all.")] = None,
    strata: Annotated[str | None, typer.Option(help="So many of each task, such as caption=80,vqa=60.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Several sets that share no image, in folders of these names, such as calibration=256,evaluation=200."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Set whose images must not be in the new one; several may be given.")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Also write a contact sheet: .html (offline, all scripts) or .png (Latin letters only)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
    mapping: KeyMap = None,
    images_folder: ImagesFolder = None,
    allow_outside: AllowOutside = False,
    max_bad_fraction: MaxBadFraction = None,
    as_json: Json = False,
) -> None:
    """Make sets for calibration and evaluation from your own data, and show what was read as what.

    Both are of the same form: a folder with images/ and samples.jsonl, one sample a line,

    \b
    {"id": "7", "task": "vqa", "image": "images/7.jpg", "question": "How many?", "answers": ["2", "two"]}

    where "images": [...] may stand for "image", text-only samples have neither, and "system" and "history":
    [{"question", "answer"}] may be there too. Use them as `quantize --calibration` and `eval --data`.
    """
    from vlmquant.calibration.build import build_set, split_sets
    from vlmquant.calibration.sets import load_set
    from vlmquant.calibration.sheet import check_sheet
    from vlmquant.recipe import CalibrationSpec

    if sum(option is not None for option in (samples, strata, split)) > 1:
        raise UsageError("give one of --samples, --strata and --split")
    if sheet is not None:
        check_sheet(sheet)
    sources = parse_sources(source, mapping, images_folder, allow_outside)
    excluded = [sample for name in exclude or () for sample in load_set(name).samples]
    options: dict[str, Any] = {"exclude": excluded, "max_bad_fraction": max_bad_fraction}
    if split is not None:
        built = split_sets(sources, parse_counts(split, "--split"), out, seed=seed, **options)
    else:
        counts = None if strata is None else parse_counts(strata, "--strata")
        spec = None
        if samples is not None or strata is not None:
            spec = CalibrationSpec(seed=seed).model_copy(update={"samples": samples, "strata": counts})
        built = {out.name: build_set(sources, spec, out, **options)}
    if sheet is not None:
        _write_sheet(sheet, built)
    if as_json:
        emit({"sets": {name: made.to_json() for name, made in built.items()}} if split else built[out.name].to_json())
    else:
        _show_built(built.values())


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
    mapping: KeyMap = None,
    images_folder: ImagesFolder = None,
    allow_outside: AllowOutside = False,
    max_bad_fraction: MaxBadFraction = None,
    as_json: Json = False,
) -> None:
    """Make the calibration set that a recipe asks for from your own data: the short form of `data`."""
    from vlmquant.calibration.build import build_set, draw_set
    from vlmquant.recipe import load_recipe

    spec = load_recipe(recipe).calibration
    changes = {"samples": samples, "seed": seed}
    spec = spec.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if source:
        sources = parse_sources(source, mapping, images_folder, allow_outside)
        built = build_set(sources, spec, out, max_bad_fraction=max_bad_fraction)
    else:
        built = draw_set(spec, out)
    if as_json:
        emit(built.to_json())
    else:
        _show_built([built])


def parse_sources(
    words: list[str], mapping: list[str] | None, images_folder: Path | None, allow_outside: bool
) -> list[Any]:
    """The sources of a command line, all read with the same options."""
    from vlmquant.calibration.sources import parse_map, parse_source

    options: dict[str, Any] = {
        "map": parse_map(",".join(mapping or ())),
        "images": None if images_folder is None else str(images_folder),
        "allow_outside": allow_outside,
    }
    return [dataclasses.replace(parse_source(word), **options) for word in words]


def _show_built(built: Iterable[Any]) -> None:
    """Sets that were made of the same sources: what was read as what, what is in them, what was left out."""
    from vlmquant.tables import sources_table, strata_table

    sets = list(built)
    for use in sets[0].sources:
        say(f"{use.name}: {use.reading.summary()}")
    if sets[0].sources:
        show(sources_table([made.sources for made in sets]))
    skipped = sets[0].skipped
    for record in skipped[:SKIPPED_SHOWN]:
        say(f"skipped {shown(record.where)}: {shown(record.reason)}")
    if len(skipped) > SKIPPED_SHOWN:
        say(f"and {len(skipped) - SKIPPED_SHOWN} more in {shown(sets[0].skipped_file, limit=PATH_SHOWN)}")
    for made in sets:
        show(strata_table(made.strata))
        for note in made.notes:
            say(f"note: {note}")
        where = shown(made.path, limit=PATH_SHOWN)
        say(f"{where}: {len(made.sample_set.samples)} samples, sha256 {made.sample_set.sha256}")


def _write_sheet(file: Path, built: dict[str, Any]) -> None:
    from vlmquant.calibration.sheet import contact_sheet

    skipped = [(record.where, record.reason) for record in next(iter(built.values())).skipped]
    content = contact_sheet(file, {name: made.sample_set.samples for name, made in built.items()}, skipped)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


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
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory that the process may hold, such as 20GiB, else what is free: calibration passes keep less "
            "where they have to (the same codes, in more time), and what cannot fit is refused before any work."
        ),
    ] = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize a model by a recipe."""
    from vlmquant import pipeline, ranks
    from vlmquant.tables import plan_table

    wanted = load_wanted(recipe, family)
    if samples is not None:
        strata = parse_counts(samples)
        chosen = wanted.calibration.model_copy(
            update={"strata": strata, "samples": sum(strata.values()), "order": "file"}
        )
        wanted = wanted.model_copy(update={"calibration": chosen})
    set_threads(threads)
    with ranks.join(device) as joined:
        done = pipeline.quantize(
            model,
            wanted,
            out,
            calibration=calibration,
            device=joined.device,
            dtype=parse_dtype(dtype),
            resume=resume,
            force=force,
            trust_remote_code=trust_remote_code,
            memory_limit=None if memory_limit is None else parse_bytes(memory_limit, "--memory-limit"),
            command=quantize_command(
                {
                    "--recipe": recipe,
                    "--calibration": calibration,
                    "--samples": samples,
                    "--device": None if device == "cpu" else device,
                    "--dtype": None if dtype == "auto" else dtype,
                    "--family": family,
                    "--trust-remote-code": trust_remote_code,
                }
            ),
            ranks=joined,
        )
    if not joined.leads:
        return
    if as_json:
        emit(done.to_json())
        return
    show(plan_table(done.plan))
    for note in done.notes:
        say(f"note: {note}")
    say(
        f"{done.path}: written in {done.seconds:.0f} s ({done.user_cpu_seconds:.0f} s of user CPU time), "
        f"peak memory {done.peak_bytes / 2**20:.0f} MiB, computed in {done.compute_dtype}; planned: "
        f"{done.planned.seconds[0]:.0f} to {done.planned.seconds[1]:.0f} s, {done.planned.peak_bytes / 2**20:.0f} MiB"
    )


def quantize_command(options: dict[str, Any]) -> list[str]:
    """The words of a `quantize` that makes the same again; of folders on this machine, the names alone."""
    from vlmquant.pipeline import MODEL

    words = ["vlmquant", "quantize", MODEL]
    for name, value in options.items():
        if value is True:
            words.append(name)
        elif value:
            words += [name, Path(value).name]
    return words


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
    other_inputs: OtherInputs = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also put the table and the gate's verdict into the model's card, README.md.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what quantization cost: perplexity, KL, flips, BLEU-4, exact match, speed, memory."""
    from vlmquant.checkpoint.card import check_card
    from vlmquant.pipeline import put_into_card

    if card:
        check_card(model)
    report = compare(
        reference,
        [model],
        data,
        out,
        html,
        markdown,
        limit,
        samples,
        wrong_image,
        no_generate,
        other_inputs,
        dtype,
        threads,
        as_json,
    )
    if card:
        put_into_card(report, model)
        if not as_json:
            say(f"wrote {model / 'README.md'}")


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
    other_inputs: OtherInputs = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> Any:
    """Several quantized models against the original, in one table."""
    from vlmquant import pipeline
    from vlmquant.evaluation.settings import Settings
    from vlmquant.report.data import check_report_paths
    from vlmquant.report.table import compare_rows, remarks, terminal_table

    paths = {"--out": out, "--html": html, "--markdown": markdown}
    check_report_paths(paths, apart=[Path(reference), *models])
    settings = Settings(
        wrong_image=wrong_image,
        generate=not no_generate,
        allow_other_inputs=other_inputs,
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
        files, notes = [str(path) for path in written], [f"{label}: {text}" for label, text in remarks(report)]
        emit({"rows": compare_rows(report), "notes": notes, "files": files})
        return report
    show(terminal_table(report))
    for label, text in remarks(report):
        say(f"note: {label}: {text}")
    for path in written:
        say(f"wrote {path}")
    return report


@app.command()
def gate(
    report: Annotated[Path, typer.Argument(help="report.json of `vlmquant eval` or `compare`.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Recipe whose thresholds apply; else those that the report itself holds."),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write the verdicts as JUnit XML.")] = None,
    as_json: Json = False,
) -> None:
    """Judge a report by thresholds: exit 0 passed, 3 failed, 4 inconclusive."""
    from vlmquant import gate as judging
    from vlmquant import pipeline
    from vlmquant.recipe import load_recipe
    from vlmquant.report.data import append_text, check_report_paths, read_json, write_text
    from vlmquant.tables import verdict_table

    check_report_paths({"--junit": junit}, apart=[report])
    found = read_json(report)
    if recipe is not None:
        wanted = load_recipe(recipe)
        spec, source = wanted.gate, f"from the recipe {shown(wanted.name)} given with --recipe"
    elif (recorded := pipeline.recipe_gate(found)) is not None:
        spec, source = recorded, f"{pipeline.recorded_gate_name(found)}; give --recipe to judge by your own"
    else:
        raise UsageError(
            f"{report}: its models were not made by recipes with the same sound gate; give thresholds with --recipe"
        )
    verdicts = judging.judge(found, spec)
    if as_json:
        thresholds = {"from": source, **spec.thresholds(), "alpha": spec.alpha}
        emit({"thresholds": thresholds, "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts]})
    else:
        show(verdict_table(verdicts, thresholds=source))
    if junit is not None:
        write_text(junit, judging.to_junit(verdicts, thresholds=source))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_text(Path(summary), judging.to_step_summary(verdicts, thresholds=source))
    raise typer.Exit(judging.exit_code(verdicts))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Quantized checkpoint, of vlmquant or another program.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="compressed-tensors, gptq, gptq_v2 or awq: what engines are to read.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new checkpoint.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    round_scales: Annotated[
        bool, typer.Option("--round-scales", help="Take the nearest float16 for scales that have no equal there.")
    ] = False,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a quantized checkpoint in another integer format, with the same codes; refuse what it cannot hold."""
    from vlmquant.export import export as write

    done = write(model, format, out, force=force, round_scales=round_scales, trust_remote_code=trust_remote_code)
    if as_json:
        emit(done.to_json())
        return
    for note in done.notes:
        say(f"note: {note}")
    say(f"{done.path}: {done.plan.bytes_after:,} bytes of {done.format}, from {done.source_format}")


@app.command()
def verify(
    model: Annotated[
        Path, typer.Argument(help="A directory that vlmquant wrote, or a quantized checkpoint of others.")
    ],
    as_json: Json = False,
) -> None:
    """Check a checkpoint against its manifest: checksums, index, shapes, scales.

    One of another program has no manifest; its weights are checked against its config and model.
    """
    from vlmquant.checkpoint import check_coded, verify_checkpoint
    from vlmquant.checkpoint.coded import is_foreign
    from vlmquant.errors import EXIT_CACHE_SCALE, EXIT_ERROR
    from vlmquant.kvcache import CacheScaleProblem

    foreign = is_foreign(model)
    problems = list(check_coded(model)) if foreign else verify_checkpoint(model)
    if as_json:
        emit({"path": str(model), "manifest": not foreign, "problems": problems})
    else:
        sound = "every file is as it was written"
        if foreign:
            sound = "weights, config and model belong together; no manifest says whether files are as they were written"
        for line in problems or [f"{model}: {sound}"]:
            say(line)
    code = EXIT_CACHE_SCALE if any(isinstance(line, CacheScaleProblem) for line in problems) else EXIT_ERROR
    raise typer.Exit(code if problems else EXIT_OK)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Directory or hub id of a quantized model, vlmquant's or anybody's.")],
    engine: Annotated[str, typer.Option("--engine", help="vllm, sglang or transformers.")],
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Compute capability of the card, such as sm_90, or cpu.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, max=1024, help="Ranks of tensor parallelism.")] = 1,
    as_json: Json = False,
) -> None:
    """Hold a checkpoint against what a serving engine takes: exit 0 it fits, 1 it does not. Reads no weights."""
    from vlmquant.components import locate_model
    from vlmquant.engines import check_checkpoint
    from vlmquant.recipe import parse_target
    from vlmquant.tables import engine_table

    contract = check_checkpoint(locate_model(model), parse_target(engine, gpu=gpu, tp=tp))
    if as_json:
        emit(contract.to_json())
    else:
        show(engine_table(contract))
    raise typer.Exit(EXIT_OK if contract.fits else EXIT_ERROR)


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="A directory that vlmquant wrote.")],
    repository: Annotated[str, typer.Argument(help="Where it goes on the hub, such as org/name; made if not there.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, list what would be sent, and send nothing.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    as_json: Json = False,
) -> None:
    """Put a checkpoint on the hub: verified first, and refused if its gate failed."""
    from vlmquant import publish
    from vlmquant.tables import upload_table

    upload = publish.prepare(model, repository, private=private)
    address = None if dry_run else publish.push(upload)
    if as_json:
        emit(upload.to_json() | {"address": address})
        return
    show(upload_table(upload))
    for note in upload.notes:
        say(f"note: {note}")
    say(f"{repository}: nothing was sent" if address is None else f"{repository}: sent, {address}")


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
        for line in lines(found):
            say(line)


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
        say(f"{path}: {len(rows)} rows")


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (4096, 11008)."""
    rows, sign, columns = text.partition("x")
    if not (sign and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise UsageError(f"--shape: expected outputs x inputs such as 4096x11008, got '{shown(text)}'")
    return int(rows), int(columns)


def parse_counts(text: str, option: str = "--samples") -> dict[str, int]:
    """ "caption=80,vqa=60" -> {"caption": 80, "vqa": 60}."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        task, sign, number = (piece.strip() for piece in part.partition("="))
        if not (task and sign and number.isdecimal() and len(number) < 9 and int(number) > 0) or task in counts:
            raise UsageError(f"{option}: expected name=number pairs such as caption=80,vqa=60, got '{shown(text)}'")
        counts[task] = int(number)
    return counts


UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for middle, base in (("", 1000), ("i", 1024))
}


def parse_bytes(text: str, option: str) -> int:
    """ "24GB" -> 24,000,000,000; "1.5GiB" -> 1,610,612,736."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]i?)?B", text.strip(), re.IGNORECASE)
    if found:
        unit = (found[2] or "").upper().replace("I", "i") + "B"
        if (count := int(float(found[1]) * UNITS[unit])) > 0:
            return count
    raise UsageError(f"{option}: expected a size such as 24GB or 1.5GiB, got '{shown(text)}'")


def parse_size(text: str, option: str) -> tuple[int, int]:
    """ "1024x768" -> (1024, 768)."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})[xX]([1-9][0-9]{0,4})", text.strip())
    if found is None:
        raise UsageError(f"{option}: expected width and height such as 1024x768, got '{shown(text)}'")
    return int(found[1]), int(found[2])


def parse_dtype(name: str) -> Any:
    """The torch dtype of a name; None for auto."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--dtype: expected auto, float32 or bfloat16, got '{shown(name)}'")
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
    with streams.printing():
        console.print(table)


def say(text: object) -> None:
    """A line of the result, for people."""
    with streams.printing():
        typer.echo(printable(text))


def main() -> None:
    """Entry point: turns our errors into one message and an exit code; bugs keep their traceback."""
    wait_without_spinning()
    try:
        streams.prepare()
        try:
            app()
        finally:
            streams.flush()
    except VlmquantError as error:
        fail(error, error.exit_code)
    except Exception as error:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "vlmquant")
        if is_allocation_failure(error):
            fail(
                f"{shown(command)}: memory ran out ({first_line(error)}); free some, or use a machine with more",
                EXIT_DOES_NOT_FIT,
            )
        if isinstance(error, OSError):
            fail(f"{shown(error.filename or command)}: {error.strerror or first_line(error)}", InputError.exit_code)
        raise


def fail(message: object, code: int) -> NoReturn:
    """One message on stderr, then exit."""
    stderr = streams.Stderr()
    stderr.write(f"vlmquant: {printable(message)}\n")
    stderr.flush()
    sys.exit(code)
