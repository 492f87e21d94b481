"""Every test hears what is otherwise said once in a process."""

import pytest

from vlmquant.notices import warn_once


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    warn_once.cache_clear()
