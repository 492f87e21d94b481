"""demo, doctor, tune: this machine, and vlmquant on it."""

from pathlib import Path
from typing import Annotated

import typer

from vlmquant.cli.options import Json, Threads
from vlmquant.cli.output import emit, say
from vlmquant.cli.words import parse_shape
from vlmquant.threads import set_threads


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


def doctor(as_json: Json = False) -> None:
    """Show this machine, what multiplies packed weights on it and why, and the cache of compiled kernels."""
    from vlmquant.doctor import examine, lines

    found = examine()
    if as_json:
        emit(found)
    else:
        for line in lines(found):
            say(line)


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
