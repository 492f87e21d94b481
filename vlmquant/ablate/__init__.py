"""Which calibration data, by which method: a model's language layers quantized each way and held against the original.

All runs quantize the language layers alone, by the recipe's scheme for them, so that they differ in nothing but the
calibration and the method; text could not calibrate a vision encoder anyway. What was finished in the work folder is
not done again, so that an interrupted ablation goes on.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import vlmquant
from vlmquant import pipeline, signals
from vlmquant.ablate.choice import Choice, Row, choose_row, find_least
from vlmquant.ablate.subsets import KINDS, Kind, Subset, draw_subset, numbered, subset_size
from vlmquant.calibration.sampling import samples_sha256
from vlmquant.calibration.sets import SampleSet, load_set, shared_images, write_set
from vlmquant.checkpoint import check_output
from vlmquant.checkpoint.files import Lock, disk_errors
from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.checkpoint.ownership import remove_checkpoint
from vlmquant.components import ComponentMap
from vlmquant.devices import AUTO, find_device
from vlmquant.errors import DoesNotFitError, InputError, PlanError, UsageError, first_line, shown
from vlmquant.evaluation.metrics import EVERYTHING, kl_difference, summarize
from vlmquant.evaluation.records import Estimate, Run
from vlmquant.evaluation.settings import Settings
from vlmquant.nearest import did_you_mean
from vlmquant.pipeline import SEEING
from vlmquant.planning import Plan, needs_class
from vlmquant.progress import stderr
from vlmquant.reading import read_json
from vlmquant.recipe import KEEP, METHODS, CalibrationSpec, Components, Recipe
from vlmquant.report.cells import FEW
from vlmquant.report.data import Report, write_text

TRIED = ("gptq", "awq", "rtn")
"""Methods where none are named, beside the recipe's own; those that do not fit its scheme are left out."""
STATE_NAME = "ablation.json"
"""What makes a work folder ours, and is therefore the first file in it."""
LOCK_NAME = "ablation.lock"
SETS_NAME = "sets"
ALONE = "all runs quantize the language layers alone, by the same scheme; all else stays at 16 bits here"


@dataclass(frozen=True)
class Cost:
    """Of quantizing once, over all interrupted runs of it that ended by themselves or by a signal."""

    seconds: float = 0.0
    user_cpu_seconds: float = 0.0


@dataclass(frozen=True)
class _State:
    """The content of STATE_NAME."""

    version: Literal[1] = 1
    settings: dict[str, str] = field(default_factory=dict)
    """What all runs of one ablation share, by name."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """By the name of the checkpoint."""


@dataclass(frozen=True)
class Arm:
    """A method on a kind of calibration, once for each draw of its samples."""

    calibration: Kind | None
    """None: the method looks at no calibration, and one draw is all there is."""
    method: str
    recipe: Recipe
    plan: Plan
    draws: int

    @property
    def names(self) -> list[str]:
        """Of the checkpoints."""
        name = f"{self.calibration}-{self.method}" if self.calibration else self.method
        return [numbered(name, draw) for draw in range(1, self.draws + 1)]


@dataclass(frozen=True)
class Ablation:
    """What `ablate` found."""

    rows: tuple[Row, ...]
    """By rising KL."""
    behind: tuple[Estimate, ...]
    """Each row's KL minus the lowest, paired by sample."""
    choice: Choice
    report: Report
    """Of all checkpoints, each draw by itself."""
    cost_unit: str
    """Whose seconds those of the rows are."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        as_good = {self.choice.least, *self.choice.as_good}
        rows = [
            {
                **asdict(row),
                "above_lowest": asdict(above),
                "as_good": place in as_good,
                "recommended": place == self.choice.taken,
            }
            for place, (row, above) in enumerate(zip(self.rows, self.behind, strict=True))
        ]
        return {
            "rows": rows,
            "cost_unit": self.cost_unit,
            "recommendation": self.choice.sentence,
            "notes": list(self.notes),
        }


def ablate(
    model: str | Path,
    recipe: Recipe,
    data: str | Path,
    work: Path,
    *,
    calibration: str | Path | None = None,
    methods: Sequence[str] | None = None,
    kinds: Sequence[Kind] = KINDS,
    samples: int | None = None,
    limit: int | None = None,
    draws: int = 1,
    device: str = AUTO,
    threads: int | None = None,
    keep: bool = False,
    command: Sequence[str] = (),
    tell: Callable[[Ablation], None] = lambda found: None,
) -> Ablation:
    """Quantize a model (a directory or hub id) by each method on each kind of calibration, and score all of them.

    data: held-out samples; limit: at most so many of them. calibration: a set's name or folder instead of the recipe's.
    samples: of each calibration, instead of the recipe's number. draws: of samples, each method on each of them.
    work: a folder of its own; checkpoints lie there until they were scored, with `keep` for good; the calibration sets
    stay. tell: what is done with the result before checkpoints are deleted.
    Raises UsageError where the folder holds something else, InputError where an image is in both sets or there are
    none, DoesNotFitError where the disk is too small for all checkpoints: before anything is written.
    """
    _check_words(methods, kinds)
    device = find_device(device)
    components = pipeline.find_components(model, needing_class=["components.language (scored against the original)"])
    plans, refused = _plan(components, recipe, methods)
    looking = {method for method, (_, plan) in plans.items() if any(line.needs_data for line in plan.lines)}
    drawn = _draw(
        recipe.calibration.at(recipe.effort), calibration, kinds if looking else (), samples=samples, draws=draws
    )
    _refuse_shared(drawn, data, limit)
    arms = [
        Arm(kind, method, _on(made, drawn.size), plan, draws if kind else 1)
        for method, (made, plan) in plans.items()
        for kind in (kinds if method in looking else (None,))
    ]
    folder = _Folder(work, _settings(components, recipe, device, drawn))
    folder.check(components, arms)
    with folder.held():
        for subset in drawn.subsets:
            folder.add_set(subset)
        used = _quantize_all(folder, components, arms, device)
        report = pipeline.evaluate(
            components.model_dir,
            [folder.path / name for name in used],
            data,
            limit=limit,
            settings=Settings(generate=False, device=device, threads=threads),
            command=command,
        )
        found = _weigh(report, arms, folder.costs, used, draws=draws, on_cpu=device == "cpu")
        found = replace(found, notes=(ALONE, *refused, *drawn.notes, *_after(recipe, found, used)))
        tell(found)
        for name in () if keep else used:
            folder.remove(name)
    return found


def _check_words(methods: Sequence[str] | None, kinds: Sequence[str]) -> None:
    known = {"--methods": (methods or (), tuple(name for name in METHODS if name != "bitsandbytes"))}
    known["--calibrations"] = (kinds, KINDS)
    for option, (given, words) in known.items():
        for word in given:
            if word not in words:
                hint = did_you_mean(word, words)
                raise UsageError(f"{option}: '{shown(word)}' is none of {', '.join(words)}{hint}")
            if given.count(word) > 1:
                raise UsageError(f"{option}: {word} stands twice")


def _language_alone(recipe: Recipe, method: str) -> Recipe:
    """The recipe's scheme for the language layers by another method, and nothing else quantized."""
    language = recipe.components.language
    overrides = tuple(one.model_copy(update={"method": None}) for one in language.overrides)
    language = language.model_copy(update={"method": method, "overrides": overrides})
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[:40]}-language-{method.replace('+', '-')}",
            "components": Components(language=language),
            "kv_cache": None,
            "target": None,
        }
    )


def _plan(
    components: ComponentMap, recipe: Recipe, methods: Sequence[str] | None
) -> tuple[dict[str, tuple[Recipe, Plan]], list[str]]:
    """By method, and what is to be told of it. PlanError for a method that was asked for and does not fit."""
    language = recipe.components.language
    if all(scheme in (None, KEEP) for scheme in (language.scheme, *(one.scheme for one in language.overrides))):
        raise UsageError(
            f"recipe {recipe.name}: keeps the language layers at 16 bits, so there is nothing to compare; take one "
            "that quantizes them, such as mixed"
        )
    plans: dict[str, tuple[Recipe, Plan]] = {}
    notes, refused = [], None
    for method in methods or dict.fromkeys((language.method, *TRIED)):
        made = _language_alone(recipe, method)
        try:
            plans[method] = made, pipeline.plan_components(components, made)[1]
        except PlanError as error:
            if methods:
                raise
            refused = error
            notes.append(f"method {method} is left out: {first_line(error)}")
    if not plans:
        raise refused or UsageError("ablate: no method is named")
    return plans, notes


def _on(recipe: Recipe, size: int) -> Recipe:
    """The recipe on a set of which all samples are taken."""
    spec = recipe.calibration.model_copy(update={"strata": None, "samples": size})
    return recipe.model_copy(update={"calibration": spec})


@dataclass(frozen=True)
class _Drawn:
    source: SampleSet
    size: int
    """Samples of each subset."""
    subsets: tuple[Subset, ...]
    notes: tuple[str, ...]


def _draw(
    spec: CalibrationSpec,
    calibration: str | Path | None,
    kinds: Sequence[Kind],
    *,
    samples: int | None,
    draws: int,
) -> _Drawn:
    source = load_set(spec.set if calibration is None else calibration)
    wanted = samples or spec.count
    size = subset_size(source, kinds, wanted)
    subsets = [draw_subset(source, spec, kind, size=size, draw=draw) for draw in range(1, draws + 1) for kind in kinds]
    notes = []
    if size < wanted:
        notes.append(f"calibration: {size} samples each, though {wanted} were asked for: the set has no more of a kind")
    if subsets and spec.strata:
        notes.append("calibration: tasks in proportion to the set's, not by the recipe's strata")
    for subset in subsets:
        if subset.stripped:
            notes.append(f"{subset.name} calibration: {subset.stripped} of {size} samples had their images taken away")
    return _Drawn(source, size, tuple(subsets), tuple(notes))


def _refuse_shared(drawn: _Drawn, data: str | Path, limit: int | None) -> None:
    """InputError where a calibration shows an image of the held-out samples, or was made of one."""
    used = {sample.id for subset in drawn.subsets for sample in subset.samples}
    shown_there = [sample for sample in drawn.source.samples if sample.id in used]
    if both := shared_images(shown_there, pipeline.choose_held_out(data, limit=limit).samples):
        raise InputError(
            f"{data}: {len(both)} of its images are in the calibration set {drawn.source.name} too, such as that of "
            f"{shown(both[0][1])}; evaluate on others"
        )


def _quantize_all(
    folder: "_Folder", components: ComponentMap, arms: Sequence[Arm], device: str
) -> dict[str, Mapping[str, Any]]:
    """By the checkpoint's name, in the order of the arms: what its manifest says of the calibration."""
    used: dict[str, Mapping[str, Any]] = {}
    total = sum(arm.draws for arm in arms)
    for arm in arms:
        for draw, name in enumerate(arm.names, 1):
            stderr.print(f"ablate: {name}, {len(used) + 1} of {total}", soft_wrap=True, markup=False)
            calibration = folder.set_of(numbered(arm.calibration, draw)) if arm.calibration else None
            used[name] = folder.quantize(components, arm, name, calibration=calibration, device=device)
    return used


def _after(recipe: Recipe, found: Ablation, used: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is to be told once all is measured."""
    notes = [
        f"{name}: {len(calibration['too_long'])} samples longer than max_tokens were left out"
        for name, calibration in used.items()
        if calibration.get("too_long")
    ]
    seeing = [part for part in needs_class(recipe) if part.startswith(tuple(f"components.{one} " for one in SEEING))]
    if seeing and found.rows[found.choice.taken].calibration == "text":
        notes.append(f"text alone cannot calibrate all of the recipe: {', '.join(seeing)} needs images")
    if (n := found.rows[0].kl.n) < FEW:
        notes.append(f"{n} held-out samples: the intervals say little; take more")
    return notes


def _settings(components: ComponentMap, recipe: Recipe, device: str, drawn: _Drawn) -> dict[str, str]:
    """What all runs of one ablation share; one by other settings could not be compared with them."""
    return {
        "model": str(components.model_dir.resolve()),
        "recipe": sha256(recipe.model_dump_json().encode()).hexdigest(),
        "calibration set": drawn.source.sha256,
        "number of samples": str(drawn.size),
        "device": device,
        "number of threads": str(torch.get_num_threads()),
        "version of vlmquant": vlmquant.__version__,
        **{f"version of {name}": version(name) for name in ("torch", "transformers")},
    }


class _Folder:
    """The work folder: STATE_NAME, calibration sets and checkpoints."""

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        """UsageError where it is none of this ablation."""
        self.path, self._settings = path, dict(settings)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; give a folder with --work")
        self._state = self._read()

    def _read(self) -> _State:
        settings = self._settings
        if not self.path.is_dir() or not any(name != LOCK_NAME for name in os.listdir(self.path)):
            return _State(settings=settings)
        if not (self.path / STATE_NAME).is_file():
            raise UsageError(f"{self.path}: holds something, and no ablation; give a new folder with --work")
        state: _State = read_json(self.path / STATE_NAME, _State, remedy="give a new folder with --work")
        if other := [name for name in settings if state.settings.get(name) != settings[name]]:
            raise UsageError(
                f"{self.path}: holds an ablation with another {', another '.join(other)}; give a new folder with --work"
            )
        return state

    @property
    def costs(self) -> Mapping[str, Cost]:
        return self._state.costs

    def set_of(self, name: str) -> Path:
        return self.path / SETS_NAME / name

    def check(self, components: ComponentMap, arms: Sequence[Arm]) -> None:
        """UsageError for a place that a checkpoint cannot be put at, DoesNotFitError for too small a disk."""
        sizes = {name: arm.plan.bytes_after for arm in arms for name in arm.names}
        for name in sizes:
            check_output(self.path / name, components.model_dir, resume=True, force=False)
        needed = sum(size for name, size in sizes.items() if not self._is_finished(name))
        around = next(place for place in (self.path, *self.path.resolve().parents) if place.is_dir())
        if needed > (free := shutil.disk_usage(around).free):
            raise DoesNotFitError(
                f"{self.path}: {len(sizes)} checkpoints take {needed:,} bytes of disk until they are scored, and "
                f"{free:,} are free; name fewer --methods or --calibrations, or a folder on another disk"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make it ours, and nobody else's as long as we work in it."""
        lock = Lock(self.path / LOCK_NAME)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            self._state = self._read()
            self._write()
            yield
        finally:
            lock.release()

    def _write(self) -> None:
        write_text(self.path / STATE_NAME, json.dumps(asdict(self._state), indent=2) + "\n")

    def add_set(self, subset: Subset) -> None:
        """Write a calibration set, unless it is there."""
        signals.check()
        place = self.set_of(subset.name)
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            about = {"sources": [{"kind": subset.kind, "images_taken_away": subset.stripped}], "draw": subset.draw}
            write_set(place, subset.samples, about)
        elif samples_sha256(load_set(place).samples) != samples_sha256(subset.samples):
            raise UsageError(f"{place}: holds other samples than this ablation's; give a new folder with --work")

    def _is_finished(self, name: str) -> bool:
        return (self.path / name / MANIFEST_NAME).is_file()

    def quantize(
        self, components: ComponentMap, arm: Arm, name: str, *, calibration: Path | None, device: str
    ) -> Mapping[str, Any]:
        """Make a checkpoint, or go on with it; what its manifest says of the calibration."""
        with self._timed(name):
            done = pipeline.quantize(
                components.model_dir,
                arm.recipe,
                self.path / name,
                calibration=calibration,
                device=device,
                resume=True,
            )
        return done.calibration or {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add what a checkpoint takes to its cost, also where it is interrupted; nothing where it is there."""
        if self._is_finished(name):
            yield
            return
        started, cpu_started = time.monotonic(), os.times().user
        try:
            yield
        finally:
            before = self.costs.get(name, Cost())
            spent = Cost(
                before.seconds + time.monotonic() - started, before.user_cpu_seconds + os.times().user - cpu_started
            )
            self._state = replace(self._state, costs={**self.costs, name: spent})
            self._write()

    def remove(self, name: str) -> None:
        """Delete a checkpoint, but for what is not as we wrote it; its cost goes with it, as it would be made anew."""
        signals.check()
        with signals.held():
            left = remove_checkpoint(self.path / name)
            self._state = replace(
                self._state, costs={other: cost for other, cost in self.costs.items() if other != name}
            )
            self._write()
        if left:
            stderr.print(
                f"{self.path / name}: holds what is not as vlmquant wrote it, which stays: {', '.join(left[:3])}",
                soft_wrap=True,
                markup=False,
            )


def pool(runs: Sequence[Run]) -> Run:
    """Several runs over the same samples as one: each sample's sums over all of them."""
    scores = [
        replace(
            same[0],
            tokens=sum(one.tokens for one in same),
            nll=sum(one.nll for one in same),
            kl=None if same[0].kl is None else sum(one.kl or 0.0 for one in same),
            flips=None if same[0].flips is None else sum(one.flips or 0 for one in same),
        )
        for same in zip(*(run.samples for run in runs), strict=True)
    ]
    return replace(runs[0], samples=tuple(scores))


def _weigh(
    report: Report,
    arms: Sequence[Arm],
    costs: Mapping[str, Cost],
    used: Mapping[str, Mapping[str, Any]],
    *,
    draws: int,
    on_cpu: bool,
) -> Ablation:
    """The rows, in the order of their KL, and what to take of them."""
    candidates = iter(report.candidates)
    original = pool([report.reference] * draws)
    how = {"seed": pipeline.BOOTSTRAP_SEED, "resamples": pipeline.BOOTSTRAP_RESAMPLES}
    found = []
    for arm in arms:
        runs = [next(candidates) for _ in arm.names]
        runs *= draws // len(runs)
        whole = pool(runs)
        summary = summarize(whole, original, **how)[EVERYTHING]
        spent = [costs.get(name, Cost()) for name in arm.names]
        seconds = [one.user_cpu_seconds if on_cpu else one.seconds for one in spent]
        row = Row(
            calibration=arm.calibration,
            method=arm.method,
            kl=summary["kl"],
            perplexity_increase=summary["perplexity_increase"],
            flip_rate=summary["flip_rate"],
            tokens=round(sum(used[name].get("tokens", 0) for name in arm.names) / len(arm.names)),
            seconds=sum(seconds) / len(seconds),
            kl_of_draws=tuple(_mean_kl(run) for run in runs),
        )
        found.append((row, whole))
    found.sort(key=lambda pair: pair[0].kl.point)
    rows = tuple(row for row, _ in found)
    least = found[find_least(rows)][1]
    behind = tuple(kl_difference(whole, least, **how) for _, whole in found)
    return Ablation(rows, behind, choose_row(rows, behind), report, "user CPU s" if on_cpu else "s")


def _mean_kl(run: Run) -> float:
    return sum(sample.kl or 0.0 for sample in run.samples) / sum(sample.tokens for sample in run.samples)
