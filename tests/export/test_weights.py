"""Weights apart from their graphs: each once, in files that several operations hold, and the same answers."""

import hashlib
import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from covae_export.weights import ALIGNMENT, LEAST_BYTES, digests, share_weights

RANDOM = np.random.default_rng(0)
BOTH = RANDOM.normal(size=(16, 40)).astype(np.float32)
OWN = RANDOM.normal(size=(40, 7)).astype(np.float32)
SMALL = RANDOM.normal(size=7).astype(np.float32)


def write_graph(folder, weights, inputs=16):
    """A graph that multiplies its input by each matrix in turn and adds the vectors."""
    folder.mkdir()
    nodes, last = [], "x"
    for name, value in weights.items():
        nodes.append(helper.make_node("MatMul" if value.ndim == 2 else "Add", [last, name], [f"after_{name}"]))
        last = f"after_{name}"
    graph = helper.make_graph(
        nodes,
        folder.name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["rows", None])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "model.onnx"
    )
    return folder


def answer(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 16)})[0]


@pytest.fixture
def folders(tmp_path):
    return [
        write_graph(tmp_path / "sample", {"both": BOTH, "own": OWN, "small": SMALL}),
        write_graph(tmp_path / "decode", {"the_same": BOTH.copy()}),
        write_graph(tmp_path / "small", {"vector": SMALL[:1]}),
    ]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_equal_weights_are_stored_once_and_every_graph_answers_as_before(folders):
    before, small = [answer(folder) for folder in folders], (folders[2] / "model.onnx").read_bytes()
    share_weights(folders)
    for folder, expected in zip(folders, before, strict=True):
        np.testing.assert_array_equal(answer(folder), expected)
    # A file for what two graphs use and one for what the first alone does; nobody holds what it does not use.
    assert names(folders[0]) == ["model.onnx", "weights-000.bin", "weights-001.bin"]
    assert names(folders[1]) == ["model.onnx", "weights-000.bin"]
    assert os.path.samefile(folders[0] / "weights-000.bin", folders[1] / "weights-000.bin")
    assert (folders[0] / "weights-000.bin").read_bytes() == BOTH.tobytes()
    assert (folders[0] / "weights-001.bin").read_bytes() == OWN.tobytes()
    assert names(folders[2]) == ["model.onnx"]
    assert (folders[2] / "model.onnx").read_bytes() == small
    model = onnx.load(folders[0] / "model.onnx", load_external_data=False)
    inside = {tensor.name: tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer}
    assert inside == {"both": False, "own": False, "small": True}


def test_each_weight_begins_on_a_line_of_the_cache(tmp_path):
    wide, odd = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((16, 301), 301))
    assert odd.nbytes > LEAST_BYTES
    assert odd.nbytes % ALIGNMENT
    folder = write_graph(tmp_path / "odd", {"wide": wide, "first": odd, "second": np.ones(301, np.float32)})
    before = answer(folder)
    share_weights([folder])
    np.testing.assert_array_equal(answer(folder), before)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    offsets = [int(entry.value) for t in model.graph.initializer for entry in t.external_data if entry.key == "offset"]
    assert offsets == [0, wide.nbytes, wide.nbytes + ALIGNMENT * (1 + odd.nbytes // ALIGNMENT)]


def test_equal_bytes_of_another_shape_or_type_are_stored_once_and_keep_their_shape_and_type(tmp_path):
    zeros = np.zeros((16, 32), np.float32)
    folder = write_graph(tmp_path / "zeros", {"floats": zeros})
    model = onnx.load(folder / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(zeros.astype(np.int32), "integers"))
    model.graph.initializer.append(numpy_helper.from_array(zeros.reshape(32, 16), "turned"))
    onnx.save(model, folder / "model.onnx")
    share_weights([folder])
    loaded = onnx.load(folder / "model.onnx")
    found = [numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer]
    assert [(item.dtype, item.shape) for item in found] == [
        (np.float32, (16, 32)), (np.int32, (16, 32)), (np.float32, (32, 16))
    ]  # fmt: skip
    assert (folder / "weights-000.bin").stat().st_size == zeros.nbytes


def test_a_file_system_without_hard_links_gets_copies(folders, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    before = [answer(folder) for folder in folders]
    monkeypatch.setattr(os, "link", refuse)
    share_weights(folders)
    files = [folder / "weights-000.bin" for folder in folders[:2]]
    assert not os.path.samefile(*files)
    assert files[0].read_bytes() == files[1].read_bytes()
    for folder, expected in zip(folders, before, strict=True):
        np.testing.assert_array_equal(answer(folder), expected)


def test_each_file_has_its_digest(folders):
    share_weights(folders)
    files = [folders[0] / name for name in ("model.onnx", "weights-000.bin", "weights-001.bin")]
    wanted = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert digests(folders[0]) == wanted
    assert digests(folders[1])["weights-000.bin"] == wanted["weights-000.bin"]
    assert list(digests(folders[2])) == ["model.onnx"]
