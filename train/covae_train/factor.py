"""A factor: columns made from the decoder's features, started at what residuals vary along, and fitted to images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from covae_core.densities.factored import Factored
from covae_core.errors import InvalidArgument
from covae_train.heads import BATCH, factor_covariance, fit, kept, mix_columns
from covae_train.image_model import MeanFirstHead, Vae, small_head
from covae_train.mean_first import START_IMAGES, shown
from covae_train.phases import TrainingImages
from covae_train.torch_backend import TorchBackend

# Bytes of what k×k convolutions see of images, at once.
NEIGHBOUR_BYTES = 2**26
# A factor is fitted to so many training images at most, in so many steps and passes at most, with these learning rates.
FACTOR_IMAGES, FACTOR_STEPS, FACTOR_PASSES = 3000, 800, 40
FACTOR_RATE, VARIANCE_RATE = 0.02, 0.05


class FactorHead(MeanFirstHead):
    """A head with a factor of R columns, by a k×k convolution.

    The paper has k = 1. Larger ones make columns of the features' differences too, along which strokes move and
    thicken where features alone can but make them brighter.

    With a floor a variance D is learned. The factor is then D^(½) times the convolution's maps, in units of each
    pixel's own standard deviation: where pixels hardly vary, as on a black background, a column is next to nothing by
    itself.
    """

    def __init__(
        self, in_width: int, channels: int, rank: int, variance: float, floor: float | None = None, kernel: int = 1
    ) -> None:
        super().__init__(in_width, channels, variance, floor)
        self.factor = small_head(in_width, rank * channels, 0.0, kernel)
        self.rank = rank

    @abstractmethod
    def around(self, mean: Tensor, features: Tensor) -> Factored:
        """The density of learned variances around a mean (B, C, H, W)."""

    def rates(self) -> dict[float, list[nn.Parameter]]:
        """What `fit_factor` fits, by learning rate."""
        assert self.variance is not None
        return {FACTOR_RATE: list(self.factor.parameters()), VARIANCE_RATE: list(self.variance.parameters())}

    def columns(self, features: Tensor) -> Tensor:
        """P. shape: (B, R, C, H, W)"""
        maps: Tensor = self.factor(features)
        columns = maps.reshape(maps.shape[0], self.rank, -1, *maps.shape[2:])
        return columns if self.variance is None else columns * self.variances(features).sqrt()[:, None]

    def along(self, features: Tensor, noise: Tensor) -> Tensor:
        """P w of noise (B, R), without P: w mixes the convolution's weights, and one of them is applied, not R.

        As products of matrices, tap by tap, and shifts, since a convolution has the same weights for a whole batch.
        shape: (B, S)
        """
        batch, _, height, width = features.shape
        weight, bias = self.factor.weight, self.factor.bias
        assert bias is not None
        kernel = weight.shape[-1]
        taps = kernel**2
        # Rows apart: a product of matrices would join those of a batch.
        mixed = (noise[:, None] * weight.reshape(self.rank, -1).mT).sum(-1).reshape(batch, -1, features.shape[1], taps)
        products = mixed.transpose(2, 3).flatten(1, 2) @ features.flatten(2)  # shape: (B, C·k², H·W)
        maps = pad(products.reshape(batch, -1, taps, height, width), (kernel // 2,) * 4)
        shifted = [
            maps[:, :, tap, tap // kernel : tap // kernel + height, tap % kernel : tap % kernel + width]
            for tap in range(taps)
        ]
        start = (noise[:, None] * bias.reshape(self.rank, -1).mT).sum(-1)[..., None, None]
        found = sum(shifted, start)
        if self.variance is not None:
            found = found * self.variances(features).sqrt()
        return found.flatten(1)


def check_rank(rank: int, kernel: int, width: int, channels: int) -> None:
    """See that a convolution of so many feature maps can span the columns.

    Raises:
        InvalidArgument: it cannot.
    """
    limit = width * kernel**2 * channels
    if rank > limit:
        raise InvalidArgument(
            f"rank: found {rank}; a {kernel}x{kernel} factor head on widths[0] = {width} feature "
            f"maps of {channels} channel(s) spans at most {limit}: widen widths[0] or lower rank"
        )


def begin_at_residuals(model: Vae, training: TrainingImages) -> None:
    """The factor begins as the residuals' principal components; columns that there are none for keep their weights."""
    head = cast(FactorHead, model.head)
    start_factor(head, shown(model, training, START_IMAGES))


def start_factor(head: FactorHead, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The factor's weights from features and images, in batches; of residuals in the units that the factor is in."""
    kernel = head.factor.kernel_size[0]

    def residual(features: Tensor, images: Tensor) -> Tensor:
        found: Tensor = images - head.mean_of(features)
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
    head = cast(FactorHead, model.head)
    features, images = kept(shown(model, training, FACTOR_IMAGES))
    start_factor(
        head, zip(torch.split(features[:START_IMAGES], BATCH), torch.split(images[:START_IMAGES], BATCH), strict=True)
    )
    means = torch.cat([head.mean_of(part) for part in torch.split(features, BATCH)])

    def density(rows: Tensor) -> Factored:
        return head.around(means[rows], features[rows])

    steps = min(FACTOR_STEPS, max(1, FACTOR_PASSES * len(images) // BATCH))
    fit(head.rates(), density, images, torch.Generator().manual_seed(0), steps)
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
