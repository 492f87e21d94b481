"""What a user should hear once: that something slower ran than could have, and why."""

import functools
import logging

LOGGER = logging.getLogger("vlmquant.kernels.cuda")


@functools.cache
def warn_once(message: str) -> None:
    """Log the message at its first call in this process."""
    LOGGER.warning(message)
