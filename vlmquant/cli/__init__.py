"""The `vlmquant` command: each function parses, calls and prints. Results go to stdout, everything else to stderr."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from vlmquant import streams
from vlmquant.cli import checkpoints, machine, models, reports, sets
from vlmquant.cli.output import emit, fail, say, show
from vlmquant.cli.words import parse_bytes, parse_counts, parse_shape, parse_size
from vlmquant.errors import EXIT_DOES_NOT_FIT, InputError, UsageError, VlmquantError, first_line, shown
from vlmquant.limits import is_allocation_failure
from vlmquant.threads import wait_without_spinning

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

COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": models.inspect,
    "plan": models.plan,
    "data": sets.data,
    "calibrate": sets.calibrate,
    "quantize": models.quantize,
    "eval": reports.evaluate,
    "compare": reports.compare,
    "gate": reports.gate,
    "export": checkpoints.export,
    "verify": checkpoints.verify,
    "check": checkpoints.check,
    "push": checkpoints.push,
    "demo": machine.demo,
    "doctor": machine.doctor,
    "tune": machine.tune,
}

app = typer.Typer(
    name="vlmquant",
    help="Quantize vision-language models per component, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for name, function in COMMANDS.items():
    app.command(name)(function)


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
