"""What the outputs of linears do to the answers: gradients through the whole original model.

KL(original || changed) of the answers is 1/2 d^T F d to second order, d being the change of the weights and F the
Fisher information: J^T (diag(p) - p p^T) J at each answer token, with J the logits' derivative and p what the original
says there. A random vector v with E[v v^T] = diag(p) - p p^T goes backward from every answer token at once. Drawing
answers instead gives the same on average, but much of it comes from tokens that are drawn once in a hundred times.

With g_t the gradient at what a linear puts out for token t, G = sum of g_t g_t^T over tokens, a share of the answer
tokens, says how its outputs count, and how they make up for each other: F is taken for G and E[x x^T] multiplied, as in
K-FAC (arXiv:1503.05671) and YAQA (arXiv:2505.22988). Of G, squares along the diagonal are taken.
"""

import inspect
import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from vlmquant import budget, signals
from vlmquant.calibration.encode import Batch, BatchMaker
from vlmquant.components import ComponentMap
from vlmquant.errors import DoesNotFitError, InputError, first_line
from vlmquant.evaluation.passes import logits_of_answers
from vlmquant.loading import give_back_freed_memory
from vlmquant.planning import PlanLine
from vlmquant.progress import bar
from vlmquant.scratch import leave_memory, mapped_copy, scratch_folder
from vlmquant.stream import assign, mirror_upper, rows_together, upper_slices

SEED = 0
"""Of the signs that are drawn."""
EVERY = 2
"""Of the batches one in so many is looked at: half of the samples say as much, in half the time."""
BATCH = 4
"""Samples of a pass."""
WIDTHS = 30
"""Vectors as wide as the hidden state that a layer keeps for a token that is followed, where no weight gets a
gradient."""
ATTENTION_WIDTHS = 3
"""And for each of the others: attention looks at them."""
ROWS_AT_ONCE = 512
"""Gradients that are waited for before their second moments are added: all of a square in memory goes by each time."""
PROBES = 4
"""Vectors that go backward from each answer token: every one takes as long as a pass, and makes what is found of few
samples less a matter of chance."""


def whole_model(components: ComponentMap, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The part of a model that reads images and text, experts taken apart, without gradients of weights."""
    model, runs = components.skeleton(dtype), components.family.runs
    tied = {names[0]: names[1:] for names in components.tied}
    with bar("load", total=len(components.parameters)) as progress:
        for one in components.parameters:
            signals.check()
            if one.loaded and (not runs or one.name.startswith(f"{runs}.")):
                value = components.read(one.name)
                value = value.to(device, dtype if value.is_floating_point() else None)
                for name in (one.name, *tied.get(one.name, ())):
                    assign(model, name, value)
            progress.step()
    components.materialize_buffers(model)
    return model.get_submodule(runs).to(device)


def module_of(model: nn.Module, components: ComponentMap, name: str) -> nn.Module:
    """A module of `whole_model` by its name in the model."""
    return model.get_submodule(place_in(components, name))


def place_in(components: ComponentMap, name: str) -> str:
    """What a module, or a parameter, of this name in the model is called in the part that is run."""
    runs = components.family.runs
    return name.removeprefix(f"{runs}.") if runs else name


def weight_bytes(components: ComponentMap, dtype: torch.dtype) -> int:
    return sum(dtype.itemsize * math.prod(one.shape) for one in components.parameters)


def activation_bytes(components: ComponentMap, tokens: int, dtype: torch.dtype, *, widths: int, blocks: int) -> int:
    """What passes keep of so many tokens until gradients are there: so many vectors as wide as the hidden state in each
    of so many blocks."""
    width = getattr(components.config.get_text_config(), "hidden_size", 0)
    return dtype.itemsize * tokens * width * widths * blocks


def followed_bytes(
    components: ComponentMap, dtype: torch.dtype, *, tokens: int, followed: int, widths: int, blocks: int
) -> int:
    """activation_bytes of passes through some of the tokens: attention alone keeps something of the others."""
    kept = widths * followed + ATTENTION_WIDTHS * (tokens - followed)
    return activation_bytes(components, kept, dtype, widths=1, blocks=blocks)


def draw(logits: Tensor, *, seed: int) -> Tensor:
    """A vector v for each row of logits (tokens, vocabulary), of the same shape, with E[v v^T] = diag(p) - p p^T.

    v = sqrt(p) s - p (sqrt(p) . s), with random signs s.
    """
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, logits.shape, generator=random, dtype=torch.int8).mul_(2).sub_(1).to(logits.device)
    chances = logits.float().softmax(-1)
    roots = chances.sqrt() * signs
    return roots - chances * roots.sum(-1, keepdim=True)


# --- second moments of gradients ---


def needed_bytes(
    components: ComponentMap, lines: Sequence[PlanLine], dtype: torch.dtype, *, tokens: int, followed: int
) -> int:
    """Memory for `output_moments` of the linears of these lines, beside what the process holds before: weights, what
    passes keep, and gradients that are waited for. The moments themselves lie on disk.

    tokens, followed: of the longest sample, and those of them that gradients go through: see `longest`.
    """
    text = need_text_alone(lines)
    behind = [block for block in components.blocks if block.component == "language" or not text]
    passes = BATCH * followed_bytes(
        components, dtype, tokens=tokens, followed=followed, widths=WIDTHS, blocks=len(behind)
    )
    waiting = dtype.itemsize * (ROWS_AT_ONCE + BATCH * followed) * sum(line.shape[0] for line in lines)
    return weight_bytes(components, dtype) + passes + waiting


def longest(batches: Sequence[BatchMaker], *, text_alone: bool) -> tuple[int, int]:
    """The tokens of the longest sample, and of one like it those that gradients go through."""
    make = max(batches, key=lambda make: make.longest)
    return make.longest, most_followed(make.first(), text_alone=text_alone) or make.longest


def most_followed(batch: Batch, *, text_alone: bool) -> int | None:
    """Of the tokens of a sample, those that gradients go through; None where that is all."""
    mask = TokensFollowed(text_alone=text_alone).in_pass(batch).mask
    return None if mask is None else int(mask.sum(1).max())


def need_text_alone(lines: Sequence[PlanLine]) -> bool:
    """Whether gradients need not go through images: all linears that are asked for come behind them."""
    return {line.component for line in lines} == {"language"}


def output_moments(
    components: ComponentMap,
    names: Collection[str],
    batches: Sequence[BatchMaker],
    *,
    text_alone: bool,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
) -> dict[str, list[Tensor]]:
    """G of each linear of these names, float32 on the CPU, in files of the folder that have no names: the squares along
    its diagonal, of stream.rows_together.

    text_alone: see need_text_alone; of the whole plan, so that a resumed run finds what the first would have. dtype: of
    the passes. Raises InputError where no sample has an answer, and DoesNotFitError where memory runs out.
    """
    with budget.told_of_gradients("quantize"):
        model = whole_model(components, device, dtype)
        followed, tokens = TokensFollowed(text_alone=text_alone), 0
        moments = {name: _Moment(module_of(model, components, name), followed, folder) for name in names}
        pieces = [piece for make in batches for piece in make.split(BATCH)][::EVERY]
        with bar("quantize", total=len(pieces)) as progress:
            for number, make in enumerate(pieces):
                signals.check()
                batch = make()
                with followed.in_pass(batch):
                    logits = logits_of_answers(model, batch)
                for probe in range(PROBES if len(logits) else 0):
                    drawn = draw(logits.detach(), seed=SEED + PROBES * number + probe)
                    torch.autograd.backward(logits, drawn.to(logits.dtype), retain_graph=probe + 1 < PROBES)
                tokens += PROBES * len(logits)
                give_back_freed_memory()
                progress.step("gradients")
        for one in moments.values():
            one.end(tokens)
        del model
        give_back_freed_memory()
    if not tokens:
        raise InputError(
            "calibration: no sample has an answer, so nothing says what layers do to answers; give a set with answers, "
            "or components.language.gptq.loss: layer"
        )
    return {name: one.squares for name, one in moments.items()}


def reason_against(
    components: ComponentMap,
    names: Sequence[str],
    batches: Sequence[BatchMaker],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why `output_moments` cannot be had of these linears, by the first sample with an answer; None where it can."""
    pairs = ((make, pair) for make in batches for pair in make.pairs if pair[1])
    first = next((replace(make, pairs=[pair]) for make, pair in pairs), None)
    if first is None:
        return "no calibration sample has an answer"
    try:
        with scratch_folder() as folder:
            found = output_moments(
                components, names[:1], [first], text_alone=True, dtype=dtype, device=device, folder=folder
            )
    except DoesNotFitError:
        return "gradients of the whole model do not fit into memory"
    except Exception as error:  # whatever a model's own code, or torch of it, raises
        return f"gradients do not go through this model ({type(error).__name__}: {first_line(error)})"
    if not all(square.isfinite().all() for square in found[names[0]]):
        return "gradients of this model are not finite"
    return None


class TokensFollowed(TorchFunctionMode):
    """Which tokens gradients are followed through: all, or of text alone, for linears that come behind images.

    What an image's tokens do to the answers is a ten-thousandth of what others do, and they are most. They come before
    the text that is asked of them, so that nothing of its gradients goes through them. As a context, around a forward
    pass, it sees to that in linears and in attention.
    """

    def __init__(self, *, text_alone: bool) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self._text_alone = text_alone
        self._kept = ExitStack()

    def __enter__(self) -> "TokensFollowed":
        if self.mask is not None:
            self._kept.enter_context(saved_tensors_hooks(self._pack, self._unpack))
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._kept.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _pack(self, kept: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Of vectors that a pass keeps for its gradients, those of the tokens followed."""
        mask = self.of(tuple(kept.shape[:-1]))
        if mask is None or not kept.is_floating_point():
            return kept
        mask = mask.to(kept.device)
        return kept[mask], mask

    @staticmethod
    def _unpack(packed: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """With ones for the others, which no derivative goes to infinity at."""
        if isinstance(packed, Tensor):
            return packed
        rows, mask = packed
        whole = rows.new_ones(*mask.shape, rows.shape[-1])
        whole[mask] = rows
        return whole

    def in_pass(self, batch: Batch) -> "TokensFollowed":
        """The context for a pass of this batch; what goes backward may do so after it."""
        real, image = batch.inputs.get("attention_mask"), batch.image_mask
        self.mask = None
        if self._text_alone and real is not None and image is not None and real.shape == image.shape:
            self.mask = real.bool() & ~image
        return self

    def of(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask for vectors (*shape, width), None where they are not those of a batch's tokens."""
        return self.mask if self.mask is not None and self.mask.shape == shape else None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.mask is not None and torch.is_grad_enabled():
            if function is nn.functional.linear:
                return self._linear(*args, **kwargs)
            if function is nn.functional.scaled_dot_product_attention:
                return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = self.of(tuple(inputs.shape[:-1]))
        if mask is None or weight.requires_grad:
            return nn.functional.linear(inputs, weight, bias)
        output: Tensor = _Product.apply(inputs, weight, bias, mask)  # type: ignore[no-untyped-call]
        return output

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = inspect.signature(_attend).bind(query, key, value, *args, **kwargs)
        known.apply_defaults()
        plain = query.ndim == key.ndim == value.ndim == 4 and not known.arguments["dropout_p"]
        mask = self.of((len(query), query.shape[-2])) if plain and query.shape[-2] == key.shape[-2] else None
        if mask is None:
            return nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        output: Tensor = _Attention.apply(mask, *known.arguments.values())  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """A linear layer whose inputs get a gradient at some tokens alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        ctx.weight, ctx.mask = weight, mask.to(inputs.device)
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        found = gradient.new_zeros(*gradient.shape[:-1], ctx.weight.shape[1])
        found[ctx.mask] = gradient[ctx.mask] @ ctx.weight
        return found, None, None, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Attention(torch.autograd.Function):
    """Attention whose outputs give a gradient at some tokens alone: a sample's few rows of the scores are made anew."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        ctx.mask, ctx.options = mask.to(query.device), options
        ctx.save_for_backward(query, key, value)
        return _attend(query, key, value, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        bias, _, causal, scale, _ = ctx.options
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        heads, shared = query.shape[1], query.shape[1] // key.shape[1]
        found = [torch.zeros_like(one) for one in (query, key, value)]
        for sample, rows in enumerate(ctx.mask):
            picked, keys, values, gradient = (
                one[sample].float() for one in (query[:, :, rows], key, value, gradients[0][:, :, rows])
            )
            keys, values = (one.repeat_interleave(shared, 0) for one in (keys, values))
            scores = picked @ keys.mT * scale
            if causal:
                seen = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).tril()
                scores.masked_fill_(~seen[rows], -math.inf)
            if bias is not None:
                some = bias.expand(len(query), heads, len(rows), len(rows))[sample][:, rows]
                scores = scores.masked_fill(~some, -math.inf) if some.dtype == torch.bool else scores + some
            weights = scores.softmax(-1).nan_to_num()
            of_weights = gradient @ values.mT
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
            found[0][sample, :, rows] = (of_scores @ keys).to(query.dtype)
            for place, of_shared in ((1, of_scores.mT @ picked), (2, weights.mT @ gradient)):
                found[place][sample] = of_shared.view(-1, shared, *of_shared.shape[1:]).sum(1)
        return None, *found, *(None for _ in ctx.options)


class _Moment:
    """Adds up g g^T of what a linear puts out."""

    def __init__(self, module: nn.Module, tokens: TokensFollowed, folder: Path) -> None:
        rows = int(module.out_features)  # type: ignore[arg-type]
        self.squares = [mapped_copy(torch.zeros(size, size), folder) for size in rows_together(rows)]
        self._tokens = tokens
        self._gradients = list[Tensor]()
        """(tokens, out) of each vector that went backward, until there are enough."""
        self._handle = module.register_forward_hook(self._heard)

    def _heard(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        mask = self._tokens.of(tuple(output.shape[:-1]))
        output.register_hook(partial(self._keep, mask))  # type: ignore[no-untyped-call]

    def _keep(self, mask: Tensor | None, gradient: Tensor) -> None:
        """A copy: autograd may go on to add to this gradient in its place."""
        rows = gradient.flatten(0, -2).clone() if mask is None else gradient[mask.to(gradient.device)]
        self._gradients.append(rows)
        if sum(map(len, self._gradients)) >= ROWS_AT_ONCE:
            self._add_up()

    @torch.no_grad()
    def _add_up(self) -> None:
        """In one product, and of it what lies above the diagonal."""
        if self._gradients:
            every = torch.cat(self._gradients)
            for square, rows in zip(self.squares, torch.split(every, list(map(len, self.squares)), dim=1), strict=True):
                for part in upper_slices(square):
                    first = len(square) - part.shape[1]
                    part += (rows[:, first : first + len(part)].T @ rows[:, first:]).to(part.device)
                leave_memory(square)
            self._gradients.clear()

    def end(self, tokens: int) -> None:
        self._handle.remove()
        self._add_up()
        for square in self.squares:
            mirror_upper(square).div_(max(tokens, 1))
            leave_memory(square)
