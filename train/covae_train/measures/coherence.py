"""Do neighbouring pixels of a sample deviate from the mean together?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from covae_train.data import ImageData
from covae_train.measures import Estimate, Measure, Settings, register
from covae_train.run import TrainedRun

LATENTS = 256


@torch.no_grad()
def lag1_autocorrelation(run: TrainedRun, num_latents: int = LATENTS, seed: int = 0) -> float:
    """Correlation of (sample − mean) between pixels next to each other, pooled over images, rows and columns.

    0 for independent pixels; near 1 for smooth ones. The residual's mean is 0 under the model, so it is not centred.
    """
    random = torch.Generator().manual_seed(seed)
    density = run.model.density(run.model.draw_latents(num_latents, random), num_latents)
    return lag1(density.sample(1, seed=seed)[0] - density.mean)


def lag1(residuals: Tensor) -> float:
    """Lag-1 autocorrelation of residuals (N, C, H, W), along rows and columns together."""
    residual = residuals.double()
    pairs = [(residual[..., 1:], residual[..., :-1]), (residual[..., 1:, :], residual[..., :-1, :])]
    covariance = sum((first * second).sum() for first, second in pairs)
    power = sum((first.square() + second.square()).sum() / 2 for first, second in pairs)
    return float(covariance / power)


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of samples at latents from the prior."""
    return {"lag-1 autocorrelation": Estimate(lag1_autocorrelation(run, seed=settings.seed))}


register(
    Measure("coherence", "lag-1 autocorrelation of (sample − mean); 0 for independent pixels", compute, usual=True)
)
