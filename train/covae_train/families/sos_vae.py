"""SOS-VAE: the pixels' density is low-rank plus diagonal, N(μ, P Pᵀ + ε I), its entropy held at a target."""

from __future__ import annotations

from collections.abc import Iterable
from math import e, log, pi
from typing import Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from covae_core.errors import InvalidArgument
from covae_train.config import RunConfig, default_kappa
from covae_train.densities import LowRankNormal
from covae_train.densities.factor_posterior import gram
from covae_train.image_model import DensityHead, ImageModel, pointwise_head
from covae_train.networks import Decoder, Encoder


class SosVaeConfig(RunConfig):
    """SOS-VAE's own options.

    rank: R. kappa: the entropy target's nats per component above the floor (None: `default_kappa`).
    residual_start: the factor begins phase `all` as the principal components of the residuals (`residual_components`;
    false: next to nothing, the paper).
    mean_share: how much of phase `mean`'s −log N(x; μ, D) stays on in phase `all` and holds the mean (0: the paper).
    """

    rank: PositiveInt
    kappa: PositiveFloat | None = None
    residual_start: bool = False
    mean_share: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        limit = self.widths[0] * self.image_shape[2]
        if self.rank > limit:
            raise ValueError(
                f"rank: found {self.rank}; a 1x1 factor head on widths[0] = {self.widths[0]} feature maps of "
                f"{self.image_shape[2]} channel(s) spans at most {limit}: widen widths[0] or lower rank"
            )
        return self


class LowRankHead(DensityHead):
    """Mean and factor by 1×1 convolutions; D is the constant ε (section 3.3: the optimisation tricks)."""

    def __init__(
        self,
        in_width: int,
        channels: int,
        rank: int,
        variance: float,
        mean_share: float = 0.0,
        residual_start: bool = False,
    ) -> None:
        super().__init__(in_width, channels)
        self.factor = pointwise_head(in_width, rank * channels, 0.0)
        self.rank, self.mean_variance, self.mean_share = rank, variance, mean_share
        self.residual_start = residual_start

    def density(self, features: Tensor) -> LowRankNormal:
        factor = self.factor(features).unflatten(1, (self.rank, -1))  # shape: (B, R, C, H, W)
        return LowRankNormal(self.mean(features), factor, self.mean_variance, validate_args=False)

    def start_spread(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Begin with the residuals' principal components; columns that there are none for keep their first weights."""
        if not self.residual_start:
            return
        pairs = ((features, images - self.mean(features)) for features, images in batches)
        weights = residual_components(pairs, self.rank).flatten(0, 1).to(self.factor.weight)  # shape: (R·C, F + 1)
        found = weights.any(1)
        assert self.factor.bias is not None
        self.factor.weight[found] = weights[found, :-1, None, None]
        self.factor.bias[found] = weights[found, -1]


def residual_components(pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """Weights of the R columns, linear in the features, along which residuals vary most.

    With φ the F features and a constant 1 at every pixel, a column is p = Σ w_cf φ_f on channel c. Of all columns, the
    first maximises ρ = E[(pᵀr)²] / E[pᵀp], each next one the same among those orthogonal to the earlier ones on
    average: the generalised eigenvectors of E[g gᵀ], g_cf = φ_fᵀ r_c, and I_C ⊗ E[Σ φ φᵀ], the sum over pixels. The
    columns are scaled to E[pᵀp] = ρ: up to the negligible D, what maximises the likelihood where the features are the
    same for every image (probabilistic principal component analysis, Tipping & Bishop 1999).

    Args:
        pairs: features (B, F, H, W) and residuals r (B, C, H, W) of images, in batches
        rank: R

    Returns: (R, C, F + 1), the constant's weight last; float64. Columns that the features cannot make are zero.

    Raises:
        InvalidArgument: a feature or a residual is not finite.
    """
    grams, projections = [], []
    for features, residuals in pairs:
        maps = torch.cat([features, torch.ones_like(features[:, :1])], 1).flatten(2)  # shape: (B, F + 1, H·W)
        grams.append(gram(maps, None).sum(0))
        projections.append((residuals.flatten(2) @ maps.mT).double())  # shape: (B, C, F + 1)
    projection = torch.cat(projections)
    count, channels, _ = projection.shape
    second_moment = torch.stack(grams).sum(0) / count
    if not (torch.isfinite(projection).all() and torch.isfinite(second_moment).all()):
        raise InvalidArgument("residual_components: found NaN or infinite features or residuals; expected finite ones")
    scales, axes = torch.linalg.eigh(second_moment)
    made = scales > 1e-6 * scales[-1]  # float32 features say nothing about smaller ones
    whiten = axes[:, made] / scales[made].sqrt()
    white = (projection @ whiten).flatten(1)  # shape: (B, C·K), K the features that are linearly independent
    variances, vectors = torch.linalg.eigh(white.mT @ white / count)
    columns = (vectors * variances.clamp(min=0).sqrt()).mT.flip(0)[:rank]
    weights = columns.unflatten(1, (channels, -1)) @ whiten.mT
    return torch.cat([weights, weights.new_zeros(rank - len(weights), *weights.shape[1:])])


def build(config: SosVaeConfig) -> ImageModel:
    """The paper's encoder and decoder with a low-rank head."""
    height, width, channels = config.image_shape
    return ImageModel(
        Encoder(channels, config.widths, config.latent_size),
        Decoder(config.latent_size, config.widths, height, width),
        LowRankHead(config.widths[0], channels, config.rank, config.variance, config.mean_share, config.residual_start),
        (config.latent_size,),
    )


def targets(config: SosVaeConfig) -> dict[str, float]:
    """ξ_KL and ξ_H of equation 3; ξ_H = floor + κ R, the floor being the entropy of N(μ, ε I)."""
    kappa = config.kappa or default_kappa(config.image_size, config.rank, config.variance)
    floor = 0.5 * config.image_size * log(2 * pi * e * config.variance)
    return {"kl": config.target_kl, "entropy": floor + kappa * config.rank}
