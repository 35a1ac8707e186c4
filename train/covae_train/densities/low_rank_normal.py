"""Normal over images with a low-rank-plus-diagonal covariance: scores, samples, edits (SOS-VAE)."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from covae_core.densities.checks import (
    Layout,
    broadcast_batch,
    flat_pixel,
    require_count,
    split_factor,
    split_image,
    variance_batch,
)
from covae_core.densities.low_rank_normal import GATHERED_SHARE, PRECISE_COLUMNS
from covae_core.noise import Stream
from covae_train.densities.base import (
    POSITIVE_IMAGES,
    REAL_FACTORS,
    REAL_IMAGES,
    Density,
    Drawable,
    float_dtype,
    one_hot,
    read_condition,
    read_variance,
    require_finite,
    variance_rows,
    wants_checks,
    weighted_square,
)
from covae_train.densities.cached import cached
from covae_train.densities.exporting import exporting
from covae_train.densities.factor_posterior import FactorPosterior, gram, times, times_transposed
from covae_train.densities.slerp import slerp


class LowRankNormal(Density):
    """Normal over images whose covariance is low-rank plus diagonal: N(μ, P Pᵀ + D) (SOS-VAE eq. 3).

    mean: μ (…, C, H, W); factor: P (…, R, C, H, W); variance: the diagonal of D, a positive number or a tensor that
    broadcasts to the mean; a number, or one per image, is the fast case. Batch axes broadcast; a factor without them is
    shared. Tensors are float64 if mean or factor is, else float32; log_prob and entropy are float64 always. A score
    costs O(S R²) for S = C·H·W, and nothing of size S×S is ever formed.

    log_prob, sample_rows, condition(…).mean and condition(…).sample_rows export to ONNX with a symbolic batch axis.
    validate_args: look at values too, which costs passes over P; torch's default, and never during export.

    >>> import torch
    >>> density = LowRankNormal(torch.zeros(1, 2, 2), torch.ones(1, 1, 2, 2), 0.5)
    >>> image = density.sample(1, seed=0)
    >>> image.shape, density.log_prob(image).shape
    (torch.Size([1, 1, 2, 2]), torch.Size([1]))

    Raises:
        InvalidArgument: a shape does not fit or an axis is empty; a value is not finite or a variance not positive.
    """

    kind: ClassVar[str] = "low-rank-normal"
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "mean": REAL_IMAGES,
        "factor": REAL_FACTORS,
        "variance": POSITIVE_IMAGES,
    }

    def __init__(
        self, mean: Tensor, factor: Tensor, variance: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        dtype, check = float_dtype(mean, factor), wants_checks(validate_args)
        mean, self._factor = mean.to(dtype), factor.to(dtype)
        mean_batch, image_shape = split_image("mean", mean.shape)
        factor_batch, self.rank = split_factor(factor.shape, image_shape)
        self._variance = read_variance(variance, image_shape, mean, check=check)
        batch_shape = broadcast_batch(
            mean=mean_batch, factor=factor_batch, variance=variance_batch(self._variance.shape, image_shape)
        )
        if check:
            require_finite("mean", mean)
            require_finite("factor", factor)
        self._lay_out(Layout(batch_shape, image_shape), validate_args)
        self._device = mean.device
        self._mean = mean.expand(batch_shape + image_shape)
        self._mean_rows = self._mean.reshape(self._layout.rows, self._layout.pixels)
        self._factor_rows = self._flatten_factor(factor_batch)
        self._variance_rows = variance_rows(self._variance, self._layout)

    def _flatten_factor(self, batch: tuple[int, ...]) -> Tensor:
        """The factor as (B or 1, R, S), 1 if the batch shares it."""
        if all(size == 1 for size in batch):
            return self._factor.reshape(1, self.rank, self._layout.pixels)
        full = self._factor.expand(self._layout.batch_shape + tuple(self._factor.shape[-4:]))
        return full.reshape(self._layout.rows, self.rank, self._layout.pixels)

    @property
    def factor(self) -> Tensor:
        """P; shape (…, R, C, H, W), as given."""
        return self._factor

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{"factor": P, "variance": D's diagonal}; LowRankNormal(mean, **parameters) is the same density."""
        return {"factor": self._factor, "variance": self._variance}

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> LowRankNormal:
        """The same density on a larger batch; what the batch shared stays shared."""
        mean = self._mean.expand(*batch_shape, *self.image_shape)
        return LowRankNormal(mean, self._factor, self._variance, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of images in nats (SOS-VAE eq. 3), in float64.

        The quadratic form is ‖(r − P c)/√D‖² + ‖c‖² with r = x − μ and c = K⁻¹PᵀD⁻¹r. The difference r'D⁻¹r − c'Kc of
        two large numbers that torch's LowRankMultivariateNormal uses loses several nats in float32.

        value: (…, C, H, W), broadcast with the batch; returns (…).

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images, sample_shape = self._rows("x", value.to(self._mean.dtype), self.image_shape)
        if self._validate_args and not exporting():
            require_finite("x", images)
        residual = images - self._mean_rows
        noise = self._posterior.mean(residual)
        rest = residual - times(noise.to(residual.dtype), self._factor_rows)
        quadratic = weighted_square(rest, self._variance_rows) + noise.square().sum(dim=-1)
        log_prob = -0.5 * (quadratic + self._logdet + self._layout.pixels * log(2 * pi))
        return log_prob.reshape(sample_shape + self._layout.batch_shape)

    def entropy(self) -> Tensor:
        """Differential entropy (S log 2πe + log|D| + log|K|)/2 in nats (SOS-VAE eq. 7); shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def marginal_variance(self) -> Tensor:
        """Variance of every pixel, diag(P Pᵀ) + D; shape (*batch_shape, C, H, W)."""
        return self._spread(self._factor_rows.square().sum(dim=1) + self._variance_rows)

    def covariance_with(self, pixel: Sequence[int]) -> Tensor:
        """Covariance of every pixel with pixel (c, h, w), a row of P Pᵀ + D; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        index = flat_pixel(pixel, self.image_shape)
        covariance = times(self._factor_rows[None, :, :, index], self._factor_rows)[0]
        return self._spread(covariance + self._variance_rows * one_hot(index, self._layout.pixels, self._mean))

    def from_noise(self, factor_noise: Tensor, pixel_noise: Tensor) -> Tensor:
        """The image μ + P w + √d ε (SOS-VAE eq. 4). factor_noise: w (…, R); pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        smooth = self._smooth_images("factor_noise", factor_noise)
        pixels, sample_shape = self._rows("pixel_noise", pixel_noise.to(self._mean.dtype), self.image_shape)
        return smooth + self._images(self._variance_rows.sqrt() * pixels, sample_shape)

    def condition(self, mask: Tensor, pixels: Tensor) -> ConditionalLowRankNormal:
        """Fix some pixels; the rest follow (SOS-VAE eq. 6, through the R×R capacitance of the fixed pixels).

        mask: bool (…, H, W), which fixes all channels of a pixel, or (…, C, H, W). A mask with fewer axes than the
        mean or the pixels is read as the former; otherwise one whose third axis from the end is C or 1 as the latter.
        pixels: (…, C, H, W); its values off the mask are ignored. Batches of mask, pixels and density broadcast.

        Raises:
            InvalidArgument: a shape does not fit, mask is not bool, or a pixel on the mask is not finite.
        """
        mask_rows, pixel_rows, layout = read_condition(self, mask, pixels)
        same = layout.batch_shape == self._layout.batch_shape
        density = self if same else self.expand(layout.batch_shape)
        return ConditionalLowRankNormal(density, mask_rows, pixel_rows)

    def components(self) -> Tensor:
        """Principal components P V of the factor, largest first; shape (*batch_shape, R, C, H, W).

        V holds the eigenvectors of PᵀP; the norms are P's singular values. Of each component the entry of largest
        magnitude is positive.
        """
        components = self._basis.to(self._mean.dtype).mT @ self._factor_rows
        largest = components.gather(-1, components.abs().argmax(dim=-1, keepdim=True))
        return self._spread(torch.where(largest < 0, -components, components), (self.rank, *self.image_shape))

    def scale_components(self, scales: Tensor, noise: Tensor) -> Tensor:
        """The image μ + P V diag(a) Vᵀ w (SOS-VAE eq. 5), no pixel noise, exact at a = 0.

        scales: a (…, R), in the order of components(); noise: w (…, R). They broadcast; returns (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        scales, noise = self._together((self.rank,), scales=scales, noise=noise)
        scale_rows, _ = self._rows("scales", scales, (self.rank,))
        noise_rows, sample_shape = self._rows("noise", noise, (self.rank,))
        scaled = times_transposed(scale_rows * times(noise_rows, self._basis), self._basis)
        return self._smooth_images("noise", scaled.reshape(*sample_shape, *self._layout.batch_shape, self.rank))

    def interpolate(self, noise_a: Tensor, noise_b: Tensor, steps: int) -> Tensor:
        """Images μ + P slerp(w_a, w_b, t), t from 0 to 1 (SOS-VAE eq. 4 without ε, eq. 8).

        noise_a, noise_b: (…, R); returns (steps, …, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit, or steps < 1.
        """
        steps = require_count("steps", steps)
        start, end = self._together((self.rank,), noise_a=noise_a, noise_b=noise_b)
        return self._smooth_images("noise", slerp(start, end, steps))

    @cached
    def _posterior(self) -> FactorPosterior:
        return FactorPosterior(self._factor_rows, None, self._variance_rows)

    @cached
    def _logdet(self) -> Tensor:
        """log |P Pᵀ + D| = log |D| + log |K|. shape: (B or 1,)"""
        logs: Tensor = self._variance_rows.double().log().sum(dim=-1)
        return logs * (self._layout.pixels / self._variance_rows.shape[-1]) + self._posterior.logdet

    @cached
    def _basis(self) -> Tensor:
        """V, the eigenvectors of PᵀP by descending eigenvalue. shape: (B or 1, R, R)"""
        vectors: Tensor = torch.linalg.eigh(gram(self._factor_rows, None, torch.float64)).eigenvectors
        return vectors.flip(-1)

    def _draw(self, n: int, seeds: Tensor | None) -> Tensor:
        factor_noise = self._noise(n, self.rank, Stream.FACTOR, seeds)
        pixel_noise = self._noise(n, self._layout.pixels, Stream.PIXEL, seeds)
        return self._mean_rows + times(factor_noise, self._factor_rows) + self._variance_rows.sqrt() * pixel_noise

    def _smooth_images(self, name: str, noise: Tensor) -> Tensor:
        """The image μ + P w of noise (…, R)."""
        rows, sample_shape = self._rows(name, noise.to(self._mean.dtype), (self.rank,))
        return self._images(self._mean_rows + times(rows, self._factor_rows), sample_shape)


class ConditionalLowRankNormal(Drawable):
    """A LowRankNormal with some pixels fixed: N(μ + P c, P K⁻¹ Pᵀ + D) off the mask (SOS-VAE eq. 6).

    K = I + Pᵀdiag(m/d)P and c = K⁻¹Pᵀdiag(m/d)(b − μ) for the mask m and the fixed values b: only masked columns of P
    enter the R×R algebra. Made by LowRankNormal.condition.
    """

    def __init__(self, density: LowRankNormal, mask: Tensor, pixels: Tensor) -> None:
        self._density = density
        self._layout = density._layout
        self._device = density._device
        self._mask = mask
        # Sums of products with 0 and 1 are exact, and much faster than torch.where on a scattered mask.
        self._on = mask.to(pixels.dtype)
        self._off = 1 - self._on
        self._fixed = pixels * self._on
        self._columns, self._counted, self._posterior = _observe(density, mask, self._on)

    @property
    def batch_shape(self) -> torch.Size:
        """Axes in front of the image's: those of the density, the mask and the pixels together."""
        return torch.Size(self._layout.batch_shape)

    @cached
    def mean(self) -> Tensor:
        """The conditional mean: the fixed values on the mask, μ + P c off it; shape (*batch_shape, C, H, W)."""
        return self._images(self._agree(self._density._mean_rows[None]), ())

    def marginal_variance(self) -> Tensor:
        """Variance of every pixel, 0 on the mask; shape (*batch_shape, C, H, W)."""
        whitened = self._posterior.whitener.to(self._density.mean.dtype) @ self._density._factor_rows
        variance = whitened.square().sum(dim=1) + self._density._variance_rows
        return self._spread(torch.where(self._mask, 0, variance))

    def covariance_with(self, pixel: Sequence[int]) -> Tensor:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        density, index = self._density, flat_pixel(pixel, self.image_shape)
        noise = self._posterior.solve(density._factor_rows[None, :, :, index]).to(density.mean.dtype)
        covariance = times(noise, density._factor_rows)[0]
        covariance = covariance + density._variance_rows * one_hot(index, self._layout.pixels, density.mean)
        return self._spread(torch.where(self._mask | self._mask[:, index, None], 0, covariance))

    def _draw(self, n: int, seeds: Tensor | None) -> Tensor:
        return self._agree(self._density._draw(n, seeds))

    def _agree(self, images: Tensor) -> Tensor:
        """Matheron's rule: move images (N, B, S) of the unconditional density so that they agree with the pixels."""
        residual = (_gather(self._fixed, self._columns) - _gather(images, self._columns)) * self._counted
        noise = self._posterior.mean(residual)
        shifted = images + times(noise.to(images.dtype), self._density._factor_rows)
        return torch.addcmul(self._fixed, shifted, self._off)


def _observe(density: LowRankNormal, mask: Tensor, on: Tensor) -> tuple[Tensor | None, Tensor, FactorPosterior]:
    """The columns that a mask (M, S) touches, (M, n), or None for all; the mask there; the factor's noise given them.

    on: the mask as numbers.
    """
    factor, variance = density._factor_rows, density._variance_rows
    if exporting():
        return None, on, FactorPosterior(factor, on, variance)
    counts = on.sum(dim=-1)
    fewest, most = (int(count) for count in torch.stack([counts.min(), counts.max()]).tolist())
    if fewest == mask.shape[-1]:
        return None, on, density._posterior
    if most > GATHERED_SHARE * mask.shape[-1]:
        return None, on, FactorPosterior(factor, on, variance)
    columns = _masked_columns(mask, most)
    gathered, local = _gather_factor(factor, columns), variance
    if variance.shape[-1] > 1:
        local = _gather(variance[None], columns)[0]
    counted = on.gather(-1, columns)
    return columns, counted, FactorPosterior(gathered, counted, local, precise=most <= PRECISE_COLUMNS)


def _masked_columns(mask: Tensor, most: int) -> Tensor:
    """Each row's masked columns, padded to the longest row with a column off the mask. shape: (M, n)"""
    row, column = mask.nonzero(as_tuple=True)
    counts = mask.sum(dim=-1)
    place = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    columns = mask.int().argmin(dim=-1, keepdim=True).repeat(1, most)
    columns[row, place] = column
    return columns


def _gather_factor(factor: Tensor, columns: Tensor) -> Tensor:
    """Columns (M, n) of the factor (B or 1, R, S). shape: (B or M, R, n)"""
    if len(columns) == 1:  # index_select along the last of three axes is four times slower than along that of two
        return factor.flatten(0, 1).index_select(-1, columns[0]).reshape(*factor.shape[:2], -1)
    rows, rank = len(columns), factor.shape[1]
    return factor.expand(rows, -1, -1).gather(-1, columns[:, None].expand(-1, rank, -1))


def _gather(rows: Tensor, columns: Tensor | None) -> Tensor:
    """Columns of rows (N, B, S). columns: (B or 1, n) or None for all; returns (N, B, n)."""
    if columns is None:
        return rows
    if len(columns) == 1:
        return rows.index_select(-1, columns[0])
    full = rows.expand(-1, len(columns), -1)
    return full.gather(-1, columns.expand(full.shape[0], -1, -1))
