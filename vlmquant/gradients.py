"""What the outputs of linears do to the answers: gradients through the whole original model.

KL(original || changed) of the answers is 1/2 d^T F d to second order, d being the change of the weights and F the
Fisher information: J^T (diag(p) - p p^T) J at each answer token, with J the logits' derivative and p what the original
says there. A random vector v with E[v v^T] = diag(p) - p p^T goes backward from every answer token at once. Drawing
answers instead gives the same on average, but much of it comes from tokens that are drawn once in a hundred times.

With g_t the gradient at what a linear puts out for token t, G = sum of g_t g_t^T over tokens, a share of the answer
tokens, says how its outputs count, and how they make up for each other: F is taken for G and E[x x^T] multiplied, as in
K-FAC (arXiv:1503.05671) and YAQA (arXiv:2505.22988).
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmquant import budget, signals
from vlmquant.calibration.encode import Batch, BatchMaker
from vlmquant.components import ComponentMap
from vlmquant.errors import InputError
from vlmquant.evaluation.passes import logits_of_answers
from vlmquant.loading import give_back_freed_memory
from vlmquant.planning import PlanLine
from vlmquant.progress import bar
from vlmquant.scratch import leave_memory, mapped_copy
from vlmquant.stream import assign

SEED = 0
"""Of the signs that are drawn."""
BATCH = 4
"""Samples of a pass."""
WIDTHS = 30
"""Vectors as wide as the hidden state that a layer keeps for a token, where no weight gets a gradient."""
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
    runs = components.family.runs
    return model.get_submodule(name.removeprefix(f"{runs}.") if runs else name)


def weight_bytes(components: ComponentMap, dtype: torch.dtype) -> int:
    return sum(dtype.itemsize * math.prod(one.shape) for one in components.parameters)


def activation_bytes(components: ComponentMap, tokens: int, dtype: torch.dtype, *, widths: int, blocks: int) -> int:
    """What passes keep of so many tokens until gradients are there: so many vectors as wide as the hidden state in each
    of so many blocks."""
    width = getattr(components.config.get_text_config(), "hidden_size", 0)
    return dtype.itemsize * tokens * width * widths * blocks


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


def needed_bytes(components: ComponentMap, lines: Sequence[PlanLine], tokens: int, dtype: torch.dtype) -> int:
    """Memory for `output_moments` of the linears of these lines, from passes whose longest sample has so many tokens,
    beside what the process holds before."""
    text = need_text_alone(lines)
    behind = [block for block in components.blocks if block.component == "language" or not text]
    passes = activation_bytes(components, BATCH * tokens, dtype, widths=WIDTHS, blocks=len(behind))
    return weight_bytes(components, dtype) + passes + budget.moment_bytes(lines)


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
) -> dict[str, Tensor]:
    """G of each linear of these names, float32 (out, out) on the CPU, in files of the folder that have no names.

    text_alone: see need_text_alone; of the whole plan, so that a resumed run finds what the first would have. dtype: of
    the passes. Raises InputError where no sample has an answer, and DoesNotFitError where memory runs out.
    """
    with budget.told_of_gradients("quantize"):
        model = whole_model(components, device, dtype)
        followed, tokens = _Tokens(model, text_alone=text_alone), 0
        moments = {name: _Moment(module_of(model, components, name), followed, folder) for name in names}
        pieces = [piece for make in batches for piece in make.split(BATCH)]
        with bar("quantize", total=len(pieces)) as progress:
            for number, make in enumerate(pieces):
                signals.check()
                batch = make()
                followed.begin(batch)
                logits = logits_of_answers(model, batch)
                for probe in range(PROBES if len(logits) else 0):
                    drawn = draw(logits.detach(), seed=SEED + PROBES * number + probe)
                    torch.autograd.backward(logits, drawn.to(logits.dtype), retain_graph=probe + 1 < PROBES)
                tokens += PROBES * len(logits)
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
    return {name: one.total for name, one in moments.items()}


class _Tokens:
    """Which tokens gradients are followed through: all, or of text alone, for linears that come behind images.

    What an image's tokens do to the answers is a ten-thousandth of what others do, and they are most. They come before
    the text that is asked of them, so that nothing of its gradients goes through them.
    """

    def __init__(self, model: nn.Module, *, text_alone: bool) -> None:
        self.mask: Tensor | None = None
        self._text_alone = text_alone
        for module in model.modules() if text_alone else ():
            if type(module) is nn.Linear:
                module.forward = partial(self._linear, module)  # type: ignore[method-assign]

    def begin(self, batch: Batch) -> None:
        real, image = batch.inputs.get("attention_mask"), batch.image_mask
        self.mask = None
        if self._text_alone and real is not None and image is not None and real.shape == image.shape:
            self.mask = real.bool() & ~image

    def of(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask for vectors (*shape, width), None where they are not those of a batch's tokens."""
        return self.mask if self.mask is not None and self.mask.shape == shape else None

    def _linear(self, module: nn.Linear, inputs: Tensor) -> Tensor:
        mask = self.of(tuple(inputs.shape[:-1]))
        if mask is None:
            return nn.functional.linear(inputs, module.weight, module.bias)
        output: Tensor = _Product.apply(inputs, module.weight, module.bias, mask)  # type: ignore[no-untyped-call]
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


class _Moment:
    """Adds up g g^T of what a linear puts out."""

    def __init__(self, module: nn.Module, tokens: _Tokens, folder: Path) -> None:
        rows = int(module.out_features)  # type: ignore[arg-type]
        self.total = mapped_copy(torch.zeros(rows, rows), folder)
        self._tokens = tokens
        self._handle = module.register_forward_hook(self._heard)

    def _heard(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        mask = self._tokens.of(tuple(output.shape[:-1]))
        output.register_hook(partial(self._add, mask))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _add(self, mask: Tensor | None, gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2) if mask is None else gradient[mask.to(gradient.device)]
        rows = rows.to(self.total.device, torch.float32)
        self.total.addmm_(rows.T, rows)

    def end(self, tokens: int) -> None:
        self._handle.remove()
        self.total /= max(tokens, 1)
        leave_memory(self.total)
