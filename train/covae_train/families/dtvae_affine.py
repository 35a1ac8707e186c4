"""Transformer VAE that estimates an affine pose, undoes it, and encodes the upright image (the thesis's DTVAE)."""

from __future__ import annotations

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.networks import posed
from covae_train.networks.warps import Affine


def build(config: RunConfig) -> posed.PosedVae:
    """Dense networks around the warp."""
    return posed.build(config, Affine, undone=True)


register(
    Family(
        "dtvae-affine",
        "an affine pose that is estimated, and undone before the rest is encoded",
        posed.PosedOptions,
        build,
        posed.phases,
        posed.defaults,
    )
)
