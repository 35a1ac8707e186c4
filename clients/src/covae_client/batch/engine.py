"""Running a job: which shards are missing, threads that make them, and what they tell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import BoundedSemaphore
from threading import Event as Flag
from typing import Any

from covae_client.batch import card, verification
from covae_client.batch.inputs import Inputs
from covae_client.batch.shards import to_bytes
from covae_client.batch.specification import Specification
from covae_client.batch.store import Store
from covae_client.batch.work import Cancelled, JobError, check_model, make, same_model
from covae_client.client import DEFAULT_ADDRESS, Client
from covae_client.errors import InvalidArgument
from covae_client.metrics import batch_metrics_in
from covae_client.model import Model
from covae_client.retry import Timeout
from covae_core.contract import Priority
from covae_core.images import JOB_FILE

# Whoever finds it stops between two blocks; `resume` removes it.
CANCELLED = "CANCELLED"
# Seconds of one request, so that a server that is started again is waited for.
REQUEST_S = 300.0
# Images of two shards are asked for while those of a third are written as PNG and put into place.
THREADS = 3
# No turn to wait for.
AT_ONCE = nullcontext()
# Seconds between two looks for an interrupt.
POLL_S = 0.2


@dataclass(frozen=True)
class Event:
    """What happened to a shard: "done", or "there" where another worker was first. rows, rejects: of it; sha256: of its
    file; seconds: that it took."""

    kind: str
    shard: int
    rows: int
    rejects: int
    sha256: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """How far a job is. missing: its shards that are not there; unknown: files in its folder of data that are no shard
    of it."""

    shards: int
    missing: Sequence[int]
    cancelled: bool
    unknown: Sequence[str]

    @property
    def done(self) -> bool:
        """All shards are there."""
        return not self.missing


class Job:
    """A job in its folder. server: the address of the server that does it, or several, with commas between."""

    def __init__(self, store: Store, specification: Specification, server: str = DEFAULT_ADDRESS) -> None:
        self.store, self.specification, self.server = store, specification, server

    def __repr__(self) -> str:
        job = self.specification
        return f"<Job {self.store.url}: {job.operation} {job.count} with {job.model}>"

    def status(self) -> Status:
        """What is there.

        Raises:
            StoreError: the folder cannot be read.
        """
        job = self.specification
        there = self.store.names("data")
        names = {job.name(shard).removeprefix("data/"): shard for shard in range(job.shards)}
        missing = [shard for name, shard in names.items() if name not in there]
        return Status(job.shards, missing, self.store.exists(CANCELLED), sorted(there - names.keys()))

    def cancel(self) -> None:
        """Have every worker stop, wherever it runs; what is there stays."""
        self.store.replace(CANCELLED, b"")

    def refuse_cancelled(self) -> None:
        """Raise if the job was cancelled.

        Raises:
            Cancelled: it was.
        """
        if self.store.exists(CANCELLED):
            raise Cancelled(f"{self.store.url}: the job was cancelled; `covae batch resume {self.store.url}` goes on")

    def resume(self, **options: Any) -> Status:
        """Run what is missing, also of a job that was cancelled; options as of `run`."""
        self.revive()
        return self.run(**options)

    def revive(self) -> None:
        """Take a cancellation back."""
        self.store.remove(CANCELLED)

    def run(
        self,
        *,
        threads: int = THREADS,
        worker: int = 0,
        workers: int = 1,
        metrics: Any = None,
        on_event: Callable[[Event], None] = lambda event: None,
        stop: Flag | None = None,
    ) -> Status:
        """Make the shards that are missing, and when all are there the job's card.

        Any number of workers may run a job at a time, each told its number of how many: each begins at another shard,
        goes on until none is missing, and leaves alone what another has put there meanwhile.

        Args:
            threads: shards at a time: one is written while images of the others are asked for. metrics: as of
                `Client`. stop: set, it ends the run: what is under way is dropped, and the status that is returned
                says what is missing.

        Raises:
            ServerError: the server does not do it, for as long as REQUEST_S. StoreError: the folder cannot be written.
            JobError: the job was cancelled, the served model is no longer the job's, or what it reads has changed.
        """
        job = self.specification
        if not 0 <= worker < workers:
            raise InvalidArgument(f"--index, --of: found {worker} of {workers}; expected 0 to {workers - 1}")
        self.store.sweep()
        status = self.status()
        self.refuse_cancelled()
        inputs = self.inputs() if job.inputs and status.missing else None
        first = job.shards * worker // workers
        order = sorted(status.missing, key=lambda shard: (shard - first) % job.shards)
        if order:
            self._make_all(order, inputs, threads, metrics, self.counted(metrics, on_event), stop or Flag())
        status = self.status()
        if status.done and (order or not self.store.exists(card.CARD)):
            card.write(self.store, job)
        return status

    def counted(self, metrics: Any, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
        """What counts the shards that this worker put into place, and passes every event on."""
        if metrics is None:
            return on_event
        job, counter = self.specification, batch_metrics_in(metrics)

        def tell(event: Event) -> None:
            if event.kind == "done":
                counter.count(job.model, job.operation, event.rows, event.rejects)
            on_event(event)

        return tell

    def make_shard(
        self,
        model: Model,
        inputs: Inputs | None,
        shard: int,
        check: Callable[[], None],
        turn: AbstractContextManager[object] = AT_ONCE,
    ) -> Event:
        """Make one shard and put it into place. turn: held while the server is asked for it.

        Raises:
            as `run`.
        """
        job = self.specification
        try:
            with turn:
                begun = time.perf_counter()
                rows = make(job, model, inputs, shard, check)
            content = to_bytes(job, shard, rows)
            same_model(job, model, self.server)  # it may have been changed meanwhile
        except MemoryError as error:
            raise JobError(
                f"shard {shard}: no memory for {job.shard_size} rows; choose a smaller --shard-size"
            ) from error
        check()
        first = self.store.publish(job.name(shard), content)
        return Event(
            "done" if first else "there",
            shard,
            len(rows.values),
            len(rows.rejects),
            verification.sha256(content),
            time.perf_counter() - begun,
        )

    def inputs(self) -> Inputs:
        """What the job reads, which must be what it was.

        Raises:
            JobError: it has changed. InvalidArgument: it is not there.
        """
        found = Inputs(self.specification.inputs)
        if found.digest != self.specification.inputs_digest:
            raise JobError(
                f"{', '.join(self.specification.inputs)}: what is there is no longer what the job was made for "
                f"({len(found)} pictures); make a new job of it"
            )
        return found

    @contextmanager
    def model(self, metrics: Any = None) -> Iterator[Model]:
        """The served model, which must be the job's.

        Raises:
            JobError: it is another training run. ServerError: it cannot be had.
        """
        with self._client(metrics) as client:
            yield self._model(client)

    def _client(self, metrics: Any) -> Client:
        return Client(self.server, timeout=Timeout(request_s=REQUEST_S), metrics=metrics, priority=Priority.BATCH)

    def _model(self, client: Client) -> Model:
        model = client.model(self.specification.model)
        same_model(self.specification, model, self.server)
        check_model(self.specification, model.spec)
        return model

    def verify(self, regenerate: int = 1) -> list[verification.Fault]:
        """What is wrong with the shards that are there; see `verification.verify`."""
        return verification.verify(self, regenerate)

    def _make_all(
        self,
        order: Sequence[int],
        inputs: Inputs | None,
        threads: int,
        metrics: Any,
        on_event: Callable[[Event], None],
        stop: Flag,
    ) -> None:
        ended = Flag()
        # Were all of them to ask for images at once, all would write PNGs at once, and nobody ask meanwhile. Scores and
        # edits read files on the way.
        generates = self.specification.operation == "generate"
        turn = BoundedSemaphore(max(1, threads - 1)) if generates else AT_ONCE

        def check() -> None:
            if stop.is_set() or ended.is_set():
                raise _DroppedError
            self.refuse_cancelled()

        def one(model: Model, shard: int) -> Event | None:
            try:
                check()
                if self.store.exists(self.specification.name(shard)):
                    return None
                return self.make_shard(model, inputs, shard, check, turn)
            except _DroppedError:
                return None
            except BaseException:
                ended.set()
                raise

        with self._client(metrics) as client:
            model = self._model(client)
            pool = ThreadPoolExecutor(threads, thread_name_prefix="covae-batch")
            try:
                # A few ahead: of a million shards not all are futures at once.
                waiting: list[Future[Event | None]] = []
                for shard in order:
                    if ended.is_set() or stop.is_set():
                        break
                    waiting.append(pool.submit(one, model, shard))
                    if len(waiting) > threads:
                        _tell(waiting.pop(0), on_event)
                for future in waiting:
                    _tell(future, on_event)
            except BaseException:
                ended.set()
                client.close()  # what is in flight is not waited for
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


class _DroppedError(Exception):
    """The run ends: what is under way is not wanted any more."""


def _tell(future: Future[Event | None], on_event: Callable[[Event], None]) -> None:
    # Python can miss a Ctrl-C that comes just before a wait without end, and then waits on.
    while not wait([future], POLL_S).done:
        pass
    event = future.result()
    if event is not None:
        on_event(event)


def open_job(url: str | os.PathLike[str], server: str = DEFAULT_ADDRESS) -> Job:
    """The job in a folder.

    Raises:
        InvalidArgument: there is none, or it is damaged.
    """
    store = Store(url)
    if not store.exists(JOB_FILE):
        raise InvalidArgument(
            f"{url}: found no {JOB_FILE}; expected the folder of a job, as `covae batch generate --out`"
        )
    text = store.read(JOB_FILE).decode("utf-8", "replace")
    return Job(store, Specification.from_json(text, f"{store.url}/{JOB_FILE}"), server)


def begin(url: str | os.PathLike[str], specification: Specification, server: str) -> Job:
    """The job of a specification in a folder, which is new or has this very job.

    Raises:
        InvalidArgument: there is another job, or there are other files in its folder of data.
    """
    store = Store(url)
    if not store.exists(JOB_FILE):
        strangers = sorted(store.names("data"))
        if strangers:
            raise InvalidArgument(
                f"--out: found {strangers[0]} in {url}/data, which is of no job; choose another folder"
            )
        store.publish(JOB_FILE, specification.to_json().encode())
    found = open_job(url, server)
    if found.specification != specification:
        raise InvalidArgument(
            f"--out: found another job in {url}: {found.specification.differences(specification)}; choose another "
            "folder, or `covae batch resume` it"
        )
    return found
