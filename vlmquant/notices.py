"""What a user should hear once in a process: that something ran slower than it could have, and why."""

import functools
import logging

LOGGER = logging.getLogger("vlmquant")


@functools.cache
def warn_once(message: str) -> None:
    """Log the message at its first call in this process."""
    LOGGER.warning(message)


@functools.cache
def tell_once(message: str) -> None:
    """Log what is worth knowing, and no reason to worry, at its first call in this process."""
    LOGGER.info(message)
