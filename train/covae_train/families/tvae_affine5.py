"""Transformer VAE whose pose is a rotation, a shift and two scales, 5 numbers, without a shear."""

from __future__ import annotations

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.networks import posed
from covae_train.networks.warps import Affine5


def build(config: RunConfig) -> posed.PosedVae:
    """Dense networks around the warp."""
    return posed.build(config, Affine5)


register(
    Family(
        "tvae-affine5",
        "the same with a pose of rotation, scales and shift",
        posed.TurnedOptions,
        build,
        posed.phases,
        posed.defaults,
    )
)
