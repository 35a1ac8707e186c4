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
    """An operation as torch computes it."""
    return Graph(in_float64(model) if operation.exact else model, spec, operation).eval()


def build_graph(operation: Operation, model: ImageModel, spec: ModelSpec) -> Graph:
    """An operation as it is exported: the reference, or what ONNX Runtime can run in its place.

    Raises:
        ExportError: the model has a layer of a kind that has no float64 form.
    """
    if not operation.exact:
        return build_reference(operation, model, spec)
    return Graph(runnable_in_float64(model), spec, operation).eval()


@torch.no_grad()
def describe(run: TrainedRun, score_samples: int, draw_samples: int) -> ModelSpec:
    """The model's part of the wire contract, read off the model itself."""
    with using_backend("torch", TracedBackend()):  # as the graph will see the densities' parameters
        return _described(run, score_samples, draw_samples)


def _described(run: TrainedRun, score_samples: int, draw_samples: int) -> ModelSpec:
    model = run.model
    density, larger = (model.density(_zeros(model, rows), rows) for rows in (2, 3))
    two, three = _shapes(density), _shapes(larger)
    # What differs between two rows and three has a batch axis; the rest is shared by all rows.
    parameters = {name: shape if shape == three[name] else shape[1:] for name, shape in two.items()}
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
        operations=tuple(operation.name for operation in OPERATIONS.values() if operation.needs <= can),
        score_samples=score_samples if model.latents else 1,
        draw_samples=draw_samples,
        run_id=run.run_id,
        run_digest=run.digest,
    )


def _zeros(model: ImageModel, rows: int) -> dict[str, Tensor]:
    return {name: torch.zeros(rows, *shape, dtype=model.dtype) for name, shape in model.latents.items()}


def _shapes(density: Density) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in density.parameters.items()}
