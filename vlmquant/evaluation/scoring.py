"""Score one model on a set of samples, in a process of its own so that load time and peak memory are the model's."""

import json
import math
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vlmquant import errors, signals
from vlmquant.calibration.encode import Encoder, are_tokenized
from vlmquant.calibration.images import pixel_sha256
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.checkpoint import read_manifest
from vlmquant.errors import DoesNotFitError, InputError, SentinelError, VlmquantError, first_line, shown
from vlmquant.evaluation import process
from vlmquant.evaluation.environment import environment, peak_resident_bytes
from vlmquant.evaluation.inputs import ANSWER, difference, refuse_difference
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.metrics import is_caption, is_exact, is_short_answer
from vlmquant.evaluation.passes import (
    Scored,
    batches_of,
    generate,
    measure_rows,
    set_aside,
    special_tokens,
    teacher_forced,
    time_decoding,
)
from vlmquant.evaluation.records import Costs, Run, SampleScore
from vlmquant.evaluation.settings import Settings
from vlmquant.kernels.probe import compute_dtype
from vlmquant.kvcache import simulate
from vlmquant.limits import is_allocation_failure
from vlmquant.loading import load_model, reading_part
from vlmquant.progress import bar, stderr
from vlmquant.shards import some

MANIFEST = "vlmquant.json"
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
SMALLER = 4
"""Where memory runs out, batches are made so many times smaller, once."""

Scores = TypeVar("Scores")


def score_model(
    model_dir: Path,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    reference: LogProbs | None,
    record: Path | None,
    label: str | None = None,
) -> Run:
    """Score a model in a fresh process; its progress bars go to stderr.

    reference: the reference model's log-probabilities, for KL and flips; None for the reference itself.
    record: file to write this model's own log-probabilities to. label: the run's name, else the directory's.
    Raises InputError for samples that cannot be scored, and whatever VlmquantError loading and running the model gives.
    """
    check_samples(samples)
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such model directory")
    threads = settings.threads or torch.get_num_threads()
    # Measured in this process and once, so that all models of a comparison are scored in the same dtype.
    settings = replace(settings, threads=threads, dtype=_name(_dtype(settings)))
    with ExitStack() as stack:
        shared = {
            name: stack.enter_context(path.open("r+b" if path.exists() else "x+b"))
            for name, path in (("reference", reference.path if reference else None), ("record", record))
            if path is not None
        }
        request = {
            "model_dir": str(model_dir.resolve()),
            "samples": [asdict(sample) for sample in samples],
            "settings": asdict(settings),
            **{name: f"/dev/fd/{file.fileno()}" for name, file in shared.items()},
        }
        content, status = process.run(request, files=[file.fileno() for file in shared.values()])
    if not content:
        raise _ended(model_dir, status)
    answer = json.loads(content)
    if "error" in answer:
        raise getattr(errors, answer["error"]["kind"])(answer["error"]["message"])
    return replace(Run.from_dict(answer["run"]), model=str(model_dir), label=label or model_dir.name)


def _ended(model_dir: Path, status: int) -> Exception:
    """The error for a worker that ended without an answer."""
    signals.check()  # it may have been asked to end along with us
    who = f"{model_dir}: the process that scored the model"
    number = -status if status < 0 else status - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else ""
    if number == signal.SIGKILL:
        return DoesNotFitError(
            f"{who} was ended by signal 9, as the system does when memory runs out; free some memory, or evaluate on a "
            "machine with more"
        )
    if number == signal.SIGBUS:
        return DoesNotFitError(
            f"{who} was ended by SIGBUS: a file that it reads was cut short, or a disk or memory under it is full; "
            "check the model's files, and set TMPDIR to a larger disk"
        )
    if number in CRASHES:
        return VlmquantError(f"{who} crashed ({name}) in the code of a library; please report the model")
    if name:
        return VlmquantError(f"{who} was ended by somebody else ({name}); run the evaluation again")
    return RuntimeError(f"{who} failed; its traceback stands above")


def answer_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker does with score_model's request: {"run": ...} or {"error": {kind, message}}."""
    model_dir = Path(request["model_dir"])
    try:
        run = score_here(
            model_dir,
            [sample_from_dict(sample) for sample in request["samples"]],
            Settings(**request["settings"]),
            reference=LogProbs.open(Path(request["reference"])) if "reference" in request else None,
            record=Path(request["record"]) if "record" in request else None,
        )
    except Exception as error:
        if _memory_ran_out(error):
            error = DoesNotFitError(
                f"{model_dir}: needs more memory than there is to be loaded and scored ({first_line(error)}); "
                "free some, or evaluate on a machine with more"
            )
        if not isinstance(error, VlmquantError):
            raise
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        return {"error": {"kind": kind.__name__, "message": str(error)}}
    return {"run": run.to_dict()}


def _memory_ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    return error is not None and (is_allocation_failure(error) or _memory_ran_out(error.__cause__))


def sample_from_dict(data: Mapping[str, Any]) -> Sample:
    """Inverse of asdict(sample), also after a round through JSON."""
    return Sample(
        **{
            **data,
            "answers": tuple(data["answers"]),
            "images": tuple(Path(image) for image in data["images"]),
            "history": tuple(Turn(**turn) for turn in data["history"]),
        }
    )


def check_samples(samples: Sequence[Sample]) -> None:
    """Raise InputError unless there are samples, each with an answer and an id of its own."""
    if not samples:
        raise InputError("there are no samples to evaluate on; give a data folder whose samples.jsonl has some")
    seen = set()
    for sample in samples:
        if not any(answer.strip() for answer in sample.answers):
            raise InputError(f"sample {shown(sample.id)} has no answer to score; add one or take the sample out")
        if sample.id in seen:
            raise InputError(f"two samples have the id {shown(sample.id)}; give each an id of its own")
        seen.add(sample.id)


def score_here(
    model_dir: Path, samples: Sequence[Sample], settings: Settings, *, reference: LogProbs | None, record: Path | None
) -> Run:
    """score_model in this process: peak memory then includes whatever it did before."""
    check_samples(samples)
    manifest = read_manifest(model_dir) if (model_dir / MANIFEST).is_file() else None
    samples = [replace(sample, answers=tuple(filter(str.strip, sample.answers))) for sample in samples]
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = _dtype(settings)
    images = [
        tuple(pixel_sha256(path) for path in sample.images) for sample in samples
    ]  # all readable, before any work
    tidy = are_tokenized(samples) if settings.tidy_captions is None else settings.tidy_captions
    encoder = Encoder(load_processor(model_dir), tidy_captions=tidy)
    tokens = special_tokens(model_dir)
    baseline, start = peak_resident_bytes(), time.perf_counter()
    model = reading_part(load_model(model_dir, dtype=dtype, device=settings.device, generation=tokens).eval())
    load_seconds, load_peak = time.perf_counter() - start, peak_resident_bytes()
    prefill_seconds, speeds = _measure_speed(model, encoder, samples, settings)
    costs = Costs(
        weight_bytes=sum(file.stat().st_size for file in model_dir.glob("*.safetensors")),
        load_seconds=load_seconds,
        peak_bytes=peak_resident_bytes(),
        tokens_per_second=statistics.median(speeds),
        prefill_seconds=statistics.median(prefill_seconds),
        tokens_per_second_range=(min(speeds), max(speeds)),
        load_peak_bytes=load_peak,
        baseline_bytes=baseline,
    )
    notes = []
    if layers := simulate(model):
        notes.append(
            f"K and V of {layers} layers were rounded to FP8 by the checkpoint's scales, as in an engine with an FP8 "
            "cache; its speed was measured without"
        )
    if aside := set_aside(model_dir, model):
        notes.append(f"decoded greedily; set aside of its generation settings: {some(map(shown, aside), most=12)}")
    answers = _Answers(samples, encoder, settings)
    other = _compare_inputs(model_dir, answers, reference, settings)

    def score(settings: Settings) -> tuple[list[_Sums], dict[int, float], dict[int, str]]:
        sums = _score_answers(model, encoder, answers, settings, reference=reference, record=record)
        wrong = _score_wrong_images(model, encoder, samples, answers, settings) if settings.wrong_image else {}
        return sums, wrong, _generate_answers(model, encoder, samples, settings) if settings.generate else {}

    (sums, wrong, generated), batch_size = _with_room(score, settings)
    if batch_size != settings.batch_size:
        notes.append(f"memory ran out at {settings.batch_size} sequences in a batch; scored again with {batch_size}")
    for note in notes:
        stderr.print(f"{model_dir.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    scores = []
    for index, sample in enumerate(samples):
        references = tuple(encoder.answer_text(sample, answer) for answer in sample.answers)
        text = generated.get(index)
        short = is_short_answer(sample.task, references)
        scores.append(
            SampleScore(
                id=sample.id,
                task=sample.task,
                images=images[index],
                generated=text,
                references=references,
                exact=is_exact(text, references) if short and text is not None else None,
                wrong_image_nll=wrong.get(index),
                **asdict(sums[index]),
            )
        )
    return Run(
        model=str(model_dir),
        label=model_dir.name,
        samples=tuple(scores),
        costs=costs,
        settings=asdict(settings) | {"dtype": _name(dtype), "batch_size": batch_size},
        environment=environment(),
        manifest=manifest,
        other_inputs=other,
        notes=tuple(notes),
    )


def _with_room(score: Callable[[Settings], Scores], settings: Settings) -> tuple[Scores, int]:
    """What `score` gives, where memory runs out once more with smaller batches; and the batch size."""
    try:
        return score(settings), settings.batch_size
    except Exception as error:
        if settings.batch_size == 1 or not _memory_ran_out(error):
            raise
    smaller = max(1, settings.batch_size // SMALLER)
    return score(replace(settings, batch_size=smaller)), smaller


def _dtype(settings: Settings) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes.get(settings.dtype) or compute_dtype(settings.device)


def _name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _measure_speed(
    model: Any, encoder: Encoder, samples: Sequence[Sample], settings: Settings
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Prefill seconds and decoded tokens a second at batch size 1, on samples spread over the set.

    One uncounted run comes first, in which kernels are chosen.
    """
    step = max(1, len(samples) // settings.speed_prompts)
    chosen = samples[::step][: settings.speed_prompts]
    times = []
    with bar("speed", total=len(chosen) + 1) as progress:
        for sample in [chosen[0], *chosen]:
            times.append(time_decoding(model, encoder, sample, tokens=settings.speed_tokens))
            progress.step()
    prefill_seconds, speeds = zip(*times[1:], strict=True)
    return prefill_seconds, speeds


@dataclass
class _Sums:
    """What _score_answers adds up for a sample; fields as in SampleScore."""

    tokens: int = 0
    nll: float = 0.0
    all_tokens: int = 0
    all_nll: float = 0.0
    kl: float | None = None
    flips: int | None = None


class _Answers:
    """The answers that are scored by likelihood, each with its prompt encoded once, before the model is loaded."""

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, settings: Settings) -> None:
        self.samples = samples
        self.of_sample = [_scored_answers(sample, settings) for sample in samples]
        pairs, self.owners = _pairs(samples, self.of_sample)
        """Of each row, the index of its sample."""
        self.rows = measure_rows(pairs, encoder, with_digests=True)
        self.counts: dict[str, int] = defaultdict(int)
        """Answer tokens by sample id."""
        self.offsets: list[int] = []
        """Of each row among its sample's answer tokens."""
        self.inputs: dict[str, dict[str, str]] = {}
        """Digests by sample id; of the answers, those of all."""
        for row in self.rows:
            self.offsets.append(self.counts[row.sample.id])
            self.counts[row.sample.id] += row.answer_tokens
            mine = self.inputs.setdefault(row.sample.id, dict(row.inputs))
            if mine != row.inputs:
                mine[ANSWER] += f", {row.inputs[ANSWER]}"


def _scored_answers(sample: Sample, settings: Settings) -> tuple[str, ...]:
    count = settings.references_per_caption if is_caption(sample.task, sample.answers) else 1
    return sample.answers[:count]


def _pairs(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> tuple[list[tuple[Sample, str]], list[int]]:
    """(sample, answer) for every answer, and the index of the sample of each."""
    owners = [index for index, mine in enumerate(answers) for _ in mine]
    return [(samples[index], answer) for index, mine in enumerate(answers) for answer in mine], owners


def _compare_inputs(model_dir: Path, answers: _Answers, reference: LogProbs | None, settings: Settings) -> str | None:
    """How the inputs differ from the reference's, where that is allowed; InputError where not."""
    if reference is None:
        return None
    told = difference(answers.inputs, reference.inputs)
    if told and not settings.allow_other_inputs:
        raise refuse_difference(model_dir, told)
    _check_reference(reference, answers.counts)
    return told


def _score_answers(
    model: Any,
    encoder: Encoder,
    answers: _Answers,
    settings: Settings,
    *,
    reference: LogProbs | None,
    record: Path | None,
) -> list[_Sums]:
    """Likelihoods of all answers, divergence from the reference where there is one, recorded where asked for."""
    recorded = None
    sums = [_Sums(kl=0.0, flips=0) if reference is not None else _Sums() for _ in answers.samples]
    with bar("score answers", total=len(answers.rows)) as progress:
        for batch in batches_of(answers.rows, settings.batch_size):
            for scored in teacher_forced(model, encoder, batch):
                sample, offset = scored.row.sample.id, answers.offsets[scored.row.key]
                logprobs = _log_softmax(scored)
                mine = sums[answers.owners[scored.row.key]]
                nll = _nll(logprobs, scored)
                mine.tokens += len(scored.answer_ids)
                mine.nll += nll
                mine.all_tokens += len(scored.answer_ids)
                mine.all_nll += nll
                if offset == 0:  # the prompt counts once
                    mine.all_tokens += len(scored.prompt_nll)
                    mine.all_nll += float(scored.prompt_nll.double().sum())
                if reference is not None:
                    kl, flips = divergence(reference.read(sample, offset, len(logprobs)), logprobs)
                    mine.kl = (mine.kl or 0.0) + kl
                    mine.flips = (mine.flips or 0) + flips
                if record is not None:
                    if recorded is None:
                        recorded = LogProbs.create(record, answers.counts, logprobs.shape[1], answers.inputs)
                    recorded.write(sample, offset, logprobs)
                progress.step()
    _check_finite(answers.samples, sums)
    return sums


def _log_softmax(scored: Scored) -> Tensor:
    return scored.answer_logits.float().log_softmax(-1).cpu()


def _nll(logprobs: Tensor, scored: Scored) -> float:
    return -float(logprobs.gather(1, scored.answer_ids[:, None]).double().sum())


def divergence(reference: Tensor, candidate: Tensor) -> tuple[float, int]:
    """Log-probabilities (tokens, vocabulary) of both -> sum of KL(reference || candidate) in nats, and flips."""
    if reference.shape != candidate.shape:
        raise InputError(
            f"the reference has a vocabulary of {reference.shape[1]} tokens and this model one of "
            f"{candidate.shape[1]}; they cannot be compared token by token"
        )
    kl = (reference.exp() * (reference - candidate)).sum(dtype=torch.float64)
    return float(kl), int((reference.argmax(-1) != candidate.argmax(-1)).sum())


def _check_reference(reference: LogProbs, counts: Mapping[str, int]) -> None:
    for sample, count in counts.items():
        there = reference.rows.get(sample, (0, 0))[1]
        if there != count:
            raise InputError(
                f"sample {shown(sample)} has {count} answer tokens here and {there} for the reference model; "
                "score both on the same samples, with the same settings and the same tokenizer"
            )


def _check_finite(samples: Sequence[Sample], sums: Sequence[_Sums]) -> None:
    for sample, mine in zip(samples, sums, strict=True):
        if not all(math.isfinite(value) for value in (mine.nll, mine.all_nll, mine.kl or 0.0)):
            raise SentinelError(
                f"sample {shown(sample.id)}: the model's logits are not finite (NaN or infinite); "
                "its weights are damaged or its dtype overflows: try dtype float32"
            )


def _score_wrong_images(
    model: Any, encoder: Encoder, samples: Sequence[Sample], answers: _Answers, settings: Settings
) -> dict[int, float]:
    """Sample index -> nats of its answers beside the images of the next sample of its task that has other ones."""
    swapped = {index: with_wrong_images(samples, index) for index in range(len(samples))}
    chosen = [index for index, sample in swapped.items() if sample is not None]
    pairs, owners = _pairs(
        [swapped[index] or samples[index] for index in chosen], [answers.of_sample[index] for index in chosen]
    )
    rows = measure_rows(pairs, encoder)
    nll = dict.fromkeys(chosen, 0.0)
    with bar("score with wrong images", total=len(rows)) as progress:
        for batch in batches_of(rows, settings.batch_size):
            for scored in teacher_forced(model, encoder, batch):
                nll[chosen[owners[scored.row.key]]] += _nll(_log_softmax(scored), scored)
                progress.step()
    return nll


def with_wrong_images(samples: Sequence[Sample], index: int) -> Sample | None:
    """The sample with the images of the next one, cyclically, of its task whose images are others; None without one."""
    sample = samples[index]
    others = [*samples[index + 1 :], *samples[:index]]
    if not sample.images:
        return None
    images = (other.images for other in others if other.task == sample.task and other.images)
    wrong = next((found for found in images if not set(found) & set(sample.images)), None)
    return None if wrong is None else replace(sample, images=wrong)


def _generate_answers(model: Any, encoder: Encoder, samples: Sequence[Sample], settings: Settings) -> dict[int, str]:
    """Sample index -> greedy answer, for captions and short answers."""
    captions = [index for index, sample in enumerate(samples) if is_caption(sample.task, sample.answers)]
    short = [index for index, sample in enumerate(samples) if is_short_answer(sample.task, sample.answers)]
    generated = {}
    with bar("generate", total=len(captions) + len(short)) as progress:
        for chosen, tokens in ((captions, settings.caption_tokens), (short, settings.answer_tokens)):
            rows = measure_rows([(samples[index], None) for index in chosen], encoder)
            for batch in batches_of(rows, settings.batch_size):
                for row, text in zip(batch, generate(model, encoder, batch, max_new_tokens=tokens), strict=True):
                    generated[chosen[row.key]] = text
                    progress.step()
    return generated
