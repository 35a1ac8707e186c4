"""SOS-VAE: the pixels' density is low-rank plus diagonal, N(μ, P Pᵀ + ε I), its entropy held at a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import e, log, pi
from typing import Any, Self, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import unfold

from covae_core.densities import LowRankNormal
from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape, RunConfig
from covae_train.families import Constraints, Family, register
from covae_train.heads import BATCH, factor_covariance, fit, kept, mix_columns
from covae_train.image_model import MeanFirstHead, Vae, small_head
from covae_train.mean_first import (
    START_IMAGES,
    Hold,
    ObjectiveOptions,
    likelihood,
    likelihood_phases,
    objective_defaults,
    paper_phases,
    shown,
)
from covae_train.networks.residual import Decoder, Encoder, size_defaults
from covae_train.objective import Constraint
from covae_train.phases import Phase, TrainingImages
from covae_train.torch_backend import TorchBackend

# The spread that the default entropy target grants a pixel. It gives κ = 5.7 for grey 64×64 images and 7.3 for the
# paper's CelebA, where the paper has 5.5 and 7.6.
DEFAULT_PIXEL_VARIANCE = 0.005
# The side of the factor's convolution, where not the paper has it.
FACTOR_KERNEL = 3
# Bytes of what k×k convolutions see of images, at once.
NEIGHBOUR_BYTES = 2**26
# A factor is fitted to so many training images at most, in so many steps and passes at most, with these learning rates.
FACTOR_IMAGES, FACTOR_STEPS, FACTOR_PASSES = 3000, 800, 40
FACTOR_RATE, VARIANCE_RATE = 0.02, 0.05
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


class LowRankHead(MeanFirstHead):
    """Mean and factor by 1×1 and k×k convolutions; D is the constant ε (section 3.3: the optimisation tricks).

    The paper has k = 1. Larger ones make columns of the features' differences too, along which strokes move and
    thicken where features alone can but make them brighter.

    With a floor there is a second variance D, learned: images are scored with it, and drawn with ε. The factor is then
    D^(½) times the convolution's maps, in units of each pixel's own standard deviation: where pixels hardly vary, as on
    a black background, a column is next to nothing by itself.
    """

    def __init__(
        self, in_width: int, channels: int, rank: int, variance: float, floor: float | None = None, kernel: int = 1
    ) -> None:
        super().__init__(in_width, channels, variance, floor)
        self.factor = small_head(in_width, rank * channels, 0.0, kernel)
        self.rank = rank

    def density(self, features: Tensor) -> LowRankNormal:
        return LowRankNormal(self.mean(features), self.columns(features), self.mean_variance, check=False)

    def densities(self, features: Tensor) -> tuple[LowRankNormal, LowRankNormal]:
        drawing = self.density(features)
        if self.variance is None:
            return drawing, drawing
        parts = {**drawing.parameters, "variance": self.variances(features)}
        return drawing, LowRankNormal(**parts, check=False)

    def columns(self, features: Tensor) -> Tensor:
        """P. shape: (B, R, C, H, W)"""
        maps: Tensor = self.factor(features)
        columns = maps.reshape(maps.shape[0], self.rank, -1, *maps.shape[2:])
        return columns if self.variance is None else columns * self.variances(features).sqrt()[:, None]


def begin_at_residuals(model: Vae, training: TrainingImages) -> None:
    """The factor begins as the residuals' principal components; columns that there are none for keep their weights."""
    head = cast(LowRankHead, model.head)
    start_factor(head, shown(model, training, START_IMAGES))


def start_factor(head: LowRankHead, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The factor's weights from features and images, in batches; of residuals in the units that the factor is in."""
    kernel = head.factor.kernel_size[0]

    def residual(features: Tensor, images: Tensor) -> Tensor:
        found: Tensor = images - head.mean(features)
        return found if head.variance is None else found / head.variances(features).sqrt()

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for features, images in pairs:
            rows = max(1, NEIGHBOUR_BYTES // (features[0].nbytes * kernel**2))
            yield from zip(torch.split(features, rows), torch.split(images, rows), strict=True)

    residuals = ((neighbours(features, kernel), residual(features, images)) for features, images in pieces())
    weights = residual_components(residuals, head.rank).flatten(0, 1).to(head.factor.weight)  # shape: (R·C, F·k² + 1)
    found = weights.any(1)
    assert head.factor.bias is not None
    head.factor.weight[found] = weights[found, :-1].reshape(-1, *head.factor.weight.shape[1:])
    head.factor.bias[found] = weights[found, -1]


def neighbours(features: Tensor, kernel: int) -> Tensor:
    """What a k×k convolution sees of each pixel, 0 beyond the border. shape: (B, F, H, W) → (B, F·k², H, W)"""
    batch, _, height, width = features.shape
    return unfold(features, kernel, padding=kernel // 2).reshape(batch, -1, height, width)


def fit_factor(model: Vae, training: TrainingImages) -> None:
    """The likeliest factor and variance, and then the likeliest scale of the factor, all below them standing still.

    Trained together with the network, a factor grows columns that no image uses, and samples grey plates.
    """
    head = cast(LowRankHead, model.head)
    features, images = kept(shown(model, training, FACTOR_IMAGES))
    start_factor(
        head, zip(torch.split(features[:START_IMAGES], BATCH), torch.split(images[:START_IMAGES], BATCH), strict=True)
    )
    assert head.variance is not None
    means = torch.cat([head.mean(part) for part in torch.split(features, BATCH)])

    def density(rows: Tensor) -> LowRankNormal:
        chosen = features[rows]
        return LowRankNormal(means[rows], head.columns(chosen), head.variances(chosen), check=False)

    rates = {FACTOR_RATE: list(head.factor.parameters()), VARIANCE_RATE: list(head.variance.parameters())}
    steps = min(FACTOR_STEPS, max(1, FACTOR_PASSES * len(images) // BATCH))
    fit(rates, density, images, torch.Generator().manual_seed(0), steps)
    some = torch.split(torch.arange(min(len(images), START_IMAGES)), BATCH)
    mix_columns(head.factor, factor_covariance((density(rows), images[rows]) for rows in some))


def residual_components(pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """Weights of the R columns, linear in the features, along which residuals vary most.

    With φ the F features and a constant 1 at every pixel, a column is p = Σ w_cf φ_f on channel c. Of all columns, the
    first maximises ρ = E[(pᵀr)²] / E[pᵀp], each next one the same among those orthogonal to the earlier ones on
    average: the generalised eigenvectors of E[g gᵀ], g_cf = φ_fᵀ r_c, and I_C ⊗ E[Σ φ φᵀ], the sum over pixels. The
    columns are scaled to E[pᵀp] = ρ: where D is negligible, what maximises the likelihood if the features are the same
    for every image (probabilistic principal component analysis, Tipping & Bishop 1999); elsewhere they are a start.

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
        grams.append(TorchBackend().gram(maps, None, None).sum(0))
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


def build(config: RunConfig) -> Vae:
    """The paper's encoder and decoder with a low-rank head.

    Raises:
        InvalidArgument: the rank is more than a convolution of the first width can span.
    """
    options = cast(SosVaeOptions, config.options)
    height, width, channels = config.image_shape
    kernel = options.factor_kernel
    limit = options.widths[0] * kernel**2 * channels
    if options.rank > limit:
        raise InvalidArgument(
            f"rank: found {options.rank}; a {kernel}x{kernel} factor head on widths[0] = {options.widths[0]} feature "
            f"maps of {channels} channel(s) spans at most {limit}: widen widths[0] or lower rank"
        )
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        Decoder(options.latent_size, options.widths, height, width),
        LowRankHead(
            options.widths[0],
            channels,
            options.rank,
            options.variance,
            None if options.objective == "paper" else options.floor,
            kernel,
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
    kl = Constraint("kl", lambda terms: terms.kl, options.target_kl)
    if options.objective == "likelihood":
        return options.held(config, [kl])
    entropy = Constraint("entropy", lambda terms: terms.entropy, floor + kappa * options.rank)
    return options.held(config, [kl, entropy])


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
