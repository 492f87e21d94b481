"""The `vlmquant` command: each function parses, calls and prints. Results go to stdout, everything else to stderr."""

import os
import sys
import traceback
from typing import Annotated

import typer

import vlmquant
from vlmquant import notices, streams
from vlmquant.cli import advice, asking, checkpoints, machine, models, reports, sets
from vlmquant.cli.help import EPILOG, Entry, Group, Quiet, Verbose, obey, program, register
from vlmquant.cli.output import emit, fail, say, show
from vlmquant.cli.words import parse_bytes, parse_counts, parse_shape, parse_size
from vlmquant.errors import (
    EXIT_CACHE_SCALE,
    EXIT_DOES_NOT_FIT,
    EXIT_GATE_FAILED,
    EXIT_GATE_INCONCLUSIVE,
    EXIT_RANK_LOST,
    EXIT_SENTINEL,
    EXIT_STARVED_EXPERTS,
    InputError,
    UsageError,
    VlmquantError,
    first_line,
    shown,
)
from vlmquant.limits import is_allocation_failure
from vlmquant.threads import prepare_cpu

__all__ = [
    "UsageError",
    "app",
    "emit",
    "fail",
    "main",
    "parse_bytes",
    "parse_counts",
    "parse_shape",
    "parse_size",
    "say",
    "show",
]

COMMANDS = {
    "recipes": Entry(
        models.recipes,
        ("list them\nvlmquant recipes", "start your own from one\nvlmquant recipes mixed > mine.yaml"),
    ),
    "inspect": Entry(
        models.inspect,
        (
            "what a model is made of\nvlmquant inspect org/model",
            "which model types work\nvlmquant inspect --families",
        ),
    ),
    "plan": Entry(
        models.plan,
        (
            "sizes before and after\nvlmquant plan org/model --recipe mixed",
            "does it fit, with 8 sequences at once?\nvlmquant plan org/model --gpu-memory 24GB --batch 8",
        ),
        (EXIT_DOES_NOT_FIT,),
    ),
    "recommend": Entry(
        advice.recommend,
        (
            "which recipe for a card of 24 GB\nvlmquant recommend org/model --gpu-memory 24GB --gpu hopper",
            "fast answers first\nvlmquant recommend org/model --gpu-memory 80GB --gpu hopper --latency",
        ),
        (EXIT_DOES_NOT_FIT,),
    ),
    "ablate": Entry(
        advice.ablate,
        (
            "text, images or both, GPTQ or AWQ\nvlmquant ablate org/model --data test --calibration set --work work",
            "on three draws of 64 samples\nvlmquant ablate org/model -d test -w work --samples 64 --draws 3",
        ),
        (EXIT_SENTINEL, EXIT_DOES_NOT_FIT, EXIT_STARVED_EXPERTS),
    ),
    "data": Entry(
        sets.data,
        (
            "a set of your own data\nvlmquant data photos.jsonl --out set",
            "two sets that share no image\nvlmquant data photos.jsonl --split calibration=128,evaluation=200 -o sets",
        ),
    ),
    "calibrate": Entry(sets.calibrate, ("what a recipe asks for\nvlmquant calibrate --source photos.jsonl --out set",)),
    "sensitivity": Entry(
        models.sensitivity,
        (
            "which layers lose most, as a page\nvlmquant sensitivity org/model --scores scores.json --html page.html",
            "a recipe of 4.25 bits per weight\nvlmquant sensitivity org/model --bits-per-weight 4.25 --out chosen.yaml",
        ),
        (EXIT_SENTINEL, EXIT_DOES_NOT_FIT),
    ),
    "quantize": Entry(
        models.quantize,
        (
            "by the recipe mixed, on the shipped calibration set\nvlmquant quantize org/model --out out",
            "on your own data\nvlmquant quantize org/model -r gptq-w4 --calibration set --out out",
            "what would become of it\nvlmquant quantize org/model --dry-run",
        ),
        (EXIT_SENTINEL, EXIT_DOES_NOT_FIT, EXIT_STARVED_EXPERTS, EXIT_CACHE_SCALE, EXIT_RANK_LOST),
    ),
    "generate": Entry(
        asking.generate,
        (
            'one answer\nvlmquant generate out --image cat.jpg "What is this?"',
            "a conversation; an empty line ends it\nvlmquant generate out --image cat.jpg",
        ),
        (EXIT_SENTINEL, EXIT_DOES_NOT_FIT),
        works=False,
    ),
    "eval": Entry(
        reports.evaluate,
        ("what quantizing cost\nvlmquant eval out --reference org/model --data set --html report.html",),
        (EXIT_SENTINEL, EXIT_DOES_NOT_FIT),
    ),
    "compare": Entry(
        reports.compare,
        ("several in one table\nvlmquant compare org/model out-int8 out-int4 --data set",),
        (EXIT_SENTINEL, EXIT_DOES_NOT_FIT),
    ),
    "gate": Entry(
        reports.gate,
        ("in CI\nvlmquant gate report.json --junit gate.xml",),
        (EXIT_GATE_FAILED, EXIT_GATE_INCONCLUSIVE),
    ),
    "export": Entry(
        checkpoints.export, ("for engines that read GPTQ\nvlmquant export out --format gptq --out out-gptq",)
    ),
    "polish": Entry(
        checkpoints.polish,
        ("on more samples\nvlmquant polish out --reference model --samples 448 --out out-p",),
        (EXIT_DOES_NOT_FIT,),
    ),
    "verify": Entry(checkpoints.verify, ("after a download\nvlmquant verify out",), (EXIT_CACHE_SCALE,)),
    "check": Entry(checkpoints.check, ("will vLLM take it on an H100?\nvlmquant check out --engine vllm --gpu sm_90",)),
    "push": Entry(checkpoints.push, ("what would be sent\nvlmquant push out org/name --dry-run",)),
    "demo": Entry(machine.demo, ("on a tiny model\nvlmquant demo",), (EXIT_GATE_FAILED, EXIT_GATE_INCONCLUSIVE)),
    "doctor": Entry(machine.doctor, ("what runs here, and how\nvlmquant doctor",)),
    "tune": Entry(machine.tune, ("for one more shape\nvlmquant tune --shape 4096x11008",)),
}

app = typer.Typer(
    name="vlmquant",
    cls=Group,
    help="Quantize vision-language models per component, and prove what it cost.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"vlmquant {vlmquant.__version__}")
        raise typer.Exit


@app.callback(cls=Group)
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    obey(quiet=quiet, verbose=verbose)


register(app, COMMANDS)


def main() -> None:
    """Entry point: turns our errors into one message and an exit code; bugs keep their traceback."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # nobody's business here, and slow to look for
    prepare_cpu()
    with notices.restored():
        _run()


def _run() -> None:
    try:
        streams.prepare()
        try:
            app(prog_name=program())
        finally:
            streams.flush()
    except VlmquantError as error:
        if notices.is_verbose():
            traceback.print_exc(file=streams.Stderr())
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
