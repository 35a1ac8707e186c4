"""SOS-VAE: the pixels' density is low-rank plus diagonal, N(μ, P Pᵀ + ε I), its entropy held at a target."""

from __future__ import annotations

from math import e, log, pi
from typing import Self

from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from covae_train.config import RunConfig, default_kappa
from covae_train.densities import LowRankNormal
from covae_train.image_model import DensityHead, ImageModel, pointwise_head
from covae_train.networks import Decoder, Encoder


class SosVaeConfig(RunConfig):
    """SOS-VAE's own options.

    rank: R. kappa: the entropy target's nats per component above the floor (None: `default_kappa`). learning_rate: the
    paper's; with larger steps the mean wanders off once the factor explains most of a residual.
    """

    learning_rate: PositiveFloat = 1e-4
    rank: PositiveInt
    kappa: PositiveFloat | None = None

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

    def __init__(self, in_width: int, channels: int, rank: int, variance: float) -> None:
        super().__init__(in_width, channels)
        self.factor = pointwise_head(in_width, rank * channels, 0.0)
        self.rank, self.mean_variance = rank, variance

    def density(self, features: Tensor) -> LowRankNormal:
        factor = self.factor(features).unflatten(1, (self.rank, -1))  # shape: (B, R, C, H, W)
        return LowRankNormal(self.mean(features), factor, self.mean_variance, validate_args=False)


def build(config: SosVaeConfig) -> ImageModel:
    """The paper's encoder and decoder with a low-rank head."""
    height, width, channels = config.image_shape
    return ImageModel(
        Encoder(channels, config.widths, config.latent_size),
        Decoder(config.latent_size, config.widths, height, width),
        LowRankHead(config.widths[0], channels, config.rank, config.variance),
        (config.latent_size,),
    )


def targets(config: SosVaeConfig) -> dict[str, float]:
    """ξ_KL and ξ_H of equation 3; ξ_H = floor + κ R, the floor being the entropy of N(μ, ε I)."""
    kappa = config.kappa or default_kappa(config.image_size, config.rank, config.variance)
    floor = 0.5 * config.image_size * log(2 * pi * e * config.variance)
    return {"kl": config.target_kl, "entropy": floor + kappa * config.rank}
