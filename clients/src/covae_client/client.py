"""The client: one connection to a Triton server, and the models behind it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from covae_client.addresses import checked
from covae_client.catalogue import find_model, list_models
from covae_client.errors import InvalidArgument
from covae_client.metrics import metrics_in
from covae_client.model import Model
from covae_client.retry import Retry, Timeout
from covae_client.transport import Settings, Tls, Transport
from covae_core.contract import TOKEN_HEADER, Priority

DEFAULT_ADDRESS = "localhost:8001"
HEADER = re.compile(r"[0-9a-z_.-]+")


class Client:
    """A connection to a Triton server that serves Covae models, over gRPC.

    It connects on the first call. One client serves many threads. Close it, or use it in a `with` statement:

        with Client("localhost:8001", timeout=Timeout(connect_s=2, request_s=10)) as client:
            images = client.model("digits-sos-vae").sample(16, seed=0)

    address: HOST:PORT of the server's gRPC endpoint, or several with commas between, over which requests are spread: a
    dead one is left, and come back to when it answers; `dns:///HOST:PORT` spreads them over all hosts of that name.
    timeout: a `Timeout`, or seconds for one request with all its retries. retry: a `Retry`, or how many attempts.
    tls: a `Tls`. token: what the server's --token-file holds. Where these are not given, the environment's COVAE_TLS_CA
    ("system" for this machine's own authorities), COVAE_TLS_CERT, COVAE_TLS_KEY and COVAE_TOKEN_FILE name files of
    them; with none, plain text and no token. headers: sent along with every request, for example credentials; gRPC has
    their names in lower case. metrics: a `prometheus_client.CollectorRegistry` for histograms of the requests; see
    `RequestMetrics`. tracer: an OpenTelemetry tracer for a span of each request, which the server's spans continue.
    priority: 2 for requests that may wait for others', where a model was exported with `--priorities`; 1 for the rest.

    Raises:
        InvalidArgument: the address is no HOST:PORT, timeout or retry is of another kind, a header's name cannot be
            sent, a file of `tls` cannot be read, metrics is no registry, or tracer no tracer.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: Timeout | float | None = None,
        retry: Retry | int | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        metrics: Any = None,
        tracer: Any = None,
        priority: int = Priority.INTERACTIVE,
    ) -> None:
        settings = checked_settings(address, timeout, retry, tls, token, headers, metrics, tracer, priority)
        self._transport = Transport(settings)

    def __repr__(self) -> str:
        return f"<Client of {self._transport.address}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls in flight fail, later ones too."""
        self._transport.close()

    def model(self, name: str) -> Model:
        """The model of that name, with the operations that the server serves of it.

        Raises:
            NotFound: the server serves none of its operations.
            InvalidArgument: `covae export` did not write the model, or its contract version is another.
            ServerFault: its operations come from different exports.
            ServerError: the server does not answer, or not in time.
        """
        found = self._transport.run(find_model(name, self._transport.address))
        return Model(name, found.spec, found.endpoints, self._transport)

    def models(self) -> dict[str, tuple[str, ...]]:
        """Names of the served models, sorted, each with its operations.

        Servers that `covae serve` starts keep this list to themselves; any client may still open a model whose name
        it knows. Where another server asks for a key, pass it: `Client(headers={"triton-grpc-protocol-…": KEY})`.

        Raises:
            AccessDenied: the server refuses. ConnectionFailed: it does not answer.
        """
        return self._transport.run(list_models())


def checked_settings(
    address: str,
    timeout: Timeout | float | None,
    retry: Retry | int | None,
    tls: Tls | None,
    token: str | None,
    headers: Mapping[str, str] | None,
    metrics: Any,
    tracer: Any,
    priority: int,
) -> Settings:
    """How to reach a server, from what a user gave.

    Raises:
        InvalidArgument: see `Client`.
    """
    address = checked(address, DEFAULT_ADDRESS)
    measured = None if metrics is None else metrics_in(metrics)
    if tracer is not None and not hasattr(tracer, "start_as_current_span"):
        raise InvalidArgument(f"tracer: found {tracer!r}, expected an OpenTelemetry tracer")
    token = token if token is not None else _token_of(os.environ.get("COVAE_TOKEN_FILE", ""))
    if isinstance(priority, bool) or priority not in tuple(Priority):
        raise InvalidArgument(f"priority: found {priority!r}, expected 1, or 2 for requests that may wait for others'")
    given = {**(headers or {}), **({TOKEN_HEADER: token} if token else {})}
    tls = tls or _tls_of(os.environ)
    return Settings(address, _timeout(timeout), _retry(retry), tls, _headers(given), measured, tracer, int(priority))


def _token_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"COVAE_TOKEN_FILE: found {path}, expected the file of a token ({error})") from error


def _tls_of(environment: Mapping[str, str]) -> Tls | None:
    roots, chain, key = (environment.get(f"COVAE_TLS_{name}") or None for name in ("CA", "CERT", "KEY"))
    return Tls(None if roots == "system" else roots, key, chain) if roots or chain or key else None


def _timeout(given: Timeout | float | None) -> Timeout:
    if given is None or isinstance(given, Timeout):
        return given or Timeout()
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise InvalidArgument(f"timeout: found {given!r}, expected seconds or a Timeout")
    whole = Timeout(request_s=given)
    return replace(whole, connect_s=min(whole.connect_s, whole.request_s))


def _retry(given: Retry | int | None) -> Retry:
    if given is None or isinstance(given, Retry):
        return given or Retry()
    if isinstance(given, bool) or not isinstance(given, int):
        raise InvalidArgument(f"retry: found {given!r}, expected how many attempts, or a Retry")
    return Retry(attempts=given)


def _headers(given: Mapping[str, str]) -> dict[str, str]:
    for name, value in given.items():
        if not isinstance(name, str) or not HEADER.fullmatch(name.lower()):
            raise InvalidArgument(f"headers: found the name {name!r}, expected letters, digits, '-', '_' and '.'")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise InvalidArgument(f"headers: found {value!r} for {name}, expected printable ASCII text")
    return {name.lower(): value for name, value in given.items()}
