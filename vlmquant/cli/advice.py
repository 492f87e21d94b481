"""recommend, ablate: which recipe for which GPU; which calibration and method lose least on one's own data."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmquant.cli.help import program
from vlmquant.cli.options import (
    Batch,
    CalibrationOption,
    Context,
    Data,
    Device,
    EffortOption,
    Html,
    Images,
    ImageSize,
    Json,
    Limit,
    Model,
    RecipeOption,
    TensorParallel,
    Threads,
    Trust,
)
from vlmquant.cli.output import emit, say, show
from vlmquant.cli.words import load_wanted, parse_names, parse_wish, recipe_name
from vlmquant.errors import UsageError
from vlmquant.threads import set_threads


def recommend(
    model: Model,
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU that is to serve it, such as 24GB.")],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Its generation (blackwell, hopper, ada, ampere, turing), its compute capability such as sm_90, or "
            "cpu: what it has no kernels for is left out."
        ),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Fast answers come first; needs --gpu.")] = False,
    accuracy: Annotated[
        bool,
        typer.Option(
            "--accuracy",
            help="Accuracy comes first: the most bits that fit, 8 before 4, since 4 always lose more; of 4, GPTQ's.",
        ),
    ] = False,
    batch: Batch = None,
    context: Context = None,
    images: Images = None,
    image_size: ImageSize = None,
    tp: TensorParallel = None,
    engine: Annotated[str, typer.Option(help="What serves it: vllm, sglang or transformers.")] = "vllm",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the recipe to this file, which must not be there yet.")
    ] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Say which recipe a model should be quantized by to be served on a GPU, and why. Reads no weights.

    Where 16 bits fit they stay, unless --latency is given. Each candidate is planned, and held against the memory and,
    with --gpu, against what the engine has kernels for. Exit 6 if nothing fits; then it says what would.
    """
    from vlmquant.recipe import parse_target
    from vlmquant.recommend import Goal, parse_gpu, require
    from vlmquant.recommend import recommend as find
    from vlmquant.report.data import write_text
    from vlmquant.serving import Wish
    from vlmquant.tables.work import recommendation_table

    if latency and accuracy:
        raise UsageError("give either --latency or --accuracy")
    if latency and gpu is None:
        raise UsageError("--latency: what is fast depends on the card; give --gpu, such as hopper or sm_90")
    if out is not None and (out.exists() or out.is_symlink()):
        raise UsageError(f"{out}: is there already; give the recipe another name")
    wish = Wish(**parse_wish(gpu_memory, batch, context, images, image_size, tp))
    target = parse_target(engine, gpu=parse_gpu(gpu), tp=wish.tp) if gpu is not None else None
    goal: Goal = "latency" if latency else "accuracy" if accuracy else "balanced"
    found = find(model, wish, goal=goal, target=target, trust_remote_code=trust_remote_code)
    text = found.recipe_text()
    if out is not None and text is not None:
        write_text(out, text)
    written = str(out) if out is not None and text is not None else None
    if as_json:
        emit(found.to_json() | {"written": written})
        require(found)
        return
    show(recommendation_table(found))
    require(found)
    reason = found.reason[:1].upper() + found.reason[1:]
    say(f"Recommended: {found.recipe or 'the model as it is, at 16 bits'}. {reason}.")
    if text is None:
        say("There is nothing to quantize." + ("" if out is None else f" {out} is not written."))
    else:
        say(f"Next: {program()} quantize {model} --recipe {written or found.recipe} --out OUT")


def ablate(
    model: Model,
    data: Data,
    work: Annotated[
        Path,
        typer.Option(
            "--work", "-w", help="Folder of its own for calibration sets and checkpoints; the same one goes on."
        ),
    ],
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    calibrations: Annotated[
        str, typer.Option(help="Kinds of calibration, all of that one set: samples with images, without, half of each.")
    ] = "text,image,mixed",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of quantizing the language layers, such as gptq,awq,awq+gptq,rtn; else the recipe's, gptq, awq, rtn."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples of each calibration, else the recipe's number.")
    ] = None,
    draws: Annotated[
        int, typer.Option(min=1, max=9, help="Draws of calibration samples that each method is tried on.")
    ] = 1,
    limit: Limit = None,
    effort: EffortOption = None,
    device: Device = "auto",
    threads: Threads = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints once they are scored.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the report of all goes, as of `compare`.")
    ] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Find which calibration, text, images or both, by which method loses least on held-out samples of yours.

    The language layers alone are quantized, by the recipe's scheme, on as many samples each time; a method that needs
    no data is one row. What is as good within noise and takes less time is recommended. Interrupted, the same call
    goes on; finished checkpoints are deleted once all are scored, unless --keep is given.
    """
    wanted = load_wanted(recipe_name(recipe), None, effort)
    from vlmquant import pipeline
    from vlmquant.ablate import Ablation
    from vlmquant.ablate import ablate as find
    from vlmquant.report.data import check_report_paths
    from vlmquant.tables.work import ablation_table

    def tell(found: Ablation) -> None:
        written = pipeline.write_report(found.report, data=data, out=out, html=html, markdown=None)
        if as_json:
            emit(found.to_json() | {"files": [str(path) for path in written]})
            return
        show(ablation_table(found))
        for note in found.notes:
            say(f"note: {note}")
        for path in written:
            say(f"wrote {path}")
        say(f"Recommended: {found.choice.sentence}.")

    check_report_paths({"--out": out, "--html": html}, apart=[Path(model), data, Path(calibration or data)])
    set_threads(threads)
    find(
        model,
        wanted,
        data,
        work,
        calibration=calibration,
        methods=None if methods is None else parse_names(methods),
        kinds=parse_names(calibrations),  # type: ignore[arg-type]  # ablate refuses what it does not know
        samples=samples,
        limit=limit,
        draws=draws,
        device=device,
        threads=threads,
        keep=keep,
        command=("vlmquant", *sys.argv[1:]),
        tell=tell,
    )
