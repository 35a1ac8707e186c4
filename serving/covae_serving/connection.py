"""The supervisor's own gRPC connection to Triton: probes, and the admin protocols that need the key."""

from __future__ import annotations

from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from covae_serving.access import Access

# Not inference, health, metadata and model-config: clients need these, and they change nothing.
RESTRICTED = ("shared-memory", "model-repository", "logging", "trace", "statistics")
KEY_NAME = "covae-admin"
CALL_S = 5.0
STATISTICS_S = 0.25


class Connection:
    """A connection to one Triton; every call may raise grpc.RpcError."""

    def __init__(self, address: str, key: str, access: Access, folder: Path) -> None:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # A proxy for the outside world is no way to this machine's own server.
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
            # Channels to the same address share a connection, and so a dead server's backoff, unless told not to.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = access.channel(address, folder, options)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._user = access.metadata()
        self._admin = ((f"triton-grpc-protocol-{KEY_NAME}", key),)

    def close(self) -> None:
        """Close the connection; calls under way end with CANCELLED."""
        self._channel.close()

    def identity(self, timeout_s: float) -> str:
        """The id that the server at this address was started with."""
        return str(
            self._stub.ServerMetadata(messages.ServerMetadataRequest(), timeout=timeout_s, metadata=self._user).name
        )

    def unavailable(self) -> dict[str, str]:
        """The models that are in the repository's index but not ready, each with Triton's reason."""
        index = self._stub.RepositoryIndex(messages.RepositoryIndexRequest(), timeout=CALL_S, metadata=self._admin)
        return {model.name: model.reason for model in index.models if model.state not in ("READY", "")}

    def load(self, model_name: str, timeout_s: float) -> None:
        """Load a model; returns once it has loaded."""
        request = messages.RepositoryModelLoadRequest(model_name=model_name)
        self._stub.RepositoryModelLoad(request, timeout=timeout_s, metadata=self._admin)

    def unload(self, model_name: str, timeout_s: float) -> None:
        """Unload a model; requests that it has begun still finish."""
        request = messages.RepositoryModelUnloadRequest(model_name=model_name)
        self._stub.RepositoryModelUnload(request, timeout=timeout_s, metadata=self._admin)

    def completed_rows(self, model_name: str) -> int:
        """How many rows the model has answered since it was loaded."""
        request = messages.ModelStatisticsRequest(name=model_name)
        statistics = self._stub.ModelStatistics(request, timeout=STATISTICS_S, metadata=self._admin)
        return sum(model.inference_count for model in statistics.model_stats)

    def infer(self, request: messages.ModelInferRequest, timeout_s: float) -> grpc.Future:
        """Send an inference; the future that comes back is also a grpc.Call."""
        return self._stub.ModelInfer.future(request, timeout=timeout_s, metadata=self._user)
