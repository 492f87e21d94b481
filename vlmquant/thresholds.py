"""What a gate may bound: one row per threshold, which recipes, command line and reports spell and write alike."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    loss: str
    """The loss that it bounds, as metrics.summarize calls it."""
    title: str
    """What it bounds."""
    subject: str
    """What is bounded, where its change stands beside it: `perplexity +2.08 %`."""
    help: str
    """What a command line says of it."""
    decimals: int
    scale: float = 1.0
    """From its value to what is shown."""
    unit: str = ""
    signed: bool = True
    """Whether it may go either way; else it is a distance, and at least 0."""

    @property
    def example(self) -> str:
        return "2%" if self.scale == 100 else "2" if self.unit == " points" else "0.1"


THRESHOLDS: dict[str, Threshold] = {
    "max_perplexity_increase": Threshold(
        "perplexity_increase",
        "perplexity increase",
        "perplexity",
        "Largest relative increase of perplexity",
        2,
        scale=100,
        unit=" %",
    ),
    "max_bleu_drop": Threshold(
        "bleu4_drop", "BLEU-4 drop", "BLEU-4", "BLEU-4 points (of 100) that may be lost", 2, unit=" points"
    ),
    "max_kl": Threshold(
        "kl",
        "KL to the reference",
        "KL",
        "Largest mean KL(reference || quantized) over answer tokens, nats",
        4,
        unit=" nats/token",
        signed=False,
    ),
    "max_flip_rate": Threshold(
        "flip_rate",
        "flipped tokens",
        "flipped tokens",
        "Largest share of answer tokens whose most likely token changed",
        2,
        scale=100,
        unit=" %",
        signed=False,
    ),
    "max_exact_match_drop": Threshold(
        "exact_match_drop",
        "exact-match drop",
        "exact match",
        "Points (of 100) of exact match on short answers that may be lost",
        2,
        unit=" points",
    ),
}
"""Every threshold, in the order of the verdicts. recipe.Thresholds gives each its type."""


def option(name: str) -> str:
    """The option of a command line: max_kl -> --max-kl."""
    return "--" + name.replace("_", "-")
