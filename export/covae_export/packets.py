"""Whole SIMD packets for every row: an image's bytes must not depend on where in a batch it stands.

ONNX Runtime's CPU provider computes Log, Cos and their like a packet of elements at a time, and what is left over one
by one with another routine, whose last digit differs. A row of 25 logarithms is thus cut into packets differently in a
batch of 1 and of 17. Rows padded to whole packets never leave anything over.

A sum begins where memory is aligned, so that of three numbers is (a + b) + c in one row and a + (b + c) in the next;
and over an axis in the middle it adds in another order where the batch is one row. So sums are over the last axis,
padded with zeros.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

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
        elif node.op_type == "ReduceSum" and node.inputs[0] is not None:
            _fill_sum(model.graph, node, values[node.inputs[0].name])
    RemoveUnusedNodesPass()(model)  # the axes of sums that have others now


def _fill_sum(graph: ir.Graph, node: ir.Node, known: ir.Value) -> None:
    """Sum over the last axis, of whole packets; `known` is the input with its shape and dtype."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = ir.convenience.get_const_tensor(given) if given is not None else None
    if known.dtype is None or not known.shape or axes is None:
        return
    rank = len(known.shape)
    summed = sorted(int(axis) % rank for axis in axes.numpy())
    kept = [axis for axis in range(rank) if axis not in summed]
    sizes = [size for size in (known.shape[axis] for axis in summed) if isinstance(size, int)]
    last, width = summed == [*range(len(kept), rank)], prod(sizes)
    if all(isinstance(size, int) for size in known.shape) or len(sizes) < len(summed):
        return
    if last and width % PACKET == 0:
        return
    value, result = node.inputs[0], node.outputs[0]
    assert value is not None
    if not last:
        value = _insert(graph, node, "Transpose", [value], perm=[*kept, *summed])
    if len(summed) > 1:
        value = _insert(graph, node, "Reshape", [value], _ints(*[0] * len(kept), width))
    ends = _ints(*[0] * (2 * len(kept) + 1), -width % PACKET)
    value = _insert(graph, node, "Pad", [value], ends, np.zeros((), known.dtype.numpy()))
    value = _insert(graph, node, "ReduceSum", [value], _ints(len(kept)), keepdims=0)
    if node.attributes.get_int("keepdims", 1):
        value = _insert(graph, node, "Unsqueeze", [value], _ints(*summed))
    _take_place(graph, node, result, value)


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
    _take_place(graph, node, result, rows)


def _take_place(graph: ir.Graph, node: ir.Node, result: ir.Value, value: ir.Value) -> None:
    """Have a value in place of a node's result, and the node removed."""
    value.name, value.shape, value.type = result.name, result.shape, result.type
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _ints(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: list[ir.Value],
    *constants: NDArray[np.generic],
    **attributes: int | list[int],
) -> ir.Value:
    """What `operator` makes of inputs and constants, computed by nodes put in before another."""
    for constant in constants:
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(constant))])
        graph.insert_before(before, node)
        inputs = [*inputs, node.outputs[0]]
    node = ir.Node("", operator, inputs, ir.convenience.convert_attributes(attributes))
    graph.insert_before(before, node)
    return node.outputs[0]
