"""β-VAE, SOS-VAE's baseline: independent pixels with a learned variance, the KL held at a target, entropy free."""

from __future__ import annotations

from math import expm1, log
from typing import cast

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from covae_core.densities import DiagonalNormal
from covae_train.config import RunConfig
from covae_train.families import Constraints, Family, register
from covae_train.image_model import MeanFirstHead, Vae, pointwise_head
from covae_train.mean_first import everything, mean_alone
from covae_train.networks.residual import Decoder, Encoder, ResidualOptions, size_defaults
from covae_train.objective import Constraint
from covae_train.phases import Phase


class BetaVaeOptions(ResidualOptions):
    """β-VAE's own options."""

    variance: PositiveFloat = Field(1e-5, description="the smallest variance of a pixel; the learned part is added")


class DiagonalHead(MeanFirstHead):
    """Mean and variance by 1×1 convolutions; variance = softplus + ε, both ε at the start."""

    def __init__(self, in_width: int, channels: int, min_variance: float) -> None:
        super().__init__(in_width, channels, 2 * min_variance)
        self.variance = pointwise_head(in_width, channels, log(expm1(min_variance)))
        self.softplus = nn.Softplus()
        self.min_variance = min_variance

    def density(self, features: Tensor) -> DiagonalNormal:
        variance = self.softplus(self.variance(features)) + self.min_variance
        return DiagonalNormal(self.mean(features), variance, check=False)


def build(config: RunConfig) -> Vae:
    """SOS-VAE's encoder and decoder with a diagonal head."""
    options = cast(BetaVaeOptions, config.options)
    height, width, channels = config.image_shape
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        Decoder(options.latent_size, options.widths, height, width),
        DiagonalHead(options.widths[0], channels, options.variance),
        (options.latent_size,),
    )


def phases(config: RunConfig) -> list[Phase]:
    """The mean alone, then everything."""
    options = cast(BetaVaeOptions, config.options)
    return [
        Phase("mean", options.mean_epochs, options.mean_learning_rate, mean_alone, usable=False),
        Phase("all", options.epochs - options.mean_epochs, options.learning_rate, everything()),
    ]


def constraints(config: RunConfig) -> Constraints:
    """ξ_KL of equation 3; the paper found an entropy target detrimental to a β-VAE."""
    options = cast(BetaVaeOptions, config.options)
    kl = Constraint("kl", lambda terms: terms.kl, options.target_kl)
    return Constraints([kl], options.damping, options.multiplier_lr)


register(
    Family(
        "beta-vae",
        "independent pixels with a learned variance, KL at a target: SOS-VAE's baseline",
        BetaVaeOptions,
        build,
        phases,
        size_defaults,
        constraints,
    )
)
