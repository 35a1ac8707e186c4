"""Builds an inference that any model accepts from its config alone, to see whether the model really answers."""

from __future__ import annotations

from math import prod

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput
from tritonclient.grpc.service_pb2 import ModelInferRequest

# The backend keeps requests with this id out of users' counts.
PROBE_ID = "covae-probe"
# One element of zeros in Triton's wire format: 0, False, seed 0, the empty string.
ELEMENT_BYTES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": 4,
}


def probe_request(config: ModelConfig) -> ModelInferRequest:
    """One row of zeros for every input that the model needs; an axis of any length gets length 1."""
    request = ModelInferRequest(model_name=config.name, id=PROBE_ID)
    for tensor in config.input:
        if not tensor.optional:
            shape = _shape(tensor, config.max_batch_size > 0)
            datatype = DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
            request.inputs.add(name=tensor.name, datatype=datatype, shape=shape)
            request.raw_input_contents.append(bytes(prod(shape) * ELEMENT_BYTES[datatype]))
    return request


def _shape(tensor: ModelInput, batched: bool) -> list[int]:
    return [*([1] if batched else []), *(max(1, size) for size in tensor.dims)]
