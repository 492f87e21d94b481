"""What quantizing takes, before it is begun: memory phase by phase, disk, and time; and what to do with less.

The calibration passes can keep what they compute inside a block, or walk through it again for every stage; what lies
between blocks can be in memory or on disk. The codes are the same; the first that fits is chosen.
"""

import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from vlmquant.components import BlockInfo, ComponentMap, ParameterInfo
from vlmquant.errors import DoesNotFitError
from vlmquant.experts import Form
from vlmquant.kernels.probe import GPU_TIMES, measured, seconds
from vlmquant.limits import is_allocation_failure
from vlmquant.planning import CALIBRATED, Plan, PlanLine, with_parents
from vlmquant.ranks import ROWS
from vlmquant.recipe import WITH_FEEDBACK, WITH_FOLDS
from vlmquant.stream import (
    HELD_EVERY,
    HELD_TOKENS,
    ROW_ELEMENTS,
    TOKENS_PER_INPUT,
    Footprint,
    has_experts,
    rows_together,
)

FLOAT_BYTES = 4
"""Of a float32, in which codes are chosen."""
KEPT_WIDTHS = 3.0
"""Vectors as wide as the hidden state that a pass keeps for a token inside a block, beside the linear's inputs."""
RUNNING_WIDTHS = 3.0
"""Vectors as wide as a linear's inputs that a pass holds beside them on its way there: what a gate, its activation and
what it multiplies put out. They count where statistics are summed up while passes run again."""
COMPARED_COPIES = 6
"""Of a batch's inputs, where they are compared with those of the original model: real tokens of both, their difference,
and each of these without the samples held out."""
SCRATCH_BYTES = 64 << 20
"""Of compiled loops, of the libraries' own buffers, of the writer, and what allocators do not give back."""
SHARE = 0.9
"""Of the memory that is free, without a limit given: others need some, too."""
GRADIENT_WIDTHS = 40
"""Vectors as wide as the hidden state that a layer keeps for a token until its gradient is there."""
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
MATRIX = 768
"""Side of the matrices by which the speed of products is found."""
SLOWEST = 3.0
"""A run takes at most so many times what its products alone would take."""


@dataclass(frozen=True)
class Passes:
    """How the calibration passes run: what BlockStream takes."""

    rerun: bool = False
    spill: bool = False

    @property
    def label(self) -> str:
        inside = "walk through a block again for every stage" if self.rerun else "are kept inside a block"
        return f"calibration passes {inside}; between blocks they wait {'on disk' if self.spill else 'in memory'}"


CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")
"""What configs call the number of experts that a token is routed to."""
OF_WHOLE_MODEL = ("gradients", "polish")
"""Phases that hold the whole model and what its gradients take."""
WAYS = (Passes(), Passes(rerun=True), Passes(rerun=True, spill=True))
"""In order of preference: the fastest first."""
ON_HOST = ("process", "scratch", "codes of the block", "weights being read")
"""What lies in the host's memory wherever blocks are quantized; all else is where the passes run."""


def ways(device: torch.device) -> tuple[Passes, ...]:
    """The passes that can run there: only what lies in the host's memory is spilled to disk."""
    return tuple(way for way in WAYS if device.type == "cpu" or not way.spill)


@dataclass(frozen=True)
class Prediction:
    """Of one way to run the passes. Bytes of resident memory at the peak of each phase."""

    passes: Passes
    phases: dict[str, int]
    disk_bytes: int
    """Of the output, and of what waits on disk meanwhile."""
    seconds: tuple[float, float] | None
    """None for a device that is not there to be timed."""
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the peak of each phase is made of."""
    device_phases: dict[str, int] = field(default_factory=dict)
    """The same of the device where blocks are quantized, if that is not the CPU."""
    device_parts: dict[str, dict[str, int]] = field(default_factory=dict)
    chains: int = 1
    """Passes of a batch at once: 2 where the original model's come along."""

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())

    @property
    def device_peak_bytes(self) -> int:
        return max(self.device_phases.values(), default=0)

    def with_phase(self, name: str, parts: dict[str, int]) -> "Prediction":
        """And one more, of which all but what is ON_HOST lies where blocks are quantized."""
        here = {key: size for key, size in parts.items() if not self.device_phases or key in ON_HOST}
        there = {key: size for key, size in parts.items() if key not in here}
        return replace(
            self,
            phases=self.phases | {name: sum(here.values())},
            parts=self.parts | {name: here},
            device_phases=self.device_phases | ({name: sum(there.values())} if there else {}),
            device_parts=self.device_parts | ({name: there} if there else {}),
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes, "device_peak_bytes": self.device_peak_bytes}

    def fits(self, limits: "Limits") -> bool:
        host, device = limits.host, limits.device
        return (host is None or self.peak_bytes <= host) and (device is None or self.device_peak_bytes <= device)


@dataclass(frozen=True)
class Limits:
    """Bytes that may be held; None for any number."""

    host: int | None = None
    device: int | None = None
    """Of a device that is not the CPU."""


def _by_block(components: ComponentMap) -> dict[str, list[ParameterInfo]]:
    """Parameters and buffers by the block that they lie in, under "" those that lie in none."""
    found: dict[str, list[ParameterInfo]] = {"": [], **{block.name: [] for block in components.blocks}}
    for one in components.parameters:
        found[next((name for name in with_parents(one.name) if name in found), "")].append(one)
    return found


def predict(
    components: ComponentMap,
    plan: Plan,
    footprint: Footprint,
    *,
    base: int,
    dtype: torch.dtype,
    passes: Passes,
    device: torch.device | None = None,
) -> Prediction:
    """base: what the process holds before any of it, bytes. footprint: of the calibration passes.

    device: where blocks are quantized, if not on the CPU; it need not be there.
    """
    elsewhere = device is not None and device.type != "cpu"
    parameters = _by_block(components)
    outside = sum(
        one.nbytes if passes.rerun and one.component == "embedding" else prod(one.shape) * dtype.itemsize
        for one in parameters[""]
        if one.loaded and one.component != "lm_head"
    )
    parts, there = dict[str, dict[str, int]](), dict[str, dict[str, int]]()
    products = dict.fromkeys((dtype, torch.float32), 0.0)
    chains = 2 if any(line.needs_original for line in plan.lines) else 1
    waiting = 0 if passes.spill else footprint.input_bytes
    for component in dict.fromkeys(block.component for block in components.blocks):
        blocks = [block for block in components.blocks if block.component == component]
        place = footprint.components.get(component)
        rows, width, between, largest = (
            (place.rows, place.width, place.nbytes, place.largest_rows) if place else (0, 0, 0, 0)
        )
        found: dict[str, int] = {}
        for block in blocks:
            stages, rerun = _stages(components, plan, block, rows), passes.rerun and not has_experts(components, block)
            whole = sum(prod(one.shape) for one in parameters[block.name])
            resident, stage, codes, inputs = _block_peak(
                stages,
                whole,
                components.dtype,
                dtype,
                rerun=rerun,
                row_elements=None if elsewhere else ROW_ELEMENTS,
            )
            running = RUNNING_WIDTHS * inputs if rerun else 0.0
            kept = (largest if rerun else rows) * (KEPT_WIDTHS * width + inputs + running) * dtype.itemsize
            if any(stage.compares for stage in stages):
                kept = chains * kept + COMPARED_COPIES * largest * inputs * FLOAT_BYTES
            one = {
                "process": base,
                "scratch": SCRATCH_BYTES,
                "weights outside blocks": outside,
                "weights of the block": resident,
                "codes of the block": codes,
                "a stage": stage,
                "inside the passes": round(kept),
                "between blocks": waiting + (0 if passes.spill else chains * between),
            }
            if elsewhere:
                most = max((stage.rows * stage.columns for stage in stages), default=0)
                one["weights being read"] = most * components.dtype.itemsize
            if sum(one.values()) > sum(found.values()):
                found = one
            passed, solved = _products(stages, block, rows, rerun=rerun, chains=chains)
            products[dtype] += passed
            products[torch.float32] += solved
        parts[component] = {name: size for name, size in found.items() if not elsewhere or name in ON_HOST}
        if elsewhere:
            there[component] = {name: size for name, size in found.items() if name not in ON_HOST}
    moments = moment_bytes([line for line in plan.lines if line.needs_gradients])
    timed = not elsewhere or torch.cuda.is_available()
    where = device or torch.device("cpu")
    longest = sum(count / _products_per_second(one, where) for one, count in products.items()) if timed else None
    spilled = max((place.nbytes for place in footprint.components.values()), default=0) + footprint.input_bytes
    return Prediction(
        passes,
        _sums(parts) or {"weights": base + SCRATCH_BYTES + (0 if elsewhere else outside)},
        plan.bytes_after + (2 * chains * spilled if passes.spill else 0) + moments,
        None if longest is None else (round(longest, 1), round(SLOWEST * longest + plan.bytes_before / 50e6, 1)),
        parts,
        (_sums(there) or {"weights": outside}) if elsewhere else {},
        there,
        chains,
    )


def moment_bytes(lines: Iterable[PlanLine]) -> int:
    """Of the second moments of gradients."""
    return sum(FLOAT_BYTES * rows**2 for line in lines for rows in rows_together(line.shape[0]))


def _sums(parts: dict[str, dict[str, int]]) -> dict[str, int]:
    return {phase: sum(found.values()) for phase, found in parts.items()}


def choose(predictions: Iterable[Prediction], limits: Limits) -> Prediction:
    """The first that fits; DoesNotFitError says how much would."""
    tried = list(predictions)
    for one in tried:
        if one.fits(limits):
            return one
    least = min(tried, key=lambda one: one.peak_bytes)
    if limits.host is not None and least.peak_bytes > limits.host:
        raise _refused(least, least.phases, least.parts, limits.host, "memory", "--memory-limit")
    least = min(tried, key=lambda one: one.device_peak_bytes)
    assert limits.device is not None
    parts = least.device_parts
    raise _refused(least, least.device_phases, parts, limits.device, "device memory", "--device-memory-limit")


def _refused(
    least: Prediction, phases: dict[str, int], parts: dict[str, dict[str, int]], limit: int, memory: str, option: str
) -> DoesNotFitError:
    phase = max(phases, key=phases.__getitem__)
    told = ", ".join(
        f"{name} {size / 2**30:.2f}" for name, size in sorted(parts.get(phase, {}).items(), key=lambda item: -item[1])
    )
    return DoesNotFitError(
        f"quantize needs {phases[phase] / 2**30:.2f} GiB of {memory} at the least, in the {phase} ({told} GiB), "
        f"and may take {limit / 2**30:.2f}; give it more ({option}), fewer or shorter calibration samples, "
        f"{_less_effort(least, phase)}or a recipe that does not calibrate there"
    )


def _less_effort(least: Prediction, phase: str) -> str:
    if phase in OF_WHOLE_MODEL:
        return "--effort default (and no gptq.loss: answers in the recipe), "
    return "--effort fast, " if least.chains > 1 else ""


def address_space() -> int | None:
    """What is left of this process's address space, where that is limited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft - int(psutil.Process().memory_info().vms)


def available_bytes() -> int:
    """What this process may still take: of the machine, of its control group, of its address space."""
    found = [SHARE * psutil.virtual_memory().available]
    for file in CGROUPS:
        try:
            content = file.read_text().strip()
        except OSError:
            continue
        if content.isdecimal() and int(content) < psutil.virtual_memory().total:
            found.append(SHARE * int(content) - resident_bytes())
    if (left := address_space()) is not None:
        found.append(left)
    return int(min(found))


def available_device_bytes(device: torch.device) -> int | None:
    """What is free on a GPU, beside what this process holds there; None for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE * free) + torch.cuda.memory_reserved(device)


def free_bytes(device: str) -> int:
    """What is free on a GPU, or what this process may still take of the machine."""
    on_gpu = torch.device(device).type == "cuda"
    return int(torch.cuda.mem_get_info(device)[0]) if on_gpu else available_bytes()


@contextmanager
def told_of_gradients(what: str) -> Iterator[None]:
    """DoesNotFitError where memory runs out in `what`, which needs gradients of the whole model."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        raise DoesNotFitError(
            f"{what}: memory ran out; it needs gradients of the whole model: give it shorter samples, or more memory"
        ) from error


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class _Stage:
    method: str
    rows: int
    most_rows: int
    """Of one of its linears."""
    columns: int
    tokens: float
    """That pass through it."""
    aimed: bool = False
    """Whether it is told what the original model gives it."""
    coupled: bool = False
    """Whether its rows are rounded one after the other, by what they do to the answers."""

    @property
    def compares(self) -> bool:
        """Whether samples are held out for it."""
        return self.aimed or self.method == "auto"


def _stages(components: ComponentMap, plan: Plan, block: BlockInfo, tokens: int) -> list[_Stage]:
    """tokens: of all calibration passes."""
    found = []
    mixtures = [(f"{home}.", form) for home, form in components.experts.items() if home.startswith(f"{block.name}.")]
    for group in components.fused_groups(block):
        lines = [(linear, plan.line(f"{linear.name}.weight")) for linear in group]
        todo = [(linear, line) for linear, line in lines if line.action == "quantize"]
        if todo:
            first, line = todo[0]
            rows = [linear.out_features for linear, _ in todo]
            form = next((form for home, form in mixtures if first.name.startswith(home)), None)
            seen = float(tokens) if form is None else _expert_tokens(components, form, tokens)
            found.append(
                _Stage(
                    line.method or "rtn",
                    sum(rows),
                    max(rows),
                    first.in_features,
                    seen,
                    line.needs_original,
                    line.needs_gradients,
                )
            )
    return found


def _expert_tokens(components: ComponentMap, form: Form, tokens: int) -> float:
    """Tokens that an expert of a mixture is shown: those routed to it, or as many as are enough for its inputs."""
    text = components.config.get_text_config()
    routed = next((getattr(text, name) for name in CHOSEN if isinstance(getattr(text, name, None), int)), 1)
    enough = TOKENS_PER_INPUT * max(form.hidden, form.intermediate)
    return min(float(tokens), max(tokens * routed / form.experts, enough))


def _block_peak(
    stages: Sequence[_Stage],
    whole: int,
    stored: torch.dtype,
    dtype: torch.dtype,
    *,
    rerun: bool,
    row_elements: int | None,
) -> tuple[int, int, int, int]:
    """Where a block holds most: weights in it, what its stage takes, all its codes; and the widest inputs of a stage.

    whole: the numbers in the block, stored in one dtype and held in another. A linear's weights are in it from when it
    has its codes; where passes rerun, they become floats one linear at a time. row_elements: stream.ROW_ELEMENTS, or
    None where all rows are worked on at once.
    """
    quantized = sum(stage.rows * stage.columns for stage in stages)
    inside, found, met = whole - quantized, [(whole * dtype.itemsize, 0)], 0
    if rerun:
        found = [
            (inside * dtype.itemsize, FLOAT_BYTES * max((one.most_rows * one.columns for one in stages), default=0))
        ]
    for stage in stages:
        collected = stage.rows * stage.columns * stored.itemsize
        collected += FLOAT_BYTES * stage.columns**2 if stage.method in WITH_FEEDBACK | WITH_FOLDS else 0
        found.append(
            (inside * dtype.itemsize, collected + max(FLOAT_BYTES * met, _rounding_bytes(stage, row_elements)))
        )
        if rerun:
            met = max(met, stage.most_rows * stage.columns)
        else:
            inside += stage.rows * stage.columns
    resident, most = max(found, key=sum)
    return resident, most, quantized, max((stage.columns for stage in stages), default=0)


def _rounding_bytes(stage: _Stage, row_elements: int | None) -> int:
    """Beside its weights as they are stored and second moments: of the rows at hand, weights in float32, errors, codes,
    and what a search makes of them; of the largest linear its codes, in parts and joined."""
    largest = stage.most_rows * stage.columns
    part = largest if row_elements is None else min(largest, max(row_elements, ROWS * stage.columns))
    if stage.coupled:  # all rows at once, what they have lost, and what its outputs do to the answers
        plain = _rounding_bytes(replace(stage, coupled=False), None)
        return plain + FLOAT_BYTES * (max(rows_together(stage.most_rows)) ** 2 + largest)
    if stage.compares:  # the other second moments, what is held out, and weights with their corrections
        held = min(stage.tokens / HELD_EVERY, HELD_TOKENS)
        beside = (3 if stage.method == "auto" else 1) * FLOAT_BYTES * stage.columns**2
        beside += round(held) * 2 * FLOAT_BYTES * stage.columns
        whole = FLOAT_BYTES * stage.rows * stage.columns
        folds = whole + 16 * largest if stage.method in WITH_FOLDS else 0
        return max(beside + whole + 3 * FLOAT_BYTES * largest, whole + 12 * part + 2 * largest, folds)
    if stage.method in WITH_FOLDS:
        return FLOAT_BYTES * stage.rows * stage.columns + 16 * largest
    if stage.method in WITH_FEEDBACK:
        return 12 * part + 2 * largest
    return FLOAT_BYTES * stage.rows * stage.columns + 12 * part + 2 * largest


def _products(
    stages: Sequence[_Stage], block: BlockInfo, tokens: int, *, rerun: bool, chains: int = 1
) -> tuple[float, float]:
    """Multiplications of the passes, and those in float32: of second moments, of factors and of error feedback."""
    weights = sum(linear.out_features * linear.in_features for linear in block.linears)
    quantized = sum(stage.rows * stage.columns for stage in stages)
    passed = solved = 0.0
    if any(stage.method in CALIBRATED for stage in stages):
        passed += float(tokens) * (weights - quantized) + sum(one.tokens * one.rows * one.columns for one in stages)
        passed *= chains * (1 + (len(stages) / 2 if rerun else 0))
    for stage in stages:
        if stage.method in WITH_FEEDBACK | WITH_FOLDS:
            solved += 0.62 * stage.tokens * stage.columns**2
        if stage.method in WITH_FEEDBACK:
            solved += stage.columns**3 / 3 + stage.rows * stage.columns**2
        if stage.coupled:  # another factor, and feedback from row to row; forth and back through the original
            together = max(rows_together(stage.most_rows))
            solved += stage.most_rows * together * (together / 3 + stage.columns)
            passed += 2 * float(tokens) * weights / len(stages)
        if stage.compares:  # more second moments; another factor; twice what solves by it, and weights times them
            solved += stage.tokens * stage.columns**2 + stage.columns**3 / 3 + 4 * stage.rows * stage.columns**2
    return passed, solved


@measured
def _products_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications of a matrix product in a second, on as many threads as torch has."""
    side = MATRIX * (1 if device.type == "cpu" else GPU_TIMES)
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    with torch.no_grad():
        return float(side**3 / seconds(lambda: left @ right, device))
