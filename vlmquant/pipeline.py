"""The story in two functions: `quantize`, from a model to a checkpoint, and `evaluate`, from models to a report."""

import contextlib
import ctypes
import gc
import hashlib
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import vlmquant
from vlmquant import budget, compiled, gradients, kvcache, signals
from vlmquant.algorithms import ALGORITHMS, rtn
from vlmquant.budget import Limits, Passes, Prediction
from vlmquant.calibration.encode import Batch, BatchMaker, BatchReport, make_batches
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sampling import Selection, choose_samples
from vlmquant.calibration.sets import SampleSet, image_hashes, load_set
from vlmquant.checkpoint import AlreadyFinishedError, CheckpointWriter, Inputs, check_output, read_manifest
from vlmquant.checkpoint.card import base_name, base_revision, record_evaluation
from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.components import CONFIG_NAME, ComponentMap, locate_model, resolve_components, resolve_from_headers
from vlmquant.devices import AUTO, find_device, tell_device
from vlmquant.engines import Contract, check_plan
from vlmquant.errors import (
    DoesNotFitError,
    InputError,
    PlanError,
    UnknownClassError,
    UsageError,
    first_line,
    shown,
)
from vlmquant.evaluation.environment import peak_resident_bytes
from vlmquant.evaluation.inputs import check_first
from vlmquant.evaluation.remote import score_models
from vlmquant.evaluation.settings import Settings
from vlmquant.exempt import find_exempt
from vlmquant.families import Family, from_spec
from vlmquant.formats import FORMATS, bitsandbytes
from vlmquant.gate import Gate, judge, recorded_gate
from vlmquant.grid import QuantizedWeight, grid_of
from vlmquant.kernels.probe import compute_dtype, has_fast_bfloat16
from vlmquant.kvcache import Maxima
from vlmquant.limits import is_allocation_failure
from vlmquant.loading import give_back_freed_memory
from vlmquant.planning import Plan, as_written, make_plan, needs_class
from vlmquant.polish import is_tunable, needed_bytes, polish
from vlmquant.progress import bar, stderr
from vlmquant.ranks import ALONE, Ranks, refuse_different
from vlmquant.recipe import LOSSES, CalibrationSpec, Recipe, Scheme, load_recipe
from vlmquant.report.data import Report, Verdict, build_report, check_report_paths, overall, write_json, write_text
from vlmquant.report.html import to_html
from vlmquant.report.markdown import card_section, to_markdown
from vlmquant.scratch import unnamed_file
from vlmquant.sensitivity import (
    Allocation,
    Scores,
    Units,
    allocate,
    check_scores,
    find_units,
    measure,
    model_digest,
    read_scores,
    scores_text,
)
from vlmquant.shards import dtype_name, some
from vlmquant.stream import BlockResult, BlockStream, Footprint, rehearse

BOOTSTRAP_RESAMPLES = 2000
BOOTSTRAP_SEED = 0
"""Of the report's intervals."""
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
MMAP_BYTES = 1 << 20
"""Blocks from this size on are given back to the system when they are freed."""
SHOWN = 5
"""Names of a long list that a note shows."""
SEEING = frozenset({"vision_encoder", "projector"})
"""Components that only images reach."""
UNTIED = (
    "the config says that the head is the embedding (tie_word_embeddings), but the model's files hold two different "
    "tensors; both are kept, and the new config says that they are not tied"
)
BATCH_SIZE = 16
BATCH_TOKENS = 4096
"""Calibration samples in one forward pass, and their tokens with padding: enough for the matmuls, little enough for
memory."""


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did."""

    path: Path
    plan: Plan
    errors: dict[str, float]
    """Relative output error tr(E H E^T) / tr(W H W^T) by weight name."""
    notes: tuple[str, ...]
    calibration: Mapping[str, Any] | None
    seconds: float
    user_cpu_seconds: float
    peak_bytes: int
    """Largest resident size of the process so far."""
    compute_dtype: str
    planned: Prediction

    def to_json(self) -> dict[str, Any]:
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
        return {
            "path": str(self.path),
            "bytes_before": self.plan.bytes_before,
            "bytes_after": self.plan.bytes_after,
            "bits_per_weight": self.plan.bits_per_weight,
            "seconds": round(self.seconds, 1),
            "user_cpu_seconds": round(self.user_cpu_seconds, 1),
            "peak_bytes": self.peak_bytes,
            "planned": self.planned.to_json(),
            "compute_dtype": self.compute_dtype,
            "largest_errors": dict(worst),
            "notes": list(self.notes),
            "calibration": None
            if self.calibration is None
            else {k: v for k, v in self.calibration.items() if k != "images"},
        }


def quantize(
    model: str | Path,
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    device: str = AUTO,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    memory_limit: int | None = None,
    device_memory_limit: int | None = None,
    command: Sequence[str] = (),
    ranks: Ranks = ALONE,
    scores: Path | None = None,
) -> Quantized:
    """Write the quantized checkpoint of a model (a directory or hub id) to the directory `out`.

    calibration: a set's name or folder instead of the recipe's.
    device: where passes run, as find_device has it; told on stderr.
    memory_limit: bytes that the process may hold; DoesNotFitError before any work where it would need more. Without
    one, what the machine and its limits leave decides how the passes run (budget.WAYS).
    device_memory_limit: the same of a GPU's memory, where that is the device.
    dtype: of the forward passes; None is `calibration_dtype`.
    command: what card and manifest call the command that makes the same again, in another place.
    ranks: the processes that share the work (ranks.join), each of which calls this with the same arguments. The first
    writes; the same codes as one process makes, where their machines compute alike.
    scores: for a recipe with a budget, the file of what layers lose: read if it is there, else measured and written.
    Raises a VlmquantError for whatever is wrong with the input, before anything is written where that can be known.
    """
    started, cpu_started = time.monotonic(), _user_cpu_seconds()
    _return_freed_memory()
    device = find_device(ranks.device if device == AUTO and ranks.size > 1 else device)
    if ranks.leads:
        tell_device(device)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    bought: Allocation | None = None
    if recipe.budget:
        check_output(Path(out), locate_model(model), resume=resume, force=force)
        bought = spend_budget(
            model,
            recipe,
            calibration=calibration,
            device=device,
            scores=scores,
            trust_remote_code=trust_remote_code,
            ranks=ranks,
        )
        recipe = bought.recipe
    source = _find_source(model, recipe, trust_remote_code=trust_remote_code)
    components, plan = plan_components(source, recipe)
    if (contract := check_target(components, plan, recipe)) is not None and not contract.fits:
        raise _refused(contract)
    check_output(Path(out), components.model_dir, resume=resume, force=force)
    inputs = Inputs(components)
    errors: dict[str, float] = {}
    notes = [UNTIED] if components.untied else []
    notes += bought.notes if bought else ()
    selection = None
    batches: list[BatchMaker] = []
    footprint = Footprint({}, 0)
    dtype = dtype or ranks.first(lambda: calibration_dtype(device))
    manifest: dict[str, Any] = {
        "command": _repeatable(command, components.model_dir),
        "settings": {"compute_dtype": dtype_name(dtype), "threads": torch.get_num_threads()},
    }
    if bought:
        manifest["budget"] = bought.to_json()
    if plan.cache or any(line.needs_data for line in plan.lines):
        chosen = _calibration_of(recipe, calibration)
        selection = choose_samples(load_set(chosen.set), chosen)
        inputs.watch(path for sample in selection.samples for path in sample.images)
        batches, made = make_batches(
            selection.samples,
            load_processor(components.model_dir),
            max_tokens=chosen.max_tokens,
            batch_size=BATCH_SIZE,
            batch_tokens=BATCH_TOKENS,
        )
        _refuse_idle(ranks, batches)
        manifest["calibration"] = _calibration_record(selection, made, set_name=chosen.set)
        notes += _calibration_notes(selection, made, chosen)
        used = [sample for sample in selection.samples if sample.id not in made.too_long]
        notes += _without_images(used, components, plan, set_name=chosen.set)
        limits = (memory_limit, device_memory_limit, ranks.here)
        against = ranks.first(
            partial(_reason_against_answers, recipe, components, plan, batches, dtype, torch.device(device), *limits)
        )
        if against:
            recipe = _for_layers(recipe)
            components, plan = plan_components(source, recipe)
            notes.append(f"components.language.gptq.loss: layer, and not answers: {against}")
        footprint = rehearse(components, plan, batches, dtype=dtype, device=torch.device(device), ranks=ranks)
    whole = _whole_model_bytes(recipe, components, plan, batches, dtype)
    planned = _plan_work(
        components, plan, footprint, dtype, torch.device(device), whole, memory_limit, device_memory_limit, ranks
    )
    notes += [planned.passes.label] if planned.passes.rerun else []
    exempt = _exempt(components, plan, recipe, batches, dtype, torch.device(device), planned.passes, ranks)
    if exempt:
        components, plan = plan_components(source, recipe, exempt)
        notes += [f"{name}: stays at 16 bits: {why}" for name, why in exempt.items()]
    fingerprint = _fingerprint(recipe, selection, dtype)
    refuse_different(ranks, fingerprint)
    writer = CheckpointWriter(
        Path(out), components, recipe, plan, fingerprint=fingerprint, inputs=inputs, resume=resume, force=force
    )
    try:
        with ranks.leading(writer):
            if recipe.output.format == "bitsandbytes":
                ranks.first(lambda: bitsandbytes.write_bitsandbytes(components, plan, recipe, writer.partial))
            else:
                moments = _find_output_moments(writer, batches, dtype, torch.device(device), ranks)
                done = quantize_blocks(
                    writer,
                    batches,
                    dtype=dtype,
                    device=torch.device(device),
                    passes=planned.passes,
                    ranks=ranks,
                    output_moments=moments,
                )
                errors = done.errors
                notes += [*done.notes, *_target_note(done.alphas), *_errors_note(errors, plan)]
                if done.alphas:
                    manifest["alphas"] = {name: round(alpha, 4) for name, alpha in done.alphas.items()}
                if done.methods:
                    manifest["methods"] = done.methods
                    notes.append(_methods_note(done.methods))
                manifest["settings"]["batch_size"] = ranks.first(lambda: batch_size(writer))
                if done.expert_tokens:
                    manifest["experts"] = done.expert_tokens
                    notes.append(_expert_note(done.expert_tokens, recipe))
                if plan.cache:
                    notes.append(kvcache.note(plan.cache, done.cache))
            manifest["work"] = _work_record(planned, memory_limit, time.monotonic() - started, device, ranks)
            ranks.first(lambda: writer.finish(manifest | {"errors": errors, "notes": notes}))
    except AlreadyFinishedError:
        finished = ranks.first(lambda: read_manifest(writer.out))
        errors, notes = finished["errors"], [*finished["notes"], "an earlier run had finished this checkpoint"]
    if "polish" in whole:
        notes += ranks.first(lambda: _polish(Path(out), components.model_dir, chosen.set, device))
    return Quantized(
        path=Path(out),
        plan=plan,
        errors=errors,
        notes=tuple(notes),
        calibration=manifest.get("calibration"),
        seconds=time.monotonic() - started,
        user_cpu_seconds=sum(ranks.gather(_user_cpu_seconds() - cpu_started)),
        peak_bytes=peak_resident_bytes(),
        compute_dtype=dtype_name(dtype),
        planned=planned,
    )


def _exempt(
    components: ComponentMap,
    plan: Plan,
    recipe: Recipe,
    batches: Sequence[Callable[[], Batch]],
    dtype: torch.dtype,
    device: torch.device,
    passes: Passes,
    ranks: Ranks,
) -> dict[str, str]:
    try:
        return find_exempt(
            components, plan, recipe, batches, dtype=dtype, device=device, rerun=passes.rerun, ranks=ranks
        )
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_allocation_failure(error):
            raise
        raise _out_of_memory(error) from error


@dataclass(frozen=True)
class Sensitivity:
    """What the linears of a model lose by each scheme."""

    components: ComponentMap
    units: Units
    scores: Scores


def find_sensitivity(
    model: str | Path,
    recipe: Recipe,
    *,
    calibration: str | Path | None = None,
    device: str = AUTO,
    scores: Path | None = None,
    schemes: Sequence[Scheme | str] | None = None,
    kept: bool = False,
    trust_remote_code: bool = False,
    ranks: Ranks = ALONE,
) -> Sensitivity:
    """Of the components that a recipe quantizes: read from the file `scores` if it is there, else measured on the
    calibration set, and written into it.

    kept: measure those that it keeps as well, rounded to nearest. schemes: tried instead of the recipe's budget's.
    """
    components, _ = plan_model(model, recipe.model_copy(update={"budget": None}), trust_remote_code=trust_remote_code)
    there = scores is not None and scores.exists()
    units = find_units(components, recipe, kept=kept and not there, schemes=schemes)
    inputs = Inputs(components)
    if scores is not None and there:
        found = read_scores(scores)
        check_scores(found, units.units, model_digest(inputs), where=str(scores))
        return Sensitivity(components, units, found)
    if ranks.size > 1:
        raise UsageError(
            f"what layers lose is measured by one process, and here are {ranks.size}: run `vlmquant sensitivity` with "
            "this recipe first, and give its file with --scores"
        )
    if scores is not None:
        check_report_paths({"--scores": scores}, apart=[components.model_dir])
    spec = _calibration_of(recipe, calibration)
    found = measure(components, recipe, units.units, spec, device=device, inputs=inputs)
    if scores is not None:
        write_text(scores, scores_text(found))
    return Sensitivity(components, units, found)


def spend_budget(
    model: str | Path,
    recipe: Recipe,
    *,
    calibration: str | Path | None = None,
    device: str = AUTO,
    scores: Path | None = None,
    trust_remote_code: bool = False,
    ranks: Ranks = ALONE,
) -> Allocation:
    """The schemes that the budget of a recipe buys, and the recipe that has them: see find_sensitivity."""
    assert recipe.budget is not None
    found = find_sensitivity(
        model,
        recipe,
        calibration=calibration,
        device=device,
        scores=scores,
        trust_remote_code=trust_remote_code,
        ranks=ranks,
    )
    gc.collect()  # the model that was measured lies in circles
    return allocate(found.components, recipe, found.units, found.scores, recipe.budget)


def calibration_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a CPU that is made for it, float32 on others: what a CPU is, whatever a clock says, so that it always
    calibrates alike. On a GPU it is what is faster there.

    On held-out samples bfloat16 loses no more, in less time and memory (benchmarks/accuracy/LOG.md,
    benchmarks/results/calibration_dtype.md).
    """
    if torch.device(device).type != "cpu":
        return compute_dtype(device)
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def _calibration_of(recipe: Recipe, calibration: str | Path | None) -> CalibrationSpec:
    """The recipe's, or with another set."""
    spec = recipe.calibration.at(recipe.effort)
    return spec if calibration is None else spec.model_copy(update={"set": str(calibration)})


def _whole_model_bytes(
    recipe: Recipe, components: ComponentMap, plan: Plan, batches: Sequence[BatchMaker], dtype: torch.dtype
) -> dict[str, int]:
    """Memory for gradients of the whole model, by the phases that take them, beside what the process holds before."""
    found = dict[str, int]()
    if not batches:
        return found
    if lines := [line for line in plan.lines if line.needs_gradients]:
        tokens, followed = gradients.longest(batches, text_alone=gradients.need_text_alone(lines))
        found["gradients"] = gradients.needed_bytes(components, lines, dtype, tokens=tokens, followed=followed)
    if recipe.effort == "high" and any(is_tunable(line.scheme, line.component) for line in plan.lines):
        coded = {line.name for line in plan.lines if line.action == "quantize"}
        tokens, followed = gradients.longest(batches, text_alone=True)
        found["polish"] = needed_bytes(components, coded, tokens=tokens, followed=followed)
    return found


def _reason_against_answers(
    recipe: Recipe,
    components: ComponentMap,
    plan: Plan,
    batches: Sequence[BatchMaker],
    dtype: torch.dtype,
    device: torch.device,
    memory_limit: int | None,
    device_memory_limit: int | None,
    processes: int,
) -> str | None:
    """Why a language model, which the effort alone has rounded by the answers, cannot be; None where nobody has to ask.

    processes: which share this machine's memory.
    """
    if not (names := _by_effort_alone(recipe, plan)):
        return None
    if device.type == "cpu":
        held = budget.resident_bytes()
        left = budget.available_bytes() // processes if memory_limit is None else memory_limit - held
    else:
        there = budget.available_device_bytes(device) if device_memory_limit is None else device_memory_limit
        left = there or 0
    too_much = _too_much_for_answers(recipe, components, plan, batches, dtype, left)
    return too_much or gradients.reason_against(components, names, batches, dtype, device)


def _by_effort_alone(recipe: Recipe, plan: Plan) -> list[str]:
    """The linears of a language model that are rounded by the answers though no recipe asks for it in words."""
    if recipe.components.language.gptq.loss or LOSSES[recipe.effort]:
        return []
    lines = [line for line in plan.lines if line.needs_gradients and line.component == "language"]
    return [line.name.removesuffix(".weight") for line in lines]


def _too_much_for_answers(
    recipe: Recipe, components: ComponentMap, plan: Plan, batches: Sequence[BatchMaker], dtype: torch.dtype, left: int
) -> str | None:
    """left: bytes that may still be taken."""
    needed = _whole_model_bytes(recipe, components, plan, batches, dtype).get("gradients", 0)
    if needed <= left:
        return None
    sizes = [f"{size / 2**30:.1f}" for size in (needed, max(left, 0))]
    return "gradients of the whole model need about {} GiB of memory, of which {} are left".format(*sizes)


def _for_layers(recipe: Recipe) -> Recipe:
    """Whose language model is rounded for the outputs of its layers, all alike."""
    language = recipe.components.language
    gptq = language.gptq.model_copy(update={"loss": "layer"})
    language = language.model_copy(update={"gptq": gptq})
    return recipe.model_copy(update={"components": recipe.components.model_copy(update={"language": language})})


def _find_output_moments(
    writer: CheckpointWriter, batches: Sequence[BatchMaker], dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> dict[str, list[Tensor]]:
    """Of the linears that need it and are still to be quantized; the first process has them."""
    plan, blocks = writer.plan, writer.components.blocks
    names = [
        linear.name
        for block in blocks
        if ranks.leads and block.name not in writer.finished
        for linear in block.linears
        if plan.line(f"{linear.name}.weight").needs_gradients
    ]
    if not names:
        return {}
    return gradients.output_moments(
        writer.components,
        names,
        batches,
        text_alone=gradients.need_text_alone([line for line in plan.lines if line.needs_gradients]),
        dtype=dtype,
        device=device,
        folder=_spill_folder(writer, ranks),
    )


def _polish(out: Path, model_dir: Path, calibration: str, device: str) -> tuple[str, ...]:
    """Polish a finished checkpoint in its place, unless it is; what there is to say of it."""
    if "polish" in read_manifest(out):
        return ()
    done = polish(out, model_dir, out, calibration=calibration, device=device, force=True)
    return done.notes


def plan_work(
    components: ComponentMap,
    plan: Plan,
    recipe: Recipe,
    *,
    calibration: str | Path | None = None,
    device: torch.device | None = None,
    memory_limit: int | None = None,
) -> list[Prediction]:
    """What quantizing on the CPU, or a GPU, would take, for each way to run the calibration passes: budget.ways.

    memory_limit: bytes that it may hold; within them no gradients are taken that nobody asks for in words.
    Encodes the calibration set and sends its first sample through the vision encoder, on the CPU; the weights on its
    way are read. A GPU need not be there: it is taken for one that computes in bfloat16.
    """
    _return_freed_memory()
    device = device or torch.device("cpu")
    dtype, footprint, batches = torch.bfloat16, Footprint({}, 0), list[BatchMaker]()
    if device.type == "cpu" or torch.cuda.is_available():
        dtype = calibration_dtype(device)
    if plan.cache or any(line.needs_data for line in plan.lines):
        chosen = _calibration_of(recipe, calibration)
        samples = choose_samples(load_set(chosen.set), chosen).samples
        processor = load_processor(components.model_dir)
        batches, _ = make_batches(
            samples,
            processor,
            max_tokens=chosen.max_tokens,
            batch_size=BATCH_SIZE,
            batch_tokens=BATCH_TOKENS,
        )
        left = sys.maxsize if memory_limit is None else memory_limit - budget.resident_bytes()
        if _by_effort_alone(recipe, plan) and _too_much_for_answers(recipe, components, plan, batches, dtype, left):
            recipe = _for_layers(recipe)
            plan = make_plan(components, recipe)
        footprint = rehearse(components, plan, batches, dtype=dtype, device=torch.device("cpu"))
    whole = _whole_model_bytes(recipe, components, plan, batches, dtype)
    return _predictions(components, plan, footprint, dtype, device, whole)


def _predictions(
    components: ComponentMap,
    plan: Plan,
    footprint: Footprint,
    dtype: torch.dtype,
    device: torch.device,
    whole: Mapping[str, int],
) -> list[Prediction]:
    """whole: see _whole_model_bytes."""
    compiled.available()  # numba is loaded at its first use
    base = budget.resident_bytes()
    ways = budget.ways(device) if footprint.components else budget.WAYS[:1]
    found = [
        budget.predict(components, plan, footprint, base=base, dtype=dtype, passes=way, device=device) for way in ways
    ]
    for phase, needed in whole.items():
        found = [one.with_phase(phase, {"process": base, "gradients": needed}) for one in found]
    return found


def _plan_work(
    components: ComponentMap,
    plan: Plan,
    footprint: Footprint,
    dtype: torch.dtype,
    device: torch.device,
    whole: Mapping[str, int],
    memory_limit: int | None,
    device_memory_limit: int | None,
    ranks: Ranks,
) -> Prediction:
    """How the passes are to run: the fastest way that fits, for each of the processes. The smallest of those within
    the limits given is tried where none fits into what there is."""
    tried = _predictions(components, plan, footprint, dtype, device, whole)
    held, left = budget.resident_bytes(), budget.address_space()
    host = held + budget.available_bytes() // ranks.here
    if memory_limit is not None:
        host = memory_limit if left is None else min(memory_limit, held + left)
    asked = Limits(None if memory_limit is None else host, device_memory_limit)
    budget.choose(tried, asked)
    allowed = [way for way in tried if way.fits(asked)]
    there = budget.available_device_bytes(device) if device_memory_limit is None else device_memory_limit
    chosen = next((way for way in allowed if way.fits(Limits(host, there))), allowed[-1])
    return tried[max(ranks.gather(tried.index(chosen)))]


def _refuse_idle(ranks: Ranks, batches: Sequence[BatchMaker]) -> None:
    if ranks.size > len(batches):
        raise UsageError(
            f"{ranks.size} processes cannot share {len(batches)} batches of calibration samples; start at most "
            f"{len(batches)}, or take more samples"
        )


def _work_record(
    planned: Prediction, memory_limit: int | None, seconds: float, device: str, ranks: Ranks
) -> dict[str, Any]:
    """Memory and time as they were planned, and as they were."""
    return {
        "passes": planned.passes.label,
        "processes": ranks.size,
        "memory_limit": memory_limit,
        "planned": planned.to_json(),
        "peak_bytes": peak_resident_bytes(),
        **(
            {"device_peak_bytes": torch.cuda.max_memory_allocated(device)}
            if torch.device(device).type == "cuda"
            else {}
        ),
        "seconds": round(seconds, 1),
    }


def quantize_blocks(
    writer: CheckpointWriter,
    batches: Sequence[Callable[[], Batch]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    passes: Passes | None = None,
    ranks: Ranks = ALONE,
    output_moments: Mapping[str, Sequence[Tensor]] | None = None,
) -> BlockResult:
    """Choose and record the codes of all weights that the writer's plan quantizes, those restored from it apart.

    Returns errors, notes, tokens per expert and cached maxima of all blocks together; codes are with the writer. Where
    memory runs out, the calibration passes begin anew with single samples, for the blocks that are left; then
    DoesNotFitError, which several processes raise at once.
    """
    size = ranks.first(lambda: batch_size(writer))
    try:
        return _quantize_blocks(
            writer, batches, size, dtype=dtype, device=device, passes=passes, ranks=ranks, output_moments=output_moments
        )
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_allocation_failure(error):
            raise
        if size == 1 or not batches or ranks.size > 1:
            raise _out_of_memory(error) from error
        note = (
            f"calibration: memory ran out with {size} samples in a batch, when {len(writer.records()) - 1} of "
            f"{len(writer.components.blocks)} blocks were done; the others saw one sample at a time"
        )
    gc.collect()  # the passes that were given up hold their activations in circles
    stderr.print(note, soft_wrap=True, markup=False)
    try:
        return _quantize_blocks(
            writer, batches, 1, dtype=dtype, device=device, passes=passes, note=note, output_moments=output_moments
        )
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_allocation_failure(error):
            raise
        raise _out_of_memory(error) from error


def batch_size(writer: CheckpointWriter) -> int:
    """Calibration samples in a batch, which a resumed run must go on with."""
    return min((record.get("batch_size") or BATCH_SIZE for record in writer.records()), default=BATCH_SIZE)


def _out_of_memory(error: BaseException) -> DoesNotFitError:
    return DoesNotFitError(
        f"quantize: memory ran out ({first_line(error)}); where there is more of it, run again with --resume to go on "
        "from the finished blocks"
    )


def _quantize_blocks(
    writer: CheckpointWriter,
    batches: Sequence[Callable[[], Batch]],
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    passes: Passes | None = None,
    ranks: Ranks = ALONE,
    note: str | None = None,
    output_moments: Mapping[str, Sequence[Tensor]] | None = None,
) -> BlockResult:
    """note: why this size, from here on."""
    components, plan, recipe = writer.components, writer.plan, writer.recipe
    outside = ranks.first(lambda: _restore(writer, None))
    if outside is None or note:
        codes = ranks.first(lambda: _quantize_outside(components, plan))
        outside = made = BlockResult(codes, {}, notes=(note,) if note else ())
        ranks.first(lambda: _record(writer, None, made, batch_size=size))
    stream = BlockStream(
        components,
        plan,
        dict(recipe.specs()),
        [piece for make in batches for piece in (make.split(size) if isinstance(make, BatchMaker) else [make])],
        outside=outside.quantized,
        restore=lambda info: ranks.first(lambda: _restore(writer, info.name)),
        dtype=dtype,
        device=device,
        experts=recipe.calibration.experts,
        token_weights=recipe.calibration.token_weights,
        rerun=passes is not None and passes.rerun,
        spill=_spill_folder(writer, ranks) if passes is not None and passes.spill else None,
        ranks=ranks,
        output_moments=output_moments,
    )
    errors: dict[str, float] = {}
    notes = list(outside.notes)
    expert_tokens: dict[str, list[int]] = {}
    cache: dict[str, Maxima] = {}
    alphas: dict[str, float] = {}
    methods: dict[str, str] = {}
    with bar("quantize", total=len(components.blocks), visible=ranks.leads) as progress:
        for block in stream:
            for stage in block.stages():
                signals.check()
                stage.finish(ALGORITHMS[stage.method](stage))
                give_back_freed_memory()
            if not block.restored:
                result = block.result
                ranks.first(partial(_record, writer, block.info.name, result))
            errors |= block.errors
            notes += block.notes
            expert_tokens |= block.expert_tokens
            cache |= block.cache
            alphas |= block.alphas
            methods |= block.methods
            progress.step(f"quantize {block.info.component}")
    return BlockResult({}, {}, errors, tuple(notes), expert_tokens, cache, methods, alphas)


def find_components(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    family: Family | None = None,
    needing_class: Sequence[str] = (),
) -> ComponentMap:
    """The components of a model (a directory or hub id): as its class has them; else, where nothing needs the class,
    as the names and shapes of its tensors tell."""
    model_dir = locate_model(model)
    try:
        return resolve_components(model_dir, trust_remote_code=trust_remote_code, family=family)
    except UnknownClassError as error:
        if needing_class:
            raise UnknownClassError(f"{error}; {_WITHOUT_CLASS.format(some(needing_class))}") from error
        why = str(error).removeprefix(f"{model_dir / CONFIG_NAME}: ").removeprefix(f"{model_dir}: ")
        return resolve_from_headers(model_dir, unknown=why, family=family)


def _spill_folder(writer: CheckpointWriter, ranks: Ranks) -> Path:
    """On the disk of the output; a process on a machine that does not have it takes the one for temporary files."""
    folder = writer.partial if ranks.leads else writer.out.parent
    return folder if folder.is_dir() else Path(tempfile.gettempdir())


def plan_model(model: str | Path, recipe: Recipe, *, trust_remote_code: bool = False) -> tuple[ComponentMap, Plan]:
    """What becomes of every tensor of a model (a directory or hub id), before any work.

    Where the model has no class here and the recipe needs none, the names and shapes of its tensors say what they are.
    Raises InputError or PlanError for whatever would keep `quantize` from writing it.
    """
    return plan_components(_find_source(model, recipe, trust_remote_code=trust_remote_code), recipe)


def _find_source(model: str | Path, recipe: Recipe, *, trust_remote_code: bool) -> ComponentMap:
    family = from_spec(recipe.family) if recipe.family else None
    return find_components(model, trust_remote_code=trust_remote_code, family=family, needing_class=needs_class(recipe))


def plan_components(
    components: ComponentMap, recipe: Recipe, exempt: Mapping[str, str] | None = None
) -> tuple[ComponentMap, Plan]:
    """The same of a model that is known; with it the model as the plan writes what it keeps. exempt: make_plan's."""
    plan = make_plan(components, recipe, exempt)
    components = as_written(components, plan, recipe)
    if recipe.output.format in FORMATS:
        FORMATS[recipe.output.format].quantization_config(plan, components)
    return components, plan


_WITHOUT_CLASS = "without its class go recipes that need no calibration (method rtn throughout); this one has {}"


def check_target(components: ComponentMap, plan: Plan, recipe: Recipe) -> Contract | None:
    """What the recipe's target makes of the plan; None where it names none, or the format is no engine's."""
    if recipe.target is None or recipe.output.format not in FORMATS:
        return None
    return check_plan(components, plan, recipe.target, format=recipe.output.format)


def _refused(contract: Contract) -> PlanError:
    target = contract.target
    place = ", ".join([f"{target.engine} {contract.version}", *([target.gpu] if target.gpu else []), f"tp {target.tp}"])
    told = "\n".join(map(str, contract.refusals))
    return PlanError(f"the recipe's target {place} does not take this:\n{told}")


MODEL = "MODEL"
"""Stands in a command for the model."""


def _repeatable(command: Sequence[str], model_dir: Path) -> list[str]:
    """A command with the model as others can have it: by its id and commit on the hub, or by its bare name."""
    revision = base_revision(model_dir)
    name = base_name(model_dir) + (f"@{revision}" if revision else "")
    return [name if word == MODEL else word for word in command]


def _record(writer: CheckpointWriter, unit: str | None, result: BlockResult, **more: int) -> None:
    record = {"errors": result.errors, "notes": list(result.notes), "experts": result.expert_tokens, **more}
    if result.alphas:
        record["alphas"] = result.alphas
    if result.methods:
        record["methods"] = result.methods
    if result.cache:
        record["cache"] = {name: asdict(maxima) for name, maxima in result.cache.items()}
    writer.add(unit, result.quantized, result.changed, record)


def _restore(writer: CheckpointWriter, unit: str | None) -> BlockResult | None:
    """A finished unit of an earlier run, as it was recorded."""
    if (kept := writer.restored(unit)) is None:
        return None
    quantized, changed, record = kept
    cache = kvcache.from_record(record)
    return BlockResult(
        quantized,
        changed,
        record["errors"],
        tuple(record["notes"]),
        record.get("experts", {}),
        cache,
        record.get("methods", {}),
        record.get("alphas", {}),
    )


LITTLE_HELD = 0.3
"""Below it, most of what a layer learned from the calibration samples was no use for others."""


def _target_note(alphas: Mapping[str, float]) -> list[str]:
    """How much of what makes up for earlier layers' errors held on samples held out: whether samples were enough."""
    if not alphas:
        return []
    kinds: dict[str, list[float]] = {}
    for name, alpha in alphas.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(alpha)
    told = ", ".join(f"{kind} {median(found):.2f}" for kind, found in kinds.items())
    few = sum(alpha < LITTLE_HELD for alpha in alphas.values())
    advice = f"; {few} of {len(alphas)} are below {LITTLE_HELD:g}: more calibration samples would help" if few else ""
    return [f"target: of the correction by the original's outputs, held-out samples confirm (median): {told}{advice}"]


OUTLYING = 5.0
"""Times the median of its like in other layers: a linear that loses more is told of."""
LEAST_TOLD = 1e-3
"""Of the square of its outputs: a linear that loses less loses nothing to speak of, whatever its like lose."""
LEAST_ALIKE = 4
"""Linears whose median says what is usual."""
MOST_TOLD = 5
"""By name, in one note."""


def _errors_note(errors: Mapping[str, float], plan: Plan) -> list[str]:
    """Which linears lose far more than those of their name and scheme in other layers: where a model may be broken."""
    labels = {line.name: line.scheme_label for line in plan.lines}
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for name, error in errors.items():
        kinds.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), labels[name]), {})[name] = error
    far: list[tuple[float, float, str]] = []
    for alike in kinds.values():
        usual = median(alike.values())
        if len(alike) >= LEAST_ALIKE and usual > 0:
            least = max(OUTLYING * usual, LEAST_TOLD)
            far += [(error / usual, error, name) for name, error in alike.items() if error > least]
    told = [
        f"{name.removesuffix('.weight')} ({error:.2g}, {times:.0f} times the median of its like)"
        for times, error, name in sorted(far, reverse=True)
    ]
    if not told:
        return []
    more = f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return [
        f"errors: of the square of what it puts out, rounding takes far more from {', '.join(told[:MOST_TOLD])}{more}; "
        "where eval shows a loss, more bits there may mend it (overrides in the recipe)"
    ]


def _methods_note(methods: Mapping[str, str]) -> str:
    counts = Counter(methods.values())
    told = ", ".join(f"{method} for {count}" for method, count in counts.most_common())
    return f"auto: by their loss on samples held out, {told} of {len(methods)} linears"


def _expert_note(tokens: Mapping[str, list[int]], recipe: Recipe) -> str:
    """How many calibration tokens the experts saw, over all layers."""
    counts = [count for layer in tokens.values() for count in layer]
    least = recipe.calibration.experts.least_tokens
    starving = sum(count < least for count in counts)
    return (
        f"experts: {len(counts)} in {len(tokens)} layers; calibration tokens routed to each: least {min(counts)}, "
        f"median {median(counts):g}; {starving} ({starving / len(counts):.1%}) below {least}"
    )


def _quantize_outside(components: ComponentMap, plan: Plan) -> dict[str, QuantizedWeight]:
    """Codes of embedding, projector and head where the recipe wants them: to nearest, as no data is collected there."""
    inside = tuple(f"{info.name}." for info in components.blocks)
    quantized = {}
    for line in plan.lines:
        if isinstance(line.scheme, Scheme) and line.action == "quantize" and not line.name.startswith(inside):
            weight = components.read(line.name)
            grid = grid_of(line.scheme, weight.shape[1], components.dtype).fitted(weight)
            quantized[line.name] = rtn.quantize_weight(weight, grid)
    return quantized


def evaluate(
    reference: str | Path,
    models: Sequence[str | Path],
    data: str | Path,
    *,
    limit: int | None = None,
    strata: Mapping[str, int] | None = None,
    settings: Settings | None = None,
    command: Sequence[str] = (),
) -> Report:
    """Score the reference and every model on the same samples of a set, in processes of their own, and time each in
    turns with the reference.

    limit: at most so many samples, shared among the tasks. strata: so many of each task, in file order; None and None
    take them all. Raises InputError where a model was calibrated on images of the set.
    """
    settings = settings or Settings()
    settings = replace(settings, device=find_device(settings.device))
    tell_device(settings.device)
    selection = choose_held_out(data, limit=limit, strata=strata)
    directories = [locate_model(model) for model in (reference, *models)]
    for model_dir in directories[1:]:
        _refuse_calibration_images(model_dir, selection, data)
    labels = _labels(directories)
    check_first(directories, selection.samples, allow_other=settings.allow_other_inputs)
    with unnamed_file() as record:
        base, *runs = score_models(directories, selection.samples, settings, record=record, labels=labels)
    return build_report(
        base,
        runs,
        command=command,
        hashes={"evaluation set": selection.sha256},
        seed=BOOTSTRAP_SEED,
        resamples=BOOTSTRAP_RESAMPLES,
    )


def choose_held_out(
    data: str | Path, *, limit: int | None = None, strata: Mapping[str, int] | None = None
) -> Selection:
    """The samples of a set that `evaluate` scores. InputError where it has fewer than strata ask for."""
    sample_set = load_set(data)
    selection = choose_samples(sample_set, _evaluation_spec(sample_set, limit, strata))
    for row in selection.short:
        raise InputError(
            f"{data}: has {row.asked - row.got} {row.task} samples fewer than were asked for; ask for fewer"
        )
    return selection


def _evaluation_spec(sample_set: SampleSet, limit: int | None, strata: Mapping[str, int] | None) -> CalibrationSpec:
    if strata is not None:
        return CalibrationSpec(strata=dict(strata), samples=sum(strata.values()), order="file")
    return CalibrationSpec(samples=min(limit or len(sample_set.samples), len(sample_set.samples)))


def _refuse_calibration_images(model_dir: Path, selection: Selection, data: str | Path) -> None:
    """A model must not be judged on what it was calibrated on."""
    if not (model_dir / MANIFEST_NAME).is_file():
        return
    seen = set((read_manifest(model_dir).get("calibration") or {}).get("images", ()))
    shown = image_hashes(selection.samples)
    if both := sorted(sample for digest, sample in shown.items() if digest in seen):
        raise InputError(
            f"{data}: {len(both)} of its images ({', '.join(both[:3])}{', ...' if len(both) > 3 else ''}) "
            f"are in the calibration set of {model_dir}; evaluate on others"
        )


def _labels(directories: Sequence[Path]) -> list[str]:
    """A short name for each model that no other has: its directory's, or as much of its path as tells it apart."""
    labels: list[str] = []
    for directory in directories:
        parts = directory.resolve().parts[1:] or (str(directory),)
        others = [other.resolve().parts[1:] for other in directories if other.resolve() != directory.resolve()]
        depth = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        label = "/".join(parts[-depth:])
        labels.append(label if label not in labels else f"{label} ({labels.count(label) + 1})")
    return labels


def write_report(
    report: Report,
    *,
    data: str | Path,
    out: Path | None,
    html: Path | None,
    markdown: Path | None,
    gate: Gate | None = None,
) -> list[Path]:
    """Write the report in the forms asked for; the paths written. HTML and Markdown open with the gate's verdict.

    data: the set it was measured on, whose questions and images the page shows. gate: None for the recorded one.
    """
    check_report_paths({"out": out, "html": html, "markdown": markdown})
    gate, verdicts = _judged(report, gate)
    written = []
    if out is not None:
        write_json(report, out)
        written.append(out)
    if markdown is not None:
        write_text(markdown, to_markdown(report, verdicts, thresholds=gate.source))
        written.append(markdown)
    if html is not None:
        write_text(html, to_html(report, verdicts, load_set(data).samples, thresholds=gate.source))
        written.append(html)
    return written


def put_into_card(report: Report, model_dir: Path, gate: Gate | None = None) -> None:
    """Write what was measured into the card of a checkpoint, and the gate's verdict into its manifest as well.

    gate: None for the recorded one. CheckpointError where the card is not as we wrote it.
    """
    gate, verdicts = _judged(report, gate)
    evaluation = {"gate": overall(verdicts) if verdicts else None, "created": report.created, "hashes": report.hashes}
    record_evaluation(model_dir, evaluation, card_section(report, verdicts, thresholds=gate.source))


def _judged(report: Report, gate: Gate | None) -> tuple[Gate, list[Verdict]]:
    """The gate, and its verdicts; none where it has no threshold."""
    gate = gate or recorded_gate(report)
    return gate, judge(report, gate.specs) if gate.judges else []


def _calibration_record(selection: Selection, made: BatchReport, *, set_name: str) -> dict[str, Any]:
    """What the manifest says of the calibration: enough to repeat it, and to refuse its images in an evaluation."""
    return {
        "set": Path(set_name).name,
        "sha256": selection.sha256,
        "strata": [asdict(row) for row in selection.strata],
        **asdict(made),
        "images": sorted(image_hashes(selection.samples)),
    }


def _calibration_notes(selection: Selection, made: BatchReport, spec: CalibrationSpec) -> list[str]:
    """What of the calibration is not as it was asked for."""
    notes = [
        f"calibration: {row.got} {shown(row.task)} samples, though {row.asked} were asked for: "
        f"the set {shown(spec.set)} has no more"
        for row in selection.short
    ]
    if made.too_long:
        notes.append(
            f"calibration: {len(made.too_long)} samples longer than max_tokens ({spec.max_tokens}) were left out: "
            f"{', '.join(map(shown, sorted(made.too_long)[:SHOWN]))}{', ...' if len(made.too_long) > SHOWN else ''}"
        )
    return notes


def _without_images(samples: Sequence[Sample], components: ComponentMap, plan: Plan, *, set_name: str) -> list[str]:
    """What follows from calibrating a model that sees on samples that show it nothing.

    InputError where blocks that only images reach are to be quantized on what reaches them.
    """
    if any(sample.images for sample in samples):
        return []
    waiting = {
        info.component
        for info in components.blocks
        for line in (plan.line(f"{linear.name}.weight") for linear in info.linears)
        if line.needs_data
    }
    if unreached := sorted(waiting & SEEING):
        raise InputError(
            f"calibration set {shown(set_name)}: none of its {len(samples)} samples has an image, and the recipe "
            f"quantizes the {' and the '.join(unreached)} on what images give it; take a set with images "
            "(--calibration; `vlmquant data` makes one of your data), or method rtn there"
        )
    return [f"calibration: no sample of {shown(set_name)} has an image; the language layers saw text alone"]


def _fingerprint(recipe: Recipe, selection: Selection | None, dtype: torch.dtype) -> dict[str, str]:
    """What a resumed run must share with the run that it goes on from, by name, beside the files of the model."""
    return {
        "recipe": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        "calibration": selection.sha256 if selection else "none",
        "compute_dtype": dtype_name(dtype),
        "threads": str(torch.get_num_threads()),
        "vlmquant": vlmquant.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _return_freed_memory() -> None:
    """Let glibc give every large block back when it is freed. Its own rule, which adapts, keeps up to 32 MB pieces of
    activations for later and so adds a quarter to the peak memory of a run; other C libraries have no such switch."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def _user_cpu_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
