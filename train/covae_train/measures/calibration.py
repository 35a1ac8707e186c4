"""Does a density claim the uncertainty that images have? Whitened residuals, and how residuals really hang together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from covae_core.densities import Whitening
from covae_core.densities.factored import Factored
from covae_train.data import ImageData
from covae_train.measures import Estimate, Measure, Settings, mean_of, needs_encoder, register
from covae_train.measures.coherence import lag1
from covae_train.objective import Batch, encoded
from covae_train.run import TrainedRun

BATCH = 100


@torch.no_grad()
def whitened(run: TrainedRun, images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of images at one draw each from their posteriors, under the density to score with, in float64.

    images: (N, C, H, W) uint8. Returns the mean squares of the whitened residuals, (N,), those along the principal
    directions of the whitened factor, (N,), NaN without one, the residuals x − μ, (N, C, H, W), and the KL, (N,).
    """
    random = torch.Generator().manual_seed(seed)
    squares, along, residuals, kls = [], [], [], []
    for batch in torch.split(images, BATCH):
        pixels = batch.float() / 255
        latents: dict[str, Tensor] = {}
        kl = torch.zeros(len(batch))
        if run.model.latents:
            latents, kl = encoded(run.model, Batch(pixels, run.model.latent_noise((len(batch),), random)))
        density = run.model.scoring_density(latents, len(batch)).to(torch.float64)
        assert isinstance(density, Whitening)
        white = density.whiten(pixels.double())
        squares.append(white.square().sum((1, 2, 3)) / density.degrees)
        along.append(_along_factor(density, white))
        residuals.append(pixels.double() - density.mean)
        kls.append(kl.double())
    return torch.cat(squares), torch.cat(along), torch.cat(residuals), torch.cat(kls)


def _along_factor(density: Whitening, white: Tensor) -> Tensor:
    """The mean square of whitened residuals along the R principal directions of the whitened factor. shape: (B,)"""
    if not isinstance(density, Factored):
        return torch.full((len(white),), torch.nan, dtype=torch.float64)
    directions = torch.linalg.svd(density._white_factor, full_matrices=False).Vh
    found: Tensor = (directions @ white.flatten(1)[..., None])[..., 0].square().mean(1)
    return found


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images."""
    squares, along, residuals, kls = whitened(run, data.held_out[: settings.images], settings.seed)
    figures = {"white": mean_of(squares), "lag-1 of held-out residuals": Estimate(lag1(residuals))}
    if not along.isnan().any():
        figures["white along the factor"] = mean_of(along)
    return figures | ({"KL": mean_of(kls, 2)} if run.model.latents else {})


register(
    Measure(
        "calibration",
        "mean squared whitened residual, 1 for a density that is right; also along its factor",
        compute,
        needs_encoder,
        usual=True,
    )
)
