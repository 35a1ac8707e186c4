"""Whole SIMD packets for every row: an image's bytes must not depend on where in a batch it stands.

ONNX Runtime's CPU provider computes Exp, Cos and their like a packet of elements at a time, and what is left over one
by one with another routine, whose last digit differs. A row of 25 cosines is thus cut into packets differently in a
batch of 1 and of 17. Rows padded to whole packets never leave anything over.

Log, Softplus, Elu and float64's Exp are cut into packets anew for each thread, wherever that begins: no padding helps
where there is more than one. They are put as what is not: the logarithm as that of a sum of one number, the exponential
as a power of e, which have one routine.

A sum (ReduceSum) begins where memory is aligned, so that of three numbers is (a + b) + c in one row and a + (b + c) in
the next; and over an axis in the middle it adds in another order where the batch is one row. So sums are over the last
axis, padded with zeros to what keeps rows aligned; inside loops too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, ShapeInferencePass

# Operators with two routines; arithmetic and Sqrt round correctly in either.
SPLIT_OPERATORS = ("Cos", "Exp", "Sigmoid", "Sin", "Tanh")
# float32 elements in the widest registers, AVX-512's.
PACKET = 16
# Bytes of a sum's packets: Eigen's, as ONNX Runtime's wheels are built.
SUM_BYTES = 16


def fill_packets(model: ir.Model) -> None:
    """Pad the rows of every such operator's input to whole packets, and cut its output back; and of every sum's.

    An input whose only symbolic axis is the first, the batch, is padded; one without a batch needs no padding. Sums
    over an axis whose size is not known stay as they are.
    """
    for node, known in _known(model, tuple(LOWERED)):
        _lower(node, known)
    NameFixPass()(model)
    for node, known in _known(model, (*SPLIT_OPERATORS, "ReduceSum")):
        if node.op_type == "ReduceSum":
            _fill_sum(node, known)
        elif node.graph is model.graph:
            _fill(model.graph, node, known)
    RemoveUnusedNodesPass()(model)  # the axes of sums that have others now
    NameFixPass()(model)  # what is put into a loop is named as if there were nothing outside of it


def _known(model: ir.Model, operators: tuple[str, ...]) -> list[tuple[ir.Node, ir.Value]]:
    """The nodes of these operators, in loops too, each with its first input as shape inference has it.

    Values in loops may share names with others, so nodes are paired by their places.
    """
    inferred = ShapeInferencePass()(model.clone()).model
    both = zip(*(ir.traversal.RecursiveGraphIterator(item.graph) for item in (model, inferred)), strict=True)
    found = [(node, twin.inputs[0]) for node, twin in both if node.op_type in operators]
    return [(node, known) for node, known in found if known is not None]


def _lower(node: ir.Node, known: ir.Value) -> None:
    """Put one of LOWERED as what it is made of; float16 by way of float32."""
    graph, value = node.graph, node.inputs[0]
    if not isinstance(graph, ir.Graph) or value is None or known.dtype is None:
        return
    if node.op_type == "Exp" and known.dtype != ir.DataType.DOUBLE:
        return
    half = known.dtype == ir.DataType.FLOAT16
    if half:
        value = _insert(graph, node, "Cast", [value], to=int(ir.DataType.FLOAT))
    value = LOWERED[node.op_type](graph, node, value, np.dtype(np.float32) if half else known.dtype.numpy())
    if half:
        value = _insert(graph, node, "Cast", [value], to=int(ir.DataType.FLOAT16))
    _take_place(graph, node, node.outputs[0], value)


def _log(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    one = _insert(graph, node, "Unsqueeze", [value], _ints(-1))
    return _insert(graph, node, "ReduceLogSum", [one], _ints(-1), keepdims=0)


def _exp(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    base = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(np.e, dtype)))])
    graph.insert_before(node, base)
    return _insert(graph, node, "Pow", [base.outputs[0], value])


def _softplus(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """max(x, 0) + log(1 + e), e = exp(−|x|); log(1 + e) = e · log(s)/(s − 1) with the rounded s = 1 + e (Kahan)."""
    put, one, zero = partial(_insert, graph, node), np.ones((), dtype), np.zeros((), dtype)
    power = _power(graph, node, put("Neg", [put("Abs", [value])]), dtype)
    whole = put("Add", [power], one)
    added = put("Sub", [whole], one)
    ratio = put("Div", [put("Mul", [power, _log(graph, node, whole, dtype)]), added])
    none = put("Equal", [added], zero)
    return put("Add", [put("Relu", [value]), put("Where", [none, power, ratio])])


def _power(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    return _exp(graph, node, value, dtype) if dtype == np.float64 else _insert(graph, node, "Exp", [value])


def _elu(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """max(x, 0) + α (exp(min(x, 0)) − 1)."""
    put, slope = partial(_insert, graph, node), np.array(node.attributes.get_float("alpha", 1.0), dtype)
    below = put("Neg", [put("Relu", [put("Neg", [value])])])
    power = put("Sub", [_power(graph, node, below, dtype)], np.ones((), dtype))
    return put("Add", [put("Relu", [value]), put("Mul", [power], slope)])


LOWERED: dict[str, Callable[[ir.Graph, ir.Node, ir.Value, np.dtype[Any]], ir.Value]] = {
    "Elu": _elu,
    "Exp": _exp,
    "Log": _log,
    "Softplus": _softplus,
}


def _fill_sum(node: ir.Node, known: ir.Value) -> None:
    """Sum over the last axis, of whole packets; `known` is the input with its shape and dtype."""
    graph, given = node.graph, node.inputs[1] if len(node.inputs) > 1 else None
    axes = ir.convenience.get_const_tensor(given) if given is not None else None
    if not isinstance(graph, ir.Graph) or known.dtype is None or not known.shape or axes is None or not axes.size:
        return
    rank = len(known.shape)
    summed = sorted(int(axis) % rank for axis in axes.numpy())
    kept = [axis for axis in range(rank) if axis not in summed]
    sizes = [size for size in (known.shape[axis] for axis in summed) if isinstance(size, int)]
    last, width = summed == [*range(len(kept), rank)], prod(sizes)
    more = -width % max(1, SUM_BYTES // int(known.dtype.itemsize))
    if all(isinstance(size, int) for size in known.shape) or len(sizes) < len(summed) or (last and not more):
        return
    value, result = node.inputs[0], node.outputs[0]
    assert value is not None
    if not last:
        value = _insert(graph, node, "Transpose", [value], perm=[*kept, *summed])
    if len(summed) > 1:
        value = _insert(graph, node, "Reshape", [value], _ints(*[0] * len(kept), width))
    if more:
        ends = _ints(*[0] * (2 * len(kept) + 1), more)
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
