"""What an evaluation found, as plain frozen data that a report stores and a gate judges."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from vlmquant.errors import InputError

NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
"""JSON has no such numbers: a report holds the words."""


def _not_finite(value: Any) -> Any:
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _not_negative(value: float) -> float:
    if value < 0:
        raise ValueError("must not be below 0")
    return value


# Checked where a report is read. NaN passes: whoever judges must see it, and fail.
Number = Annotated[float, BeforeValidator(_not_finite)]
Amount = Annotated[Number, AfterValidator(_not_negative)]
Count = Annotated[int, Field(ge=0, le=10**15)]


@dataclass(frozen=True)
class SampleScore:
    """One sample through one model. Sums run over the answer tokens of all its scored references."""

    id: str
    task: str
    images: tuple[str, ...]
    """sha256 of each image's pixels (images.pixel_sha256); samples that share one are resampled together."""
    tokens: Count
    """Answer tokens, end token included."""
    nll: Amount
    """Negative log-likelihood of the answer tokens, nats."""
    all_tokens: Count
    """Text tokens that a model predicts: the prompt's (once, without image placeholders) and the answers'."""
    all_nll: Amount
    kl: Number | None
    """Sum of KL(reference || this model) over the answer tokens, nats; None for the reference itself."""
    flips: Count | None
    """Answer tokens whose most likely token differs from the reference's; None for the reference itself."""
    generated: str | None
    """The greedy answer; None when nothing was generated."""
    references: Annotated[tuple[str, ...], Field(min_length=1)]
    exact: bool | None
    """Whether the greedy answer equals one of the references; None for captions and other long answers."""
    wrong_image_nll: Amount | None = None
    """As nll, with another sample's image in place of this one's; None when not asked for or there is no image."""


@dataclass(frozen=True)
class Timing:
    """One prompt answered greedily at batch size 1."""

    first_token_seconds: Amount
    """Image included, preprocessing excluded."""
    tokens_per_second: Amount
    """Of the tokens after the first."""


@dataclass(frozen=True)
class Round:
    """The same prompt to the reference and to this model, one right after the other."""

    reference: Timing
    model: Timing


@dataclass(frozen=True)
class Memory:
    """Bytes of one memory, the host's or a GPU's, that a model takes of it."""

    held: Count
    """Of the tensors that the loaded model holds: parameters, buffers, packed codes; what is shared counts once."""
    activations: Count | None
    """Peak above the loaded model while it was evaluated, its KV cache included; None where the system does not say."""
    load: Count | None
    """Peak while it was loaded, above what the process took before; None where the system does not say."""


@dataclass(frozen=True)
class Costs:
    """What running the model took, measured in a process of its own."""

    weight_bytes: Count
    """Bytes of the model's safetensors files."""
    load_seconds: Amount
    """Until every weight is in memory."""
    peak_bytes: Count
    """Peak resident memory of the whole process, of which Python, torch and transformers are the larger part of a small
    model's: no measure of the model."""
    tokens_per_second: Amount | None
    """Median of its timings of greedy decoding at batch size 1, prefill excluded; None when not measured."""
    prefill_seconds: Amount | None
    """Median seconds to the first token at batch size 1, image included, preprocessing excluded."""
    tokens_per_second_range: tuple[Amount, Amount] | None = None
    """Slowest and fastest timing."""
    load_peak_bytes: Count | None = None
    """Peak resident memory of the whole process right after loading."""
    baseline_bytes: Count | None = None
    """Resident memory of the process before loading: Python, torch and transformers themselves."""
    memory: dict[str, Memory] | None = None
    """By device, "cpu" being the host; None in a report of an older vlmquant."""
    rounds: tuple[Round, ...] | None = None
    """Of turns with the reference (turns.speed_ratios); None for the reference, and where there were none."""
    unpaired: str | None = None
    """Why there were none."""

    @property
    def held_bytes(self) -> int | None:
        """Of the loaded model's tensors, wherever they are."""
        return None if self.memory is None else sum(place.held for place in self.memory.values())

    @property
    def activation_bytes(self) -> int | None:
        """Peak above the loaded model, where it computes."""
        return _sum(place.activations for place in (self.memory or {}).values())


@dataclass(frozen=True)
class Run:
    """One model on one set of samples."""

    model: str
    """Path of the model's directory."""
    label: str
    """The name of its row in tables."""
    samples: tuple[SampleScore, ...]
    costs: Costs
    settings: dict[str, Any]
    environment: dict[str, Any]
    manifest: dict[str, Any] | None
    """vlmquant.json of the model's directory; None for a model that vlmquant did not write."""
    other_inputs: str | None = None
    """How what it was given differs from what the reference was, where that was allowed; None: not at all."""
    notes: tuple[str, ...] = ()
    """What of the evaluation is not as the model or the settings ask for."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Run":
        """Inverse of to_dict, also after a round through JSON; InputError for missing or unknown keys."""
        plain = _checked(cls, data)
        samples = tuple(_record(SampleScore, sample) for sample in plain.pop("samples"))
        notes = tuple(plain.pop("notes", ()))
        return cls(samples=samples, costs=_costs(plain.pop("costs")), notes=notes, **plain)


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval."""

    point: Number
    low: Number
    high: Number
    n: Count
    """Samples behind it."""
    standard_error: Amount | None = None
    """Standard deviation of the bootstrap resamples, in the unit of the point."""


Record = TypeVar("Record")


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _round(data: Mapping[str, Any]) -> Round:
    return Round(**{who: _record(Timing, one) for who, one in _checked(Round, data).items()})


def _costs(data: Mapping[str, Any]) -> Costs:
    costs = _record(Costs, data)
    memory, rounds = costs.memory, costs.rounds
    return replace(
        costs,
        memory=None if memory is None else {place: _record(Memory, found) for place, found in memory.items()},  # type: ignore[arg-type]
        rounds=None if rounds is None else tuple(map(_round, rounds)),  # type: ignore[arg-type]
    )


def _checked(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    if not isinstance(data, Mapping) or not known - optional <= set(data) <= known:
        found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise InputError(f"not a {kind.__name__} record: expected the keys {sorted(known)}, found {found}")
    return dict(data)


def _record(kind: type[Record], data: Mapping[str, Any]) -> Record:
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in _checked(kind, data).items()}
    return kind(**plain)
