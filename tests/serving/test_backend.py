"""The ONNX Runtime backend, inside a real Triton: what it accepts, what it refuses, and how."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest

from covae_serving.errors import ServingError
from covae_serving.service import Service

INVALID = grpc.StatusCode.INVALID_ARGUMENT
pytestmark = pytest.mark.slow

LATENT = np.array([[0.5, -1, 2, 0]], np.float32)


def seeds(*values: int) -> dict[str, np.ndarray]:
    column = np.array(values)[:, None]
    return {"latent_seed": column, "noise_seed": np.zeros_like(column)}


def test_a_batch_comes_back_row_by_row(caller):
    latent = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)

    outputs = caller.infer("toy_decode", latent=latent)

    np.testing.assert_array_equal(outputs["mean"], latent.reshape(64, 1, 2, 2))
    np.testing.assert_allclose(outputs["variance"].ravel(), 1 + (latent**2).mean(1), rtol=1e-6)


def test_only_the_outputs_asked_for_are_sent(caller):
    from tritonclient.grpc.service_pb2 import ModelInferRequest

    request = ModelInferRequest(model_name="toy_decode")
    request.inputs.add(name="latent", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(LATENT.tobytes())
    request.outputs.add(name="mean")

    response = caller.stub.ModelInfer(request)

    assert [output.name for output in response.outputs] == ["mean"]


@pytest.mark.parametrize(
    ("value", "row", "position"), [(np.nan, 0, 2), (np.inf, 2, 0), (-np.inf, 1, 3)], ids=["nan", "inf", "minus inf"]
)
def test_a_value_that_is_not_finite_is_named_with_its_place(caller, value, row, position):
    latent = np.zeros((3, 4), np.float32)
    latent[row, position] = value

    status, message = caller.refusal("toy_decode", latent=latent)

    assert status == INVALID
    assert f"latent: {np.float32(value)} at row {row}, position [{position}]; every value must be finite" in message
    assert caller.infer("toy_decode", latent=LATENT)["mean"].shape == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("model_name", "inputs", "status", "message"),
    [
        ("toy_decode", {"latent": np.zeros((1, 5), np.float32)}, INVALID, r"latent.*\[-1,4\].*\[1,5\]"),
        ("toy_decode", {"latent": np.zeros((1, 2, 2), np.float32)}, INVALID, r"latent.*\[-1,4\].*\[1,2,2\]"),
        ("toy_decode", {"latent": np.zeros((1, 4), np.float64)}, INVALID, "latent.*FP64.*FP32"),
        ("toy_decode", {"latent": np.zeros((65, 4), np.float32)}, INVALID, "batch-size must be <= 64"),
        ("toy_decode", {"latent": np.zeros((0, 4), np.float32)}, INVALID, ""),
        ("toy_decode", {}, INVALID, "expected 1 inputs but got 0"),
        ("toy_sample", {**seeds(1, 2), "noise_seed": np.zeros((1, 1), np.int64)}, INVALID, "noise_seed|latent_seed"),
        ("toy_paint", {"latent": LATENT}, grpc.StatusCode.NOT_FOUND, "toy_paint"),
    ],
    ids=["row shape", "rank", "dtype", "batch over the most", "no rows", "no input", "unequal rows", "unknown model"],
)
def test_a_wrong_request_gets_the_right_status_and_the_next_one_works(caller, model_name, inputs, status, message):
    found_status, found_message = caller.refusal(model_name, **inputs)

    assert found_status == status, found_message
    assert re.search(message, found_message), found_message
    assert caller.infer("toy_decode", latent=LATENT)["mean"].shape == (1, 1, 2, 2)


@pytest.mark.parametrize("value", [3e38, -1.1e6])
def test_a_number_beyond_any_latent_is_refused(caller, value):
    latent = np.zeros((2, 4), np.float32)
    latent[1, 2] = value
    status, message = caller.refusal("toy_decode", latent=latent)
    assert status == INVALID
    assert re.search(r"latent: .* at row 1, position \[2\]; expected numbers up to 1e\+06", message)


def halved(caller, names: str, latent: np.ndarray):
    from tritonclient.grpc.service_pb2 import ModelInferRequest

    request = ModelInferRequest(model_name="toy_decode")
    request.inputs.add(name="latent", datatype="FP32", shape=latent.shape)
    request.raw_input_contents.append(latent.tobytes())
    request.parameters["halved"].string_param = names
    return caller.stub.ModelInfer(request)


def test_outputs_are_sent_as_16_bit_floats_to_those_who_ask(caller):
    response = halved(caller, "mean", LATENT)

    sent = {output.name: output.datatype for output in response.outputs}
    assert (sent["mean"], sent["variance"]) == ("FP16", "FP32")
    mean = next(
        data
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
        if output.name == "mean"
    )
    np.testing.assert_array_equal(np.frombuffer(mean, np.float16), LATENT[0])


@pytest.mark.parametrize(
    ("names", "latent", "status", "message"),
    [
        ("mean,men", LATENT, INVALID, "halved: found 'mean,men'; expected names of outputs of FP32, of .*'mean'"),
        ("mean", 1e5 * LATENT, grpc.StatusCode.INTERNAL, "halved: a number of the output is beyond .* 65,504"),
    ],
    ids=["unknown output", "too large a number"],
)
def test_what_cannot_be_sent_as_16_bit_floats_is_refused(caller, names, latent, status, message):
    with pytest.raises(grpc.RpcError) as refused:
        halved(caller, names, latent)

    assert refused.value.code() == status
    assert re.search(message, refused.value.details())
    assert caller.infer("toy_decode", latent=LATENT)["mean"].shape == (1, 1, 2, 2)


def waiting_batches(config) -> None:
    """Triton waits this long for a batch to fill, so requests sent together run together."""
    config.dynamic_batching.max_queue_delay_microseconds = 500_000


def executions(service: Service, model_name: str) -> int:
    with urllib.request.urlopen(service.metrics_url) as page:
        metrics = page.read().decode()
    return int(re.search(rf'nv_inference_exec_count{{model="{model_name}".*}} (\d+)', metrics)[1])


def executions_after(service: Service, model_name: str, before: int) -> int:
    """How many executions there were since; Triton counts one some time after it has sent the answers."""
    deadline = time.monotonic() + 10
    while (count := executions(service, model_name)) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    return count - before


def test_a_bad_request_does_not_spoil_the_batch_it_came_in(tmp_path, write_toy, serve, connect, arrays):
    service = serve(write_toy(tmp_path, operations=["decode"], change=waiting_batches))
    caller = connect(service.grpc_address)
    before = executions_after(service, "toy_decode", 0)  # the probe that found it ready
    latents = [np.full((rows, 4), rows, np.float32) for rows in (1, 2, 3)]
    latents[1][0, 0] = np.nan

    answers = [caller.send("toy_decode", latent=latent) for latent in latents]

    assert answers[1].exception().code() == INVALID
    for index in (0, 2):
        np.testing.assert_array_equal(
            arrays(answers[index].result())["mean"].reshape(-1, 4), latents[index], err_msg=f"request {index}"
        )
    assert executions_after(service, "toy_decode", before) == 1, "the three requests did not run as one batch"


def test_a_request_that_the_graph_fails_on_does_not_spoil_its_batch(tmp_path, write_toy, serve, connect, arrays):
    service = serve(write_toy(tmp_path, operations=["sample"], change=waiting_batches))
    caller = connect(service.grpc_address)
    before = executions_after(service, "toy_sample", 0)  # the probe that found it ready

    answers = [caller.send("toy_sample", **seeds(seed)) for seed in (7, 1_000_000, 8)]

    assert answers[1].exception().code() == grpc.StatusCode.INTERNAL
    assert "ONNX Runtime failed" in answers[1].exception().details()
    np.testing.assert_array_equal(arrays(answers[0].result())["latent"], [[7, 8, 9, 10]])
    np.testing.assert_array_equal(arrays(answers[2].result())["latent"], [[8, 9, 10, 11]])
    assert executions_after(service, "toy_sample", before) == 1, "the three requests did not run as one batch"


def test_two_instances_give_the_same_bytes(tmp_path, write_toy, serve, connect, own_stubs):
    def two_instances(config):
        config.instance_group[0].count = 2

    before = len(own_stubs())
    service = serve(write_toy(tmp_path, operations=["sample"], change=two_instances))
    caller = connect(service.grpc_address)
    answers = [caller.send("toy_sample", **seeds(3, 4, 5)) for _ in range(40)]

    assert len(own_stubs()) == before + 2
    assert len({tuple(answer.result().raw_output_contents) for answer in answers}) == 1


def test_a_model_without_a_batch_axis_is_served(tmp_path, write_toy, serve, connect):
    def unbatched(config):
        config.max_batch_size = 0
        config.ClearField("dynamic_batching")
        for tensor in [*config.input, *config.output]:
            tensor.dims.insert(0, -1)

    service = serve(write_toy(tmp_path, operations=["decode"], change=unbatched))
    caller = connect(service.grpc_address)

    assert caller.infer("toy_decode", latent=np.ones((3, 4), np.float32))["mean"].shape == (3, 1, 2, 2)
    status, message = caller.refusal("toy_decode", latent=np.full((2, 4), np.nan, np.float32))
    assert status == INVALID
    assert "at position [0, 0]" in message


def test_the_cpp_backends_settings_are_read(tmp_path, write_toy, serve, connect):
    settings = {
        "intra_op_thread_count": "2",
        "inter_op_thread_count": "2",
        "execution_mode": "1",
        "enable_mem_arena": "0",
        "enable_mem_pattern": "false",
        "session.set_denormal_as_zero": "1",
    }

    def change(config):
        config.optimization.graph.level = -1
        for name, value in settings.items():
            config.parameters[name].string_value = value

    service = serve(write_toy(tmp_path, operations=["decode"], change=change))

    assert connect(service.grpc_address).infer("toy_decode", latent=LATENT)["mean"].shape == (1, 1, 2, 2)


def set_parameter(name: str, value: str):
    return lambda config: setattr(config.parameters[name], "string_value", value)


def add_accelerator(config) -> None:
    config.optimization.execution_accelerators.cpu_execution_accelerator.add(name="abacus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_parameter("intra_op_thread_count", "many"), "intra_op_thread_count is 'many'.*whole number"),
        (set_parameter("execution_mode", "2"), "execution_mode is 2.*0 or 1"),
        (set_parameter("enable_mem_arena", "maybe"), "enable_mem_arena is 'maybe'.*true or false"),
        (lambda config: setattr(config.optimization.graph, "level", 7), "optimization.graph.level is 7"),
        (add_accelerator, "accelerator 'abacus'"),
        (lambda config: setattr(config.output[1], "name", "spread"), r"the graph's outputs are .*'spread'"),
        (lambda config: setattr(config.input[0], "name", "code"), r"the graph's inputs are .*'code'"),
        (lambda config: setattr(config.output[0], "data_type", 12), "output mean is .*float.*tensor.double"),
        (lambda config: config.output[1].dims.append(2), "output variance has shape .*'batch', 1, 1, 1, 2"),
    ],
    ids=[
        "threads",
        "mode",
        "arena",
        "level",
        "accelerator",
        "output name",
        "input name",
        "output dtype",
        "output rank",
    ],
)
def test_a_config_that_the_graph_does_not_keep_is_refused_at_load(tmp_path, write_toy, change, message):
    write_toy(tmp_path, operations=["decode"], change=change)

    with pytest.raises(ServingError, match=rf"toy_decode/1/model\.onnx: .*{message}"):
        Service(tmp_path, grpc_port=0, metrics_port=0).start()


def test_an_output_that_breaks_the_configs_promise_is_no_success(tmp_path, write_toy):
    def taller(config):
        config.output[0].dims[1] = 3

    write_toy(tmp_path, operations=["decode"], change=taller, free_outputs=True)
    message = r"output mean: shape is \[1, 1, 2, 2\], config\.pbtxt promises \[1, 1, 3, 2\]"

    with pytest.raises(ServingError, match=f"toy_decode does not answer: INTERNAL: .*{message}"):
        Service(tmp_path, grpc_port=0, metrics_port=0).start()


def test_a_corrupt_graph_is_named(tmp_path, write_toy):
    write_toy(tmp_path)
    (tmp_path / "toy_sample" / "1" / "model.onnx").write_bytes(b"no graph at all")

    with pytest.raises(ServingError, match=r"toy_sample/1/model\.onnx: ONNX Runtime cannot load it.*export the model"):
        Service(tmp_path, grpc_port=0, metrics_port=0).start()


def test_the_backend_needs_no_package_of_covae():
    from covae_serving.installation import OWN_BACKEND

    assert not re.search(r"(import|from) covae", Path(OWN_BACKEND).read_text())
