"""Transformer VAE with any affine map for a pose, 6 numbers (the thesis's TVAE)."""

from __future__ import annotations

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.networks import posed
from covae_train.networks.warps import Affine


def build(config: RunConfig) -> posed.PosedVae:
    """Dense networks around the warp."""
    return posed.build(config, Affine)


register(
    Family(
        "tvae-affine",
        "an upright image and an affine pose: the Transformer VAE",
        posed.PosedOptions,
        build,
        posed.phases,
        posed.defaults,
    )
)
