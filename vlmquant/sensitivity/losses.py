"""What each linear loses by each scheme, on image-text samples.

KL(original || quantized) of the answers is 1/2 d^T F d to second order, d being the change of the weights and F the
Fisher information: J^T (diag(p) - p p^T) J at each answer token, with J the logits' derivative and p what the original
says there, summed over the tokens. A random vector v with E[v v^T] = diag(p) - p p^T goes backward from every answer
token at once. Of a linear it gives g_t at each token t, whose input is x_t; with G = sum_t g_t x_t^T

    S = 1/2 sum over samples and rows o of (sum_i G_oi dW_oi)^2 / answer tokens

is nats a token. Rows are taken to err independently of each other (their rounding is), tokens are not: against
sum_t sum_o (g_to (dW x_t)_o)^2 it costs no more and keeps what tokens have in common. dW is that of the recipe's method
on the original's inputs; a rounding of inputs counts as a change too. Every other sample is rounded by and the others
judge: on its own samples GPTQ loses less than on others, and the fewer the bits the more so.

One scheme for linears that an engine runs as one kernel (query, key and value; gate and up; all experts of a layer).
Losses of units are added: what one error does to another is left out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlmquant import budget, gradients, signals
from vlmquant.algorithms import gptq, rtn, search
from vlmquant.algorithms.factor import Factor
from vlmquant.algorithms.target import factor_of
from vlmquant.calibration.encode import Encoder, are_tokenized
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import Inputs
from vlmquant.components import ComponentMap
from vlmquant.devices import find_device
from vlmquant.errors import DoesNotFitError, InputError, PlanError, SentinelError, shown
from vlmquant.evaluation.passes import Row, answer_logits, measure_rows
from vlmquant.grid import grid_of
from vlmquant.kernels.reference import round_inputs
from vlmquant.loading import give_back_freed_memory
from vlmquant.planning import CALIBRATED_INPUTS, looks_at_inputs
from vlmquant.progress import bar
from vlmquant.reading import read_json
from vlmquant.recipe import KEEP, WITH_FEEDBACK, CalibrationSpec, ComponentSpec, Data, Recipe, Scheme
from vlmquant.sensitivity.units import Unit

SEED = 0
"""Of the signs that are drawn."""
CHANGE_DTYPE = torch.bfloat16
"""What the changes of weights are kept in: it moves a score by less than a thousandth."""
ROUNDING_COPIES = 6
"""Weights in float32 that rounding one linear makes on the way."""


class UnitLoss(Data):
    """What a unit loses by each scheme."""

    name: str
    component: str
    layer: Annotated[int, Field(ge=0)]
    kind: str
    weights: Annotated[int, Field(gt=0)]
    method: str
    losses: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """Scheme's label -> predicted KL(original || quantized), nats an answer token, were it alone quantized."""


class Scores(Data):
    """What was measured, for all budgets."""

    version: Literal[1] = 1
    model: str
    """Digest of the model's weights."""
    calibration: str
    """Digest of the samples."""
    samples: Annotated[int, Field(gt=0)]
    tokens: Annotated[int, Field(gt=0)]
    """Answer tokens of those that judge."""
    units: tuple[UnitLoss, ...]

    def of(self, unit: Unit) -> dict[str, float]:
        return next(one.losses for one in self.units if one.name == unit.name)


def read_scores(file: Path) -> Scores:
    """What `write` wrote. InputError for anything else."""
    scores: Scores = read_json(file, Scores, remedy="measure it again with `vlmquant sensitivity`")
    return scores


def scores_text(scores: Scores) -> str:
    """As a file holds them."""
    return json.dumps(scores.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def model_digest(inputs: Inputs) -> str:
    """Of the weights alone: a new README or chat template leaves losses as they are."""
    weights = {name: digest for name, digest in inputs.fingerprint().items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(sorted(weights.values())).encode()).hexdigest()


def check_scores(scores: Scores, units: Sequence[Unit], digest: str, *, where: str) -> None:
    """PlanError where scores are of another model, or lack what is to be chosen from."""
    again = "measure again with `vlmquant sensitivity` and this recipe"
    if scores.model != digest:
        raise PlanError(f"{where}: is of a model with other weights; {again}")
    known = {one.name: one for one in scores.units}
    for unit in units:
        found = known.get(unit.name)
        if found is None:
            raise PlanError(f"{where}: says nothing of {unit.name}; {again}")
        if found.method != unit.method:
            raise PlanError(f"{where}: {unit.name} was measured with {found.method}, not {unit.method}; {again}")
        if missing := [one.label for one in unit.choices if one.label not in found.losses]:
            raise PlanError(f"{where}: {unit.name} was not measured with {', '.join(missing)}; {again}")


def measure(
    components: ComponentMap,
    recipe: Recipe,
    units: Sequence[Unit],
    spec: CalibrationSpec,
    *,
    device: str = "auto",
    inputs: Inputs | None = None,
) -> Scores:
    """The losses of all units by all their choices, on the samples of a calibration set.

    components: the model as the recipe writes what it keeps. Raises PlanError for schemes whose inputs calibration
    scales, InputError for a set without answers, and DoesNotFitError where the model in float32 with its gradients, and
    the changes of one unit, need more memory than there is; where all units' do not fit at once, several passes run.
    """
    for unit in units:
        _refuse_calibrated(unit)
    device = find_device(device)
    inputs = inputs or Inputs(components)
    selection = choose_samples(load_set(spec.set), spec)
    inputs.watch(path for sample in selection.samples for path in sample.images)
    encoder = Encoder(load_processor(components.model_dir), tidy_captions=are_tokenized(selection.samples))
    rows = measure_rows([(sample, sample.answers[0]) for sample in selection.samples], encoder)
    rows = [row for row in rows if row.tokens <= spec.max_tokens and row.answer_tokens]
    if not rows:
        raise InputError(f"calibration set {shown(spec.set)}: no sample has an answer that a loss could be taken of")
    longest, blocks = max(row.tokens for row in rows), len(components.blocks)
    passes = gradients.activation_bytes(
        components, longest, torch.float32, widths=budget.GRADIENT_WIDTHS, blocks=blocks
    )
    _refuse_too_large(
        gradients.weight_bytes(components, torch.float32) + passes + max(map(_unit_bytes, units)),
        device,
        "the model and a unit",
    )
    with budget.told_of_gradients("sensitivity"):
        model = gradients.whole_model(components, torch.device(device))
        room = budget.free_bytes(device) - passes
        _refuse_too_large(max(map(_unit_bytes, units)), device, "a unit", room=room)
        found: dict[str, dict[str, float]] = {}
        rounds = list(_rounds(units, room))
        for number, some in enumerate(rounds, 1):
            told = f" {number} of {len(rounds)}" if len(rounds) > 1 else ""
            found |= _measure_some(model, components, recipe, some, encoder, rows, told)
            give_back_freed_memory()
    inputs.check_unchanged()
    return Scores(
        model=model_digest(inputs),
        calibration=selection.sha256,
        samples=len(rows),
        tokens=sum(row.answer_tokens for row in apart(rows)[1]),
        units=tuple(
            UnitLoss(
                name=unit.name,
                component=unit.component,
                layer=unit.layer,
                kind=unit.kind,
                weights=unit.weights,
                method=unit.method,
                losses=found[unit.name],
            )
            for unit in units
        ),
    )


def _refuse_calibrated(unit: Unit) -> None:
    for choice in unit.choices:
        scheme = choice.lines[0].scheme
        if isinstance(scheme, Scheme) and scheme.activations in CALIBRATED_INPUTS:
            raise PlanError(
                f"{unit.name}: what scheme {scheme.label} loses is not predicted, as calibration finds the scale of "
                f"its inputs; use {CALIBRATED_INPUTS[scheme.activations]}"
            )


# --- memory ---


def _unit_bytes(unit: Unit) -> int:
    """Second moments, the changes by all choices, and what rounding makes on the way."""
    largest = max(line.weights for line in unit.choices[0].lines)
    shapes = {line.name.removesuffix(".weight"): line.shape for line in unit.choices[0].lines}
    moments = sum(shapes[stage[0]][1] ** 2 for stage in unit.stages) if unit.method in WITH_FEEDBACK else 0
    changes = unit.weights * CHANGE_DTYPE.itemsize * len(unit.choices)
    return budget.FLOAT_BYTES * (moments + ROUNDING_COPIES * largest) + changes


def _rounds(units: Sequence[Unit], room: int) -> Iterator[list[Unit]]:
    """The units in parts that fit."""
    some, taken = list[Unit](), 0
    for unit in units:
        if some and taken + _unit_bytes(unit) > room:
            yield some
            some, taken = [], 0
        some.append(unit)
        taken += _unit_bytes(unit)
    yield some


def _refuse_too_large(needed: int, device: str, what: str, *, room: int | None = None) -> None:
    free = budget.free_bytes(device) if room is None else room
    if needed > free:
        raise DoesNotFitError(
            f"sensitivity needs about {needed / 2**30:.1f} GiB for {what}, in float32 with gradients, and "
            f"{max(free, 0) / 2**30:.1f} are free; give it shorter samples, or more memory"
        )


# --- one round: second moments, changes, gradients ---


def _measure_some(
    model: nn.Module,
    components: ComponentMap,
    recipe: Recipe,
    units: Sequence[Unit],
    encoder: Encoder,
    rows: Sequence[Row],
    told: str,
) -> dict[str, dict[str, float]]:
    """Unit -> scheme -> loss."""
    specs = dict(recipe.specs())
    modules = {name: gradients.module_of(model, components, name) for unit in units for name in unit.linears}
    rounded_by, judges = apart(rows)
    moments = _collect(model, units, modules, encoder, rounded_by, told)
    probes: dict[str, _Probe] = {}
    with bar("sensitivity", total=len(modules)) as progress:
        for unit in units:
            for stage in unit.stages:
                changes = _changes(unit, stage, modules, moments.pop(stage, None), specs[unit.component], components)
                for name in stage:
                    probes[name] = _Probe(modules[name], changes[name])
                    progress.step(f"round{told}")
    _run_gradients(model, list(probes.values()), encoder, judges, told)
    tokens = sum(row.answer_tokens for row in judges)
    return {
        unit.name: {
            choice.label: sum(probes[name].totals[choice.label] for name in unit.linears) / (2 * tokens)
            for choice in unit.choices
        }
        for unit in units
    }


def apart(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Samples that weights are rounded by, and samples that tell what it costs."""
    return (rows[::2], rows[1::2]) if len(rows) > 1 else (rows, rows)


@dataclass
class _Moments:
    """Of the inputs of a stage."""

    full: bool
    """Whether the whole matrix is wanted, or its diagonal."""
    total: Tensor | None = None
    tokens: int = 0

    def add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].detach().flatten(0, -2).float()
        if self.total is None:
            shape = (inputs.shape[1],) * (2 if self.full else 1)
            self.total = torch.zeros(shape, device=inputs.device)
        if self.full:
            self.total.addmm_(inputs.T, inputs)
        else:
            self.total += inputs.square().sum(0)
        self.tokens += len(inputs)

    def mean(self, columns: int) -> Tensor:
        """Zeros for an expert that no token came to."""
        if self.total is None:
            return torch.zeros((columns,) * (2 if self.full else 1))
        return self.total.div_(self.tokens)


@torch.no_grad()
def _collect(
    model: nn.Module,
    units: Sequence[Unit],
    modules: Mapping[str, nn.Module],
    encoder: Encoder,
    rows: Sequence[Row],
    told: str,
) -> dict[tuple[str, ...], _Moments]:
    """Second moments of the inputs of stages whose method looks at them, in the original model."""
    found: dict[tuple[str, ...], _Moments] = {}
    handles = []
    for unit in units:
        if looks_at_inputs(None, unit.method):
            for stage in unit.stages:
                found[stage] = _Moments(unit.method in WITH_FEEDBACK)
                handles.append(modules[stage[0]].register_forward_pre_hook(found[stage].add))
    if found:
        with bar("sensitivity", total=len(rows)) as progress:
            for row in rows:
                signals.check()
                answer_logits(model, encoder, [row])
                progress.step(f"look at inputs{told}")
    for handle in handles:
        handle.remove()
    return found


@dataclass(frozen=True)
class _Change:
    """What a scheme makes of a linear."""

    weight: Tensor
    """Quantized less original, (out, in) CHANGE_DTYPE."""
    activations: str
    """What its inputs are rounded to."""


@torch.no_grad()
def _changes(
    unit: Unit,
    stage: Sequence[str],
    modules: Mapping[str, nn.Module],
    moments: _Moments | None,
    spec: ComponentSpec,
    components: ComponentMap,
) -> dict[str, dict[str, _Change]]:
    """Linear -> scheme's label -> its change. AWQ's channel scales are left out: they fold into what comes before."""
    signals.check()
    weights: dict[str, Tensor] = {name: modules[name].weight for name in stage}  # type: ignore[misc]
    columns = weights[stage[0]].shape[1]
    mean = None if moments is None else moments.mean(columns).to(weights[stage[0]].device)
    factor = factor_of(mean, spec.gptq) if mean is not None and unit.method in WITH_FEEDBACK else None
    found: dict[str, dict[str, _Change]] = {name: {} for name in stage}
    for choice in unit.choices:
        schemes = {line.name.removesuffix(".weight"): line.scheme for line in choice.lines}
        scheme = schemes[stage[0]]
        if not isinstance(scheme, Scheme):
            continue  # kept: it changes nothing
        grid = grid_of(scheme, columns, components.dtype).fitted(*weights.values())
        for name, weight in weights.items():
            rounded = _rounded(weight, grid, spec, mean=mean, factor=factor)
            found[name][choice.label] = _Change((rounded - weight).to(CHANGE_DTYPE), scheme.activations)
    return found


def _rounded(weight: Tensor, grid: Any, spec: ComponentSpec, *, mean: Tensor | None, factor: Factor | None) -> Tensor:
    """The weight (out, in) float32 as its method rounds it."""
    if factor is not None:
        return gptq.quantize_weight(weight, factor, grid, spec.gptq)[0].dequantize()
    if mean is not None:
        return search.quantize_weight(weight, mean, grid).dequantize()
    return rtn.quantize_weight(weight, grid, spec.rtn).dequantize()


@dataclass
class _Probe:
    """Hears a linear's inputs and the gradients of what it puts out, sample by sample."""

    module: nn.Module
    changes: Mapping[str, _Change]
    totals: dict[str, float] = field(default_factory=dict)
    """Scheme's label -> the sum over samples and rows of squares."""
    _rows: dict[str, Tensor] = field(default_factory=dict)
    """Of the sample at hand, (out,)."""

    def listen(self) -> Any:
        self.totals = dict.fromkeys([*self.changes, KEEP], 0.0)
        return self.module.register_forward_hook(self._heard)

    def _heard(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        inputs = args[0].detach()
        output.register_hook(partial(self._add, inputs, inputs._version))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _add(self, inputs: Tensor, version: int, gradient: Tensor) -> None:
        if inputs._version != version:
            raise SentinelError("sensitivity: the model writes into the inputs of a linear; this is not handled")
        flat, turned = inputs.flatten(0, -2), gradient.flatten(0, -2).T
        plain = turned @ flat
        for label, change in self.changes.items():
            found = torch.linalg.vecdot(plain, change.weight.float())
            if change.activations != "none":
                shift = turned @ (round_inputs(flat, change.activations) - flat)
                found += torch.linalg.vecdot(shift, self.module.weight + change.weight)  # type: ignore[operator]
            self._rows[label] = found if label not in self._rows else self._rows[label] + found

    def end_sample(self) -> None:
        for label, found in self._rows.items():
            self.totals[label] += found.double().square().sum().item()
        self._rows.clear()


def _run_gradients(
    model: nn.Module, probes: Sequence[_Probe], encoder: Encoder, rows: Sequence[Row], told: str
) -> None:
    handles = [probe.listen() for probe in probes]
    with bar("sensitivity", total=len(rows)) as progress:
        for row in rows:
            signals.check()
            (logits,) = answer_logits(model, encoder, [row])
            drawn = gradients.draw(logits.detach(), seed=SEED + row.key)
            logits.backward(drawn.to(logits.dtype))  # type: ignore[no-untyped-call]
            for probe in probes:
                probe.end_sample()
            progress.step(f"gradients{told}")
    for handle in handles:
        handle.remove()
