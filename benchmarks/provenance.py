"""Where and how a result came about: what stands at the head of every results file."""

import os
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmquant.evaluation.environment import environment

PACKAGES = ("vlmquant", "torch", "transformers")


def command() -> list[str]:
    """The command line of this process, without this machine's folders."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    return ["python", str(script), *(Path(word).name if os.sep in word else word for word in sys.argv[1:])]


def run_with(environment: Mapping[str, str]) -> None:
    """Start this script anew where its variables are others: torch reads them when it is imported."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


def provenance() -> dict[str, Any]:
    return {
        "command": " ".join(command()),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "environment": environment(),
    }
