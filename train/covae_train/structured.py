"""Residuals with a structure nearby: heads whose density has a sparse precision, and how its filters begin."""

from __future__ import annotations

from collections.abc import Iterable
from math import expm1, log
from typing import Any, Literal, Protocol, Self, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from covae_core.densities import HasEntropy, SparsePrecisionNormal, Whitening, YCbCrNormal
from covae_core.densities.neighbourhood import Neighbourhood, neighbours_of
from covae_core.densities.ycbcr_normal import averaged, check_divisible, repeated, to_rgb, to_ycbcr
from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape, RunConfig
from covae_train.families import Constraints
from covae_train.heads import start_variance
from covae_train.image_model import MeanFirstHead, Vae, small_head
from covae_train.mean_first import (
    START_IMAGES,
    Hold,
    ObjectiveOptions,
    begin_at_likeliest,
    objective_defaults,
    shown,
)
from covae_train.networks.residual import size_defaults
from covae_train.objective import Batch, Terms, encoded
from covae_train.phases import Loss, TrainingImages

Colour = Literal["rgb", "ycbcr"]
# n_f by the image's longer side: the first row whose limit it does not exceed. SUPN has 7 for 64×64 faces.
SIDES = ((16, 3), (32, 5), (256, 7))
# The least variance above 32×32, a quarter of a grey level's square: there is noise, and float32 is enough.
LARGE_FLOOR = 1e-6
# The paper's α, and that of its first 10 of 110 epochs.
MINIMISER, FIRST_MINIMISER, FIRST_SHARE = 10.0, 5e3, 10 / 110


class StructuredOptions(ObjectiveOptions):
    """Of a family whose density has a sparse precision."""

    neighbourhood: PositiveInt = Field(
        description="n_f, side of the square around a pixel that its filter is half of, odd"
    )
    dilations: PositiveInt = Field(1, description="that square again at 2, 4, … times the distance, so many in all")
    basis: PositiveInt | None = Field(
        None, description="n_b: filters are mixed of so many that all images share (eq. 15)  [each its own]"
    )
    hold: Hold = Field(
        "joint",
        description="of the likelihood, what holds the mean: the squared error beside the density (joint), it alone "
        "(apart), or nothing (none)",
    )
    minimiser: NonNegativeFloat = Field(
        MINIMISER, description="of the paper's objective: α, times the squared error summed up over an image (eq. 14)"
    )
    first_minimiser: NonNegativeFloat = Field(FIRST_MINIMISER, description="α in the first eleventh of the steps")

    @model_validator(mode="after")
    def _check_neighbourhood(self) -> Self:
        if self.neighbourhood % 2 == 0 or self.neighbourhood < 3:
            raise ValueError(f"neighbourhood: found {self.neighbourhood}; expected an odd number from 3 on")
        return self


class ColourOptions(StructuredOptions):
    """Of one that can also see colour as luminance and chroma."""

    colour: Colour = Field(
        "rgb",
        description="rgb, with filters for each channel; or ycbcr, with filters for the luminance and independent "
        "chroma at a quarter of the resolution (structured residuals eqs. 8 to 12)",
    )


def structured_defaults(image_shape: ImageShape) -> dict[str, Any]:
    """Those of the networks, and the neighbourhood by size."""
    side = max(image_shape[:2])
    own: dict[str, Any] = {"neighbourhood": next(item for limit, item in SIDES if side <= limit)}
    if side > SIDES[1][0]:
        own["floor"] = LARGE_FLOOR
    return {**size_defaults(image_shape), **objective_defaults(image_shape), **own}


def pattern(config: RunConfig) -> Neighbourhood:
    """The neighbourhood that the options ask for.

    Raises:
        InvalidArgument: it is larger than the image.
    """
    options = cast(StructuredOptions, config.options)
    found = Neighbourhood(options.neighbourhood, options.dilations)
    smallest = min(config.image_shape[:2])
    if found.span >= smallest:
        raise InvalidArgument(
            f"neighbourhood: found {options.neighbourhood} with {options.dilations} dilation(s), which reaches "
            f"{found.span} pixels; an image of {config.image_shape[0]}x{config.image_shape[1]} has neighbours up to "
            f"{smallest - 1} pixels away: choose a smaller neighbourhood or fewer dilations"
        )
    return found


class FilterMaps(nn.Module):
    """Features to filters, by a 1×1 convolution, at first next to nothing: (B, F, H, W) → (B, G, K, C, H, W).

    With a basis the convolution yields n_b weights for each pixel and dilation, and a filter is their mixture of the
    n_b filters that all share (structured residuals eq. 15, but for the diagonal, which is the variance's own).
    """

    def __init__(self, in_width: int, channels: int, neighbourhood: Neighbourhood, basis: int | None) -> None:
        super().__init__()
        self.width, self.neighbourhood, self.channels = in_width, neighbourhood, channels
        neighbours = neighbours_of(neighbourhood.side)
        self.count = basis or neighbours
        self.maps = small_head(in_width, neighbourhood.dilations * self.count * channels, 0.0)
        self.basis = None if basis is None else nn.Parameter(torch.randn(neighbours, basis) / neighbours**0.5)

    def forward(self, features: Tensor) -> Tensor:
        maps = self.maps(features)
        shape = (maps.shape[0], self.neighbourhood.dilations, self.count, self.channels, *maps.shape[2:])
        weights: Tensor = maps.reshape(shape)
        return weights if self.basis is None else torch.einsum("kn,bgnchw->bgkchw", self.basis, weights)

    @torch.no_grad()
    def start(self, constants: Tensor) -> None:
        """Begin as these filters at every pixel of every image. shape: (G, K, C)"""
        assert self.maps.bias is not None
        if self.basis is not None:
            # One shared filter, the mean over dilations and channels, with a weight of 1.
            self.basis[:, 0] = constants.mean((0, 2)).to(self.basis)
            constants = torch.zeros(constants.shape[0], self.count, constants.shape[2])
            constants[:, 0] = 1
        self.maps.bias.copy_(constants.flatten())


class HasFilters(Protocol):
    """A head with filters."""

    filters: FilterMaps


class SparseHead(MeanFirstHead):
    """Mean, filters and a pixel's variance given the later ones, all by 1×1 convolutions.

    In YCbCr the mean's three maps are luminance and chroma, and filters and variance are the luminance's; chroma's mean
    and variance are made of averages over 4×4 squares.
    """

    def __init__(
        self,
        in_width: int,
        channels: int,
        floor: float,
        neighbourhood: Neighbourhood,
        basis: int | None,
        colour: Colour = "rgb",
    ) -> None:
        super().__init__(in_width, channels, 2 * floor, floor)
        self.colour = colour
        if colour == "ycbcr":
            self.variance = small_head(in_width, 1, log(expm1(floor)))
            self.chroma_variance = small_head(in_width, channels - 1, log(expm1(floor)))
        self.filters = FilterMaps(in_width, 1 if colour == "ycbcr" else channels, neighbourhood, basis)

    def mean_of(self, features: Tensor) -> Tensor:
        mean = super().mean_of(features)
        if self.colour == "rgb":
            return mean
        found: Tensor = to_rgb(torch.cat([mean[:, :1], repeated(averaged(mean[:, 1:]))], 1))
        return found

    def local(self, mean: Tensor, features: Tensor) -> SparsePrecisionNormal | YCbCrNormal:
        own = {"filters": self.filters(features), "variance": self.variances(features)}
        if self.colour == "rgb":
            return SparsePrecisionNormal(mean, **own, check=False)
        chroma = self.softplus(averaged(self.chroma_variance(features))) + self.floor
        return YCbCrNormal(mean, **own, chroma_variance=chroma, check=False)

    def density(self, features: Tensor) -> SparsePrecisionNormal | YCbCrNormal:
        return self.local(self.mean_of(features), features)


def check_colour(config: RunConfig) -> Colour:
    """The colour space that the options ask for.

    Raises:
        InvalidArgument: the images have none, or sides that it cannot divide.
    """
    colour = cast(ColourOptions, config.options).colour
    if colour == "ycbcr":
        height, width, channels = config.image_shape
        check_divisible((channels, height, width))
    return colour


def begin_local(model: Vae, training: TrainingImages) -> None:
    """Filters begin as the same one everywhere, the regression of residuals on their later neighbours, and the variance
    as what that leaves."""
    pairs = list(shown(model, training, START_IMAGES))
    head = cast(MeanFirstHead, model.head)
    filters = cast(HasFilters, head).filters
    in_luma = getattr(head, "colour", "rgb") == "ycbcr"
    residuals = [images - head.mean_of(features) for features, images in pairs]
    structured = [to_ycbcr(part)[:, :1] for part in residuals] if in_luma else residuals
    filters.start(regression(structured, filters.neighbourhood))
    begin_at_likeliest(model, training)
    if in_luma:
        start_variance(cast(SparseHead, head).chroma_variance, residuals)
    assert isinstance(head.variance, nn.Conv2d)
    assert head.variance.bias is not None
    white = []
    for features, images in pairs:
        density = head.local(head.mean_of(features), features)
        assert isinstance(density, Whitening)
        white.append(density.whiten(images)[:, : filters.channels].square().mean())
    variance = head.variances(pairs[0][0]).mean() * torch.stack(white).mean()
    head.variance.bias.fill_(max(float(variance) - float(head.floor or 0), 1e-9)).expm1_().log_()


def regression(residuals: Iterable[Tensor], neighbourhood: Neighbourhood) -> Tensor:
    """Filters a, (G, K, C), that make Σ (r_k + Σ_j a_j r_mj)² least over all pixels k. residuals: (B, C, H, W) each"""
    products: list[Tensor] = []
    for images in residuals:
        span = neighbourhood.span
        padded = nn.functional.pad(images.double(), (span, span, 0, span))
        height, width = images.shape[2:]
        views = [
            padded[:, :, below : below + height, span + right : span + right + width]
            for below, right in [(0, 0), *neighbourhood.offsets]
        ]
        rows = torch.stack(views).permute(2, 0, 1, 3, 4).flatten(2)  # shape: (C, 1 + G·K, B·H·W)
        products.append(rows @ rows.mT)
    gram = torch.stack(products).sum(0)
    # Neighbours that say the same, as those of two dilations, share.
    ridge = 1e-6 * gram[:, 0, 0, None, None] * torch.eye(gram.shape[1] - 1, dtype=torch.float64)
    found = torch.cholesky_solve(gram[:, 1:, :1], torch.linalg.cholesky(gram[:, 1:, 1:] + ridge))[..., 0]
    return -found.mT.reshape(neighbourhood.dilations, -1, len(gram)).float()


def variance_minimiser(first: float, rest: float) -> Loss:
    """−log p(x|z) + KL + α ‖x − μ‖²: the paper's (eq. 14 with its sign put right), α falling from `first` to `rest`."""

    def loss(model: Vae, batch: Batch) -> Terms:
        latents, kl = encoded(model, batch)
        density = model.density(latents)
        assert isinstance(density, HasEntropy)
        log_prob = density.log_prob(batch.images)
        error = (batch.images - density.mean).square().sum((1, 2, 3))
        alpha = first if batch.progress < FIRST_SHARE else rest
        return Terms((kl - log_prob + alpha * error).mean(), log_prob, kl, density.entropy())

    return loss


def structured_constraints(config: RunConfig) -> Constraints:
    """The KL at its target; the paper's objective has none."""
    options = cast(StructuredOptions, config.options)
    if options.objective == "paper":
        return Constraints()
    return options.held(config, [options.kl()])
