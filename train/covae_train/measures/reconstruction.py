"""How far the decoded mean is from the image (the Spatial VAE paper's and others' MSE)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from covae_core.densities.factored import Factored
from covae_train.data import ImageData, in_units
from covae_train.measures import Estimate, Measure, Settings, mean_of, needs_encoder, register
from covae_train.run import TrainedRun

BATCH = 256


@torch.no_grad()
def errors(run: TrainedRun, images: Tensor) -> Tensor:
    """(decoded mean − image) at the posteriors' means; pixels in [0, 1]. images: (N, C, H, W) uint8

    Of a model without latents, what its factor makes of the image takes the decoded mean's place.
    """
    rows = []
    for batch in torch.split(images, BATCH):
        pixels = in_units(batch)
        rows.append((_reconstructed(run, pixels) - pixels).double())
    return torch.cat(rows)


def _reconstructed(run: TrainedRun, pixels: Tensor) -> Tensor:
    posteriors = run.model.posteriors(pixels) if run.model.encodes else {}
    latents = {name: posterior.mean for name, posterior in posteriors.items()}
    density = run.model.density(latents, len(pixels))
    if not latents and isinstance(density, Factored):
        projected: Tensor = density.project(pixels)
        return projected
    mean: Tensor = density.mean
    return mean


def mean_error(run: TrainedRun, images: Tensor) -> tuple[float, float]:
    """Root mean square and mean of (decoded mean − image) over images (N, C, H, W) uint8, pixels in [0, 1]."""
    error = errors(run, images)
    return float(error.square().mean().sqrt()), float(error.mean())


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images."""
    error = errors(run, data.held_out[: settings.images])
    per_image = error.square().mean(dim=(1, 2, 3))
    return {
        "RMSE of the decoded mean": Estimate(float(per_image.mean().sqrt())),
        "its bias": Estimate(float(error.mean())),
        "its MSE in [0, 255]": mean_of(per_image * 255**2, 1),
    }


register(
    Measure("reconstruction", "RMSE and bias of the decoded mean; MSE in [0, 255]", compute, needs_encoder, usual=True)
)
