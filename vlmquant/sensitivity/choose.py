"""The schemes that a budget buys: the least predicted loss, and beside it what one scheme for all would lose."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmquant.components import ComponentMap
from vlmquant.errors import PlanError
from vlmquant.planning import WEIGHT_SHAPE_BYTES, make_plan
from vlmquant.recipe import COMPONENTS, KEEP, BudgetSpec, Override, Recipe, Scheme
from vlmquant.sensitivity.knapsack import Frontier, Option, frontier, monotone
from vlmquant.sensitivity.losses import Scores
from vlmquant.sensitivity.units import Choice, Unit, Units, replaced_schemes


@dataclass(frozen=True)
class Uniform:
    """One scheme for all units; those that may not have it have the recipe's."""

    label: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """What was chosen."""

    recipe: Recipe
    """The one given, without its budget, with a scheme for every unit."""
    chosen: Mapping[str, str]
    """Unit -> label of its scheme."""
    weights: int
    nbytes: int
    """Of the units' linears."""
    other_bytes: int
    loss: float
    """Predicted KL, nats an answer token."""
    asked: Mapping[str, float]
    """The budget's limit, by name."""
    uniform: tuple[Uniform, ...]
    control: Uniform | None
    """The one of them that loses least within as many bytes as were allowed; None where all take more."""
    exact: bool
    curve: tuple[tuple[int, float], ...]
    """Bytes of the units, and the least loss that they buy."""

    def bits(self, nbytes: float) -> float:
        """Of a weight."""
        return 8 * nbytes / self.weights

    @property
    def ratio(self) -> float | None:
        """Of the predicted loss to the control's."""
        return self.loss / self.control.loss if self.control and self.control.loss else None

    @property
    def notes(self) -> tuple[str, ...]:
        limit = ", ".join(f"{name} {value:g}" for name, value in self.asked.items())
        told = (
            f"budget ({limit}): {self.bits(self.nbytes):.3f} bits per weight, predicted KL {self.loss:.4g} nats a token"
        )
        if self.control:
            told += (
                f"; {self.control.label} for all takes {self.bits(self.control.nbytes):.3f} and loses "
                f"{self.control.loss:.4g}"
            )
        rounded = () if self.exact else ("budget: bytes were rounded up to find it, so that a better choice may exist",)
        return (told, *rounded)

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": dict(self.asked),
            "bytes": self.nbytes,
            "other_bytes": self.other_bytes,
            "weights": self.weights,
            "bits_per_weight": self.bits(self.nbytes),
            "predicted_kl": self.loss,
            "exact": self.exact,
            "control": None if self.control is None else _uniform_json(self.control, self),
            "ratio_to_control": self.ratio,
            "uniform": [_uniform_json(one, self) for one in self.uniform],
            "chosen": dict(self.chosen),
        }


def _uniform_json(one: Uniform, found: Allocation) -> dict[str, Any]:
    return {
        "scheme": one.label,
        "bytes": one.nbytes,
        "bits_per_weight": found.bits(one.nbytes),
        "predicted_kl": one.loss,
    }


def allocate(components: ComponentMap, recipe: Recipe, units: Units, scores: Scores, spec: BudgetSpec) -> Allocation:
    """The schemes of the least predicted loss within the budget. PlanError where nothing fits it."""
    losses = {unit.name: _smoothed(unit, scores) for unit in units.units}
    found = frontier(
        [[Option(choice.nbytes, losses[unit.name][choice.label]) for choice in unit.choices] for unit in units.units]
    )
    weights = sum(unit.weights for unit in units.units)
    allowed = _allowed_bytes(spec, units, weights)
    point = found.within_loss(spec.max_kl) if spec.max_kl is not None else found.within_bytes(allowed)
    if point is None:
        raise PlanError(_what_would_fit(found, spec, units, weights))
    picked = found.options(point)
    chosen = {unit.name: unit.choices[index] for unit, index in zip(units.units, picked, strict=True)}
    nbytes = sum(choice.nbytes for choice in chosen.values())
    uniform = tuple(_uniform(recipe, units.units, losses))
    limit = nbytes if spec.max_kl is not None else allowed
    within = [one for one in uniform if one.nbytes <= limit]
    made = with_choices(recipe, units.units, chosen)
    _check_same(components, made, units.units, chosen)
    return Allocation(
        recipe=made,
        chosen={name: choice.label for name, choice in chosen.items()},
        weights=weights,
        nbytes=nbytes,
        other_bytes=units.other_bytes,
        loss=sum(losses[name][choice.label] for name, choice in chosen.items()),
        asked=spec.limit,
        uniform=uniform,
        control=min(within, key=lambda one: (one.loss, one.nbytes), default=None),
        exact=found.exact,
        curve=_some(found),
    )


def _smoothed(unit: Unit, scores: Scores) -> dict[str, float]:
    """Its losses by label: what is measured to lose more with more bytes is noise."""
    measured = scores.of(unit)
    options = monotone([Option(choice.nbytes, measured[choice.label]) for choice in unit.choices])
    return {choice.label: one.loss for choice, one in zip(unit.choices, options, strict=True)}


def _allowed_bytes(spec: BudgetSpec, units: Units, weights: int) -> float:
    """For the units. The pair of whole numbers beside codes, a weight's shape, is no bit of a weight."""
    if spec.bits_per_weight is not None:
        return spec.bits_per_weight * weights / 8 + WEIGHT_SHAPE_BYTES * sum(len(one.linears) for one in units.units)
    return spec.bytes - units.other_bytes if spec.bytes is not None else float("inf")


def _what_would_fit(found: Frontier, spec: BudgetSpec, units: Units, weights: int) -> str:
    least = int(found.nbytes[0])
    if spec.max_kl is not None:
        return (
            f"budget.max_kl: {spec.max_kl:g} is less than the least that these schemes are predicted to lose, "
            f"{found.losses[-1]:.4g}; allow more, or add schemes of more bits"
        )
    if spec.bytes is not None:
        return (
            f"budget.bytes: {spec.bytes:,} are less than the fewest of these schemes, {least + units.other_bytes:,}, "
            f"of which {units.other_bytes:,} are not chosen for; allow more, or add schemes of fewer bits"
        )
    return (
        f"budget.bits_per_weight: {spec.bits_per_weight:g} is less than the fewest of these schemes, "
        f"{8 * least / weights:.3f}; allow more, or add schemes of fewer bits"
    )


CURVE_POINTS = 400


def _some(found: Frontier) -> tuple[tuple[int, float], ...]:
    """So many points of a frontier, evenly drawn, its ends among them."""
    last = len(found.nbytes) - 1
    places = sorted({round(last * index / (CURVE_POINTS - 1)) for index in range(CURVE_POINTS)})
    return tuple((int(found.nbytes[place]), float(found.losses[place])) for place in places)


def _uniform(recipe: Recipe, units: Sequence[Unit], losses: Mapping[str, Mapping[str, float]]) -> Iterator[Uniform]:
    """Every scheme that some units may have, for all of them."""
    own = {name: spec.scheme for name, spec in recipe.specs()}
    asked = list(dict.fromkeys(choice.asked for unit in units for choice in unit.choices))
    for scheme in asked:
        taken = {unit.name: _asked(unit, scheme) or _asked(unit, own[unit.component]) for unit in units}
        if all(taken.values()):
            label = scheme.label if isinstance(scheme, Scheme) else scheme
            nbytes = sum(choice.nbytes for choice in taken.values() if choice)
            lost = sum(losses[name][choice.label] for name, choice in taken.items() if choice)
            yield Uniform(label, nbytes, lost)


def _asked(unit: Unit, scheme: Scheme | str) -> Choice | None:
    return next((choice for choice in unit.choices if choice.asked == scheme), None)


def with_choices(recipe: Recipe, units: Sequence[Unit], chosen: Mapping[str, Choice]) -> Recipe:
    """The recipe without its budget: of each component the scheme that most of its weights have, and overrides for the
    others, a line for layers in a row."""
    changed = {}
    for component in COMPONENTS:
        own = [unit for unit in units if unit.component == component]
        if not own:
            continue
        spec = getattr(recipe.components, component)
        weights: dict[Scheme | str, int] = {}
        for unit in own:
            asked = chosen[unit.name].asked
            weights[asked] = weights.get(asked, 0) + unit.weights
        most = max(weights, key=weights.__getitem__)
        layers: dict[tuple[Scheme | str, tuple[str, ...]], list[int]] = {}
        for unit in own:
            asked = chosen[unit.name].asked
            if asked != most:
                layers.setdefault((asked, unit.modules), []).append(unit.layer)
        overrides = tuple(
            Override(layers=f"{first}:{last + 1}", modules=modules, scheme=scheme)
            for (scheme, modules), numbers in layers.items()
            for first, last in _runs(numbers)
        )
        changed[component] = spec.model_copy(
            update={"scheme": most, "method": own[0].method if spec.scheme == KEEP else spec.method}
            | {"overrides": (*spec.overrides, *overrides)}
        )
    made = recipe.components.model_copy(update=changed)
    return replaced_schemes(recipe.model_copy(update={"components": made}), {})


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of numbers in a row."""
    ordered = sorted(numbers)
    first = last = ordered[0]
    for number in ordered[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


def _check_same(components: ComponentMap, recipe: Recipe, units: Sequence[Unit], chosen: Mapping[str, Choice]) -> None:
    plan = make_plan(components, recipe)
    for unit in units:
        for line in chosen[unit.name].lines:
            made = plan.line(line.name)
            if (made.scheme, made.bytes_after) != (line.scheme, line.bytes_after):
                raise AssertionError(f"{line.name}: the recipe makes it {made.scheme_label}, not {line.scheme_label}")
