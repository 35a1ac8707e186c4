"""The operations as torch modules: what becomes one ONNX graph each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covae_core.backends import using_backend
from covae_core.contract import ModelSpec
from covae_core.densities import Density
from covae_core.operations import OPERATIONS, Operation, abilities
from covae_export.float64 import in_float64, runnable_in_float64
from covae_export.half import with_half_features
from covae_export.subpixel import without_upsampling
from covae_export.traced_backend import TracedBackend
from covae_train.image_model import ImageModel
from covae_train.run import TrainedRun


class Graph(nn.Module):
    """An operation of a model: its input tensors in their order, with a batch axis in front, to its output tensors."""

    def __init__(self, model: ImageModel, spec: ModelSpec, operation: Operation) -> None:
        super().__init__()
        self.model, self.spec, self.operation = model, spec, operation
        self.names = [tensor.name for tensor in operation.inputs(spec)]
        self.output_names = [tensor.name for tensor in operation.outputs(spec)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        outputs = self.operation.run(self.model, self.spec, inputs)
        return tuple(outputs[name] for name in self.output_names)


def build_reference(operation: Operation, model: ImageModel, spec: ModelSpec) -> Graph:
    """An operation as torch computes it, an exact one in float64."""
    return Graph(in_float64(model) if operation.exact else model, spec, operation).eval()


def build_graph(operation: Operation, model: ImageModel, spec: ModelSpec, *, precision: str = "float32") -> Graph:
    """An operation as it is exported: convolutions of upsampled maps at the maps' own size.

    precision: float64: the whole network, in forms that ONNX Runtime has; float16: the networks' feature maps, but an
    exact operation's; or float32.

    Raises:
        ExportError: the model has a layer of a kind that has no float64 form.
    """
    exported = without_upsampling(in_float64(model) if precision == "float64" else model)
    forms = {"float16": with_half_features, "float32": lambda model: model, "float64": runnable_in_float64}
    return Graph(forms[precision_of(operation, precision)](exported), spec, operation).eval()


def precision_of(operation: Operation, precision: str) -> str:
    """What an operation gets where a model is exported with a precision: an exact one no float16."""
    return "float32" if operation.exact and precision == "float16" else precision


@torch.no_grad()
def describe(run: TrainedRun, score_samples: int, draw_samples: int) -> ModelSpec:
    """The model's part of the wire contract, read off the model itself."""
    with using_backend("torch", TracedBackend()):  # as the graph will see the densities' parameters
        return _described(run, score_samples, draw_samples)


def _described(run: TrainedRun, score_samples: int, draw_samples: int) -> ModelSpec:
    model = run.model
    (density, scoring), (larger, larger_scoring) = (model.densities(_zeros(model, rows), rows) for rows in (2, 3))
    parameters = _row_shapes(density, larger)
    own = _row_shapes(scoring, larger_scoring)
    height, width, channels = run.config.image_shape
    images = torch.zeros(2, channels, height, width, dtype=model.dtype)
    posteriors = model.posteriors(images) if model.encodes else {}
    can = abilities(model, density)
    return ModelSpec(
        family=run.config.family,
        image_shape=run.config.image_shape,
        latents=model.latents,
        posteriors={
            latent: {name: tuple(value.shape[1:]) for name, value in posterior.parameters.items()}
            for latent, posterior in posteriors.items()
        },
        priors={name: model.prior(name).kind for name in model.latents},
        density=density.kind,
        density_parameters=parameters,
        scoring_parameters={
            name: shape
            for name, shape in own.items()
            if shape != parameters[name] or not torch.equal(scoring.parameters[name], density.parameters[name])
        },
        operations=tuple(operation.name for operation in OPERATIONS.values() if operation.needs <= can),
        score_samples=score_samples if model.latents else 1,
        draw_samples=draw_samples,
        run_id=run.run_id,
        run_digest=run.digest,
        data=run.config.data,
        calibration=run.calibration,
        warp=model.warp_spec,
    )


def _zeros(model: ImageModel, rows: int) -> dict[str, Tensor]:
    return {name: torch.zeros(rows, *shape, dtype=model.dtype) for name, shape in model.latents.items()}


def _row_shapes(two: Density, three: Density) -> dict[str, tuple[int, ...]]:
    """Shapes of a density's parameters, from two rows and three: what differs between them has a batch axis."""
    shapes = {}
    for name, value in two.parameters.items():
        shape = tuple(value.shape)
        shapes[name] = shape if shape == tuple(three.parameters[name].shape) else shape[1:]
    return shapes
