"""Tells a dead model from a busy one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from covae_serving.connection import Connection
from covae_serving.probe import probe_request
from covae_serving.repository import ServedModel
from covae_serving.stubs import STOPPED, Stub


@dataclass(frozen=True)
class Timing:
    """The supervisor's patience, in seconds.

    probe_every_s: between two real inferences on each model. hang_s: a model that has an unanswered probe, answers
    nobody and uses no processor for this long is hung. stuck_s: the same for one that does use the processor, and for a
    probe that later probes have overtaken (one of several instances hangs). start_s: until every model answers.
    reload_s: for each step of reloading a model. drain_s: for requests in flight when the service stops.
    """

    probe_every_s: float = 2.0
    hang_s: float = 8.0
    stuck_s: float = 60.0
    start_s: float = 180.0
    reload_s: float = 20.0
    drain_s: float = 30.0


@dataclass(frozen=True)
class Fault:
    """A model is dead: why, in a few words, and whether its processes still are there and must be killed."""

    reason: str
    hung: bool = False


@dataclass
class Probe:
    """One inference sent to see whether the model answers."""

    sent: float
    answer: grpc.Future


# Busy: stubs that together get this share of a core, or more.
BUSY_SHARE = 0.05
# Rest between probes, in units of what the last one took, up to a limit: large models' cores are for their users.
REST = 10
MAX_REST_S = 30.0
# Two failed probes within this time are a fault even if every process looks alive.
FAILURES_WITHIN_S = 10.0
SAMPLE_EVERY_S = 1.0
# These say nothing of the model: its queue is full, or the answer is late. Silence is judged by what others get.
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Watch:
    """Watches one model: sends it real inferences and judges what comes back, by gRPC status code only."""

    def __init__(
        self, model: ServedModel, connection: Connection, stubs: Sequence[Stub], timing: Timing, due: float
    ) -> None:
        self.model = model
        self.stubs = tuple(stubs)
        self._connection = connection
        self._timing = timing
        self._request = probe_request(model.config)
        self._due = self._checked = due
        self._probes: deque[Probe] = deque()
        self._failed_at: float | None = None
        self._unanswered_since: float | None = None
        self._overtaken_since: float | None = None
        self._took_s = 0.0
        self._activity: Activity | None = None

    def check(self, now: float) -> Fault | None:
        """Look at the model's processes and probes; `now` is time.monotonic(). None: it is well, or merely busy."""
        if now - self._checked > self._timing.hang_s and self._unanswered_since is not None:
            # Nobody looked meanwhile (another model was healed, or the whole container paused): that was no silence.
            self._unanswered_since, self._activity = now, None
        self._checked = now
        dead = [stub.pid for stub in self.stubs if stub.state() is None]
        if dead:
            return Fault(f"its process {dead[0]} died")
        fault = self._judge_answers(now)
        if now >= self._due:
            self._due = now + self._timing.probe_every_s
            self._send(now)
        return fault or self._judge_silence(now)

    def close(self) -> None:
        """Forget the probes under way."""
        for probe in self._probes:
            probe.answer.cancel()
        self._probes.clear()

    def _send(self, now: float) -> None:
        # Two at most: the one that waits, and one that shows whether the model answers others meanwhile.
        if len(self._probes) < 2:
            self._probes.append(Probe(now, self._connection.infer(self._request, 2 * self._timing.stuck_s)))
            self._unanswered_since = self._unanswered_since or now

    def _judge_answers(self, now: float) -> Fault | None:
        for probe in [probe for probe in self._probes if probe.answer.done()]:
            overtook = probe is not self._probes[0]
            self._probes.remove(probe)
            self._overtaken_since = (self._overtaken_since or now) if overtook else None
            error = probe.answer.exception()
            if error is None:
                self._took_s = now - probe.sent
                self._due = max(self._due, now + min(REST * self._took_s, MAX_REST_S))
                self._unanswered_since = min((left.sent for left in self._probes), default=None)
            elif error.code() not in NO_ANSWER:
                return self._judge_failure(now, f"{error.code().name}: {error.details()}")
        return None

    def _judge_failure(self, now: float, what: str) -> Fault | None:
        stopped = any(stub.state() in STOPPED for stub in self.stubs)
        again = self._failed_at is not None and now - self._failed_at < FAILURES_WITHIN_S
        self._failed_at = self._due = now
        return Fault(what, hung=stopped) if stopped or again else None

    def _judge_silence(self, now: float) -> Fault | None:
        since = self._unanswered_since
        if since is None or now - since < self._timing.probe_every_s:
            self._activity = None
            return None
        if self._activity is None:
            self._activity = Activity(self._connection, self.model.model_name, self.stubs, since)
        self._activity.sample(now)
        silent, idle = now - self._activity.answered, now - self._activity.worked
        stuck_s = max(self._timing.stuck_s, REST * self._took_s)
        if silent > stuck_s or min(silent, idle) > self._timing.hang_s:
            return Fault(f"it has not answered anybody for {silent:.0f} s", hung=True)
        if self._overtaken_since is not None and now - self._overtaken_since > stuck_s:
            return Fault(f"one of its instances has not answered for {now - since:.0f} s", hung=True)
        return None


class Activity:
    """When a model last answered anybody, and when its processes last got hold of a processor.

    Both count from `since` (time.monotonic()) until `sample` has seen otherwise.
    """

    def __init__(self, connection: Connection, model_name: str, stubs: Sequence[Stub], since: float) -> None:
        self.answered = self.worked = since
        self._connection = connection
        self._model_name = model_name
        self._stubs = stubs
        self._sampled: float | None = None
        self._rows: int | None = None
        self._cpu_s = 0.0

    def sample(self, now: float) -> None:
        """Compare Triton's counter and the processes' clocks with the last sample, about once a second."""
        if self._sampled is not None and now - self._sampled < SAMPLE_EVERY_S:
            return
        rows, cpu_s = self._completed_rows(), sum(stub.cpu_s() for stub in self._stubs)
        if self._rows is not None and rows != self._rows:
            self.answered = now
        if self._sampled is not None and cpu_s - self._cpu_s > BUSY_SHARE * (now - self._sampled):
            self.worked = now
        self._sampled, self._rows, self._cpu_s = now, rows, cpu_s

    def _completed_rows(self) -> int | None:
        try:
            return self._connection.completed_rows(self._model_name)
        except grpc.RpcError:
            return self._rows
