"""Linears that get one scheme, and the ways to store them under a recipe: by plans, without reading weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmquant.components import BlockInfo, ComponentMap, LinearInfo
from vlmquant.engines import check_plan
from vlmquant.errors import PlanError, first_line
from vlmquant.formats import FORMATS
from vlmquant.planning import DATA_FREE, Plan, PlanLine, as_written, local_name, make_plan
from vlmquant.recipe import COMPONENTS, KEEP, Recipe, Scheme

CANDIDATES: tuple[Scheme | str, ...] = (
    Scheme(bits=3),
    Scheme(bits=4),
    Scheme(bits=4, group_size=64),
    Scheme(bits=4, group_size=32),
    Scheme(bits=8, group_size=None),
    KEEP,
)
"""Where a recipe names none."""
NOT_CHOSEN = ("embedding",)
"""Components that a budget leaves as the recipe has them: no linears."""


@dataclass(frozen=True)
class Choice:
    """One way to store the linears of a unit."""

    asked: Scheme | str
    """The scheme by which a recipe asks for it."""
    lines: tuple[PlanLine, ...]
    """Of its weights: with another group size where the one asked for does not fit."""

    @property
    def label(self) -> str:
        scheme = self.lines[0].scheme
        return KEEP if scheme is None else scheme.label if isinstance(scheme, Scheme) else scheme

    @property
    def nbytes(self) -> int:
        return sum(line.bytes_after for line in self.lines)

    @property
    def rounds_inputs(self) -> bool:
        scheme = self.lines[0].scheme
        return isinstance(scheme, Scheme) and scheme.activations != "none"


@dataclass(frozen=True)
class Unit:
    """Linears that get one scheme."""

    component: str
    layer: int
    """Inside its component; 0 outside of blocks."""
    block: str
    """Its name; empty outside of blocks."""
    modules: tuple[str, ...]
    """What a recipe's override calls them: globs on names inside the layer."""
    stages: tuple[tuple[str, ...], ...]
    """Modules by name, those together that get the same inputs."""
    method: str
    choices: tuple[Choice, ...]
    """By rising bytes."""

    @property
    def linears(self) -> list[str]:
        return [name for stage in self.stages for name in stage]

    @property
    def kind(self) -> str:
        """Such as q_proj+k_proj+v_proj."""
        return "+".join(dict.fromkeys(name.removesuffix(".*").rpartition(".")[2] for name in self.modules))

    @property
    def name(self) -> str:
        return f"{self.block}.{self.kind}" if self.block else self.linears[0]

    @property
    def weights(self) -> int:
        return sum(line.weights for line in self.choices[0].lines)

    def choice(self, label: str) -> Choice:
        return next(one for one in self.choices if one.label == label)


@dataclass(frozen=True)
class Units:
    """Of a model under a recipe."""

    units: tuple[Unit, ...]
    other_bytes: int
    """Of the result, beside these linears."""
    refused: tuple[str, ...]
    """Which schemes are left out where, and why."""


def find_units(
    components: ComponentMap, recipe: Recipe, *, kept: bool = False, schemes: Sequence[Scheme | str] | None = None
) -> Units:
    """The units of the components that the recipe quantizes, and what they may get.

    kept: those of components that it keeps as well, rounded to nearest. schemes: instead of those of the recipe's
    budget. PlanError where the recipe cannot be carried out by itself, or where nothing is left to choose from.
    """
    base = replaced_schemes(recipe, {})
    plan = make_plan(components, base)
    wanted = schemes or (recipe.budget and recipe.budget.schemes) or CANDIDATES
    plans: dict[str, list[tuple[Scheme | str, Plan]]] = {}
    refused: list[str] = []
    for name, spec in recipe.specs():
        if name in NOT_CHOSEN or (spec.scheme == KEEP and not kept):
            continue
        method = spec.method if spec.scheme != KEEP else DATA_FREE
        asked = [spec.scheme, *(one for one in wanted if one != spec.scheme)]
        plans[name] = []
        for scheme in asked:
            one = replaced_schemes(recipe, {name: scheme}, {name: method})
            try:
                made = make_plan(components, one)
                if scheme != KEEP:
                    _check(components, made, one)
            except PlanError as error:
                if scheme == spec.scheme and scheme != KEEP:
                    raise
                label = scheme.label if isinstance(scheme, Scheme) else scheme
                refused.append(f"components.{name}: {label} is left out: {first_line(error)}")
                continue
            plans[name].append((scheme, made))
    units = tuple(unit for unit in _units(components, plans) if unit.choices)
    if not units:
        raise PlanError("sensitivity: none of the model's linears may be quantized by this recipe")
    chosen = {line.name for unit in units for line in unit.choices[0].lines}
    other = sum(line.bytes_after for line in plan.lines if line.name not in chosen)
    return Units(units, other + (plan.cache.nbytes if plan.cache else 0), tuple(dict.fromkeys(refused)))


def replaced_schemes(recipe: Recipe, schemes: dict[str, Scheme | str], methods: dict[str, str] | None = None) -> Recipe:
    """The recipe without its budget, with other schemes, and methods, of components."""
    changed = {
        name: getattr(recipe.components, name).model_copy(
            update={"scheme": scheme, **({"method": methods[name]} if methods else {})}
        )
        for name, scheme in schemes.items()
    }
    return recipe.model_copy(update={"budget": None, "components": recipe.components.model_copy(update=changed)})


def _check(components: ComponentMap, plan: Plan, recipe: Recipe) -> None:
    """PlanError for what the format cannot hold, or the target does not take."""
    written = as_written(components, plan, recipe)
    FORMATS[recipe.output.format].quantization_config(plan, written)
    if recipe.target is not None:
        contract = check_plan(written, plan, recipe.target, format=recipe.output.format)
        if contract.refusals:
            raise PlanError(f"{recipe.target.engine} does not take it, {contract.refusals[0].what}")


def _units(components: ComponentMap, plans: dict[str, list[tuple[Scheme | str, Plan]]]) -> Iterator[Unit]:
    for component in (name for name in COMPONENTS if plans.get(name)):
        for block in components.blocks:
            if block.component == component:
                for stages in _together(components, block):
                    yield _unit(components, stages, block, plans[component])
        for linear in components.linears:
            if linear.component == component and linear.block is None and component in ("projector", "lm_head"):
                yield _unit(components, [(linear,)], None, plans[component])


def _together(components: ComponentMap, block: BlockInfo) -> list[list[tuple[LinearInfo, ...]]]:
    """The groups of a block, those of the experts of one module as one unit."""
    found: dict[str, list[tuple[LinearInfo, ...]]] = {}
    for group in components.fused_groups(block):
        first = group[0].name
        home = first.rsplit(".", 2)[0]
        found.setdefault(home if home in components.experts else first, []).append(group)
    return list(found.values())


def _unit(
    components: ComponentMap,
    stages: list[tuple[LinearInfo, ...]],
    block: BlockInfo | None,
    plans: list[tuple[Scheme | str, Plan]],
) -> Unit:
    """With no choices where the plans keep it whatever the scheme."""
    linears = [linear for stage in stages for linear in stage]
    first = linears[0]
    home = first.name.rsplit(".", 2)[0]
    if block is None:
        modules: tuple[str, ...] = (local_name(components, first.name, first.component),)
    elif home in components.experts:
        modules = (f"{home[len(block.name) + 1 :]}.*",)
    else:
        modules = tuple(linear.local for linear in linears)
    choices: dict[str, Choice] = {}
    for asked, plan in plans:
        choice = Choice(asked, tuple(plan.line(f"{linear.name}.weight") for linear in linears))
        choices.setdefault(choice.label, choice)
    quantized = [one for one in choices.values() if one.label != KEEP]
    method = next((one.lines[0].method or DATA_FREE for one in quantized), DATA_FREE)
    ordered = sorted(choices.values(), key=lambda one: one.nbytes) if quantized else []
    return Unit(
        component=first.component,
        layer=block.index if block else 0,
        block=block.name if block else "",
        modules=modules,
        stages=tuple(tuple(linear.name for linear in stage) for stage in stages),
        method=method,
        choices=tuple(ordered),
    )
