"""What a client tells of its requests: to Prometheus, `Client(metrics=registry)`, and to OpenTelemetry, `tracer=`."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from covae_client.errors import InvalidArgument, ServerError
from covae_core.operations import split_served_name

if TYPE_CHECKING:
    from covae_client.transport import Endpoint

# From half a millisecond to over a minute, each 1.1 times the one before: a quantile read from them is within 10 %.
SECONDS = tuple(round(0.0005 * 1.1**k, 7) for k in range(125))
ANSWERED = "answered"
NOT_INSTALLED = "prometheus_client is not installed here; run `pip install prometheus_client`"


class Request:
    """One request: its id, which is sent along and stands in the server's log, the attempts beyond the first, and where
    it is traced the headers that tell the server of it, and the trace's id."""

    def __init__(self, request_id: str) -> None:
        self.id, self.retries = request_id, 0
        self.headers: dict[str, str] = {}
        self.trace_id = ""

    def again(self) -> None:
        """It is asked again."""
        self.retries += 1


class RequestMetrics:
    """Prometheus metrics of requests, by model and operation.

    covae_client_request_seconds{model, operation, outcome}: of one gRPC request with its retries, from before the
        tensors are sent until the answer is here; outcome is "answered", the error's name, as "DeadlineExceeded", or
        "interrupted" of one whose caller went away
    covae_client_rows_total{model, operation}: rows answered: an image each; of `draw` several, of `score` the weights
        of one call
    covae_client_sent_bytes_total, covae_client_received_bytes_total{model, operation}: of tensors, of answered requests
    covae_client_retries_total{model, operation}: attempts beyond a request's first
    """

    def __init__(self, registry: Any) -> None:
        from prometheus_client import Counter, Histogram

        labels = ("model", "operation")
        self._seconds = Histogram(
            "covae_client_request_seconds",
            "Of one gRPC request with its retries",
            (*labels, "outcome"),
            buckets=SECONDS,
            registry=registry,
        )
        self._rows, self._sent, self._received, self._retries = (
            Counter(f"covae_client_{name}_total", text, labels, registry=registry)
            for name, text in (
                ("rows", "Rows answered"),
                ("sent_bytes", "Bytes of tensors sent in requests that were answered"),
                ("received_bytes", "Bytes of tensors received"),
                ("retries", "Attempts beyond a request's first"),
            )
        )

    @contextmanager
    def measured(self, endpoint: Endpoint, rows: int, request: Request) -> Iterator[None]:
        """Measure a request."""
        labels = split_served_name(endpoint.model_name) or (endpoint.model_name, "")
        outcome, start = "interrupted", time.perf_counter()
        try:
            yield
            outcome = ANSWERED
        except ServerError as error:
            outcome = type(error).__name__
            raise
        finally:
            exemplar = {"trace_id": request.trace_id} if request.trace_id else None
            self._seconds.labels(*labels, outcome).observe(time.perf_counter() - start, exemplar)
            if request.retries:
                self._retries.labels(*labels).inc(request.retries)
            if outcome == ANSWERED:
                self._rows.labels(*labels).inc(rows)
                self._sent.labels(*labels).inc(rows * sum(tensor.row_bytes for tensor in endpoint.inputs))
                self._received.labels(*labels).inc(rows * endpoint.answer_row_bytes)


class BatchMetrics:
    """Prometheus metrics of batch jobs, by model and operation (generate, score, edit).

    covae_batch_shards_total, covae_batch_rows_total, covae_batch_rejects_total{model, operation}: put into place by
        this worker: shards, their rows, and the inputs that were refused
    """

    def __init__(self, registry: Any) -> None:
        from prometheus_client import Counter

        self._counters = [
            Counter(f"covae_batch_{name}_total", text, ("model", "operation"), registry=registry)
            for name, text in (
                ("shards", "Shards that this worker put into place"),
                ("rows", "Their rows"),
                ("rejects", "Inputs that were refused"),
            )
        ]

    def count(self, model: str, operation: str, rows: int, rejects: int) -> None:
        """One more shard."""
        for counter, number in zip(self._counters, (1, rows, rejects), strict=True):
            counter.labels(model, operation).inc(number)


_REGISTERING = Lock()
_OF_REGISTRY: WeakKeyDictionary[Any, dict[type, Any]] = WeakKeyDictionary()


def metrics_in(registry: Any) -> RequestMetrics:
    """The metrics of requests in a registry of prometheus_client's; all clients of a registry share them.

    Raises:
        InvalidArgument: it is no registry, or prometheus_client is not installed.
    """
    return _metrics_in(registry, RequestMetrics)


def batch_metrics_in(registry: Any) -> BatchMetrics:
    """The metrics of batch jobs in a registry of prometheus_client's; all jobs of a registry share them.

    Raises:
        InvalidArgument: it is no registry, or prometheus_client is not installed.
    """
    return _metrics_in(registry, BatchMetrics)


Metrics = TypeVar("Metrics", RequestMetrics, BatchMetrics)


def _metrics_in(registry: Any, kind: type[Metrics]) -> Metrics:
    try:
        from prometheus_client import CollectorRegistry
    except ModuleNotFoundError as error:
        raise InvalidArgument(f"metrics: {NOT_INSTALLED}") from error
    if not isinstance(registry, CollectorRegistry):
        raise InvalidArgument(f"metrics: found {registry!r}, expected a prometheus_client.CollectorRegistry")
    with _REGISTERING:
        known = _OF_REGISTRY.setdefault(registry, {})
        if kind not in known:
            known[kind] = kind(registry)
        found: Metrics = known[kind]
        return found


@contextmanager
def served_registry(port: int | None) -> Iterator[Any]:
    """A registry whose metrics are at http://127.0.0.1:PORT/metrics as long as the context lasts; None without a port.

    Raises:
        InvalidArgument: the port is taken, or prometheus_client is not installed.
    """
    if port is None:
        yield None
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ModuleNotFoundError as error:
        raise InvalidArgument(f"--metrics-port: {NOT_INSTALLED}") from error
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        raise InvalidArgument(
            f"--metrics-port: found {port}, which cannot be bound ({error.strerror}); expected a free port above 1023"
        ) from error
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _span(tracer: Any, endpoint: Endpoint, rows: int, request: Request) -> Iterator[None]:
    """A span of the request, which the server's spans continue."""
    from opentelemetry.propagate import inject
    from opentelemetry.trace import SpanKind

    model, operation = split_served_name(endpoint.model_name) or (endpoint.model_name, "")
    told = {"covae.model": model, "covae.operation": operation, "covae.rows": rows, "covae.request_id": request.id}
    with tracer.start_as_current_span(f"covae {operation}", kind=SpanKind.CLIENT, attributes=told) as span:
        inject(request.headers)
        context = span.get_span_context()
        request.trace_id = f"{context.trace_id:032x}" if context.trace_flags.sampled else ""
        try:
            yield
        finally:
            span.set_attribute("covae.retries", request.retries)


class Requests:
    """The requests of one client: each has an id, is measured if there are metrics, and traced if there is a tracer."""

    def __init__(self, metrics: RequestMetrics | None, tracer: Any) -> None:
        self._metrics, self._tracer = metrics, tracer
        self._name, self._numbers = secrets.token_hex(4), itertools.count(1)

    @contextmanager
    def one(self, endpoint: Endpoint, rows: int) -> Iterator[Request]:
        """A request, sent within the context. An error that it ends in tells its id."""
        request = Request(f"{self._name}-{next(self._numbers)}")
        try:
            with ExitStack() as stack:
                if self._tracer is not None:
                    stack.enter_context(_span(self._tracer, endpoint, rows, request))
                if self._metrics is not None:
                    stack.enter_context(self._metrics.measured(endpoint, rows, request))
                yield request
        except ServerError as error:
            # Another one: a failure to connect is told to every thread that waited for it.
            told = type(error)(f"{error} [request {request.id}]")
            told.request_id = request.id
            raise told from (error.__cause__ or error)
