"""Blocks in the order in which activations flow, each with the inputs that reach it in the quantized model.

One calibration batch is one forward pass of the model's own code, run in a greenlet: it pauses where a block begins,
where a linear that is about to be quantized receives its inputs, and where the block ends. So masks, rotary
embeddings, feature merging and whatever else stands between blocks need no second implementation, every linear is
quantized on what the already quantized part of the model gives it (vision encoder and projector included), and each
block runs once. Only the block at hand has weights; the others stay on the meta device.

Where a method wants to know what the original model gives a linear, each batch has a second pass, with the original
weights. Up to the first block that has codes it takes what the first pass computes.

Where several processes share the work (ranks), each runs some of the batches; what they collect, and where to go next,
is put together in the order of all batches.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from vlmquant import signals
from vlmquant.calibration.encode import Batch, BatchMaker
from vlmquant.calibration.refusals import passing
from vlmquant.calibration.samples import Sample
from vlmquant.components import BlockInfo, ComponentMap, LinearInfo
from vlmquant.errors import SentinelError, StarvedExpertsError
from vlmquant.experts import Experts
from vlmquant.families import Fold
from vlmquant.grid import Grid, QuantizedWeight, grid_of, scale_problem
from vlmquant.kernels.reference import input_scale, round_inputs
from vlmquant.kvcache import Change, Maxima, absolute_maxima, intercept
from vlmquant.planning import CALIBRATED_INPUTS, Plan, PlanLine
from vlmquant.ranks import ALONE, ROWS, Ranks, Relay, Turn
from vlmquant.recipe import ComponentSpec, ExpertOptions, Scheme, TokenWeights
from vlmquant.scratch import circles_freed, leave_memory, mapped_copy
from vlmquant.shards import some

T = TypeVar("T")

GRAM_SLICES = 4
"""X^T X is symmetric: computed in 4 column slices, only the upper ones, it takes 62 % of the multiplications."""

TOKENS_PER_INPUT = 2
"""So many tokens for each of its inputs are enough for an expert, where the recipe says nothing else.

With fewer, others' tokens help; with more, they harm (benchmarks/results/moe.md)."""

SMALL_MATRIX = 1 << 20
"""Bytes of second moments that go from process to process in one piece."""
WAITING = ("linear", "experts")
"""Pauses inside a block."""
SPILL_BYTES = 1 << 16
"""Smaller tensors are not worth a file."""
HELD_EVERY = 8
"""One of so many samples is held out where a method judges by samples that it has not seen; fewer, where those have
more than HELD_TOKENS tokens."""
HELD_TOKENS = 4096
ROW_ELEMENTS = 1 << 23
"""Of a weight, that algorithms work on at a time."""
EIGHT = 8
"""Bits of a weight that is rounded about as finely as numbers of 16 bits are."""
SCALE_ROUNDING = 2.0**-8
"""What a scale may change by where it is divided, as it is rounded to 16 bits: codes of fewer bits lose far more."""
MOST_LOST = 0.1
"""Of the mean square of inputs that are rounded to integers by one scale: where more is lost, it is told."""
ROWS_TOGETHER = 1024
"""Of a weight, that make up for each other at the most, where it is rounded by what outputs do to the answers: more of
them lose no less (benchmarks/accuracy/LOG.md)."""
SECTIONS = (0.6180339887498949, 0.7548776662466927)
"""Fractions whose multiples spread evenly over 0 to 1: the golden section, and that of two dimensions."""
CLIPPED_AT = 2.0
"""Times the median token's mean square, where a layer is told the original's outputs: see TokenWeights.clip."""
LEAST_ENERGY = 1e-30
"""Outputs are taken for no smaller, where a loss is divided by them."""


@dataclass(frozen=True)
class BlockResult:
    """What a finished block is made of; enough to write it, and to run it again."""

    quantized: dict[str, QuantizedWeight]
    """By the weight's parameter name in the model."""
    changed: dict[str, Tensor]
    """Kept parameters that took a fold (AWQ), by parameter name, in the model's dtype."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative output error tr(E H E^T) / tr(W H W^T) by parameter name."""
    notes: tuple[str, ...] = ()
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    """For each module of experts, how many calibration tokens were routed to each of them."""
    cache: dict[str, Maxima] = field(default_factory=dict)
    """What attention modules put into the KV cache, where the plan quantizes it."""
    methods: dict[str, str] = field(default_factory=dict)
    """By parameter name: the method that `auto` chose."""
    alphas: dict[str, float] = field(default_factory=dict)
    """By parameter name: how much of what would make up for the errors before a layer held on samples held out."""


@dataclass(frozen=True)
class _Pause:
    """Where a forward pass stopped: "enter" or "exit" of a block, a linear, or where its experts were chosen."""

    kind: str
    name: str
    inputs: Tensor | None = None
    """Of a linear."""
    counts: tuple[int, ...] = ()
    """Real tokens routed to each expert."""
    tokens: int = 0
    """Real tokens that were routed."""
    blend: bool = True
    """Whether other experts' tokens are to be had."""


class _Walk(greenlet):
    """One batch's forward pass."""

    def __init__(self, run: Callable[[], None], number: int) -> None:
        super().__init__(run)
        self.number = number
        """Of its batch."""
        self.token_mask: Tensor | None = None
        self.token_weights: Tensor | None = None
        """float32 (samples, tokens): how much each counts, 0 for padding; None where all count alike."""
        self.expert_weights: Tensor | None = None
        """The same with all tokens of images: an expert sees few, and must not be left without any."""
        self.kinds_of_tokens: list[Tensor] = []
        """Which tokens are of which type, for models whose experts see those of one type only."""
        self.row_weights: Tensor | None = None
        """While an expert runs: how much each of the rows it is shown counts, 0 for padding."""
        self.group_inputs: dict[str, Tensor] = {}
        """Inputs of the first linear of a group, by its name."""
        self.paused: _Pause | None = None
        self.batch: Batch | None = None
        """As the model is given it, on the device."""
        self.original: _Walk | None = None
        """The same batch in the original model, where a method wants that."""
        self.first: _Walk | None = None
        """Of a pass through the original model: the one through the quantized model."""
        self.output: Any = None
        """What the block before gave, kept for the pass through the original model."""
        self.entering: Callable[[], Any] | None = None
        """Where it is paused before a block: what that would compute next."""
        self.guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """What tells of errors in the model's own code."""

    def beside(self) -> "_Walk":
        """A walk through the block that this one is paused before, which leaves this one where it is."""
        entering, guard = self.entering, self.guard
        assert entering is not None

        def run() -> None:
            with guard():
                entering()

        walk = _Walk(run, self.number)
        walk.token_mask, walk.kinds_of_tokens = self.token_mask, self.kinds_of_tokens
        walk.token_weights, walk.expert_weights = self.token_weights, self.expert_weights
        walk.original, walk.first = self.original, self.first
        return walk

    def weights_for_experts(self, count: int) -> Tensor | None:
        """float32 (count,): how much each of a module's tokens counts, where it got all and they do not count alike."""
        weights = self.expert_weights
        return None if weights is None or weights.numel() != count else weights.flatten()

    def real_tokens(self, count: int) -> Tensor | None:
        """bool (count,): which of a module's tokens are no padding, where it got all, or all of one type."""
        if self.token_mask is None:
            return None
        flat = self.token_mask.flatten()
        if len(flat) == count:
            return flat
        return next((flat[kind] for kind in self.kinds_of_tokens if int(kind.sum()) == count), None)

    def resume(self) -> None:
        """Run to the next pause; `paused` is None once the forward pass has ended."""
        signals.check()
        pause = self.switch()
        self.paused = pause if isinstance(pause, _Pause) else None


def _pause(pause: _Pause) -> None:
    parent = getcurrent().parent
    assert parent is not None, "only a walk pauses"
    parent.switch(pause)


def _walk() -> _Walk:
    walk = getcurrent()
    assert isinstance(walk, _Walk)
    return walk


class Rerun:
    """Inputs that nobody keeps: whoever asks for them has the passes walk through the block again, as far as there."""

    def __init__(self, block: "Block", name: str) -> None:
        self._block, self._name = block, name

    def __iter__(self) -> Iterator["Given | None"]:
        return self._block.inputs_of(self._name)

    def with_originals(self) -> Iterator["Given | None"]:
        return self._block.inputs_of(self._name, originals=True)


@dataclass(frozen=True)
class Given:
    """What a linear is given by a pass."""

    inputs: Tensor
    counts: Tensor | None
    """A mask of its real tokens, or how much each counts; None where all are real."""
    original: Tensor | None = None
    """What the original model gives it there."""


Inputs = Sequence[Given | None] | Rerun
"""By each pass of this process; None for one that does not come there."""


@dataclass(frozen=True)
class Rows:
    """The inputs of a batch as float32 (tokens, in), padding left out."""

    inputs: Tensor
    weights: Tensor | None
    """How much each token counts, None for 1."""
    shift: Tensor | None = None
    """What the original model gives, less the inputs, (tokens, in)."""
    held: Tensor | None = None
    """bool (tokens,): those of samples that are held out."""

    @property
    def count(self) -> float:
        return len(self.inputs) if self.weights is None else self.weights.sum().item()

    def scaled(self, values: Tensor) -> Tensor:
        """Values of each token (tokens, in), by the root of what it counts."""
        return values if self.weights is None else values * self.weights.sqrt()[:, None]

    def parts(self) -> tuple["Rows | None", "Rows | None"]:
        """The tokens of samples that are not held out, and of those that are."""
        assert self.held is not None
        fit, held = (self._some(which) for which in (~self.held, self.held))
        return fit if len(fit.inputs) else None, held if len(held.inputs) else None

    def drawn(self, most: int) -> "Rows":
        """No more tokens than so many, at even distances."""
        step = max(-(-len(self.inputs) // most), 1)
        return Rows(self.inputs[::step].clone(), None if self.weights is None else self.weights[::step])

    @staticmethod
    def joined(parts: Sequence["Rows"]) -> "Rows":
        """The tokens of several, with nothing of the original model."""
        inputs = torch.cat([part.inputs for part in parts])
        if all(part.weights is None for part in parts):
            return Rows(inputs, None)
        ones = [inputs.new_ones(len(part.inputs)) if part.weights is None else part.weights for part in parts]
        return Rows(inputs, torch.cat(ones))

    def _some(self, which: Tensor) -> "Rows":
        return self if bool(which.all()) else self.part(which)

    def part(self, which: Tensor | slice) -> "Rows":
        """Some of the tokens: a mask (tokens,), or a slice."""
        return Rows(self.inputs[which], *(None if one is None else one[which] for one in (self.weights, self.shift)))


@dataclass
class Moments:
    """What the inputs z of a stage are like, and how they differ from x, which the original model gives.

    The sums are over the samples that are not held out; their memory is the receiver's.
    """

    squares: Tensor
    """The sum of z z^T, float32 (in, in)."""
    cross: Tensor
    """The sum of (x - z) z^T, float32 (in, in)."""
    tokens: float
    held: list[Rows]
    """Of the samples held out."""

    def divided(self, scales: Tensor | None) -> "Moments":
        """The same of inputs divided by scales (in,), in the memory of this."""
        if scales is None:
            return self
        held = [
            Rows(rows.inputs / scales, rows.weights, None if rows.shift is None else rows.shift / scales)
            for rows in self.held
        ]
        return Moments(divided(self.squares, scales), divided(self.cross, scales), self.tokens, held)


def divided(moments: Tensor, scales: Tensor | None) -> Tensor:
    """Second moments (in, in), as those of inputs divided by scales (in,); in place."""
    return moments if scales is None else moments.div_(scales[:, None]).div_(scales)


class Stage:
    """Linears of one block that share an input and a scheme: what an algorithm is given.

    stored: local name -> (out, in) as read from the model.
    """

    def __init__(
        self,
        block: "Block",
        linears: Sequence[LinearInfo],
        line: PlanLine,
        inputs: Inputs | None,
        *,
        unseen: bool = False,
    ) -> None:
        assert isinstance(line.scheme, Scheme)
        self.block = block
        self.ranks = block.stream.ranks
        self.linears = {linear.local: linear for linear in linears}
        self.scheme: Scheme = line.scheme
        self.method = "rtn" if unseen else line.method or "rtn"
        """rtn for an expert that no calibration token was routed to."""
        self.options: ComponentSpec = block.stream.specs[line.component]
        self.model_dtype = block.stream.model_dtype
        device = block.stream.device
        self.stored = {linear.local: block.stream.read(linear.name + ".weight").to(device) for linear in linears}
        self._line, self._inputs = line, inputs
        self._hessian: Tensor | None = None
        self._mean_square: Tensor | None = None
        self._largest: Tensor | None = None
        self._measured: dict[str, tuple[float, float]] = {}
        self._channel_scales: Tensor | None = None

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """What is stored, in float32."""
        return {local: weight.float() for local, weight in self.stored.items()}

    @property
    def _columns(self) -> int:
        return next(iter(self.stored.values())).shape[1]

    def _rows(self, *, originals: bool = False) -> Iterator[Rows | None]:
        """The inputs of each batch of this process; None for a batch that does not come here. originals: with what the
        original model gives, where that is known of a batch."""
        given = self._inputs or ()
        passes = given.with_originals() if originals and isinstance(given, Rerun) else given
        numbers = iter(self.block.numbers)
        for one in passes:  # not through zip, which holds its last items while it asks for the next
            number = next(numbers)
            rows = None if one is None else self._rows_of(one, number, originals=originals)
            del one  # what one pass gave is let go of before the next runs, here and below
            yield rows
            del rows

    def _rows_of(self, given: Given, number: int, *, originals: bool) -> Rows:
        flat = given.inputs.reshape(-1, given.inputs.shape[-1])
        counts = None if given.counts is None else given.counts.flatten()
        kept = slice(None) if counts is None else counts != 0
        rows, weights = flat[kept].float(), None if counts is None else counts[kept]
        if weights is not None and (weights.dtype == torch.bool or bool((weights == 1).all())):
            weights = None
        weights = self._clipped(rows, weights)
        if not originals:
            return Rows(rows, weights)
        held = self.block.stream.held_out(number, given.inputs)[kept]
        if given.original is None or given.original.shape != given.inputs.shape:
            return Rows(rows, weights, None, held)
        return Rows(rows, weights, given.original.reshape(flat.shape)[kept].float() - rows, held)

    def _clipped(self, rows: Tensor, weights: Tensor | None) -> Tensor | None:
        """How much tokens (tokens,) count, less for those whose inputs (tokens, in) are massive beside others of the
        batch: see TokenWeights.clip. What is not finite, or overflows, counts as before, so that it is met."""
        most = self._clip
        if most is None:
            return weights
        sizes = torch.linalg.vector_norm(rows, dim=1)
        usual = sizes[sizes > 0]
        if not len(usual) or not sizes.isfinite().all():
            return weights
        clipped: Tensor = (usual.median() / sizes).square().mul_(most).clamp_max_(1)
        if bool((clipped == 1).all()):
            return weights
        return clipped if weights is None else weights * clipped

    @property
    def _clip(self) -> float | None:
        if self.block.info.component != "language":
            return None
        given = self.block.stream.clip
        return CLIPPED_AT if given is None and self._line.needs_original else given

    def hessian(self) -> Tensor:
        """E[x x^T] over all tokens, float32 (in, in)."""
        if self._hessian is None:
            total, tokens, holder = self._second_moments()
            self.ranks.spread(upper_slices(total), holder)
            self._hessian = self._mean_of_squares(total, tokens)
        return self._hessian

    def of_hessian(self, make: Callable[[Tensor], T]) -> T:
        """What an algorithm makes of the same, in its memory: where it was summed up, for all processes."""
        if self._hessian is not None:
            taken, self._hessian = [self._hessian], None
            return self.ranks.first(lambda: make(taken.pop()))
        total, tokens, holder = self._second_moments()
        kept = [total]  # which is let go of before others' results arrive
        del total
        if self.ranks.rank != holder:
            kept.clear()
        return self.ranks.made_by(holder, lambda: make(self._mean_of_squares(kept.pop(), tokens)))

    def _second_moments(self) -> tuple[Tensor, float, int]:
        """The upper block triangle of the sum of x x^T, the tokens in it, and which process it is right in."""
        total = torch.zeros(self._columns, self._columns, device=self.block.stream.device)
        relay, tokens = self.block.relay(), dict[int, float]()
        batches = self._rows()
        for turn, number in zip(relay, self.block.numbers, strict=True):
            found, rows = next(batches), None
            if found is not None:
                tokens[number] = found.count
                rows = found.scaled(found.inputs)
            _add_gram(total, rows, turn)
            del rows, found
        return total, sum(self.ranks.in_order(tokens), 0.0), relay.last

    @property
    def has_originals(self) -> bool:
        """Whether it is known what the original model gives these linears."""
        if isinstance(self._inputs, Rerun):
            known = self.block.follows_original
        else:
            known = any(one is not None and one.original is not None for one in self._inputs or ())
        return any(self.ranks.gather(known))

    def of_moments(self, make: Callable[[Moments], T]) -> T:
        """What an algorithm makes of inputs and of what the original model gives instead, for all processes."""
        self._hessian = None  # which is not needed beside them
        moments, holder = self._moments()
        kept = [moments]
        del moments
        if self.ranks.rank != holder:
            kept.clear()
        return self.ranks.made_by(holder, lambda: make(kept.pop()))

    def _moments(self) -> tuple[Moments, int]:
        """And which process they are right in."""
        device = self.block.stream.device
        squares, cross = (torch.zeros(self._columns, self._columns, device=device) for _ in range(2))
        relay, own = self.block.relay(), dict[int, tuple[float, Rows | None]]()
        batches = self._rows(originals=True)
        for turn, number in zip(relay, self.block.numbers, strict=True):
            found = next(batches)
            fit, held = (None, None) if found is None else found.parts()
            inputs = None if fit is None else fit.scaled(fit.inputs)
            shift = None if fit is None or fit.shift is None else fit.scaled(fit.shift)
            _add_gram(squares, inputs, turn)
            with turn.adding(cross):
                if inputs is not None and shift is not None:
                    cross.addmm_(shift.T, inputs)
            if found is not None:
                own[number] = (0.0 if fit is None else fit.count, held)
            del fit, held, found, inputs, shift
        everywhere = self.ranks.in_order(own)
        tokens, held_out = sum((count for count, _ in everywhere), 0.0), [rows for _, rows in everywhere if rows]
        if self.ranks.rank == relay.last:
            whole = squares.diagonal() + sum(rows.scaled(rows.inputs).square().sum(0) for rows in held_out)
            self._refuse_bad_inputs(whole, tokens + sum(rows.count for rows in held_out))
        return Moments(mirror_upper(squares), cross, tokens, held_out), relay.last

    def _mean_of_squares(self, total: Tensor, tokens: float) -> Tensor:
        mean = mirror_upper(total).div_(tokens or 1)
        self._refuse_bad_inputs(mean.diagonal(), tokens)
        return mean

    @property
    def weighs_outputs(self) -> bool:
        """Whether the plan has its codes found from what its outputs do to the answers, and that was asked."""
        return self._line.needs_gradients and self.block.stream.output_moments is not None

    def of_output_moments(self, local: str, make: Callable[[Sequence[Tensor]], T]) -> T:
        """What an algorithm makes of E[g g^T], float32 on the CPU, where g is the gradient of the answers by what a
        linear puts out: the squares along its diagonal, of `rows_together`. Made by the first process, for all."""
        name, known = self.linears[local].name, self.block.stream.output_moments
        assert known is not None, "see weighs_outputs"

        def made() -> T:
            found = make(known[name])
            for square in known[name]:
                leave_memory(square)
            return found

        return self.ranks.first(made)

    @property
    def is_aimed(self) -> bool:
        """Whether the plan has its codes found from what the original model gives it, and that is known."""
        return self._line.needs_original and self.has_originals

    def chosen(self, method: str) -> None:
        """By which of several methods its linears are quantized."""
        self.method = method
        self.block.methods |= {f"{self.block.info.name}.{local}.weight": method for local in self.linears}

    def measured(self, local: str, lost: float, whole: float) -> None:
        """tr(E H E^T) and tr(W H W^T) of a linear whose weight loses E, where an algorithm comes by them."""
        self._measured[local] = (lost, whole)

    def aimed(self, alpha: float) -> None:
        """The share of the correction by the original model's outputs that its linears have taken over."""
        self.block.alphas |= {f"{self.block.info.name}.{local}.weight": alpha for local in self.linears}

    def mean_square(self) -> Tensor:
        """E[x_j^2], float32 (in,)."""
        if self._hessian is not None:
            return self._hessian.diagonal()
        if self._mean_square is None:
            self._mean_square = self._mean(lambda rows: rows.square())
        return self._mean_square

    def mean_abs(self) -> Tensor:
        """E[|x_j|], float32 (in,)."""
        return self._mean(lambda rows: rows.abs())

    def means(self, rounding: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """E[x_j] and E[r(x)_j] of a rounding r, float32 (in,) each."""
        both = self._mean(lambda rows: torch.cat([rows, rounding(rows)], dim=1), columns=2 * self._columns)
        return both[: self._columns], both[self._columns :]

    def largest(self) -> Tensor:
        """The largest |x_j|, float32 (in,)."""
        if self._largest is None:
            largest = torch.zeros(self._columns, device=self.block.stream.device)
            for found in filter(None, self._rows()):
                if len(found.inputs):
                    largest = largest.maximum(found.inputs.abs().amax(0))
            self._largest = torch.stack(self.ranks.gather(largest)).amax(0)
        return self._largest

    def drawn(self, most: int) -> Rows:
        """At least one token of every batch, and about so many of all, evenly drawn: the same for all processes."""
        share = max(most // max(len(self.block.everywhere), 1), 1)
        own, batches = dict[int, Rows](), self._rows()
        for number in self.block.numbers:
            if (found := next(batches)) is not None:
                own[number] = found.drawn(share)
            del found
        return Rows.joined(self.ranks.in_order(own))

    def rounding(self, channel_scales: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """What the weights meet of inputs (tokens, in): divided by channel scales (in,), then rounded by the scheme."""
        kind, scale = self.scheme.activations, None
        if kind in CALIBRATED_INPUTS:
            scale = self._scale_for(self._largest_met(channel_scales)).item()

        def met(inputs: Tensor) -> Tensor:
            divided = inputs if channel_scales is None else inputs / channel_scales
            return round_inputs(divided, kind, scale)

        return met

    def _largest_met(self, channel_scales: Tensor | None) -> float:
        largest = self.largest()
        return (largest if channel_scales is None else largest / channel_scales).max().item()

    def _scale_for(self, largest: float) -> Tensor:
        return input_scale(largest, self.scheme.activations, self.model_dtype)

    @property
    def channel_scales(self) -> Tensor | None:
        """What its inputs are divided by, (in,), where that was folded into their producer."""
        return self._channel_scales

    def correct_bias(self, local: str, shift: Tensor) -> None:
        """Add to the bias of a linear, (out,), once it has one of this stage's weights; the next stages get it so."""
        self.block.correct_bias(local, shift)

    def _mean(self, of: Callable[[Tensor], Tensor], columns: int | None = None) -> Tensor:
        own: dict[int, tuple[Tensor, float]] = {}
        batches = self._rows()
        for number in self.block.numbers:
            found = next(batches)
            if found is not None:
                rows, weights = of(found.inputs), found.weights
                own[number] = rows.sum(0) if weights is None else weights @ rows, found.count
                del rows
            del found
        total, tokens = torch.zeros(columns or self._columns, device=self.block.stream.device), 0.0
        for part, count in self.ranks.in_order(own):
            total += part
            tokens += count
        mean = total / (tokens or 1)
        self._refuse_bad_inputs(mean, tokens)
        return mean

    def _refuse_bad_inputs(self, values: Tensor, tokens: float) -> None:
        where = f"{self.block.info.name}: {', '.join(self.linears)}"
        if tokens == 0:
            raise SentinelError(f"{where} saw no token of the calibration set; add samples that reach this layer")
        if not values.isfinite().all():
            raise SentinelError(
                f"{where} received NaN or infinite inputs during calibration, or such that their squares are"
                f"{self._bad_samples()}; {self.block.suspect()}"
            )

    def _bad_samples(self) -> str:
        """In which samples of this process they were met, where other samples have none."""
        bad: list[str] = []
        whole, numbers = 0, iter(self.block.numbers)
        for given in self._inputs or ():
            number = next(numbers)
            if given is None:
                continue
            samples = self.block.stream.samples_of(number)
            whole += len(samples)
            values = given.inputs.float().square().isfinite().all(-1)
            if given.counts is not None:
                values |= given.counts == 0
            alike = values.ndim > 1 and len(values) == len(samples)
            fine = values.flatten(1).all(1).tolist() if alike else [bool(values.all())] * len(samples)
            bad += [sample.id for sample, good in zip(samples, fine, strict=True) if not good]
        if not bad or len(bad) == whole:
            return ""
        return f", in {len(bad)} of {whole} samples: {some(bad)}; without them in the calibration set it would go on"

    @property
    def fold_rule(self) -> Fold | None:
        """The rule that says what produces this stage's inputs, if channel scales can be folded into it."""
        return self.block.fold_for(list(self.linears)) if self._inputs is not None else None

    @property
    def can_fold(self) -> bool:
        return self.fold_rule is not None

    def admissible(self, channel_scales: Tensor) -> Tensor:
        """The nearest channel scales (in,) that fold without any rounding of the producer's stored weights.

        Into a norm: s = w / round(w / s), with round() to the model's dtype. Into a linear: powers of two; into one
        of few bits, any, beside which the rounding of its scales is nothing. A channel whose producer would over- or
        underflow keeps the scale 1.
        """
        rule = self.fold_rule
        assert rule is not None
        if rule.kind == "linear":
            powers = torch.exp2(channel_scales.log2().round())
            taken = torch.where(self.block.divides(rule.producer, powers), powers, 1.0)
            if self.block.is_coarse(rule.producer):
                taken = torch.where(self.block.divides(rule.producer, channel_scales), channel_scales, taken)
            return taken
        gain = self.block.value(f"{rule.producer}.weight").to(channel_scales.device).float() + rule.gain_offset
        stored = (gain / channel_scales - rule.gain_offset).to(self.model_dtype).float() + rule.gain_offset
        scales = gain / stored
        return torch.where(scales.isfinite() & (scales > 0), scales, 1.0)

    def fold(self, channel_scales: Tensor) -> None:
        """Divide the inputs by the admissible scales (in,): in the producer for good, in this pass on the fly."""
        rule = self.fold_rule
        assert rule is not None
        self.block.fold(rule, channel_scales)
        self._channel_scales = channel_scales

    @property
    def grid(self) -> Grid:
        """That of the stage's scheme; its weights are still to be fitted to it."""
        return grid_of(self.scheme, self._columns, self.model_dtype)

    def by_rows(self, weight: Tensor, make: Callable[[Tensor], T], *, work: float) -> list[T]:
        """What `make` makes of the rows of a weight (out, in), where no row's result depends on others: of all of them,
        or of the parts that processes take where the work (multiplications) is worth it, in their order; on a CPU of no
        more rows at once than ROW_ELEMENTS say, for what is made on the way is several times as large."""
        share = weight[self.ranks.shares(len(weight), step=self._row_step, work=work)[self.ranks.rank]]
        made = [make(part) for part in self.parts(share) if len(part)]
        return [part for parts in self.ranks.gather(made) for part in parts]

    @property
    def _row_step(self) -> int:
        return math.lcm(ROWS, self.grid.group_rows)

    def parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A weight (out, in) by the rows that are worked on at once: on a CPU no more than ROW_ELEMENTS say."""
        step = self._row_step
        fitting = max(ROW_ELEMENTS // (step * weight.shape[1]), 1) * step
        return tuple(torch.split(weight, fitting)) if weight.device.type == "cpu" else (weight,)

    def note(self, text: str) -> None:
        self.block.notes.append(f"{self.block.info.name}: {', '.join(self.linears)}: {text}")

    def finish(self, quantized: dict[str, QuantizedWeight]) -> None:
        """Put the codes in the weights' place: from here on the block computes with them."""
        if quantized.keys() != self.linears.keys():
            raise AssertionError(f"stage {list(self.linears)} got weights for {list(quantized)}")
        scale = self._input_scale() if self.scheme.activations in CALIBRATED_INPUTS else None
        weights = {local: replace(weight, input_scale=scale) for local, weight in quantized.items()}
        if self._inputs is not None and not all(map(self._is_measured, weights)):
            self.mean_square()  # together; the rest is the first's
        errors = self.ranks.first(
            lambda: {
                local: weight.relative_error(self.stored[local])
                if self._inputs is None
                else self._relative_error(local, weight)
                for local, weight in weights.items()
            }
        )
        for local, weight in weights.items():  # once the first is in place, passes go on to the next
            if not math.isfinite(errors[local]):
                raise SentinelError(f"{self.block.info.name}: {local} cannot be quantized; {self.block.suspect()}")
            self.block.put(local, weight, error=errors[local])
        self._inputs = None

    def _input_scale(self) -> float:
        """The number that inputs are rounded by, of their largest magnitude as the weights meet them."""
        largest = self._largest_met(self._channel_scales)
        scale = self._scale_for(largest)
        dynamic = CALIBRATED_INPUTS[self.scheme.activations]
        if not largest or not math.isfinite(largest) or scale_problem(scale):
            raise SentinelError(
                f"{self.block.info.name}: {', '.join(self.linears)} received no input but {largest:g} during "
                f"calibration, so there is no scale for their inputs; use {dynamic} there, or samples that reach them"
            )
        if self.scheme.int8_inputs and (lost := self._lost_to_steps(scale.item())) > MOST_LOST:
            folds = "method: search with search.fold moves what makes them large into the weights, and "
            self.note(
                f"inputs reach {largest:.3g}, so that steps of {scale.item():.3g} lose {lost:.0%} of what an "
                f"input holds, on average; {folds if self.can_fold and self._channel_scales is None else ''}"
                f"{dynamic} has a scale for every token"
            )
        return scale.item()

    def _lost_to_steps(self, step: float) -> float:
        """The share of an input's mean square that rounding to multiples of a step takes, on average over inputs."""
        squares = self.mean_square() if self._channel_scales is None else self.mean_square() / self._channel_scales**2
        return (step**2 / 12 / squares[squares > 0]).clamp(max=1).mean().item()

    def _relative_error(self, local: str, quantized: QuantizedWeight) -> float:
        """tr(E H E^T) / tr(W H W^T), or of the diagonal of H alone where no method needed more of it."""
        if self._is_measured(local):
            lost, whole = self._measured[local]
            return lost / max(whole, LEAST_ENERGY)
        weight, effective = self.weights[local], quantized.dequantize()
        if self._channel_scales is not None:
            effective /= self._channel_scales
        error = self._energy(effective - weight) / max(self._energy(weight), LEAST_ENERGY)
        if math.isfinite(error):
            return error
        weight, effective = weight.double(), effective.double()  # squares of such weights are beyond float32
        return self._energy(effective - weight) / max(self._energy(weight), LEAST_ENERGY)

    def _is_measured(self, local: str) -> bool:
        return all(map(math.isfinite, self._measured.get(local, (math.nan,))))

    def _energy(self, rows: Tensor) -> float:
        """tr(X H X^T) of (out, in)."""
        if self._hessian is None:
            return (rows.square() @ self.mean_square().to(rows.dtype)).sum().item()
        return (rows @ self._hessian.to(rows.dtype) * rows).sum().item()


def rows_together(rows: int) -> list[int]:
    """How many rows of a weight make up for each other, part by part: as even as shares of ROWS allow."""
    step = -(-rows // -(-rows // ROWS_TOGETHER))
    step += -step % (2 * ROWS)
    return [min(step, rows - start) for start in range(0, rows, step)]


def upper_slices(total: Tensor) -> list[Tensor]:
    """The parts of a square matrix that are computed of a symmetric one: slices of columns from the diagonal on."""
    columns = len(total)
    step = -(-columns // GRAM_SLICES)
    return [total[start : start + step, start:] for start in range(0, columns, step)]


def _add_gram(total: Tensor, rows: Tensor | None, turn: Turn) -> None:
    """Add rows^T rows to the upper slices of `total`, each as soon as the batches before this one are in it."""
    slices = upper_slices(total)
    for piece, parts in [(total, slices)] if total.nbytes <= SMALL_MATRIX else [(one, [one]) for one in slices]:
        with turn.adding(piece):
            if rows is not None:
                for part in parts:
                    first = len(total) - part.shape[1]
                    part.addmm_(rows[:, first : first + len(part)].T, rows[:, first:])


def mirror_upper(total: Tensor) -> Tensor:
    """Put the upper triangle below the diagonal too, in place."""
    step = -(-len(total) // (4 * GRAM_SLICES))
    for start in range(0, len(total), step):
        end = min(start + step, len(total))
        total[start:end, :start] = total[:start, start:end].T
        upper = total[start:end, start:end].triu()
        total[start:end, start:end] = upper + upper.triu(1).T
    return total


@dataclass(frozen=True)
class Place:
    """What calibration passes keep before a block."""

    rows: int
    """Tokens, of images or of text."""
    width: int
    nbytes: int
    """Of all that the block is given."""
    largest_rows: int
    """Of one pass."""

    def times(self, factor: float, batch: float) -> "Place":
        """Of so many times as much, of which the largest pass has so many times as many rows."""
        return Place(
            round(self.rows * factor), self.width, round(self.nbytes * factor), round(self.largest_rows * batch)
        )


@dataclass(frozen=True)
class Footprint:
    """What all calibration passes keep: by component, and of their inputs."""

    components: dict[str, Place]
    input_bytes: int


def _storages(value: Any) -> dict[int, int]:
    """Address and bytes of the memory of every tensor in the arguments of a call."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {address: size for part in parts for address, size in _storages(part).items()}


def has_experts(components: ComponentMap, block: BlockInfo) -> bool:
    """Whether a block has a mixture of experts: hundreds of stages on few tokens each, for which passes are kept."""
    return any(home.startswith(f"{block.name}.") for home in components.experts)


class Block:
    """The block at hand: its stages one after the other, then what became of it."""

    def __init__(
        self,
        stream: "BlockStream",
        info: BlockInfo,
        walks: list[_Walk],
        restored: BlockResult | None,
        everywhere: Sequence[int] = (),
    ) -> None:
        self.stream, self.info, self.restored = stream, info, restored is not None
        self.quantized: dict[str, QuantizedWeight] = dict(restored.quantized) if restored else {}
        self.changed: dict[str, Tensor] = dict(restored.changed) if restored else {}
        self.errors: dict[str, float] = dict(restored.errors) if restored else {}
        self.notes: list[str] = list(restored.notes) if restored else []
        self.alphas: dict[str, float] = dict(restored.alphas) if restored else {}
        self.methods: dict[str, str] = dict(restored.methods) if restored else {}
        self.settled = False
        """True once every weight is final: the block then computes what it will compute in service."""
        self._walks = walks
        self.everywhere = everywhere
        """The numbers of the batches that come to it, those of other processes' too."""
        self._originals: dict[str, Tensor] = {}
        """Weights of the original model that its passes are being computed with."""
        self._rerun = stream.rerun and not has_experts(stream.components, info)
        self._divisors: dict[str, Tensor] = {}
        self._folded: dict[str, Tensor] = {}
        """Producers that took a fold: while passes divide on the fly, they compute as before. And corrected biases."""
        self._unfolded: dict[str, QuantizedWeight] = {}
        """The codes among them, as passes compute with them meanwhile where they walk through the block again."""
        self._biases: dict[str, Tensor] = {}
        """Of linears whose bias was corrected: what passes of the quantized model compute with meanwhile."""
        self._by_local = {linear.local: linear for linear in info.linears}
        self._leaders = {linear.local: group[0].local for group in self._groups() for linear in group[1:]}
        """Linear -> the first of the linears that are quantized with it, on the same inputs."""
        self._followers: dict[str, list[str]] = {}
        for linear, leader in self._leaders.items():
            self._followers.setdefault(leader, []).append(linear)
        self.expert_tokens = dict(restored.expert_tokens) if restored else {}
        self._shown: dict[str, list[float | None]] = {}
        """For each module of experts and each expert: the share of others' tokens that it is shown, None for none."""
        self._restored_cache = dict(restored.cache) if restored else {}
        self._cached: dict[str, tuple[Tensor, Tensor]] = {}
        """Absolute maxima of K and V for each head, so far."""

    @functools.cached_property
    def module(self) -> nn.Module:
        """Its module in the model that is run."""
        return self.stream.model.get_submodule(self.info.name)

    @functools.cached_property
    def _parameters(self) -> set[str]:
        return {local for local, _ in self.module.named_parameters()}

    @property
    def result(self) -> BlockResult:
        return BlockResult(
            self.quantized,
            self.changed,
            self.errors,
            tuple(self.notes),
            self.expert_tokens,
            self.cache,
            self.methods,
            self.alphas,
        )

    @property
    def cache(self) -> dict[str, Maxima]:
        """What its attention put into the KV cache over all batches, with the final weights."""
        seen = {name: Maxima(*(tuple(one.tolist()) for one in pair)) for name, pair in self._cached.items()}
        return self._restored_cache | seen

    @property
    def numbers(self) -> list[int]:
        """Of the batches of this process that come to it."""
        return [walk.number for walk in self._walks]

    def relay(self) -> Relay:
        """For a sum over all batches that come to it."""
        return self.stream.ranks.relay(self.everywhere)

    def place(self) -> Place:
        """What the passes keep that are paused before this block."""
        rows, width, memory = [], 0, dict[int, int]()
        for walk in self._walks:
            assert isinstance(walk.entering, functools.partial)
            memory |= _storages((walk.entering.args, walk.entering.keywords))
            given = [*walk.entering.args, *walk.entering.keywords.values()]
            hidden = next(one for one in given if isinstance(one, Tensor) and one.is_floating_point())
            width = hidden.shape[-1]
            rows.append(hidden.numel() // width)
        return Place(sum(rows), width, sum(memory.values()), max(rows))

    def note_cached(self, name: str, keys: Tensor, values: Tensor) -> None:
        """What an attention module is about to cache in one pass; its linears have their codes by then."""
        if self.settled or _walk().first is not None:
            return
        mask = _walk().token_mask
        found = absolute_maxima(keys, mask), absolute_maxima(values, mask)
        before = self._cached.get(name, found)
        self._cached[name] = (before[0].maximum(found[0]), before[1].maximum(found[1]))

    def stages(self) -> Iterator[Stage]:
        """The stages in the order of the forward pass; the caller finishes each before it asks for the next."""
        if self.restored:
            return
        if not self.everywhere:
            idle = self.stream.runs_passes and any(self._line(linear).needs_data for linear in self.info.linears)
            if idle:
                self.notes.append(f"{self.info.name}: never ran during calibration: rounded to nearest")
            for group in self._groups():
                yield Stage(self, group, self._line(group[0]), None, unseen=idle)
            return
        group_of = {linear.local: group for group in self._groups() for linear in group}
        yield from self._rerun_stages(group_of) if self._rerun else self._kept_stages(group_of)
        self._collect_cached()

    @property
    def follows_original(self) -> bool:
        """Whether passes of the original model come along, and compute something else."""
        return self.stream.follows_original and not self.stream.alike

    def _kept_stages(self, group_of: dict[str, tuple[LinearInfo, ...]]) -> Iterator[Stage]:
        """The stages of passes that wait where they are."""
        for walk in self._walks:
            walk.resume()
            self._resume_original(walk)
        while place := self._next_place():
            kind, name = place
            members = [
                walk for walk in self._walks if walk.paused and walk.paused.kind in WAITING and walk.paused.name == name
            ]
            if kind == "experts":
                self._share_out(name, [pause for walk in members if (pause := walk.paused)])
            else:
                inputs = [
                    Given(walk.paused.inputs, self._mask_for(walk), self._original_inputs(walk, name))
                    if walk in members and walk.paused and walk.paused.inputs is not None
                    else None
                    for walk in self._walks
                ]
                unseen = self._unseen(name)
                stage = Stage(
                    self,
                    group_of[name],
                    self._line(self._by_local[name]),
                    None if unseen else inputs,
                    unseen=unseen,
                )
                yield stage
                if not self._is_final(name):
                    raise AssertionError(f"{self.info.name}.{name} was left unfinished")
                del stage, inputs
            self._originals.clear()
            for walk in members:
                walk.resume()
                if walk.original and walk.original.paused and walk.original.paused.name == name:
                    self._resume_original(walk)
        self._finish_originals()

    def _resume_original(self, walk: _Walk) -> None:
        if walk.original is not None and self.follows_original:
            walk.original.resume()

    def _original_inputs(self, walk: _Walk, name: str) -> Tensor | None:
        """What the original model gives a linear in the same pass, where that waits there."""
        other = walk.original
        return other.paused.inputs if other and other.paused and other.paused.name == name else None

    def _finish_originals(self) -> None:
        """Let the passes of the original model go on to the next block, while its kept parameters are in place."""
        for walk in self._walks if self.follows_original else ():
            other = walk.original
            if other and other.paused == _Pause("enter", self.info.name):
                other.resume()
            while other and other.paused and other.paused.kind in WAITING:
                other.resume()
        self._originals.clear()

    def _next_place(self) -> tuple[str, str] | None:
        """Where the first of all batches waits in the block: kind and name."""
        places = self.stream.ranks.in_order(
            {
                walk.number: (walk.paused.kind, walk.paused.name)
                for walk in self._walks
                if walk.paused and walk.paused.kind in WAITING
            }
        )
        return places[0] if places else None

    def _rerun_stages(self, group_of: dict[str, tuple[LinearInfo, ...]]) -> Iterator[Stage]:
        """The same stages, with nothing kept of a pass but what goes into the block."""
        while not all(map(self._is_final, group_of)):
            first = next(
                ((walk.number, pause.name) for walk, pause in self._beside() if pause and pause.kind == "linear"), None
            )
            names = self.stream.ranks.in_order(dict([first] if first else []))
            if not names:
                break
            name = names[0]
            yield Stage(self, group_of[name], self._line(self._by_local[name]), Rerun(self, name))
            if not self._is_final(name):
                raise AssertionError(f"{self.info.name}.{name} was left unfinished")
        self._finish_originals()
        if self.stream.plan.cache and self.stream.plan.cache.inside(self.info.name):
            for _ in self._beside():  # as far as its end: what attention caches is known when its linears are
                pass

    def inputs_of(self, name: str, *, originals: bool = False) -> Iterator[Given | None]:
        """What each pass gives to the linear that is quantized next, None where it does not come to that one next.
        originals: and what the original model gives it."""
        for walk, pause in self._beside():
            if pause and pause.name == name and pause.inputs is not None:
                original = self._original_beside(walk, name) if originals and self.follows_original else None
                given = Given(pause.inputs, self._mask_for(walk), original)
                del original, pause, walk
                yield given
                del given
            else:
                yield None

    def _original_beside(self, walk: _Walk, name: str) -> Tensor | None:
        assert walk.original is not None
        other = walk.original.beside()
        try:
            other.resume()
            return other.paused.inputs if other.paused and other.paused.name == name else None
        finally:
            if other:
                other.throw(GreenletExit)

    def _beside(self) -> Iterator[tuple[_Walk, _Pause | None]]:
        """Each pass, walking through the block as it now stands, where it first pauses; one at a time."""
        for main in self._walks:
            walk = main.beside()
            try:
                walk.resume()
                yield walk, walk.paused
            finally:
                if walk:
                    walk.throw(GreenletExit)
            del walk

    def _collect_cached(self) -> None:
        """The maxima of the cache over all processes."""
        for found in self.stream.ranks.gather(self._cached) if self.stream.plan.cache else ():
            for name, (keys, values) in found.items():
                before = self._cached.get(name, (keys, values))
                self._cached[name] = (before[0].maximum(keys), before[1].maximum(values))

    def _share_out(self, module: str, pauses: Sequence[_Pause]) -> None:
        """Decide which experts are shown more tokens than the router gives them, now that all passes have been routed.

        Raises StarvedExpertsError where too large a share of them sees too little to be calibrated on.
        """
        options = self.stream.expert_options
        routed = [(pause.counts, pause.tokens, pause.blend) for pause in pauses]
        routed = [one for part in self.stream.ranks.gather(routed) for one in part]
        counts = [sum(expert) for expert in zip(*(counts for counts, *_ in routed), strict=True)]
        tokens, name = sum(tokens for _, tokens, _ in routed), f"{self.info.name}.{module}"
        self.expert_tokens[name] = counts
        blend = all(blend for *_, blend in routed)
        if options.tokens == "all":
            self._shown[module] = [1.0 if blend else None] * len(counts)
            return
        starving = [expert for expert, count in enumerate(counts) if count < options.least_tokens]
        if len(starving) > options.max_starving * len(counts):
            raise StarvedExpertsError(
                f"{name}: {len(starving)} of {len(counts)} experts saw fewer than {options.least_tokens} calibration "
                f"tokens ({_named(starving)}), more than {options.max_starving:.0%} "
                f"(calibration.experts.max_starving); give "
                "more or more varied samples, or set calibration.experts.tokens: all to show every expert all tokens"
            )
        form = self.stream.components.experts[name]
        enough = options.enough_tokens or TOKENS_PER_INPUT * max(form.hidden, form.intermediate)
        self._shown[module] = [
            min((enough - count) / max(tokens - count, 1), 1.0)
            if blend and options.tokens == "blend" and 0 < count < enough
            else None
            for count in counts
        ]
        if unseen := [expert for expert, count in enumerate(counts) if not count]:
            self.notes.append(f"{name}: no calibration token was routed to {_named(unseen)}: rounded to nearest")

    def _unseen(self, local: str) -> bool:
        """Whether a linear belongs to an expert that no token was routed to, and that is shown none."""
        module, _, rest = next(
            ((module, "", local[len(module) + 1 :]) for module in self._shown if local.startswith(f"{module}.")),
            ("", "", ""),
        )
        if not module:
            return False
        expert = int(rest.partition(".")[0])
        return not self.expert_tokens[f"{self.info.name}.{module}"][expert] and self._shown[module][expert] is None

    def watch(
        self, module: str, given: Sequence[Tensor], tokens: int, *, blend: bool = True
    ) -> Iterator[Tensor | None]:
        """What `Experts` asks while it runs: which tokens each expert is shown, where not just those it is given.

        blend: whether other experts' tokens are to be had.
        """
        walk = _walk()
        if (
            self.settled
            or walk.first is not None
            or not any(not self._is_final(local) for local in self._by_local if local.startswith(f"{module}."))
        ):
            yield from (None for _ in given)
            return
        real, counting = walk.real_tokens(tokens), walk.weights_for_experts(tokens)
        if counting is not None:
            real = counting != 0
        counts = tuple(len(rows) if real is None else int(real[rows].sum()) for rows in given)
        routed = tokens if real is None else int(real.sum())
        _pause(_Pause("experts", module, counts=counts, tokens=routed, blend=blend))
        everywhere = torch.arange(1, tokens + 1, device=given[0].device, dtype=torch.float64)
        for rows, share in zip(given, self._shown[module], strict=True):
            weights = torch.zeros(tokens, device=rows.device)
            if share is not None:  # evenly drawn: as many as make the share up
                drawn = (everywhere * share).floor() > ((everywhere - 1) * share).floor()
                weights[drawn] = self.stream.expert_options.others_count
            weights[rows] = 1.0
            shown = weights.nonzero()[:, 0]
            if real is not None:  # padding is computed too, and counts for nothing
                weights *= real
            if counting is not None:
                weights *= counting
            walk.row_weights = weights[shown]
            yield None if share is None else shown
        walk.row_weights = None

    def _is_final(self, local: str) -> bool:
        return self._line(self._by_local[local]).action != "quantize" or self._weight_name(local) in self.quantized

    def _weight_name(self, local: str) -> str:
        return f"{self.info.name}.{local}.weight"

    def _mask_for(self, walk: _Walk) -> Tensor | None:
        """The mask of real tokens, where this input has one row for every text position."""
        inputs = walk.paused.inputs if walk.paused else None
        if walk.row_weights is not None:
            return walk.row_weights
        if walk.token_mask is None or inputs is None or self.info.component != "language":
            return None
        if inputs.shape[:-1] != walk.token_mask.shape:
            return None
        return walk.token_mask if walk.token_weights is None else walk.token_weights

    def _line(self, linear: LinearInfo) -> PlanLine:
        return self.stream.line_of(linear)

    def _groups(self) -> list[tuple[LinearInfo, ...]]:
        """The linears to quantize, together where they share an input and are treated alike."""
        groups: list[tuple[LinearInfo, ...]] = []
        for group in self.stream.components.fused_groups(self.info):
            todo = [linear for linear in group if self._line(linear).action == "quantize"]
            alike = {(self._line(linear).scheme, self._line(linear).method) for linear in todo}
            groups += [tuple(todo)] if len(alike) == 1 else [(linear,) for linear in todo]
        return groups

    def suspect(self) -> str:
        """What to look at where numbers left their range: the largest weight here, one block before, and outside."""
        components = self.stream.components
        names = [info.name for info in components.blocks]
        near = tuple(f"{name}." for name in names[max(names.index(self.info.name) - 1, 0) :][:2])
        far = tuple(f"{name}." for name in names)
        sizes = {
            one.name: self.stream.read(one.name).abs().max().item()
            for one in components.parameters
            if one.loaded and not one.buffer and (one.name.startswith(near) or not one.name.startswith(far))
        }
        name = max(sizes, key=sizes.__getitem__)
        return (
            f"the largest weight nearby is {name}, which holds values up to {sizes[name]:.3g}; is the model "
            "damaged, or trained in a wider dtype?"
        )

    def value(self, local: str) -> Tensor:
        """A kept parameter of the block as it now stands, in the model's dtype."""
        name = f"{self.info.name}.{local}"
        return self.changed[name] if name in self.changed else self.stream.read(name)

    def fold_for(self, consumers: Sequence[str]) -> Fold | None:
        """A fold whose consumers in this block are exactly these linears and whose producer can take scales now."""
        number = next((part for part in consumers[0].split(".") if part.isdigit()), "*")
        for general in self.stream.components.folds_in(self.info):
            rule = general.inside(self._parameters, number)
            if set(rule.consumers) != set(consumers) or not self._has(f"{rule.producer}.weight"):
                continue
            if rule.when and not getattr(self.module, rule.when):
                continue
            if rule.kind == "norm":
                return rule
            produced, consumed = self._by_local.get(rule.producer), self._by_local[consumers[0]]
            # Under grouped-query attention one value head feeds several, so it cannot take their scales.
            if produced and produced.out_features == consumed.in_features and self._is_final(rule.producer):
                return rule
        return None

    def _has(self, local: str) -> bool:
        return local in self._parameters

    def fold(self, rule: Fold, channel_scales: Tensor) -> None:
        """Divide what the producer puts out by the channel scales (channels,), in its stored weights."""
        for leaf in ("weight", "bias"):
            local = f"{rule.producer}.{leaf}"
            if not self._has(local):
                continue
            name = f"{self.info.name}.{local}"
            if name in self.quantized:
                self._unfolded.setdefault(name, self.quantized[name])
                self.quantized[name] = self.quantized[name].scale_rows(1 / channel_scales)
                self._folded[local] = self.quantized[name].dequantize(self.stream.dtype)
                continue
            value, offset = self.value(local), rule.gain_offset if leaf == "weight" else 0.0
            divisor = channel_scales if value.dim() == 1 else channel_scales[:, None]
            self.changed[name] = ((value.to(divisor.device).float() + offset) / divisor - offset).to(value.dtype)
            self._folded[local] = self.changed[name]
        for consumer in rule.consumers:
            self._divisors[consumer] = channel_scales

    def correct_bias(self, linear: str, shift: Tensor) -> None:
        """Add to the bias of a linear of its own, (out,)."""
        local = f"{linear}.bias"
        value = self.value(local)
        corrected = (value.to(shift.device).float() + shift).to(value.dtype)
        self.changed[f"{self.info.name}.{local}"] = self._folded[local] = corrected
        if self._walks:
            self._biases[linear] = self.stream.cast(corrected, local, self.module)

    def is_coarse(self, linear: str) -> bool:
        """Whether a linear has its codes, of fewer than 8 bits."""
        weight = self.quantized.get(self._weight_name(linear))
        return weight is not None and weight.grid.bits < EIGHT

    def divides(self, linear: str, divisors: Tensor) -> Tensor:
        """bool (out,): the rows of a linear whose stored weights can be divided without being rounded; of codes, whose
        scales can be divided and are then rounded by no more than a dtype does."""
        if weight := self.quantized.get(self._weight_name(linear)):
            smaller = weight.scales / divisors[:, None]
            if weight.grid.group_rows > 1:
                return torch.zeros(len(divisors), dtype=torch.bool, device=divisors.device)
            moved = (weight.grid.round_scales(smaller) - smaller).abs()
            return (moved <= smaller.abs() * SCALE_ROUNDING).all(1)
        value = self.value(f"{linear}.weight")
        smaller = value.to(divisors.device).float() / divisors[:, None]
        return (smaller.to(value.dtype).float() == smaller).all(1)

    def put(self, local: str, weight: QuantizedWeight, *, error: float) -> None:
        """The codes of a linear: recorded, and in the weight's place from here on."""
        name = self._weight_name(local)
        self.quantized[name], self.errors[name] = weight, error
        self._place_codes(f"{local}.weight", weight)

    def _place_codes(self, local: str, weight: QuantizedWeight) -> None:
        """Where passes walk through the block again and again to save memory, codes become floats as they are met."""
        if self._walks and not self._rerun:
            self._place(local, weight.dequantize(self.stream.dtype))

    def _place(self, local: str, value: Tensor) -> None:
        if self._walks:
            assign(self.module, local, self.stream.cast(value, local, self.module))

    def load(self) -> None:
        """Give the module its weights and stored buffers: the model's own, or a restored block's.

        What is to be quantized comes when it has its codes: until then no pass computes with it.
        """
        waiting = {linear.local for group in self._groups() for linear in group}
        for local in list(self.module.state_dict()):
            name = f"{self.info.name}.{local}"
            if local.removesuffix(".weight") not in waiting and (
                local in self._parameters or self.stream.components.holds(name)
            ):
                self._place(local, self.stream.read(name))
        if not self.restored:
            return
        self._finish_originals()
        for local in list(self.module.state_dict()):
            name = f"{self.info.name}.{local}"
            if name in self.quantized:
                self._place_codes(local, self.quantized[name])
            elif name in self.changed:
                self._place(local, self.changed[name])

    def settle(self) -> None:
        """Let the passes go on to the next block, on what this block computes with its final weights."""
        self._settle_folds()
        self.settled = True
        for walk in self._walks:
            walk.resume()
            if walk.original is not None and self.stream.alike:
                walk.original.resume()
        self.release()

    def _settle_folds(self) -> None:
        for local, value in self._folded.items():
            self._place(local, value)
        for kept in (self._folded, self._unfolded, self._biases):
            kept.clear()

    def release(self) -> None:
        """Take the weights out of the module again."""
        for local, parameter in list(self.module.named_parameters()):
            assign(self.module, local, torch.empty_like(parameter, device="meta"))

    def forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model's forward pass runs in the block's place."""
        output = forward(*args, **kwargs)
        if self.settled or _walk().first is not None:
            return output
        _pause(_Pause("exit", self.info.name))
        self._settle_folds()
        # A fold divided inputs on the fly; what later blocks get is computed by the weights as they are stored.
        return forward(*args, **kwargs) if self._divisors else output

    def linear(self, local: str, module: nn.Linear, inputs: Tensor) -> Tensor:
        """What the block's forward pass runs in a linear's place: it waits for its codes, then computes with them."""
        if _walk().first is not None:
            return self._original_linear(local, module, inputs)
        if not self.settled:
            if local in self._followers:
                _walk().group_inputs[local] = inputs
            if not self._is_final(local):
                _pause(_Pause("linear", local, inputs))
            elif leader := self._leaders.get(local):
                self._check_shared(local, leader, inputs)
            if local in self._divisors:
                inputs = (inputs.float() / self._divisors[local]).to(inputs.dtype)
        name = self._weight_name(local)
        weight = self._unfolded.get(name) or self.quantized.get(name)
        if weight is None:  # kept, or a rehearsal
            return _linear(None, module, inputs)
        values = weight.dequantize(self.stream.dtype).to(self.stream.device) if self._rerun else None
        line, bias = self._line(self._by_local[local]), self._biases.get(local)
        return _linear(line, module, inputs, weight.input_scale, values, bias)

    def _original_linear(self, local: str, module: nn.Linear, inputs: Tensor) -> Tensor:
        """The same in the original model: it waits until others know its inputs, then computes as it always did."""
        line = self._line(self._by_local[local])
        if line.action != "quantize":
            return _linear(None, module, inputs)
        if line.needs_original and not self._is_final(local):
            _pause(_Pause("linear", local, inputs))
        if (weight := self._originals.get(local)) is None:
            name = f"{local}.weight"
            weight = self.stream.cast(self.stream.read(f"{self.info.name}.{name}"), name, self.module)
            if line.needs_original and not self._rerun:
                self._originals[local] = weight  # for the other passes, which are next
        return _linear(None, module, inputs, weight=weight)

    def _check_shared(self, local: str, leader: str, inputs: Tensor) -> None:
        """Linears that are quantized together are so on the inputs of the first: the others must get the same."""
        kept = _walk().group_inputs
        first = kept.pop(leader, None) if local == self._followers[leader][-1] else kept.get(leader)
        if first is None or first is inputs:
            return
        if first.shape != inputs.shape or not torch.equal(first, inputs):
            raise SentinelError(
                f"{self.info.name}: {leader} and {local} pass for linears with the same inputs, but they get different "
                "ones, so their statistics would be wrong; give one of them method rtn or list it under keep, "
                "and please "
                "report the model"
            )


def _drawn(mask: Tensor, batch: int, share: float) -> Tensor:
    """So large a share of the True of each row of a mask (samples, tokens), spread evenly, at other places in each
    sample: multiples of a golden section fall nowhere twice (additive recurrence)."""
    samples, _ = mask.shape
    start = (batch * samples + torch.arange(samples, dtype=torch.float64)) * SECTIONS[1]
    places = mask.cumsum(1, dtype=torch.float64) * SECTIONS[0]
    return mask & ((places + start[:, None].to(mask.device)) % 1 < share)


def _end(walks: Iterable[_Walk | None]) -> None:
    for walk in walks:
        if walk:
            walk.throw(GreenletExit)


def _copied(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def _named(experts: Sequence[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {some(map(str, experts), most=8)}"


def _end_pass(*args: Any, **kwargs: Any) -> Any:
    """What runs in the head's place: nothing behind the last block is of interest, and the head has no weights."""
    raise GreenletExit


def _look_up(module: nn.Embedding, dtype: torch.dtype, ids: Tensor) -> Tensor:
    return nn.functional.embedding(ids, module.weight, module.padding_idx).to(dtype)


def _linear(
    line: PlanLine | None,
    module: nn.Linear,
    inputs: Tensor,
    scale: float | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The product with the weight and bias given, else the module's; inputs are rounded as the line's scheme says."""
    weight, bias = module.weight if weight is None else weight, module.bias if bias is None else bias
    if line is not None and isinstance(line.scheme, Scheme):
        inputs = round_inputs(inputs, line.scheme.activations, scale)
    # Some models' code casts to the dtype of their config on the way.
    return nn.functional.linear(inputs.to(weight.dtype), weight, bias)


def assign(module: nn.Module, local: str, value: Tensor) -> None:
    """Replace a parameter or buffer, on whatever device it was, by a value."""
    path, _, leaf = local.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module.register_buffer(
                    name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
                )


class BlockStream:
    """The blocks of a model, to be quantized in the order of iteration.

    outside: codes of the weights that lie in no block (embedding, projector), already chosen, since they need no data.
    batches: how to make each calibration batch; made when its pass starts.
    restore: what a finished block was made of, where an earlier run got that far.
    dtype: of the forward passes; weights are read from the model and codes are chosen in float32 whatever it is.
    device: where passes run and codes are chosen; one block's weights lie there at a time.
    experts: which tokens the experts of a mixture are calibrated on.
    token_weights: how much tokens of the language model count.
    rerun: keep nothing of the passes inside a block: they walk through it anew for each of its stages; no floats that
    codes stand for; and no embedding once it is done with. The same codes.
    spill: a folder on whose disk what lies between blocks is kept, in files without names, instead of in memory.
    ranks: the processes that share the work. Each has a stream of all batches, and runs its own of them.
    output_moments: by linear, E[g g^T] of gradients by its outputs as Stage.of_output_moments gives it, where the plan
    needs it; the first process has it. None: nobody has asked, and layers are rounded for their own outputs.
    """

    def __init__(
        self,
        components: ComponentMap,
        plan: Plan,
        specs: dict[str, ComponentSpec],
        batches: Sequence[Callable[[], Batch]],
        *,
        outside: dict[str, QuantizedWeight],
        restore: Callable[[BlockInfo], BlockResult | None],
        dtype: torch.dtype,
        device: torch.device,
        experts: ExpertOptions | None = None,
        token_weights: TokenWeights | None = None,
        rerun: bool = False,
        spill: Path | None = None,
        ranks: Ranks = ALONE,
        output_moments: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        self.components, self.plan, self.specs = components, plan, specs
        self.output_moments = output_moments
        self.ranks = ranks
        self.rerun, self._spill = rerun, spill
        self.dtype, self.device = dtype, device
        self.expert_options = experts or ExpertOptions()
        self._token_weights = token_weights or TokenWeights()
        self.clip = self._token_weights.clip
        self.model_dtype = components.dtype
        self._batches, self._outside, self._restore = batches, outside, restore
        self._current: Block | None = None
        self.runs_passes = False
        """Whether some block is quantized on data."""
        self._wanting = {
            info.name
            for info in components.blocks
            if any(self.line_of(linear).needs_original for linear in info.linears)
        }
        """Blocks that are still to be told what the original model gives them."""
        self.alike = True
        """While no block had codes: the original model and the quantized one give the same."""
        self._held_every = HELD_EVERY
        self._samples: dict[int, int] = {}
        """In each batch of this process."""
        self._embeddings: list[nn.Embedding] = []
        """Which are not needed any more once all passes have come to the language model."""
        self._order = {info.name: index for index, info in enumerate(components.blocks)}

    @functools.cached_property
    def model(self) -> nn.Module:
        """Built where passes run; without data there is none."""
        return self.components.skeleton(self.dtype)

    def read(self, name: str) -> Tensor:
        """A parameter by its name in the model, as it lies on disk."""
        return self.components.read(name)

    @property
    def _running(self) -> nn.Module:
        """What is calibrated: the model, or the part of it that reads images and text."""
        return self.model.get_submodule(self.components.family.runs)

    def cast(self, value: Tensor, local: str, module: nn.Module) -> Tensor:
        """A value as the passes take it: in their dtype, but for buffers that are whole numbers or more exact."""
        path, _, leaf = local.rpartition(".")
        dtype = self.dtype
        if leaf in module.get_submodule(path)._buffers:
            dtype = torch.promote_types(value.dtype, dtype) if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype)

    def __iter__(self) -> Iterator[Block]:
        waiting = {info.name for info in self.components.blocks if self._needs_data(info)}
        self.runs_passes = bool(waiting)
        seen: set[str] = set()
        if waiting:
            for block in self._walk(waiting):
                seen.add(block.info.name)
                yield block
        for info in self.components.blocks:
            if info.name not in seen:
                restored = self._restore(info)
                if self._needs_data(info) and not restored and not self._spare(info, seen):
                    raise SentinelError(
                        f"{info.name} never ran during calibration, so it cannot be quantized on data; "
                        "the calibration set needs samples with images for a vision encoder, text for a language model"
                    )
                yield Block(self, info, [], restored)

    def _spare(self, info: BlockInfo, seen: set[str]) -> bool:
        """Whether a block that never ran is of a tower that never did, beside one that did: a video's beside images."""
        towers = [f"{name}." for name in self.components.family.vision_encoder]
        own = next((tower for tower in towers if info.name.startswith(tower)), None)
        others = tuple(tower for tower in towers if tower != own)
        return own is not None and any(name.startswith(others) for name in seen if not name.startswith(own))

    def _needs_data(self, info: BlockInfo) -> bool:
        if self.plan.cache and self.plan.cache.inside(info.name):
            return True
        return any(self.line_of(linear).needs_data for linear in info.linears)

    def _walk(self, waiting: set[str]) -> Iterator[Block]:
        """Run the calibration passes until no block that needs them is left."""
        self._load_outside()
        self._take_over()
        walks = [
            _Walk(self._pass_of(make), number) for number, make in enumerate(self._batches) if self.ranks.own(number)
        ]
        try:
            with torch.no_grad():
                for walk in walks:
                    walk.resume()
                    if self.follows_original:
                        walk.original = _Walk(self._original_pass(walk), walk.number)
                        walk.original.first = walk
                        walk.original.resume()
            self._hold_out(walks)
            while numbers := self._next(walks):
                index = min(numbers.values())
                everywhere = [number for number, block in numbers.items() if block == index]
                info = self.components.blocks[index]
                members = [walk for walk in walks if walk.paused and walk.paused.name == info.name]
                if info.component == "language":
                    self._release_embeddings()
                block = self._current = Block(self, info, members, self._restore(info), everywhere)
                self.alike &= all(self.line_of(linear).action == "keep" for linear in info.linears)
                block.load()
                block.settled = block.restored
                waiting.discard(info.name)
                with torch.no_grad():
                    yield block
                    if not waiting:
                        block.release()
                        return
                    self._wanting.discard(info.name)
                    if not self.follows_original:
                        _end(walk.original for walk in walks)
                    block.settle()
        finally:
            _end(walk.original for walk in walks)
            _end(walks)
            self._current = None

    def _next(self, walks: Sequence[_Walk]) -> dict[int, int]:
        """Before which block, by its place in the order, each batch waits: of all processes, in the batches' order."""
        found = {walk.number: (walk.number, self._order[walk.paused.name]) for walk in walks if walk.paused}
        return dict(self.ranks.in_order(found))

    @property
    def follows_original(self) -> bool:
        """Whether some block is still to be told what the original model gives it."""
        return bool(self._wanting)

    def line_of(self, linear: LinearInfo) -> PlanLine:
        return self.plan.line(f"{linear.name}.weight")

    def _hold_out(self, walks: Sequence[_Walk]) -> None:
        """Decide which samples are held out where a method wants that: of so many tokens that they fit into memory."""
        tokens = sum(self.ranks.gather(sum(walk.batch.answer_mask.numel() for walk in walks if walk.batch)))
        self._held_every = HELD_EVERY * max(-(-tokens // (HELD_EVERY * HELD_TOKENS)), 1)

    def samples_of(self, number: int) -> tuple[Sample, ...]:
        """Those of a batch, which is made anew."""
        return self._batches[number]().samples

    def held_out(self, number: int, inputs: Tensor) -> Tensor:
        """bool (rows,): which rows of a batch's inputs (samples, ..., in) are of samples held out. Where a row's sample
        is not known, whole batches are."""
        rows, samples = inputs.shape[:-1].numel(), self._samples[number]
        if samples > 1 and inputs.dim() > 2 and len(inputs) == samples:
            which = (number * samples + torch.arange(samples, device=inputs.device)) % self._held_every
            return (which == self._held_every - 1).repeat_interleave(rows // samples)
        few = len(self._batches) < self._held_every
        held = number == len(self._batches) - 1 > 0 if few else number % self._held_every == self._held_every - 1
        return torch.full((rows,), held, device=inputs.device)

    def _original_pass(self, walk: _Walk) -> Callable[[], None]:
        """The same through the original model."""

        def run() -> None:
            assert walk.batch is not None
            own = _walk()
            own.guard = walk.guard
            with own.guard():
                self._running(**walk.batch.inputs, use_cache=False)

        return run

    def _pass_of(self, make: Callable[[], Batch]) -> Callable[[], None]:
        def run() -> None:
            batch = make()
            inputs, walk = batch.inputs, _walk()
            walk.token_mask = inputs["attention_mask"].bool().to(self.device) if "attention_mask" in inputs else None
            walk.token_weights = self._weights_of(batch, self._token_weights.image_share)
            if self.components.experts:
                walk.expert_weights = self._weights_of(batch, 1.0)
            walk.kinds_of_tokens = [
                (value == kind).flatten().to(self.device)
                for key, value in inputs.items()
                if key.endswith("token_type_ids")
                for kind in torch.unique(value)
            ]
            cast = {
                key: self._put_away(
                    value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
                )
                for key, value in inputs.items()
            }
            del inputs
            walk.batch = batch = replace(batch, inputs=cast)
            self._samples[walk.number] = len(batch.samples)
            walk.guard = functools.partial(passing, batch, self._running)
            with walk.guard():
                self._running(**cast, use_cache=False)

        return run

    def _weights_of(self, batch: Batch, share: float) -> Tensor | None:
        """float32 (samples, tokens): how much each token counts, 0 for padding; None where all count alike.

        share: of the tokens of images that are looked at.
        """
        counts = self._token_weights
        if counts.equal or "attention_mask" not in batch.inputs:
            return None
        weights = torch.full(batch.answer_mask.shape, float(counts.prompt))
        weights[batch.answer_mask] = float(counts.answer)
        if batch.image_mask is not None:
            drawn = _drawn(batch.image_mask, _walk().number, share)
            weights[batch.image_mask] = 0.0
            weights[drawn] = counts.image / share
        return (weights * batch.inputs["attention_mask"].bool()).to(self.device)

    def rehearse(self) -> dict[str, Place]:
        """Run the passes on the model's own weights as far as its language model: to where images meet text.

        InputError where the samples do not fit the model. Returns what the passes keep before a block, by component.
        """
        places: dict[str, Place] = {}
        for block in self._walk({info.name for info in self.components.blocks}):
            places.setdefault(block.info.component, block.place())
            if block.info.component == "language":
                break
        return places

    def _load_outside(self) -> None:
        """Weights of everything that lies in no block, except the head: no pass gets that far."""
        inside = tuple(f"{info.name}." for info in self.components.blocks)
        runs = self.components.family.runs
        tied = {names[0]: names[1:] for names in self.components.tied}
        for parameter in self.components.parameters:
            if parameter.name.startswith(inside) or parameter.component == "lm_head" or not parameter.loaded:
                continue
            if runs and not parameter.name.startswith(f"{runs}."):
                continue
            codes = self._outside.get(parameter.name)
            value = self.read(parameter.name) if codes is None else codes.dequantize()
            owner = self.model.get_submodule(parameter.name.rpartition(".")[0])
            if self.rerun and type(owner) is nn.Embedding and not self.components.config.is_encoder_decoder:
                # Its rows are cast when they are looked up: the table may be as large as ten blocks.
                self._embeddings.append(owner)
                owner.forward = functools.partial(_look_up, owner, self.dtype)  # type: ignore[method-assign]
                final = value.to(self.device)
            else:
                final = self.cast(value, parameter.name, self.model)
            for name in (parameter.name, *tied.get(parameter.name, ())):
                assign(self.model, name, final)
        self.components.materialize_buffers(self.model)
        _move_buffers(self.model, self.device)

    def _release_embeddings(self) -> None:
        """Blocks come in the order of the model: where one of the language model is next, every pass has looked up."""
        for module in self._embeddings:
            assign(module, "weight", torch.empty_like(module.weight, device="meta"))
        self._embeddings.clear()

    def _take_over(self) -> None:
        """Put ourselves between the model and its blocks, the blocks and their linears."""
        for info in self.components.blocks:
            module = self.model.get_submodule(info.name)
            module.forward = self._block_forward(info.name, module.forward)
            for home in self.components.experts:
                if home.startswith(f"{info.name}."):
                    experts = self.model.get_submodule(home)
                    assert isinstance(experts, Experts)
                    experts.watch = functools.partial(self._watch, home[len(info.name) + 1 :])
            for attention in self.plan.cache.inside(info.name) if self.plan.cache else ():
                intercept(self.model.get_submodule(attention.name), self._note_cached(attention.name))
            for linear in info.linears:
                self._take_over_linear(linear, self._inside_block(linear.local))
        if head := self.components.family.lm_head:
            self.model.get_submodule(head).forward = _end_pass
        for linear in self.components.linears:
            if linear.block is None and linear.component != "lm_head":
                self._take_over_linear(linear, functools.partial(_linear, self.line_of(linear)))

    def _take_over_linear(self, linear: LinearInfo, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        module = self.model.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        module.forward = functools.partial(forward, module)  # type: ignore[method-assign]

    def _watch(
        self, module: str, given: Sequence[Tensor], tokens: int, *, blend: bool = True
    ) -> Iterator[Tensor | None]:
        assert self._current is not None
        return self._current.watch(module, given, tokens, blend=blend)

    def _note_cached(self, name: str) -> Change:
        def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            assert self._current is not None
            self._current.note_cached(name, keys, values)
            return keys, values

        return note

    def _inside_block(self, local: str) -> Callable[[nn.Linear, Tensor], Tensor]:
        def forward(module: nn.Linear, inputs: Tensor) -> Tensor:
            assert self._current is not None
            return self._current.linear(local, module, inputs)

        return forward

    def _block_forward(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            walk = _walk()
            walk.entering = functools.partial(forward, *args, **kwargs)
            _pause(_Pause("enter", name))
            walk.entering = None
            if walk.first is not None and self.alike:
                output, walk.first.output = walk.first.output, None
                return output
            assert self._current is not None
            output = self._put_away(self._current.forward(forward, args, kwargs))
            if walk.original is not None and self.alike:
                # A copy: the model's code may write into what it was given.
                walk.output = self._put_away(_copied(output))
            return output

        return run

    def _put_away(self, value: Any) -> Any:
        """What waits between blocks, on disk if it is to be there."""
        if self._spill is None:
            return value
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(map(self._put_away, value))
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes >= SPILL_BYTES:
            return mapped_copy(value, self._spill)
        return value


@circles_freed()
def rehearse(
    components: ComponentMap,
    plan: Plan,
    makers: Sequence[BatchMaker],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Footprint:
    """The first sample through the vision encoder and into the language model, before any work: BlockStream.rehearse.

    Returns what all of this process's batches would keep, as that sample's pass does: by images and by tokens with
    their padding.
    """
    finished, first = BlockResult({}, {}), makers[0].first()
    stream = BlockStream(
        components, plan, {}, [lambda: first], outside={}, restore=lambda info: finished, dtype=dtype, device=device
    )
    places = stream.rehearse()
    sample = makers[0].pairs[0][0]
    tokens, images = first.answer_mask.shape[1], max(len(sample.images), 1)
    own = [maker for number, maker in enumerate(makers) if ranks.own(number)]
    of_batches = [len(maker.pairs) * maker.longest / tokens for maker in own]
    pictures = [sum(len(one.images) for one, _ in maker.pairs) / images for maker in own]
    found = {}
    for component, place in places.items():
        factors = of_batches if component == "language" else pictures
        found[component] = place.times(sum(factors), max(factors))
    inputs = sum(value.nbytes for value in first.inputs.values())
    return Footprint(found, round(inputs * sum(pictures if sample.images else of_batches)))
