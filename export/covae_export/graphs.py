"""The five operations as torch modules: what becomes one ONNX graph each.

Inputs and outputs are those of `covae_core.contract`, with a batch axis in front.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from covae_core.contract import Operation
from covae_core.noise import Stream
from covae_export.float64 import in_float64, runnable_in_float64
from covae_train.image_model import ImageModel
from covae_train.noise import standard_normal
from covae_train.scoring import log_weights


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, H, W, C) to floats (B, C, H, W) in [0, 1]."""
    return images.permute(0, 3, 1, 2).to(dtype) / 255


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, C, H, W) to uint8 (B, H, W, C), clipped and rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def noise(seeds: Tensor, shape: tuple[int, ...], stream: Stream, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals of seeds (B, 1). shape: (B, *shape)"""
    return standard_normal(seeds.flatten(), prod(shape), stream, dtype).reshape(-1, *shape)


class Graph(nn.Module):
    """An operation of a model."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model


class Decode(Graph):
    """A latent's density: its mean and the parameters beside it."""

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        density = self.model.density(latent)
        rows = latent.shape[0]
        return density.mean, *(per_row(value, rows) for value in density.parameters.values())


def per_row(value: Tensor, rows: int) -> Tensor:
    """A parameter with a batch axis; one that all images share, as a constant variance (1, 1, 1), is repeated."""
    return value if value.ndim > 3 else value.expand(rows, *value.shape) + 0


class Encode(Graph):
    """An image's posterior."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.posterior(to_unit(image)))


class Sample(Graph):
    """An image drawn from the model, and the latent that it was drawn at."""

    def forward(self, latent_seed: Tensor, noise_seed: Tensor) -> tuple[Tensor, ...]:
        latent = noise(latent_seed, self.model.latent_shape, Stream.LATENT)
        image = self.model.density(latent).sample_rows(noise_seed.flatten())
        return to_uint8(image), latent


class Condition(Graph):
    """A latent's density with some pixels fixed: its mean, and a sample of it."""

    def forward(self, latent: Tensor, mask: Tensor, pixels: Tensor, noise_seed: Tensor) -> tuple[Tensor, ...]:
        density = self.model.density(latent).condition(mask, to_unit(pixels))
        return to_uint8(density.mean), to_uint8(density.sample_rows(noise_seed.flatten()))


class Score(Graph):
    """M importance weights of an image, by a model in float64."""

    def __init__(self, model: ImageModel, samples: int) -> None:
        super().__init__(model)
        self.samples = samples

    def forward(self, image: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        normals = noise(seed, (self.samples, *self.model.latent_shape), Stream.POSTERIOR, torch.float64)
        return (log_weights(self.model, to_unit(image, torch.float64), normals),)


GRAPHS = {
    Operation.DECODE: Decode,
    Operation.ENCODE: Encode,
    Operation.SAMPLE: Sample,
    Operation.CONDITION: Condition,
}


def build_reference(operation: Operation, model: ImageModel, score_samples: int) -> Graph:
    """An operation as torch computes it; scores in float64."""
    if operation is Operation.SCORE:
        return Score(in_float64(model), score_samples).eval()
    return GRAPHS[operation](model).eval()


def build_graph(operation: Operation, model: ImageModel, score_samples: int) -> Graph:
    """An operation as it is exported: the reference, or what ONNX Runtime can run in its place."""
    if operation is Operation.SCORE:
        return Score(runnable_in_float64(in_float64(model)), score_samples).eval()
    return build_reference(operation, model, score_samples)
