"""β-VAE, SOS-VAE's baseline: independent pixels with a learned variance, the KL held at a target, entropy free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import Field, PositiveFloat
from torch import Tensor

from covae_core.densities import DiagonalNormal
from covae_train.config import ImageShape, RunConfig
from covae_train.families import Constraints, Family, register
from covae_train.image_model import MeanFirstHead, Vae
from covae_train.mean_first import ObjectiveOptions, likelihood, likelihood_phases, objective_defaults, paper_phases
from covae_train.networks.residual import Decoder, Encoder, size_defaults
from covae_train.phases import Phase


class BetaVaeOptions(ObjectiveOptions):
    """β-VAE's own options."""

    variance: PositiveFloat = Field(
        1e-5, description="of the paper's objective, the smallest variance of a pixel; the learned part is added"
    )


class DiagonalHead(MeanFirstHead):
    """Mean and variance by 1×1 convolutions; variance = softplus + ε, both ε at the start."""

    def __init__(self, in_width: int, channels: int, min_variance: float) -> None:
        super().__init__(in_width, channels, 2 * min_variance, min_variance)

    def density(self, features: Tensor) -> DiagonalNormal:
        return DiagonalNormal(self.mean_of(features), self.variances(features), check=False)


def build(config: RunConfig) -> Vae:
    """SOS-VAE's encoder and decoder with a diagonal head."""
    options = cast(BetaVaeOptions, config.options)
    height, width, channels = config.image_shape
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        Decoder(options.latent_size, options.widths, height, width),
        DiagonalHead(options.widths[0], channels, options.variance if options.objective == "paper" else options.floor),
        (options.latent_size,),
    )


def phases(config: RunConfig) -> list[Phase]:
    """The mean alone, then everything."""
    options = cast(BetaVaeOptions, config.options)
    return paper_phases(options) if options.objective == "paper" else likelihood_phases(options, likelihood())


def defaults(image_shape: ImageShape) -> Mapping[str, Any]:
    """Those of the networks, and the likelihood as the objective."""
    return {**size_defaults(image_shape), **objective_defaults(image_shape)}


def constraints(config: RunConfig) -> Constraints:
    """ξ_KL of equation 3; the paper found an entropy target detrimental to a β-VAE."""
    options = cast(BetaVaeOptions, config.options)
    return options.held(config, [options.kl()])


register(
    Family(
        "beta-vae",
        "independent pixels with a learned variance, KL at a target: SOS-VAE's baseline",
        BetaVaeOptions,
        build,
        phases,
        defaults,
        constraints,
    )
)
