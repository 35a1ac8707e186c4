"""torch graph to ONNX file: symbolic batch axis, the contract's names, weights inside, no trace of who made it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor

from covae_core.backends import using_backend
from covae_core.contract import NUMPY_DTYPES, ModelSpec, TensorSpec
from covae_core.operations import Operation
from covae_export.errors import ExportError
from covae_export.graphs import Graph
from covae_export.packets import fill_packets
from covae_export.traced_backend import TracedBackend

OPSET = 20
# torch.export specialises a batch of 0 or 1; any other size stays symbolic.
EXAMPLE_BATCH = 2


def example_inputs(spec: ModelSpec, operation: Operation, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Valid inputs of an operation: normal latents, consecutive seeds, random bytes and masks."""
    random = torch.Generator().manual_seed(seed)
    return tuple(_example(tensor, rows, random) for tensor in operation.inputs(spec))


def _example(tensor: TensorSpec, rows: int, random: torch.Generator) -> Tensor:
    shape = (rows, *tensor.shape)
    if tensor.dtype == "FP32":
        values = torch.randn(shape, generator=random)
        return torch.relu(values) if tensor.name == "softness" else values
    if tensor.dtype == "INT64":
        return torch.arange(rows).reshape(shape) + int(torch.randint(2**31, (), generator=random))
    high = {"UINT8": 256, "BOOL": 2}[tensor.dtype]
    return torch.from_numpy(torch.randint(high, shape, generator=random).numpy().astype(NUMPY_DTYPES[tensor.dtype]))


def convert(graph: Graph, path: Path) -> None:
    """Write one graph to `path`.

    Raises:
        ExportError: torch cannot export the graph, or an axis that must be the batch is not symbolic.
    """
    spec, operation = graph.spec, graph.operation
    batch = torch.export.Dim("batch", min=1, max=65536)
    inputs = example_inputs(spec, operation, EXAMPLE_BATCH)
    try:
        with warnings.catch_warnings(), torch.no_grad(), using_backend("torch", TracedBackend()):
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=False,
                input_names=graph.names,
                output_names=graph.output_names,
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            )
            assert program is not None
            fill_packets(program.model)
            _forget_origin(program.model)
            program.save(str(path), external_data=False)
    except Exception as error:  # torch.onnx's errors have no common base below Exception
        raise ExportError(f"{operation.name}: torch cannot export this graph to ONNX: {error}") from error
    _check_axes(path, spec, operation)


def _forget_origin(model: ir.Model) -> None:
    """Remove what torch notes of each node: the lines of source that made it, with this machine's paths."""
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    graph.metadata_props.clear()
    made = (value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()


def _check_axes(path: Path, spec: ModelSpec, operation: Operation) -> None:
    """Every input and output has the contract's name and shape behind a symbolic batch axis."""
    model = onnx.load(path, load_external_data=False).graph
    wanted = [*operation.inputs(spec), *operation.outputs(spec)]
    for tensor, value in zip(wanted, [*model.input, *model.output], strict=True):
        axes = value.type.tensor_type.shape.dim
        sizes = tuple(axis.dim_value for axis in axes[1:])
        if value.name != tensor.name or not axes[0].dim_param or sizes != tensor.shape:
            found = [axis.dim_param or axis.dim_value for axis in axes]
            raise ExportError(
                f"{path.name} of {operation.name}: tensor {value.name} has the axes {found}; "
                f"expected {tensor.name} with a symbolic batch axis and {tensor.shape}"
            )
