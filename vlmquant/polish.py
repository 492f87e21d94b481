"""Tune the scales of a finished checkpoint, with its codes frozen, until it answers more like the model it came from.

What is least is KL(original || quantized) over the answer tokens of calibration samples, by gradients through the whole
language model: of the scale of each group, as a factor e^d, and of the gains of norms (the idea of mlx-lm's DWQ). The
file keeps its format and its size. One of HELD_EVERY samples is held out. They choose the rate, as one that is too high
does harm, and the epoch; and where they lose nothing by it, the checkpoint stays as it was.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlmquant
from vlmquant import budget, signals
from vlmquant.calibration.encode import Encoder, are_tokenized
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sampling import choose_samples, shares
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import CheckpointWriter, Inputs, check_output, read_manifest
from vlmquant.checkpoint.coded import Coded, open_coded
from vlmquant.components import ComponentMap, locate_model
from vlmquant.devices import find_device
from vlmquant.errors import DoesNotFitError, InputError, PlanError, shown
from vlmquant.evaluation.following import Follower, prompts_of
from vlmquant.evaluation.passes import Row, answer_logits, batches_of, measure_rows, with_answers
from vlmquant.export import carried_by, plan_of, recipe_of, units_of
from vlmquant.gradients import TokensFollowed, followed_bytes, most_followed, place_in
from vlmquant.grid import QuantizedWeight, expand_groups
from vlmquant.kernels.probe import compute_dtype
from vlmquant.loading import give_back_freed_memory, load_model, reading_part
from vlmquant.progress import bar
from vlmquant.recipe import CalibrationSpec, Scheme
from vlmquant.stream import HELD_EVERY

TOP = 64
"""Log-probabilities of the original that are kept for a token; the others' sum is kept as one."""
ANSWERS = 3
"""Of a sample that are tuned on, where it has as many: each says more than another epoch of the first."""
BATCH = 8
"""Sequences of a step."""
RATES = (3.6e-3, 1.2e-3, 4e-4, 1.3e-4)
"""Of Adam, tried from the highest down until the next is no better."""
TRIAL = 20
"""Steps that each is tried for: fewer say little of an epoch."""
BETAS = (0.9, 0.95)
OF_THE_RUN = ("command", "fingerprint", "work")
"""What a manifest says of the run that made a checkpoint, and of none that makes another of it."""
LEAST_GAIN = 0.01
"""Relative: a checkpoint whose held-out KL falls by less stays as it was."""


@dataclass(frozen=True)
class Options:
    epochs: int = 1
    rate: float | None = None
    """None: the best of RATES on the samples held out."""
    norms: bool = True
    """Whether gains of norms are tuned too."""


@dataclass(frozen=True)
class Polished:
    """What became of a checkpoint."""

    path: Path
    before: float
    """KL(original || quantized) on the samples held out, nats a token."""
    after: float
    """The same with what is stored now."""
    rate: float | None
    """None where it stayed as it was."""
    tried: dict[float, float]
    """Rate -> held-out KL after a trial."""
    samples: int
    held: int
    tuned: int
    """Numbers that were tuned."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "held_out_kl_before": self.before,
            "held_out_kl_after": self.after,
            "rate": self.rate,
            "tried": {f"{rate:g}": kl for rate, kl in self.tried.items()},
            "samples": self.samples,
            "held_out": self.held,
            "tuned": self.tuned,
            "notes": list(self.notes),
        }


class ScaledLinear(nn.Module):
    """A linear layer of frozen codes whose scales are tuned: scale * e^log_factor, one for each group."""

    values: Tensor
    """int8 (out, groups, group_size)."""
    scales: Tensor
    """float32 (out, groups)."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, followed: TokensFollowed, *, dtype: torch.dtype, device: Any
    ) -> None:
        super().__init__()
        self.weight_before, self.dtype = weight, dtype
        self.bias = bias
        self.followed = followed
        groups, size = weight.scales.shape[1], weight.grid.group_size
        zeros = weight.zeros
        if zeros is not None:
            zeros = expand_groups(zeros.float(), group_size=size, columns=weight.codes.shape[1])
        values = weight.grid.decode(weight.codes, zeros)
        short = groups * size - values.shape[1]
        self.columns = values.shape[1]
        values = nn.functional.pad(values, (0, short)).to(torch.int8)
        self.register_buffer("values", values.view(len(values), groups, size).to(device), persistent=False)
        self.register_buffer("scales", weight.scales.to(device), persistent=False)
        self.log_factor = nn.Parameter(torch.zeros_like(weight.scales, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        scales = self.scales * self.log_factor.exp()
        mask = self.followed.of(tuple(inputs.shape[:-1]))
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            inputs, self.values, scales, self.columns, self.dtype, mask
        )
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def rounded(self) -> QuantizedWeight:
        """With the scales as they will be stored."""
        scales = (self.scales * self.log_factor.exp()).detach().cpu()
        return replace(self.weight_before, scales=self.weight_before.grid.round_scales(scales))


class _FrozenLinear(nn.Module):
    """A linear layer whose weight is frozen, multiplied in a dtype that is fast here; what it puts out is as what it
    gets."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs.to(self.weight.dtype), self.weight, self.bias).to(inputs.dtype)


def _multiply_in(dtype: torch.dtype, model: nn.Module, components: ComponentMap) -> None:
    """Have the frozen linears of all components but the head multiply in this dtype. What passes from block to block,
    norms, attention and logits stay as they are, so that little is lost."""
    if dtype == torch.float32:
        return
    for one in components.linears:
        place = place_in(components, one.name)
        linear = model.get_submodule(place)
        if one.component != "lm_head" and type(linear) is nn.Linear:
            model.set_submodule(place, _FrozenLinear(linear, dtype))


class _Product(torch.autograd.Function):
    """inputs (..., in) times values * scales, of which only the codes are kept until the gradient comes, and of the
    inputs those of the tokens that it is followed through (mask)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        values: Tensor,
        scales: Tensor,
        columns: int,
        dtype: torch.dtype,
        mask: Tensor | None,
    ) -> Tensor:
        mask = torch.ones(inputs.shape[:-1], dtype=torch.bool) if mask is None else mask
        mask = mask.to(inputs.device)
        ctx.save_for_backward(inputs[mask], values, scales, mask)
        ctx.columns, ctx.dtype, ctx.inputs_dtype = columns, dtype, inputs.dtype
        weight = _dequantized(values, scales, columns, dtype)
        return nn.functional.linear(inputs.to(dtype), weight).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, None, None, None]:
        rows, values, scales, mask = ctx.saved_tensors
        gradient, of_inputs = gradients[0][mask].to(ctx.dtype), None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient.new_zeros(*mask.shape, ctx.columns, dtype=ctx.inputs_dtype)
            of_inputs[mask] = (gradient @ _dequantized(values, scales, ctx.columns, ctx.dtype)).to(ctx.inputs_dtype)
        of_weight = (gradient.T @ rows.to(ctx.dtype)).float()
        of_weight = nn.functional.pad(of_weight, (0, values[0].numel() - ctx.columns))
        of_scales = (of_weight.view(values.shape) * values).sum(-1)
        return of_inputs, None, of_scales, None, None, None


def _dequantized(values: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return (values.to(dtype) * scales.to(dtype)[..., None]).flatten(1)[:, :columns]


@dataclass(frozen=True)
class _Teacher:
    """What the original model says at the answer tokens of a row."""

    ids: Tensor
    """(tokens, TOP) int64: the most likely tokens."""
    log_probs: Tensor
    """(tokens, TOP) float32."""

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(original || a model) for each token, float32 (tokens,), all but the most likely taken together."""
        other = logits.float().log_softmax(-1)
        ids, known = self.ids.to(other.device), self.log_probs.to(other.device)
        same = other.gather(-1, ids)
        rest, other_rest = _rest(known), _rest(same)
        return (known.exp() * (known - same)).sum(-1) + rest.exp() * (rest - other_rest)


def _rest(log_probs: Tensor) -> Tensor:
    """log of what probabilities leave of 1, (tokens,)."""
    left = (1 - log_probs.exp().sum(-1)).clamp_min(1e-7)
    return left.log()


def polish(
    checkpoint: str | Path,
    original: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    samples: int | None = None,
    options: Options | None = None,
    device: str = "auto",
    force: bool = False,
) -> Polished:
    """Write to the directory `out` the checkpoint with tuned scales; `original` is the model that it was made of.

    With force, `out` may be the checkpoint itself, which is then replaced.
    calibration, samples: the set and how many of it, of each task the share that the checkpoint's recipe has; None as
    it has them, and as at effort high where it does not say how many. Raises UsageError, PlanError where there is
    nothing to be tuned, InputError, and DoesNotFitError where gradients of the whole model need more memory than there
    is.
    """
    options = options or Options()
    path, base = locate_model(checkpoint), locate_model(original)
    coded = open_coded(path)
    over = force and Path(out).resolve() == path.resolve()
    check_output(Path(out), coded.components.model_dir, resume=False, force=force, over=over)
    manifest = read_manifest(path)
    recipe = recipe_of(coded, coded.coding.format, manifest)
    names = _tunable(coded)
    device = find_device(device)
    dtype = compute_dtype(torch.device(device))
    asked: dict[str, Any] = {} if calibration is None else {"set": str(calibration)}
    spec = recipe.calibration.at("high").model_copy(update=asked)
    if samples is not None:
        mixed = None if spec.strata is None else shares(spec.strata, samples)
        spec = spec.model_copy(update={"samples": samples, "strata": mixed})
    encoder, rows = _rows(path, spec)
    fit, held = _split(rows)
    largest = max(rows, key=lambda row: row.tokens)
    followed = most_followed(with_answers(encoder, [largest]), text_alone=True) or largest.tokens
    needed = needed_bytes(coded.components, coded.schemes, tokens=largest.tokens, followed=followed)
    _refuse_large(needed, device)
    inputs = Inputs(coded.components)
    with budget.told_of_gradients("polish"):
        teacher = _ask(base, coded.components, encoder, [*fit, *held], dtype=dtype, device=device)
        model = reading_part(load_model(path, dtype=torch.float32, device=device))
        tuner = _Tuner(model, coded, names, encoder, teacher, dtype=dtype, device=device, norms=options.norms)
        before = tuner.loss(held)
        rate, tried = _best_rate(tuner, fit, held, before, options)
        after, kept = before, None
        if rate is not None:
            after, kept = tuner.train(fit, held, rate, epochs=options.epochs)
        helped = kept is not None and after < before * (1 - LEAST_GAIN)
        tuner.restore(kept if helped else None)
    note = (
        f"polished: KL to the original on {len(held)} samples held out {before:.4f} to {after:.4f} nats a token"
        if helped
        else f"polishing did not help on {len(held)} samples held out ({before:.4f} nats a token before, {after:.4f} "
        "after): scales and norms are as they were"
    )
    done = Polished(
        Path(out),
        before,
        after if helped else before,
        rate if helped else None,
        tried,
        len(_by_sample(rows)),
        len(held),
        tuner.count,
        (note,),
    )
    _write(done, coded, recipe, manifest, tuner, inputs, force=force, over=over)
    return done


def is_tunable(scheme: Scheme | str | None, component: str) -> bool:
    """Whether a weight is integer codes of the language model, and its inputs are not rounded."""
    integers = isinstance(scheme, Scheme) and scheme.type == "int" and scheme.activations == "none"
    return integers and component == "language"


def _tunable(coded: Coded) -> list[str]:
    found = [
        name for name, scheme in coded.schemes.items() if is_tunable(scheme, coded.components.parameter(name).component)
    ]
    if not found:
        raise PlanError(f"{coded.path}: no layer of its language model is integer codes, so no scales can be tuned")
    return found


def _rows(path: Path, spec: CalibrationSpec) -> tuple[Encoder, list[Row]]:
    samples = choose_samples(load_set(spec.set), spec).samples
    encoder = Encoder(load_processor(path), tidy_captions=are_tokenized(samples))
    rows = measure_rows([(sample, answer) for sample in samples for answer in sample.answers[:ANSWERS]], encoder)
    rows = [row for row in rows if row.tokens <= spec.max_tokens and row.answer_tokens]
    if (known := len(_by_sample(rows))) < 2 * HELD_EVERY:
        raise InputError(
            f"calibration set {shown(spec.set)}: {known} samples are too few to tune scales on and hold some out; "
            f"give at least {2 * HELD_EVERY}"
        )
    return encoder, rows


def _by_sample(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.sample.id, []).append(row)
    return list(found.values())


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to fit, and rows held out: of every HELD_EVERY-th sample of each task, one answer."""
    seen: dict[str, int] = {}
    fit, held = list[list[Row]](), list[list[Row]]()
    for answers in _by_sample(rows):
        task = answers[0].sample.task
        place = seen[task] = seen.get(task, 0) + 1
        (held if place % HELD_EVERY == 0 else fit).append(answers)
    if not held:
        held = [fit.pop()]
    return [row for answers in fit for row in answers], [answers[0] for answers in held]


def needed_bytes(components: ComponentMap, coded: Collection[str], *, tokens: int, followed: int) -> int:
    """Memory for gradients of the whole language model, in steps of sequences of so many tokens, of which gradients go
    through some, beside what the process holds before. coded: names of the weights that are codes."""
    parameters = components.parameters
    layers = sum(block.component == "language" for block in components.blocks)
    weights = sum(budget.FLOAT_BYTES * math.prod(one.shape) for one in parameters if one.name not in coded)
    codes = sum(math.prod(one.shape) for one in parameters if one.name in coded)
    largest = max((budget.FLOAT_BYTES * math.prod(one.shape) for one in parameters), default=0)
    activations = BATCH * followed_bytes(
        components, torch.float32, tokens=tokens, followed=followed, widths=budget.GRADIENT_WIDTHS, blocks=layers
    )
    tuning = weights + codes + 2 * largest + activations
    original = sum(budget.FLOAT_BYTES * math.prod(one.shape) for one in parameters)
    return max(tuning, original)


def _refuse_large(needed: int, device: str) -> None:
    """DoesNotFitError before any work where gradients of the whole model cannot fit."""
    free = budget.free_bytes(device)
    if needed > free:
        raise DoesNotFitError(
            f"polish needs about {needed / 2**30:.1f} GiB for gradients of the whole language model, and "
            f"{free / 2**30:.1f} are free; give it shorter samples, or more memory"
        )


@torch.no_grad()
def _ask(
    base: Path, components: ComponentMap, encoder: Encoder, rows: Sequence[Row], *, dtype: torch.dtype, device: str
) -> dict[int, _Teacher]:
    """The original model's answers, by row. components: of the checkpoint, which has the same modules."""
    model = reading_part(load_model(base, dtype=torch.float32, device=device).eval())
    _multiply_in(dtype, model, components)
    follow, found = Follower(model, encoder, dtype=dtype), dict[int, _Teacher]()
    owners = [answers[0].key for answers in _by_sample(rows) for _ in answers]
    prompts = prompts_of([row for answers in _by_sample(rows) for row in answers], owners, {})
    with bar("polish", total=len(prompts)) as progress:
        for batch in batches_of(prompts, BATCH):
            signals.check()
            for scored in (scored for followed in follow(batch) for scored in followed.scored):
                logits = scored.answer_logits.clone()  # which gradients may go by, where those of inference may not
                log_probs, ids = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
                found[scored.row.key] = _Teacher(ids.cpu(), log_probs.cpu())
            for _ in batch:
                progress.step("polish: ask the original")
    del model
    give_back_freed_memory()
    return found


class _Tuner:
    """The quantized model with scales and gains that can be tuned."""

    def __init__(
        self,
        model: Any,
        coded: Coded,
        names: Sequence[str],
        encoder: Encoder,
        teacher: Mapping[int, _Teacher],
        *,
        dtype: torch.dtype,
        device: str,
        norms: bool,
    ) -> None:
        self.model, self.encoder, self.teacher = model.requires_grad_(False), encoder, teacher
        self.followed = TokensFollowed(text_alone=True)
        self.linears: dict[str, ScaledLinear] = {}
        for name in names:
            signals.check()
            weight, order = coded.read(name)
            if order is not None:
                raise PlanError(f"{coded.path}: {name}: its groups are of inputs in an order of their own (desc_act)")
            place = place_in(coded.components, name).removesuffix(".weight")
            bias = getattr(model.get_submodule(place), "bias", None)
            self.linears[name] = ScaledLinear(weight, bias, self.followed, dtype=dtype, device=device)
            model.set_submodule(place, self.linears[name])
        _multiply_in(dtype, model, coded.components)
        self.gains = dict(self._norms(coded)) if norms else {}
        for value in self.gains.values():
            value.requires_grad_(True)
        self.stored = {name: coded.components.parameter(name).dtype for name in self.gains}
        self.parameters = [one.log_factor for one in self.linears.values()] + list(self.gains.values())
        self.count = sum(one.numel() for one in self.parameters)
        self._start = self.state()

    def _norms(self, coded: Coded) -> Iterator[tuple[str, nn.Parameter]]:
        """Gains of norms of the language model: its parameters of one dimension that are called so."""
        by_name = dict(self.model.named_parameters())
        for one in coded.components.parameters:
            place = place_in(coded.components, one.name)
            is_gain = one.component == "language" and len(one.shape) == 1 and one.name.endswith("norm.weight")
            if is_gain and place in by_name and one.loaded:
                yield one.name, by_name[place]

    def state(self) -> list[Tensor]:
        return [one.detach().clone() for one in self.parameters]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor] | None) -> None:
        """What `state` gave; None for the checkpoint's own."""
        for one, value in zip(self.parameters, self._start if state is None else state, strict=True):
            one.copy_(value)

    @torch.no_grad()
    def loss(self, rows: Sequence[Row]) -> float:
        """KL in nats a token over rows, with scales and gains as they would be stored."""
        exact = self.state()
        for linear in self.linears.values():
            # e^0 is 1: the scales that were there are already as they are stored.
            factor = linear.rounded().scales.to(linear.scales.device) / linear.scales
            linear.log_factor.copy_(factor.log())
        for name, gain in self.gains.items():
            gain.copy_(gain.to(self.stored[name]))
        total, tokens = 0.0, 0
        for batch in batches_of(rows, BATCH):
            signals.check()
            for found in self._divergences(batch):
                total, tokens = total + found.double().sum().item(), tokens + len(found)
        self.restore(exact)
        return total / max(tokens, 1)

    def train(
        self, fit: Sequence[Row], held: Sequence[Row], rate: float, *, epochs: int, most: int | None = None
    ) -> tuple[float, list[Tensor] | None]:
        """Adam, by a cosine to 0, from the checkpoint's own scales. Returns the least held-out KL after an epoch, and
        what gave it. most: steps, for a trial."""
        self.restore(None)
        steps = max(round(epochs * len(fit) / BATCH), 1)
        steps = steps if most is None else min(steps, most)
        optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=BETAS)
        random = torch.Generator().manual_seed(0)
        best, kept, order = math.inf, None, list[int]()
        with bar("polish", total=steps) as progress:
            for step in range(steps):
                signals.check()
                if len(order) < BATCH:
                    order += torch.randperm(len(fit), generator=random).tolist()
                rows, order = [fit[one] for one in order[:BATCH]], order[BATCH:]
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                self._step(optimizer, rows)
                progress.step(f"polish at {rate:g}")
                if step + 1 == steps or (step + 1) * BATCH % len(fit) < BATCH:
                    loss = self.loss(held)
                    if loss < best:
                        best, kept = loss, self.state()
        return best, kept

    def _step(self, optimizer: torch.optim.Optimizer, rows: Sequence[Row]) -> None:
        optimizer.zero_grad()
        tokens = sum(row.answer_tokens for row in rows)
        for part in batches_of(rows, BATCH):  # those with as many images
            torch.autograd.backward(torch.cat(self._divergences(part)).sum() / tokens)
        optimizer.step()

    def _divergences(self, batch: Sequence[Row]) -> list[Tensor]:
        """Of each row of a batch, KL by token."""
        found = answer_logits(self.model, self.encoder, batch, around=self.followed.in_pass)
        return [self.teacher[row.key].divergence(logits) for row, logits in zip(batch, found, strict=True)]


def _best_rate(
    tuner: _Tuner, fit: Sequence[Row], held: Sequence[Row], before: float, options: Options
) -> tuple[float | None, dict[float, float]]:
    """The rate whose trial leaves the least held-out KL, if that is less than before."""
    if options.rate is not None:
        return options.rate, {}
    tried: dict[float, float] = {}
    for rate in RATES:
        tried[rate], _ = tuner.train(fit, held, rate, epochs=1, most=TRIAL)
        if min(tried.values()) < min(before, tried[rate]):
            break
    rate = min(tried, key=tried.__getitem__)
    return (rate if tried[rate] < before else None), tried


def _write(
    done: Polished,
    coded: Coded,
    recipe: Any,
    manifest: Mapping[str, Any],
    tuner: _Tuner,
    inputs: Inputs,
    *,
    force: bool,
    over: bool,
) -> None:
    plan = plan_of(coded, coded.coding.format, manifest)
    gains = {name: gain.detach().cpu().to(tuner.stored[name]) for name, gain in tuner.gains.items()}
    writer = CheckpointWriter(
        done.path,
        coded.components,
        recipe,
        plan,
        fingerprint={"polish": f"{done.rate}", "vlmquant": vlmquant.__version__},
        resume=False,
        force=force,
        inputs=inputs,
        resumable=False,
        scale_dtype=coded.scales(next(iter(coded.schemes))).dtype,
        over=over,
    )

    def weight(name: str) -> QuantizedWeight:
        linear = tuner.linears.get(name)
        return coded.read(name)[0] if linear is None else linear.rounded()

    with writer:
        for unit, names in units_of(coded, also=gains):
            signals.check()
            quantized = {name: weight(name) for name in names if name in coded.schemes}
            writer.add(unit, quantized, {name: gains[name] for name in names if name in gains}, {})
        carried = carried_by(coded, manifest)
        if over:  # the same run; one that resumes it knows by the fingerprint that nothing is left to do
            carried |= {key: manifest[key] for key in OF_THE_RUN if key in manifest}
        notes = (*manifest.get("notes", ()), *done.notes)
        writer.finish({**carried, "polish": done.to_json() | {"path": None}, "notes": notes})
