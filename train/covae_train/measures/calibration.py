"""Does a density claim the uncertainty that images have? Whitened residuals, and how residuals really hang together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from covae_core.densities import Whitening
from covae_core.densities.factored import Factored
from covae_train.data import ImageData
from covae_train.measures import Estimate, Measure, Settings, mean_of, needs_whitening, register
from covae_train.measures.coherence import lag1
from covae_train.objective import Batch, encoded
from covae_train.run import TrainedRun

BATCH = 100


class Whitened(NamedTuple):
    """Of N images: the mean squares of their whitened residuals, (N,); those along the principal directions of the
    whitened factor, (N,), NaN without one; residuals x − μ, and whitened ones, (N, C, H, W); the KL, (N,)."""

    squares: Tensor
    along: Tensor
    residuals: Tensor
    white: Tensor
    kl: Tensor


@torch.no_grad()
def whitened(run: TrainedRun, images: Tensor, seed: int) -> Whitened:
    """Of images at one draw each from their posteriors, under the density to score with, in float64.

    images: (N, C, H, W) uint8, dequantised if the run's were
    """
    random = torch.Generator().manual_seed(seed)
    squares, along, residuals, kls, whites = [], [], [], [], []
    for pixels in torch.split(run.units(images, seed), BATCH):
        latents: dict[str, Tensor] = {}
        kl = torch.zeros(len(pixels))
        if run.model.latents:
            latents, kl = encoded(run.model, Batch(pixels, run.model.latent_noise((len(pixels),), random)))
        density = run.model.scoring_density(latents, len(pixels)).to(torch.float64)
        assert isinstance(density, Whitening)
        white = density.whiten(pixels.double())
        squares.append(white.square().sum((1, 2, 3)) / density.degrees)
        whites.append(white)
        along.append(_along_factor(density, white))
        residuals.append(pixels.double() - density.mean)
        kls.append(kl.double())
    return Whitened(*(torch.cat(part) for part in (squares, along, residuals, whites, kls)))


def _along_factor(density: Whitening, white: Tensor) -> Tensor:
    """The mean square of whitened residuals along the R principal directions of the whitened factor. shape: (B,)"""
    if not isinstance(density, Factored):
        return torch.full((len(white),), torch.nan, dtype=torch.float64)
    directions = torch.linalg.svd(density._white_factor, full_matrices=False).Vh
    found: Tensor = (directions @ white.flatten(1)[..., None])[..., 0].square().mean(1)
    return found


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images."""
    found = whitened(run, data.held_out[: settings.images], settings.seed)
    figures = {
        "white": mean_of(found.squares),
        "lag-1 of held-out residuals": Estimate(lag1(found.residuals)),
        "lag-1 of whitened residuals": Estimate(lag1(found.white)),
    }
    if not found.along.isnan().any():
        figures["white along the factor"] = mean_of(found.along)
    return figures | ({"KL": mean_of(found.kl, 2)} if run.model.latents else {})


register(
    Measure(
        "calibration",
        "mean squared whitened residual, 1 for a density that is right; also along its factor",
        compute,
        needs_whitening,
        usual=True,
    )
)
