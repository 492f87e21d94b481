"""The processes that share one run, as torchrun starts them: what one has made known to all, on torch.distributed.

Every rank runs the same program. They share the calibration batches (batch n is rank n % size's) and the rows of a
weight; what decides anything is made by one of them and sent to the others, so that all go on with the same numbers.
Sums over batches are made in the order of the batches, each rank adding to what it got from the one before it. So they
are the numbers that one process makes, whatever the number of ranks and whoever is late.

Nobody hangs where a rank is gone: each tells the others every second that it lives, in the store that they met at. A
connection that breaks is noticed at once, silence after SILENCE seconds, and a process that cannot leave by itself
ends GRACE seconds later. The first that fails says why; the others end with its exit code and without a word.
"""

import contextlib
import io
import json
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from vlmquant.devices import AUTO, GPU, find_device
from vlmquant.errors import EXIT_ERROR, RankLostError, UsageError, VlmquantError, first_line, printable, shown
from vlmquant.streams import Stderr

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroup, Store, Work

T = TypeVar("T")

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a rank is taken to be gone."""
GRACE = 5.0
"""Seconds that a process has, once a rank is gone, before it is ended where it stands."""
LEAVING = 30.0
"""The same for one that is on its way out, and cleans up."""
HEARD = 3.0
"""Seconds that the rank that holds the store waits until the others know why it ends, and that these wait to hear."""
MEETING = 300.0
"""Seconds within which all ranks have to come."""
FOREVER = timedelta(days=100)
"""Of a message: one rank may wait for another's work as long as that lives."""
WORTH = 1e7
"""Multiplications that are worth being shared out: they take some milliseconds, as the messages do."""
ROWS = 64
"""A rank gets rows by this many, as loops and matrix products take them, so that they come out as in one process."""
LENGTH = 8
INLINE = 1 << 14
"""Bytes of a message that come with its length; the rest follows. Smaller tensors travel inside of it."""
IN_FLIGHT = 8
"""Messages on their way from a rank, each of which holds its content."""
RESUME = "the finished blocks are kept, so run again with --resume, with as many processes as you like"


class StoppedElsewhere(SystemExit):
    """Another rank failed, and says why."""


@dataclass(frozen=True)
class Turn:
    """One rank's turn to add what a batch gives to a sum that goes from rank to rank."""

    ranks: "Ranks"
    before: int | None
    """The rank that the sum so far is with, None where it is here."""
    after: int | None

    @contextmanager
    def adding(self, piece: Tensor) -> Iterator[None]:
        """Around what adds to this piece of the sum; every turn takes the same pieces in the same order."""
        if self.before is not None:
            self.ranks.receive(piece, self.before)
        yield
        if self.after is not None:
            self.ranks.send(piece, self.after)


class Relay:
    """A sum over batches that goes from rank to rank in their order. owners: the rank of each batch."""

    def __init__(self, ranks: "Ranks", owners: Sequence[int]) -> None:
        self._ranks, self._owners = ranks, owners

    def __iter__(self) -> Iterator[Turn]:
        """The turns of this rank."""
        me, owners = self._ranks.rank, self._owners
        for place, owner in enumerate(owners):
            if owner == me:
                neighbours = [owners[one] if 0 <= one < len(owners) else me for one in (place - 1, place + 1)]
                before, after = (None if other == me else other for other in neighbours)
                yield Turn(self._ranks, before, after)

    @property
    def last(self) -> int:
        """The rank that the whole sum is with."""
        return self._owners[-1] if self._owners else 0


class Ranks:
    """A process alone, which is every rank there is."""

    def __init__(self, rank: int = 0, size: int = 1, *, here: int = 1, device: str = "cpu") -> None:
        self.rank, self.size = rank, size
        self.here = here
        """How many of them are on this machine."""
        self.device = device
        """Where this one computes."""

    @property
    def leads(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def owner(self, number: int) -> int:
        """The rank that runs a calibration batch."""
        return number % self.size

    def own(self, number: int) -> bool:
        return self.owner(number) == self.rank

    def shares(self, count: int, *, step: int, work: float) -> list[slice]:
        """Which of so many rows each rank takes, by `step`; all are the first's where the work is too little."""
        sharing = self.size if work >= WORTH else 1
        size = -(-count // (sharing * step)) * step
        bounds = [min(rank * size, count) for rank in range(sharing)] + [count] * (self.size + 1 - sharing)
        return [slice(start, end) for start, end in pairwise(bounds)]

    def made_by(self, rank: int, make: Callable[[], T]) -> T:
        """What that rank makes, or the VlmquantError that it raises, on all of them."""
        return make()

    def first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them."""
        return self.made_by(0, make)

    def gather(self, value: T) -> list[T]:
        """What each rank has, in their order."""
        return [value]

    def in_order(self, found: Mapping[int, T]) -> list[T]:
        """What every rank found for its batches, by their numbers, in the order of all."""
        together = {number: one for part in self.gather(dict(found)) for number, one in part.items()}
        return [together[number] for number in sorted(together)]

    def relay(self, numbers: Sequence[int]) -> Relay:
        """For a sum over the batches of these numbers."""
        return Relay(self, [self.owner(number) for number in numbers])

    def spread(self, pieces: Sequence[Tensor], source: int) -> None:
        """Overwrite the pieces with those of that rank."""

    @contextmanager
    def leading(self, manager: AbstractContextManager[Any]) -> Iterator[None]:
        """Inside a context that is the first rank's alone; what its entry raises is raised on all."""
        with contextlib.ExitStack() as stack:
            self.first(lambda: stack.enter_context(manager) and None)
            yield

    def receive(self, piece: Tensor, source: int) -> None:
        raise AssertionError("nobody is there to send")

    def send(self, piece: Tensor, target: int) -> None:
        raise AssertionError("nobody is there to receive")


ALONE = Ranks()


@contextmanager
def join(device: str = AUTO) -> Iterator[Ranks]:
    """The ranks that torchrun's variables speak of; a process that was started by itself is alone.

    device: of all of them, as find_device has it; `cuda` is the GPU of a rank's number on its machine, over NCCL.
    Leaving it waits for the others. Raises UsageError for variables that mean nothing, and for a device that is not
    there; RankLostError where not all come.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield Ranks(device=find_device(device))
        return
    rank = _number("RANK", None)
    if rank >= size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {size}; ranks are numbered from 0")
    local, here = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", 1, least=1)
    own_gpu = device == GPU or (device == AUTO and torch.cuda.is_available())
    if own_gpu:
        found = torch.cuda.device_count()
        if local >= found:
            raise UsageError(
                f"device cuda: this machine has {found} GPUs, so there is none for its process {local}; start as "
                "many processes as there are GPUs, or name what they share: cuda:0, or cpu"
            )
        device = f"{GPU}:{local}"
    device = find_device(device)
    if own_gpu:
        torch.cuda.set_device(local)
    watch = Watch(rank, size)
    try:
        with watch.telling():
            ranks = _Joined(rank, size, here=here, device=device, watch=watch, nccl=own_gpu)
            yield ranks
            ranks.leave()
    finally:
        watch.stop()


def _number(name: str, default: int | None, *, least: int = 0) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or not least <= int(text) < 1 << 20:
        raise UsageError(f"{name} is {shown(text)!r} in the environment, no number; torchrun sets it")
    return int(text)


def _store(rank: int, size: int, *, serves: bool) -> "Store":
    """A connection to the store that all ranks meet at: torchrun's, or the first rank's, which serves it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", None)
    if not host:
        raise UsageError("MASTER_ADDR is not set in the environment, though WORLD_SIZE is; torchrun sets both")
    timeout = timedelta(seconds=MEETING)
    try:
        store = TCPStore(host, port, size, is_master=serves, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise RankLostError(
            f"rank {rank}: cannot reach the others at {shown(host)}:{port} ({first_line(error)})"
        ) from error
    return PrefixStore(f"vlmquant/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@dataclass
class _End:
    """Why all ranks end."""

    rank: int
    """Which says so."""
    code: int
    seen: float = field(default_factory=time.monotonic)


class Watch:
    """Signs of life: one thread gives and reads them, a second judges, since the first may be stuck in the network."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._leaving: float | None = None
        self._over: _End | None = None
        self._stopped = threading.Event()
        self._serves = rank == 0 and not _has_agent()
        self.store = _store(rank, size, serves=self._serves)
        self._beats = _store(rank, size, serves=False)
        self._seen = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        self._answered = time.monotonic()
        self._lost_store: str | None = None
        self._meet()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def _meet(self) -> None:
        if self.rank == 0:
            self.store.set("over", "")
        self.store.set(f"alive/{self.rank}", "0")
        try:
            self.store.wait(["over", *(f"alive/{other}" for other in range(self.size))], timedelta(seconds=MEETING))
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self.rank}: not all {self.size} processes came within {MEETING:.0f} s; start them all, and "
                "with the same MASTER_ADDR and MASTER_PORT"
            ) from error

    def _beat(self) -> None:
        count = 0
        others = list(self._seen)
        while not self._stopped.wait(BEAT):
            count += 1
            try:
                self._beats.set(f"alive/{self.rank}", str(count))
                for other in others:
                    told = self._beats.get(f"alive/{other}").decode()
                    if told != self._seen[other][0]:
                        self._seen[other] = (told, time.monotonic())
                text = self._beats.get("over").decode()
                self._over = self._over or (_End(**json.loads(text)) if text else None)
                if self._silent():
                    self.end(RankLostError.exit_code, self._beats)
                if self._over is not None:
                    self._beats.set(f"heard/{self.rank}", "")
            except RuntimeError as error:
                self._lost_store = first_line(error)
                return
            self._answered = time.monotonic()

    def _judge(self) -> None:
        gone: float | None = None
        while not self._stopped.wait(BEAT / 4):
            now = time.monotonic()
            over, why = self._over, self._missing(now)
            gone = None if over is None and why is None else gone or now
            if self._leaving is not None:
                if now - self._leaving > LEAVING:
                    os._exit(over.code if over else EXIT_ERROR)
            elif gone is not None and now - gone > GRACE:
                if why is not None and (over is None or over.rank == self.rank):
                    stderr = Stderr()
                    stderr.write(f"vlmquant: {printable(why)}; {RESUME}\n")
                    stderr.flush()
                os._exit(over.code if over else RankLostError.exit_code)

    def _missing(self, now: float) -> str | None:
        """Who gives no sign of life."""
        if self._lost_store is not None:
            return f"the process that holds this run together (rank 0, or torchrun) is gone ({self._lost_store})"
        if now - self._answered > SILENCE:
            return f"the process that holds this run together has not answered for {SILENCE:.0f} s"
        if silent := self._silent():
            return f"rank {silent[0]} of {self.size} has given no sign of life for {SILENCE:.0f} s"
        return None

    def _silent(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, seen) in self._seen.items() if now - seen > SILENCE]

    def end(self, code: int, store: "Store") -> _End:
        """Let all ranks end: for our reason, unless there is one already."""
        if self._over is None:
            mine = _End(self.rank, code)
            text = json.dumps({"rank": mine.rank, "code": mine.code})
            try:
                told = store.compare_set("over", "", text).decode()
                self._over = mine if told == text else _End(**json.loads(told))
            except RuntimeError:
                self._over = mine
        return self._over

    def lost(self, peer: int, error: BaseException) -> BaseException:
        """What to raise where the connection to a rank broke: it may have told why."""
        self._leaving = time.monotonic()
        while self._over is None and self._lost_store is None and time.monotonic() - self._leaving < HEARD:
            time.sleep(BEAT / 20)
        if self._over is not None and self._over.rank != self.rank:
            return StoppedElsewhere(self._over.code)
        return RankLostError(
            f"rank {peer} of {self.size} is gone: rank {self.rank} lost its connection ({first_line(error)}); {RESUME}"
        )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What ends this rank ends the others; it goes on from here on one of them, with its message."""
        try:
            yield
        except StoppedElsewhere:
            self._wait_until_heard()
            raise
        except BaseException as error:
            self._leaving = time.monotonic()
            code = error.exit_code if isinstance(error, VlmquantError) else EXIT_ERROR
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                code = error.code
            over = self.end(code, self.store)
            self._wait_until_heard()
            if over.rank != self.rank:
                raise StoppedElsewhere(over.code) from error
            raise

    def _wait_until_heard(self) -> None:
        """The store ends with the rank that holds it, so that goes last."""
        ended = time.monotonic() + HEARD
        with contextlib.suppress(RuntimeError):
            self.store.set(f"heard/{self.rank}", "")
            while (
                self._serves
                and time.monotonic() < ended
                and not self.store.check([f"heard/{other}" for other in self._seen])
            ):
                time.sleep(BEAT / 20)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * BEAT)


class _Joined(Ranks):
    """One of several ranks."""

    def __init__(self, rank: int, size: int, *, here: int, device: str, watch: Watch, nccl: bool) -> None:
        from torch import distributed

        super().__init__(rank, size, here=here, device=device)
        self._watch, self._distributed = watch, distributed
        self._nccl = nccl
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", store=watch.store, rank=rank, world_size=size, timeout=FOREVER
        )
        self._ways: list[ProcessGroup | None] = [None, None]
        """For messages up and down the ranks: over NCCL those that cross would wait for each other."""
        if nccl:
            self._ways = [distributed.new_group(backend="nccl", timeout=FOREVER) for _ in range(2)]
        self._sent: deque[tuple[Work, Tensor]] = deque()

    def leave(self) -> None:
        self.gather(None)
        self._distributed.destroy_process_group()

    @contextmanager
    def _talking(self, peer: int) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self._watch.lost(peer, error) from error

    # --- what one has, known to all ---

    def made_by(self, rank: int, make: Callable[[], T]) -> T:
        if self.rank != rank:
            value, error = self._from(rank, None)
            if error is not None:
                raise error
            return value  # type: ignore[no-any-return]
        try:
            value = make()
        except VlmquantError as error:
            self._from(rank, (None, error))
            raise
        self._from(rank, (value, None))
        return value

    def gather(self, value: T) -> list[T]:
        return [self._from(rank, value) for rank in range(self.size)]

    def _from(self, source: int, value: Any) -> Any:
        """The value of that rank: pickled, but for the content of its tensors."""
        if self.rank == source:
            buffer = io.BytesIO()
            pickler = _Pickler(buffer)
            pickler.dump(value)
            content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
            head = torch.zeros(LENGTH + INLINE, dtype=torch.uint8)
            head[:LENGTH] = torch.tensor([len(content)]).view(torch.uint8)
            begin = content[:INLINE]
            head[LENGTH : LENGTH + len(begin)] = begin
            self._broadcast(head, source)
            if len(content) > INLINE:
                self._broadcast(content[INLINE:], source)
            for tensor in pickler.tensors:
                self._spread(tensor.detach().contiguous(), source)
            return value
        head = torch.empty(LENGTH + INLINE, dtype=torch.uint8)
        self._broadcast(head, source)
        length = int(head[:LENGTH].view(torch.int64))
        content = torch.empty(length, dtype=torch.uint8)
        content[:INLINE] = head[LENGTH:][:length]
        if length > INLINE:
            self._broadcast(content[INLINE:], source)
        return _Unpickler(io.BytesIO(content.numpy().tobytes()), self._receive_new, source, self.device).load()

    def _receive_new(self, tensor: Tensor, source: int) -> Tensor:
        self._spread(tensor, source)
        return tensor

    def spread(self, pieces: Sequence[Tensor], source: int) -> None:
        for piece in pieces:
            content = piece.contiguous()
            self._spread(content, source)
            if content is not piece and self.rank != source:
                piece.copy_(content)

    def _spread(self, tensor: Tensor, source: int) -> None:
        """Broadcast a contiguous tensor of any kind."""
        if not tensor.numel():
            return
        wire = self._on_wire(tensor)
        self._broadcast(wire.view(-1).view(torch.uint8), source)
        if wire is not tensor and self.rank != source:
            tensor.copy_(wire)

    def _on_wire(self, tensor: Tensor) -> Tensor:
        """Where messages travel from: NCCL takes them from the GPU, Gloo from memory."""
        return tensor if self._nccl else tensor.cpu()

    def _broadcast(self, content: Tensor, source: int) -> None:
        with self._talking(source if source != self.rank else (self.rank + 1) % self.size):
            self._distributed.broadcast(content, source)

    # --- from one to the next ---

    def receive(self, piece: Tensor, source: int) -> None:
        content = self._on_wire(torch.empty_like(piece, memory_format=torch.contiguous_format))
        with self._talking(source):
            self._distributed.recv(content, source, group=self._ways[source < self.rank])
        piece.copy_(content)

    def send(self, piece: Tensor, target: int) -> None:
        content = self._on_wire(piece.clone(memory_format=torch.contiguous_format))
        with self._talking(target):
            work = self._distributed.isend(content, target, group=self._ways[target > self.rank])
        assert work is not None
        self._sent.append((work, content))
        while len(self._sent) > IN_FLIGHT:
            with self._talking(target):
                self._sent.popleft()[0].wait()


class _Pickler(pickle.Pickler):
    """Leaves large tensors out, in `tensors`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if value.device.type == "cpu" and value.untyped_storage().nbytes() <= INLINE // 2:
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._places[id(value)], tuple(value.shape), value.dtype, value.device.type == "cpu"


class _Unpickler(pickle.Unpickler):
    """What a rank of this run sent; its tensors come behind it."""

    def __init__(self, file: io.BytesIO, receive: Callable[[Tensor, int], Tensor], source: int, device: str) -> None:
        super().__init__(file)
        self._receive, self._source, self._device = receive, source, device
        self._tensors: list[Tensor] = []

    def persistent_load(self, told: Any) -> Tensor:
        place, shape, dtype, on_cpu = told
        if place == len(self._tensors):
            tensor: Tensor = torch.empty(shape, dtype=dtype, device="cpu" if on_cpu else self._device)
            self._tensors.append(self._receive(tensor, self._source))
        found: Tensor = self._tensors[place]
        return found


def refuse_different(ranks: Ranks, settings: Mapping[str, str]) -> None:
    """UsageError where ranks were started with different settings."""
    for rank, theirs in enumerate(ranks.gather(dict(settings))):
        for name, value in theirs.items():
            if value != settings[name]:
                raise UsageError(
                    f"rank {rank} runs with {name} {shown(value)}, rank {ranks.rank} with {shown(settings[name])}; "
                    "start all processes alike"
                )
