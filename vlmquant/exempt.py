"""Which linears lose so much more to rounding than their like that they stay at 16 bits.

A pass before the plan is final finds it. A linear's score is the share of its output that rounding takes, inputs and
weight rounded as they will be, on calibration tokens: |W x - Q r(x)|^2 / |W x|^2. Linears that share their inputs, and
one kernel when served, have one score together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from vlmquant import signals
from vlmquant.algorithms import ALGORITHMS, rounded
from vlmquant.calibration.encode import Batch
from vlmquant.components import ComponentMap
from vlmquant.planning import Plan
from vlmquant.progress import bar
from vlmquant.ranks import ALONE, Ranks
from vlmquant.recipe import SEARCHED, Recipe
from vlmquant.stream import BlockStream


@dataclass(frozen=True)
class Score:
    """Of linears of one block that share their inputs."""

    names: tuple[str, ...]
    """In the model."""
    kind: tuple[str, ...]
    """Their names in the block."""
    component: str
    lost: float
    """Share of the outputs' square."""


def find_exempt(
    components: ComponentMap,
    plan: Plan,
    recipe: Recipe,
    batches: Sequence[Callable[[], Batch]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rerun: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, str]:
    """Why linears stay at 16 bits, by name: where the recipe asks for it (search.exempt_above), else nothing is run."""
    times = {name: spec.search.exempt_above for name, spec in recipe.specs() if spec.search.exempt_above is not None}
    scored = [info.name for info in components.blocks if info.component in times]
    if not any(line.component in times and line.method in SEARCHED for line in plan.lines):
        return {}
    alone = replace(
        plan, lines=tuple(replace(line, needs_original=False, needs_gradients=False) for line in plan.lines), cache=None
    )
    stream = BlockStream(
        components,
        alone,
        dict(recipe.specs()),
        batches,
        outside={},
        restore=lambda info: None,
        dtype=dtype,
        device=device,
        experts=recipe.calibration.experts,
        token_weights=recipe.calibration.token_weights,
        rerun=rerun,
        ranks=ranks,
    )
    found: list[Score] = []
    last = components.blocks.index(next(info for info in components.blocks if info.name == scored[-1]))
    with bar("score", total=last + 1, visible=ranks.leads) as progress:
        for block in stream:
            for stage in block.stages():
                signals.check()
                quantized = ALGORITHMS[stage.method](stage)
                if block.info.component in times and stage.method in SEARCHED:
                    names = tuple(linear.name for linear in stage.linears.values())
                    lost = rounded.share_lost(stage, quantized)
                    found.append(Score(names, tuple(stage.linears), block.info.component, lost))
                stage.finish(quantized)
            progress.step(f"score {block.info.component}")
            if block.info.name == scored[-1]:
                break
    return chosen(found, times)


def chosen(scores: Iterable[Score], times: Mapping[str, float]) -> dict[str, str]:
    """Those that lose more than so many times what the median of their kind does, by component."""
    kinds: dict[tuple[str, tuple[str, ...]], list[Score]] = {}
    for one in scores:
        kinds.setdefault((one.component, one.kind), []).append(one)
    found: dict[str, str] = {}
    for (component, kind), alike in kinds.items():
        usual = median(one.lost for one in alike)
        for one in alike:
            if one.lost > times[component] * usual:
                told = (
                    f"rounding takes {one.lost:.2g} of its output's square, {one.lost / usual:.1f} times the median of "
                    f"{', '.join(kind)}"
                )
                found |= dict.fromkeys(one.names, told)
    return found
