"""The client: one connection to a Triton server, and the models behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from covae_client.errors import ConnectionFailed, InvalidArgument, NotFound, ServerFault
from covae_client.model import Model
from covae_client.retry import Retry, Timeout
from covae_client.transport import Endpoint, Tls, Transport
from covae_core.contract import ModelSpec, Operation

DEFAULT_ADDRESS = "localhost:8001"
# HOST:PORT, an IPv6 address in brackets; gRPC takes prefixes as dns:/// and ipv4:, and sockets as unix:PATH.
ADDRESS = re.compile(r"unix:\S+|(dns:///|dns:|ipv4:|ipv6:)?(\[[0-9A-Fa-f:.%]+\]|[^\s/:\[\]]+):[0-9]{1,5}")


class Client:
    """A connection to a Triton server that serves Covae models, over gRPC.

    It connects on the first call. One client serves many threads. Close it, or use it in a `with` statement:

        with Client("localhost:8001", timeout=Timeout(connect_s=2, request_s=10)) as client:
            images = client.model("digits-sos-vae").sample(16, seed=0)

    address: HOST:PORT of the server's gRPC endpoint; `dns:///HOST:PORT` spreads requests over all hosts of that name.
    timeout, retry: see `Timeout` and `Retry`. tls: None for plain text. headers: sent along with every request, names
    in lower case, for example credentials.

    Raises:
        InvalidArgument: the address is empty, or a file of `tls` cannot be read.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: Timeout | None = None,
        retry: Retry | None = None,
        tls: Tls | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not ADDRESS.fullmatch(address):
            raise InvalidArgument(f"address: found {address!r}, expected HOST:PORT, for example {DEFAULT_ADDRESS}")
        self._transport = Transport(
            address, timeout=timeout or Timeout(), retry=retry or Retry(), tls=tls, headers=headers or {}
        )

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
            ServerFault: its operations come from different training runs.
            ServerError: the server does not answer, or not in time.
        """
        configs = {operation: config for operation in Operation if (config := self._config(name, operation))}
        if not configs:
            raise NotFound(
                f"{name}: {self._transport.address} serves no operation of a model of this name; check the name, or "
                f"serve it with `covae serve {name}`"
            )
        specs = {operation: ModelSpec.from_config(config) for operation, config in configs.items()}
        spec = next(iter(specs.values()))
        if any(other != spec for other in specs.values()):
            runs = ", ".join(f"{operation.value} {other.run_digest}" for operation, other in specs.items())
            raise ServerFault(f"{name}: its operations come from different training runs ({runs}); export it again")
        endpoints = {operation: _endpoint(name, operation, spec, config) for operation, config in configs.items()}

        def look_again(operation: Operation) -> Endpoint | None:
            config = self._config(name, operation)
            if config is None:
                return None
            if ModelSpec.from_config(config) != spec:
                raise ServerFault(f"{name}: the server now has another training run of it; open the model again")
            return _endpoint(name, operation, spec, config)

        return Model(name, spec, endpoints, self._transport, look_again)

    def models(self) -> dict[str, tuple[Operation, ...]]:
        """Names of the served models, sorted, each with its operations.

        Servers that `covae serve` starts keep this list to themselves; any client may still open a model whose name
        it knows. Where another server asks for a key, pass it: `Client(headers={"triton-grpc-protocol-…": KEY})`.

        Raises:
            ConnectionFailed: the server refuses, or does not answer.
        """
        try:
            index = self._transport.call("models", "get_model_repository_index", retry=Retry(attempts=1))
        except ConnectionFailed as error:
            raise ConnectionFailed(
                f"{error}. If the server runs, it keeps its list of models to itself, as `covae serve` has it: open a "
                "model by its name, or pass the server's key in Client(headers=…)"
            ) from error
        found: dict[str, list[Operation]] = {}
        for entry in index.models:
            parts = Operation.parse(entry.name)
            if parts and entry.state == "READY":
                found.setdefault(parts[0], []).append(parts[1])
        return {name: tuple(operation for operation in Operation if operation in found[name]) for name in sorted(found)}

    def _config(self, name: str, operation: Operation) -> Any:
        """The config of one operation; None if it is not served: readiness says so without an error."""
        served = operation.model_name(name)
        if not self._transport.call(served, "is_model_ready", served):
            return None
        try:
            return self._transport.call(served, "get_model_config", served, retry=Retry(attempts=1)).config
        except NotFound:  # its process has just died
            return None


def _endpoint(name: str, operation: Operation, spec: ModelSpec, config: Any) -> Endpoint:
    return Endpoint(
        operation.model_name(name), spec.inputs(operation), spec.outputs(operation), max(1, config.max_batch_size)
    )
