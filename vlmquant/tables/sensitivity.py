"""What units lose by each scheme, and what a budget bought."""

from vlmquant.report.sensitivity_page import UNIFORM_COLUMNS, loss_rows, uniform_rows
from vlmquant.sensitivity import Allocation, Scores
from vlmquant.tables.layout import Table, make_table


def loss_table(scores: Scores, allocation: Allocation | None) -> Table:
    """One row per unit."""
    columns, rows = loss_rows(scores, allocation.chosen if allocation else None)
    caption = (
        f"Predicted KL(original || quantized), nats an answer token, were a unit alone quantized: {scores.samples} "
        f"samples, {scores.tokens:,} answer tokens.",
    )
    left = columns.index("weights")
    fewer = ("linears", "layer", *columns[left - 1 : left], *columns[left + 1 :])
    return make_table("What each layer loses by each scheme", columns, rows, left=left, caption=caption, fewer=fewer)


def allocation_table(found: Allocation) -> Table:
    """The choice beside one scheme for all."""
    return make_table("Budget", UNIFORM_COLUMNS, uniform_rows(found), caption=found.notes)
