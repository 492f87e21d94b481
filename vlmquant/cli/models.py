"""inspect, plan, quantize: a model, what becomes of it, and the work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmquant.cli.options import Dtype, FamilyOption, Json, Model, RecipeOption, Threads, Trust
from vlmquant.cli.output import emit, say, show
from vlmquant.cli.words import load_wanted, parse_bytes, parse_counts, parse_dtype, parse_size
from vlmquant.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, UsageError
from vlmquant.threads import set_threads


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
    from vlmquant.tables.models import component_summary, component_table, support_table

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
    device_memory_limit: Annotated[
        str | None, typer.Option(help="The same on a GPU of so much memory, which need not be in this machine.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Calibration set for that, instead of the recipe's.")] = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what becomes of every weight, and the bytes before and after. Reads no weights.

    Where the recipe has a target, also whether its engine takes the result: exit 1 if it does not. With --gpu-memory,
    --batch, --context, --images, --image-size or --tp, also what serving it takes; with --memory-limit or
    --device-memory-limit, what quantizing takes, for which one sample is sent through the vision encoder. Exit 6 if
    that does not fit.
    """
    import torch

    from vlmquant.budget import Limits, choose
    from vlmquant.pipeline import check_target, plan_model, plan_work
    from vlmquant.serving import Wish, serve
    from vlmquant.tables.models import plan_lines_table, plan_table
    from vlmquant.tables.work import engine_table, serving_table, work_table

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
    limits = Limits(
        None if memory_limit is None else parse_bytes(memory_limit, "--memory-limit"),
        None if device_memory_limit is None else parse_bytes(device_memory_limit, "--device-memory-limit"),
    )
    ways = []
    if limits != Limits():
        device = torch.device("cpu" if limits.device is None else "cuda")
        ways = plan_work(components, planned, wanted, calibration=calibration, device=device)
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
        if ways:
            show(work_table(ways, limits))
    if ways:
        choose(ways, limits)
    if contract is not None and not contract.fits:
        raise typer.Exit(EXIT_ERROR)
    raise typer.Exit(EXIT_OK if serving is None or serving.fits else EXIT_DOES_NOT_FIT)


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
    device_memory_limit: Annotated[
        str | None, typer.Option(help="The same of a GPU's memory, where --device is one.")
    ] = None,
    family: FamilyOption = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize a model by a recipe."""
    from vlmquant import pipeline, ranks
    from vlmquant.tables.models import plan_table
    from vlmquant.tables.work import span

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
            device_memory_limit=None
            if device_memory_limit is None
            else parse_bytes(device_memory_limit, "--device-memory-limit"),
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
