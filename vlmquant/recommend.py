"""Which recipe for which GPU: a guide as data, each candidate planned and held against memory and engine, one chosen.

Where 16 bits fit they stay, unless latency comes first. Then: latency first, 8-bit products as the GPU has them;
accuracy first, the most bits that fit, GPTQ where these are 4; else 4 bits by our default. 8 bits come before GPTQ, as
they lose less than any 4: a fifth of GPTQ's KL on the reference model (benchmarks/results/reference.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args

from vlmquant.components import ComponentMap
from vlmquant.engines import Contract, check_plan
from vlmquant.errors import DoesNotFitError, PlanError, UsageError, first_line, shown
from vlmquant.pipeline import find_components, plan_components
from vlmquant.planning import Plan, as_written, make_plan, needs_class
from vlmquant.recipe import TargetSpec, load_recipe, parse_recipe, parse_target, shipped
from vlmquant.serving import USABLE, Serving, Wish, cache_layers, count_image_tokens, serve

Goal = Literal["balanced", "latency", "accuracy"]
GOALS: tuple[str, ...] = get_args(Goal)
CARDS = {
    "blackwell": "sm_100",
    "hopper": "sm_90",
    "ada": "sm_89",
    "ampere": "sm_80",
    "turing": "sm_75",
    "cpu": "cpu",
}
"""Names of generations -> the compute capability of their data centre card."""
ORIGINAL = "16 bit"
"""The model as it is; every other candidate is the name of a shipped recipe."""
KEPT = "version: 1\nname: original\ncomponents: {}\n"
SPLITS = (2, 4, 8)
"""Numbers of GPUs that are tried where nothing fits."""


@dataclass(frozen=True)
class Candidate:
    """A row of the guide."""

    recipe: str
    what: str
    native: bool = False
    """Only worth it where the engine multiplies in these bits, and not by a kernel that it notes something about."""


CANDIDATES = {
    row.recipe: row
    for row in (
        Candidate(ORIGINAL, "the model as it is: nothing is lost, nothing to do"),
        Candidate("hopper-fp8", "FP8 weights and inputs, vision encoder and language layers", native=True),
        Candidate("int8", "INT8 weights and inputs, vision encoder and language layers; INT8 embedding", native=True),
        Candidate("turing-int8", "INT8 weights and inputs, vision encoder and language layers", native=True),
        Candidate(
            "blackwell-nvfp4", "FP4 weights by GPTQ and FP4 inputs, language layers; FP8 vision encoder", native=True
        ),
        Candidate("mixed", "4-bit language layers by GPTQ, INT8 vision encoder"),
        Candidate("mixed-awq", "4-bit language layers by AWQ, INT8 vision encoder"),
        Candidate("gptq-w4", "4-bit language layers by GPTQ, all else at 16 bits"),
        Candidate("awq-w4", "4-bit language layers by AWQ, all else at 16 bits"),
        Candidate("w3", "3-bit language layers by GPTQ, INT8 vision encoder"),
    )
}
EIGHT_BITS = ("hopper-fp8", "int8", "turing-int8")
FOUR_BITS = ("mixed", "mixed-awq", "gptq-w4", "awq-w4")
GUIDE: Mapping[str, tuple[str, ...]] = {
    "latency": (*EIGHT_BITS, "blackwell-nvfp4", *FOUR_BITS, "w3", ORIGINAL),
    "accuracy": (ORIGINAL, *EIGHT_BITS, "gptq-w4", "mixed", "awq-w4", "mixed-awq", "blackwell-nvfp4", "w3"),
    "balanced": (ORIGINAL, *FOUR_BITS, "blackwell-nvfp4", *EIGHT_BITS, "w3"),
}
"""By what comes first: the candidates, the preferred one in front. All goals know all candidates."""
WHY = {
    "latency": "latency comes first: fewer bytes are read for a token, and products run in the numbers they hold",
    "accuracy": "accuracy comes first: the most bits that fit, as 8 lose less than any 4; of 4, GPTQ's are the best",
    "balanced": "size and accuracy are balanced: 4 bits where most weights are, 8 where they cost little",
}
STAYS = "16 bits fit, so nothing has to be lost"


@dataclass(frozen=True)
class Choice:
    """A candidate on this model and GPU."""

    candidate: Candidate
    bytes_after: int = 0
    serving: Serving | None = None
    refused: str = ""
    """Why it cannot be made of this model, or why the engine does not take it."""
    slow: str = ""
    """What the engine notes about its kernels."""

    @property
    def emulated(self) -> bool:
        """Whether the engine takes it but does not multiply in its bits."""
        return self.candidate.native and bool(self.slow)

    @property
    def possible(self) -> bool:
        return self.serving is not None and not self.refused

    @property
    def fits(self) -> bool:
        return self.possible and self.serving is not None and self.serving.fits

    @property
    def verdict(self) -> str:
        """In words."""
        if self.refused or self.serving is None:
            return f"no: {self.refused}"
        if not self.serving.fits:
            return f"does not fit; {self.serving.what_fits()}"
        return "fits" + (f"; {self.slow}" if self.slow else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": None if self.candidate.recipe == ORIGINAL else self.candidate.recipe,
            "what": self.candidate.what,
            "bytes": self.bytes_after,
            "fits": self.fits,
            "verdict": self.verdict,
            "serving": self.serving.to_json() if self.serving else None,
        }


@dataclass(frozen=True)
class Recommendation:
    """All candidates in the order of the goal, and the one to take.

    choice: None where nothing fits; `reason` says what would.
    """

    model: str
    goal: Goal
    wish: Wish
    target: TargetSpec | None
    choices: tuple[Choice, ...]
    choice: Choice | None
    reason: str

    @cached_property
    def recipe(self) -> str | None:
        """The name of a shipped recipe; None where the model stays as it is, or nothing fits."""
        name = self.choice.candidate.recipe if self.choice else None
        return None if name == ORIGINAL else name

    @property
    def place(self) -> str:
        """Where it is to be served, and what, in words."""
        wish = self.wish
        gpus = f"{wish.tp} GPUs" if wish.tp > 1 else "1 GPU"
        memory = f" of {(wish.gpu_memory or 0) / 1e9:.2f} GB" + (" each" if wish.tp > 1 else "")
        images = f" and {wish.images} image{'s' * (wish.images > 1)}" if wish.images else ""
        kind = f" ({self.target.gpu})" if self.target and self.target.gpu else ""
        sequences = f"{wish.batch:,} sequence{'s' * (wish.batch > 1)}"
        return f"{gpus}{kind}{memory}, {sequences} of {wish.text_tokens:,} tokens of text{images}"

    def recipe_text(self) -> str | None:
        """A recipe that `quantize` takes: the shipped one with this target, the reason above it; None without one."""
        if self.recipe is None:
            return None
        lines = [
            f"# `vlmquant recommend` for {shown(Path(self.model).name)} on {self.place}:",
            f"# {shown(self.reason, limit=2000)}",
            f"# This is the shipped recipe {self.recipe}.",
        ]
        shipped_text = (shipped("recipes") / f"{self.recipe}.yaml").read_text(encoding="utf-8")
        body = [line for line in shipped_text.splitlines() if not line.startswith(("#", "target:"))]
        if self.target is not None:
            given = self.target.model_dump(mode="json", exclude_none=True)
            body.append(f"target: {{{', '.join(f'{key}: {value}' for key, value in given.items())}}}")
        return "\n".join([*lines, *body]) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "goal": self.goal,
            "target": self.target.model_dump(mode="json") if self.target else None,
            "recommended": self.choice.to_json()["recipe"] if self.choice else None,
            "fits": self.choice is not None,
            "reason": self.reason,
            "candidates": [choice.to_json() for choice in self.choices],
        }


def parse_gpu(text: str) -> str:
    """hopper -> sm_90; sm_90 and cpu stay. UsageError for anything else."""
    card = CARDS.get(text.lower(), text)
    try:
        parse_target("vllm", gpu=card, tp=1)
    except UsageError as error:
        names = ", ".join(CARDS)
        raise UsageError(
            f"--gpu: expected {names} or a compute capability such as sm_90, got '{shown(text)}'"
        ) from error
    return card


def recommend(
    model: str | Path, wish: Wish, *, goal: Goal, target: TargetSpec | None, trust_remote_code: bool = False
) -> Recommendation:
    """The candidates of the guide on a model (a directory or hub id) that is to be served as wished; no weight is read.

    target: the engine and card; None is held against memory alone. DoesNotFitError is not raised here: where nothing
    fits, `choice` is None. Raises InputError for a model of which nothing can be planned.
    """
    components = find_components(model, trust_remote_code=trust_remote_code)
    image_tokens = count_image_tokens(components.model_dir, wish.image_size, wish.images)
    served = partial(serve, image_tokens=image_tokens, cached=cache_layers(components))
    choices = tuple(_choice(CANDIDATES[name], components, wish, target, served) for name in GUIDE[goal])
    fitting = [one for one in choices if one.fits]
    chosen = next((one for one in fitting if not (goal == "latency" and one.emulated)), next(iter(fitting), None))
    if chosen is None:
        reason = _what_would(choices, components, wish, target, served)
    else:
        reason = _reason(chosen, choices, goal)
    return Recommendation(str(model), goal, wish, target, choices, chosen, reason)


def require(found: Recommendation) -> None:
    """DoesNotFitError where nothing fits."""
    if found.choice is None:
        raise DoesNotFitError(found.reason)


def _planned(
    candidate: Candidate, components: ComponentMap, target: TargetSpec | None
) -> tuple[ComponentMap, Plan, Contract | None]:
    if candidate.recipe == ORIGINAL:
        kept = parse_recipe(KEPT, name=ORIGINAL)
        plan = make_plan(components, kept)
        return as_written(components, plan, kept), plan, None
    recipe = load_recipe(candidate.recipe)
    if components.unknown and (needing := needs_class(recipe)):
        raise PlanError(f"transformers has no class for this model, and {needing[0]} needs one")
    written, plan = plan_components(components, recipe)
    return written, plan, check_plan(written, plan, target, format=recipe.output.format) if target else None


def _choice(
    candidate: Candidate,
    components: ComponentMap,
    wish: Wish,
    target: TargetSpec | None,
    served: Callable[..., Serving],
) -> Choice:
    try:
        written, plan, contract = _planned(candidate, components, target)
    except PlanError as error:
        return Choice(candidate, refused=first_line(error))
    refusals = contract.refusals if contract else ()
    notes = [one.what for one in contract.findings if one.rule == "kernel" and not one.refused] if contract else []
    return Choice(
        candidate,
        bytes_after=plan.bytes_after,
        serving=served(written, plan, wish),
        refused=f"{target.engine} refuses it, {refusals[0].what}" if target and refusals else "",
        slow="; ".join(dict.fromkeys(notes)),
    )


def _reason(chosen: Choice, choices: Sequence[Choice], goal: Goal) -> str:
    """Why this one, and why none of those that the goal prefers."""
    serving = chosen.serving
    assert serving is not None
    if chosen.candidate.recipe == ORIGINAL:
        sentences = ["no quantized candidate runs here" if goal == "latency" else STAYS]
    else:
        sentences = [WHY[goal], f"{chosen.candidate.recipe} is {chosen.candidate.what}"]
    room = int(USABLE * (serving.wish.gpu_memory or 0))
    sentences.append(
        f"weights {_gb(serving.weight_bytes)} and KV cache {_gb(serving.cache_bytes)} of the {_gb(room)} that an "
        f"engine uses, up to a batch of {serving.largest_batch:,} at this length"
    )
    sentences += [_passed_over(one) for one in choices[: choices.index(chosen)]]
    if chosen.slow:
        sentences.append(f"note that {chosen.slow}")
    return "; ".join(sentences)


def _passed_over(choice: Choice) -> str:
    name = choice.candidate.recipe
    if choice.refused:
        return f"not {name}, {choice.refused}"
    if choice.fits:
        return f"not {name}, {choice.slow}"
    assert choice.serving is not None
    return f"not {name}, whose {_gb(choice.serving.weight_bytes)} and {_gb(choice.serving.cache_bytes)} do not fit"


def _what_would(
    choices: Sequence[Choice],
    components: ComponentMap,
    wish: Wish,
    target: TargetSpec | None,
    served: Callable[..., Serving],
) -> str:
    """What would fit, where nothing does: of the smallest candidate that the engine takes."""
    able = [one for one in choices if one.possible]
    if not able:
        told = "; ".join(f"{one.candidate.recipe}: {one.refused}" for one in choices)
        return f"no candidate can be served: {told}"
    smallest = min(able, key=lambda one: one.serving.weight_bytes if one.serving else 0)
    serving = smallest.serving
    assert serving is not None
    needed = _gb_up(ceil((serving.weight_bytes + serving.cache_bytes + 1) / USABLE))
    would = [f"a GPU of {needed}" if wish.tp == 1 else f"{wish.tp} GPUs of {needed} each"]
    for tp in SPLITS:
        if tp <= wish.tp:
            continue
        split = replace(wish, tp=tp)
        shared = target.model_copy(update={"tp": tp}) if target else None
        again = (_choice(one.candidate, components, split, shared, served) for one in able)
        if any(one.fits for one in again):
            would.append(f"{tp} GPUs of this size (--tp {tp})")
            break
    fewer = serving.what_fits()
    less = f"; on this one {fewer}" if "would fit" in fewer else ""
    return (
        f"nothing fits: the smallest that can be served, {smallest.candidate.recipe}, takes "
        f"{_gb(serving.weight_bytes)} of weights and {_gb(serving.cache_bytes)} of KV cache, and an engine uses "
        f"{_gb(int(USABLE * (wish.gpu_memory or 0)))}; {' or '.join(would)} would do{less}"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _gb_up(count: int) -> str:
    """Never less than it is, so that what is asked for is enough."""
    unit, name = (1e9, "GB") if count >= 1e7 else (1e6, "MB")
    return f"{ceil(100 * count / unit) / 100:.2f} {name}"
