"""What a user should hear once in a process: that something ran slower than it could have, and why."""

import functools
import logging

LOGGER = logging.getLogger("vlmquant")


@functools.cache
def warn_once(message: str) -> None:
    """Log the message at its first call in this process."""
    LOGGER.warning(message)
