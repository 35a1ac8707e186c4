"""The metrics page of a service: Triton's own, and what the supervisor knows, at one address that outlives Triton."""

from __future__ import annotations

import http.client
import os
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, generate_latest

from covae_serving.errors import ServingError
from covae_serving.ports import cannot_be_bound
from covae_serving.regions import SHARED_MEMORY
from covae_serving.repository import ServedModel

# Prometheus itself waits ten.
FETCH_S = 5.0
# Of a stop: how long the page's thread looks away.
POLL_S = 0.1


class SupervisorMetrics:
    """What the supervisor counts, labelled as the backend's metrics are.

    covae_up: 1 while Triton runs and answers
    covae_model_up{model, operation}: 1 while it answers
    covae_heals_total{model, operation}: how often it was loaded anew after a fault
    covae_last_heal_seconds{model, operation}: from the fault being seen to an answer, the last time
    covae_triton_restarts_total, covae_last_restart_seconds: the same of Triton as a whole
    covae_shared_memory_free_bytes, covae_shared_memory_size_bytes: of /dev/shm, through which tensors go
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "operation")
        # On the page once the first Triton has answered: a start is no fault.
        self._up = Gauge("covae_up", "1 while Triton runs and answers", registry=None)
        self._model_up = Gauge("covae_model_up", "1 while the model answers", labels, registry=None)
        self._started = False
        self._heals = Counter("covae_heals_total", "Models loaded anew after a fault", labels, registry=self.registry)
        self._last_heal = Gauge(
            "covae_last_heal_seconds", "From a fault to an answer, the last time", labels, registry=self.registry
        )
        self._restarts = Counter("covae_triton_restarts_total", "Tritons started after a fault", registry=self.registry)
        self._last_restart = Gauge(
            "covae_last_restart_seconds", "From a fault to an answer, the last time", registry=self.registry
        )
        for name, text, share in (
            ("free", "Bytes of /dev/shm that are free", "f_bavail"),
            ("size", "Bytes of /dev/shm", "f_blocks"),
        ):
            gauge = Gauge(f"covae_shared_memory_{name}_bytes", text, registry=self.registry)
            gauge.set_function(partial(_shared_memory, share))
        self._labels = {model.model_name: (model.name, model.operation) for model in models}
        for labels_of in self._labels.values():
            self._heals.labels(*labels_of)

    def up(self, failing: Iterable[str] = ()) -> None:
        """Triton answers, and so do all models but these."""
        if not self._started:
            self._started = True
            self.registry.register(self._up)
            self.registry.register(self._model_up)
        self._up.set(1)
        down = set(failing)
        for name, labels in self._labels.items():
            self._model_up.labels(*labels).set(name not in down)

    def down(self) -> None:
        """Triton does not answer, nor does any model."""
        self._up.set(0)
        for labels in self._labels.values():
            self._model_up.labels(*labels).set(0)

    def model_down(self, name: str) -> None:
        """A model does not answer."""
        self._model_up.labels(*self._labels[name]).set(0)

    def healed(self, name: str, seconds: float) -> None:
        """A model answers again."""
        labels = self._labels[name]
        self._model_up.labels(*labels).set(1)
        self._heals.labels(*labels).inc()
        self._last_heal.labels(*labels).set(seconds)

    def restarted(self, seconds: float) -> None:
        """Triton answers again."""
        self._restarts.inc()
        self._last_restart.set(seconds)


def _shared_memory(share: str) -> float:
    found = os.statvfs(SHARED_MEMORY)
    return float(getattr(found, share) * found.f_frsize)


class Listener(ThreadingHTTPServer):
    """Does not ask for the host's name, which may take a resolver a minute."""

    def server_bind(self) -> None:
        """Bind, and no more."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class MetricsPage:
    """Serves `/metrics`: the supervisor's, then Triton's, fetched when the page is asked for. Closed, it is gone.

    fetch: Triton's page, empty while there is none.

    Raises:
        ServingError: the port is taken, or the host is no address of this machine.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, fetch: Callable[[], bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404, "the metrics are at /metrics")
                    return
                page = generate_latest(registry) + fetch()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *arguments: Any) -> None:
                """A line for every scrape would drown the others."""

        try:
            self._server = Listener((host, port), Handler)
        except OSError as error:
            raise ServingError(cannot_be_bound(host, port, "--metrics-port")) from error
        self.port = int(self._server.server_address[1])
        self._thread = Thread(target=self._server.serve_forever, args=(POLL_S,), name="covae-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def fetch_page(url: str) -> bytes:
    """A Triton's metrics page; empty if none is served there."""
    # A proxy for the outside world is no way to this machine's own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=FETCH_S) as page:
            found: bytes = page.read()
            return found
    except (OSError, http.client.HTTPException):
        return b""
