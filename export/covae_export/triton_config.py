"""One operation's `config.pbtxt`, written in full so that Triton completes nothing by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from covae_core.contract import (
    GRAPH_DIGEST,
    HALF_ERRORS,
    PLATFORM_BACKEND,
    WEIGHTS_DIGESTS,
    ModelSpec,
    Priority,
    TensorSpec,
    served_name,
)
from covae_core.operations import Operation
from covae_core.release import MODEL_FILE

INSTANCE_KINDS = {
    "auto": pb.ModelInstanceGroup.KIND_AUTO,
    "cpu": pb.ModelInstanceGroup.KIND_CPU,
    "gpu": pb.ModelInstanceGroup.KIND_GPU,
}


def build_config(
    name: str,
    spec: ModelSpec,
    operation: Operation,
    version: int,
    digests: Mapping[str, str],
    half_errors: Mapping[str, float] | None = None,
    *,
    max_batch_size: int = 64,
    instances: int = 1,
    instance_kind: str = "cpu",
    threads: int = 1,
    max_wait_s: float = 0.0,
    priorities: bool = False,
) -> pb.ModelConfig:
    """The configuration of one operation of the model `name`.

    Args:
        version: the one that it is of; Triton serves no other
        digests: the SHA-256 of the operation's graph and of its files of weights, by their names, which the backend
            checks when it loads them
        half_errors: where the graph has float16 inside, how far each output is from float32's
        instances: processes per model (per GPU with `gpu`)
        instance_kind: `cpu`, `gpu`, or `auto` (the GPU where there is one; needs the extra `gpu` there)
        threads: threads with which one instance runs its graph on the CPU
        max_wait_s: a request that has waited so long is refused (UNAVAILABLE), so that a server with too much to do
            answers as many as it can, in time; 0: by default the clients' deadlines are the bound. A bound on the
            queue's length instead makes Triton 2.51's batcher sleep 500 ms at nearly every batch (docs/reliability.md)
        priorities: requests of priority 2 (batch jobs) wait for those of 1
    """
    config = pb.ModelConfig(
        name=served_name(name, operation.name),
        backend=PLATFORM_BACKEND,
        default_model_filename=MODEL_FILE,
        max_batch_size=max_batch_size,
        input=[pb.ModelInput(name=t.name, data_type=_dtype(t), dims=t.shape) for t in operation.inputs(spec)],
        output=[pb.ModelOutput(name=t.name, data_type=_dtype(t), dims=t.shape) for t in operation.outputs(spec)],
        instance_group=[pb.ModelInstanceGroup(count=instances, kind=INSTANCE_KINDS[instance_kind])],
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[version])),
        model_warmup=[_warm_up(spec, operation)],
    )
    config.dynamic_batching.SetInParent()
    if priorities:
        config.dynamic_batching.priority_levels = len(Priority)
        config.dynamic_batching.default_priority_level = Priority.INTERACTIVE
    if max_wait_s:
        config.dynamic_batching.default_queue_policy.default_timeout_microseconds = round(1e6 * max_wait_s)
    values = spec.to_parameters() | {
        "operation": operation.name,
        GRAPH_DIGEST: digests[MODEL_FILE],
        WEIGHTS_DIGESTS: json.dumps({name: digest for name, digest in digests.items() if name != MODEL_FILE}),
        "intra_op_thread_count": str(threads),
    }
    if half_errors is not None:
        values[HALF_ERRORS] = json.dumps(half_errors)
    for key, value in values.items():
        config.parameters[key].string_value = value
    return config


def _dtype(tensor: TensorSpec) -> int:
    return int(pb.DataType.Value(f"TYPE_{tensor.dtype}"))


def _warm_up(spec: ModelSpec, operation: Operation) -> pb.ModelWarmup:
    """One row of zeros, so that the first request finds everything allocated."""
    warm_up = pb.ModelWarmup(name="zeros", batch_size=1)
    for tensor in operation.inputs(spec):
        warm_up.inputs[tensor.name].CopyFrom(
            pb.ModelWarmup.Input(data_type=_dtype(tensor), dims=tensor.shape, zero_data=True)
        )
    return warm_up


def to_text(config: pb.ModelConfig) -> str:
    """As `config.pbtxt` has it."""
    return str(text_format.MessageToString(config))
