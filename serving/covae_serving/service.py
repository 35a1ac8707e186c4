"""Serves a model repository: starts Triton, watches every model with real inferences, heals what dies."""

from __future__ import annotations

import atexit
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from covae_serving.access import Access
from covae_serving.errors import ServingError
from covae_serving.health import Fault, Timing, Watch
from covae_serving.metrics import MetricsPage, SupervisorMetrics
from covae_serving.ports import check_host
from covae_serving.repository import ServedModel, read_repository
from covae_serving.server import ModelRefusedError, Server, Stopped

LOG = logging.getLogger("covae.serve")
TICK_S = 0.1
METRICS_PORT = 8002
# Not shared memory, nor loading models: with these whoever asks may run code as the server.
OPENABLE = ("statistics", "trace", "logging")
NO_ADDRESS = "the service has no address before it is started"
BACKOFF_FIRST_S = 2.0
BACKOFF_LAST_S = 60.0


class Service:
    """A model repository on NVIDIA Triton, watched and healed until it is stopped.

        with Service(Path("model_repository"), names=["digits-sos-vae"], grpc_port=0) as service:
            print(service.grpc_address)

    Safe by default: gRPC and metrics listen on this machine only, HTTP is off, and whatever changes the server needs a
    key that only the service has. A model whose process dies or hangs is loaded anew while the others answer; if that
    does not help, or Triton itself dies, Triton is started again on the same ports. Each fault and each healing is one
    line of the logger "covae.serve"; Triton's own log is "covae.triton", at level DEBUG.

    Args:
        repository: the folder that `covae export` wrote.
        names: model NAMEs to serve; none means all.
        operations: operations to serve; none means all.
        grpc_port, metrics_port: 0 picks free ones; by default metrics are at 8002, or with gRPC at a free one.
        host: the address to listen on. Beyond this machine it takes TLS, or `Access(insecure=True)`.
        access: who may use it; by default whoever reaches it, in plain text.
        timing: the supervisor's patience.
        open_protocols: what clients may use without the service's key: statistics (Triton's counters, which NVIDIA's
            perf_analyzer reads), trace and logging settings. Whoever reaches the server may then read or change these.

        trace_url: where Triton sends OpenTelemetry spans of requests that come with a trace, an OTLP/HTTP collector's
            http://HOST:4318/v1/traces; none: nowhere.

    Raises:
        ServingError: a protocol is none of these, the host can be reached from elsewhere without TLS, or the repository
            is missing or broken; the message names the file and the next step.
    """

    def __init__(
        self,
        repository: Path,
        names: Sequence[str] = (),
        operations: Sequence[str] = (),
        *,
        grpc_port: int = 8001,
        metrics_port: int | None = None,
        host: str = "127.0.0.1",
        timing: Timing | None = None,
        open_protocols: Sequence[str] = (),
        trace_url: str = "",
        access: Access | None = None,
    ) -> None:
        self._trace_url = trace_url
        self._access = access or Access()
        self._access.check_reach(host, is_loopback(host))
        unknown = [name for name in open_protocols if name not in OPENABLE]
        if unknown:
            raise ServingError(f"--open, open_protocols: found {unknown[0]!r}; expected some of {', '.join(OPENABLE)}")
        self._open_protocols = tuple(open_protocols)
        self.models: tuple[ServedModel, ...] = read_repository(repository, names, operations)
        self._repository = repository
        self._host = host
        self._grpc_port = grpc_port
        self._metrics_port = (METRICS_PORT if grpc_port else 0) if metrics_port is None else metrics_port
        self._timing = timing or Timing()
        self._metrics = SupervisorMetrics(self.models)
        self._page: MetricsPage | None = None
        self._server: Server | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._ready = Event()
        self._ended = Event()
        # No Event: a signal handler sets it, and an Event's lock could be held by the very code it interrupts.
        self.stop_requested = False

    def start(self) -> Self:
        """Start Triton; returns once every model has answered a real inference, or when `request_stop` was called.

        Raises:
            ServingError: Triton does not start, or a model does not answer: the model's own error, or the tail of
                Triton's log. Nothing is left running.
        """
        if self._thread is not None:
            raise ServingError("this service was started before; make a new one")
        if not is_loopback(self._host) and not self._access.encrypted:
            LOG.warning(
                "gRPC on %s is not encrypted%s: everybody who reaches it can %s",
                self._host,
                "" if self._access.token_file else " and asks nobody who they are",
                "read along, the token too" if self._access.token_file else "use the models",
            )
        atexit.register(self.stop)
        # Triton dies with the thread that starts it, so one thread does everything for the service's whole life.
        self._thread = Thread(target=self._run, name="covae-serve", daemon=True)
        self._thread.start()
        try:
            while not (self._ready.wait(TICK_S) or self._ended.is_set()):
                pass
            if self._error is not None:
                raise self._error
        except BaseException:
            self.stop()
            raise
        return self

    @property
    def ready(self) -> bool:
        """Whether every model has answered since the start, and no stop was requested."""
        return self._ready.is_set() and not self.stop_requested

    @property
    def grpc_address(self) -> str:
        """HOST:PORT for clients."""
        if self._server is None or self._server.ports is None:
            raise ServingError(NO_ADDRESS)
        return f"{self._host}:{self._server.ports[0]}"

    @property
    def triton_pid(self) -> int | None:
        """The process of the Triton that runs now, and the group of its stubs; None while none does."""
        return None if self._server is None else self._server.pid

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds the metrics."""
        if self._page is None:
            raise ServingError(NO_ADDRESS)
        return f"http://{self._host}:{self._page.port}/metrics"

    def request_stop(self) -> None:
        """Begin to stop and return at once; safe in a signal handler."""
        self.stop_requested = True

    def wait(self) -> None:
        """Wait until somebody requests the stop.

        Raises:
            BaseException: what ended the service by itself; that is a defect in Covae, and Triton is stopped.
        """
        while not (self.stop_requested or self._ended.is_set()):
            time.sleep(TICK_S)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Finish the requests in flight, within the timing's `drain_s`, then end Triton and remove every trace of it.

        Does nothing the second time.
        """
        atexit.unregister(self.stop)
        self.request_stop()
        if self._thread is not None:
            while not self._ended.wait(TICK_S):
                pass
            self._thread.join()

    def kill(self) -> None:
        """End Triton and the requests in flight at once; safe in a signal handler. `stop` then removes what is left."""
        self.request_stop()
        if self._server is not None:
            self._server.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _stopping(self) -> bool:
        return self.stop_requested

    def _run(self) -> None:
        try:
            check_host(self._host)
            self._server = Server(
                self._repository,
                self.models,
                self._host,
                self._grpc_port,
                self._timing,
                self._stopping,
                self._open_protocols,
                self._trace_url,
                self._access,
            )
            try:
                self._page = MetricsPage(
                    self._host, self._metrics_port, self._metrics.registry, self._server.metrics_page
                )
                failures = self._server.launch()
                if failures:
                    self._server.discard()
                    raise ServingError("\n".join(f"{name} does not answer: {why}" for name, why in failures.items()))
                self._metrics.up()
                self._ready.set()
                Supervisor(self._server, self._timing, self._stopping, self._metrics).run()
            finally:
                try:
                    self._server.stop()
                finally:
                    if self._page is not None:
                        self._page.close()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
            if self._ready.is_set():
                LOG.exception("the service ends by itself")
        finally:
            self._ended.set()


class Supervisor:
    """Watches the models of one server and heals them until `stopping` says yes."""

    def __init__(
        self, server: Server, timing: Timing, stopping: Callable[[], bool], metrics: SupervisorMetrics
    ) -> None:
        self._metrics = metrics
        self._server = server
        self._timing = timing
        self._stopping = stopping
        self._watches: dict[str, Watch] = {}
        self._broken: dict[str, Backoff] = {}

    def run(self) -> None:
        """Watch and heal."""
        self._watch_all()
        while True:
            time.sleep(TICK_S)
            if self._stopping():  # `kill` says so before it kills
                break
            self._look()
        self._forget_all()

    def _look(self) -> None:
        code = self._server.exit_code()
        if code is not None:
            self._restart(f"Triton died ({describe_exit(code)})")
        elif self._server.stopped():
            self._restart("Triton was stopped by a signal")
        for name in self._server.models:
            now = time.monotonic()
            watch, retry = self._watches.get(name), self._broken.get(name)
            fault = watch.check(now) if watch else Fault("time to try it again") if retry and now >= retry.at else None
            if fault:
                self._heal(name, fault)

    def _forget_all(self) -> None:
        for watch in self._watches.values():
            watch.close()
        self._watches = {}

    def _watch_all(self) -> None:
        names = [name for name in self._server.models if name not in self._broken]
        # Spread over the interval, so that the probes do not meet on the same cores.
        step = self._timing.probe_every_s / max(1, len(names))
        self._watches = {name: self._watch(name, index * step) for index, name in enumerate(names)}

    def _watch(self, name: str, delay_s: float) -> Watch:
        server = self._server
        due = time.monotonic() + delay_s
        return Watch(self._server.models[name], server.connection, server.stubs[name], self._timing, due)

    def _heal(self, name: str, fault: Fault) -> None:
        began = time.monotonic()
        LOG.error("%s: %s; loading it anew", name, fault.reason)
        self._metrics.model_down(name)
        watch = self._watches.pop(name, None)
        if watch:
            watch.close()
        try:
            self._server.reload(name, fault.hung)
        except ModelRefusedError as error:
            self._give_up_for_now(name, str(error))
        except ServingError as error:
            if name in self._broken and self._watches:
                # A new Triton did not help it before; the models that do answer must not pay for another.
                self._give_up_for_now(name, str(error))
            else:
                self._restart(f"{name}: {error}")
        else:
            self._broken.pop(name, None)
            self._watches[name] = self._watch(name, self._timing.probe_every_s)
            took = time.monotonic() - began
            self._metrics.healed(name, took)
            LOG.warning("%s: answers again after %.1f s", name, took)

    def _restart(self, reason: str) -> None:
        began = time.monotonic()
        LOG.error("%s; starting Triton again", reason)
        self._metrics.down()
        self._forget_all()
        retry = Backoff()
        while not self._launch_again():
            retry = retry.next()
            LOG.error("next try in %.0f s", retry.delay_s)
            while time.monotonic() < retry.at:
                if self._stopping():
                    raise Stopped
                time.sleep(TICK_S)
        took = time.monotonic() - began
        self._metrics.restarted(took)
        LOG.warning("Triton answers again after %.1f s", took)

    def _launch_again(self) -> bool:
        self._server.discard()
        try:
            failures = self._server.launch()
        except ServingError as error:
            LOG.error("Triton does not start: %s", error)
            return False
        self._broken = {name: retry for name, retry in self._broken.items() if name in failures}
        for name, why in failures.items():
            self._give_up_for_now(name, why)
        self._metrics.up(failing=failures)
        self._watch_all()
        return True

    def _give_up_for_now(self, name: str, why: str) -> None:
        retry = self._broken.get(name, Backoff()).next()
        self._broken[name] = retry
        LOG.error("%s: does not answer: %s; next try in %.0f s, the others are served", name, why, retry.delay_s)


class Backoff:
    """When to try again: after 2, 4, 8, … 60 s."""

    def __init__(self, delay_s: float = BACKOFF_FIRST_S / 2) -> None:
        self.delay_s = delay_s
        self.at = time.monotonic() + delay_s

    def next(self) -> Backoff:
        """The try after this one, counted from now."""
        return Backoff(min(BACKOFF_LAST_S, 2 * self.delay_s))


def describe_exit(code: int) -> str:
    """A process's exit code in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
