"""The plain VAE, a vector for a latent: the Spatial VAE paper's baseline (eq. 2 and 3)."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.networks import spatial
from covae_train.posteriors import NormalPosterior, normal_posterior


def posterior(outputs: Tensor) -> NormalPosterior:
    """Means, then log-variances. outputs: (B, 2 L)"""
    size = outputs.shape[1] // 2
    return normal_posterior(outputs[:, :size], outputs[:, size:])


def build(config: RunConfig) -> Vae:
    """2 L encoder outputs."""
    size = cast(spatial.VectorOptions, config.options).latent_size
    return spatial.build(config, 2 * size, posterior, (size,))


register(
    Family(
        "vae",
        "plain VAE with a vector for a latent and one σ²: the Spatial VAE paper's baseline",
        spatial.VectorOptions,
        build,
        spatial.phases,
        lambda shape: spatial.defaults(shape, vector=True),
    )
)
