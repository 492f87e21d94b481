"""Results on stdout, for people and for machines; one message on stderr for an error."""

import json
import sys
from typing import Any, NoReturn

import typer

from vlmquant import streams
from vlmquant.errors import printable


def emit(value: dict[str, Any]) -> None:
    """A result for machines, on stdout: JSON in ASCII, in which a number that is not finite is a word."""
    from vlmquant.report.data import spelled

    with streams.printing():
        typer.echo(json.dumps(spelled(value), indent=2, allow_nan=False))


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


def fail(message: object, code: int) -> NoReturn:
    """One message on stderr, then exit."""
    stderr = streams.Stderr()
    stderr.write(f"vlmquant: {printable(message)}\n")
    stderr.flush()
    sys.exit(code)
