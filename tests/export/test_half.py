"""Feature maps in float16: near float32's answers, stated in the configuration, and nothing else changed."""

import json

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2

from covae_client import Client
from covae_core.contract import HALF_ERRORS, served_name
from covae_core.noise import row_seeds
from covae_core.operations import OPERATIONS
from covae_export.errors import ExportError
from covae_export.exporting import export_run
from covae_export.graphs import build_graph, build_reference, describe
from covae_export.half import HalfLayers, with_half_features
from covae_serving.service import Service
from covae_train.families import build_model, families, make_config
from covae_train.run import load_run
from tests.export.conftest import FAMILIES, SCORE_SAMPLES


@pytest.mark.parametrize("family", families())
def test_networks_have_float16_inside_and_the_rest_float32(family):
    model = build_model(make_config(family=family, data="none", image_shape=(16, 16, 1))).eval()
    half = with_half_features(model)
    layers = [module for module in half.modules() if isinstance(module, HalfLayers)]
    assert bool(layers) == any(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    inside = {id(value) for module in layers for value in module.parameters()}
    assert {value.dtype for value in half.parameters() if id(value) in inside} <= {torch.float16}
    assert {value.dtype for value in half.parameters() if id(value) not in inside} <= {torch.float32}
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
    operations = ["sample", "score"]
    return export_run(runs["sos-vae"], root, "toy", operations=operations, score_samples=2, precision="float16")


def parameters(exported, operation):
    text = (exported.repository / served_name("toy", operation) / "config.pbtxt").read_text()
    found = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
    return {name: value.string_value for name, value in found.items()}


def test_the_configuration_states_the_errors(exported):
    measured = {item.output: item.error for item in exported.disagreements if item.operation.name == "sample"}
    assert json.loads(parameters(exported, "sample")[HALF_ERRORS]) == measured


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
    served = Service(exported.repository, ["toy"], ["sample"], grpc_port=0)
    with served as service, Client(service.grpc_address) as client:
        images = client.model("toy").sample(5)
    spec, seeds = describe(runs["sos-vae"], 1, 1), torch.from_numpy(row_seeds(0, np.arange(5)))[:, None]
    expected = build_reference(OPERATIONS["sample"], runs["sos-vae"].model, spec)(seeds, seeds)[0].numpy()
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 2


def test_what_float16_cannot_hold_is_refused(run_folders, tmp_path):
    run = load_run(run_folders["beta-vae"])
    run.model.decoder.features[0].bias.data += 1e6
    with pytest.raises(ExportError, match=r"decode\.mean: nan, allowed 0\.05.*; try --precision float32"):
        export_run(run, tmp_path, "toy", operations=["decode"], precision="float16")
    assert not list(tmp_path.glob("toy*"))
