"""A toy model repository, small enough to load in a second, and a real Triton that serves it."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from covae_core.contract import NUMPY_DTYPES, PLATFORM_BACKEND, ModelSpec, TensorSpec, served_name
from covae_core.operations import OPERATIONS
from covae_core.release import Release, write_release
from covae_serving.regions import SHARED_MEMORY
from covae_serving.service import Service
from covae_serving.stubs import Stub, find_stubs

BLACK = np.zeros((1, 2, 2, 1), np.uint8)
TOY = ModelSpec(
    family="toy",
    image_shape=(2, 2, 1),
    latents={"latent": (4,)},
    posteriors={},
    priors={"latent": "standard-normal"},
    density="diagonal",
    density_parameters={"mean": (1, 2, 2), "variance": (1, 1, 1)},
    scoring_parameters={},
    operations=("decode", "sample", "score"),
    score_samples=1,
    draw_samples=1,
    run_id="toy",
    run_digest="0" * 64,
    model_digest="1" * 64,
    data="toy",
)


def inputs(operation: str) -> tuple[TensorSpec, ...]:
    """The input tensors of one of the toy's operations."""
    return OPERATIONS[operation].inputs(TOY)


def outputs(operation: str) -> tuple[TensorSpec, ...]:
    """Its output tensors; of score, the weights alone."""
    return OPERATIONS[operation].outputs(TOY)[: 1 if operation == "score" else None]


TABLE_SIZE = 1024
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "INT64": TensorProto.INT64,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
}


def value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], ["batch", *tensor.shape])


def constant(name: str, values: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(values, name)


def decode_nodes() -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """mean is the latent as a 2×2 image; variance is one plus the mean of the latent's squares.

    The mean's shape is computed from the latent, so that ONNX Runtime cannot know it when it loads the graph.
    """
    nodes = [
        helper.make_node("Mul", ["latent", "nothing"], ["nothings"]),
        helper.make_node("ReduceMax", ["nothings"], ["still_nothing"], keepdims=0),
        helper.make_node("Cast", ["still_nothing"], ["zero"], to=TensorProto.INT64),
        helper.make_node("Add", ["fixed_shape", "zero"], ["mean_shape"]),
        helper.make_node("Reshape", ["latent", "mean_shape"], ["mean"]),
        helper.make_node("Mul", ["latent", "latent"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axis"], ["flat"], keepdims=1),
        helper.make_node("Add", ["flat", "one"], ["variance_flat"]),
        helper.make_node("Reshape", ["variance_flat", "variance_shape"], ["variance"]),
    ]
    constants = [
        constant("fixed_shape", np.array([-1, 1, 2, 2])),
        constant("nothing", np.zeros(1, np.float32)),
        constant("variance_shape", np.array([-1, 1, 1, 1])),
        constant("axis", np.array([1])),
        constant("one", np.ones(1, np.float32)),
    ]
    return nodes, constants


def sample_nodes(first: int = 0) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """latent is the latent seed plus 0, 1, 2, 3 and `first`; image is the same plus the noise seed, modulo 256.

    The graph itself fails on a latent seed beyond the table's end.
    """
    nodes = [
        helper.make_node("Add", ["latent_seed", "steps"], ["whole"]),
        helper.make_node("Gather", ["table", "whole"], ["latent"]),
        helper.make_node("Add", ["whole", "noise_seed"], ["sum"]),
        helper.make_node("Mod", ["sum", "bytes"], ["level"]),
        helper.make_node("Cast", ["level"], ["pixel"], to=TensorProto.UINT8),
        helper.make_node("Reshape", ["pixel", "image_shape"], ["image"]),
    ]
    constants = [
        constant("steps", np.arange(4) + first),
        constant("table", np.arange(TABLE_SIZE, dtype=np.float32)),
        constant("bytes", np.array([256])),
        constant("image_shape", np.array([-1, 2, 2, 1])),
    ]
    return nodes, constants


def score_nodes() -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """log_weight is zero, after as many products of 256×256 matrices as the largest seed says: as slow as you like."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "mixer"], ["next_state"]),
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [256, 256]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["seed"], ["trips"], keepdims=0),
        helper.make_node("Loop", ["trips", "always", "mixer"], ["mixed"], body=body),
        helper.make_node("ReduceMin", ["mixed"], ["least"], keepdims=0),
        helper.make_node("Cast", ["least"], ["least_double"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["image"], ["image_double"], to=TensorProto.DOUBLE),
        helper.make_node("ReduceMax", ["image_double", "axes"], ["brightest"], keepdims=1),
        helper.make_node("Mul", ["brightest", "least_double"], ["product"]),
        helper.make_node("Reshape", ["product", "weight_shape"], ["log_weight"]),
    ]
    constants = [
        constant("always", np.array(True)),
        constant("mixer", np.zeros((256, 256), np.float32)),
        constant("axes", np.array([1, 2, 3])),
        constant("weight_shape", np.array([-1, 1])),
    ]
    return nodes, constants


NODES = {"decode": decode_nodes, "sample": sample_nodes, "score": score_nodes}


def toy_graph(operation: str, free_outputs: bool = False, nodes: Any = None) -> onnx.ModelProto:
    """The operation's graph; with `free_outputs` it does not say which shapes its outputs have. nodes: other ones."""
    nodes, constants = nodes or NODES[operation]()
    made = [value_info(tensor) for tensor in outputs(operation)]
    if free_outputs:
        for output in made:
            output.type.tensor_type.ClearField("shape")
    graph = helper.make_graph(
        nodes,
        f"toy_{operation}",
        [value_info(tensor) for tensor in inputs(operation)],
        made,
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def toy_config(name: str, operation: str) -> ModelConfig:
    config = ModelConfig(name=served_name(name, operation), backend=PLATFORM_BACKEND, max_batch_size=64)
    for tensors, field in ((inputs(operation), config.input), (outputs(operation), config.output)):
        for tensor in tensors:
            field.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.shape)
    config.dynamic_batching.default_queue_policy.max_queue_size = 256
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    for key, value in {**TOY.to_parameters(), "intra_op_thread_count": "1"}.items():
        config.parameters[key].string_value = value
    return config


def write_release_of_toy(repository: Path, version: int) -> Path:
    """Publish a version of the toy's decode and sample, each unlike the one before, as `covae export` does."""
    nodes = {"decode": decode_nodes(), "sample": sample_nodes(10 * version)}
    digest = f"{version:064x}"
    for operation in nodes:
        folder = repository / served_name("toy", operation)
        (folder / str(version)).mkdir(parents=True)
        graph = toy_graph(operation, nodes=nodes[operation]).SerializeToString()
        (folder / str(version) / "model.onnx").write_bytes(graph)
        config = toy_config("toy", operation)
        parameters = replace(TOY, operations=tuple(nodes), model_digest=digest).to_parameters()
        for key, value in (parameters | {"graph_sha256": hashlib.sha256(graph).hexdigest()}).items():
            config.parameters[key].string_value = value
        (folder / str(version) / "config.pbtxt").write_text(text_format.MessageToString(config))
    write_release(repository, "toy", Release(version, tuple(nodes), digest))
    return repository


def write_toy(
    repository: Path,
    name: str = "toy",
    operations: Iterable[str] = tuple(NODES),
    change: Callable[[ModelConfig], object] = lambda config: None,
    free_outputs: bool = False,
) -> Path:
    """Write a toy model's operations, their configs changed by `change`; the repository's path comes back."""
    for operation in operations:
        folder = repository / served_name(name, operation)
        (folder / "1").mkdir(parents=True)
        onnx.save(toy_graph(operation, free_outputs), folder / "1" / "model.onnx")
        config = toy_config(name, operation)
        change(config)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    return repository


class Caller:
    """A gRPC client with nothing between the tests and Triton."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def send(self, model_name: str, timeout_s: float = 60, **inputs: np.ndarray) -> Any:
        """Send an inference; a grpc.Future of Triton's response comes back."""
        request = ModelInferRequest(model_name=model_name)
        for name, array in inputs.items():
            datatype = next(text for text, dtype in NUMPY_DTYPES.items() if dtype == array.dtype)
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        return self.stub.ModelInfer.future(request, timeout=timeout_s)

    def infer(self, model_name: str, timeout_s: float = 60, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return arrays(self.send(model_name, timeout_s, **inputs).result())

    def refusal(self, model_name: str, **inputs: np.ndarray) -> tuple[grpc.StatusCode, str]:
        """The status and message that an inference fails with."""
        error = self.send(model_name, **inputs).exception()
        assert error is not None, f"{model_name} accepted the request"
        return error.code(), error.details()

    def slow_seed(self, seconds: float) -> np.ndarray:
        """The score seed that keeps the model busy for about that long on this machine, now."""
        trips = 200
        self.score(np.array([[1]]))
        began = time.monotonic()
        self.score(np.array([[trips]]))
        return np.array([[int(trips * seconds / (time.monotonic() - began))]])

    def score(self, seed: np.ndarray) -> dict[str, np.ndarray]:
        return self.infer("toy_score", image=BLACK, seed=seed)


def arrays(response: ModelInferResponse) -> dict[str, np.ndarray]:
    return {
        output.name: np.frombuffer(content, NUMPY_DTYPES[output.datatype]).reshape(output.shape)
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def own_stubs(pid: int | None = None, model_name: str | None = None) -> list[Stub]:
    """The stubs of the services that the process runs; by default this one."""
    return find_stubs(f"covae-{pid or os.getpid()}-", model_name)


def traces(pid: int | None = None) -> list[str]:
    """What services of the process have in shared memory and in the temp folder."""
    folders = (SHARED_MEMORY, Path(tempfile.gettempdir()))
    return [str(path) for folder in folders for path in folder.glob(f"covae-{pid or os.getpid()}-*")]


@pytest.fixture(name="write_toy", scope="session")
def write_toy_fixture() -> Callable[..., Path]:
    return write_toy


@pytest.fixture(name="write_release_of_toy", scope="session")
def write_release_of_toy_fixture() -> Callable[..., Path]:
    return write_release_of_toy


@pytest.fixture(name="own_stubs", scope="session")
def own_stubs_fixture() -> Callable[..., list[Stub]]:
    return own_stubs


@pytest.fixture(name="traces", scope="session")
def traces_fixture() -> Callable[..., list[str]]:
    return traces


@pytest.fixture(name="arrays", scope="session")
def arrays_fixture() -> Callable[[ModelInferResponse], dict[str, np.ndarray]]:
    return arrays


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """Starts services on free ports; all of them end with the test."""
    with ExitStack() as stack:
        yield lambda repository, **options: stack.enter_context(
            Service(repository, grpc_port=0, metrics_port=0, **options)
        )


@pytest.fixture
def connect() -> Iterator[Callable[[str], Caller]]:
    """Opens connections; all of them close with the test."""
    with ExitStack() as stack:
        yield lambda address: stack.enter_context(closing(Caller(address)))


@pytest.fixture(scope="module")
def service(toy_repository: Path) -> Iterator[Service]:
    """One service for a module's tests; they leave it as they find it."""
    with Service(toy_repository, grpc_port=0, metrics_port=0) as service:
        yield service


@pytest.fixture(scope="module")
def caller(service: Service) -> Iterator[Caller]:
    with closing(Caller(service.grpc_address)) as caller:
        yield caller
