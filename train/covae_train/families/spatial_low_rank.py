"""Spatial VAE via low-rank matrix-variate normals: M = μ νᵀ as well (Spatial VAE eqs. 8 and 9)."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.networks import spatial
from covae_train.networks.spatial import MAP_SIDE
from covae_train.posteriors import MatrixNormalPosterior


def posterior(outputs: Tensor) -> MatrixNormalPosterior:
    """Of each map in turn μ, log Ω's diagonal, ν, log Ψ's diagonal, as the released code has it. outputs: (B, 4 d N)"""
    parts = outputs.reshape(-1, outputs.shape[1] // (4 * MAP_SIDE), 4, MAP_SIDE)
    return MatrixNormalPosterior((parts[:, :, 0], parts[:, :, 2]), parts[:, :, 1], parts[:, :, 3])


def build(config: RunConfig) -> Vae:
    """4 d N encoder outputs."""
    maps = cast(spatial.MapOptions, config.options).maps
    return spatial.build(config, 4 * MAP_SIDE * maps, posterior, (maps, MAP_SIDE, MAP_SIDE))


register(
    Family(
        "spatial-low-rank",
        "VAE with 3×3 feature maps for a latent, means of rank 1: the Spatial VAE paper's own",
        spatial.MapOptions,
        build,
        spatial.phases,
        lambda shape: spatial.defaults(shape, vector=False),
    )
)
