"""export, verify, check, push: a checkpoint in another format, against its manifest and engines, and on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from vlmquant.cli.options import Device, Json, Trust
from vlmquant.cli.output import emit, say, show
from vlmquant.errors import EXIT_ERROR, EXIT_OK


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


def polish(
    checkpoint: Annotated[Path, typer.Argument(help="Quantized checkpoint whose codes are integers.")],
    reference: Annotated[str, typer.Option("--reference", help="The model that it was made of: directory or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new checkpoint.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", help="Set to tune on; that of the recipe if none is given.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=16,
            help="How many of it, in the recipe's mix of tasks; as the recipe says, or 512, if not given.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Times that every sample is seen.")] = 1,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Of learning; found on samples held out if not given.")
    ] = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Json = False,
) -> None:
    """Tune the scales of a checkpoint, its codes frozen, to answer more like the original; kept only if that helps."""
    from vlmquant.polish import Options
    from vlmquant.polish import polish as tune

    done = tune(
        checkpoint,
        reference,
        out,
        calibration=calibration,
        samples=samples,
        options=Options(epochs=epochs, rate=rate),
        device=device,
        force=force,
    )
    if as_json:
        emit(done.to_json())
        return
    say(f"{done.path}: {done.notes[0]}")


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
    from vlmquant.tables.work import engine_table

    contract = check_checkpoint(locate_model(model), parse_target(engine, gpu=gpu, tp=tp))
    if as_json:
        emit(contract.to_json())
    else:
        show(engine_table(contract))
    raise typer.Exit(EXIT_OK if contract.fits else EXIT_ERROR)


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
    from vlmquant.tables.work import upload_table

    upload = publish.prepare(model, repository, private=private)
    address = None if dry_run else publish.push(upload)
    if as_json:
        emit(upload.to_json() | {"address": address})
        return
    show(upload_table(upload))
    for note in upload.notes:
        say(f"note: {note}")
    say(f"{repository}: nothing was sent" if address is None else f"{repository}: sent, {address}")
