"""What each linear loses by each scheme, and the schemes that a budget buys by that."""

from vlmquant.sensitivity.choose import Allocation, Uniform, allocate
from vlmquant.sensitivity.losses import Scores, UnitLoss, check_scores, measure, model_digest, read_scores, scores_text
from vlmquant.sensitivity.units import Choice, Unit, Units, find_units

__all__ = [
    "Allocation",
    "Choice",
    "Scores",
    "Uniform",
    "Unit",
    "UnitLoss",
    "Units",
    "allocate",
    "check_scores",
    "find_units",
    "measure",
    "model_digest",
    "read_scores",
    "scores_text",
]
