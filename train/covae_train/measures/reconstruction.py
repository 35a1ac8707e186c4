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


@torch.no_grad()
def terms(run: TrainedRun, images: Tensor, seed: int) -> Tensor:
    """log p(x|z) at one draw of the latents from their posteriors, in nats: what the bound has beside the KL. (N,)

    images: (N, C, H, W) uint8, seen as the run was trained on them
    """
    random = torch.Generator().manual_seed(seed)
    rows = []
    for batch in torch.split(run.units(images, seed), BATCH):
        noise = run.model.latent_noise((len(batch),), random)
        latents = {name: item.draw(noise[name]) for name, item in run.model.posteriors(batch).items()}
        rows.append(run.model.scoring_density(latents, len(batch)).to(torch.float64).log_prob(batch.double()))
    return torch.cat(rows)


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images."""
    images = data.held_out[: settings.images]
    error = errors(run, images)
    per_image = error.square().mean(dim=(1, 2, 3))
    term = {"reconstruction term": mean_of(terms(run, images, settings.seed), 1)} if run.model.encodes else {}
    return {
        **term,
        "RMSE of the decoded mean": Estimate(float(per_image.mean().sqrt())),
        "its bias": Estimate(float(error.mean())),
        "its MSE in [0, 255]": mean_of(per_image * 255**2, 1),
    }


register(
    Measure(
        "reconstruction",
        "log p(x|z) at a draw; RMSE and bias of the decoded mean; MSE in [0, 255]",
        compute,
        needs_encoder,
        usual=True,
    )
)
