"""Score one loaded model on a set of samples: what evaluation.worker does, in a process of its own."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vlmquant import budget, compiled, errors
from vlmquant.calibration.encode import Encoder, are_tokenized
from vlmquant.calibration.images import pixel_sha256
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.checkpoint import read_manifest
from vlmquant.devices import find_device
from vlmquant.errors import DoesNotFitError, InputError, SentinelError, VlmquantError, first_line, shown
from vlmquant.evaluation.environment import environment
from vlmquant.evaluation.following import Followed, Follower, Prompt, batches_of_prompts, prompts_of
from vlmquant.evaluation.inputs import ANSWER, difference, refuse_difference
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.memory import HOST, Meter, bring_in, held_bytes
from vlmquant.evaluation.metrics import is_caption, is_exact, is_short_answer
from vlmquant.evaluation.passes import (
    Scored,
    measure_rows,
    set_aside,
    special_tokens,
    time_decoding,
)
from vlmquant.evaluation.records import Costs, Memory, Run, SampleScore, Timing
from vlmquant.evaluation.settings import LEAST_TOKENS, Settings
from vlmquant.evaluation.turns import rounds_of, with_timings
from vlmquant.kernels.probe import compute_dtype
from vlmquant.kvcache import simulate
from vlmquant.limits import memory_ran_out
from vlmquant.loading import give_back_freed_memory, load_model, reading_part
from vlmquant.progress import bar, stderr
from vlmquant.shards import some

MANIFEST = "vlmquant.json"
SMALLER = 4
"""Where memory runs out, batches are made so many times smaller, once."""

Scores = TypeVar("Scores")


class Answering:
    """What a worker does with the requests of evaluation.remote, one after the other, on one loaded model."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None
        self._who = ""

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{"load": {...}}, {"time": prompt} or {"score": {...}} -> its result, or {"error": {kind, message}}."""
        ((what, asked),) = request.items()
        try:
            return {what: getattr(self, f"_{what}")(asked)}
        except Exception as error:
            if memory_ran_out(error):
                error = DoesNotFitError(
                    f"{self._who}: needs more memory than there is to be loaded and scored ({first_line(error)}); "
                    "free some, or evaluate on a machine with more"
                )
            if not isinstance(error, VlmquantError):
                raise
            kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
            return {"error": {"kind": kind.__name__, "message": str(error)}}

    def _load(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self._who = asked["model_dir"]
        samples = [sample_from_dict(sample) for sample in asked["samples"]]
        self._scorer = Scorer(Path(asked["model_dir"]), samples, Settings(**asked["settings"]))
        return {"prompts": self._scorer.prompts}

    def _time(self, prompt: int) -> dict[str, Any]:
        return asdict(self._loaded.time(prompt))

    def _score(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        run = self._loaded.score(
            reference=LogProbs.open(Path(asked["reference"])) if "reference" in asked else None,
            record=Path(asked["record"]) if "record" in asked else None,
        )
        return {"run": run.to_dict(), "room": self._loaded.room()}

    @property
    def _loaded(self) -> "Scorer":
        assert self._scorer is not None, "the first request is to load"
        return self._scorer


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
    """remote.score_model in this process: its own peak memory then includes whatever it did before."""
    scorer = Scorer(model_dir, samples, settings)
    timings = [scorer.time(prompt) for prompt in rounds_of(scorer.prompts, settings)]
    run = scorer.score(reference=reference, record=record)
    return replace(run, costs=with_timings(run.costs, timings))


class Scorer:
    """A model that is loaded to be timed and scored on samples."""

    def __init__(self, model_dir: Path, samples: Sequence[Sample], settings: Settings) -> None:
        check_samples(samples)
        self.manifest = read_manifest(model_dir) if (model_dir / MANIFEST).is_file() else None
        self.model_dir, self.settings = model_dir, settings
        self.device = find_device(settings.device)
        self.samples = [replace(sample, answers=tuple(filter(str.strip, sample.answers))) for sample in samples]
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.dtype = compute_dtype_of(settings)
        # All readable, before any work.
        self.images = [tuple(pixel_sha256(path) for path in sample.images) for sample in self.samples]
        tidy = are_tokenized(self.samples) if settings.tidy_captions is None else settings.tidy_captions
        self.encoder = Encoder(load_processor(model_dir), tidy_captions=tidy)
        self.answers = Answers(self.samples, self.encoder, settings)
        self._load()
        self.prompts = long_prompts(self.answers, settings.speed_prompts) if settings.generate else []
        """Indices of the samples whose prompts are timed."""
        for prompt in self.prompts:  # kernels are chosen, and what is made at first use is made
            self._time(prompt, tokens=LEAST_TOKENS)

    def _load(self) -> None:
        tokens = special_tokens(self.model_dir)
        compiled.available()  # loads numba, which would count as the model's
        self.meter = Meter(self.device)
        self.resident_before, start = self.meter.before, time.perf_counter()
        model = load_model(self.model_dir, dtype=self.dtype, device=self.device, generation=tokens)
        self.model = reading_part(model.eval())
        del model
        bring_in(self.model)
        self.load_seconds = time.perf_counter() - start
        self.load_peaks, self.load_peak_bytes = self.meter.above(), self.meter.process_peak
        self.held = held_bytes(self.model)
        self.meter.start()

    def time(self, prompt: int) -> Timing:
        """Seconds to the first token of an answer to a sample, and the speed of those after it."""
        return self._time(prompt, tokens=self.settings.speed_tokens)

    def _time(self, prompt: int, *, tokens: int) -> Timing:
        return Timing(*time_decoding(self.model, self.encoder, self.samples[prompt], tokens=tokens))

    def room(self) -> dict[str, int]:
        """Bytes that are free where the model computes, and those that it takes at its peak, weights included."""
        give_back_freed_memory()
        free = budget.available_bytes()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
        peaks = self.meter.above()
        place = next((name for name in peaks if name != HOST), HOST)
        load = self.load_peaks[place] or 0
        return {"free": free, "needed": max(load, self.held.get(place, 0) + (peaks[place] or 0))}

    def score(self, *, reference: LogProbs | None, record: Path | None) -> Run:
        """All numbers but those of speed. reference, record: as of score_model. Once for a model: from then on its K
        and V are rounded as in an engine with an FP8 cache, where it has the scales."""
        self.rounded_layers = simulate(self.model)
        samples, encoder, answers = self.samples, self.encoder, self.answers
        other = _compare_inputs(self.model_dir, answers, reference, self.settings)

        follow = Follower(self.model, encoder)

        def score(settings: Settings) -> tuple[list[_Sums], dict[int, float], dict[int, str]]:
            sums, written = _score_answers(follow, answers, settings, reference=reference, record=record)
            wrong = _score_wrong_images(follow, encoder, samples, answers, settings) if settings.wrong_image else {}
            return sums, wrong, written

        found, batch_size = _with_room(score, self.settings)
        notes = self._notes(batch_size)
        for note in notes:
            stderr.print(f"{self.model_dir.name}: {note}", markup=False, highlight=False, soft_wrap=True)
        return Run(
            model=str(self.model_dir),
            label=self.model_dir.name,
            samples=tuple(self._sample_score(index, *found) for index in range(len(samples))),
            costs=self._costs(),
            settings=asdict(self.settings)
            | {"device": self.device, "dtype": _name(self.dtype), "batch_size": batch_size},
            environment=environment(),
            manifest=self.manifest,
            other_inputs=other,
            notes=tuple(notes),
        )

    def _notes(self, batch_size: int) -> list[str]:
        notes = []
        if self.rounded_layers:
            notes.append(
                f"K and V of {self.rounded_layers} layers were rounded to FP8 by the checkpoint's scales, as in an "
                "engine with an FP8 cache; its speed was measured without"
            )
        if aside := set_aside(self.model_dir, self.model):
            notes.append(f"decoded greedily; set aside of its generation settings: {some(map(shown, aside), most=12)}")
        if batch_size != (asked := self.settings.batch_size):
            notes.append(f"memory ran out at {asked} sequences in a batch; scored again with {batch_size}")
        return notes

    def _sample_score(
        self, index: int, sums: Sequence["_Sums"], wrong: Mapping[int, float], generated: Mapping[int, str]
    ) -> SampleScore:
        sample, text = self.samples[index], generated.get(index)
        references = tuple(self.encoder.answer_text(sample, answer) for answer in sample.answers)
        short = is_short_answer(sample.task, references)
        return SampleScore(
            id=sample.id,
            task=sample.task,
            images=self.images[index],
            generated=text,
            references=references,
            exact=is_exact(text, references) if short and text is not None else None,
            wrong_image_nll=wrong.get(index),
            **asdict(sums[index]),
        )

    def _costs(self) -> Costs:
        peaks = self.meter.above()
        memory = {
            place: Memory(self.held.get(place, 0), peaks.get(place), self.load_peaks.get(place))
            for place in {**self.held, **peaks}
        }
        if len(memory) > 1:  # the host only feeds the GPU, and what it does for that is not the model's
            memory[HOST] = replace(memory[HOST], activations=None)
        return Costs(
            weight_bytes=sum(file.stat().st_size for file in self.model_dir.glob("*.safetensors")),
            load_seconds=self.load_seconds,
            peak_bytes=self.meter.process_peak,
            tokens_per_second=None,
            prefill_seconds=None,
            load_peak_bytes=self.load_peak_bytes,
            baseline_bytes=self.resident_before,
            memory=memory,
        )


def long_prompts(answers: "Answers", count: int) -> list[int]:
    """Indices of the samples with the longest prompts, of those with images where there are any."""
    tokens: dict[int, int] = {}
    for row, owner in zip(answers.rows, answers.owners, strict=True):
        tokens.setdefault(owner, row.tokens - row.answer_tokens)
    seeing = [index for index in tokens if answers.samples[index].images] or list(tokens)
    return sorted(seeing, key=lambda index: (-tokens[index], index))[:count]


def _with_room(score: Callable[[Settings], Scores], settings: Settings) -> tuple[Scores, int]:
    """What `score` gives, where memory runs out once more with smaller batches; and the batch size."""
    try:
        return score(settings), settings.batch_size
    except Exception as error:
        if settings.batch_size == 1 or not memory_ran_out(error):
            raise
    smaller = max(1, settings.batch_size // SMALLER)
    return score(replace(settings, batch_size=smaller)), smaller


def compute_dtype_of(settings: Settings) -> torch.dtype:
    """What a model is computed in; `auto` is measured."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes.get(settings.dtype) or compute_dtype(find_device(settings.device))


def _name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


@dataclass
class _Sums:
    """What _score_answers adds up for a sample; fields as in SampleScore."""

    tokens: int = 0
    nll: float = 0.0
    all_tokens: int = 0
    all_nll: float = 0.0
    kl: float | None = None
    flips: int | None = None


class Answers:
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

    def prompts(self, settings: Settings) -> list[Prompt]:
        """With their answers, and what is to be written where anything is: captions and short answers."""
        write = {}
        for index, sample in enumerate(self.samples if settings.generate else ()):
            if is_caption(sample.task, sample.answers):
                write[index] = settings.caption_tokens
            elif is_short_answer(sample.task, sample.answers):
                write[index] = settings.answer_tokens
        return prompts_of(self.rows, self.owners, write)


def _scored_answers(sample: Sample, settings: Settings) -> tuple[str, ...]:
    count = settings.references_per_caption if is_caption(sample.task, sample.answers) else 1
    return sample.answers[:count]


def _pairs(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> tuple[list[tuple[Sample, str]], list[int]]:
    """(sample, answer) for every answer, and the index of the sample of each."""
    owners = [index for index, mine in enumerate(answers) for _ in mine]
    return [(samples[index], answer) for index, mine in enumerate(answers) for answer in mine], owners


def _compare_inputs(model_dir: Path, answers: Answers, reference: LogProbs | None, settings: Settings) -> str | None:
    """How the inputs differ from the reference's, where that is allowed; InputError where not."""
    if reference is None:
        return None
    told = difference(answers.inputs, reference.inputs)
    if told and not settings.allow_other_inputs:
        raise refuse_difference(model_dir, told)
    _check_reference(reference, answers.counts)
    return told


def _score_answers(
    follow: Follower, answers: Answers, settings: Settings, *, reference: LogProbs | None, record: Path | None
) -> tuple[list[_Sums], dict[int, str]]:
    """Likelihoods of all answers, divergence from the reference where there is one, recorded where asked for; and what
    the model writes, by the index of the sample."""
    recorded = None
    sums = [_Sums(kl=0.0, flips=0) if reference is not None else _Sums() for _ in answers.samples]
    written: dict[int, str] = {}
    for prompt, followed in _follow_all(follow, answers.prompts(settings), settings, label="answers"):
        if followed.text is not None:
            written[prompt.key] = followed.text
        for scored in followed.scored:
            sample, offset = scored.row.sample.id, answers.offsets[scored.row.key]
            logprobs = _log_softmax(scored)
            mine = sums[prompt.key]
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
    _check_finite(answers.samples, sums)
    return sums, written


def _follow_all(
    follow: Follower, prompts: Sequence[Prompt], settings: Settings, *, label: str
) -> Iterator[tuple[Prompt, Followed]]:
    """Each prompt with what follows it, batch by batch: prompts behind which as much is to be written together."""
    with bar(label, total=len(prompts)) as progress:
        for batch in batches_of_prompts(prompts, settings.batch_size):
            for prompt, followed in zip(batch, follow(batch), strict=True):
                yield prompt, followed
                progress.step()


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
    follow: Follower, encoder: Encoder, samples: Sequence[Sample], answers: Answers, settings: Settings
) -> dict[int, float]:
    """Sample index -> nats of its answers beside the images of the next sample of its task that has other ones."""
    swapped = {index: with_wrong_images(samples, index) for index in range(len(samples))}
    chosen = [index for index, sample in swapped.items() if sample is not None]
    pairs, owners = _pairs(
        [swapped[index] or samples[index] for index in chosen], [answers.of_sample[index] for index in chosen]
    )
    prompts = prompts_of(measure_rows(pairs, encoder), owners, {})
    nll = dict.fromkeys(chosen, 0.0)
    for prompt, followed in _follow_all(follow, prompts, settings, label="score with wrong images"):
        nll[chosen[prompt.key]] += sum(_nll(_log_softmax(scored), scored) for scored in followed.scored)
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
