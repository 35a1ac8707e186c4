"""SOS-VAE: the pixels' density is low-rank plus diagonal, N(μ, P Pᵀ + ε I), its entropy held at a target."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import e, log, pi
from typing import Any, Self, cast

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from covae_core.densities import LowRankNormal
from covae_train.config import ImageShape, RunConfig
from covae_train.factor import FactorHead, begin_at_residuals, check_rank, fit_factor
from covae_train.families import Constraints, Family, register
from covae_train.image_model import Vae
from covae_train.mean_first import (
    Hold,
    ObjectiveOptions,
    likelihood,
    likelihood_phases,
    objective_defaults,
    paper_phases,
)
from covae_train.networks.residual import Decoder, Encoder, size_defaults
from covae_train.objective import Constraint
from covae_train.phases import Phase

# The spread that the default entropy target grants a pixel. It gives κ = 5.7 for grey 64×64 images and 7.3 for the
# paper's CelebA, where the paper has 5.5 and 7.6.
DEFAULT_PIXEL_VARIANCE = 0.005
# The side of the factor's convolution, where not the paper has it.
FACTOR_KERNEL = 3
# Up to this side the factor begins at the residuals and the mean is held; above, as the paper has it.
SMALL_SIDE = 32


class SosVaeOptions(ObjectiveOptions):
    """SOS-VAE's own options."""

    rank: PositiveInt = Field(description="R, columns of the factor")
    factor_kernel: PositiveInt = Field(
        default_factory=lambda given: 1 if given.get("objective") == "paper" else FACTOR_KERNEL,
        description="side of the convolution that makes the factor, odd  "
        f"[{FACTOR_KERNEL}; of the paper's objective: 1]",
    )
    variance: PositiveFloat = Field(1e-5, description="D, a pixel's independent variance in samples")
    kappa: PositiveFloat | None = Field(
        None,
        description="of the paper's objective: entropy target above its floor, nats per column of the factor  "
        "[by size, rank and variance]",
    )
    residual_start: bool = Field(
        False,
        description="the factor begins as the principal components of the residuals; else at next to nothing, as in "
        "the paper",
    )
    hold: Hold = Field(
        "joint",
        description="of the likelihood, what holds the mean: the squared error beside the density (joint), it alone "
        "(apart), or nothing (none)",
    )
    mean_share: float = Field(
        0.0,
        ge=0,
        description="of the paper's objective: share of the first phase's loss that goes on holding the mean",
    )

    @model_validator(mode="after")
    def _check_kernel(self) -> Self:
        if self.factor_kernel % 2 == 0:
            raise ValueError(f"factor_kernel: found {self.factor_kernel}; expected an odd number")
        return self


class LowRankHead(FactorHead):
    """Mean and factor by 1×1 and k×k convolutions; D is the constant ε (section 3.3: the optimisation tricks).

    With a floor there is a second variance D, learned: images are scored with it, and drawn with ε.
    """

    def density(self, features: Tensor) -> LowRankNormal:
        found = LowRankNormal(self.mean_of(features), self.columns(features), self.mean_variance, check=False)
        return found.made_by(partial(self.along, features))

    def densities(self, features: Tensor) -> tuple[LowRankNormal, LowRankNormal]:
        drawing = self.density(features)
        return drawing, drawing if self.variance is None else self.around(drawing.mean, features)

    def around(self, mean: Tensor, features: Tensor) -> LowRankNormal:
        return LowRankNormal(mean, self.columns(features), self.variances(features), check=False)


def build(config: RunConfig) -> Vae:
    """The paper's encoder and decoder with a low-rank head.

    Raises:
        InvalidArgument: the rank is more than a convolution of the first width can span.
    """
    options = cast(SosVaeOptions, config.options)
    height, width, channels = config.image_shape
    check_rank(options.rank, options.factor_kernel, options.widths[0], channels)
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        Decoder(options.latent_size, options.widths, height, width),
        LowRankHead(
            options.widths[0],
            channels,
            options.rank,
            options.variance,
            None if options.objective == "paper" else options.floor,
            options.factor_kernel,
        ),
        (options.latent_size,),
    )


def defaults(image_shape: ImageShape) -> Mapping[str, Any]:
    """Up to 32×32 eight columns, for the paper's objective with a held mean; above, the paper's 25."""
    small = max(image_shape[:2]) <= SMALL_SIDE
    own: dict[str, Any] = {"rank": 8, "mean_share": 0.05} if small else {"rank": 25}
    own["residual_start"] = small
    return {**size_defaults(image_shape), **objective_defaults(image_shape), **own}


def phases(config: RunConfig) -> list[Phase]:
    """The paper's: the mean alone, then everything, the factor beginning at the residuals if asked to.

    For the likelihood: the mean alone, then independent pixels, then the factor on what these have become.
    """
    options = cast(SosVaeOptions, config.options)
    if options.objective == "paper":
        begin = begin_at_residuals if options.residual_start and options.mean_epochs else None
        return paper_phases(options, options.mean_share, begin)
    return [*likelihood_phases(options, likelihood(options.hold)), Phase("factor", 0, begin=fit_factor)]


def default_kappa(image_size: int, rank: int, variance: float) -> float:
    """κ, nats of entropy per component above the floor, at which a pixel's variance is about DEFAULT_PIXEL_VARIANCE.

    R equal components of variance v·S/R each raise the entropy by κ = ½ log(1 + v S / (R D)).
    """
    return round(0.5 * log(1 + DEFAULT_PIXEL_VARIANCE * image_size / (rank * variance)), 2)


def constraints(config: RunConfig) -> Constraints:
    """ξ_KL and ξ_H of equation 3; ξ_H = floor + κ R, the floor being the entropy of N(μ, ε I)."""
    options = cast(SosVaeOptions, config.options)
    kappa = options.kappa or default_kappa(config.image_size, options.rank, options.variance)
    floor = 0.5 * config.image_size * log(2 * pi * e * options.variance)
    if options.objective == "likelihood":
        return options.held(config, [options.kl()])
    entropy = Constraint("entropy", lambda terms: terms.entropy, floor + kappa * options.rank)
    return options.held(config, [options.kl(), entropy])


register(
    Family(
        "sos-vae",
        "low-rank normal over images: pixels vary together (SOS-VAE, 2022)",
        SosVaeOptions,
        build,
        phases,
        defaults,
        constraints,
    )
)
