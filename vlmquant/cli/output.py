"""Results on stdout, for people and for machines; one message on stderr for an error."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from vlmquant import notices, streams
from vlmquant.errors import printable

if TYPE_CHECKING:
    from vlmquant.tables.layout import Table

WIDTH = 200
"""Of tables in files and pipes."""


def emit(value: dict[str, Any]) -> None:
    """A result for machines, on stdout: JSON in ASCII, in which a number that is not finite is a word."""
    from vlmquant.report.data import spelled

    with streams.printing():
        typer.echo(json.dumps(spelled(value), indent=2, allow_nan=False))


def show(table: "Table") -> None:
    """Print a table on stdout, where that is no terminal up to WIDTH wide."""
    if not _may_have_styles():
        with streams.printing():
            typer.echo(table.text(WIDTH))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with streams.printing():
        table.print(console)


def _may_have_styles() -> bool:
    """Whether stdout is a terminal, or is to be taken for one; else rich is not worth its import."""
    asked = any(os.environ.get(name) for name in ("FORCE_COLOR", "TTY_COMPATIBLE"))
    return asked or (sys.stdout is not None and sys.stdout.isatty())


def say(text: object) -> None:
    """A line of the result, for people."""
    with streams.printing():
        typer.echo(printable(text))


def tell(text: object) -> None:
    """A line on stderr, for people; none if they asked for quiet."""
    if not notices.is_quiet():
        _to_stderr(f"{printable(text)}\n")


def fail(message: object, code: int) -> NoReturn:
    """One message on stderr, then exit."""
    _to_stderr(f"vlmquant: {printable(message)}\n")
    sys.exit(code)


def _to_stderr(text: str) -> None:
    stderr = streams.Stderr()
    stderr.write(text)
    stderr.flush()
