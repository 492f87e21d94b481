"""What every command has beside its own options: -q and -v, examples and exit codes in its help, fair suggestions."""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlmquant import notices
from vlmquant.errors import EXIT_CODES, EXIT_ERROR, EXIT_OK, EXIT_USAGE, UsageError
from vlmquant.nearest import nearest

OPTION_MEANINGS = {
    "--output": "--out",
    "--output-dir": "--out",
    "--calib": "--calibration",
    "--dataset": "--data",
    "--max-tokens": "--max-new-tokens",
    "--overwrite": "--force",
    "--original": "--reference",
    "--base": "--reference",
    "--silent": "--quiet",
}
COMMAND_MEANINGS = {
    "quantise": "quantize",
    "convert": "quantize",
    "compress": "quantize",
    "evaluate": "eval",
    "benchmark": "eval",
    "chat": "generate",
    "ask": "generate",
    "run": "generate",
    "infer": "generate",
    "info": "inspect",
    "show": "inspect",
    "list": "recipes",
    "recipe": "recipes",
    "upload": "push",
    "dataset": "data",
}
"""What people call an option or command elsewhere -> what it is called here."""
EVERYWHERE = (EXIT_OK, EXIT_ERROR, EXIT_USAGE)

NAME = "vlmquant"


def program() -> str:
    """What starts us, for usage lines and commands to be copied: our name, but for who asked for python -m, on whose
    path it may not be."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {NAME}" if spec is not None and spec.name == f"{NAME}.__main__" else NAME


EPILOG = f"""\b
Examples:
  # quantize, ask, measure
  {program()} quantize org/model --out out
  {program()} generate out --image cat.jpg "What is this?"
  {program()} eval out --reference org/model --data set --html report.html

Every command has --help with examples and its exit codes. Defaults of options come from the environment:
VLMQUANT_RECIPE, VLMQUANT_CALIBRATION, VLMQUANT_DEVICE, VLMQUANT_DTYPE, VLMQUANT_THREADS, VLMQUANT_QUIET,
VLMQUANT_VERBOSE. Others: VLMQUANT_CACHE (folder of compiled kernels), VLMQUANT_COMPILED=0 (no compiled loops),
VLMQUANT_DISABLE_HF_PATCH=1 (leave transformers as it is)."""

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", envvar=notices.QUIET, help="Only results and errors: no progress, no notices.")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", envvar=notices.VERBOSE, help="Also what is worth knowing, and where an error came from."
    ),
]


@dataclass(frozen=True)
class Entry:
    """A command of the table."""

    function: Callable[..., Any]
    examples: tuple[str, ...]
    """What is done, and on the next line the command that does it."""
    codes: tuple[int, ...] = ()
    """With which it may end, beside those of EVERYWHERE."""
    works: bool = True
    """Whether it keeps people waiting, rather than waits for them."""

    @property
    def epilog(self) -> str:
        """The end of its help; lines behind a \b stay as they are."""
        shown = [f"  {line}" for example in self.examples for line in _commented(example)]
        codes = [f"  {code}  {EXIT_CODES[code]}" for code in sorted({*EVERYWHERE, *self.codes})]
        return "\n".join(["\b", "Examples:", *shown, "", "\b", "Exit codes:", *codes])

    @property
    def commands(self) -> list[str]:
        """Of its examples."""
        return [example.partition("\n")[2] for example in self.examples]


def _commented(example: str) -> list[str]:
    what, _, command = example.partition("\n")
    return [f"# {what}", *(re.sub(rf"^{NAME} ", f"{program()} ", line) for line in command.split("\n"))]


def first_paragraph(function: Callable[..., Any]) -> str:
    """Of its docstring, on one line: what a list of commands says of it."""
    return " ".join(inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0].split())


class Command(TyperCommand):
    """Suggests the option that is meant, or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # newer versions of typer hold a click of their own
            if type(error).__name__ == "NoSuchOption":
                options = [name for param in self.get_params(ctx) for name in param.opts if name.startswith("--")]
                meant = nearest(getattr(error, "option_name", ""), options, OPTION_MEANINGS)
                error.possibilities = [meant] if meant else []  # type: ignore[attr-defined]
            raise


class Group(TyperGroup):
    """Suggests the command that is meant, or none."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            message = getattr(error, "message", "")
            if message.startswith("No such command"):
                meant = nearest(args[0], self.commands, COMMAND_MEANINGS)
                message = message.partition(" Did you mean")[0].rstrip(".")
                error.message = f"{message}. Did you mean {meant!r}?" if meant else f"{message}."  # type: ignore[attr-defined]
            raise


def telling(name: str, entry: Entry) -> Callable[..., Any]:
    """The command with -q and -v."""
    command = entry.function

    @functools.wraps(command)
    def run(*, quiet: bool, verbose: bool, **given: Any) -> Any:
        from vlmquant.progress import working

        obey(quiet=quiet, verbose=verbose)
        with working(name) if entry.works else nullcontext():
            return command(**given)

    return with_options(run, command, {"quiet": Quiet, "verbose": Verbose})


def with_options(run: Callable[..., Any], own: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A function that typer takes to have the parameters of `own`, and these flags."""
    signature = inspect.signature(own)
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in options.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *flags])  # type: ignore[attr-defined]
    run.__annotations__ = {**own.__annotations__, **options}
    return run


def obey(*, quiet: bool, verbose: bool) -> None:
    if quiet and verbose:
        raise UsageError("--quiet and --verbose are given; leave one out")
    notices.obey(quiet=quiet, verbose=verbose)


def register(app: typer.Typer, table: dict[str, Entry]) -> None:
    """Make typer's commands of a table."""
    for name, entry in table.items():
        app.command(name, cls=Command, epilog=entry.epilog, short_help=first_paragraph(entry.function))(
            telling(name, entry)
        )
