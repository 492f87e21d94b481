"""Mixtures of experts: modules that hold all experts' weights in a few stacked tensors, taken apart into linear layers.

transformers keeps the routed experts of a layer as `gate_up_proj` (or `up_proj`) and `down_proj` of three dimensions:
(experts, out, in) or transposed, gate and up one behind the other or interleaved, with or without biases. An `Experts`
module stands in for such a module, with one linear layer per expert and projection, named as most checkpoints name them
(experts.7.gate_proj), so that experts are quantized, stored and run as any other linear layer.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from vlmquant.conversion import Lazy, Matched, match
from vlmquant.errors import first_line

T = TypeVar("T", bound=Tensor)

CHECKED_EXPERTS, CHECKED_TOKENS = 2, 6
"""Size of the random trial that compares a stand-in with the module it stands for."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What fused modules call the number of their experts."""
TOLERANCE = 1e-4
"""Largest difference in that trial, relative to the largest output: float32 sums in another order, no more."""


@dataclass(frozen=True)
class Form:
    """How a fused module's weights lie in its tensors."""

    experts: int
    hidden: int
    intermediate: int
    gated: bool
    transposed: bool
    """(experts, in, out) instead of (experts, out, in)."""
    interleaved: bool
    """Rows of gate and up take turns; else all of gate come first."""
    biased: bool

    @property
    def projections(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    def source(self, projection: str) -> str:
        """The fused parameter that a projection is a part of."""
        return "gate_up_proj" if self.gated and projection != "down_proj" else projection

    def weight(self, fused: Tensor, expert: int, projection: str) -> Tensor:
        """The weight (out, in) of one expert's projection, out of its fused parameter."""
        whole = fused[expert].transpose(0, 1) if self.transposed else fused[expert]
        return self._part(whole, projection)

    def bias(self, fused: Tensor, expert: int, projection: str) -> Tensor:
        """(out,), out of the fused biases (experts, out)."""
        return self._part(fused[expert], projection)

    def _part(self, rows: Tensor, projection: str) -> Tensor:
        if self.source(projection) != "gate_up_proj":
            return rows
        if self.interleaved:
            return rows[(0 if projection == "gate_proj" else 1) :: 2]
        half = self.intermediate
        return rows[:half] if projection == "gate_proj" else rows[half:]


def holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps several experts' weights in tensors of its own: known by its class and what it holds."""
    stacked = [one for one in module.parameters(recurse=False) if one.dim() == 3]
    return bool(stacked) and "expert" in type(module).__name__.lower()


def form_of(module: nn.Module) -> Form | None:
    """How the weights of a fused module lie; None if it is none, or lays them out in a way that is not known."""
    own = dict(module.named_parameters(recurse=False))
    gated = "gate_up_proj" in own
    first, down = own.get("gate_up_proj" if gated else "up_proj"), own.get("down_proj")
    if not holds_experts(module) or first is None or down is None or first.dim() != 3 or down.dim() != 3:
        return None
    names = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    biases = {f"{name}_bias" for name in names}
    experts, parts = first.shape[0], 2 if gated else 1
    plain = first.shape[1] == parts * down.shape[2] and first.shape[2] == down.shape[1]
    turned = first.shape[2] == parts * down.shape[1] and first.shape[1] == down.shape[2]
    if down.shape[0] != experts or set(own) not in (names, names | biases) or not (plain or turned):
        return None
    transposed = bool(getattr(module, "is_transposed", turned and not plain))
    if not (turned if transposed else plain):
        return None
    hidden, intermediate = (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
    interleaved = gated and not getattr(module, "is_concatenated", True)
    return Form(experts, hidden, intermediate, gated, transposed, interleaved, set(own) != names)


class Expert(nn.Module):
    """The linear layers of one expert."""

    def __init__(self, form: Form, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for projection in form.projections:
            inner, outer = form.hidden, form.intermediate
            if projection == "down_proj":
                inner, outer = outer, inner
            self.add_module(projection, bare_linear(inner, outer, bias=form.biased, dtype=dtype, device=device))


def bare_linear(inner: int, outer: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """An nn.Linear without initial values: models have tens of thousands of experts' layers."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = inner, outer
    linear.weight = nn.Parameter(torch.empty(outer, inner, dtype=dtype, device=device), requires_grad=False)
    linear.register_parameter(
        "bias", nn.Parameter(torch.empty(outer, dtype=dtype, device=device), requires_grad=False) if bias else None
    )
    return linear


class Experts(nn.Module):
    """Stands in for a fused module: the same inputs and outputs, from one linear layer per expert and projection.

    watch: while calibrating, told which rows each expert is given and how many there are; says for one expert after the
    other which rows it is shown: those and perhaps more, in rising order, or None for just those.
    """

    def __init__(self, fused: nn.Module, form: Form) -> None:
        super().__init__()
        one = next(fused.parameters())
        for expert in range(form.experts):
            self.add_module(str(expert), Expert(form, dtype=one.dtype, device=one.device))
        for name, parameter in fused.named_parameters(recurse=False):  # some models' own initialization looks at them
            stand_in = torch.empty_like(parameter, device="meta")
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # so that they are not initialized
            self.__dict__[name] = stand_in
        shell = copy(fused)  # what is left: how gate and up are combined, and a norm where there is one
        shell._parameters = {}
        self.form, self._shell = form, [shell]
        self.post_expert_norm: nn.Module | None = None
        if getattr(fused, "has_post_expert_norm", False):
            self.post_expert_norm = fused.get_submodule("post_expert_norm")
        self.watch: Callable[..., Iterator[Tensor | None]] | None = None
        self.default_gate = "_apply_gate" not in _own_attributes(type(fused))
        """Whether outputs are act(gate) * up, so linear in up."""

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden).

        Without an index: hidden_states (experts * tokens, hidden), already multiplied by the router's scores, and
        zero for the tokens that an expert is not given (Llama 4).
        """
        if top_k_index is None or top_k_weights is None:
            return self._forward_sorted(hidden_states)
        outputs = torch.zeros_like(hidden_states)
        order = torch.argsort(top_k_index.flatten(), stable=True)
        ids, slots = top_k_index.flatten()[order], top_k_index.shape[-1]
        edges = torch.searchsorted(ids, torch.arange(self.form.experts + 1, device=ids.device)).tolist()
        places = [order[low:high] for low, high in pairwise(edges)]
        for expert, given, shown in self._shown([place // slots for place in places], len(hidden_states)):
            computed = self.compute(expert, hidden_states[given if shown is None else shown])
            if shown is not None:
                computed = computed[torch.searchsorted(shown, given)]
            weighted = computed * top_k_weights.reshape(-1)[places[expert], None]
            outputs.index_add_(0, given, weighted.to(outputs.dtype))
        return outputs

    def _forward_sorted(self, hidden_states: Tensor) -> Tensor:
        groups = hidden_states.view(self.form.experts, -1, self.form.hidden)
        outputs = torch.zeros_like(groups)
        given_rows = [group.any(-1).nonzero()[:, 0] for group in groups]
        for expert, given, _ in self._shown(given_rows, groups.shape[1], blend=False):
            computed = self.compute(expert, groups[expert][given])
            outputs[expert, given] = computed.to(outputs.dtype)
        return outputs.view(-1, self.form.hidden)

    def _shown(
        self, given: Sequence[Tensor], tokens: int, *, blend: bool = True
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Expert, the rows it is given, and the rows it is shown where those are others."""
        if self.watch is None:
            yield from ((expert, rows, None) for expert, rows in enumerate(given) if len(rows))
            return
        watched = self.watch(given, tokens, blend=blend)
        yield from ((expert, rows, shown) for expert, (rows, shown) in enumerate(zip(given, watched, strict=True)))

    def compute(self, expert: int, inputs: Tensor) -> Tensor:
        """What one expert makes of (rows, hidden): (rows, hidden), before the router's weights."""
        linears, shell = self.get_submodule(str(expert)), self._shell[0]
        up = linears.up_proj(inputs)  # type: ignore[operator]
        if self.form.gated:
            gate = linears.gate_proj(inputs)  # type: ignore[operator]
            inner = self._combine(gate, up)
        else:
            inner = shell.act_fn(up)  # type: ignore[operator]
        outputs: Tensor = linears.down_proj(inner)  # type: ignore[operator]
        return outputs if self.post_expert_norm is None else self.post_expert_norm(outputs)

    def _combine(self, gate: Tensor, up: Tensor) -> Tensor:
        shell = self._shell[0]
        if self.default_gate:
            return shell.act_fn(gate) * up  # type: ignore[no-any-return, operator]
        pair = torch.stack((gate, up), -1).flatten(-2) if self.form.interleaved else torch.cat((gate, up), -1)
        return shell._apply_gate(pair)  # type: ignore[no-any-return, operator]

    def __len__(self) -> int:
        return self.form.experts


def _own_attributes(kind: type) -> set[str]:
    """Names that a module's class defines itself, without what transformers' decorator adds to all."""
    from transformers.integrations.moe import _default_apply_gate

    return {name for base in kind.__mro__ for name, value in vars(base).items() if value is not _default_apply_gate}


def stands_for(fused: nn.Module, form: Form) -> str | None:
    """Compare a stand-in with the module on random weights and inputs: None where they agree, else what differs."""
    generator = torch.Generator().manual_seed(0)
    trial = _shrunk(fused, generator)
    stand_in = Experts(trial, replace(form, experts=CHECKED_EXPERTS))
    for expert in range(CHECKED_EXPERTS):
        for projection in form.projections:
            linear, source = stand_in.get_submodule(f"{expert}.{projection}"), form.source(projection)
            linear.weight = nn.Parameter(form.weight(getattr(trial, source).data, expert, projection), False)
            if form.biased:
                linear.bias = nn.Parameter(form.bias(getattr(trial, f"{source}_bias").data, expert, projection), False)
    inputs = torch.randn(CHECKED_TOKENS * CHECKED_EXPERTS, form.hidden, generator=generator)
    routed: tuple[Tensor, ...] = (inputs,)
    if len(signature(type(fused).forward).parameters) > 2:
        index = torch.randint(CHECKED_EXPERTS, (len(inputs), 1), generator=generator)
        routed = (inputs, index, torch.rand(index.shape, generator=generator) + 0.5)
    try:
        with torch.no_grad():
            wanted, got = trial(*routed), stand_in(*routed)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        return first_line(error)
    if wanted.shape != got.shape:
        return f"it puts out {list(wanted.shape)} and the stand-in {list(got.shape)}"
    difference = ((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-9)).item()
    return None if difference <= TOLERANCE else f"outputs differ by {difference:.2g} of the largest"


def _shrunk(fused: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module with a few experts only, random weights and float32, on the CPU."""
    trial = copy(fused)
    trial._parameters, trial._modules = {}, {}
    for name, parameter in fused.named_parameters(recurse=False):
        value = torch.randn((CHECKED_EXPERTS, *parameter.shape[1:]), generator=generator)
        value /= max(parameter.shape[1:]) ** 0.5 if parameter.dim() > 2 else 1.0
        trial.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for name, child in fused.named_children():
        own = deepcopy(child).to_empty(device="cpu").float()
        for parameter in own.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
        trial.add_module(name, own)
    for name in COUNTS:
        if hasattr(trial, name):
            setattr(trial, name, CHECKED_EXPERTS)
    if hasattr(trial, "config"):
        trial.config = copy(trial.config)
        trial.config._experts_implementation = "eager"  # type: ignore[union-attr]  # a config
    return trial


def take_apart(model: nn.Module, *, check: bool = True, only: Collection[str] | None = None) -> dict[str, Form]:
    """Put an `Experts` in the place of every fused module whose layout is known: module name -> layout.

    check: compare one stand-in of each class and layout with the module it stands for, and leave both kinds in peace
    where they differ. only: names of the modules, None for all.
    """
    forms: dict[str, Form] = {}
    judged: dict[tuple[type, Form], bool] = {}
    made: dict[int, Experts] = {}  # by the weights, so that tied modules stay tied
    for name, module in list(model.named_modules()):
        form = form_of(module) if only is None or name in only else None
        if form is None:
            continue
        kind = (type(module), form)
        if kind not in judged:
            judged[kind] = not check or stands_for(module, form) is None
        if judged[kind]:
            first = id(next(module.parameters()))
            if first not in made:
                made[first] = Experts(module, form)
            model.set_submodule(name, made[first])
            forms[name] = form
    return forms


def match_apart(model: nn.Module, stored: Mapping[str, Lazy]) -> Matched:
    """As `match`; and where single experts lie on disk, of a model that stacks them, by the names of `take_apart`."""
    matched = match(model, stored)
    if not matched.unexpected or not any(form_of(module) for module in model.modules()):
        return matched
    apart = deepcopy(model)
    take_apart(apart, check=False)
    more = match(apart, {name: stored[name] for name in matched.unexpected})
    return replace(matched, values={**matched.values, **more.values}, unexpected=more.unexpected)


def parts_of(values: Mapping[str, T], forms: Mapping[str, Form]) -> dict[str, T]:
    """Values by parameter name, those of fused modules replaced by every expert's weights and biases."""
    parts = dict(values)
    for module, form in forms.items():
        for projection in form.projections:
            source = f"{module}.{form.source(projection)}"
            for fused, leaf, part in ((source, "weight", form.weight), (f"{source}_bias", "bias", form.bias)):
                if fused in values:
                    for expert in range(form.experts):
                        parts[f"{module}.{expert}.{projection}.{leaf}"] = part(values[fused], expert, projection)  # type: ignore[assignment]
                    parts.pop(fused, None)
    return parts
