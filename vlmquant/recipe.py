"""Recipes: what a user wants of each component of a model, as data. Validated once, frozen, unknown keys refused."""

import fnmatch
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlmquant import reading
from vlmquant.errors import LINE_CHARACTERS, RecipeError, UsageError, shown
from vlmquant.nearest import did_you_mean
from vlmquant.thresholds import THRESHOLDS, option

if TYPE_CHECKING:
    import yaml

RECIPE_MAX_BYTES = 1_000_000
ERRORS_TOLD = 20
PLAIN_KINDS = frozenset({"map", "seq", "str", "int", "float", "bool", "null"})
"""YAML's own kinds of values that a recipe may hold."""

Method = Literal["rtn", "search", "int8", "gptq", "awq", "awq+gptq", "auto", "bitsandbytes"]
METHODS: tuple[str, ...] = get_args(Method)
SEARCHED = frozenset({"search", "int8"})
"""Methods that round to nearest on searched scales."""
WITH_FEEDBACK, WITH_FOLDS = frozenset({"gptq", "awq+gptq", "auto"}), frozenset({"awq", "awq+gptq", "auto"})
"""Methods that carry the errors of columns on, or may; that scale input channels, for which what comes before is
divided, or may."""
AIMING = WITH_FEEDBACK | WITH_FOLDS
"""Methods that may round what makes up for the errors of earlier layers."""
ComponentName = Literal["vision_encoder", "projector", "embedding", "language", "lm_head"]
COMPONENTS: tuple[str, ...] = get_args(ComponentName)


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


def _number(value: Any) -> Any:
    """YAML 1.1, which our library reads, takes 1e-4 for text; YAML 1.2 and everybody else for a number."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float):  # which equal whole numbers, so that a Literal takes them
        raise ValueError("input should be a valid integer")
    return value


Number = Annotated[float, BeforeValidator(_number)]


Activations = Literal["none", "dynamic-int8", "static-int8", "dynamic-fp8", "dynamic-fp8-g128", "static-fp8", "nvfp4"]


class Scheme(Data):
    """How a weight is stored, and whether its inputs are quantized as well."""

    bits: Annotated[Literal[2, 3, 4, 5, 6, 7, 8], BeforeValidator(_whole)]
    """Bits of one weight code."""
    type: Literal["int", "float"] = "int"
    """float: FP8 (E4M3) or FP4 (E2M1), by bits."""
    group_size: Annotated[int, Field(ge=16, le=4096)] | None = 128
    """Input channels that share one scale; null for one scale per output channel."""
    group_rows: Annotated[int, Field(ge=1, le=4096)] = 1
    """Output channels that share one scale."""
    symmetric: bool = True
    """Codes centred on zero; false adds an integer zero point per group."""
    scales: Literal["model", "e4m3", "e8m0"] = "model"
    """What scales are stored in: the model's dtype; FP8 below one float32 scale of the weight (NVFP4); powers of two
    (MXFP4)."""
    activations: Activations = "none"
    """What inputs are rounded to at run time, with a scale of its own for every token, every 128 inputs of one (g128),
    or every 16 (nvfp4: below one scale for all, which calibration finds); static: with one for all from calibration."""

    @model_validator(mode="after")
    def _supported(self) -> "Scheme":
        if self.int8_inputs and not (
            self.type == "int" and self.bits == 8 and self.symmetric and self.group_size is None
        ):
            raise ValueError(
                f"{self.activations} activations need type: int, bits: 8, group_size: null, symmetric: true"
            )
        form = (self.type, self.bits, self.group_size, self.group_rows, self.scales)
        if self.type == "float":
            if form not in FLOAT_FORMS or not self.symmetric:
                names = ", ".join(name for name, scheme in SHORT_SCHEMES.items() if scheme.type == "float")
                raise ValueError(f"a floating point scheme that nobody stores; the schemes are {names}")
            if self.activations not in ("none", *FLOAT_FORMS[form]):
                raise ValueError(f"activations: {self.activations} do not go with these weights")
        elif (self.group_rows, self.scales) != (1, "model"):
            raise ValueError("integer weights need group_rows: 1 and scales: model")
        elif self.activations == "dynamic-fp8" and (self.bits, self.group_size, self.symmetric) != (4, 128, True):
            raise ValueError("dynamic-fp8 activations need bits: 4, group_size: 128, symmetric: true")
        elif self.activations in ("dynamic-fp8-g128", "static-fp8", "nvfp4"):
            raise ValueError(f"{self.activations} activations need weights of schemes fp8-block, fp8-static or nvfp4")
        return self

    @property
    def int8_inputs(self) -> bool:
        return self.activations.endswith("-int8")

    @property
    def floats(self) -> bool:
        """Whether it needs hardware with floating point of 8 or 4 bits."""
        return self.type == "float" or self.activations.startswith("dynamic-fp8")

    @property
    def label(self) -> str:
        """The short form, such as w4a16-g128 or w8a8-dynamic."""
        if self.type == "int" and self.activations == "none":
            group = "" if self.group_size is None else f"-g{self.group_size}"
            return f"w{self.bits}a16{group}{'' if self.symmetric else '-asym'}"
        known = (name for name, scheme in SHORT_SCHEMES.items() if scheme == self)
        return next(known, f"fp{self.bits}a16{'-block' if self.group_rows > 1 else ''}")


FLOAT_FORMS: dict[tuple[str, int, int | None, int, str], tuple[Activations, ...]] = {
    ("float", 8, None, 1, "model"): ("dynamic-fp8", "static-fp8"),
    ("float", 8, 128, 128, "model"): ("dynamic-fp8-g128",),
    ("float", 4, 16, 1, "e4m3"): ("nvfp4",),
    ("float", 4, 32, 1, "e8m0"): (),
}
"""Type, bits, group size, rows and scales of the floating point weights that files hold and engines run -> what inputs
may be rounded to with them."""

SHORT_SCHEMES: dict[str, Scheme] = {
    "w2a16": Scheme(bits=2),
    "w3a16": Scheme(bits=3),
    "w4a16": Scheme(bits=4),
    "w4a16-asym": Scheme(bits=4, symmetric=False),
    "w5a16": Scheme(bits=5),
    "w6a16": Scheme(bits=6),
    "w7a16": Scheme(bits=7),
    "w8a16": Scheme(bits=8, group_size=None),
    "w8": Scheme(bits=8, group_size=None),
    "w8a8-dynamic": Scheme(bits=8, group_size=None, activations="dynamic-int8"),
    "w8a8-static": Scheme(bits=8, group_size=None, activations="static-int8"),
    "w4afp8": Scheme(bits=4, activations="dynamic-fp8"),
    "fp8-dynamic": Scheme(type="float", bits=8, group_size=None, activations="dynamic-fp8"),
    "fp8-static": Scheme(type="float", bits=8, group_size=None, activations="static-fp8"),
    "fp8-block": Scheme(type="float", bits=8, group_rows=128, activations="dynamic-fp8-g128"),
    "nvfp4a16": Scheme(type="float", bits=4, group_size=16, scales="e4m3"),
    "nvfp4": Scheme(type="float", bits=4, group_size=16, scales="e4m3", activations="nvfp4"),
    "mxfp4a16": Scheme(type="float", bits=4, group_size=32, scales="e8m0"),
}
KEEP: Literal["fp16"] = "fp16"
"""Keep the weight at the model's own 16-bit dtype."""
BITSANDBYTES_SCHEMES = ("nf4", "bnb-int8")
SCHEME_NAMES = (*SHORT_SCHEMES, KEEP, *BITSANDBYTES_SCHEMES)
SCHEME_MEANINGS = {
    "w8a8": "w8a8-dynamic",
    "int8": "w8a8-dynamic",
    "w8a8-int8": "w8a8-dynamic",
    "smoothquant": "w8a8-dynamic",
    "w8a8-fp8": "fp8-dynamic",
    "fp8": "fp8-dynamic",
    "float8": "fp8-dynamic",
    "w3": "w3a16",
    "w4": "w4a16",
    "int4": "w4a16",
    "w4a16-sym": "w4a16",
    "w4a8-fp8": "w4afp8",
    "fp4": "nvfp4",
    "mxfp4": "mxfp4a16",
    "bf16": KEEP,
    "bfloat16": KEEP,
    "float16": KEEP,
    "none": KEEP,
    "keep": KEEP,
    "bnb-nf4": "nf4",
    "bnb-4bit": "nf4",
    "bnb-8bit": "bnb-int8",
}
"""What people call a scheme -> what it is called here."""


GROUPED = re.compile(r"w([2-8])a16-g([0-9]{2,4})(-asym)?")
"""A scheme by its label, such as w4a16-g64."""


def _named_scheme(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value == KEEP or value in BITSANDBYTES_SCHEMES:
        return value
    if grouped := GROUPED.fullmatch(value):
        return {"bits": int(grouped[1]), "group_size": int(grouped[2]), "symmetric": grouped[3] is None}
    if value not in SHORT_SCHEMES:
        hint = did_you_mean(value, SCHEME_NAMES, SCHEME_MEANINGS)
        raise ValueError(f"unknown scheme '{shown(value)}'{hint}; known: {', '.join(SCHEME_NAMES)}")
    return SHORT_SCHEMES[value]


SchemeOrName = Annotated[Scheme | Literal["fp16", "nf4", "bnb-int8"], BeforeValidator(_named_scheme)]


class RtnOptions(Data):
    """Rounding to nearest."""

    scale_search: Literal["minmax", "mse"] = "minmax"
    """What a group's scale minimises: nothing (extremes), or sum of d^2. Neither needs data."""


class SearchOptions(Data):
    """Rounding to nearest on searched scales (methods search and int8), where inputs are rounded as well."""

    fold: bool | None = None
    """Move what makes some input channels large into the weights, where a norm or a linear before can take the inverse
    (SmoothQuant, arXiv:2211.10438), by as much as loses least. Null: where all inputs of a linear are rounded to
    integers by one scale (static-int8), which a few massive ones ruin."""
    correct_bias: bool = False
    """Make up, in a layer's bias, for what rounding does to its outputs on average."""
    exempt_above: Annotated[Number, Field(gt=1)] | None = None
    """Keep at 16 bits what loses more than so many times the median of its kind (its fellows in other layers): found by
    a pass through the component before the others, which takes its time twice."""


Target = Literal["weights", "outputs"]


class GptqOptions(Data):
    """GPTQ (arXiv:2210.17323), as static-group LDLQ."""

    damping: Annotated[Number, Field(gt=0, le=1)] = 0.01
    """Ridge added to the Hessian's diagonal, as a fraction of its mean."""
    shrinkage: Annotated[Number, Field(ge=0, le=10)] | None = None
    """Added to each input's own second moment, as a fraction of it, where errors are fed back: how inputs go together
    in few samples holds less in others, so that it counts for as much less. Null: by the number of tokens (Schaefer and
    Strimmer, 2005) with target: outputs, and 0 with target: weights, which loses no less by it."""
    activation_order: bool = True
    """Quantize columns by falling Hessian diagonal; groups keep their original columns: nothing is permuted on disk."""
    scale_search: Literal["minmax", "mse", "weighted"] = "weighted"
    """What a group's scale minimises: nothing (extremes), sum of d^2, or sum of E[x^2] |d|^3."""
    signed_scales: bool = True
    """Whether a group's scale may be below 0 on a symmetric grid, whose codes reach further to one side."""
    target: Target | None = None
    """What is rounded: a layer's own weights; or those by which it puts out most nearly, from what the quantized model
    gives it, what the original's layer does (QEP, arXiv:2504.09629), as far as samples held out say that it helps.
    Null: as the recipe's effort says, and weights in a mixture of experts, of which a second pass would aim attention
    alone."""
    loss: Literal["layer", "answers"] | None = None
    """What rounding keeps small: the error of each layer's outputs, all alike; or, to second order, what it does to the
    answers: outputs count, and make up for each other, as their gradients say (YAQA, arXiv:2505.22988). That takes
    gradients of the whole model, and memory for them, before the first layer is rounded; experts of a mixture, most of
    which few answers reach, are rounded as for layer. Null: as the recipe's effort says, and as for layer where
    gradients do not go through a model, or do not fit into memory."""
    output_damping: Annotated[Number, Field(gt=0, le=1000)] = 1.0
    """Where answers decide: ridge added to the second moments of gradients, as a fraction of their diagonal's mean. The
    higher it is, the more alike do all outputs count, and the less does it matter which samples were looked at."""


class AwqOptions(Data):
    """AWQ (arXiv:2306.00978)."""

    grid_points: Annotated[int, Field(ge=2, le=100)] = 20
    """Exponents tried between 0 and 1 in the search of the per-channel scales."""
    clip: bool = True
    """Search the clipping of each group after the scales."""
    signed_scales: bool = True
    """Whether a group's scale may be below 0 on a symmetric grid, whose codes reach further to one side."""
    damping: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Ridge on the second moments that weigh the error, as a fraction of their mean."""
    target: Target | None = None
    """What is clipped and rounded once channels are scaled: as gptq.target."""


LAYER_RANGE = re.compile(r"(-?[0-9]{1,9}|[0-9]{1,9}%)?:(-?[0-9]{1,9}|[0-9]{1,9}%)?")


def _edge(text: str, layers: int) -> int | None:
    if not text:
        return None
    return layers * int(text[:-1]) // 100 if text.endswith("%") else int(text)


class Override(Data):
    """A change of scheme or method for some layers or modules; a later override wins."""

    layers: str = ":"
    """Half-open range of layer indices as in Python: "0:16", "-1:", ":"; an edge may be a share of them: "0:50%"."""
    modules: tuple[str, ...] = ("*",)
    """Globs on the module's name inside its layer, such as mlp.down_proj or self_attn.*."""
    scheme: SchemeOrName | None = None
    method: Method | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if not isinstance(value, str) or not LAYER_RANGE.fullmatch(value):
            raise ValueError(f'expected a range such as "0:16" or "-1:" in quotes, got {shown(repr(value))}')
        return value

    def covers(self, layer: int, layers: int, module: str) -> bool:
        first, last = (_edge(edge, layers) for edge in self.layers.split(":"))
        return layer in range(*slice(first, last).indices(layers)) and any(
            fnmatch.fnmatchcase(module, glob) for glob in self.modules
        )


def _short_component(value: Any) -> Any:
    return {"scheme": value} if isinstance(value, str) else value


class ComponentSpec(Data):
    """What becomes of one component."""

    scheme: SchemeOrName = KEEP
    method: Method = "rtn"
    keep: tuple[str, ...] = ()
    """Globs on module names inside the component that stay 16 bit."""
    overrides: tuple[Override, ...] = ()
    rtn: RtnOptions = RtnOptions()
    search: SearchOptions = SearchOptions()
    gptq: GptqOptions = GptqOptions()
    awq: AwqOptions = AwqOptions()


Component = Annotated[ComponentSpec, BeforeValidator(_short_component)]


class Components(Data):
    vision_encoder: Component = ComponentSpec()
    projector: Component = ComponentSpec()
    embedding: Component = ComponentSpec()
    language: Component = ComponentSpec()
    lm_head: Component = ComponentSpec()


class Fallback(Data):
    """What a layer gets whose shape its scheme does not fit; the plan reports every use."""

    when_indivisible: tuple[Literal["group_size", "fp8-dynamic", "w8a8-dynamic", "w8a16", "fp16"], ...] = (
        "group_size",
        "fp8-dynamic",
        "w8a8-dynamic",
        "fp16",
    )
    """Tried in order: a smaller group size that divides (of integers), 8 bits per channel of the scheme's own type,
    keep. An empty list makes it an error."""


def _percent(value: Any) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*%\s*", value)):
        return float(match[1]) / 100
    return value


class ExpertOptions(Data):
    """Which calibration tokens the experts of a mixture are quantized on."""

    tokens: Literal["routed", "blend", "all"] = "blend"
    """routed: those that the router gives an expert. blend: an expert with fewer than `enough_tokens` is shown as many
    of the layer's others as are missing, evenly drawn. all: every token, for every expert (which costs as many times
    the work as there are experts for each one chosen)."""
    enough_tokens: Annotated[int, Field(ge=1)] | None = None
    """Null: two for each of an expert's inputs."""
    others_count: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """How much a token of another expert counts, beside 1 for one's own."""
    least_tokens: Annotated[int, Field(ge=1)] = 4
    """An expert with fewer of its own starves."""
    max_starving: Annotated[Number, BeforeValidator(_percent), Field(ge=0, le=1)] = 0.05
    """The largest share of a layer's experts that may starve: above it the run ends with exit code 7."""


class TokenWeights(Data):
    """How much tokens of the language model count in what a layer is calibrated on: all alike where all are 1 and
    nothing is clipped (benchmarks/accuracy/LOG.md, benchmarks/results/token_gradients.md)."""

    image: Annotated[Number, Field(ge=0, le=100)] = 0.1
    """Those whose place image features take. What is asked of a model are answers, and there are many more of these."""
    image_share: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Of an image's tokens, those that are looked at, spread evenly; they count for the others, too. Images have many
    tokens that are much alike, and what is summed over them is most of the work."""
    prompt: Annotated[Number, Field(ge=0, le=100)] = 1.0
    """Those of what is asked, with its template."""
    answer: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """Those of the sample's answer."""
    clip: Annotated[Number, Field(gt=0)] | None = None
    """Tokens whose inputs are larger, in the mean square, than so many times the median token's count for as much less:
    a few massive ones would else decide how a layer is rounded, and the next norm divides their errors away. Null: 2
    where the original's outputs are the target (see gptq.target), and none is clipped where weights are, which lose
    more by it. A large number clips none."""

    @property
    def equal(self) -> bool:
        return self.image == self.image_share == self.prompt == self.answer == 1


class CalibrationSpec(Data):
    set: str = "default"
    """Name of a shipped set or path of a set's folder."""
    samples: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Null: 128, and 512 at effort high."""
    seed: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    """A longer sample is left out and counted; an image's tokens are never cut."""
    strata: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """Samples per task; null shares `samples` among the set's tasks in proportion to their size."""
    order: Literal["hashed", "file"] = "hashed"
    """Which samples of a task are taken: hashed ranks them by a hash of seed and id, file takes the first ones."""
    experts: ExpertOptions = ExpertOptions()
    token_weights: TokenWeights = TokenWeights()

    def at(self, effort: "Effort") -> "CalibrationSpec":
        """With as many samples as an effort takes, where nothing else is said."""
        return self if self.samples else self.model_copy(update={"samples": SAMPLES[effort]})

    @property
    def count(self) -> int:
        """Samples that are asked for."""
        return sum(self.strata.values()) if self.strata else self.samples or SAMPLES["default"]


def _short_kv_cache(value: Any) -> Any:
    return {"dtype": value} if isinstance(value, str) else value


class KvCacheSpec(Data):
    """How an engine is to store the keys and values of the language model's attention."""

    dtype: Literal["fp8"]
    """fp8: float8_e4m3fn, by scales from the calibration set."""
    strategy: Literal["tensor", "head"] = "tensor"
    """tensor: one scale for a layer's keys and one for its values; head: one for each head."""


WordFormat = Literal["gptq", "gptq_v2", "awq"]
WORD_FORMATS: tuple[str, ...] = get_args(WordFormat)
"""Formats that pack codes and zero points, always both, in words, with scales in float16."""


class OutputSpec(Data):
    format: Literal["compressed-tensors", WordFormat, "bitsandbytes"] = "compressed-tensors"
    """gptq, gptq_v2 and awq hold the language layers in one scheme (4 bits, gptq also 8) and nothing else quantized."""
    max_shard_size: Annotated[int, Field(ge=1_000_000)] = 4_000_000_000
    """Bytes."""
    kept: Literal["fp16", "fp32"] = "fp16"
    """fp16: kept weights of more bits are stored in the model's 16-bit dtype, bfloat16 if it has none. fp32: as they
    are."""


class Thresholds(Data):
    """What a gate may bound (thresholds.THRESHOLDS says what each is); a null threshold is not judged."""

    max_perplexity_increase: Annotated[Number, BeforeValidator(_percent), Field(ge=0)] | None = None
    """Relative; "2%" or 0.02."""
    max_bleu_drop: Annotated[Number, Field(ge=0)] | None = None
    """BLEU-4 points (0 to 100)."""
    max_kl: Annotated[Number, Field(ge=0)] | None = None
    """Mean KL(reference || quantized) over answer tokens, nats."""
    max_flip_rate: Annotated[Number, BeforeValidator(_percent), Field(ge=0, le=1)] | None = None
    max_exact_match_drop: Annotated[Number, Field(ge=0, le=100)] | None = None
    """Points (0 to 100) of exact match on short answers."""

    def thresholds(self) -> dict[str, float]:
        """The thresholds that are judged, by name."""
        found = {name: getattr(self, name) for name in THRESHOLDS}
        return {name: value for name, value in found.items() if value is not None}


class GateSpec(Thresholds):
    """Thresholds of `vlmquant gate`, over all samples and within strata."""

    max_perplexity_increase: Annotated[Number, BeforeValidator(_percent), Field(ge=0)] | None = 0.02
    """Relative; "2%" or 0.02."""
    strata: dict[str, Thresholds] = {}
    """Thresholds by task, such as {object: {max_perplexity_increase: 5%}}, beside those of all samples."""
    unmeasured: Literal["fail", "skip"] = "fail"
    """What becomes of a threshold that the samples say nothing of, as the set has no captions or short answers, or none
    were generated. skip: it is told and left out."""
    alpha: Annotated[Number, Field(gt=0, lt=0.5)] = 0.05
    """Error rate of each one-sided test."""

    def judged(self) -> list[tuple[str | None, str, float]]:
        """Stratum (None: all samples), name and margin of everything that is judged."""
        parts: list[tuple[str | None, Thresholds]] = [(None, self), *self.strata.items()]
        return [(stratum, name, margin) for stratum, part in parts for name, margin in part.thresholds().items()]


class TargetSpec(Data):
    """Where the result is to be served: what is written is held against what that engine takes, before any work."""

    engine: Literal["vllm", "sglang", "transformers"]
    gpu: Annotated[str, Field(pattern=r"^(sm_[0-9]{2,3}[a-z]?|cpu)$")] | None = None
    """Compute capability such as sm_90 (H100), sm_89 (L4, RTX 40), sm_80 (A100), sm_75 (T4), sm_100 (B200); or cpu."""
    tp: Annotated[int, Field(ge=1, le=1024)] = 1
    """Ranks of tensor parallelism."""


class FamilySpec(Data):
    """Where the parts of a model are that vlmquant does not know, or guesses wrong: names of modules or parameters."""

    vision_encoder: Annotated[tuple[str, ...], Field(min_length=1)]
    projector: tuple[str, ...] = ()
    language: str
    embedding: str = ""
    """Empty: `embed_tokens` inside the language model."""
    lm_head: str = "lm_head"
    other: tuple[str, ...] = ()
    """Kept as it is, as is everything that lies in none of these."""
    runs: str = ""
    """The part whose forward pass takes image and text, where it is not the whole model."""


Effort = Literal["fast", "default", "high"]
TARGETS: dict[Effort, Target] = {"fast": "weights", "default": "outputs", "high": "outputs"}
"""What GPTQ and AWQ aim at, by effort: the outputs of the original take a second pass through the layers, and lose
less."""
LOSSES: dict[Effort, Literal["layer", "answers"] | None] = {"fast": "layer", "default": None, "high": "answers"}
"""What GPTQ keeps small, by effort: answers take gradients of the whole model. None: the answers in a language model of
at most SMALL_MODEL weights, and otherwise the layer."""
SAMPLES: dict[Effort, int] = {"fast": 128, "default": 128, "high": 512}
"""Calibration samples, by effort: with four times as many 4 bits lose 29 % less, in three times the time
(benchmarks/accuracy/LOG.md)."""
SMALL_MODEL = 1 << 29
"""Weights in the linears of a language model that loses most by few bits, and whose gradients are soon there."""


UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for middle, base in (("", 1000), ("i", 1024))
}


def bytes_of(text: str) -> int | None:
    """ "24GB" -> 24,000,000,000; "1.5GiB" -> 1,610,612,736; None for what is no such size."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]i?)?B", text.strip(), re.IGNORECASE)
    unit = ((found[2] or "").upper().replace("I", "i") + "B") if found else ""
    return (int(float(found[1]) * UNITS[unit]) or None) if found else None


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if (count := bytes_of(value)) is None:
        raise ValueError("expected a size such as 2GB or 1.5GiB")
    return count


class BudgetSpec(Data):
    """What the linears of the components that a recipe quantizes may take, or lose: which of them gets which scheme is
    chosen by what each loses. One of bits_per_weight, bytes and max_kl."""

    bits_per_weight: Annotated[Number, Field(gt=0, le=16)] | None = None
    """Of these linears, with scales and zero points, on average; those that stay at 16 bits included."""
    bytes: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] | None = None
    """Of the whole result, such as 2GB; what the recipe keeps included."""
    max_kl: Annotated[Number, Field(gt=0)] | None = None
    """Predicted KL(original || quantized), nats an answer token; the fewest bytes are chosen that lose no more."""
    schemes: tuple[SchemeOrName, ...] | None = None
    """To choose from, where a component's method can make them; null for 3, 4 and 8 bits, 4 in groups of 128, 64 and 32
    inputs, and fp16. What a target does not take is left out. A component's own scheme is always one of them."""

    @model_validator(mode="after")
    def _has_one_limit(self) -> "BudgetSpec":
        if len(self.limit) != 1:
            raise ValueError("give one of bits_per_weight, bytes and max_kl")
        if self.schemes is not None and any(isinstance(one, str) and one != KEEP for one in self.schemes):
            raise ValueError("bitsandbytes holds one scheme for all; leave nf4 and bnb-int8 out of schemes")
        return self

    @property
    def limit(self) -> dict[str, float]:
        """The one that is given, by name."""
        asked = {name: getattr(self, name) for name in ("bits_per_weight", "bytes", "max_kl")}
        return {name: value for name, value in asked.items() if value is not None}


class Recipe(Data):
    version: Annotated[Literal[1], BeforeValidator(_whole)] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    components: Components
    family: FamilySpec | None = None
    """For a model whose parts are not where vlmquant looks for them."""
    budget: BudgetSpec | None = None
    """Chooses the scheme of every linear of the components that are quantized, by what each loses. Null: as they are
    named."""
    effort: Effort = "default"
    """fast: layers are calibrated on the inputs of the quantized model alone, each for its own outputs (gptq.target:
    weights, gptq.loss: layer), in half the time, and lose more. default: for the outputs of the original, and a
    language model of up to about 500 million weights by what they do to the answers (gptq.loss: answers). high: on four
    times as many samples, unless calibration.samples or strata say how many, the answers decide in every model, and
    the finished checkpoint is polished (as `vlmquant polish` does it, on three answers of each sample), which takes
    several times as long, and memory for gradients of the whole model."""
    fallback: Fallback = Fallback()
    calibration: CalibrationSpec = CalibrationSpec()
    kv_cache: Annotated[KvCacheSpec, BeforeValidator(_short_kv_cache)] | None = None
    """Null: the engine's default."""
    output: OutputSpec = OutputSpec()
    gate: GateSpec = GateSpec()
    target: TargetSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        uses = {spec.scheme in BITSANDBYTES_SCHEMES for _, spec in self.specs() if spec.scheme != KEEP}
        if True in uses and (False in uses or self.output.format != "bitsandbytes"):
            raise ValueError("nf4 and bnb-int8 need output: {format: bitsandbytes} and no other scheme beside them")
        if self.output.format == "bitsandbytes" and True not in uses:
            raise ValueError("output format bitsandbytes needs a component with scheme nf4 or bnb-int8")
        if self.output.format != "compressed-tensors" and self.kv_cache:
            raise ValueError(
                f"output format {self.output.format} has no place for the scales of kv_cache; leave one out"
            )
        if self.budget:
            self._check_budget()
        return self

    def _check_budget(self) -> None:
        if self.output.format != "compressed-tensors":
            raise ValueError(f"output format {self.output.format} holds one scheme for all; a budget chooses several")
        quantized = [spec for name, spec in self.specs() if spec.scheme != KEEP and name != "embedding"]
        if not quantized:
            raise ValueError("a budget needs a component with a scheme: its method is taken, and its scheme chosen")
        if any(override.scheme is not None for spec in quantized for override in spec.overrides):
            raise ValueError("a budget chooses schemes; leave them out of overrides, or list modules under keep")

    def specs(self) -> Iterator[tuple[str, ComponentSpec]]:
        """What becomes of each component."""
        for name in COMPONENTS:
            yield name, getattr(self.components, name)


def shipped(kind: Literal["recipes", "calibration"]) -> Path:
    """Folder of the recipes or calibration sets that are shipped: packaged, or beside the package in a checkout."""
    packaged = Path(__file__).parent / "_data" / kind
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / kind


DEFAULT_RECIPE = "mixed"
"""Where none is named."""


@dataclass(frozen=True)
class ShippedRecipe:
    """One that comes with vlmquant."""

    name: str
    summary: str
    """The first line of its file."""
    file: Path


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """By name."""
    found = {}
    for file in sorted(shipped("recipes").glob("*.yaml")):
        with file.open(encoding="utf-8") as lines:
            found[file.stem] = ShippedRecipe(file.stem, next(lines, "").removeprefix("#").strip(), file)
    return found


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe file, or a shipped recipe by name (such as "mixed").

    Raises RecipeError whose message reads `file:line:column: path: what is wrong`.
    """
    path = Path(source)
    if not os.path.exists(path) or os.path.isdir(path):
        path = shipped("recipes") / f"{source}.yaml"
        if "/" in str(source) or not os.path.isfile(path):
            names = sorted(file.stem for file in shipped("recipes").glob("*.yaml"))
            given, hint = shown(source, limit=LINE_CHARACTERS), did_you_mean(str(source), names)
            raise RecipeError(f"{given}: no such recipe file{hint}; shipped recipes: {', '.join(names)}")
    return parse_recipe(_read_text(path), name=str(path))


def load_family(path: Path) -> FamilySpec:
    """Read a file with the keys of a recipe's `family:`. RecipeError as `load_recipe`'s."""
    if not os.path.exists(path):
        keys = ", ".join(FamilySpec.model_fields)
        raise RecipeError(f"{shown(path, limit=LINE_CHARACTERS)}: no such file; give a YAML file with the keys {keys}")
    return _parse(FamilySpec, _read_text(path), name=str(path))


def load_gate(path: Path) -> GateSpec:
    """Read a file with the keys of a recipe's `gate:`. RecipeError as `load_recipe`'s."""
    if not os.path.exists(path):
        keys = ", ".join(GateSpec.model_fields)
        raise RecipeError(f"{shown(path, limit=LINE_CHARACTERS)}: no such file; give a YAML file with the keys {keys}")
    return _parse(GateSpec, _read_text(path), name=str(path))


def parse_thresholds(given: Mapping[str, str | None]) -> dict[str, float | None]:
    """Thresholds of a command line, by name, those that were given: numbers, percentages, or none. UsageError else."""
    found: dict[str, float | None] = {}
    for name, text in given.items():
        if text is None:
            continue
        try:
            value = None if text == "none" else text
            found[name] = getattr(Thresholds.model_validate({name: value}, strict=True), name)
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise UsageError(
                f"{option(name)} {shown(text)}: {what[:1].lower()}{what[1:]}; give {THRESHOLDS[name].example}, or none"
            ) from error
    return found


def parse_scheme(name: str) -> Scheme | str:
    """A scheme of a command line, such as w4a16-g64. UsageError for what is none."""
    try:
        return ComponentSpec.model_validate({"scheme": name}).scheme
    except ValidationError as error:
        raise UsageError(reading.told(error)) from error


def replace_budget(recipe: Recipe, limit: Mapping[str, float]) -> Recipe:
    """The recipe with the limit of a command line, and the schemes of the budget that it had. UsageError where that is
    no budget, or none for this recipe."""
    own = {} if recipe.budget is None else recipe.budget.model_dump(mode="json", include={"schemes"})
    try:
        return Recipe.model_validate(recipe.model_dump(mode="json") | {"budget": own | dict(limit)})
    except ValidationError as error:
        raise UsageError(f"budget: {reading.told(error)}") from error


def _read_text(path: Path) -> str:
    return reading.read_text(path, error=RecipeError, max_bytes=RECIPE_MAX_BYTES)


def parse_target(engine: str, *, gpu: str | None, tp: int) -> TargetSpec:
    """A target of a command line. UsageError for an engine or a card that we do not know."""
    try:
        return TargetSpec.model_validate({"engine": engine, "gpu": gpu, "tp": tp})
    except ValidationError as error:
        raise UsageError(f"target: {reading.told(error)}; give --engine vllm, and --gpu sm_90 or cpu") from error


def recipe_text(recipe: Recipe) -> str:
    """The recipe as a file of it holds it, without what is as it is by default."""
    import yaml

    content = {"version": recipe.version, **recipe.model_dump(mode="json", exclude_defaults=True)}
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120))


def parse_recipe(text: str, *, name: str) -> Recipe:
    """Parse recipe text; `name` stands for the file in messages."""
    return _parse(Recipe, text, name=name)


M = TypeVar("M", bound=Data)


def _parse(model: type[M], text: str, *, name: str) -> M:
    import yaml

    refuse = functools.partial(_refuse_tricks, name=name)
    root, value = reading.compose_yaml(text, where=name, error=RecipeError, refuse=refuse)
    if not isinstance(root, yaml.MappingNode):
        kind = {Recipe: "recipe", FamilySpec: "family"}.get(model, "gate")
        raise RecipeError(
            f"{name}:1:1: a {kind} is a mapping with keys such as {', '.join(list(model.model_fields)[1:3])}"
        )
    try:
        return model.model_validate(_frozen(value), strict=True)
    except ValidationError as error:
        told = _told(error)
        lines = [_explain(item, root, model, name=name) for item in told[:ERRORS_TOLD]]
        more = len(told) - ERRORS_TOLD
        raise RecipeError("\n".join([*lines, *([f"and {more:,} more of the kind"] if more > 0 else [])])) from error


def _frozen(value: Any) -> Any:
    """The same nested value with tuples for lists, as the models have them."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _told(error: ValidationError) -> list[Any]:
    """The errors worth telling: a scheme written as a mapping is judged as one, not as a name that it is not either."""
    found: list[Any] = error.errors()
    return [
        item for item in found if not (item["type"] == "literal_error" and isinstance(item["input"], dict))
    ] or found


def _refuse_tricks(root: "yaml.Node", *, name: str) -> None:
    """Refuse duplicate keys (YAML lets the last one win), aliases and merges (a reader cannot see what they stand for),
    keys that are no words, and values of other kinds than PLAIN_KINDS: dates, sets, bytes, objects."""
    import yaml

    seen: set[int] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            raise _at(node, name, "YAML aliases are not allowed in recipes; write the value out")
        seen.add(id(node))
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in PLAIN_KINDS:
            raise _at(
                node, name, f"a value of YAML's kind '{shown(kind)}' is not allowed in recipes; put text in quotes"
            )
        if isinstance(node, yaml.SequenceNode):
            todo += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    raise _at(
                        key, name, "a key must be a word; lists, mappings and merges (<<) are not allowed as keys"
                    )
                if key.value in keys:
                    raise _at(key, name, f"key '{shown(key.value)}' stands twice (first on line {keys[key.value]})")
                keys[key.value] = key.start_mark.line + 1
            todo += [value for _, value in reversed(node.value)]


def _at(node: "yaml.Node", name: str, what: str) -> RecipeError:
    return RecipeError(f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: {what}")


def _locate(root: "yaml.Node", loc: tuple[int | str, ...]) -> "tuple[yaml.Node, list[str]]":
    """The deepest YAML node that an error's location reaches, and the path to it in the user's own words."""
    import yaml

    node, path = root, []
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == part]
            if not pairs:
                continue  # names of union branches stand in pydantic's location but not in the file
            node = pairs[0][1]
            path.append(str(part))
            if loc[-1] == part and not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            path.append(str(part))
    return node, path


def _explain(error: Any, root: "yaml.Node", model: type[BaseModel], *, name: str) -> str:
    loc = tuple(error["loc"])
    if error["type"] == "extra_forbidden":
        parent, path = _locate(root, loc[:-1])
        key = str(loc[-1])
        node = next((k for k, _ in getattr(parent, "value", []) if k.value == key), parent)
        what = f"unknown key '{shown(key)}'{did_you_mean(key, _keys_at(path, model))}"
    elif error["type"] == "missing":
        node, path = _locate(root, loc[:-1])
        what = f"key '{loc[-1]}' is missing"
    else:
        node, path = _locate(root, loc)
        message = error["msg"].removeprefix("Value error, ").replace("tuple", "list")
        plain = isinstance(error["input"], str | int | float | bool)
        got = f" (got {shown(repr(error['input']))})" if plain else ""
        what = message[:1].lower() + message[1:] + ("" if "got " in message or "unknown scheme" in message else got)
        if error["type"] == "literal_error":
            what += did_you_mean(str(error["input"]), re.findall("'([^']+)'", error["ctx"]["expected"]))
    where = f"{'.'.join(map(shown, path))}: " if path else ""
    return str(_at(node, name, where + what))


def _keys_at(path: list[str], model: type[BaseModel]) -> list[str]:
    """The keys a recipe, or a family, may have at a path, found by walking the models' own fields."""
    models: list[type[BaseModel]] = [model]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:  # a place in a list, or a name that is the user's own, such as a stratum's
            continue
        models = [model for field in fields for model in _models_in(field.annotation)]
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
