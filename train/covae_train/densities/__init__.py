"""Densities over images in torch: the half of the algebra, beside covae_core.densities, that trains and exports."""

from collections.abc import Mapping

from covae_train.densities.base import Density, Drawable
from covae_train.densities.diagonal_normal import ConditionalDiagonalNormal, DiagonalNormal
from covae_train.densities.low_rank_normal import ConditionalLowRankNormal, LowRankNormal
from covae_train.densities.slerp import slerp

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
