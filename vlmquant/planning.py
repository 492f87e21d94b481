"""What becomes of every tensor of a model under a recipe, and the bytes it will take: from names and shapes alone."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd, prod
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from vlmquant.components import COMPONENTS, OTHER, BlockInfo, ComponentMap, LinearInfo, ParameterInfo
from vlmquant.errors import PlanError
from vlmquant.families import NEVER_QUANTIZED
from vlmquant.kvcache import CachePlan, plan_cache
from vlmquant.nearest import nearest
from vlmquant.packing import packed_columns
from vlmquant.recipe import (
    AIMING,
    BITSANDBYTES_SCHEMES,
    KEEP,
    LOSSES,
    SEARCHED,
    SHORT_SCHEMES,
    SMALL_MODEL,
    TARGETS,
    WITH_FEEDBACK,
    WITH_FOLDS,
    WORD_FORMATS,
    ComponentSpec,
    Recipe,
    Scheme,
)
from vlmquant.shards import dtype_name

BUDGET_NOTE = (
    "budget: `quantize` chooses the schemes by what each layer loses, which `vlmquant sensitivity` measures; here all "
    "have those that the recipe names"
)
PACKED_WORD_BYTES = 4
WEIGHT_SHAPE_BYTES = 16
"""The pair of int64 that compressed-tensors stores beside packed codes."""
SMALLEST_GROUP = 16
"""Below it, scales of 16 bits cost a quarter of what 4-bit codes do."""
NF4_BLOCK = 64
"""Weights that share one float32 scale in bitsandbytes' NF4."""
KEPT_SHARE = 0.25
"""Of the bytes of a result: kept weights that take more are told of."""
KEPT_NAMED = 3
"""Components of them that are named."""
STACK_KEPT = "stacks {} matrices, and which way round they lie only the model's class says: kept as it is"
LARGEST_KEPT_STACK = 0.05
"""Stacked weights that cannot be taken apart are kept without a word below this share of a component."""
HALF = torch.bfloat16
"""What 16 bits are for a model that has no 16-bit dtype of its own."""
CALIBRATED = AIMING | SEARCHED
"""Methods that look at a layer's inputs."""
WITH_GRADIENTS = WITH_FEEDBACK - {"auto"}
"""Methods that can be told what outputs do to the answers."""
DATA_FREE = "rtn"
"""The method for weights outside the blocks: no calibration inputs are collected there."""
CALIBRATED_INPUTS = {"nvfp4": "nvfp4a16", "static-int8": "w8a8-dynamic", "static-fp8": "fp8-dynamic"}
"""Roundings of inputs by a number that calibration finds -> the scheme to use where there is no calibration."""


@dataclass(frozen=True)
class PlanLine:
    """What becomes of one tensor. `scheme` is the name nf4 or bnb-int8 where bitsandbytes quantizes it."""

    name: str
    component: str
    action: Literal["quantize", "keep"]
    scheme: Scheme | str | None
    method: str | None
    reason: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    stored: torch.dtype | None = None
    """The dtype in which a kept tensor is written."""
    needs_original: bool = False
    """Whether its codes are found from what the original model gives it, beside what the quantized one does."""
    needs_gradients: bool = False
    """Whether its codes are found from what its outputs do to the answers, by gradients of the whole model."""

    @property
    def scheme_label(self) -> str:
        """Such as w4a16-g128; for what is kept, which a recipe calls fp16, the dtype that it is stored in."""
        if self.scheme is None:
            return dtype_name(self.stored) if self.stored else KEEP
        return self.scheme.label if isinstance(self.scheme, Scheme) else self.scheme

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def needs_data(self) -> bool:
        """Whether codes, or the scale of the inputs, are found by calibration."""
        return self.action == "quantize" and looks_at_inputs(self.scheme, self.method)


def looks_at_inputs(scheme: Scheme | str | None, method: str | None) -> bool:
    """Whether a method finds codes, or a scheme has a scale of its inputs, by calibration."""
    return method in CALIBRATED or (isinstance(scheme, Scheme) and scheme.activations in CALIBRATED_INPUTS)


def needs_class(recipe: Recipe) -> list[str]:
    """What of a recipe takes a model that can be built, such as "components.language (method gptq)".

    Empty where names and shapes of the tensors are enough: no method looks at a layer's inputs.
    """
    found = ["kv_cache"] if recipe.kv_cache else []
    for component, spec in recipe.specs():
        for scheme, method in _pairs(spec):
            if looks_at_inputs(scheme, method):
                inputs = f"scheme {_label(scheme)}" if method not in CALIBRATED else f"method {method}"
                found.append(f"components.{component} ({inputs})")
    return [*dict.fromkeys(found), *(["output.format bitsandbytes"] if recipe.output.format == "bitsandbytes" else [])]


def _pairs(spec: ComponentSpec) -> list[tuple[Scheme | str, str]]:
    """The schemes and methods that some layer of a component may get, those that are kept apart."""
    pairs = [(spec.scheme, spec.method)] + [
        (override.scheme or spec.scheme, override.method or spec.method) for override in spec.overrides
    ]
    return [(scheme, method) for scheme, method in pairs if scheme != KEEP]


@dataclass(frozen=True)
class Totals:
    """Sums over some lines of a plan."""

    parameters: int
    quantized_parameters: int
    bytes_before: int
    bytes_after: int
    quantized_bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Over all weights, kept ones included."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0

    @property
    def quantized_bits_per_weight(self) -> float:
        """Over the quantized weights, their scales and zeros included; 0 where there are none."""
        return 8 * self.quantized_bytes_after / self.quantized_parameters if self.quantized_parameters else 0.0


def _totals(lines: Sequence[PlanLine]) -> Totals:
    quantized = [line for line in lines if line.action == "quantize"]
    return Totals(
        parameters=sum(line.weights for line in lines),
        quantized_parameters=sum(line.weights for line in quantized),
        bytes_before=sum(line.bytes_before for line in lines),
        bytes_after=sum(line.bytes_after for line in lines),
        quantized_bytes_after=sum(line.bytes_after for line in quantized),
    )


@dataclass(frozen=True)
class Plan:
    """One line for every tensor of the checkpoint, in the model's order."""

    lines: tuple[PlanLine, ...]
    fallbacks: tuple[str, ...] = field(default=())
    """One sentence for every layer that did not get the scheme the recipe asks for."""
    notes: tuple[str, ...] = field(default=())
    """What else is worth knowing before the work: a guess, what travels along, what a mixture of experts takes."""
    cache: CachePlan | None = None
    """How the KV cache is stored; None where the recipe says nothing of it."""

    @cached_property
    def _by_name(self) -> dict[str, PlanLine]:
        return {line.name: line for line in self.lines}

    def line(self, name: str) -> PlanLine:
        """By the parameter's name in the model."""
        return self._by_name[name]

    @cached_property
    def totals(self) -> Totals:
        return _totals(self.lines)

    @property
    def bytes_before(self) -> int:
        return self.totals.bytes_before

    @property
    def bytes_after(self) -> int:
        return self.totals.bytes_after + (self.cache.nbytes if self.cache else 0)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights of the model."""
        return self.totals.bits_per_weight

    def by_component(self) -> dict[str, Totals]:
        """Totals of every component that has tensors of its own, in the order of the recipe."""
        groups = {name: [line for line in self.lines if line.component == name] for name in COMPONENTS}
        return {name: _totals(lines) for name, lines in groups.items() if lines}

    def to_json(self) -> dict[str, Any]:
        """Plain data; the same plan gives the same data."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "components": {
                name: {
                    "parameters": totals.parameters,
                    "bytes_before": totals.bytes_before,
                    "bytes_after": totals.bytes_after,
                    "bits_per_weight": round(totals.bits_per_weight, 4),
                    "quantized_bits_per_weight": round(totals.quantized_bits_per_weight, 4),
                }
                for name, totals in self.by_component().items()
            },
            "fallbacks": list(self.fallbacks),
            "notes": list(self.notes),
            **({"kv_cache": self.cache.to_json()} if self.cache else {}),
            "lines": [_line_json(line) for line in self.lines],
        }


def _line_json(line: PlanLine) -> dict[str, Any]:
    scheme = line.scheme.model_dump() if isinstance(line.scheme, Scheme) else line.scheme
    return {
        "name": line.name,
        "component": line.component,
        "action": line.action,
        "scheme": scheme,
        "label": line.scheme_label,
        "method": line.method,
        "reason": line.reason,
        "shape": list(line.shape),
        "bytes_before": line.bytes_before,
        "bytes_after": line.bytes_after,
    }


def stored_bytes(
    shape: tuple[int, ...], scheme: Scheme | str, dtype: torch.dtype, *, format: str = "compressed-tensors"
) -> int:
    """Bytes of a weight (out, in) and all that is stored beside it; for bitsandbytes' schemes an estimate.

    compressed-tensors: packed codes in int32 words, scales in `dtype`, the shape as two int64, and zero points packed
    along the rows; int8 weights with int8 activations and FP8 weights are stored unpacked, with their scales only; FP4
    ones two to a byte, scales in a byte each; one number for inputs whose scale calibration finds.
    GPTQ and AWQ: codes and, always, zero points in int32 words, scales in float16; GPTQ also an int32 for each input.
    """
    rows, columns = shape
    if scheme == "nf4":
        return -(-rows * columns // 2) + -(-rows * columns // NF4_BLOCK) * torch.float32.itemsize
    if isinstance(scheme, str):
        return rows * columns + rows * torch.float32.itemsize
    groups = 1 if scheme.group_size is None else -(-columns // scheme.group_size)
    if format in WORD_FORMATS:
        words = rows * packed_columns(columns, scheme.bits) + groups * packed_columns(rows, scheme.bits)
        order = 0 if format == "awq" else columns
        return (words + order) * PACKED_WORD_BYTES + rows * groups * torch.float16.itemsize
    blocks = -(-rows // scheme.group_rows) * groups
    inputs = 0
    if scheme.activations in CALIBRATED_INPUTS:
        inputs = dtype.itemsize if scheme.scales == "model" else torch.float32.itemsize
    if scheme.type == "float":
        scales = blocks * (dtype.itemsize if scheme.scales == "model" else 1)
        scales += torch.float32.itemsize * (scheme.scales == "e4m3") + inputs
        return rows * -(-columns * scheme.bits // 8) + scales
    scales = blocks * dtype.itemsize + inputs
    if scheme.int8_inputs:
        return rows * columns + scales
    zeros = 0 if scheme.symmetric else packed_columns(rows, scheme.bits) * groups * PACKED_WORD_BYTES
    return rows * packed_columns(columns, scheme.bits) * PACKED_WORD_BYTES + scales + zeros + WEIGHT_SHAPE_BYTES


@dataclass(frozen=True)
class _Choice:
    """What the recipe makes of one weight."""

    scheme: Scheme | str
    method: str | None
    reason: str
    fallback: bool = False


def make_plan(components: ComponentMap, recipe: Recipe, exempt: Mapping[str, str] | None = None) -> Plan:
    """A line for every tensor. PlanError where the recipe cannot be carried out on this model; no weight is read.

    exempt: linears by name that are kept whatever the recipe says, and why.
    """
    choices: dict[str, _Choice] = {}
    if components.source and recipe.output.format == "bitsandbytes":
        raise PlanError(
            f"{components.model_dir}: bitsandbytes quantizes from 16-bit weights, and this model is "
            f"{components.source.label}; start from the unquantized model, or use a scheme of compressed-tensors"
        )
    for component, spec in recipe.specs():
        _check_spec(component, spec)
        _check_globs(components, component, spec)
        if not _quantizes(spec):
            continue
        _check_ties(components, component, spec)
        if component == "embedding":
            choices[_embedding(components, spec)] = _Choice(spec.scheme, DATA_FREE, "")
            continue
        _check_experts(components, component, spec)
        choices |= _kept_stacks(components, component, spec)
        groups = list(_groups(components, component))
        if not groups:
            raise PlanError(
                f"components.{component}: the recipe quantizes it, but this {components.config.model_type} model has "
                "no linear layer there; set it to fp16"
            )
        for group, block in groups:
            choices |= _choose_group(components, recipe, spec, group, block, exempt or {})
        _check_expert_schemes(components, choices)
    lines = tuple(
        _line(parameter, choices.get(parameter.name), components, recipe) for parameter in components.parameters
    )
    fallbacks = tuple(f"{name}: {choice.reason}" for name, choice in choices.items() if choice.fallback)
    cache = plan_cache(components, recipe.kv_cache, written_dtype(components, recipe)) if recipe.kv_cache else None
    budget = [BUDGET_NOTE] if recipe.budget else []
    return Plan(lines, fallbacks, (*budget, *_notes(components, lines, cache), *_kept_note(lines)), cache)


def written_dtype(components: ComponentMap, recipe: Recipe) -> torch.dtype:
    """The model's dtype in the checkpoint: its own, unless that has more bits than the recipe keeps.

    bfloat16 then, whose range is that of float32: engines compute in it, and the activations of a model that was
    trained in float32 need not fit into float16.
    """
    narrow = recipe.output.kept == KEEP and components.dtype.itemsize > HALF.itemsize
    return HALF if narrow else components.dtype


def _stored_dtype(parameter: ParameterInfo, components: ComponentMap, recipe: Recipe) -> torch.dtype:
    """What a kept tensor is written in: of 16 bits, if the recipe has a say in it and transformers does not object."""
    ours = parameter.loaded and parameter.component != OTHER and not (parameter.buffer or parameter.exact)
    wide = parameter.dtype.is_floating_point and parameter.dtype.itemsize > HALF.itemsize
    return written_dtype(components, recipe) if ours and wide and recipe.output.kept == KEEP else parameter.dtype


def as_written(components: ComponentMap, plan: Plan, recipe: Recipe) -> ComponentMap:
    """The model as the plan writes what it keeps: kept weights that are rounded are read as they will be stored."""
    kept = {line.name: line.stored for line in plan.lines if line.stored}
    return components.rounded(kept, written_dtype(components, recipe))


def _kept_note(lines: Sequence[PlanLine]) -> Iterator[str]:
    """That a checkpoint is larger than the bits of its recipe sound like, since much of it stays as it is."""
    totals, kept = _totals(lines), dict[str, int]()
    for line in lines:
        if line.action == "keep":
            kept[line.component] = kept.get(line.component, 0) + line.bytes_after
    size = sum(kept.values())
    if totals.quantized_parameters and size > KEPT_SHARE * totals.bytes_after:
        largest = sorted(kept.items(), key=lambda item: -item[1])[:KEPT_NAMED]
        yield (
            f"{size / totals.bytes_after:.0%} of the result ({size:,} of {totals.bytes_after:,} bytes) are weights "
            f"that stay as they are: {', '.join(f'{name} {bytes_:,}' for name, bytes_ in largest)}; a scheme for them "
            "(components: in the recipe) makes it smaller"
        )


def _notes(components: ComponentMap, lines: Sequence[PlanLine], cache: CachePlan | None) -> Iterator[str]:
    family, kind = components.family, components.config.model_type
    if components.source:
        written = dtype_name(components.dtype)
        yield (
            f"the source is {components.source.label}: its weights are dequantized when they are read, and what of "
            f"them is kept is written in {written}"
        )
    if cache:
        before, after = cache.token_bytes
        yield (
            f"KV cache: {len(cache.attentions)} layers in FP8 with a scale for each {cache.each}: {after:,} bytes per "
            f"token instead of {before:,} in {dtype_name(cache.dtype)}"
        )
    narrowed = [
        line
        for parameter, line in zip(components.parameters, lines, strict=True)
        if line.stored not in (None, parameter.dtype)
    ]
    if narrowed:
        yield (
            f"{len(narrowed)} kept weights of more than 16 bits ({sum(line.bytes_before for line in narrowed):,} "
            f"bytes) are stored as {dtype_name(narrowed[0].stored or HALF)}, which is what fp16 in a recipe means for "
            "this model; write output: {kept: fp32} to store them as they are"
        )
    if components.unknown:
        yield (
            f"{components.unknown}: its parts and linear layers are told by the names of its tensors: "
            f"{components.parts_told}"
        )
    if family.source == "guess":
        yield f"model type {kind} is not in the table of families; its parts were guessed: {components.parts_told}"
    if travelling := [parameter for parameter in components.parameters if not parameter.loaded]:
        roots = sorted({parameter.name.partition(".")[0] for parameter in travelling})
        yield (
            f"{len(travelling)} tensors ({sum(one.nbytes for one in travelling):,} bytes, below "
            f"{', '.join(roots)}) are not "
            f"loaded by the model class; they are {'kept' if components.source else 'copied bit for bit'} and listed "
            "under ignore"
        )
    for component in ("vision_encoder", "language"):
        scaled = [line for line in lines if line.component == component and line.method in WITH_FOLDS]
        if scaled and not has_folds(components, component):
            yield (
                f"components.{component}: no layer of this model is known to take AWQ's channel scales (model "
                f"type {kind}), "
                "so weights are only clipped and rounded; gptq does not need such layers"
            )
    quantized = {line.name for line in lines if line.action == "quantize" and line.method != DATA_FREE}
    for module, form in components.experts.items():
        if f"{module}.0.{form.projections[0]}.weight" in quantized:
            layers = sum(other == form for other in components.experts.values())
            weights = form.experts * form.intermediate * form.hidden * len(form.projections)
            width = max(form.hidden, form.intermediate)
            statistics = width * width * torch.float32.itemsize
            yield (
                f"experts: {layers} layers of {form.experts}; while a layer is calibrated its experts take "
                f"{weights * torch.float32.itemsize:,} bytes in float32, and the statistics of one expert at a "
                f"time up to "
                f"{statistics:,}"
            )
            return


def has_folds(components: ComponentMap, component: str) -> bool:
    """Whether some linears of a component's blocks are known to take channel scales from what produces their inputs."""
    names = {parameter.name.removesuffix(".weight") for parameter in components.parameters}
    for block in components.blocks:
        if block.component != component:
            continue
        groups = [{linear.local for linear in group} for group in components.fused_groups(block)]
        fitting = {f"{one}.weight" for one in _inside(names, block)}
        for fold in components.folds_in(block):
            numbers = {part for group in groups for local in group for part in local.split(".") if part.isdigit()}
            for number in numbers if "*" in fold.producer else {"*"}:
                rule = fold.inside(fitting, number)
                if rule.consumers and set(rule.consumers) in groups:
                    return True
    return False


def _inside(names: set[str], block: BlockInfo) -> list[str]:
    return [name[len(block.name) + 1 :] for name in names if name.startswith(f"{block.name}.")]


def _quantizes(spec: ComponentSpec) -> bool:
    return spec.scheme != KEEP or any(override.scheme not in (None, KEEP) for override in spec.overrides)


def _check_spec(component: str, spec: ComponentSpec) -> None:
    """Schemes and methods that do not go together."""
    for scheme, method in _pairs(spec):
        if (scheme in BITSANDBYTES_SCHEMES) != (method == "bitsandbytes"):
            label = scheme.label if isinstance(scheme, Scheme) else scheme
            raise PlanError(
                f"components.{component}: scheme {label} does not go with method {method}; nf4 and bnb-int8 go with "
                "bitsandbytes, and with nothing else"
            )
        outside = component not in ("vision_encoder", "language")
        if outside and isinstance(scheme, Scheme) and scheme.activations in CALIBRATED_INPUTS:
            raise PlanError(
                f"components.{component}: scheme {scheme.label} needs calibration, which only layers of the vision "
                f"encoder and the language model get; use {CALIBRATED_INPUTS[scheme.activations]} or fp16 there"
            )
        if method == "int8" and isinstance(scheme, Scheme) and (scheme.type, scheme.bits) != ("int", 8):
            raise PlanError(
                f"components.{component}: method int8 makes 8-bit integers, not {scheme.label}; use rtn, search, gptq "
                "or awq"
            )


def _check_ties(components: ComponentMap, component: str, spec: ComponentSpec) -> None:
    if component not in ("embedding", "lm_head") or not components.tied:
        return
    if any(_component_of(components, name) == component for group in components.tied for name in group):
        raise PlanError(
            f"components.{component}: embedding and lm_head are one tied tensor here, and neither transformers "
            "nor vLLM loads it quantized; leave both at fp16"
        )


def _check_experts(components: ComponentMap, component: str, spec: ComponentSpec) -> None:
    """Stacked weights that could not be taken apart are no linear layers; to skip them would skip most of a model."""
    uses_bitsandbytes = spec.method == "bitsandbytes" or any(one.method == "bitsandbytes" for one in spec.overrides)
    for name in components.experts if uses_bitsandbytes else ():
        if (
            not _matching(spec.keep, _names_of(components, name, component, None))
            and _component_of(components, f"{name}.") == component
        ):
            raise PlanError(
                f"components.{component}: bitsandbytes does not quantize experts, whose weights are stacked "
                f"({name}); list them under keep, or use a scheme of compressed-tensors"
            )
    if components.unknown:
        return
    own = [parameter for parameter in components.parameters if parameter.component == component]
    whole = sum(prod(parameter.shape) for parameter in own)
    for parameter in own:
        module = parameter.name.rpartition(".")[0]
        if len(parameter.shape) < 3 or module not in components.unread_experts:
            continue
        alike = sum(prod(one.shape) for one in own if one.name.rpartition(".")[2] == parameter.name.rpartition(".")[2])
        if alike > LARGEST_KEPT_STACK * whole and not _matching(
            spec.keep, _names_of(components, module, component, None)
        ):
            raise PlanError(
                f"components.{component}: {parameter.name} stacks the weights of {parameter.shape[0]} experts in a way "
                f"that we cannot take apart ({components.modules[module].__name__}); list its module under keep "
                "to leave it at 16 bits"
            )


def _kept_stacks(components: ComponentMap, component: str, spec: ComponentSpec) -> dict[str, _Choice]:
    """Stacks of experts' weights in a model without a class, which tells how they are to be taken apart."""
    return {
        one.name: _Choice(KEEP, None, STACK_KEPT.format(len(one.value)), fallback=True)
        for one in components.parameters
        if components.unknown
        and one.component == component
        and len(one.shape) == 3
        and (module := one.name.rpartition(".")[0]) in components.unread_experts
        and not _matching(spec.keep, _names_of(components, module, component, None))
    }


def _check_expert_schemes(components: ComponentMap, choices: dict[str, _Choice]) -> None:
    """Engines run all experts of a layer as one: they need one scheme for all, and none may be left out."""
    for module, form in components.experts.items():
        names = [f"{module}.{expert}.{leaf}.weight" for expert in range(form.experts) for leaf in form.projections]
        schemes = {_label(choices[name].scheme) if name in choices else KEEP: name for name in names}
        if len(schemes) > 1:
            told = ", ".join(f"{name} {label}" for label, name in sorted(schemes.items()))
            raise PlanError(
                f"{module}: the experts of a layer run as one when served and need one scheme, but the recipe "
                f"and their shapes give them several ({told}); let keep and overrides cover all of them, or use a "
                "group size that divides all their inputs"
            )


def _component_of(components: ComponentMap, name: str) -> str | None:
    """The component that a parameter's name belongs to, also where it has no tensor of its own on disk."""
    prefixes = sorted(components.family.prefixes().items(), key=lambda item: -len(item[0]))
    return next((owner for prefix, owner in prefixes if name.startswith(f"{prefix}.")), None)


def _embedding(components: ComponentMap, spec: ComponentSpec) -> str:
    """The name of the embedding's weight, if it can be stored as the recipe asks."""
    if spec.scheme != SHORT_SCHEMES["w8"] or spec.method != DATA_FREE or spec.overrides:
        raise PlanError(
            "components.embedding: an embedding is stored as w8 (int8 with a scale for every row, method rtn, "
            "no overrides) or as fp16"
        )
    prefix = next(prefix for prefix, owner in components.family.prefixes().items() if owner == "embedding")
    module = components.modules.get(prefix, nn.Module)
    if module is not nn.Embedding:
        raise PlanError(f"components.embedding: {prefix} is a {module.__name__}, not a plain embedding; make it fp16")
    return f"{prefix}.weight"


def _groups(components: ComponentMap, component: str) -> Iterator[tuple[tuple[LinearInfo, ...], BlockInfo | None]]:
    """The linears of a component that can be quantized, together where they must share a scheme, with their block."""
    for block in components.blocks:
        if block.component == component:
            for group in components.fused_groups(block):
                yield group, block
    if component in ("projector", "lm_head"):
        for linear in components.linears:
            if linear.component == component:
                yield (linear,), None


def _choose_group(
    components: ComponentMap,
    recipe: Recipe,
    spec: ComponentSpec,
    group: tuple[LinearInfo, ...],
    block: BlockInfo | None,
    exempt: Mapping[str, str],
) -> dict[str, _Choice]:
    """The choice for linears that one serving kernel runs: one scheme for all, after overrides and fallback."""
    blocks = sum(other.component == group[0].component for other in components.blocks) if block else 1
    wanted = {
        linear.name: _Choice(KEEP, None, exempt[linear.name])
        if linear.name in exempt
        else _wanted(components, spec, linear, block, blocks)
        for linear in group
    }
    first = wanted[group[0].name]
    for linear in group:
        if wanted[linear.name].scheme != first.scheme:
            names = ", ".join(one.local for one in group)
            labels = ", ".join(_label(wanted[one.name].scheme) for one in group)
            raise PlanError(
                f"{block.name if block else linear.name}: {names} run as one kernel when served and need one scheme, "
                f"but the recipe gives them {labels}; let keep and overrides cover all of them"
            )
    choices = {}
    for linear in group:
        choice = _fit(wanted[linear.name], linear, recipe, inputs=_dividing_inputs(components, linear))
        if block is None and choice.scheme != KEEP and choice.method not in (DATA_FREE, "bitsandbytes"):
            raise PlanError(
                f"components.{linear.component}: {linear.name} is outside the blocks, where method {choice.method} has "
                f"no inputs to look at; use method: {DATA_FREE}"
            )
        choices[f"{linear.name}.weight"] = choice
    return choices


def _label(scheme: Scheme | str) -> str:
    return scheme.label if isinstance(scheme, Scheme) else scheme


def _wanted(
    components: ComponentMap, spec: ComponentSpec, linear: LinearInfo, block: BlockInfo | None, blocks: int
) -> _Choice:
    """What keep, overrides and the component's own scheme say, before the shape is looked at."""
    if glob := _matching(spec.keep, _names_of(components, linear.name, linear.component, block)):
        return _Choice(KEEP, None, f"listed under keep in the recipe as {glob}")
    for pattern, why in NEVER_QUANTIZED:
        if block is not None and fnmatch.fnmatchcase(linear.local, pattern):
            return _Choice(KEEP, None, why)
    if _is_router(components, linear):
        return _Choice(KEEP, None, NEVER_QUANTIZED[0][1])
    scheme, method, reason = spec.scheme, spec.method, ""
    local = linear.local if block else local_name(components, linear.name, linear.component)
    for number, override in enumerate(spec.overrides):
        if override.covers(block.index if block else 0, blocks, local):
            scheme, method = override.scheme or scheme, override.method or method
            reason = f"override {number + 1} of the recipe"
    if scheme == KEEP:
        return _Choice(KEEP, None, reason or "the recipe keeps it")
    return _Choice(scheme, method, reason)


def _is_router(components: ComponentMap, linear: LinearInfo) -> bool:
    """Whether a linear beside a layer's experts has an output for each of them."""
    return components.routed_beside.get(linear.name.rpartition(".")[0]) == linear.out_features


def _dividing_inputs(components: ComponentMap, linear: LinearInfo) -> int:
    """The number that a group size has to divide: of an expert, what all its linears have in common."""
    form = components.form_of(linear.name)
    return gcd(form.hidden, form.intermediate) if form else linear.in_features


def _fit(choice: _Choice, linear: LinearInfo, recipe: Recipe, *, inputs: int) -> _Choice:
    """The choice itself, or the first of the recipe's fallbacks where the group size does not divide the inputs."""
    scheme = choice.scheme
    if not isinstance(scheme, Scheme) or scheme.group_size is None or inputs % scheme.group_size == 0:
        return choice
    smaller = _smaller_group(inputs, scheme.group_size)
    whose = "inputs are" if inputs == linear.in_features else "as the common divisor of the experts' inputs is"
    why = f"{inputs} {whose} no multiple of group size {scheme.group_size}"
    for step in recipe.fallback.when_indivisible:
        if step == "group_size" and smaller is not None and (fitting := _with_group_size(scheme, smaller)):
            return _Choice(fitting, choice.method, f"{why}, so the group size is {smaller}", fallback=True)
        if step in SHORT_SCHEMES and SHORT_SCHEMES[step].floats == scheme.floats:
            method = choice.method if choice.method == DATA_FREE else "int8"
            return _Choice(SHORT_SCHEMES[step], method, f"{why}, so it becomes {step}", fallback=True)
        if step == KEEP:
            return _Choice(KEEP, None, f"{why}, so it is kept at 16 bits", fallback=True)
    advice = f"use a divisor such as {smaller}" if smaller else "use group_size: null"
    raise PlanError(
        f"components.{linear.component}: {linear.name} has {linear.in_features} inputs, which group size "
        f"{scheme.group_size} does not divide{'' if inputs == linear.in_features else f' ({why})'}; {advice}, "
        f"list the layer under keep, or allow a fallback"
    )


def _with_group_size(scheme: Scheme, size: int) -> Scheme | None:
    """The scheme with other groups, if there is such a one."""
    try:
        return Scheme.model_validate(scheme.model_dump() | {"group_size": size})
    except ValidationError:
        return None


def _smaller_group(inputs: int, group_size: int) -> int | None:
    """The largest power of two below the group size that divides the inputs, and is worth its scales."""
    size = 1 << (group_size - 1).bit_length() - 1
    while size >= SMALLEST_GROUP:
        if inputs % size == 0:
            return size
        size //= 2
    return None


def _line(parameter: ParameterInfo, choice: _Choice | None, components: ComponentMap, recipe: Recipe) -> PlanLine:
    if choice is None or choice.scheme == KEEP:
        reason = choice.reason if choice else _why_kept(parameter, recipe)
        stored = _stored_dtype(parameter, components, recipe)
        return PlanLine(
            parameter.name,
            parameter.component,
            "keep",
            None,
            None,
            reason,
            parameter.shape,
            parameter.nbytes,
            prod(parameter.shape) * stored.itemsize,
            stored,
        )
    return PlanLine(
        parameter.name,
        parameter.component,
        "quantize",
        choice.scheme,
        choice.method,
        choice.reason or f"components.{parameter.component} of the recipe",
        parameter.shape,
        parameter.nbytes,
        stored_bytes(parameter.shape, choice.scheme, written_dtype(components, recipe), format=recipe.output.format),
        needs_original=choice.method in AIMING and _aims_at_outputs(parameter, choice.method, components, recipe),
        needs_gradients=choice.method in WITH_GRADIENTS and _answers_decide(parameter, components, recipe),
    )


def _aims_at_outputs(parameter: ParameterInfo, method: str, components: ComponentMap, recipe: Recipe) -> bool:
    """Whether a method is to be told what the original model gives a linear.

    Not of experts: what tokens reach one there and here are others. So in a mixture a second pass through all of them
    would be of use to attention alone; it is made where the recipe asks for it in words.
    """
    spec = getattr(recipe.components, parameter.component)
    target = (spec.awq if method == "awq" else spec.gptq).target or (
        "weights" if components.experts else TARGETS[recipe.effort]
    )
    return target == "outputs" and not _is_of_expert(parameter, components)


def _answers_decide(parameter: ParameterInfo, components: ComponentMap, recipe: Recipe) -> bool:
    """Whether GPTQ is to be told what the outputs of a linear do to the answers. Not of experts: most of them see too
    few answer tokens to say so."""
    loss = getattr(recipe.components, parameter.component).gptq.loss or LOSSES[recipe.effort]
    if loss is None and parameter.component == "language" and components.language_weights <= SMALL_MODEL:
        loss = "answers"
    return loss == "answers" and not _is_of_expert(parameter, components)


def _is_of_expert(parameter: ParameterInfo, components: ComponentMap) -> bool:
    return any(parameter.name.startswith(f"{home}.") for home in components.experts)


def _why_kept(parameter: ParameterInfo, recipe: Recipe) -> str:
    if not parameter.loaded:
        return "the model class does not load it; it travels with the model (multi-token prediction and the like)"
    if parameter.component == OTHER:
        return "neither vision encoder, projector, embedding, language model nor head"
    if not _quantizes(getattr(recipe.components, parameter.component)):
        return "the recipe keeps this component"
    if len(parameter.shape) < 2:
        return "a norm, bias or other vector"
    return "not a linear layer of a block"


def local_name(components: ComponentMap, name: str, component: str) -> str:
    """A module's name inside its component."""
    prefixes = [prefix for prefix, owner in components.family.prefixes().items() if owner == component]
    inside = next((name[len(prefix) + 1 :] for prefix in prefixes if name.startswith(f"{prefix}.")), "")
    return inside or name.rpartition(".")[2]


def _names_of(components: ComponentMap, name: str, component: str, block: BlockInfo | None) -> list[str]:
    """What a glob may call a module: itself and what contains it, in full, from its component or from its block."""
    names = [name, local_name(components, name, component)]
    if block is not None:
        names.append(name[len(block.name) + 1 :])
    return [outer for one in names for outer in with_parents(one)]


def with_parents(name: str) -> list[str]:
    """A dotted name and all that it lies in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _matching(globs: Sequence[str], names: Sequence[str]) -> str | None:
    return next((glob for glob in globs if any(fnmatch.fnmatchcase(name, glob) for name in names)), None)


def _check_globs(components: ComponentMap, component: str, spec: ComponentSpec) -> None:
    """A keep glob or override that means nothing in this model is a mistake, not a wish that is already granted."""
    blocks = [block for block in components.blocks if block.component == component]
    known: set[str] = set()
    if spec.keep:
        for parameter in components.parameters:
            if parameter.component == component:
                block = next((block for block in blocks if parameter.name.startswith(f"{block.name}.")), None)
                known.update(_names_of(components, parameter.name.rpartition(".")[0], component, block))
    for glob in spec.keep:
        if not any(fnmatch.fnmatchcase(name, glob) for name in known):
            raise PlanError(
                f"components.{component}.keep: '{glob}' names no module of this model{_nearest(glob, known)}"
            )
    for number, override in enumerate(spec.overrides):
        where = f"components.{component}.overrides.{number}"
        places = [(block.index, len(blocks), linear.local) for block in blocks for linear in block.linears] or [
            (0, 1, local_name(components, linear.name, component))
            for linear in components.linears
            if linear.component == component
        ]
        if any(override.covers(*place) for place in places):
            continue
        locals_ = {local for _, _, local in places}
        for glob in override.modules:
            if not any(fnmatch.fnmatchcase(local, glob) for local in locals_):
                raise PlanError(f"{where}: '{glob}' names no linear layer of this model{_nearest(glob, locals_)}")
        raise PlanError(f'{where}: layers "{override.layers}" hold none of its modules; there are {len(blocks)} layers')


def _nearest(glob: str, known: set[str]) -> str:
    """A module that is meant; where its last name alone is, that."""
    leaves = sorted({name.rpartition(".")[2] for name in known})
    close = nearest(glob, sorted(known)) or nearest(glob.strip("*").rpartition(".")[2], leaves)
    return f"; did you mean '{close}'?" if close else ""
