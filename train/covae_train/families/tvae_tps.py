"""Transformer VAE whose pose is a thin-plate spline over 3×3 control points, 18 numbers."""

from __future__ import annotations

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.networks import posed
from covae_train.networks.warps import ThinPlate


def build(config: RunConfig) -> posed.PosedVae:
    """Dense networks around the warp."""
    return posed.build(config, ThinPlate)


register(
    Family(
        "tvae-tps",
        "the same with a thin-plate spline for a pose",
        posed.PosedOptions,
        build,
        posed.phases,
        posed.defaults,
    )
)
