"""Rows padded to whole SIMD packets: their bytes do not depend on the batch, and their values do not change."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from covae_export.packets import PACKET, SPLIT_OPERATORS, fill_packets

DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64}


def build(operator, dtype, row, batch="batch"):
    shape = [batch, *row]
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y")]
    node = helper.make_node(operator, ["x"], ["y"])
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def filled(proto):
    model = onnx_ir.from_proto(proto)
    fill_packets(model)
    return onnx_ir.to_proto(model)


def runner(proto):
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["y"], {"x": x})[0]


def batch(rows, row, dtype, operator=""):
    values = (np.random.default_rng(0).random((rows, *row)) * 6 + 1e-3).astype(dtype)
    return -values if operator == "Elu" else values  # above 0 it does nothing


# ONNX Runtime has no float64 Elu.
CASES = [(operator, dtype) for operator in SPLIT_OPERATORS for dtype in DTYPES if (operator, dtype) != ("Elu", 11)]
CASES.remove(("Softplus", TensorProto.DOUBLE))  # ONNX Runtime has none


@pytest.mark.parametrize("row", [(1,), (5,), (3, 7), (25, 1), (1, 9, 13)], ids=str)
@pytest.mark.parametrize(("operator", "dtype"), CASES)
def test_a_rows_bytes_are_the_same_in_every_batch(operator, dtype, row):
    run = runner(filled(build(operator, dtype, row)))
    x = batch(17, row, DTYPES[dtype], operator)
    whole = run(x)
    for rows in (1, 2, 3, 16):
        assert run(x[:rows]).tobytes() == whole[:rows].tobytes()
        assert run(x[-rows:]).tobytes() == whole[-rows:].tobytes()


@pytest.mark.parametrize(("operator", "dtype"), CASES)
def test_values_and_shapes_stay(operator, dtype):
    before, after = build(operator, dtype, (5, 3)), filled(build(operator, dtype, (5, 3)))
    x = batch(4, (5, 3), DTYPES[dtype], operator)
    np.testing.assert_allclose(runner(after)(x), runner(before)(x), rtol=1e-6)
    assert after.graph.output[0] == before.graph.output[0]


@pytest.mark.parametrize("row", [(PACKET,), (4, 2 * PACKET)], ids=str)
def test_rows_of_whole_packets_are_left_alone(row):
    assert [node.op_type for node in filled(build("Log", TensorProto.FLOAT, row)).graph.node] == ["Log"]


def test_what_has_no_batch_is_left_alone():
    assert [node.op_type for node in filled(build("Log", TensorProto.FLOAT, (5,), batch=3)).graph.node] == ["Log"]


SUMS = [((9,), [1]), ((3, 3), [1, 2]), ((72, 3), [-1]), ((25, 64), [1]), ((5, 7, 3), [1, 3]), ((25, 64), [1, 2])]


def total(dtype, row, axes, keep):
    x = helper.make_tensor_value_info("x", dtype, ["batch", *row])
    given = helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)
    gone = {axis % (1 + len(row)) for axis in axes}
    sizes = [1 if axis in gone else size for axis, size in enumerate(["batch", *row]) if keep or axis not in gone]
    y = helper.make_tensor_value_info("y", dtype, sizes)
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=keep)
    graph = helper.make_graph([node], "graph", [x], [y], [given])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("row", "axes"), SUMS, ids=str)
def test_a_rows_sum_is_the_same_in_every_batch(row, axes, dtype, keep):
    before = total(dtype, row, axes, keep)
    run, x = runner(filled(before)), np.random.default_rng(0).standard_normal((17, *row)).astype(DTYPES[dtype])
    whole = run(x)
    np.testing.assert_allclose(whole, runner(before)(x), rtol=1e-5, atol=1e-5)
    assert whole.shape == runner(before)(x).shape
    for rows in (1, 2, 3, 16):
        assert run(x[:rows]).tobytes() == whole[:rows].tobytes()
        assert run(x[-rows:]).tobytes() == whole[-rows:].tobytes()


def test_sums_of_whole_packets_are_left_alone():
    assert [node.op_type for node in filled(total(TensorProto.FLOAT, (2, PACKET), [2], 0)).graph.node] == ["ReduceSum"]
