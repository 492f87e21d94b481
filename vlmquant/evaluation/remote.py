"""Models scored in processes of their own, so that load time and memory are each model's; speed in turns of two."""

import json
import signal
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch

from vlmquant import errors, signals
from vlmquant.calibration.samples import Sample
from vlmquant.devices import find_device
from vlmquant.errors import DoesNotFitError, InputError, VlmquantError
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.process import TOLD_BY_WORKERS, Worker
from vlmquant.evaluation.records import Round, Run, Timing
from vlmquant.evaluation.scoring import check_samples, compute_dtype_of
from vlmquant.evaluation.settings import Settings
from vlmquant.evaluation.turns import rounds_of, take_turns, with_rounds, with_timings
from vlmquant.progress import bar, told_elsewhere
from vlmquant.shards import dtype_name

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
TOO_LARGE = "it and the reference do not fit into memory at once"


class Remote:
    """A model in a process of its own, which sleeps while it is not asked; a context manager that ends it.

    reference: the reference model's log-probabilities, for KL and flips; None for the reference itself. record: file to
    write this model's own log-probabilities to. Its methods raise whatever VlmquantError the work in it gives,
    DoesNotFitError where the system ended it for want of memory.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        reference: LogProbs | None = None,
        record: Path | None = None,
        label: str | None = None,
    ) -> None:
        if not model_dir.is_dir():
            raise InputError(f"{model_dir}: no such model directory")
        self.model_dir, self.label = model_dir, label or model_dir.name
        self.prompts: list[int] = []
        """Indices of the samples whose prompts are to be timed."""
        self.room: dict[str, int] = {}
        """Once it was scored: Scorer.room."""
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(path.open("r+b" if path.exists() else "x+b"))
                for name, path in (("reference", reference.path if reference else None), ("record", record))
                if path is not None
            }
            self._files = {name: f"/dev/fd/{file.fileno()}" for name, file in files.items()}
            self._worker = stack.enter_context(Worker([file.fileno() for file in files.values()]))
            self._open = stack.pop_all()

    def load(self, samples: Sequence[Sample], settings: Settings) -> None:
        """settings: as `settled` gives them."""
        request = {
            "model_dir": str(self.model_dir.resolve()),
            "label": self.label,
            "samples": [asdict(sample) for sample in samples],
            "settings": asdict(settings),
        }
        self.prompts = self._ask("load", request)["prompts"]

    def time(self, prompt: int) -> Timing:
        return Timing(**self._ask("time", prompt))

    def time_alone(self, settings: Settings) -> list[Timing]:
        """As many timings as turns would give, with nothing to compare them to."""
        rounds = rounds_of(self.prompts, settings)
        timings = []
        with bar(f"{self.label}: speed", total=len(rounds), visible=bool(rounds)) as progress:
            for prompt in rounds:
                timings.append(self.time(prompt))
                progress.step()
        return timings

    def score(self) -> Run:
        """All numbers but those of speed, once."""
        answer = self._ask("score", self._files)
        self.room = answer["room"]
        return replace(Run.from_dict(answer["run"]), model=str(self.model_dir), label=self.label)

    def _ask(self, what: str, request: Any) -> Any:
        with told_elsewhere() if what in TOLD_BY_WORKERS else nullcontext():
            content = self._worker.ask({what: request})
        if not content:
            raise ended(self.model_dir, self._worker.status())
        answer = json.loads(content)
        if "error" in answer:
            raise getattr(errors, answer["error"]["kind"])(answer["error"]["message"])
        return answer[what]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and free what it holds."""
        self._open.close()


def score_model(
    model_dir: Path,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    reference: LogProbs | None,
    record: Path | None,
    label: str | None = None,
) -> Run:
    """Score a model by itself; its progress bars go to stderr.

    reference, record: as of Remote. label: the run's name, else the directory's. Raises InputError for samples that
    cannot be scored, and whatever VlmquantError loading and running the model gives.
    """
    check_samples(samples)
    settings = settled(settings)
    with Remote(model_dir, reference=reference, record=record, label=label) as model:
        model.load(samples, settings)
        timings = model.time_alone(settings)
        run = model.score()
    return replace(run, costs=with_timings(run.costs, timings))


def score_models(
    model_dirs: Sequence[Path], samples: Sequence[Sample], settings: Settings, *, record: Path, labels: Sequence[str]
) -> list[Run]:
    """Score the first model, the reference, and the others against it; each is timed in turns with the reference.

    For that the reference stays in memory. Where it has no room beside a model, neither is timed in turns with it nor
    with the models that follow, and their runs say so. record: file for the reference's log-probabilities.
    """
    check_samples(samples)
    settings = settled(settings)
    with Remote(model_dirs[0], record=record, label=labels[0]) as reference:
        reference.load(samples, settings)
        base = reference.score()
        pairing = _Pairing(reference, samples, settings, LogProbs.open(record))
        if reference.room["free"] < reference.room["needed"]:
            pairing.give_up()
        runs = [pairing.score(model_dir, label) for model_dir, label in zip(model_dirs[1:], labels[1:], strict=True)]
        pairing.time_reference()
    return [replace(base, costs=with_timings(base.costs, pairing.timings)), *runs]


class _Pairing:
    """The reference, in memory as long as there is room, and the models that are timed in turns with it."""

    def __init__(self, reference: Remote, samples: Sequence[Sample], settings: Settings, logprobs: LogProbs) -> None:
        self.reference, self.samples, self.settings, self.logprobs = reference, samples, settings, logprobs
        self.timings: list[Timing] = []
        """The reference's."""
        self.paired = True

    def score(self, model_dir: Path, label: str) -> Run:
        if self.paired:
            try:
                return self._score_paired(model_dir, label)
            except DoesNotFitError:  # which it may by itself
                self.give_up()
        run = score_model(model_dir, self.samples, self.settings, reference=self.logprobs, record=None, label=label)
        unpaired = TOO_LARGE if self.settings.generate else None
        return replace(run, costs=replace(run.costs, unpaired=unpaired))

    def _score_paired(self, model_dir: Path, label: str) -> Run:
        with Remote(model_dir, reference=self.logprobs, label=label) as model:
            model.load(self.samples, self.settings)
            rounds = self._turns(model) if model.prompts else None
            run = model.score()
        if rounds is None:
            return run
        self.timings += [one.reference for one in rounds]
        return replace(run, costs=with_rounds(run.costs, rounds))

    def _turns(self, model: Remote) -> tuple[Round, ...]:
        with bar(f"{model.label}: speed, in turns", total=self.settings.speed_rounds) as progress:
            prompts = rounds_of(self.reference.prompts, self.settings)
            return take_turns(self.reference.time, model.time, prompts, step=progress.step)

    def time_reference(self) -> None:
        """Time the reference by itself where it had no turns."""
        if self.paired and not self.timings:
            self.timings = self.reference.time_alone(self.settings)

    def give_up(self) -> None:
        """No more turns: the reference leaves the memory to the others."""
        with suppress(DoesNotFitError):  # it may be what the system ended
            self.time_reference()
        self.paired = False
        self.reference.close()


def settled(settings: Settings) -> Settings:
    """With the device, the threads and the dtype found out once, so that they are those of all models."""
    threads = settings.threads or torch.get_num_threads()
    settings = replace(settings, threads=threads, device=find_device(settings.device))
    return replace(settings, dtype=dtype_name(compute_dtype_of(settings)))  # type: ignore[arg-type]  # one of two


def ended(model_dir: Path, status: int) -> Exception:
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
