"""SOS-VAE: the pixels' density is low-rank plus diagonal, N(μ, P Pᵀ + ε I), its entropy held at a target."""

from __future__ import annotations

from math import e, log, pi
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from covae_train.config import RunConfig, default_kappa
from covae_train.densities import LowRankNormal
from covae_train.image_model import DensityHead, ImageModel, pointwise_head
from covae_train.networks import Decoder, Encoder

# The share of κ R that a rising entropy target grants from the start.
FIRST_SHARE = 0.6


class SosVaeConfig(RunConfig):
    """SOS-VAE's own options.

    rank: R. kappa: the entropy target's nats per component above the floor (None: `default_kappa`). entropy_rise: the
    share of phase `all` over which the entropy target rises to its full height (0: the paper's constant target).
    mean_share: how much of phase `mean`'s −log N(x; μ, D) stays on in phase `all` and holds the mean (0: the paper).
    """

    rank: PositiveInt
    kappa: PositiveFloat | None = None
    entropy_rise: float = Field(default=0.0, ge=0, le=1)
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

    def __init__(self, in_width: int, channels: int, rank: int, variance: float, mean_share: float = 0.0) -> None:
        super().__init__(in_width, channels)
        self.factor = pointwise_head(in_width, rank * channels, 0.0)
        self.rank, self.mean_variance, self.mean_share = rank, variance, mean_share

    def density(self, features: Tensor) -> LowRankNormal:
        factor = self.factor(features).unflatten(1, (self.rank, -1))  # shape: (B, R, C, H, W)
        return LowRankNormal(self.mean(features), factor, self.mean_variance, validate_args=False)


def build(config: SosVaeConfig) -> ImageModel:
    """The paper's encoder and decoder with a low-rank head."""
    height, width, channels = config.image_shape
    return ImageModel(
        Encoder(channels, config.widths, config.latent_size),
        Decoder(config.latent_size, config.widths, height, width),
        LowRankHead(config.widths[0], channels, config.rank, config.variance, config.mean_share),
        (config.latent_size,),
    )


def targets(config: SosVaeConfig, progress: float) -> dict[str, float]:
    """ξ_KL and ξ_H of equation 3; ξ_H = floor + κ R, the floor being the entropy of N(μ, ε I).

    With `entropy_rise`, ξ_H starts lower. Granted all at once, the entropy is taken by whatever direction the untrained
    factor has, such as the whole background's brightness.
    """
    kappa = config.kappa or default_kappa(config.image_size, config.rank, config.variance)
    floor = 0.5 * config.image_size * log(2 * pi * e * config.variance)
    risen = min(progress / config.entropy_rise, 1.0) if config.entropy_rise else 1.0
    share = FIRST_SHARE + (1 - FIRST_SHARE) * risen
    return {"kl": config.target_kl, "entropy": floor + share * kappa * config.rank}
