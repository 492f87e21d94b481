"""What a user should hear once in a process, that something ran slower than it could have, and why; and how much of
all that is no result they hear at all.

Two variables of the environment say how much, so that processes of ours that work for this one do the same.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("vlmquant")
QUIET, VERBOSE = "VLMQUANT_QUIET", "VLMQUANT_VERBOSE"
NO = ("", "0", "false", "no", "off")


def is_quiet() -> bool:
    """Only results and errors: no progress, no notices."""
    return os.environ.get(QUIET, "").lower() not in NO


def is_verbose() -> bool:
    """Also what is worth knowing and no reason to worry, and where in the code an error came from."""
    return os.environ.get(VERBOSE, "").lower() not in NO


def obey(*, quiet: bool, verbose: bool) -> None:
    """Tell as much from now on, here and in processes that are started."""
    for name, wanted in ((QUIET, quiet), (VERBOSE, verbose)):
        if wanted:
            os.environ[name] = "1"
        else:
            os.environ.pop(name, None)
    follow()


@contextmanager
def restored() -> Iterator[None]:
    """Leaves the environment as it was."""
    before = {name: os.environ.get(name) for name in (QUIET, VERBOSE)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        follow()


def follow() -> None:
    """Let the logger tell what the environment says."""
    LOGGER.setLevel(logging.ERROR if is_quiet() else logging.INFO if is_verbose() else logging.NOTSET)
    if is_verbose() and not LOGGER.handlers:
        LOGGER.addHandler(logging.StreamHandler())


@functools.cache
def warn_once(message: str) -> None:
    """Log the message at its first call in this process."""
    LOGGER.warning(message)


@functools.cache
def tell_once(message: str) -> None:
    """Log what is worth knowing, and no reason to worry, at its first call in this process."""
    LOGGER.info(message)


follow()
