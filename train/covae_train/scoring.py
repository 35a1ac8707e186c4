"""Importance weights of images under a model: what `score` and evaluation are made of."""

from __future__ import annotations

from torch import Tensor

from covae_train.densities import DENSITIES, Density
from covae_train.image_model import ImageModel, Posterior, prior_log_prob


def log_weights(model: ImageModel, images: Tensor, noise: Tensor) -> Tensor:
    """log p(x|z) + log p(z) − log q(z|x) for each of M draws of z from q(z|x), in nats.

    The log-densities are evaluated in float64 on the network's outputs: with D = 1e-5 a squared residual is multiplied
    by 10⁵, so the sums that make a log-density are too large for float32.

    Args:
        images: (B, C, H, W) in [0, 1]
        noise: standard normal, (B, M, *latent_shape)

    Returns: (B, M) float64
    """
    samples = noise.shape[1]
    posterior = Posterior(*(_repeat(value, samples) for value in model.posterior(images)))
    latent = posterior.draw(noise.flatten(0, 1))
    log_prob = in_float64(model.density(latent)).log_prob(_repeat(images.double(), samples))
    latent, posterior = latent.double(), Posterior(posterior.mean.double(), posterior.scale.double())
    weights = log_prob + prior_log_prob(latent) - posterior.log_prob(latent)
    return weights.reshape(-1, samples)


def in_float64(density: Density) -> Density:
    """The same density with float64 parameters."""
    parameters = {name: value.double() for name, value in density.parameters.items()}
    return DENSITIES[density.kind](density.mean.double(), **parameters, validate_args=False)


def _repeat(rows: Tensor, times: int) -> Tensor:
    """Each row `times` times in a row. shape: (B, …) → (B · times, …)"""
    return rows.unsqueeze(1).expand(-1, times, *rows.shape[1:]).flatten(0, 1)
