"""Which version a server answers with: the one that the client opened, or none."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelInferRequest

from covae_client import Client, errors
from covae_export.weights import digests, share_weights
from covae_serving.errors import ServingError
from covae_serving.service import Service

pytestmark = pytest.mark.slow


def request(digest: str, latent: np.ndarray) -> ModelInferRequest:
    message = ModelInferRequest(model_name="toy_decode")
    message.inputs.add(name="latent", datatype="FP32", shape=latent.shape)
    message.raw_input_contents.append(latent.tobytes())
    if digest:
        message.parameters["model_digest"].string_param = digest
    return message


def test_a_request_for_another_export_is_refused_and_its_neighbours_are_answered(
    write_release_of_toy, tmp_path, serve, connect
):
    stub = connect(serve(write_release_of_toy(tmp_path, 3)).grpc_address).stub
    latent, right = np.ones((1, 4), np.float32), f"{3:064x}"
    answers = [stub.ModelInfer.future(request(digest, latent)) for digest in 8 * (right, "4" * 64, "")]
    for answer, digest in zip(answers, 8 * (right, "4" * 64, ""), strict=True):
        if digest in (right, ""):
            assert answer.result().outputs[0].shape == [1, 1, 2, 2]
        else:
            assert answer.exception().code() == grpc.StatusCode.ALREADY_EXISTS
            assert "model_digest: the request is for 444444444444, this server has 0000" in answer.exception().details()


def test_a_graph_that_is_not_the_configurations_is_not_served(write_release_of_toy, tmp_path):
    path = write_release_of_toy(tmp_path, 1) / "toy_sample" / "1" / "model.onnx"
    graph = bytearray(path.read_bytes())
    at = graph.index(np.arange(10, 14).tobytes())
    graph[at] += 1  # its first latent: still a graph
    path.write_bytes(graph)
    service = Service(tmp_path, grpc_port=0, metrics_port=0)
    with pytest.raises(ServingError, match=r"toy_sample does not answer: .*1/model\.onnx: its SHA-256 is .*damaged"):
        service.start()


def with_weights(version):
    """Give the graph of a version a large weight, in a file of its own; the configuration has the new digests."""
    model = onnx.load(version / "model.onnx")
    large = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(large, "large"))
    model.graph.node.append(onnx.helper.make_node("Relu", ["large"], ["unused"]))
    onnx.save(model, version / "model.onnx")
    share_weights([version])
    config = text_format.Parse((version / "config.pbtxt").read_text(), ModelConfig())
    found = digests(version)
    config.parameters["graph_sha256"].string_value = found.pop("model.onnx")
    config.parameters["weights_sha256"].string_value = json.dumps(found)
    (version / "config.pbtxt").write_text(text_format.MessageToString(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("changed", r"toy_sample/1/weights-000\.bin: its SHA-256 is .*: the file is damaged or another's"),
        ("cut", r"toy_sample/1/weights-000\.bin: its SHA-256 is .*: the file is damaged or another's"),
        ("missing", r"toy_sample/1/weights-000\.bin: no such file of weights"),
        ("added", r"toy_sample/1/weights-001\.bin: .* names no such file of weights; move it away"),
    ],
)
def test_weights_that_are_not_the_configurations_are_not_served(damage, message, write_release_of_toy, tmp_path):
    version = write_release_of_toy(tmp_path, 1) / "toy_sample" / "1"
    with_weights(version)
    with Service(tmp_path, grpc_port=0, metrics_port=0) as service, Client(service.grpc_address) as client:
        assert client.model("toy").sample(1).shape[0] == 1
    path = version / "weights-000.bin"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "added":
        (version / "weights-001.bin").write_bytes(b"another export's")
    else:
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "changed" else b""))
    with pytest.raises(ServingError, match=message):
        Service(tmp_path, grpc_port=0, metrics_port=0).start()


def test_a_crash_does_not_change_the_model_under_a_client(write_release_of_toy, tmp_path, serve, own_stubs, caplog):
    service = serve(write_release_of_toy(tmp_path, 1))
    with Client(service.grpc_address) as client:
        model = client.model("toy")
        before = model.sample(3, seed=0)
        write_release_of_toy(tmp_path, 2)
        os.kill(os.getpgid(own_stubs()[0].pid), signal.SIGKILL)
        np.testing.assert_array_equal(model.sample(3, seed=0), before)
        assert client.model("toy").spec == model.spec


def test_two_servers_are_updated_one_after_the_other_without_a_failure_or_a_mixed_answer(
    write_release_of_toy, tmp_path
):
    """What docs/serving.md tells an operator to do; clients open the model anew when no server has theirs."""
    options = {"metrics_port": 0}
    write_release_of_toy(tmp_path, 1)
    old = [Service(tmp_path, grpc_port=0, **options).start() for _ in range(2)]
    addresses = [service.grpc_address for service in old]
    new, ended, answers, faults = [], threading.Event(), [], []

    def work() -> None:
        with Client(",".join(addresses)) as client:
            model = client.model("toy")
            while not ended.is_set():
                try:
                    images = model.sample(200, seed=0)  # four requests
                except errors.ModelChanged:
                    model = client.model("toy")
                    continue
                except Exception as error:
                    faults.append(error)
                    return
                answers.append((model.spec.model_digest, images.tobytes()))

    def until_answered_by(version: int) -> None:
        deadline = time.monotonic() + 30
        while not faults and all(digest != f"{version:064x}" for digest, _ in answers):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    try:
        until_answered_by(1)
        time.sleep(1)
        write_release_of_toy(tmp_path, 2)
        for service, address in zip(old, addresses, strict=True):
            service.stop()
            new.append(Service(tmp_path, grpc_port=int(address.rpartition(":")[2]), **options).start())
            time.sleep(1)
        until_answered_by(2)
    finally:
        ended.set()
        for worker in workers:
            worker.join()
        for service in (*old, *new):
            service.stop()

    assert faults == []
    found = {digest: {images for other, images in answers if other == digest} for digest, _ in answers}
    assert {digest: len(images) for digest, images in found.items()} == {f"{1:064x}": 1, f"{2:064x}": 1}
    assert not set.intersection(*found.values())


def test_a_model_that_is_opened_while_it_heals_is_waited_for(write_release_of_toy, tmp_path, serve):
    service = serve(write_release_of_toy(tmp_path, 1), operations=["sample"])
    with Client(service.grpc_address) as client:
        before = client.model("toy").sample(2, seed=0)
        for _ in range(3):
            service._server.connection.unload("toy_sample", 10)  # as a healing begins
            np.testing.assert_array_equal(client.model("toy").sample(2, seed=0), before)
        began = time.monotonic()
        with pytest.raises(errors.NotFound, match="serves no operation of a model of this name"):
            client.model("toys")
        assert time.monotonic() - began < 5
