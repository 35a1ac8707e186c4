"""Every graph against torch, batch by batch, before it is published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from covae_core.contract import ModelSpec
from covae_core.operations import OPERATIONS, Operation
from covae_export.conversion import example_inputs
from covae_export.errors import ExportError
from covae_export.graphs import build_graph, build_reference
from covae_train.image_model import ImageModel

BATCHES = (1, 2, 3, 17)
# A row of an exact operation decodes many latents in float64, a third of a second each at the paper's sizes.
EXACT_BATCHES = (1, 2, 3)
# Largest error allowed per dtype: FP32 relative to 1 + |value|; UINT8 in grey levels (a value next to ½ may round the
# other way); FP64 in nats.
TOLERANCES = {"FP32": 1e-4, "UINT8": 1.0, "FP64": 0.05}
# The same where feature maps are in float16, whose unit of rounding is 5e-4: FP32 relative to an output's largest.
HALF_TOLERANCES = TOLERANCES | {"FP32": 0.02, "UINT8": 4.0}


@dataclass(frozen=True)
class Disagreement:
    """The largest error of one output over all batches, and what is allowed."""

    operation: Operation
    output: str
    error: float
    tolerance: float

    @property
    def acceptable(self) -> bool:
        """Within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def verify(
    model: ImageModel, spec: ModelSpec, operation: Operation, path: Path, threads: int = 1, precision: str = "float32"
) -> list[Disagreement]:
    """Compare an ONNX file with torch for batches of 1, 2, 3 and 17, of 1, 2 and 3 for an exact operation.

    precision: the file's, float32 or float16; torch's is float32. Of float16 the larger error counts, the graph's or
    that of torch on the CPU, which rounds after every layer where ONNX Runtime leaves out most casts.

    Raises:
        ExportError: ONNX Runtime cannot run the graph, or a row's bytes depend on its batch.
    """
    session = _session(path, operation, threads)
    batches = EXACT_BATCHES if operation.exact else BATCHES
    inputs = verification_inputs(model, spec, operation, max(batches))
    reference = build_reference(operation, model, spec)
    outputs = operation.outputs(spec)
    with torch.no_grad():
        expected = [value.numpy() for value in reference(*inputs)]
        rounded = _half_answers(model, spec, operation, inputs) if precision == "float16" else []
    error = _half_error if precision == "float16" else _error
    errors = {tensor.name: 0.0 for tensor in outputs}
    for tensor, value, wanted in zip(outputs, rounded, expected, strict=False):
        errors[tensor.name] = error(value, wanted)
    whole: list[NDArray[np.generic]] = []
    for rows in sorted(batches, reverse=True):
        found = _run(session, spec, operation, inputs, rows)
        whole = whole or found
        for tensor, value, wanted, in_all in zip(outputs, found, expected, whole, strict=True):
            errors[tensor.name] = _worse(errors[tensor.name], error(value, wanted[:rows]))
            alike = value.tobytes() == in_all[:rows].tobytes()
            if not alike and not np.isnan(errors[tensor.name]):  # a NaN has many forms, and is refused as one
                raise ExportError(
                    f"{operation.name}: {tensor.name} of a row differs between batches of {rows} and {max(batches)}"
                )
    allowed = HALF_TOLERANCES if precision == "float16" else TOLERANCES
    return [Disagreement(operation, t.name, errors[t.name], allowed[t.dtype]) for t in outputs]


def _session(path: Path, operation: Operation, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base below Exception
        raise ExportError(f"{operation.name}: ONNX Runtime cannot run the exported graph: {error}") from error


def verification_inputs(model: ImageModel, spec: ModelSpec, operation: Operation, rows: int) -> tuple[Tensor, ...]:
    """Inputs as users send them: images are the model's own samples, latents theirs, half of each mask is fixed.

    An image of another latent is thousands of deviations away where a pixel hardly varies, and an edit to it multiplies
    the last digits of float32 as much.
    """
    inputs = dict(zip((t.name for t in operation.inputs(spec)), example_inputs(spec, operation, rows), strict=True))
    drawn = _drawn(model, spec, rows)
    own = {"image": drawn["image"], "pixels": drawn["image"], **{name: drawn[name] for name in spec.latents}}
    return tuple(own.get(name, value) for name, value in inputs.items())


@torch.no_grad()
def _drawn(model: ImageModel, spec: ModelSpec, rows: int) -> dict[str, Tensor]:
    """Samples and their latents, by the names that `sample` gives them."""
    sample = OPERATIONS["sample"]
    given = {"latent_seed": torch.arange(rows).reshape(-1, 1)}
    given |= {"noise_seed": given["latent_seed"], "pose_spread": torch.ones(rows, 1)}
    given |= {"pose_centre": torch.zeros(rows, *spec.latents.get("pose", ()))}
    reference = build_reference(sample, model, spec)
    found = reference(*[given[name] for name in reference.names])
    return {tensor.name: value.contiguous() for tensor, value in zip(sample.outputs(spec), found, strict=True)}


def _run(
    session: onnxruntime.InferenceSession, spec: ModelSpec, operation: Operation, inputs: tuple[Tensor, ...], rows: int
) -> list[NDArray[np.generic]]:
    names = [tensor.name for tensor in operation.inputs(spec)]
    feed = {name: value[:rows].numpy() for name, value in zip(names, inputs, strict=True)}
    return list(session.run([tensor.name for tensor in operation.outputs(spec)], feed))


def _error(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    if found.dtype == np.float32:
        difference /= 1 + np.abs(expected.astype(np.float64))
    return float(difference.max())


def _half_error(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """In grey levels, or relative to the largest value: a variance of 1e-5 has its own size."""
    wanted = expected.astype(np.float64)
    difference = float(np.abs(found.astype(np.float64) - wanted).max())
    return difference if found.dtype == np.uint8 else difference / max(float(np.abs(wanted).max()), 1e-30)


def _half_answers(
    model: ImageModel, spec: ModelSpec, operation: Operation, inputs: tuple[Tensor, ...]
) -> list[NDArray[np.generic]]:
    return [value.numpy() for value in build_graph(operation, model, spec, precision="float16")(*inputs)]


def _worse(first: float, second: float) -> float:
    """The larger error; NaN is larger than any number, which Python's `max` does not know."""
    return float(np.maximum(first, second))


def refuse_unacceptable(disagreements: Iterable[Disagreement], precision: str = "float32") -> None:
    """Raise if any output is too far from torch; precision: of the graphs, to be told.

    Raises:
        ExportError: names each such output, its error and its tolerance.
    """
    bad = [d for d in disagreements if not d.acceptable]
    if bad:
        listed = "; ".join(f"{d.operation.name}.{d.output}: {d.error:.3g}, allowed {d.tolerance:g}" for d in bad)
        advice = "; try --precision float32" if precision == "float16" else ""
        raise ExportError(f"the ONNX graphs disagree with torch, nothing was published: {listed}{advice}")
