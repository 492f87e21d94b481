"""Whose thresholds a report is judged by: given ones, else those of the recipe that each candidate was made by."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmquant.errors import InputError, UsageError, shown
from vlmquant.evaluation.records import Run
from vlmquant.reading import check
from vlmquant.recipe import GateSpec, load_gate, load_recipe, parse_thresholds
from vlmquant.report.data import Report
from vlmquant.report.manifest import recipe_of
from vlmquant.thresholds import option

NOTHING = GateSpec(max_perplexity_increase=None)


@dataclass(frozen=True)
class Gate:
    specs: tuple[GateSpec | None, ...]
    """One for each candidate of the report; None: it is not judged."""
    source: str
    """Where they are from."""

    @property
    def judges(self) -> bool:
        return any(spec is not None and spec.judged() for spec in self.specs)

    def to_json(self, report: Report) -> dict[str, Any]:
        """{from, ...thresholds} where all candidates have the same, else {from, candidates: {label: thresholds}}."""
        own = [None if spec is None else _plain(spec) for spec in self.specs]
        if own and own[0] is not None and all(one == own[0] for one in own):
            return {"from": self.source, **own[0]}
        labels = [run.label for run in report.candidates]
        return {"from": self.source, "candidates": dict(zip(labels, own, strict=True))}


def recorded_gate(report: Report) -> Gate:
    """Of each candidate the gate of the recipe that it was made by; None where there is none, or it means nothing."""
    specs = tuple(_recorded(run) for run in report.candidates)
    judged = [run for run, spec in zip(report.candidates, specs, strict=True) if spec is not None]
    names = dict.fromkeys(shown(recipe_of(run).get("name", "without a name")) for run in judged)
    whose = (
        "the recipe recorded in the report itself" if len(names) < 2 else "each model's recipe, as the report holds it"
    )
    return Gate(specs, f"from {whose} ({', '.join(names) or 'none'})")


def given_gate(report: Report, file: Path) -> Gate:
    """The thresholds of a file, for every candidate."""
    return Gate((load_gate(file),) * len(report.candidates), f"from {shown(file.name)} given with --thresholds")


def choose_gate(
    report: Report,
    *,
    where: str,
    recipe: str | None = None,
    file: Path | None = None,
    given: Mapping[str, str | None],
) -> Gate:
    """The gate of a command line; UsageError where a candidate has none.

    where: the report's name in messages. recipe, file: whose gate counts for all candidates, in place of the recorded
    ones. given: single thresholds as text by name, which count before either.
    """
    if recipe is not None and file is not None:
        raise UsageError("gate: thresholds are given with --recipe and with --thresholds; give one of them")
    single = parse_thresholds(given)
    told = ", ".join(f"{option(name)} {given[name]}" for name in single)
    if recipe is not None:
        wanted = load_recipe(recipe)
        base = Gate(
            (wanted.gate,) * len(report.candidates), f"from the recipe {shown(wanted.name)} given with --recipe"
        )
    elif file is not None:
        base = given_gate(report, file)
    else:
        base = recorded_gate(report)
        lacking = [run.label for run, spec in zip(report.candidates, base.specs, strict=True) if spec is None]
        if not single and lacking:
            raise UsageError(
                f"{where}: {shown(lacking[0])} was not made by a recipe with a sound gate; give thresholds with "
                f"--recipe, --thresholds or options such as {option('max_kl')}"
            )
        if len(lacking) == len(base.specs):
            return Gate((NOTHING.model_copy(update=single),) * len(base.specs), f"from the command line: {told}")
        base = Gate(tuple(spec or NOTHING for spec in base.specs), f"{base.source}; give --recipe to judge by your own")
    if not single:
        return base
    specs = tuple(spec and spec.model_copy(update=single) for spec in base.specs)
    return Gate(specs, f"{told} from the command line; the others {base.source}")


def _plain(spec: GateSpec) -> dict[str, Any]:
    """What of it is judged, and how."""
    strata = {stratum: part.thresholds() for stratum, part in spec.strata.items()}
    return spec.thresholds() | ({"strata": strata} if strata else {}) | {"alpha": spec.alpha}


def _recorded(run: Run) -> GateSpec | None:
    gate = recipe_of(run).get("gate")
    if gate is None:
        return None
    try:
        spec: GateSpec = check(GateSpec, gate, where="recipe.gate")
    except InputError:
        return None
    return spec
