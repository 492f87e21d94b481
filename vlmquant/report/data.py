"""Report: what an evaluation found, as data; its JSON file, written and read back whole."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from vlmquant.errors import InputError, UsageError
from vlmquant.evaluation.metrics import summarize
from vlmquant.evaluation.records import Estimate, Run

REPORT_VERSION = 1
"""Grows whenever an older vlmquant could no longer read the file."""

Summary = dict[str, dict[str, Estimate]]
"""Estimates by stratum and metric."""

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """One threshold of the gate, judged for one candidate. Losses count upwards: a positive one is worse."""

    candidate: str
    """Label of the run judged."""
    threshold: str
    """Key of the recipe's `gate`, such as max_kl."""
    point: float | None
    """The loss observed, in the threshold's own unit; None where it could not be measured."""
    low: float | None
    """Lower one-sided bound at 1 - alpha; None where the samples give none."""
    high: float | None
    """Upper one-sided bound at 1 - alpha; None where the samples give none."""
    margin: float
    n: int
    """Samples compared."""
    n_needed: int | None
    """Samples that would probably decide (power 80 %); None where it is decided or no number helps."""
    outcome: Outcome
    reason: str
    """One sentence: why this outcome."""


def overall(verdicts: Sequence[Verdict]) -> Outcome:
    """fail if any fails, else inconclusive if any is, else pass. Raises UsageError for no verdict at all."""
    if not verdicts:
        raise UsageError("gate: nothing was judged, so nothing passes; set a threshold and evaluate a candidate")
    outcomes = {verdict.outcome for verdict in verdicts}
    return "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"


@dataclass(frozen=True)
class Report:
    """One evaluation: the reference and every candidate, on the same samples."""

    version: int
    reference: Run
    candidates: tuple[Run, ...]
    summaries: tuple[Summary, ...]
    """Of the reference, then of each candidate."""
    command: tuple[str, ...]
    """The words of the command line that made it."""
    created: str
    """ISO 8601, UTC."""
    hashes: dict[str, str]
    """Digests by what they are of, such as "evaluation set"."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The reference, then the candidates: the order of `summaries`."""
        return (self.reference, *self.candidates)


def build_report(
    reference: Run,
    candidates: Sequence[Run],
    *,
    command: Sequence[str],
    hashes: Mapping[str, str],
    seed: int,
    resamples: int,
) -> Report:
    """Summarize the runs and put them together. Raises InputError where two runs have the same label."""
    _check_labels([run.label for run in (reference, *candidates)], where="report")
    summaries = [summarize(reference, None, seed=seed, resamples=resamples)]
    summaries += [summarize(run, reference, seed=seed, resamples=resamples) for run in candidates]
    return Report(
        version=REPORT_VERSION,
        reference=reference,
        candidates=tuple(candidates),
        summaries=tuple(summaries),
        command=tuple(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hashes=dict(hashes),
    )


def write_json(report: Report, path: Path) -> None:
    """Write the whole report, per-sample scores included, to a temporary file and rename it into place.

    JSON has no NaN: a number that is not finite is written as the word "NaN", "Infinity" or "-Infinity".
    """
    text = json.dumps(_spell(asdict(report)), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one. Raises InputError naming the path."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place for the report") from error


def read_json(path: Path) -> Report:
    """Read a report written by this version. Raises InputError in one line for every other file."""
    remedy = "write it anew with `vlmquant eval`"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; give the report.json of `vlmquant eval`"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; {remedy}") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged or cut short, not valid JSON: {error}; {remedy}") from error
    if not isinstance(data, dict) or not isinstance(version := data.get("version"), int):
        raise InputError(f"{path}: no report of vlmquant: it has no version number; {remedy}")
    if version != REPORT_VERSION:
        kind = "newer" if version > REPORT_VERSION else "older"
        raise InputError(
            f"{path}: report version {version} is {kind} than this vlmquant reads ({REPORT_VERSION}); {remedy}"
        )
    try:
        report = _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg'].lower()}; {remedy}") from error
    _check_whole(report, where=str(path))
    return report


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def _check_whole(report: Report, *, where: str) -> None:
    if len(report.summaries) != len(report.runs):
        raise InputError(
            f"{where}: {len(report.summaries)} summaries, {len(report.runs)} runs; write it anew with `vlmquant eval`"
        )
    _check_labels([run.label for run in report.runs], where=where)
    for run in report.runs:
        ids = [sample.id for sample in run.samples]
        if len(ids) != len(set(ids)):
            raise InputError(f"{where}: run '{run.label}' holds a sample twice; write it anew with `vlmquant eval`")


def _check_labels(labels: Sequence[str], *, where: str) -> None:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"{where}: two runs are called '{twice[0]}'; give each model a label of its own")


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _spell(value: Any) -> Any:
    """The same nested value with non-finite numbers spelled out, paths and other objects as text."""
    if isinstance(value, dict):
        return {str(key): _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, str | int | float | bool | None) else str(value)
