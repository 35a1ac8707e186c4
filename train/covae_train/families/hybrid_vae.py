"""Hybrid VAE: a factor for what varies together across the image, a sparse precision for what does nearby."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self, cast

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from covae_core.densities import HybridNormal, SparsePrecisionNormal
from covae_core.densities.neighbourhood import Neighbourhood
from covae_train.config import ImageShape, RunConfig
from covae_train.factor import FactorHead, check_rank, fit_factor
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.mean_first import likelihood, likelihood_phases
from covae_train.networks.residual import Decoder, Encoder
from covae_train.phases import Phase
from covae_train.structured import (
    FilterMaps,
    StructuredOptions,
    begin_local,
    pattern,
    structured_constraints,
    structured_defaults,
)

RANK, FACTOR_KERNEL = 16, 3
# Of the filters, while the factor is fitted.
FILTER_RATE = 0.002


class HybridVaeOptions(StructuredOptions):
    """Hybrid VAE's own options; there is no paper, and the likelihood is the only objective."""

    rank: PositiveInt = Field(RANK, description="R, columns of the factor")
    factor_kernel: PositiveInt = Field(FACTOR_KERNEL, description="side of the convolution that makes the factor, odd")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.factor_kernel % 2 == 0:
            raise ValueError(f"factor_kernel: found {self.factor_kernel}; expected an odd number")
        if self.objective != "likelihood":
            raise ValueError(f"objective: found {self.objective!r}; expected likelihood, as no paper has this family")
        return self


class HybridHead(FactorHead):
    """Mean, factor, filters and a pixel's variance given the later ones and the factor."""

    def __init__(
        self,
        in_width: int,
        channels: int,
        rank: int,
        floor: float,
        kernel: int,
        neighbourhood: Neighbourhood,
        basis: int | None,
    ) -> None:
        super().__init__(in_width, channels, rank, 2 * floor, floor, kernel)
        self.filters = FilterMaps(in_width, channels, neighbourhood, basis)

    def local(self, mean: Tensor, features: Tensor) -> SparsePrecisionNormal:
        return SparsePrecisionNormal(mean, self.filters(features), self.variances(features), check=False)

    def around(self, mean: Tensor, features: Tensor) -> HybridNormal:
        parts = {"filters": self.filters(features), "variance": self.variances(features)}
        found = HybridNormal(mean, self.columns(features), **parts, check=False)
        return found.made_by(partial(self.along, features))

    def density(self, features: Tensor) -> HybridNormal:
        return self.around(self.mean_of(features), features)

    def rates(self) -> dict[float, list[nn.Parameter]]:
        return {**super().rates(), FILTER_RATE: list(self.filters.parameters())}


def build(config: RunConfig) -> Vae:
    """SOS-VAE's encoder and decoder with a hybrid head.

    Raises:
        InvalidArgument: the neighbourhood is larger than the image, or the rank more than the features can span.
    """
    options = cast(HybridVaeOptions, config.options)
    height, width, channels = config.image_shape
    check_rank(options.rank, options.factor_kernel, options.widths[0], channels)
    head = HybridHead(
        options.widths[0],
        channels,
        options.rank,
        options.floor,
        options.factor_kernel,
        pattern(config),
        options.basis,
    )
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        Decoder(options.latent_size, options.widths, height, width),
        head,
        (options.latent_size,),
    )


def phases(config: RunConfig) -> list[Phase]:
    """The mean alone; then what varies together nearby; then, all else standing still, a factor on what these leave."""
    options = cast(HybridVaeOptions, config.options)
    return [
        *likelihood_phases(options, likelihood(options.hold), begin_local),
        Phase("factor", 0, begin=fit_factor),
    ]


def defaults(image_shape: ImageShape) -> Mapping[str, Any]:
    """structured-vae's; on small images half as many columns."""
    own = {"rank": RANK // 2} if max(image_shape[:2]) <= 32 else {}
    return {**structured_defaults(image_shape), **own}


register(
    Family(
        "hybrid-vae",
        "low rank and sparse precision at once: pixels vary together, near and far",
        HybridVaeOptions,
        build,
        phases,
        defaults,
        structured_constraints,
    )
)
