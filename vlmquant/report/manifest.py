"""What a report shows of a checkpoint's manifest (vlmquant.json); a model without one simply has less to show."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmquant.evaluation.records import Run

LAYER = re.compile(r"\.([0-9]{1,6})\.")
MOST = 1e15
"""Of what is shown of a manifest, which is whatever its file says."""


@dataclass(frozen=True)
class ComponentBytes:
    component: str
    before: int
    after: int


@dataclass(frozen=True)
class LayerError:
    """The relative output error of one quantized weight, tr(E H E^T) / tr(W H W^T)."""

    component: str
    layer: int
    kind: str
    """Name of the module inside its layer, such as down_proj."""
    error: float


def recipe_of(run: Run) -> Mapping[str, Any]:
    """The recipe that the model was made with, every default filled in; empty where it is unknown."""
    return _mapping((run.manifest or {}).get("recipe"))


def recipe_text(run: Run) -> str:
    import yaml

    recipe = recipe_of(run)
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe else ""


def component_bytes(run: Run) -> list[ComponentBytes]:
    """Bytes of every component before and after, in the plan's order."""
    components = _mapping(_mapping((run.manifest or {}).get("plan")).get("components"))
    found = []
    for name, totals in components.items():
        before, after = (_size(_mapping(totals).get(key)) for key in ("bytes_before", "bytes_after"))
        if before is not None and after is not None:
            found.append(ComponentBytes(str(name), before, after))
    return found


def layer_errors(run: Run) -> list[LayerError]:
    """The errors of weights that lie in a numbered layer and have a positive error, in the manifest's order."""
    manifest = run.manifest or {}
    lines = _mapping(manifest.get("plan")).get("lines")
    component = {
        line["name"]: line["component"]
        for line in map(_mapping, lines if isinstance(lines, list) else ())
        if isinstance(line.get("name"), str) and isinstance(line.get("component"), str)
    }
    found = []
    for name, error in _mapping(manifest.get("errors")).items():
        layer = LAYER.search(name)
        if layer and name in component and type(error) in (int, float) and 0 < error < MOST:
            kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
            found.append(LayerError(component[name], int(layer[1]), kind, float(error)))
    return found


def work_of(run: Run) -> list[tuple[str, str]]:
    """Memory and seconds that quantizing took, beside what was planned; empty where the manifest does not say."""
    work = _mapping((run.manifest or {}).get("work"))
    planned = _mapping(work.get("planned"))
    took, thought = _size(work.get("peak_bytes")), _size(planned.get("peak_bytes"))
    found = []
    if took is not None and thought is not None:
        found.append(("peak memory of quantizing", f"{took / 2**20:,.0f} MiB, planned {thought / 2**20:,.0f} MiB"))
    seconds, span = _number(work.get("seconds")), planned.get("seconds")
    least, most = map(_number, span) if isinstance(span, list) and len(span) == 2 else (None, None)
    if seconds is not None and least is not None and most is not None:
        found.append(("seconds of quantizing", f"{seconds:,.0f}, planned {least:,.0f} to {most:,.0f}"))
    return found


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < MOST else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _size(value: Any) -> int | None:
    """A number of bytes; None for what is none."""
    return value if type(value) is int and 0 <= value < MOST else None
