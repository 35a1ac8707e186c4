"""Densities over images, written once for NumPy, torch and graphs traced for export."""

from collections.abc import Mapping

from covae_core.densities.base import Density, Drawable
from covae_core.densities.bernoulli import Bernoulli
from covae_core.densities.capabilities import Conditionable, HasComponents, HasEntropy, Whitening
from covae_core.densities.diagonal_normal import ConditionalDiagonalNormal, DiagonalNormal
from covae_core.densities.hybrid_normal import HybridNormal
from covae_core.densities.low_rank_normal import ConditionalLowRankNormal, LowRankNormal
from covae_core.densities.precision_conditional import PrecisionConditional
from covae_core.densities.slerp import slerp
from covae_core.densities.sparse_precision_normal import SparsePrecisionNormal
from covae_core.densities.ycbcr_normal import YCbCrNormal

# Every density by the name that a model's config gives it (contract.ModelSpec.density).
DENSITIES: Mapping[str, type[Density]] = {
    density.kind: density
    for density in (LowRankNormal, DiagonalNormal, SparsePrecisionNormal, HybridNormal, YCbCrNormal, Bernoulli)
}

__all__ = [
    "DENSITIES",
    "Bernoulli",
    "Conditionable",
    "ConditionalDiagonalNormal",
    "ConditionalLowRankNormal",
    "Density",
    "DiagonalNormal",
    "Drawable",
    "HasComponents",
    "HasEntropy",
    "HybridNormal",
    "LowRankNormal",
    "PrecisionConditional",
    "SparsePrecisionNormal",
    "Whitening",
    "YCbCrNormal",
    "slerp",
]
