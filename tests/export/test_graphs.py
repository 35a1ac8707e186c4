"""Every exported graph: the contract's tensors, operators that CUDA has, torch's answers, and bytes that stay."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from covae_core import images as client_images
from covae_core.contract import NUMPY_DTYPES, served_name
from covae_core.importance import importance_weights
from covae_core.noise import Stream
from covae_core.operations import OPERATIONS, to_uint8, to_unit
from covae_core.release import weights_files
from covae_export.conversion import convert, example_inputs
from covae_export.graphs import build_graph, build_reference, describe
from covae_train.families import build_model, make_config
from covae_train.run import TrainedRun
from covae_train.torch_backend import standard_normal

from .conftest import EVERY, SCORE_SAMPLES

FAMILIES = ["sos-vae", "beta-vae"]
ELEMENT_TYPES = {
    "BOOL": onnx.TensorProto.BOOL,
    "UINT8": onnx.TensorProto.UINT8,
    "INT64": onnx.TensorProto.INT64,
    "FP32": onnx.TensorProto.FLOAT,
    "FP64": onnx.TensorProto.DOUBLE,
}
# With kernels for the types used here in ONNX Runtime's CUDA provider (its docs/OperatorKernels.md), or inlined.
CUDA_OPERATORS = {
    "Abs", "Add", "BatchNormalization", "Cast", "CastLike", "Concat", "Constant", "Conv", "ConvTranspose",
    "Cos", "Div", "Equal", "Exp", "Expand", "Gather", "Greater", "Identity", "MatMul", "Max", "Min",
    "Mod", "Mul", "Neg", "Pad", "Pow", "Range", "Reciprocal", "ReduceLogSum", "ReduceMax", "ReduceSum",
    "Relu", "Reshape", "Resize", "Round", "Shape",
    "Sin", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def session(path, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feed(spec, operation, rows, seed=0):
    tensors = example_inputs(spec, OPERATIONS[operation], rows, seed)
    return {
        tensor.name: value.numpy() for tensor, value in zip(OPERATIONS[operation].inputs(spec), tensors, strict=True)
    }


def check_graph(path, spec, operation):
    model = onnx.load(path, load_external_data=False)
    with tempfile.TemporaryDirectory() as copied:  # onnx refuses weights with several names
        shutil.copytree(Path(path).parent, copied, dirs_exist_ok=True)
        onnx.checker.check_model(f"{copied}/{Path(path).name}", full_check=True)
    apart = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    named = {Path(path).with_name(entry.value) for entry in apart if entry.key == "location"}
    assert named == set(weights_files(Path(path).parent))
    # torch notes the lines of source behind each node, with the folders of whoever exported.
    assert not any(text in Path(path).read_bytes() for text in (b"stack_trace", b"class_hierarchy", bytes(Path.cwd())))
    for tensors, values in (
        (OPERATIONS[operation].inputs(spec), model.graph.input),
        (OPERATIONS[operation].outputs(spec), model.graph.output),
    ):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            axes = value.type.tensor_type.shape.dim
            assert value.type.tensor_type.elem_type == ELEMENT_TYPES[tensor.dtype]
            assert axes[0].dim_param
            assert not axes[0].HasField("dim_value")
            assert tuple(axis.dim_value for axis in axes[1:]) == tensor.shape
    operators = {node.op_type for node in model.graph.node}
    assert all(node.domain == "" for node in model.graph.node)
    assert not [name for name in operators if name.startswith(("Random", "Bernoulli", "Multinomial", "Dropout"))]
    assert operators <= CUDA_OPERATORS


def check_answers(path, model, spec, operation):
    """torch's answers for batches of 1 to 17; of a row the same bytes in all of them, in any order, by any threads."""
    running = session(path)
    whole = feed(spec, operation, 17, seed=5)
    found = running.run(None, whole)
    reference = build_reference(OPERATIONS[operation], model, spec)
    with torch.no_grad():
        expected = [value.numpy() for value in reference(*(torch.from_numpy(value) for value in whole.values()))]
    tolerances = {"FP32": {"rtol": 1e-4, "atol": 1e-4}, "UINT8": {"atol": 1}, "FP64": {"atol": 0.05}}
    for tensor, value, wanted in zip(OPERATIONS[operation].outputs(spec), found, expected, strict=True):
        assert value.dtype == NUMPY_DTYPES[tensor.dtype]
        assert value.shape == (17, *tensor.shape)
        np.testing.assert_allclose(value.astype(float), wanted.astype(float), **tolerances[tensor.dtype])
    orders = [[row] for row in range(17)] + [[0, 1], [14, 15, 16], [9, 3, 11], list(range(16, -1, -1)), [4] * 5]
    for rows in orders:
        again = running.run(None, {name: value[rows] for name, value in whole.items()})
        for value, all_rows in zip(again, found, strict=True):
            assert value.tobytes() == all_rows[rows].tobytes(), rows
    for threads in (1, 3):
        again = session(path, threads)
        for value, other in zip(again.run(None, whole), found, strict=True):
            assert value.tobytes() == other.tobytes(), threads
        few = again.run(None, {name: value[:5] for name, value in whole.items()})
        for value, other in zip(few, found, strict=True):
            assert value.tobytes() == other[:5].tobytes(), threads
    return whole, found


def test_pixels_become_numbers_and_bytes_as_the_clients_do():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    torch.testing.assert_close(to_uint8(to_unit(pixels, torch.float32)), pixels, rtol=0, atol=0)
    values = torch.cat([torch.linspace(-0.5, 1.5, 4001), torch.tensor([0.5, 1.5, 2.5, 254.5]) / 255])
    found = to_uint8(values.reshape(1, 1, 1, -1)).flatten().numpy()
    np.testing.assert_array_equal(found, client_images.to_uint8(values.numpy()))


RESTARTED = """
import hashlib, json, sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = dict(np.load(sys.argv[2]))
print(json.dumps([hashlib.sha256(value.tobytes()).hexdigest() for value in session.run(None, feed)]))
"""


def check_restart(path, whole, found, folder):
    """A new process gives the same bytes. As many threads, too: they cut the float64 sums of a score differently."""
    np.savez(folder / "feed.npz", **whole)
    command = [sys.executable, "-c", RESTARTED, str(path), str(folder / "feed.npz")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(result.stdout) == [hashlib.sha256(value.tobytes()).hexdigest() for value in found]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sample_keeps_to_the_contract_and_to_torch(family, runs, tmp_path):
    model, spec, path = runs[family].model, describe(runs[family], SCORE_SAMPLES, 3), tmp_path / "sample.onnx"
    convert(build_graph(OPERATIONS["sample"], model, spec), path)
    check_graph(path, spec, "sample")
    whole, found = check_answers(path, model, spec, "sample")
    check_restart(path, whole, found, tmp_path)
    images, latents = found
    assert len(np.unique(images.reshape(17, -1), axis=0)) == 17
    seeds = torch.from_numpy(whole["latent_seed"][:, 0])
    np.testing.assert_allclose(latents, standard_normal(seeds, 5, Stream.LATENT).numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9, 13, 3), (11, 8, 1)], ids=str)
def test_rows_of_any_length_keep_their_bytes_in_any_batch(shape, tmp_path):
    torch.manual_seed(0)
    config = make_config(family="beta-vae", data="x", image_shape=shape, widths=(4, 6, 8), latent_size=7)
    model = build_model(config).eval()
    torch.nn.init.normal_(model.head.variance.weight, std=0.3)
    spec = describe(TrainedRun(Path("run"), config, model, {}, ""), 2, 2)
    for operation in ("decode", "encode"):
        path = tmp_path / f"{operation}.onnx"
        convert(build_graph(OPERATIONS[operation], model, spec), path)
        check_answers(path, model, spec, operation)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", EVERY)
def test_every_graph_keeps_to_the_contract_and_to_torch(operation, family, runs, repository, tmp_path):
    spec = describe(runs[family], SCORE_SAMPLES, 3)
    path = repository / served_name(family, operation) / "1" / "model.onnx"
    check_graph(path, spec, operation)
    whole, found = check_answers(path, runs[family].model, spec, operation)
    check_restart(path, whole, found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_condition_keeps_the_fixed_pixels_and_moves_the_others(family, runs, repository):
    spec = describe(runs[family], SCORE_SAMPLES, 3)
    running = session(repository / served_name(family, "condition") / "1" / "model.onnx")
    given = feed(spec, "condition", 6)
    given["softness"][:] = 0
    for value in running.run(None, given)[:2]:
        np.testing.assert_array_equal(value[given["mask"]], given["pixels"][given["mask"]])
    nothing = {**given, "mask": np.zeros_like(given["mask"])}
    mean, _, distance = running.run(None, nothing)
    np.testing.assert_array_equal(distance, np.zeros((6, 1)))
    with torch.no_grad():
        density = runs[family].model.density({"latent": torch.from_numpy(given["latent"])})
    expected = (density.mean.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(mean, expected, atol=0.51)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["held-out digits", "noise", "black"])
@torch.no_grad()
def test_scores_are_within_a_twentieth_of_a_nat_of_float64(kind, family, runs, repository, digits):
    random = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = {"held-out digits": digits.held_out[:16], "noise": random, "black": torch.zeros_like(random)}[kind]
    seeds = torch.arange(100, 116)
    normals = standard_normal(seeds, SCORE_SAMPLES * 5, Stream.POSTERIOR, torch.float64)
    model = build_model(runs[family].config).double()
    model.load_state_dict(runs[family].model.state_dict())
    noise = {"latent": normals.reshape(16, SCORE_SAMPLES, 5)}
    wanted = importance_weights(model.eval(), images.double() / 255, noise)
    running = session(repository / served_name(family, "score") / "1" / "model.onnx")
    wire = {"image": images.permute(0, 2, 3, 1).contiguous().numpy(), "seed": seeds.reshape(-1, 1).numpy()}
    for found, part in zip(running.run(None, wire), wanted, strict=True):
        assert found.dtype == np.float64
        # Noise is worth some −10⁶ nats under D = 1e-5, so this is twelve digits and more.
        assert np.abs(found - part.numpy()).max() < 0.05
        assert np.isfinite(found).all()
