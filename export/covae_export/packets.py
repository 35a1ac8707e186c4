"""Whole SIMD packets for every row: an image's bytes must not depend on where in a batch it stands.

ONNX Runtime's CPU provider computes Log, Cos and their like a packet of elements at a time, and what is left over one
by one with another routine, whose last digit differs. A row of 25 logarithms is thus cut into packets differently in a
batch of 1 and of 17. Rows padded to whole packets never leave anything over.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

# Operators with two routines; arithmetic and Sqrt round correctly in either.
SPLIT_OPERATORS = ("Cos", "Elu", "Exp", "Log", "Sigmoid", "Sin", "Softplus", "Tanh")
# float32 elements in the widest registers, AVX-512's.
PACKET = 16


def fill_packets(model: ir.Model) -> None:
    """Pad the rows of every such operator's input to whole packets, and cut its output back.

    An input whose only symbolic axis is the first, the batch, is padded; one without a batch needs no padding.
    """
    inferred = ShapeInferencePass()(model.clone()).model
    values = {value.name: value for node in inferred.graph for value in node.inputs if value is not None}
    for node in list(model.graph):
        if node.op_type in SPLIT_OPERATORS and node.inputs[0] is not None:
            _fill(model.graph, node, values[node.inputs[0].name])


def _fill(graph: ir.Graph, node: ir.Node, known: ir.Value) -> None:
    """Pad one node's input; `known` is that input with its shape and dtype."""
    if known.dtype is None or not known.shape or not known.shape.is_dynamic(0):
        return
    row = [size for size in known.shape.dims[1:] if isinstance(size, int)]
    width = prod(row)
    if len(row) + 1 < len(known.shape) or width % PACKET == 0:
        return
    value, result = node.inputs[0], node.outputs[0]
    assert value is not None
    flat = _insert(graph, node, "Reshape", [value], _ints(-1, width))
    filled = _insert(graph, node, "Pad", [flat], _ints(0, 0, 0, -width % PACKET), np.ones((), known.dtype.numpy()))
    whole = _insert(graph, node, node.op_type, [filled])
    cut = _insert(graph, node, "Slice", [whole], _ints(0), _ints(width), _ints(1))
    rows = _insert(graph, node, "Reshape", [cut], _ints(-1, *row))
    rows.name, rows.shape, rows.type = result.name, result.shape, result.type
    ir.convenience.replace_all_uses_with(result, rows, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _ints(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _insert(
    graph: ir.Graph, before: ir.Node, operator: str, inputs: list[ir.Value], *constants: NDArray[np.generic]
) -> ir.Value:
    """What `operator` makes of inputs and constants, computed by nodes put in before another."""
    for constant in constants:
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(constant))])
        graph.insert_before(before, node)
        inputs = [*inputs, node.outputs[0]]
    node = ir.Node("", operator, inputs)
    graph.insert_before(before, node)
    return node.outputs[0]
