"""Score one model on a set of samples, in a process of its own so that load time and peak memory are the model's."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmquant import errors
from vlmquant.calibration.encode import Encoder, are_tokenized
from vlmquant.calibration.images import pixel_sha256
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.checkpoint import read_manifest
from vlmquant.errors import DoesNotFitError, InputError, SentinelError, VlmquantError
from vlmquant.evaluation.environment import environment, peak_resident_bytes
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.metrics import is_caption, is_exact, is_short_answer
from vlmquant.evaluation.passes import Row, Scored, batches_of, generate, measure_rows, teacher_forced, time_decoding
from vlmquant.evaluation.records import Costs, Run, SampleScore
from vlmquant.evaluation.settings import Settings
from vlmquant.kernels.probe import compute_dtype
from vlmquant.loading import load_model, reading_part
from vlmquant.progress import bar
from vlmquant.threads import QUIET_WAIT

WORKER = "vlmquant.evaluation.worker"
MANIFEST = "vlmquant.json"


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

    reference: where the reference model's log-probabilities lie, for KL and flips; None for the reference itself.
    record: file to write this model's own log-probabilities to. label: the run's name, else the directory's.
    Raises InputError for samples that cannot be scored, and whatever VlmquantError loading and running the model gives.
    """
    check_samples(samples)
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such model directory")
    threads = settings.threads or torch.get_num_threads()
    # Measured in this process and once, so that all models of a comparison are scored in the same dtype.
    settings = replace(settings, threads=threads, dtype=_name(_dtype(settings)))
    with tempfile.TemporaryDirectory(prefix="vlmquant-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(
            json.dumps(
                {
                    "model_dir": str(model_dir.resolve()),
                    "samples": [asdict(sample) for sample in samples],
                    "settings": asdict(settings),
                    "reference": str(reference.path.resolve()) if reference else None,
                    "record": str(record.resolve()) if record else None,
                },
                default=str,
            )
        )
        command = [sys.executable, "-P", "-m", WORKER, str(request), str(result)]
        path = os.pathsep.join(filter(None, sys.path))  # the same modules as here, wherever we were started
        done = subprocess.run(command, env=QUIET_WAIT | os.environ | {"PYTHONPATH": path}, check=False)
        answer = json.loads(result.read_text()) if result.is_file() else {}
    if "error" in answer:
        raise getattr(errors, answer["error"]["kind"])(answer["error"]["message"])
    if done.returncode < 0:
        raise DoesNotFitError(
            f"{model_dir}: the process that scored the model was ended by signal {-done.returncode}, as the system "
            "does when memory runs out; use a smaller batch size"
        )
    if "run" not in answer:
        raise RuntimeError(f"{model_dir}: the process that scored the model failed; its traceback stands above")
    return replace(Run.from_dict(answer["run"]), model=str(model_dir), label=label or model_dir.name)


def answer_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker does with score_model's request: {"run": ...} or {"error": {kind, message}}."""
    try:
        run = score_here(
            Path(request["model_dir"]),
            [sample_from_dict(sample) for sample in request["samples"]],
            Settings(**request["settings"]),
            reference=LogProbs.open(Path(request["reference"])) if request["reference"] else None,
            record=Path(request["record"]) if request["record"] else None,
        )
    except VlmquantError as error:
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        return {"error": {"kind": kind.__name__, "message": str(error)}}
    return {"run": run.to_dict()}


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
            raise InputError(f"sample {sample.id} has no answer to score; add one or take the sample out")
        if sample.id in seen:
            raise InputError(f"two samples have the id {sample.id}; give each an id of its own")
        seen.add(sample.id)


def score_here(
    model_dir: Path, samples: Sequence[Sample], settings: Settings, *, reference: LogProbs | None, record: Path | None
) -> Run:
    """score_model in this process: peak memory then includes whatever it did before."""
    check_samples(samples)
    samples = [replace(sample, answers=tuple(filter(str.strip, sample.answers))) for sample in samples]
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = _dtype(settings)
    images = [
        tuple(pixel_sha256(path) for path in sample.images) for sample in samples
    ]  # all readable, before any work
    tidy = are_tokenized(samples) if settings.tidy_captions is None else settings.tidy_captions
    encoder = Encoder(load_processor(model_dir), tidy_captions=tidy)
    baseline, start = peak_resident_bytes(), time.perf_counter()
    model = reading_part(load_model(model_dir, dtype=dtype, device=settings.device).eval())
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
    answers = [_scored_answers(sample, settings) for sample in samples]
    sums = _score_answers(model, encoder, samples, answers, settings, reference=reference, record=record)
    wrong = _score_wrong_images(model, encoder, samples, answers, settings) if settings.wrong_image else {}
    generated = _generate_answers(model, encoder, samples, settings) if settings.generate else {}
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
        settings=asdict(settings) | {"dtype": _name(dtype)},
        environment=environment(),
        manifest=read_manifest(model_dir) if (model_dir / MANIFEST).is_file() else None,
    )


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


def _scored_answers(sample: Sample, settings: Settings) -> tuple[str, ...]:
    count = settings.references_per_caption if is_caption(sample.task, sample.answers) else 1
    return sample.answers[:count]


@dataclass
class _Sums:
    """What _score_answers adds up for a sample; fields as in SampleScore."""

    tokens: int = 0
    nll: float = 0.0
    all_tokens: int = 0
    all_nll: float = 0.0
    kl: float | None = None
    flips: int | None = None


def _pairs(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> tuple[list[tuple[Sample, str]], list[int]]:
    """(sample, answer) for every answer, and the index of the sample of each."""
    owners = [index for index, mine in enumerate(answers) for _ in mine]
    return [(samples[index], answer) for index, mine in enumerate(answers) for answer in mine], owners


def _score_answers(
    model: Any,
    encoder: Encoder,
    samples: Sequence[Sample],
    answers: Sequence[Sequence[str]],
    settings: Settings,
    *,
    reference: LogProbs | None,
    record: Path | None,
) -> list[_Sums]:
    """Likelihoods of all answers, divergence from the reference where there is one, recorded where asked for."""
    pairs, owners = _pairs(samples, answers)
    rows = measure_rows(pairs, encoder)
    counts: dict[str, int] = defaultdict(int)
    offsets = []  # of each row among its sample's answer tokens
    for row in rows:
        offsets.append(counts[row.sample.id])
        counts[row.sample.id] += row.answer_tokens
    if reference is not None:
        _check_reference(reference, counts)
    expected = reference.map() if reference is not None else None
    output, recorded = None, None
    sums = [_Sums(kl=0.0, flips=0) if reference is not None else _Sums() for _ in samples]
    with bar("score answers", total=len(rows)) as progress:
        for batch in batches_of(rows, settings.batch_size):
            for scored in teacher_forced(model, encoder, batch):
                key = scored.row.key
                logprobs = _log_softmax(scored)
                mine = sums[owners[key]]
                nll = _nll(logprobs, scored)
                mine.tokens += len(scored.answer_ids)
                mine.nll += nll
                mine.all_tokens += len(scored.answer_ids)
                mine.all_nll += nll
                if offsets[key] == 0:  # the prompt counts once
                    mine.all_tokens += len(scored.prompt_nll)
                    mine.all_nll += float(scored.prompt_nll.double().sum())
                if expected is not None and reference is not None:
                    place = _place(reference, scored.row, offsets[key])
                    kl, flips = divergence(_read(expected, place), logprobs)
                    mine.kl = (mine.kl or 0.0) + kl
                    mine.flips = (mine.flips or 0) + flips
                if record is not None:
                    if recorded is None or output is None:
                        recorded = LogProbs.create(record, counts, logprobs.shape[1])
                        output = recorded.map("r+")
                    output[_place(recorded, scored.row, offsets[key])] = logprobs.numpy()
                progress.step()
    _check_finite(samples, sums)
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


def _place(logprobs: LogProbs, row: Row, offset: int) -> slice:
    start = logprobs.rows[row.sample.id][0] + offset
    return slice(start, start + row.answer_tokens)


def _read(array: np.ndarray[Any, Any], place: slice) -> Tensor:
    return torch.from_numpy(np.array(array[place]))


def _check_reference(reference: LogProbs, counts: Mapping[str, int]) -> None:
    for sample, count in counts.items():
        there = reference.rows.get(sample, (0, 0))[1]
        if there != count:
            raise InputError(
                f"sample {sample} has {count} answer tokens here and {there} for the reference model; "
                "score both on the same samples, with the same settings and the same tokenizer"
            )


def _check_finite(samples: Sequence[Sample], sums: Sequence[_Sums]) -> None:
    for sample, mine in zip(samples, sums, strict=True):
        if not all(math.isfinite(value) for value in (mine.nll, mine.all_nll, mine.kl or 0.0)):
            raise SentinelError(
                f"sample {sample.id}: the model's logits are not finite (NaN or infinite); "
                "its weights are damaged or its dtype overflows: try dtype float32"
            )


def _score_wrong_images(
    model: Any, encoder: Encoder, samples: Sequence[Sample], answers: Sequence[Sequence[str]], settings: Settings
) -> dict[int, float]:
    """Sample index -> nats of its answers beside the images of the next sample of its task that has other ones."""
    swapped = {index: with_wrong_images(samples, index) for index in range(len(samples))}
    chosen = [index for index, sample in swapped.items() if sample is not None]
    pairs, owners = _pairs([swapped[index] or samples[index] for index in chosen], [answers[index] for index in chosen])
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
