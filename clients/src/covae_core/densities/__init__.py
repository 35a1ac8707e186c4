"""Densities over images in NumPy: the client's half of the algebra that covae_train.densities has in torch."""

from collections.abc import Mapping

from covae_core.densities.base import Density, Drawable
from covae_core.densities.diagonal_normal import ConditionalDiagonalNormal, DiagonalNormal
from covae_core.densities.low_rank_normal import ConditionalLowRankNormal, LowRankNormal
from covae_core.densities.slerp import slerp

# Every density by the name that a model's config gives it (contract.ModelSpec.density).
DENSITIES: Mapping[str, type[LowRankNormal] | type[DiagonalNormal]] = {
    density.kind: density for density in (LowRankNormal, DiagonalNormal)
}

__all__ = [
    "DENSITIES",
    "ConditionalDiagonalNormal",
    "ConditionalLowRankNormal",
    "Density",
    "DiagonalNormal",
    "Drawable",
    "LowRankNormal",
    "slerp",
]
