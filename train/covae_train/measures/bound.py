"""Likelihood bounds of held-out images: importance-weighted, and the ELBO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log

import torch
from torch import Tensor

from covae_core.errors import InvalidArgument
from covae_core.importance import importance_weights
from covae_train.data import ImageData
from covae_train.measures import Estimate, Settings, mean_of, needs_encoder, paired_measure, register
from covae_train.run import TrainedRun


def importance_bounds(
    run: TrainedRun,
    images: Tensor,
    num_samples: int = 100,
    seed: int = 0,
    on_image: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound log (1/K) Σ wₖ and the ELBO (1/K) Σ log wₖ of each image, in nats.

    Both are log p(x) itself for a model without latents. images: (N, C, H, W) uint8, dequantised if the run's were, and
    then the bound is one of the log-probability of the grey levels, plus log 255 a number; returns two of (N,) float64
    """
    return bounds_of_units(run, run.units(images, seed), num_samples, seed, on_image)


@torch.no_grad()
def bounds_of_units(
    run: TrainedRun, images: Tensor, num_samples: int, seed: int, on_image: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """`importance_bounds` of images (N, C, H, W) in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    weights = []
    for image in images:
        noise = run.model.latent_noise((1, num_samples), random)
        weights.append(importance_weights(run.model, image[None], noise).log_weight)
        on_image()
    logs = torch.cat(weights)
    return logs.logsumexp(1) - log(logs.shape[1]), logs.mean(1)


def measured(run: TrainedRun, data: ImageData, settings: Settings) -> tuple[Tensor, Mapping[str, Estimate]]:
    """The bounds of the first held-out images, (N,) float64, and the figures that they make, in nats per image.

    Raises:
        InvalidArgument: fewer than two images: a standard error over images needs them.
    """
    images = data.held_out[: settings.images]
    if len(images) < 2:
        raise InvalidArgument(f"{run.run_id}: found {len(images)} held-out image(s); expected 2 or more")
    bounds, elbos = importance_bounds(run, images, settings.samples, settings.seed, settings.on_image)
    heading = f"log-likelihood bound, K = {settings.samples}" if run.model.latents else "log-likelihood"
    figures = {heading: mean_of(bounds, 1), "its deviation over images": Estimate(float(bounds.std()), None, 1)}
    return bounds, figures | ({"ELBO": mean_of(elbos, 1)} if run.model.latents else {})


def compare(first: Tensor, second: Tensor) -> dict[str, Estimate]:
    """The difference of two runs' bounds of the same images."""
    return {"log-likelihood bound, nats": mean_of(first - second, 1)}


register(
    paired_measure(
        "bound",
        "importance-weighted log-likelihood bound, nats an image",
        measured,
        compare,
        needs_encoder,
        usual=True,
    )
)
