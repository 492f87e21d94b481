"""recommend: which recipe for which GPU."""

from pathlib import Path
from typing import Annotated

import typer

from vlmquant.cli.help import program
from vlmquant.cli.options import Batch, Context, Images, ImageSize, Json, Model, TensorParallel, Trust
from vlmquant.cli.output import emit, say, show
from vlmquant.cli.words import parse_wish
from vlmquant.errors import UsageError


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
