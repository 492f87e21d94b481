"""Which calibration and method: a pure function of what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmquant.evaluation.records import Estimate
from vlmquant.report.numbers import fixed, metric_text

ABOUT_AS_CHEAP = 0.8
"""Share of another's time from which on a method saves nothing worth a choice."""


@dataclass(frozen=True)
class Row:
    """One method on one calibration, on the held-out samples; of several draws, all together."""

    calibration: str | None
    """A kind of calibration; None for a method that looks at none."""
    method: str
    kl: Estimate
    """Mean KL(original || quantized), nats a token."""
    perplexity_increase: Estimate
    flip_rate: Estimate
    tokens: int
    """Of the calibration samples, images' included; of one draw."""
    seconds: float
    """Of quantizing once: user CPU time, or where a GPU computed, time."""
    kl_of_draws: tuple[float, ...]
    """Of each draw of calibration samples, the same for all rows."""

    @property
    def name(self) -> str:
        return self.method + (f" on {self.calibration} calibration" if self.calibration else " without calibration")


@dataclass(frozen=True)
class Choice:
    """Numbers are places among the rows."""

    least: int
    """Of the lowest KL."""
    taken: int
    """What is recommended."""
    as_good: tuple[int, ...]
    """What the samples cannot tell from the least, by rising KL; the least itself is not among them."""
    sentence: str


def find_least(rows: Sequence[Row]) -> int:
    return min(range(len(rows)), key=lambda place: rows[place].kl.point)


def choose_row(rows: Sequence[Row], behind: Sequence[Estimate]) -> Choice:
    """The row of the lowest KL; or one that is as good within noise and takes less time.

    behind: each row's KL minus the lowest row's, paired by sample. Within noise is what has an interval that reaches 0;
    with several draws also what was no worse in one of them, as the interval knows nothing of other calibration
    samples.
    """
    least = find_least(rows)

    def is_as_good(place: int) -> bool:
        pairs = zip(rows[place].kl_of_draws, rows[least].kl_of_draws, strict=True)
        return place != least and (behind[place].low <= 0 or any(mine <= its for mine, its in pairs))

    as_good = tuple(sorted(filter(is_as_good, range(len(rows))), key=lambda place: rows[place].kl.point))
    able = [least, *as_good]
    cheapest = min(rows[place].seconds for place in able)
    taken = next(place for place in able if ABOUT_AS_CHEAP * rows[place].seconds <= cheapest)
    return Choice(least, taken, as_good, _sentence(rows, behind, least=least, taken=taken, as_good=as_good))


def _sentence(
    rows: Sequence[Row], behind: Sequence[Estimate], *, least: int, taken: int, as_good: Sequence[int]
) -> str:
    row = rows[taken]
    parts = [f"use {row.name}: KL {metric_text('kl', row.kl)} nats/token"]
    if taken == least:
        parts[0] += f", the lowest of {len(rows)}" if len(rows) > 1 else ""
    else:
        parts.append(
            f"as good within noise as the lowest, {rows[least].name} ({_difference(behind[taken])}), in "
            f"{_share(row.seconds, rows[least].seconds)} of its time"
        )
    others = [
        f"{rows[place].name} ({_difference(behind[place])}; {_share(rows[place].seconds, row.seconds)} of the time)"
        for place in as_good
        if place != taken
    ]
    if others:
        parts.append(f"as good within noise: {', '.join(others)}")
    if worse := len(rows) - 1 - len(as_good):
        parts.append(f"{'the other loses' if worse == 1 else f'the other {worse} lose'} more")
    return "; ".join(parts)


def _difference(behind: Estimate) -> str:
    return f"KL {'+' if behind.point >= 0 else ''}{metric_text('kl', behind)}"


def _share(seconds: float, other: float) -> str:
    return fixed(0, scale=100, unit=" %")(seconds / other) if other > 0 else "no share"
