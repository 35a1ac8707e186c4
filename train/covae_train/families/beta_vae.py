"""β-VAE, the paper's baseline: independent pixels with a learned variance, the KL held at a target, entropy free."""

from __future__ import annotations

from math import expm1, log

from torch import Tensor, nn

from covae_train.config import RunConfig
from covae_train.densities import DiagonalNormal
from covae_train.image_model import DensityHead, ImageModel, pointwise_head
from covae_train.networks import Decoder, Encoder


class BetaVaeConfig(RunConfig):
    """`variance` is the smallest variance of a pixel; the learned part is added to it."""


class DiagonalHead(DensityHead):
    """Mean and variance by 1×1 convolutions; variance = softplus + ε, both ε at the start."""

    def __init__(self, in_width: int, channels: int, min_variance: float) -> None:
        super().__init__(in_width, channels)
        self.variance = pointwise_head(in_width, channels, log(expm1(min_variance)))
        self.softplus = nn.Softplus()
        self.min_variance, self.mean_variance = min_variance, 2 * min_variance

    def density(self, features: Tensor) -> DiagonalNormal:
        variance = self.softplus(self.variance(features)) + self.min_variance
        return DiagonalNormal(self.mean(features), variance, validate_args=False)


def build(config: BetaVaeConfig) -> ImageModel:
    """SOS-VAE's encoder and decoder with a diagonal head."""
    height, width, channels = config.image_shape
    return ImageModel(
        Encoder(channels, config.widths, config.latent_size),
        Decoder(config.latent_size, config.widths, height, width),
        DiagonalHead(config.widths[0], channels, config.variance),
        (config.latent_size,),
    )


def targets(config: BetaVaeConfig) -> dict[str, float]:
    """ξ_KL of equation 3; the paper found an entropy target detrimental to a β-VAE."""
    return {"kl": config.target_kl}
