"""Report: what an evaluation found, as data; its JSON file, written and read back whole."""

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np

from vlmquant.errors import InputError, UsageError, first_line, shown
from vlmquant.evaluation.metrics import summarize
from vlmquant.evaluation.records import Estimate, Run
from vlmquant.reading import check, parse_json, read_text

REPORT_VERSION = 1
"""Grows whenever an older vlmquant could no longer read the file."""

REMEDY = "write it anew with `vlmquant eval`"
KL_ROUNDING = 1e-4
"""Nats a token that a KL may be below 0, where the two models are as good as the same."""
STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
"""Names of what this process has open: a file among them is appended to and never replaced."""
START_BYTES = 4096
REPORT_START = re.compile(
    rb'\{"version":\d+,"reference":|# vlmquant report: |<!doctype html>.*<title>vlmquant: '
    rb'|<\?xml[^>]*>\s*<testsuites>\s*<testsuite name="vlmquant\.gate"',
    re.DOTALL | re.IGNORECASE,
)
"""How the JSON, Markdown, HTML and JUnit files that vlmquant writes begin."""

Summary = dict[str, dict[str, Estimate]]
"""Estimates by stratum and metric."""

Outcome = Literal["pass", "fail", "inconclusive", "skipped"]
"""skipped: the samples say nothing of it, and the thresholds allow that."""


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
    stratum: str | None = None
    """The task whose samples were judged; None: all samples."""
    alpha: float | None = None
    """Error rate of each bound."""
    advice: str = ""
    """What would decide an inconclusive one."""


def overall(verdicts: Sequence[Verdict]) -> Literal["pass", "fail", "inconclusive"]:
    """fail if any fails, else inconclusive if any is or all are skipped, else pass. UsageError for no verdict."""
    if not verdicts:
        raise UsageError("gate: nothing was judged, so nothing passes; set a threshold and evaluate a candidate")
    outcomes = {verdict.outcome for verdict in verdicts}
    return "fail" if "fail" in outcomes else "pass" if outcomes in ({"pass"}, {"pass", "skipped"}) else "inconclusive"


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
    text = json.dumps(spelled(asdict(report)), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    write_text(path, text + "\n")


def check_report_paths(paths: Mapping[str, Path | None], *, apart: Sequence[Path] = ()) -> None:
    """Before any work: UsageError where a report could not be written, or would be in the place of something else.

    paths: by the option that they were given with. apart: files and directories that are read; nothing may be written
    over the ones or into the others.
    """
    targets: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None or (target := _target(path)) is None:
            continue
        if target in targets:
            raise UsageError(f"{path}: is given with {targets[target]} and with {option}; choose another name for one")
        targets[target] = option
        for other in apart:
            if target.is_relative_to(os.path.realpath(other)):
                raise UsageError(f"{path}: is, or lies in, {other}, which is read; choose another place for {option}")
        _refuse_foreign(target, path)
        around = next(parent for parent in target.parents if parent.exists())
        if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
            raise UsageError(f"{path}: nothing can be written in {around}; choose another place for {option}")


def write_text(path: Path, text: str) -> None:
    """Write a report so that it is either the old one or the whole new one.

    A link is followed to its file, and what is a pipe or terminal is written into; what may be replaced, says
    `check_report_paths`. Raises InputError naming the path where it cannot be written.
    """
    content = text.encode("utf-8", "replace")
    try:
        target = _target(path)
        if target is None:
            with open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as stream:
                stream.write(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".vlmquant-{uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                if target.exists():
                    _take_over_mode(file.fileno(), target)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place for the report") from error


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file. Raises InputError naming the path; a pipe that nobody reads is not waited for."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written: {first_line(error)}; name another file, or none") from error


def _target(path: Path) -> Path | None:
    """The regular file that a report becomes, links followed; None for a pipe, terminal or other stream."""
    text = str(path)
    try:
        if text.startswith(STREAMS):
            return None
        try:
            kind = stat.S_IFMT(os.stat(path).st_mode)
        except FileNotFoundError:
            kind = stat.S_IFREG
        if kind in (stat.S_IFIFO, stat.S_IFCHR):
            return None
        if kind != stat.S_IFREG or not path.name:
            raise UsageError(f"{path}: is no file; give the name of a file for the report")
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UsageError(f"{shown(text)}: cannot be written ({first_line(error)}); choose another name") from error


def _refuse_foreign(target: Path, path: Path) -> None:
    """UsageError for a file that holds something and is no report: another report is what a report replaces."""
    try:
        with target.open("rb") as file:
            start = file.read(START_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); choose another name for the report") from error
    if start and not REPORT_START.match(start):
        raise UsageError(f"{path}: exists and is no report of vlmquant; choose another name, or remove it")


def _take_over_mode(descriptor: int, target: Path) -> None:
    before = target.stat()
    with suppress(PermissionError):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def read_json(path: Path) -> Report:
    """Read a report written by this version. Raises InputError in one line for every other file."""
    text = read_text(path, remedy="give the report.json of `vlmquant eval`")
    data = parse_json(text, where=str(path), remedy=REMEDY)
    if not isinstance(data, dict) or type(version := data.get("version")) is not int:
        raise InputError(f"{path}: no report of vlmquant: it has no version number; {REMEDY}")
    if version != REPORT_VERSION:
        kind = "newer" if version > REPORT_VERSION else "older"
        raise InputError(
            f"{path}: report version {shown(version)} is {kind} than this vlmquant reads ({REPORT_VERSION}); {REMEDY}"
        )
    report: Report = check(Report, data, where=str(path), remedy=REMEDY)
    _check_whole(report, where=str(path))
    return report


def _check_whole(report: Report, *, where: str) -> None:
    """InputError for what no evaluation finds, and for summaries that are not those of the samples."""
    if len(report.summaries) != len(report.runs):
        raise InputError(f"{where}: {len(report.summaries)} summaries, {len(report.runs)} runs; {REMEDY}")
    _check_labels([run.label for run in report.runs], where=where)
    for run, summary in zip(report.runs, report.summaries, strict=True):
        place = f"{where}: run '{shown(run.label)}'"
        ids = [sample.id for sample in run.samples]
        if not ids or len(ids) != len(set(ids)):
            raise InputError(f"{place} holds {'a sample twice' if ids else 'no sample'}; {REMEDY}")
        for sample in run.samples:
            if (sample.flips or 0) > sample.tokens or (sample.kl or 0.0) < -KL_ROUNDING * (1 + sample.tokens):
                raise InputError(f"{place}: sample {shown(sample.id)} has impossible flips or KL; {REMEDY}")
        _check_summary(summary, run, None if run is report.reference else report.reference, where=place)


def _check_summary(summary: Summary, run: Run, reference: Run | None, *, where: str) -> None:
    """InputError where a point is not what the samples give; one that is no number there is left to the gate."""
    try:
        with np.errstate(all="ignore"):
            found = summarize(run, reference, seed=0, resamples=1)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for stratum, estimates in summary.items():
        for metric, estimate in estimates.items():
            real = found.get(stratum, {}).get(metric)
            told = estimate.point
            if real is None or (
                math.isfinite(real.point) and not math.isclose(told, real.point, rel_tol=1e-6, abs_tol=1e-9)
            ):
                raise InputError(
                    f"{where}: {shown(metric)} of {shown(stratum)} is {told:g} in the summary and "
                    f"{'absent' if real is None else f'{real.point:g}'} in the samples; {REMEDY}"
                )


def _check_labels(labels: Sequence[str], *, where: str) -> None:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"{where}: two runs are called '{shown(twice[0])}'; give each model a label of its own")


def spelled(value: Any) -> Any:
    """The same nested value as JSON has it, with non-finite numbers spelled out, paths and other objects as text."""
    if isinstance(value, dict):
        return {str(key): spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, str | int | float | bool | None) else str(value)
