"""Naive spatial VAE: N feature maps of independent normals for a latent (Spatial VAE section 3.2)."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.networks import spatial
from covae_train.networks.spatial import MAP_SIDE
from covae_train.posteriors import NormalPosterior, normal_posterior


def posterior(outputs: Tensor) -> NormalPosterior:
    """Means, then log-variances. outputs: (B, 2 d² N)"""
    size = outputs.shape[1] // 2
    shape = (-1, size // MAP_SIDE**2, MAP_SIDE, MAP_SIDE)
    return normal_posterior(outputs[:, :size].reshape(shape), outputs[:, size:].reshape(shape))


def build(config: RunConfig) -> Vae:
    """2 d² N encoder outputs."""
    maps = cast(spatial.MapOptions, config.options).maps
    return spatial.build(config, 2 * MAP_SIDE**2 * maps, posterior, (maps, MAP_SIDE, MAP_SIDE))


register(
    Family(
        "spatial-naive",
        "VAE with 3×3 feature maps for a latent, all independent",
        spatial.MapOptions,
        build,
        spatial.phases,
        lambda shape: spatial.defaults(shape, vector=False),
    )
)
