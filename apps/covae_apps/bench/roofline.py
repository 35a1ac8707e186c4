"""How near a graph is to what the machine can do: its convolutions' rate beside that of one large matrix product."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from covae_apps.bench.sessions import Feeds, session_of
from covae_apps.bench.stopwatch import case, interleaved
from covae_core.errors import InvalidArgument

# Side of the matrices: 16 MB each, beyond what a core's caches hold.
SIDE = 2048


def convolutions(path: Path) -> float:
    """Floating-point operations of a graph's convolutions, of one row: two for each product that is added up.

    Transposed ones are not counted; no graph of the residual networks has any.

    Raises:
        InvalidArgument: a convolution's weight is no constant, or its output's size is not known.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            sizes = [size.dim_value for size in shapes.get(node.output[0], ())[2:]]
            if node.input[1] not in weights or not sizes or 0 in sizes:
                raise InvalidArgument(f"{path}: the convolution {node.name!r} has no constant weight or no known size")
            total += prod(weights[node.input[1]]) * prod(sizes)
    return 2.0 * total


def rates(graph: Path, feeds: Feeds, threads: int, repeats: int, place: Path) -> tuple[float, float]:
    """Operations a second of a graph's convolutions with these rows, all the rest of it counted as their time, and of
    ONNX Runtime's product of two SIDE × SIDE matrices; medians, alternated. place: a folder to write to."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in ("a", "b", "product")]
    product = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["product"])], "product", values[:2], values[2:]
    )
    path = place / "product.onnx"
    onnx.save(helper.make_model(product, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    ours, one = session_of(graph, threads), session_of(path, threads)
    seconds = interleaved(
        [
            case("graph", lambda: ours.run(None, feeds)),
            case("product", lambda: one.run(None, {"a": matrix, "b": matrix})),
        ],
        repeats,
    )
    rows = len(next(iter(feeds.values())))
    of_graph, of_product = (float(np.median(seconds[name])) for name in ("graph", "product"))
    return rows * convolutions(graph) / of_graph, 2.0 * SIDE**3 / of_product
