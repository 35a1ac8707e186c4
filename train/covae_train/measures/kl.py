"""What a posterior tells, and how far all of them together are from the prior (Hoffman & Johnson 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi

import torch
from torch import Tensor

from covae_train.data import ImageData, in_units
from covae_train.measures import Estimate, Measure, Settings, mean_of, needs_encoder, register
from covae_train.run import TrainedRun

ROWS = 256
# The mutual information's estimate cannot exceed log N; this near to it, it says nothing but that.
SATURATED = 0.1


@torch.no_grad()
def codes(run: TrainedRun, images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of images, their posteriors' means and scales, a draw of each, (N, L) float64, and the KL to the prior, (N,).

    images: (N, C, H, W) uint8; latents are put one after the other.
    """
    random = torch.Generator().manual_seed(seed)
    rows: list[tuple[Tensor, ...]] = []
    for batch in torch.split(images, ROWS):
        posteriors = {name: item.to(torch.float64) for name, item in run.model.posteriors(in_units(batch)).items()}
        noise = run.model.latent_noise((len(batch),), random)
        parts = [(item.mean, item.scale, item.draw(noise[name].double())) for name, item in posteriors.items()]
        kls = [item.kl(run.model.prior(name)) for name, item in posteriors.items()]
        joined = [torch.cat([part.flatten(1) for part in kind], 1) for kind in zip(*parts, strict=True)]
        rows.append((*joined, torch.stack(kls).sum(0)))
    means, scales, draws, kl = (torch.cat(part) for part in zip(*rows, strict=True))
    return means, scales, draws, kl


def log_densities(draws: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """log q(z_n|x_m), as matrix products. shape: (B, L), (N, L), (N, L) → (B, N)"""
    precisions = scales.square().reciprocal()
    squares = draws.square() @ precisions.mT - 2 * draws @ (means * precisions).mT
    constants = (means.square() * precisions).sum(1) + 2 * scales.log().sum(1) + draws.shape[1] * log(2 * pi)
    return -0.5 * (squares + constants)


def information(means: Tensor, scales: Tensor, draws: Tensor) -> Tensor:
    """log q(z_n|x_n) − log q(z_n) of each draw, whose mean is the mutual information; q(z) = (1/N) Σ q(z|x_m).

    Blockwise: nothing of N×N is kept. shape: (N,)
    """
    found = []
    for first in range(0, len(draws), ROWS):
        logs = log_densities(draws[first : first + ROWS], means, scales)
        found.append(logs.diagonal(first) - logs.logsumexp(1) + log(len(means)))
    return torch.cat(found)


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images, one draw of each: the average KL is the sum of the two others, exactly."""
    means, scales, draws, kl = codes(run, data.held_out[: settings.images], settings.seed)
    mutual = information(means, scales, draws)
    most = log(len(means))
    name = "mutual information" + (" (saturated: log N)" if float(mutual.mean()) > most - SATURATED else "")
    return {
        "average KL": mean_of(kl, 2),
        name: mean_of(mutual, 2),
        "marginal KL": Estimate(float(kl.mean() - mutual.mean()), None, 2),
    }


def needs_latents(run: TrainedRun) -> str | None:
    """What a run lacks."""
    return needs_encoder(run) if run.model.latents else "a latent"


register(
    Measure(
        "kl",
        "average KL, mutual information of images and latents, and the marginal KL that is left",
        compute,
        needs_latents,
    )
)
