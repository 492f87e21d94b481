"""Speed in turns, on machines whose clock is planted: a drift, other work, and one model slower than the other."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.fake_runs import COSTS
from vlmquant.evaluation.records import Round, Timing
from vlmquant.evaluation.settings import Settings
from vlmquant.evaluation.turns import (
    CONFIDENCE,
    Ratio,
    median_ratio,
    rounds_of,
    speed_ratios,
    take_turns,
    with_rounds,
    with_timings,
)

TOKENS = 16


@dataclass
class Machine:
    """Whose clock goes on only where a model works, at a pace that other work decides: 1.0 when there is none."""

    pace: Callable[[float], float]
    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def work(self, seconds: float) -> float:
        took = seconds / self.pace(self.now)
        self.now += took
        return took

    def model(self, name: str, *, first: float, token: float) -> Callable[[int], Timing]:
        """A model that needs so many seconds of a quiet machine for the first token, and for each after it."""

        def time(prompt: int) -> Timing:
            self.calls.append(f"{name}{prompt}")
            return Timing(self.work(first), (TOKENS - 1) / sum(self.work(token) for _ in range(TOKENS - 1)))

        return time


def test_turns_see_through_work_that_begins_halfway() -> None:
    """Twice as fast, with a quarter of the machine from 60 s on: one after the other it looks half as fast."""

    def busy_later(now: float) -> float:
        return 1.0 if now < 60 else 0.25

    machine = Machine(busy_later)
    reference, fast = (machine.model(name, first=first, token=first / 2) for name, first in (("A", 2.0), ("B", 1.0)))
    one_after_the_other = [[time(0).tokens_per_second for _ in range(4)] for time in (reference, fast)]
    # 17 s each, the fourth from 51 s on: 2 s, 7 tokens until 60 s, 8 tokens of 4 s
    assert one_after_the_other == [[1.0, 1.0, 1.0, 15 / 39], [0.5] * 4]

    machine = Machine(busy_later)
    reference, fast = (machine.model(name, first=first, token=first / 2) for name, first in (("A", 2.0), ("B", 1.0)))
    rounds = take_turns(reference, fast, rounds_of([7, 8], Settings()))
    assert machine.calls[:8] == ["A7", "B7", "B8", "A8", "A7", "B7", "B8", "A8"]
    ratios = speed_ratios(rounds)
    assert ratios is not None
    assert (ratios.decode.point, ratios.first_token.point) == (2.0, 2.0)
    assert (ratios.decode.stable, ratios.first_token.stable) == (True, True)
    found = [one.model.tokens_per_second / one.reference.tokens_per_second for one in rounds]
    assert found == pytest.approx([2.0, 2.0, 0.5 * 39 / 15, *[2.0] * 7])  # it began in the third


def test_the_interval_by_hand() -> None:
    """P(Binomial(10, 1/2) < 2) = 11/1024 and < 3 = 56/1024: one at either end may be left out, two may not."""
    ten = [1.5, 9.0, 1.4, 1.6, 1.5, 1.5, 0.1, 1.45, 1.55, 1.5]
    assert median_ratio(ten) == Ratio(1.5, 1.4, 1.6, 10, stable=True)
    assert median_ratio([*ten[:9], 9.0]) == Ratio(1.5, 1.4, 9.0, 10, stable=False)
    # < 3 of 12 = 79/4096, < 4 = 299/4096; of 6: < 1 = 1/64; of 5: 1/32, twice that is more than 5 %
    assert CONFIDENCE == 0.95
    twelve = median_ratio([float(number) for number in range(1, 13)])
    assert (twelve.low, twelve.point, twelve.high) == (3.0, 6.5, 10.0)
    assert median_ratio([1.0, 1.1, 1.1, 1.1, 1.1, 1.15]) == Ratio(1.1, 1.0, 1.15, 6, stable=True)
    assert median_ratio([1.0] * 5) == Ratio(1.0, 1.0, 1.0, 5, stable=False)  # however well they agree
    assert median_ratio([2.0]) == Ratio(2.0, 2.0, 2.0, 1, stable=False)


@pytest.mark.parametrize(
    ("jitter", "share_held_up", "stable"), [(0.01, 0.0, True), (0.02, 0.05, True), (0.3, 0.3, False), (0.1, 0.6, False)]
)
def test_a_model_against_itself_is_as_fast_or_unstable(jitter: float, share_held_up: float, stable: bool) -> None:
    """Under noise of every timing, and other work that takes the machine up to six times for some of them."""
    random, told, wrong = np.random.default_rng(0), 0, 0
    for _ in range(400):

        def time(prompt: int) -> Timing:
            slow = np.exp(random.normal(0, jitter)) * (random.uniform(1, 6) if random.random() < share_held_up else 1)
            return Timing(0.2 * slow, 20.0 / slow)

        ratios = speed_ratios(take_turns(time, time, rounds_of([0], Settings())))
        assert ratios is not None
        told += ratios.decode.stable
        wrong += ratios.decode.stable and not ratios.decode.low <= 1 <= ratios.decode.high
    assert wrong <= 0.04 * 400  # the interval's own 2.1 %, and the luck of 400 draws
    assert (told > 0.8 * 400) if stable else (told < 0.1 * 400)


def test_a_model_s_own_timings() -> None:
    rounds = tuple(
        Round(Timing(1.0, 10.0), Timing(first, speed)) for first, speed in ((0.5, 8.0), (0.7, 30.0), (0.6, 9.0))
    )
    costs = with_rounds(replace(COSTS, tokens_per_second=None), rounds)
    assert (costs.prefill_seconds, costs.tokens_per_second, costs.tokens_per_second_range) == (0.6, 9.0, (8.0, 30.0))
    assert costs.rounds == rounds
    assert with_timings(COSTS, []) == COSTS


def test_what_no_clock_gives_is_no_ratio() -> None:
    fine, zero, endless = Timing(1.0, 1.0), Timing(0.0, 1.0), Timing(1.0, float("inf"))
    assert speed_ratios([Round(fine, fine)]) is not None
    assert speed_ratios([Round(zero, fine)]) is speed_ratios([Round(fine, endless)]) is None
    assert speed_ratios([]) is speed_ratios(None) is None
