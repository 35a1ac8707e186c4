"""Rows padded to whole SIMD packets: their bytes do not depend on the batch, and their values do not change."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from covae_export.packets import LOWERED, PACKET, SPLIT_OPERATORS, fill_packets

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


def runner(proto, threads=1):
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["y"], {"x": x})[0]


def batch(rows, row, dtype, operator=""):
    values = (np.random.default_rng(0).random((rows, *row)) * 6 + 1e-3).astype(dtype)
    return -values if operator == "Elu" else values  # above 0 it does nothing


CASES = [(operator, dtype) for operator in sorted({*SPLIT_OPERATORS, *LOWERED}) for dtype in DTYPES]
# ONNX Runtime itself has no float64 Elu and Softplus.
BOTH = [case for case in CASES if case not in (("Elu", TensorProto.DOUBLE), ("Softplus", TensorProto.DOUBLE))]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("row", [(1,), (5,), (3, 7), (25, 1), (1, 9, 13), (784,)], ids=str)
@pytest.mark.parametrize(("operator", "dtype"), CASES)
def test_a_rows_bytes_are_the_same_in_every_batch_and_thread(operator, dtype, row, threads):
    run = runner(filled(build(operator, dtype, row)), threads)
    x = batch(64, row, DTYPES[dtype], operator)
    whole = run(x)
    for rows in (1, 2, 3, 16, 33):
        assert run(x[:rows]).tobytes() == whole[:rows].tobytes()
        assert run(x[-rows:]).tobytes() == whole[-rows:].tobytes()


@pytest.mark.parametrize(("operator", "dtype"), BOTH)
def test_values_and_shapes_stay(operator, dtype):
    before, after = build(operator, dtype, (5, 3)), filled(build(operator, dtype, (5, 3)))
    x = batch(4, (5, 3), DTYPES[dtype], operator)
    np.testing.assert_allclose(runner(after)(x), runner(before)(x), rtol=1e-6)
    assert after.graph.output[0] == before.graph.output[0]


@pytest.mark.parametrize("row", [(PACKET,), (4, 2 * PACKET)], ids=str)
def test_rows_of_whole_packets_are_left_alone(row):
    assert [node.op_type for node in filled(build("Exp", TensorProto.FLOAT, row)).graph.node] == ["Exp"]


def test_what_has_no_batch_is_left_alone():
    assert [node.op_type for node in filled(build("Exp", TensorProto.FLOAT, (5,), batch=3)).graph.node] == ["Exp"]


@pytest.mark.parametrize("operator", LOWERED)
def test_without_it_a_rows_bytes_depend_on_the_threads(operator):
    """Or there would be nothing to do."""
    dtype = TensorProto.DOUBLE if operator == "Exp" else TensorProto.FLOAT
    run, x = runner(build(operator, dtype, (784,)), 3), batch(64, (784,), DTYPES[dtype], operator)
    assert any(run(x[:rows]).tobytes() != run(x)[:rows].tobytes() for rows in (1, 2, 3, 5, 17, 33))


def test_softplus_keeps_its_digits_where_it_is_next_to_nothing():
    """A variance is one: of −15 it is 3.06e-7, which 1 + e rounds to 2.4e-7 or 3.6e-7."""
    x = np.linspace(-80, 20, 10_001, dtype=np.float32)[None]
    found = runner(filled(build("Softplus", TensorProto.FLOAT, (10_001,))))(x)
    np.testing.assert_allclose(found, np.logaddexp(0, x.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("operator", ["Elu", "Log", "Softplus"])
def test_float16_is_as_near_as_it_can_be(operator):
    proto = filled(build(operator, TensorProto.FLOAT16, (40,)))
    x = batch(3, (40,), np.float16, operator)
    exact = {"Elu": np.expm1, "Log": np.log, "Softplus": lambda x: np.logaddexp(0, x)}[operator](x.astype(np.float64))
    np.testing.assert_allclose(runner(proto)(x).astype(np.float64), exact, rtol=1e-3, atol=1e-6)


SUMS = [
    ((9,), [1]),
    ((12,), [1]),
    ((12288,), [1]),
    ((3, 3), [1, 2]),
    ((72, 3), [-1]),
    ((25, 64), [1]),
    ((5, 7, 3), [1, 3]),
    ((25, 65), [1, 2]),
]


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
    run, x = runner(filled(before)), np.random.default_rng(0).standard_normal((65, *row)).astype(DTYPES[dtype])
    whole = run(x)
    np.testing.assert_allclose(whole, runner(before)(x), rtol=1e-5, atol=1e-5)
    assert whole.shape == runner(before)(x).shape
    for rows in (1, 2, 3, 16):
        assert run(x[:rows]).tobytes() == whole[:rows].tobytes()
        assert run(x[-rows:]).tobytes() == whole[-rows:].tobytes()


@pytest.mark.parametrize("row", [(9,), (25, 64)], ids=str)
def test_without_it_a_rows_sum_depends_on_the_batch(row):
    """Or there would be nothing to do."""
    run, x = runner(total(TensorProto.FLOAT, row, [1], 0)), np.random.default_rng(0).standard_normal((65, *row))
    whole = run(x.astype(np.float32))
    assert any(run(x[i : i + 1].astype(np.float32)).tobytes() != whole[i : i + 1].tobytes() for i in range(65))


def test_sums_of_whole_packets_are_left_alone():
    for row in ((2, PACKET), (12,)):
        proto = filled(total(TensorProto.FLOAT, row, [len(row)], 0))
        assert [node.op_type for node in proto.graph.node] == ["ReduceSum"]


def test_a_sum_in_a_loops_body_is_the_same_in_every_batch():
    """A Scan over three steps, whose state gets a row's sum of nine numbers, in a graph that has a name of what is put
    into the body."""
    axes, value = helper.make_tensor("axes", TensorProto.INT64, [1], [1]), helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["item", "axes"], ["sum"], keepdims=1),
            helper.make_node("Add", ["state", "sum"], ["next"]),
            helper.make_node("Identity", ["next"], ["seen"]),
        ],
        "body",
        [value("state", TensorProto.FLOAT, ["batch", 1]), value("item", TensorProto.FLOAT, ["batch", 9])],
        [value("next", TensorProto.FLOAT, ["batch", 1]), value("seen", TensorProto.FLOAT, ["batch", 1])],
        [axes],
    )
    scan = helper.make_node("Scan", ["val_0", "x"], ["last", "y"], body=body, num_scan_inputs=1)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["zeros"], ["val_0"], to=TensorProto.FLOAT), scan],
        "graph",
        [value("x", TensorProto.FLOAT, [3, "batch", 9]), value("zeros", TensorProto.FLOAT, ["batch", 1])],
        [value("y", TensorProto.FLOAT, [3, "batch", 1])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(0).standard_normal((3, 65, 9)).astype(np.float32)

    def differs(made):
        onnx.checker.check_model(made, full_check=True)
        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])

        def run(part):
            return session.run(["y"], {"x": part, "zeros": np.zeros((part.shape[1], 1), np.float32)})[0]

        whole = run(x)
        return any(run(x[:, i : i + 1]).tobytes() != whole[:, i : i + 1].tobytes() for i in range(65))

    assert differs(proto)
    assert not differs(filled(proto))
