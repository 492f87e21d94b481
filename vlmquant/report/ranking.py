"""Which candidate loses least at its size: the order of a comparison, and its Pareto frontier."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmquant.evaluation.metrics import EVERYTHING
from vlmquant.evaluation.records import Estimate, Run
from vlmquant.report.data import Report, Summary


@dataclass(frozen=True)
class Place:
    rank: int
    """From 1."""
    run: Run
    summary: Summary
    kl: Estimate | None
    """Over all samples; None where it was not measured."""
    beaten_by: str | None
    """A candidate that is no larger and no farther from the reference; None: on the frontier, or without a KL."""

    @property
    def on_frontier(self) -> bool:
        return self.kl is not None and self.beaten_by is None


def ranked(report: Report) -> list[Place]:
    """The candidates: those that no other beats in both size and KL first, each part by rising KL."""
    rows = [
        (run, summary, _known(summary.get(EVERYTHING, {}).get("kl")))
        for run, summary in zip(report.candidates, report.summaries[1:], strict=True)
    ]
    measured = [(run, kl) for run, _, kl in rows if kl is not None]
    found = [(run, summary, kl, None if kl is None else _beaten_by(run, kl, measured)) for run, summary, kl in rows]
    found.sort(key=lambda row: (row[2] is None, row[3] is not None, row[2].point if row[2] else 0.0))
    return [Place(rank, *row) for rank, row in enumerate(found, start=1)]


def _beaten_by(run: Run, kl: Estimate, others: Sequence[tuple[Run, Estimate]]) -> str | None:
    """The nearest to the reference of those that beat it."""
    better = [
        (other_kl.point, other.label)
        for other, other_kl in others
        if (other.costs.weight_bytes, other_kl.point) != (run.costs.weight_bytes, kl.point)
        and other.costs.weight_bytes <= run.costs.weight_bytes
        and other_kl.point <= kl.point
    ]
    return min(better)[1] if better else None


def _known(kl: Estimate | None) -> Estimate | None:
    return kl if kl is not None and abs(kl.point) < float("inf") else None
