"""One gRPC connection to a Triton server: connecting, deadlines, retries, and batches split into requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from covae_client.addresses import channel_options, several, target
from covae_client.errors import (
    AccessDenied,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    InvalidRequest,
    ModelChanged,
    NotFound,
    ServerError,
    ServerFault,
)
from covae_client.metrics import Request, RequestMetrics, Requests
from covae_client.retry import Budget, Retry, Timeout, with_retries
from covae_core.contract import HALVED, MODEL_DIGEST, NUMPY_DTYPES, Priority, TensorSpec

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
# The input tensors of the rows that a slice names, each with a leading batch axis.
Inputs = Callable[[slice], Mapping[str, NDArray[Any]]]

# Inputs and outputs of one request together; far below gRPC's 2 GiB, so that progress shows and memory stays small.
MAX_REQUEST_BYTES = 32 * 2**20
# Enough to keep a server busy while answers travel, few enough not to fill its queue.
MAX_IN_FLIGHT = 4
CONNECT_POLL_S = 0.05
INTERRUPT_POLL_S = 0.2
# After a deadline, how long a connection may take to show that it still lives.
PROBE_S = 2.0

# What each gRPC status means to a caller, and what to do next; `retry.py` says which are asked again.
STATUS_ERRORS: Mapping[str, tuple[type[ServerError], str]] = {
    "UNAVAILABLE": (ConnectionFailed, "is the server running, not overloaded, and is this call allowed to clients?"),
    "CANCELLED": (ConnectionFailed, "the server may be shutting down"),
    "DEADLINE_EXCEEDED": (DeadlineExceeded, "try a longer Timeout(request_s=…) or fewer images"),
    "NOT_FOUND": (NotFound, "the server does not serve it, or no longer"),
    "INVALID_ARGUMENT": (InvalidRequest, "do the client's and the exported model's versions match?"),
    "FAILED_PRECONDITION": (InvalidRequest, "do the client's and the exported model's versions match?"),
    "ALREADY_EXISTS": (ModelChanged, "open the model again with client.model(…)"),
    "RESOURCE_EXHAUSTED": (InvalidRequest, "the message is larger than the server, or a proxy before it, takes"),
    "UNIMPLEMENTED": (InvalidRequest, "is this a Triton server that `covae serve` started?"),
    "OUT_OF_RANGE": (InvalidRequest, "do the client's and the exported model's versions match?"),
    "PERMISSION_DENIED": (AccessDenied, "credentials go in Client(headers=…)"),
    "UNAUTHENTICATED": (AccessDenied, "credentials go in Client(headers=…)"),
}
# gRPC's words where certificates do not fit, or one side speaks TLS and the other does not.
SIGNS = {
    "CERTIFICATE_VERIFY_FAILED": "do you trust its authority? Tls(root_certificates=…), or COVAE_TLS_CA",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: leave Client(tls=…) out, or unset COVAE_TLS_CA",
    "handshake": "does it ask for TLS, or for a certificate? Client(tls=…), or COVAE_TLS_CA",
    "Socket closed": "does it ask for TLS, or for a certificate? Client(tls=…), or COVAE_TLS_CA",
}
# Triton's words where a token or key is missing; its status is UNAVAILABLE.
RESTRICTED = "protocol is restricted"
KEY_ADVICE = (
    "the server asks for a key, another one if one was sent: its token goes in Client(token=…) or COVAE_TOKEN_FILE"
)
OTHER_STATUS: tuple[type[ServerError], str] = (ServerFault, "the server's log says more")


@dataclass(frozen=True)
class Tls:
    """Files in PEM format: the authorities to trust (None: the system's), and for mutual TLS the client's own key.

    Raises:
        InvalidArgument: a key without a certificate, or the other way round.
    """

    root_certificates: str | Path | None = None
    private_key: str | Path | None = None
    certificate_chain: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            found = "private_key" if self.certificate_chain is None else "certificate_chain"
            raise InvalidArgument(
                f"tls: found {found} alone; expected private_key and certificate_chain, or neither (COVAE_TLS_KEY and "
                "COVAE_TLS_CERT)"
            )


@dataclass(frozen=True)
class Endpoint:
    """One served Triton model: its name, its tensors (per row) and the largest batch that it takes.

    model_digest: of the export that its answers must come from. halved: outputs that the server is asked to send as
    16-bit floats.
    """

    model_name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    model_digest: str = ""
    halved: frozenset[str] = frozenset()

    @property
    def rows_per_request(self) -> int:
        """Rows that one request carries: as many as the server takes and MAX_REQUEST_BYTES hold, and at least one."""
        row_bytes = sum(tensor.row_bytes for tensor in self.inputs) + self.answer_row_bytes
        return max(1, min(self.max_batch_size, MAX_REQUEST_BYTES // max(1, row_bytes)))

    @property
    def answer_row_bytes(self) -> int:
        """Bytes of a row's outputs."""
        return sum(tensor.row_bytes // (2 if tensor.name in self.halved else 1) for tensor in self.outputs)


@dataclass(frozen=True)
class Settings:
    """How to reach a server."""

    address: str
    timeout: Timeout
    retry: Retry
    tls: Tls | None
    headers: Mapping[str, str]
    metrics: RequestMetrics | None = None
    tracer: Any = None
    priority: int = Priority.INTERACTIVE


@dataclass(frozen=True)
class Question:
    """A call that whoever runs some steps makes, now or in an event loop, and sends the answer back.

    method, arguments: of tritonclient's client; action opens an error's message; optional: NotFound is an
    answer, and not asked again.
    """

    action: str
    method: str
    arguments: tuple[Any, ...]
    optional: bool = False


# Questions to the server one after the other, and what their answers come to.
Steps = Generator[Question, Any, Result]


class Transport:
    """A connection to one Triton server over gRPC; made on the first call, safe to use from many threads.

    A pickled one connects anew where it is unpickled, and neither measures nor traces anything there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = settings.address
        self._timeout = settings.timeout
        self._retry = settings.retry
        self._budget = Budget()
        self._headers = dict(settings.headers)
        self._closed = Event()
        self._connected = self._doubted = False
        self._connecting = Lock()
        self._attempts = 0
        self._failure: ServerError | None = None
        self._requests = Requests(settings.metrics, settings.tracer)
        self._left: list[Any] = []
        self._triton = _triton_client(settings.address, settings.tls)

    def __reduce__(self) -> tuple[type[Transport], tuple[Settings]]:
        return Transport, (replace(self.settings, metrics=None, tracer=None),)

    def close(self) -> None:
        """End the connection; calls in flight fail."""
        self._closed.set()
        for client in (*self._left, self._triton):
            client.close()

    def call(
        self,
        action: str,
        method: str,
        *arguments: Any,
        optional: bool = False,
        on_retry: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Any:
        """Call a method of tritonclient's client with deadline and retries; `action` opens the message of an error.
        optional: as of `Question`.

        Raises:
            ServerError: one of its kinds, by STATUS_ERRORS.
            InvalidArgument: the client is closed.
        """
        self._connect()

        def attempt(seconds: float) -> Any:
            self._doubt(seconds)
            return self._attempt(action, getattr(self._triton, method), seconds, *arguments, **options)

        return with_retries(
            attempt,
            retry=self._retry,
            request_s=self._timeout.request_s,
            stop=self._closed,
            budget=self._budget,
            on_retry=on_retry,
            optional=optional,
            several=several(self.address),
        )

    def infer(
        self, endpoint: Endpoint, inputs: Inputs, rows: int, progress: Progress | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run `rows` rows through an endpoint, split into requests, a few of them in flight at a time.

        `inputs(slice)` gives the input tensors of those rows; `progress(done, rows)` is called after each request, in
        order, in the caller's thread. Returns each output as one array with a leading axis of `rows`.

        Raises:
            ServerError: one of its kinds, by STATUS_ERRORS; ServerFault if an output is not as the contract says.
        """
        results = empty_results(endpoint, rows)

        def send(part: slice) -> int:
            rows = part.stop - part.start
            with self._requests.one(endpoint, rows) as request:
                answer = self._request(endpoint, inputs(part), request)
                for tensor in endpoint.outputs:
                    results[tensor.name][part] = checked_output(answer, tensor, rows, endpoint)
            return int(part.stop)

        for done in _in_flight(send, request_parts(endpoint, rows)):
            if progress is not None:
                progress(done, rows)
        return results

    def run(self, steps: Steps[Result]) -> Result:
        """Ask the questions of a catalogue's steps, and give what they come to."""
        try:
            question = next(steps)
            while True:
                try:
                    answer = self.call(
                        question.action, question.method, *question.arguments, optional=question.optional
                    )
                except ServerError as error:
                    question = steps.throw(error)
                else:
                    question = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result

    def _request(self, endpoint: Endpoint, arrays: Mapping[str, NDArray[Any]], request: Request) -> Any:
        from tritonclient.grpc import InferRequestedOutput

        wanted = [InferRequestedOutput(tensor.name) for tensor in endpoint.outputs]
        tensors = request_tensors(endpoint, arrays)
        return self.call(
            endpoint.model_name,
            "infer",
            endpoint.model_name,
            tensors,
            outputs=wanted,
            request_id=request.id,
            headers=self._headers | request.headers,
            parameters=request_parameters(endpoint),
            priority=self.settings.priority,
            on_retry=request.again,
        )

    def _doubt(self, seconds: float) -> None:
        """After a deadline see whether the connection is still one: a peer can vanish without a word, and then every
        later request would be lost on it. Where it does not answer, the next request has a new one."""
        if not self._doubted:
            return
        with self._connecting:
            if not self._doubted:
                return
            old = self._triton
            try:
                old.is_server_live(client_timeout=max(0.001, min(PROBE_S, seconds / 2)))
            except Exception:  # whatever it says, it is no answer
                if not self._closed.is_set():
                    # Closed with the client: others may have calls on it, which end by their own deadlines.
                    self._left.append(old)
                    self._triton = _triton_client(self.settings.address, self.settings.tls)
            self._doubted = False

    def _attempt(self, action: str, rpc: Callable[..., Any], seconds: float, *arguments: Any, **options: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        if self._closed.is_set():
            raise ConnectionFailed(f"{action}: the client was closed")
        try:
            return rpc(*arguments, **{"headers": self._headers, "client_timeout": max(seconds, 0.001), **options})
        except InferenceServerException as error:
            found = translated(self.address, action, error)
            self._doubted = self._doubted or isinstance(found, DeadlineExceeded)
            raise found from error
        except ValueError as error:
            # What gRPC raises on a channel that another thread has just closed.
            if not self._closed.is_set():
                raise
            raise ConnectionFailed(f"{action}: the client was closed") from error

    def _connect(self) -> None:
        if self._closed.is_set():
            raise InvalidArgument("client: it is closed; open another one")
        if self._connected:
            return
        attempts = self._attempts
        with self._connecting:
            if self._connected:
                return
            if attempts != self._attempts and self._failure is not None:
                # Another thread waited connect_s while this one waited for it: that was this one's wait too.
                raise type(self._failure)(str(self._failure))
            self._failure = None
            try:
                self._wait_until_live()
            except ServerError as failure:
                self._failure = failure
                raise
            finally:
                self._attempts += 1
            self._connected = True

    def _wait_until_live(self) -> None:
        deadline, reason = time.monotonic() + self._timeout.connect_s, "it is not live"
        while True:
            try:
                if self._attempt("connect", self._triton.is_server_live, deadline - time.monotonic()):
                    return
            except (ConnectionFailed, DeadlineExceeded) as error:
                # The status table's advice is about requests; here the server's own words are enough.
                cause: Any = error.__cause__
                reason = telling(reason, cause.message() if cause else str(error))
            if time.monotonic() + CONNECT_POLL_S >= deadline or self._closed.wait(CONNECT_POLL_S):
                raise ConnectionFailed(
                    f"{self.address}: no server answered within {self._timeout.connect_s} s: start one with "
                    f"`covae serve`, or give another address ({reason})"
                )


def telling(before: str, now: str) -> str:
    """Of two reasons why there is no connection the one that says more: of a name with several addresses one may have
    nobody, which says nothing of the other."""
    for sign, advice in SIGNS.items():
        if sign in now:
            return f"{now}; {advice}"
        if sign in before:
            return before
    return now


def empty_results(endpoint: Endpoint, rows: int) -> dict[str, NDArray[Any]]:
    """An array for each output, to be filled as answers come."""
    return {
        tensor.name: np.empty((rows, *tensor.shape), dtype=NUMPY_DTYPES[tensor.dtype]) for tensor in endpoint.outputs
    }


def request_parts(endpoint: Endpoint, rows: int) -> list[slice]:
    """The rows of each request."""
    size = endpoint.rows_per_request
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def request_tensors(endpoint: Endpoint, arrays: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The inputs of one request as tritonclient has them."""
    from tritonclient.grpc import InferInput

    tensors = []
    for tensor in endpoint.inputs:
        array = np.ascontiguousarray(arrays[tensor.name], dtype=NUMPY_DTYPES[tensor.dtype])
        tensors.append(InferInput(tensor.name, array.shape, tensor.dtype).set_data_from_numpy(array))
    return tensors


def request_parameters(endpoint: Endpoint) -> dict[str, str]:
    """What a request says beside its tensors."""
    digest = {MODEL_DIGEST: endpoint.model_digest} if endpoint.model_digest else {}
    return digest | ({HALVED: ",".join(sorted(endpoint.halved))} if endpoint.halved else {})


def translated(address: str, action: str, error: Any) -> ServerError:
    """tritonclient's error as one of ours, by its status."""
    status = str(error.status()).removeprefix("StatusCode.")
    kind, next_step = STATUS_ERRORS.get(status, OTHER_STATUS)
    if RESTRICTED in str(error.message()):
        kind, next_step = AccessDenied, KEY_ADVICE
    return kind(f"{action}: {address} says {status}: {error.message()} ({next_step})")


def _triton_client(address: str, tls: Tls | None) -> Any:
    secrets = None if tls is None else credentials(tls)

    from tritonclient.grpc import InferenceServerClient

    # `channel_args` replaces every default of tritonclient, the limits on message size among them.
    return InferenceServerClient(target(address), creds=secrets, channel_args=channel_options(address))


def credentials(tls: Tls) -> Any:
    """gRPC's credentials from PEM files.

    Raises:
        InvalidArgument: a file cannot be read.
    """
    import grpc

    files = (tls.root_certificates, tls.private_key, tls.certificate_chain)
    try:
        roots, key, chain = (None if file is None else Path(file).read_bytes() for file in files)
    except OSError as error:
        raise InvalidArgument(f"tls: {error.filename}: {error.strerror}; expected a file in PEM format") from error
    return grpc.ssl_channel_credentials(roots, key, chain)


def checked_output(answer: Any, tensor: TensorSpec, rows: int, endpoint: Endpoint) -> NDArray[Any]:
    """One output of an answer, held against the contract.

    Raises:
        ServerFault: it is missing, or of another type or shape.
    """
    expected = f"{tensor.dtype} {(rows, *tensor.shape)}"
    found = answer.get_output(tensor.name)
    if found is None:
        raise ServerFault(f"{endpoint.model_name}: the answer lacks the output {tensor.name!r}, expected {expected}")
    # A server that does not know HALVED sends them whole.
    kinds = {tensor.dtype, "FP16"} if tensor.name in endpoint.halved else {tensor.dtype}
    if found.datatype not in kinds or tuple(found.shape) != (rows, *tensor.shape):
        shape = tuple(found.shape)
        raise ServerFault(f"{endpoint.model_name}: {tensor.name!r} is {found.datatype} {shape}, expected {expected}")
    array: NDArray[Any] = answer.as_numpy(tensor.name)
    return array


def _in_flight(send: Callable[[slice], Result], parts: list[slice]) -> Iterator[Result]:
    """Results of `send` in the order of `parts`; a failure or an interrupt drops what has not been sent."""
    if len(parts) == 1:
        yield send(parts[0])
        return
    pool = ThreadPoolExecutor(min(MAX_IN_FLIGHT, len(parts)), thread_name_prefix="covae")
    try:
        # With the caller's context, in which a trace may be open.
        for future in [pool.submit(copy_context().run, send, part) for part in parts]:
            # Python can miss a Ctrl-C that comes just before a wait without end, and then waits on.
            while not wait([future], INTERRUPT_POLL_S).done:
                pass
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
