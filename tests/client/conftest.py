"""A stand-in for Triton on the real wire: tritonclient's own protobuf service on port 0, with faults on demand.

What a real model answers is tested against real Triton in tests/pipeline; here it is arithmetic on seeds and pixels.
"""

# ruff: noqa: N802 (gRPC finds the methods of a service by their names)

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import Lock

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from covae_client import Client, Retry, Timeout
from covae_core.contract import NUMPY_DTYPES, ModelSpec, served_name
from covae_core.noise import Stream, standard_normal, uniform
from covae_core.operations import OPERATIONS

# Of a model without a pose.
UNPOSED = tuple(name for name, item in OPERATIONS.items() if "align" not in item.needs)
SPEC = ModelSpec(
    family="sos-vae",
    image_shape=(6, 5, 3),
    latents={"latent": (4,)},
    posteriors={"latent": {"mean": (4,), "scale": (4,)}},
    priors={"latent": "standard-normal"},
    density="low-rank-normal",
    density_parameters={"mean": (3, 6, 5), "factor": (2, 3, 6, 5), "variance": (3, 6, 5)},
    scoring_parameters={},
    operations=UNPOSED,
    score_samples=8,
    draw_samples=3,
    run_id="run-1",
    run_digest="0123abcd",
    model_digest="4567cdef",
    data="toy",
)
MAX_BATCH = 8


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves one model `toy`; `faults` are statuses that the next inferences fail with in order, None for an answer."""

    def __init__(self, spec=SPEC, operations=UNPOSED):
        self.spec = spec
        self.operations = {served_name("toy", operation): operation for operation in operations}
        self.digests = {}
        self.faults = deque()
        self.always_fault = None
        self.delay_s = 0.0
        self.tamper = lambda outputs: outputs
        self.list_allowed = False
        self.distance = np.float32(1)
        self.requests = []
        self.headers = {}
        self.calls = 0
        self.running = self.most_running = 0
        self._lock = Lock()

    def ServerLive(self, request, context):
        return pb.ServerLiveResponse(live=True)

    def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=request.name in self.operations)

    def ModelConfig(self, request, context):
        if request.name not in self.operations:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = pb.ModelConfigResponse()
        response.config.name = request.name
        response.config.max_batch_size = MAX_BATCH
        for name, value in self.spec.to_parameters().items():
            response.config.parameters[name].string_value = value
        if request.name in self.digests:
            response.config.parameters["model_digest"].string_value = f'"{self.digests[request.name]}"'
        return response

    def RepositoryIndex(self, request, context):
        if not self.list_allowed:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted")
        names = [*self.operations, "another"]
        states = [pb.RepositoryIndexResponse.ModelIndex(name=name, version="1", state="READY") for name in names]
        return pb.RepositoryIndexResponse(models=states)

    def ModelInfer(self, request, context):
        with self._lock:
            self.headers = dict(context.invocation_metadata())
            self.calls += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            fault = self.faults.popleft() if self.faults else self.always_fault
        try:
            if fault is not None:
                context.abort(fault, "injected")
            time.sleep(self.delay_s)
            return self._answer(request)
        finally:
            with self._lock:
                self.running -= 1

    def _answer(self, request):
        operation = self.operations[request.model_name]
        inputs = {
            tensor.name: np.frombuffer(raw, NUMPY_DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        with self._lock:
            self.requests.append((operation, inputs))
        outputs = self.tamper(getattr(self, f"_{operation}")(inputs))
        response = pb.ModelInferResponse(model_name=request.model_name)
        names = {np.dtype(dtype): name for name, dtype in NUMPY_DTYPES.items()}
        for name, array in outputs.items():
            response.outputs.add(name=name, datatype=names[array.dtype], shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response

    def _images(self, seeds):
        values = uniform(seeds[:, 0], prod(self.spec.image_shape), Stream.PIXEL)
        return (values * 255).astype(np.uint8).reshape(-1, *self.spec.image_shape)

    def _sample(self, inputs):
        if not self.spec.latents:
            return {"image": self._images(inputs["noise_seed"])}
        count = prod(self.spec.latents["latent"])
        latent = standard_normal(inputs["latent_seed"][:, 0], count, Stream.LATENT)
        return {"image": self._images(inputs["noise_seed"]), "latent": latent.reshape(-1, *self.spec.latents["latent"])}

    def _decode(self, inputs):
        first = np.abs(inputs["latent"].reshape(len(inputs["latent"]), -1)[:, 0])
        shapes = {tensor.name: tensor.shape for tensor in OPERATIONS["decode"].outputs(self.spec)}
        return {
            name: np.broadcast_to(first.reshape(-1, *(1,) * len(shape)) + 1, (len(first), *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    def _encode(self, inputs):
        mean = inputs["image"].mean(axis=(1, 2, 3), dtype=np.float32)
        latents = np.broadcast_to(mean[:, None], (len(mean), *self.spec.latents["latent"])).astype(np.float32)
        return {"latent_mean": latents, "latent_scale": np.ones_like(latents)}

    def _condition(self, inputs):
        mask = inputs["mask"][..., None]
        mean = np.where(mask, inputs["pixels"], np.uint8(128))
        sample = np.where(mask, inputs["pixels"], self._images(inputs["noise_seed"]))
        return {"image": mean, "sample": sample, "distance": self.distance / (1 + inputs["softness"] * 100)}

    def _draw(self, inputs):
        seeds = inputs["noise_seed"] + np.arange(self.spec.draw_samples)
        images = [self._images(seeds[:, [step]]) for step in range(self.spec.draw_samples)]
        return {"images": np.stack(images, axis=1)}

    def _score(self, inputs):
        seeds = inputs.get("seed", np.zeros((len(inputs["image"]), 1), np.int64))
        noise = standard_normal(seeds[:, 0], self.spec.score_samples, Stream.POSTERIOR)
        weights = inputs["image"].mean(axis=(1, 2, 3))[:, None] + noise.astype(np.float64)
        return dict.fromkeys((tensor.name for tensor in OPERATIONS["score"].outputs(self.spec)), weights)

    def _surprise(self, inputs):
        image = inputs["image"]
        map_ = np.moveaxis(image.astype(np.float32) / 255 - 0.5, -1, 1)
        mean = image.mean(axis=(1, 2, 3))[:, None]
        return {"surprise": map_, "residual": mean, "log_determinant": -mean, "latent": 0.1 * mean}


class Running:
    """A fake server on a port of its own."""

    def __init__(self, servicer, port=0, credentials=None):
        self.server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self.server)
        place = f"127.0.0.1:{port}"
        if credentials is None:
            port = self.server.add_insecure_port(place)
        else:
            port = self.server.add_secure_port(place, credentials)
        self.address = f"127.0.0.1:{port}"
        self.server.start()

    def stop(self):
        self.server.stop(0).wait()


@pytest.fixture
def triton():
    return FakeTriton()


@pytest.fixture
def serve():
    """Starts a servicer and gives its address; all are stopped at the end."""
    running = []

    def start(servicer, port=0, credentials=None):
        running.append(Running(servicer, port, credentials))
        return running[-1].address

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def address(triton, serve):
    return serve(triton)


@pytest.fixture
def client(address):
    retry = Retry(attempts=4, first_wait_s=0.01, longest_wait_s=0.05)
    with Client(address, timeout=Timeout(connect_s=5, request_s=10), retry=retry) as client:
        yield client


@pytest.fixture
def model(client):
    return client.model("toy")
