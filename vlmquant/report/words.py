"""What was done and when, in words: the opening of a page. A manifest is a stranger's, and may say anything."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from vlmquant.evaluation.records import Run
from vlmquant.report.data import Report
from vlmquant.report.manifest import recipe_of

COMPONENT_WORDS = {
    "vision_encoder": "vision",
    "lm_head": "head",
}
"""Components whose name is not the word for them."""

METHOD_WORDS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "awq+gptq": "AWQ and GPTQ",
    "search": "searched scales",
    "rtn": "to nearest",
}
"""Methods whose name says something that the scheme does not: INT8 is INT8."""

INTEGER_WEIGHTS = re.compile(r"w([2-8])a16(?:-g([0-9]{1,5}))?(-asym)?")
LABEL_WORDS = (
    (re.compile(r"w8a8-.*"), "INT8"),
    (re.compile(r"fp8.*"), "FP8"),
    (re.compile(r"fp8a16.*"), "FP8 weights"),
    (re.compile(r"nvfp4"), "NVFP4"),
    (re.compile(r"nvfp4a16"), "NVFP4 weights"),
    (re.compile(r"mxfp4a16"), "MXFP4 weights"),
    (re.compile(r"nf4"), "NF4"),
    (re.compile(r"bnb-int8"), "LLM.int8()"),
)
"""Label of a scheme -> its name among people."""

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NAME = 60
"""Letters of a name that a heading takes."""


def scheme_words(label: str) -> str:
    """w4a16-g128 -> `4 bit`; a label that we do not know stays as it is."""
    if found := INTEGER_WEIGHTS.fullmatch(label):
        return f"{found[1]} bit"
    return next((words for form, words in LABEL_WORDS if form.fullmatch(label)), label[:NAME])


def treatment(run: Run) -> list[str]:
    """One phrase for each component that was quantized: `vision INT8`, `language 4 bit GPTQ`; empty if unknown."""
    phrases = []
    for component, schemes in _schemes(run).items():
        ways = [_way(label, method) for label, method in schemes if method is not None]
        if ways:
            phrases.append(f"{_component(component)} {' and '.join(dict.fromkeys(ways))}")
    return phrases


def kept_components(run: Run) -> list[str]:
    """The components of which nothing was quantized."""
    return [_component(name) for name, schemes in _schemes(run).items() if all(method is None for _, method in schemes)]


def what_was_done(run: Run) -> str:
    """`Vision INT8, language 4 bit GPTQ; projector, embedding, head stay bfloat16. Calibrated on 128 samples.`"""
    phrases = treatment(run)
    if not phrases:
        return ""
    text = ", ".join(phrases)
    kept, dtype = kept_components(run), (run.manifest or {}).get("dtype")
    if kept:
        stays = "stays" if len(kept) == 1 else "stay"
        text += f"; {', '.join(kept)} {stays} {dtype if isinstance(dtype, str) else '16 bit'}"
    return f"{text[:1].upper()}{text[1:]}. {calibration_words(run)}".strip()


def calibration_words(run: Run) -> str:
    """`Calibrated on 128 samples (96 caption, 16 vqa, 16 object).`"""
    record = _mapping((run.manifest or {}).get("calibration"))
    count = record.get("samples")
    if type(count) is not int:
        return "Needed no calibration data." if run.manifest and treatment(run) else ""
    strata = record.get("strata")
    parts = [
        f"{row['got']} {str(row['task'])[:NAME]}"
        for row in map(_mapping, strata if isinstance(strata, list) else ())
        if type(row.get("got")) is int and isinstance(row.get("task"), str) and row["got"]
    ]
    shares = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    return f"Calibrated on {count:,} samples{shares}."


def page_title(report: Report) -> str:
    """What a browser's tab and a listing of files call it."""
    return ", ".join(run.label for run in report.candidates) or report.reference.label


def recipe_name(run: Run) -> str | None:
    name = recipe_of(run).get("name")
    return name[:NAME] if isinstance(name, str) else None


def date_words(created: str) -> str:
    """ISO 8601 -> `29 November 2026, 00:43 UTC`; what is no date stays as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    return f"{moment.day} {MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M} UTC"


def _way(label: str, method: str) -> str:
    return f"{scheme_words(label)} {METHOD_WORDS.get(method, '')}".strip()


def _component(name: str) -> str:
    return COMPONENT_WORDS.get(name, name[:NAME])


def _schemes(run: Run) -> dict[str, list[tuple[str, str | None]]]:
    """Component -> label and method of its weights, most bytes first; method None: kept."""
    lines = _mapping((run.manifest or {}).get("plan")).get("lines")
    sizes: dict[str, dict[tuple[str, str | None], int]] = {}
    for line in map(_mapping, lines if isinstance(lines, list) else ()):
        component, label, method = line.get("component"), line.get("label"), line.get("method")
        if isinstance(component, str) and isinstance(label, str) and (method is None or isinstance(method, str)):
            size = line.get("bytes_before")
            part = sizes.setdefault(component, {})
            part[label, method] = part.get((label, method), 0) + (size if type(size) is int else 0)
    return {name: sorted(part, key=lambda way: -part[way]) for name, part in sizes.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
