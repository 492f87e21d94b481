"""Made-up runs with known losses, for the tests of report and gate."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlmquant.evaluation.records import Costs, Memory, Round, Run, SampleScore, Timing
from vlmquant.report.data import Report, build_report

WORDS = [
    "a",
    "the",
    "man",
    "dog",
    "boy",
    "girl",
    "runs",
    "sits",
    "red",
    "blue",
    "ball",
    "on",
    "in",
    "with",
    "near",
    "two",
]
COSTS = Costs(
    weight_bytes=243_000_000,
    load_seconds=1.25,
    peak_bytes=1_400_000_000,
    tokens_per_second=21.5,
    prefill_seconds=0.4,
    tokens_per_second_range=(19.0, 23.0),
    memory={"cpu": Memory(held=486_000_000, activations=90_000_000, load=600_000_000)},
)
SLOW, FAST = Timing(0.4, 20.0), Timing(0.25, 30.0)
"""1.6 and 1.5 times as fast."""


def sample(index: int, task: str, **changes: Any) -> SampleScore:
    """One sample of the reference, with an image of its own."""
    plain = SampleScore(
        id=f"{task}-{index:04d}",
        task=task,
        images=(hashlib.sha256(f"{task}{index}".encode()).hexdigest(),),
        tokens=10,
        nll=20.0,
        all_tokens=20,
        all_nll=50.0,
        kl=None,
        flips=None,
        generated="yes",
        references=("yes",),
        exact=True,
    )
    return replace(plain, **changes)


def sentence(random: np.random.Generator, words: int = 10) -> str:
    return " ".join(random.choice(WORDS, words))


def captions(n: int, *, seed: int) -> list[SampleScore]:
    """Captions of which about six words in ten agree with a reference."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(n):
        references = tuple(sentence(random) for _ in range(3))
        words = references[0].split()
        start = int(random.integers(0, 4))
        words[start : start + 3] = sentence(random, 3).split()
        found.append(sample(index, "caption", generated=" ".join(words), references=references, exact=None))
    return found


def run(label: str, samples: Sequence[SampleScore], **changes: Any) -> Run:
    plain = Run(f"models/{label}", label, tuple(samples), COSTS, {"batch_size": 8}, {"torch": "2.13.0"}, None)
    return replace(plain, **changes)


def in_turns(costs: Costs, *, rounds: int = 10, model: Timing = FAST) -> Costs:
    """Costs of a model that took turns with the reference and was always as fast."""
    return replace(costs, rounds=(Round(SLOW, model),) * rounds)


def degraded(samples: Sequence[SampleScore], *, seed: int, nll: float = 0.01, kl: float = 0.05) -> list[SampleScore]:
    """The same samples as a candidate scores them: `nll` and `kl` nats a token worse on average, answers unchanged."""
    random = np.random.default_rng(seed)
    return [
        replace(
            one,
            nll=one.nll + one.tokens * float(random.normal(nll, 0.02)),
            kl=one.tokens * float(random.gamma(4, kl / 4)),
            flips=int(random.binomial(one.tokens, 0.08)),
        )
        for one in samples
    ]


def report(reference: Sequence[SampleScore], *candidates: Run) -> Report:
    return build_report(
        run("bf16", reference),
        candidates,
        command=("vlmquant", "eval", "out/int4", "--data", "my data"),
        hashes={"evaluation_set": "ab" * 32},
        seed=0,
        resamples=200,
    )
