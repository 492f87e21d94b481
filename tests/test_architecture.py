"""Imports point down: a module imports only from rooms below its own in the map of vlmquant/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlmquant"

# Top to bottom; a room may import from every room below it, and from itself.
ROOMS = [
    "cli",
    "demo",
    "doctor",
    "tables",
    "recommend",
    "ablate",
    "pipeline",
    "publish",
    "polish",
    "export",
    "exempt",
    "gate",
    "report",
    "sensitivity",
    "gradients",
    "evaluation",
    "algorithms",
    "budget",
    "stream",
    "checkpoint",
    "loading",
    "state",
    "engines",
    "support",
    "formats",
    "linear",
    "kernels",
    "serving",
    "planning",
    "calibration",
    "kvcache",
    "components",
    "fp8",
    "guess",
    "families",
    "headers",
    "experts",
    "conversion",
    "shards",
    "hub",
    "packing",
    "grid",
    "recipe",
    "pages",
    "ranks",
    "devices",
    "progress",
    "streams",
    "scratch",
    "reading",
    "limits",
    "signals",
    "threads",
    "thresholds",
    "compiled",
    "cache",
    "notices",
    "nearest",
    "errors",
]
# The package's face and its `python -m` entry: they import lazily, from anywhere.
FACES = {"__init__", "__main__", "_hook"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "vlmquant" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("vlmquant.")}
    return rooms


def upward_imports(room: str, source: str) -> list[str]:
    below = ROOMS[ROOMS.index(room) :]
    return sorted(imported_rooms(source) - set(below))


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in FACES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{path.name} is in no room of the map: add the room to vlmquant/architecture.md and to ROOMS"
    assert upward_imports(room, path.read_text()) == []


def test_every_room_exists() -> None:
    assert {room_of(path) for path in MODULES} == set(ROOMS)


def test_the_check_sees_an_upward_import() -> None:
    assert upward_imports("grid", "from vlmquant.cli import main") == ["cli"]
    assert upward_imports("grid", "import vlmquant.stream") == ["stream"]
    assert upward_imports("grid", "from vlmquant import stream") == ["stream"]
    assert upward_imports("stream", "def f():\n    from vlmquant.grid import QuantizedWeight") == []
