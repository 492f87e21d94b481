"""A stage without a model: what an algorithm sees of vlmquant.stream.Stage, computed from inputs that a test gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmquant.grid import Grid, grid_of
from vlmquant.kernels.reference import input_scale, round_inputs
from vlmquant.ranks import ALONE, Ranks
from vlmquant.recipe import ComponentSpec, Scheme
from vlmquant.stream import Moments, Rows


@dataclass
class FakeStage:
    """inputs (tokens, in) float32, or their Hessian. gain: stored weight (in,) of a norm that can take scales."""

    weights: dict[str, Tensor]
    scheme: Scheme
    inputs: Tensor | None = None
    gram: Tensor | None = None
    options: ComponentSpec = field(default_factory=ComponentSpec)
    scale_dtype: torch.dtype = torch.bfloat16
    gain: Tensor | None = None
    gain_offset: float = 0.0
    notes: list[str] = field(default_factory=list)
    channel_scales: Tensor | None = None
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    ranks: Ranks = ALONE
    is_aimed: bool = False
    biased: bool = False
    shifts: dict[str, Tensor] = field(default_factory=dict)
    output_moments: dict[str, list[Tensor]] = field(default_factory=dict)
    moments: Moments | None = None
    """Of its inputs and the original model's, where it is aimed."""
    alpha: float | None = None

    @property
    def stored(self) -> dict[str, Tensor]:
        return self.weights

    @property
    def grid(self) -> Grid:
        return grid_of(self.scheme, next(iter(self.weights.values())).shape[1], self.scale_dtype)

    def hessian(self) -> Tensor:
        if self.gram is not None:
            return self.gram
        assert self.inputs is not None
        return self.inputs.T @ self.inputs / len(self.inputs)

    def of_hessian(self, make: Callable[[Tensor], Any]) -> Any:
        return make(self.hessian().clone())

    def of_moments(self, make: Callable[[Moments], Any]) -> Any:
        assert self.moments is not None
        one = self.moments
        return make(Moments(one.squares.clone(), one.cross.clone(), one.tokens, one.held))

    def aimed(self, alpha: float) -> None:
        self.alpha = alpha

    @property
    def weighs_outputs(self) -> bool:
        return bool(self.output_moments)

    def of_output_moments(self, local: str, make: Callable[[Sequence[Tensor]], Any]) -> Any:
        return make(self.output_moments[local])

    def by_rows(self, weight: Tensor, make: Callable[[Tensor], Any], *, work: float) -> list[Any]:
        return [make(weight)]

    def parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight,)

    def measured(self, local: str, lost: float, whole: float) -> None:
        self.losses[local] = (lost, whole)

    def mean_square(self) -> Tensor:
        return self.hessian().diagonal()

    def mean_abs(self) -> Tensor:
        assert self.inputs is not None
        return self.inputs.abs().mean(0)

    def largest(self) -> Tensor:
        assert self.inputs is not None
        return self.inputs.abs().amax(0)

    def drawn(self, most: int) -> Rows:
        assert self.inputs is not None
        return Rows(self.inputs[:most], None)

    def rounding(self, channel_scales: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        divisor, kind = torch.ones(1) if channel_scales is None else channel_scales, self.scheme.activations
        scale = None
        if kind.startswith("static"):
            scale = input_scale((self.largest() / divisor).max().item(), kind, self.scale_dtype).item()
        return lambda inputs: round_inputs(inputs / divisor, kind, scale)

    def means(self, rounding: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        assert self.inputs is not None
        return self.inputs.mean(0), rounding(self.inputs).mean(0)

    @property
    def linears(self) -> dict[str, Any]:
        return {name: SimpleNamespace(bias=self.biased) for name in self.weights}

    def correct_bias(self, local: str, shift: Tensor) -> None:
        self.shifts[local] = shift

    @property
    def can_fold(self) -> bool:
        return self.gain is not None

    def admissible(self, channel_scales: Tensor) -> Tensor:
        assert self.gain is not None
        whole = self.gain.float() + self.gain_offset
        stored = (whole / channel_scales - self.gain_offset).to(self.gain.dtype).float() + self.gain_offset
        scales = whole / stored
        return torch.where(scales.isfinite() & (scales > 0), scales, 1.0)

    def fold(self, channel_scales: Tensor) -> None:
        assert self.gain is not None
        whole = self.gain.float() + self.gain_offset
        self.gain = (whole / channel_scales - self.gain_offset).to(self.gain.dtype)
        self.channel_scales = channel_scales

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def make_stage() -> Callable[..., FakeStage]:
    return FakeStage


@pytest.fixture
def make_inputs() -> Callable[..., Tensor]:
    def inputs(tokens: int, columns: int, *, seed: int = 0, spread: float = 1.0) -> Tensor:
        """Correlated inputs (tokens, columns); the log of a channel's size has the standard deviation `spread`."""
        random = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=random) / columns**0.5 + 0.5 * torch.eye(columns)
        sizes = torch.exp(spread * torch.randn(columns, generator=random))
        return torch.randn(tokens, columns, generator=random) @ mixing * sizes

    return inputs


@pytest.fixture
def make_weight() -> Callable[..., Tensor]:
    def weight(rows: int, columns: int, *, seed: int = 1) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randn(rows, columns, generator=random) * 0.05

    return weight
