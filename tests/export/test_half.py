"""Feature maps in float16: near float32's answers, stated in the configuration, and nothing else changed."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2

import covae_serving
from covae_client import Client
from covae_client.errors import InvalidRequest
from covae_core.contract import HALF_ERRORS, served_name
from covae_core.errors import InvalidArgument
from covae_core.noise import row_seeds
from covae_core.operations import OPERATIONS
from covae_export.errors import ExportError
from covae_export.exporting import Deployment, check_precision, export_run
from covae_export.graphs import build_graph, build_reference, describe
from covae_export.half import LARGEST_LATENT, HalfLayers, has_half, with_half_features
from covae_export.verification import BATCHES, verification_inputs
from covae_serving.service import Service
from covae_train.families import build_model, families, make_config
from covae_train.run import load_run
from tests.export.conftest import FAMILIES, SCORE_SAMPLES

CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)


@pytest.mark.parametrize("family", families())
def test_networks_have_float16_inside_and_the_rest_float32(family):
    model = build_model(make_config(family=family, data="none", image_shape=(16, 16, 1))).eval()
    half = with_half_features(model)
    layers = [module for module in half.modules() if isinstance(module, HalfLayers)]
    assert bool(layers) == has_half(half) == any(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    inside = {id(value) for module in layers for value in module.parameters()}
    assert {value.dtype for value in half.parameters() if id(value) in inside} <= {torch.float16}
    assert {value.dtype for value in half.parameters() if id(value) not in inside} <= {torch.float32}
    for network in (half.encoder, half.decoder) if layers else ():
        convolutions = [module for module in network.modules() if isinstance(module, CONVOLUTIONS)]
        assert id(convolutions[-1].weight) not in inside, "the last layer of all"
    assert half.dtype == torch.float32, "noise and densities"
    assert {value.dtype for value in model.parameters()} <= {torch.float32}, "the model itself was changed"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_graphs_latents_are_the_same_and_its_images_near(family, runs):
    spec, seeds = describe(runs[family], SCORE_SAMPLES, 3), (torch.arange(9)[:, None], torch.arange(9)[:, None])
    image, latent = build_graph(OPERATIONS["sample"], runs[family].model, spec, precision="float16")(*seeds)
    wanted, same = build_reference(OPERATIONS["sample"], runs[family].model, spec)(*seeds)
    assert torch.equal(latent, same)
    assert (image.int() - wanted.int()).abs().max() <= 2


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("half")
    operations = ["sample", "score", "decode"]
    return export_run(runs["sos-vae"], root, "toy", operations=operations, score_samples=2, precision="float16")


def parameters(exported, operation):
    text = (exported.repository / served_name("toy", operation) / "config.pbtxt").read_text()
    found = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
    return {name: value.string_value for name, value in found.items()}


def test_the_configuration_states_the_errors(exported):
    measured = {item.output: item.error for item in exported.disagreements if item.operation.name == "sample"}
    assert json.loads(parameters(exported, "sample")[HALF_ERRORS]) == measured


@torch.no_grad()
def test_the_stated_errors_are_at_least_those_of_rounding_after_every_layer(exported, runs):
    """As a GPU does; ONNX Runtime's CPU provider leaves out most casts."""
    spec, operation = describe(runs["sos-vae"], 2, 8), OPERATIONS["decode"]
    inputs = verification_inputs(runs["sos-vae"].model, spec, operation, max(BATCHES))
    found = build_graph(operation, runs["sos-vae"].model, spec, precision="float16")(*inputs)
    wanted = build_reference(operation, runs["sos-vae"].model, spec)(*inputs)
    stated = json.loads(parameters(exported, "decode")[HALF_ERRORS])
    for tensor, value, exact in zip(operation.outputs(spec), found, wanted, strict=True):
        assert stated[tensor.name] >= float((value - exact).abs().max() / exact.abs().max()) * (1 - 1e-6)
    assert stated["mean"] > 1e-6, "nothing was rounded"


def test_exact_operations_stay_exact(exported):
    assert HALF_ERRORS not in parameters(exported, "score")
    kinds = {}
    for operation in ("sample", "score"):
        path = exported.repository / served_name("toy", operation) / "1" / "model.onnx"
        kinds[operation] = {tensor.data_type for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert TensorProto.FLOAT16 in kinds["sample"]
    assert TensorProto.FLOAT16 not in kinds["score"]
    assert all(item.error <= 0.05 for item in exported.disagreements if item.operation.name == "score")


@pytest.mark.slow
@torch.no_grad()
def test_triton_serves_it(exported, runs):
    served = Service(exported.repository, ["toy"], ["sample", "decode"], grpc_port=0)
    with served as service, Client(service.grpc_address) as client:
        model = client.model("toy")
        images, latent = model.sample(5), 0 * model.latents(1)
        assert np.isfinite(model.decode(latent + LARGEST_LATENT).mean).all()
        with pytest.raises(InvalidRequest, match=r"latent: 101\.0 at row 0.*expected numbers up to 100"):
            model.decode(latent + LARGEST_LATENT + 1)
    spec, seeds = describe(runs["sos-vae"], 1, 1), torch.from_numpy(row_seeds(0, np.arange(5)))[:, None]
    expected = build_reference(OPERATIONS["sample"], runs["sos-vae"].model, spec)(seeds, seeds)[0].numpy()
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 2


@pytest.mark.parametrize("place", ["decoder", "encoder"])
def test_what_float16_cannot_hold_is_refused(place, run_folders, tmp_path):
    """Maps of 60,000, which the next layer adds up; no weight by itself is too large."""
    run = load_run(run_folders["beta-vae"])
    norm = next(layer for layer in getattr(run.model, place).modules() if isinstance(layer, torch.nn.BatchNorm2d))
    norm.bias.data += 60_000
    with pytest.raises(ExportError, match=rf"float16, beyond whose 65,504 the {place}'s.*--precision float32"):
        export_run(run, tmp_path, "toy", operations=["decode"], precision="float16")
    assert not list(tmp_path.glob("toy*"))


def test_a_precision_that_is_none_or_has_nothing_to_apply_to_is_refused(runs, tmp_path):
    with pytest.raises(InvalidArgument, match=r"--precision: found 'half'; expected float32 or float16"):
        export_run(runs["sos-vae"], tmp_path, "toy", precision="half")
    plain = build_model(make_config(family="pca", data="none", image_shape=(8, 8, 1))).eval()
    with pytest.raises(InvalidArgument, match=r"--precision: found float16; this model has no feature maps"):
        check_precision(plain, "float16")


def test_the_servers_limit_is_the_one_that_export_tries():
    backend = Path(covae_serving.__file__).with_name("backends") / "onnxruntime" / "model.py"
    assert f"HALF_LARGEST, SOFTNESS = {LARGEST_LATENT}, " in backend.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_scores_for_a_gpu_are_in_float64_throughout(kind, runs, tmp_path):
    """Where TF32 would lose nats that float32 does not."""
    deployment = Deployment(instance_kind=kind)
    export_run(runs["beta-vae"], tmp_path, "toy", operations=["score"], score_samples=2, deployment=deployment)
    graph = onnx.load(tmp_path / served_name("toy", "score") / "1" / "model.onnx", load_external_data=False).graph
    assert any(node.op_type == "Conv" for node in graph.node) == (kind == "cpu"), "there is no float64 convolution"
