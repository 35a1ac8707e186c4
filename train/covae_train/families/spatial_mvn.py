"""Spatial VAE via matrix-variate normals: each feature map N(M, Ω ⊗ Ψ), diagonal Ω and Ψ (Spatial VAE eqs. 5 to 7)."""

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
    """M, then the logarithms of Ω's and of Ψ's diagonals. outputs: (B, (d² + 2d) N)"""
    maps = outputs.shape[1] // (MAP_SIDE**2 + 2 * MAP_SIDE)
    means, rows = maps * MAP_SIDE**2, maps * MAP_SIDE
    return MatrixNormalPosterior(
        outputs[:, :means].reshape(-1, maps, MAP_SIDE, MAP_SIDE),
        outputs[:, means : means + rows].reshape(-1, maps, MAP_SIDE),
        outputs[:, means + rows :].reshape(-1, maps, MAP_SIDE),
    )


def build(config: RunConfig) -> Vae:
    """(d² + 2d) N encoder outputs."""
    maps = cast(spatial.MapOptions, config.options).maps
    return spatial.build(config, (MAP_SIDE**2 + 2 * MAP_SIDE) * maps, posterior, (maps, MAP_SIDE, MAP_SIDE))


register(
    Family(
        "spatial-mvn",
        "VAE with 3×3 feature maps for a latent, variances tied by rows and columns",
        spatial.MapOptions,
        build,
        spatial.phases,
        lambda shape: spatial.defaults(shape, vector=False),
    )
)
