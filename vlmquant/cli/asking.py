"""generate: ask a model about images."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vlmquant import signals, streams
from vlmquant.cli.options import Device, Dtype, Json, Model, Threads
from vlmquant.cli.output import emit, tell
from vlmquant.cli.words import parse_dtype
from vlmquant.errors import UsageError, visible
from vlmquant.threads import set_threads

PROMPT = "> "
"""Stands before a question that is typed in a terminal."""


def generate(
    model: Model,
    question: Annotated[str | None, typer.Argument(help="Else questions are read from standard input.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Image to ask about; several may be given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Ask a model, quantized or not, about images: the answer comes word by word.

    Without a question, each line of standard input is one, and earlier ones are remembered; an empty line ends it. The
    answer is the most likely one, token by token, as in `eval`; the prompt is made by the model's own chat template.
    """
    wanted = parse_dtype(dtype)
    if question is not None and not question.strip():
        raise UsageError("generate: the question is empty; ask something, or leave it out to type questions")
    from vlmquant.calibration.images import open_image

    for path in image or ():
        open_image(path)  # a wrong path is told before a model is loaded
    from transformers.utils import logging

    from vlmquant.devices import find_device, tell_device
    from vlmquant.evaluation.conversation import Conversation
    from vlmquant.kernels.probe import compute_dtype
    from vlmquant.progress import working

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_threads(threads)
    place = find_device(device)
    tell_device(place)
    with working("load the model"):
        talk = Conversation(model, dtype=wanted or compute_dtype(place), device=place, images=image or ())
    for asked in [question] if question is not None else read_questions():
        answer = talk.ask(asked, max_new_tokens=max_new_tokens, hear=(lambda piece: None) if as_json else write_piece)
        if as_json:
            emit(answer.to_json())
        else:
            write_piece("\n")
        if not answer.finished:
            tell(f"cut after {answer.tokens} tokens; --max-new-tokens allows more")


def read_questions() -> Iterator[str]:
    """Lines of standard input up to an empty one or its end."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    while sys.stdin is not None:
        if typed:
            tell_prompt()
        signals.check()
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def tell_prompt() -> None:
    stderr = streams.Stderr()
    stderr.write(PROMPT)
    stderr.flush()


def write_piece(piece: str) -> None:
    """Of an answer, at once; what could steer a terminal is escaped."""
    with streams.printing():
        sys.stdout.write("\n".join("\t".join(map(visible, line.split("\t"))) for line in piece.split("\n")))
