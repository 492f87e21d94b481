"""inspect, plan, sensitivity, quantize: a model, what becomes of it, what it loses by that, and the work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vlmquant import streams
from vlmquant.cli.options import (
    Batch,
    CalibrationOption,
    Context,
    Device,
    EffortOption,
    FamilyOption,
    Html,
    Images,
    ImageSize,
    Json,
    Model,
    PassesDtype,
    RecipeOption,
    ScoresFile,
    TensorParallel,
    Threads,
    Trust,
    recipe_names,
)
from vlmquant.cli.output import emit, say, show
from vlmquant.cli.words import (
    load_wanted,
    parse_counts,
    parse_dtype,
    parse_limits,
    parse_schemes,
    parse_wish,
    recipe_name,
    with_budget,
)
from vlmquant.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, UsageError, shown
from vlmquant.threads import set_threads

if TYPE_CHECKING:
    from vlmquant.pipeline import Quantized


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
    from vlmquant.recipe import load_family
    from vlmquant.support import load_support

    if families == (model is not None):
        raise UsageError("give either a model or --families")
    given = load_family(family) if family else None
    from vlmquant.families import from_spec
    from vlmquant.pipeline import find_components
    from vlmquant.tables.models import component_summary, component_table, support_table

    if model is None:
        support = load_support()
        if as_json:
            emit(support)
        else:
            show(support_table(support))
        return
    row = from_spec(given) if given else None
    components = find_components(model, trust_remote_code=trust_remote_code, family=row)
    if as_json:
        emit(component_summary(components))
    else:
        show(component_table(components))


def plan(
    model: Model,
    recipe: RecipeOption = None,
    every_weight: Annotated[bool, typer.Option("--all", help="One line for every weight.")] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU that is to serve it, such as 24GB: what fits on it?")
    ] = None,
    batch: Batch = None,
    context: Context = None,
    images: Images = None,
    image_size: ImageSize = None,
    tp: TensorParallel = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Memory that quantizing may hold, such as 20GiB: would it fit, and in which time?"),
    ] = None,
    device_memory_limit: Annotated[
        str | None, typer.Option(help="The same on a GPU of so much memory, which need not be in this machine.")
    ] = None,
    calibration: CalibrationOption = None,
    effort: EffortOption = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what becomes of every weight, and the bytes before and after. Reads no weights.

    Where the recipe has a target, also whether its engine takes the result. With --gpu-memory, --batch, --context,
    --images, --image-size or --tp, also what serving it takes; with --memory-limit or --device-memory-limit, what
    quantizing takes, for which one sample is sent through the vision encoder.
    """
    limits = parse_limits(memory_limit, device_memory_limit)
    _show_plan(
        model,
        load_wanted(recipe_name(recipe), family, effort),
        serving=parse_wish(gpu_memory, batch, context, images, image_size, tp),
        limits=limits,
        calibration=calibration,
        every_weight=every_weight,
        as_json=as_json,
        trust_remote_code=trust_remote_code,
    )


def _show_plan(
    model: str,
    wanted: Any,
    *,
    serving: dict[str, Any],
    limits: tuple[int | None, int | None],
    calibration: str | None,
    every_weight: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> NoReturn:
    """Print the plan of a recipe, and end with the code of what it finds. serving: fields of a Wish; limits: of host
    and device, bytes."""
    import torch

    from vlmquant.budget import Limits, choose
    from vlmquant.pipeline import check_target, plan_model, plan_work
    from vlmquant.serving import Wish, serve
    from vlmquant.tables.models import plan_lines_table, plan_table
    from vlmquant.tables.work import engine_table, serving_table, work_table

    components, planned = plan_model(model, wanted, trust_remote_code=trust_remote_code)
    contract = check_target(components, planned, wanted)
    served = serve(components, planned, Wish(**serving)) if serving else None
    within, ways = Limits(*limits), []
    if within != Limits():
        device = torch.device("cpu" if within.device is None else "cuda")
        ways = plan_work(components, planned, wanted, calibration=calibration, device=device, memory_limit=within.host)
    if as_json:
        extra = {} if contract is None else {"target": contract.to_json()}
        extra |= {} if served is None else {"serving": served.to_json()}
        emit(planned.to_json() | extra | ({"quantizing": [way.to_json() for way in ways]} if ways else {}))
    else:
        if every_weight:
            show(plan_lines_table(planned))
        show(plan_table(planned))
        if contract is not None:
            show(engine_table(contract))
        if served is not None:
            show(serving_table(served))
        if ways:
            show(work_table(ways, within))
    if ways:
        choose(ways, within)
    if contract is not None and not contract.fits:
        raise typer.Exit(EXIT_ERROR)
    raise typer.Exit(EXIT_OK if served is None or served.fits else EXIT_DOES_NOT_FIT)


def sensitivity(
    model: Model,
    recipe: RecipeOption = None,
    scores: ScoresFile = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="Choose schemes for so many bits on average, as a recipe's budget does.")
    ] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="Choose schemes for a result of this size, such as 2GB.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Choose the fewest bytes that are predicted to lose no more nats a token.")
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(help="What to try, such as w3a16,w4a16-g64,w8a16; else as the recipe's budget says.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the recipe that was chosen to this file.")
    ] = None,
    html: Html = None,
    calibration: CalibrationOption = None,
    device: Device = "auto",
    threads: Threads = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure what each layer loses by each scheme, and choose the schemes that a budget buys.

    Components that the recipe keeps are tried too, rounded to nearest; only those that it quantizes are chosen for.
    """
    wanted = with_budget(load_wanted(recipe_name(recipe), family), bits_per_weight, bytes_, max_kl)
    tried = parse_schemes(schemes)
    if out is not None and wanted.budget is None:
        raise UsageError("--out: there is no budget to choose by; give --bits-per-weight, --bytes or --max-kl")
    set_threads(threads)
    from vlmquant.pipeline import find_sensitivity
    from vlmquant.recipe import recipe_text
    from vlmquant.report.data import check_report_paths, write_text
    from vlmquant.report.sensitivity_page import to_html
    from vlmquant.sensitivity import allocate, find_units
    from vlmquant.tables.sensitivity import allocation_table, loss_table

    check_report_paths({"--out": out, "--html": html}, apart=[] if scores is None else [scores])
    found = find_sensitivity(
        model,
        wanted,
        calibration=calibration,
        device=device,
        scores=scores,
        schemes=tried,
        kept=True,
        trust_remote_code=trust_remote_code,
    )
    bought = None
    if wanted.budget is not None:
        units = find_units(found.components, wanted, schemes=tried)
        bought = allocate(found.components, wanted, units, found.scores, wanted.budget)
    files = {} if scores is None else {"scores": scores}
    if out is not None and bought is not None:
        write_text(out, "".join(f"# {note}\n" for note in bought.notes) + recipe_text(bought.recipe))
        files["recipe"] = out
    if html is not None:
        write_text(html, to_html(found.scores, bought, model=Path(model).name))
        files["page"] = html
    if as_json:
        emit(
            found.scores.model_dump(mode="json")
            | {"notes": list(found.units.refused), "files": {what: str(path) for what, path in files.items()}}
            | {"allocation": None if bought is None else bought.to_json()}
        )
        return
    show(loss_table(found.scores, bought))
    for note in found.units.refused:
        say(f"note: {note}")
    if bought is not None:
        show(allocation_table(bought))
    for what, path in files.items():
        say(f"{what}: {path}")


def quantize(
    model: Model,
    recipe: RecipeOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the quantized model; not for --dry-run.")
    ] = None,
    calibration: CalibrationOption = None,
    samples: Annotated[str | None, typer.Option(help="As in eval: samples per task in file order.")] = None,
    effort: EffortOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing, as `plan` does.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    device: Device = "auto",
    dtype: PassesDtype = "auto",
    threads: Threads = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory that the process may hold, such as 20GiB, else what is free: calibration passes keep less "
            "where they have to (the same codes, in more time), and what cannot fit is refused before any work."
        ),
    ] = None,
    device_memory_limit: Annotated[
        str | None, typer.Option(help="The same of a GPU's memory, where --device is one.")
    ] = None,
    family: FamilyOption = None,
    scores: ScoresFile = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize a model by a recipe."""
    recipe = recipe_name(recipe)
    wanted = load_wanted(recipe, family, effort)
    if samples is not None:
        strata = parse_counts(samples)
        chosen = wanted.calibration.model_copy(
            update={"strata": strata, "samples": sum(strata.values()), "order": "file"}
        )
        wanted = wanted.model_copy(update={"calibration": chosen})
    limits = parse_limits(memory_limit, device_memory_limit)
    set_threads(threads)
    if dry_run:
        _show_plan(
            model,
            wanted,
            serving={},
            limits=limits,
            calibration=calibration,
            every_weight=False,
            as_json=as_json,
            trust_remote_code=trust_remote_code,
        )
    if out is None:
        raise UsageError("quantize: --out is missing: name a directory for the quantized model, or ask for --dry-run")
    from vlmquant import pipeline, ranks

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
            memory_limit=limits[0],
            device_memory_limit=limits[1],
            command=quantize_command(
                {
                    "--recipe": recipe,
                    "--calibration": calibration,
                    "--samples": samples,
                    "--effort": effort,
                    "--device": None if device == "auto" else device,
                    "--dtype": None if dtype == "auto" else dtype,
                    "--family": family,
                    "--scores": scores,
                    "--trust-remote-code": trust_remote_code,
                }
            ),
            ranks=joined,
            scores=scores,
        )
    if joined.leads:
        _show_quantized(done, as_json=as_json)


def _show_quantized(done: "Quantized", *, as_json: bool) -> None:
    from vlmquant.tables.models import plan_table
    from vlmquant.tables.work import span

    if as_json:
        emit(done.to_json())
        return
    show(plan_table(done.plan))
    for note in done.notes:
        say(f"note: {note}")
    say(
        f"{done.path}: written in {done.seconds:.0f} s ({done.user_cpu_seconds:.0f} s of user CPU time), "
        f"peak memory {done.peak_bytes / 2**20:.0f} MiB, computed in {done.compute_dtype}; planned: "
        f"{span(done.planned.seconds)} s, {done.planned.peak_bytes / 2**20:.0f} MiB"
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


def recipes(
    name: Annotated[
        str | None, typer.Argument(autocompletion=recipe_names, help="A shipped recipe, to be printed whole.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one: a file to start your own from."""
    from vlmquant.nearest import did_you_mean
    from vlmquant.recipe import load_recipe, shipped_recipes
    from vlmquant.tables.layout import make_table

    known = shipped_recipes()
    if name is None:
        if as_json:
            emit({row.name: row.summary for row in known.values()})
        else:
            show(
                make_table("", ("recipe", "what it does"), [(row.name, row.summary) for row in known.values()], left=2)
            )
    elif name not in known:
        raise UsageError(
            f"recipes: none that is shipped is called '{shown(name)}'{did_you_mean(name, known)}; there are "
            f"{', '.join(known)}"
        )
    elif as_json:
        emit(load_recipe(name).model_dump(mode="json"))
    else:
        with streams.printing():
            typer.echo(known[name].file.read_text(encoding="utf-8"), nl=False)
