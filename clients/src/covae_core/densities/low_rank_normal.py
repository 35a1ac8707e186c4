"""Normal over images with a low-rank-plus-diagonal covariance: scores, samples, edits (SOS-VAE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import log, pi
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from covae_core.densities.base import (
    Array,
    Density,
    Drawable,
    condition_rows,
    float_arrays,
    one_hot,
    read_condition,
    read_variance,
    require_finite,
    seeded_normals,
    variance_rows,
    weighted_square,
)
from covae_core.densities.checks import (
    Layout,
    broadcast_batch,
    flat_pixel,
    require_count,
    split_factor,
    split_image,
    variance_batch,
)
from covae_core.densities.factor_posterior import FactorPosterior, gram, times, times_transposed
from covae_core.densities.slerp import slerp
from covae_core.noise import Stream

# Masks that touch more than this share of the columns are multiplied in, not gathered: a gather is a slow copy.
GATHERED_SHARE = 1 / 3
# Up to this many gathered columns the R×R products are float64 throughout: they cost nothing.
PRECISE_COLUMNS = 512


class LowRankNormal(Density):
    """Normal over images whose covariance is low-rank plus diagonal: N(μ, P Pᵀ + D) (SOS-VAE eq. 3).

    mean: μ (…, C, H, W); factor: P (…, R, C, H, W); variance: the diagonal of D, a positive number or an array that
    broadcasts to the mean; a number, or one per image, is the fast case. Batch axes broadcast; a factor without them is
    shared. Arrays are float64 if mean or factor is, else float32; log_prob and entropy are float64 always. A score
    costs O(S R²) for S = C·H·W, and nothing of size S×S is ever formed.

    >>> import numpy as np
    >>> density = LowRankNormal(np.zeros((1, 2, 2)), np.ones((1, 1, 2, 2)), 0.5)
    >>> image = density.sample(1, seed=0)
    >>> image.shape, density.log_prob(image).shape
    ((1, 1, 2, 2), (1,))

    Raises:
        InvalidArgument: a shape does not fit, an axis is empty, a value is not finite, or a variance is not positive.
    """

    kind: ClassVar[str] = "low-rank-normal"

    def __init__(self, mean: ArrayLike, factor: ArrayLike, variance: ArrayLike) -> None:
        mean_array, factor_array = float_arrays(mean, factor)
        mean_batch, image_shape = split_image("mean", mean_array.shape)
        factor_batch, self.rank = split_factor(factor_array.shape, image_shape)
        self._factor = require_finite("factor", factor_array)
        self._variance = read_variance(variance, image_shape, mean_array.dtype)
        batch_shape = broadcast_batch(
            mean=mean_batch, factor=factor_batch, variance=variance_batch(self._variance.shape, image_shape)
        )
        self._layout = Layout(batch_shape, image_shape)
        self.mean = np.broadcast_to(require_finite("mean", mean_array), batch_shape + image_shape)
        self._mean_rows = self.mean.reshape(self._layout.rows, self._layout.pixels)
        self._factor_rows = self._flatten_factor(factor_batch)
        self._variance_rows = variance_rows(self._variance, self._layout)

    def _flatten_factor(self, batch: tuple[int, ...]) -> Array:
        """The factor as (B or 1, R, S), 1 if the batch shares it."""
        if all(size == 1 for size in batch):
            return self._factor.reshape(1, self.rank, self._layout.pixels)
        full = np.broadcast_to(self._factor, self.batch_shape + self._factor.shape[-4:])
        return full.reshape(self._layout.rows, self.rank, self._layout.pixels)

    @property
    def factor(self) -> Array:
        """P; shape (…, R, C, H, W), as given."""
        return self._factor

    @property
    def variance(self) -> Array:
        """The diagonal of D, the variance that the factor does not explain; shape (…, C or 1, H or 1, W or 1)."""
        return self._variance

    @property
    def parameters(self) -> dict[str, Array]:
        """{"factor": P, "variance": D's diagonal}; LowRankNormal(mean, **parameters) is the same density."""
        return {"factor": self._factor, "variance": self._variance}

    def log_prob(self, x: ArrayLike) -> NDArray[np.float64]:
        """Log-density of images in nats (SOS-VAE eq. 3), in float64.

        The quadratic form is ‖(r − P c)/√D‖² + ‖c‖² with r = x − μ and c = K⁻¹PᵀD⁻¹r. The difference r'D⁻¹r − c'Kc of
        two large numbers that textbooks give loses several nats in float32.

        x: (…, C, H, W), broadcast with the batch; returns (…).

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images, sample_shape = self._rows("x", np.asarray(x, dtype=self.mean.dtype), self.image_shape)
        residual = require_finite("x", images) - self._mean_rows
        noise = self._posterior.mean(residual)
        rest = residual - times(noise.astype(residual.dtype), self._factor_rows)
        quadratic = weighted_square(rest, self._variance_rows) + np.square(noise).sum(axis=-1)
        log_prob = -0.5 * (quadratic + self._logdet + self._layout.pixels * log(2 * pi))
        return np.asarray(log_prob.reshape(sample_shape + self.batch_shape))

    def entropy(self) -> NDArray[np.float64]:
        """Differential entropy (S log 2πe + log|D| + log|K|)/2 in nats (SOS-VAE eq. 7); shape batch_shape."""
        entropy = 0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi)))
        return self._spread(entropy, ())

    def marginal_variance(self) -> Array:
        """Variance of every pixel, diag(P Pᵀ) + D; shape (*batch_shape, C, H, W)."""
        explained = np.einsum("brs,brs->bs", self._factor_rows, self._factor_rows)
        return self._spread(explained + self._variance_rows)

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), a row of P Pᵀ + D; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        index = flat_pixel(pixel, self.image_shape)
        covariance = times(self._factor_rows[None, :, :, index], self._factor_rows)[0]
        return self._spread(covariance + self._variance_rows * one_hot(index, self._layout.pixels))

    def from_noise(self, factor_noise: ArrayLike, pixel_noise: ArrayLike) -> Array:
        """The image μ + P w + √d ε (SOS-VAE eq. 4). factor_noise: w (…, R); pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        smooth = self._smooth_images("factor_noise", np.asarray(factor_noise, dtype=self.mean.dtype))
        pixel_array = np.asarray(pixel_noise, dtype=self.mean.dtype)
        pixels, sample_shape = self._rows("pixel_noise", pixel_array, self.image_shape)
        return smooth + self._images(np.sqrt(self._variance_rows) * pixels, sample_shape)

    def condition(self, mask: ArrayLike, pixels: ArrayLike) -> ConditionalLowRankNormal:
        """Fix some pixels; the rest follow (SOS-VAE eq. 6, through the R×R capacitance of the fixed pixels).

        mask: bool (…, H, W), which fixes all channels of a pixel, or (…, C, H, W). A mask with fewer axes than the
        mean or the pixels is read as the former; otherwise one whose third axis from the end is C or 1 as the latter.
        pixels: (…, C, H, W); its values off the mask are ignored. Batches of mask, pixels and density broadcast.

        Raises:
            InvalidArgument: a shape does not fit, mask is not bool, or a pixel on the mask is not finite.
        """
        mask_array, pixel_array, layout = read_condition(self, mask, pixels)
        return ConditionalLowRankNormal(self._expand(layout), *condition_rows(mask_array, pixel_array, layout))

    def components(self) -> Array:
        """Principal components P V of the factor, largest first; shape (*batch_shape, R, C, H, W).

        V holds the eigenvectors of PᵀP; the norms are P's singular values. Of each component the entry of largest
        magnitude is positive.
        """
        basis = self._basis.astype(self.mean.dtype)
        components = basis.swapaxes(1, 2) @ self._factor_rows
        largest = np.abs(components).argmax(axis=-1)[..., None]
        components = components * np.where(np.take_along_axis(components, largest, axis=-1) < 0, -1, 1)
        components = components.astype(self.mean.dtype, copy=False)
        return self._spread(components, (self.rank, *self.image_shape))

    def scale_components(self, scales: ArrayLike, noise: ArrayLike) -> Array:
        """The image μ + P V diag(a) Vᵀ w (SOS-VAE eq. 5), no pixel noise, exact at a = 0.

        scales: a (…, R), in the order of components(); noise: w (…, R). They broadcast; returns (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        scale_array, noise_array = self._together((self.rank,), scales=scales, noise=noise)
        scale_rows, _ = self._rows("scales", scale_array, (self.rank,))
        noise_rows, sample_shape = self._rows("noise", noise_array, (self.rank,))
        scaled = times_transposed(scale_rows * times(noise_rows, self._basis), self._basis)
        return self._smooth_images("noise", scaled.reshape(*sample_shape, *self.batch_shape, self.rank))

    def interpolate(self, noise_a: ArrayLike, noise_b: ArrayLike, steps: int) -> Array:
        """Images μ + P slerp(w_a, w_b, t), t from 0 to 1 (SOS-VAE eq. 4 without ε, eq. 8).

        noise_a, noise_b: (…, R); returns (steps, …, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit, or steps < 1.
        """
        steps = require_count("steps", steps)
        start, end = self._together((self.rank,), noise_a=noise_a, noise_b=noise_b)
        return self._smooth_images("noise", slerp(start, end, steps))

    @cached_property
    def _posterior(self) -> FactorPosterior:
        return FactorPosterior(self._factor_rows, None, self._variance_rows)

    @cached_property
    def _logdet(self) -> NDArray[np.float64]:
        """log |P Pᵀ + D| = log |D| + log |K|. shape: (B or 1,)"""
        logs = np.log(self._variance_rows.astype(np.float64)).sum(axis=-1)
        return np.asarray(logs * (self._layout.pixels / self._variance_rows.shape[-1]) + self._posterior.logdet)

    @cached_property
    def _basis(self) -> NDArray[np.float64]:
        """V, the eigenvectors of PᵀP by descending eigenvalue. shape: (B or 1, R, R)"""
        return np.linalg.eigh(gram(self._factor_rows, None, np.float64))[1][..., ::-1]

    def _draw(self, seeds: NDArray[np.int64]) -> Array:
        factor_noise = seeded_normals(seeds, self.rank, Stream.FACTOR, self.mean.dtype)
        pixel_noise = seeded_normals(seeds, self._layout.pixels, Stream.PIXEL, self.mean.dtype)
        smooth = self._mean_rows + times(factor_noise, self._factor_rows)
        return np.asarray(smooth + np.sqrt(self._variance_rows) * pixel_noise)

    def _smooth_images(self, name: str, noise: Array) -> Array:
        """The image μ + P w of noise (…, R)."""
        rows, sample_shape = self._rows(name, noise.astype(self.mean.dtype), (self.rank,))
        return self._images(self._mean_rows + times(rows, self._factor_rows), sample_shape)

    def _expand(self, layout: Layout) -> LowRankNormal:
        if layout.batch_shape == self.batch_shape:
            return self
        mean = np.broadcast_to(self.mean, layout.batch_shape + layout.image_shape)
        return LowRankNormal(mean, self._factor, self._variance)


class ConditionalLowRankNormal(Drawable):
    """A LowRankNormal with some pixels fixed: N(μ + P c, P K⁻¹ Pᵀ + D) off the mask (SOS-VAE eq. 6).

    K = I + Pᵀdiag(m/d)P and c = K⁻¹Pᵀdiag(m/d)(b − μ) for the mask m and the fixed values b: only masked columns of P
    enter the R×R algebra. Made by LowRankNormal.condition.
    """

    def __init__(self, density: LowRankNormal, mask: NDArray[np.bool_], pixels: Array) -> None:
        self._density = density
        self._layout = density._layout
        self._mask = mask
        self._columns, self._counted, self._posterior = _observe(density, mask)
        self._fixed = _gather(pixels, self._columns) * self._counted

    @cached_property
    def mean(self) -> Array:
        """The conditional mean: the fixed values on the mask, μ + P c off it; shape (*batch_shape, C, H, W)."""
        return self._images(self._agree(self._density._mean_rows[None]), ())

    def marginal_variance(self) -> Array:
        """Variance of every pixel, 0 on the mask; shape (*batch_shape, C, H, W)."""
        density = self._density
        whitened = self._posterior.whitener.astype(density.mean.dtype) @ density._factor_rows
        variance = np.einsum("brs,brs->bs", whitened, whitened) + density._variance_rows
        return self._spread(np.where(self._mask, 0, variance).astype(density.mean.dtype))

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        density, index = self._density, flat_pixel(pixel, self.image_shape)
        noise = self._posterior.solve(density._factor_rows[None, :, :, index]).astype(density.mean.dtype)
        covariance = times(noise, density._factor_rows)[0]
        covariance = covariance + density._variance_rows * one_hot(index, self._layout.pixels)
        fixed = self._mask | self._mask[:, index, None]
        return self._spread(np.where(fixed, 0, covariance).astype(density.mean.dtype))

    def _draw(self, seeds: NDArray[np.int64]) -> Array:
        return self._agree(self._density._draw(seeds))

    def _agree(self, images: Array) -> Array:
        """Matheron's rule: move images (N, B, S) of the unconditional density so that they agree with the pixels."""
        residual = (self._fixed - _gather(images, self._columns)) * self._counted
        noise = self._posterior.mean(residual)
        shifted = times(noise.astype(images.dtype), self._density._factor_rows)
        shifted += images
        if self._columns is None:
            # Sums of products with 0 and 1 are exact, and much faster than numpy.where on a scattered mask.
            shifted *= 1 - self._counted
            shifted += self._fixed
        else:
            chosen = np.where(self._counted > 0, self._fixed, _gather(shifted, self._columns))
            np.put_along_axis(shifted, self._columns[None], chosen, axis=-1)
        return shifted


def _observe(
    density: LowRankNormal, mask: NDArray[np.bool_]
) -> tuple[NDArray[np.int64] | None, Array, FactorPosterior]:
    """The columns that a mask (M, S) touches, (M, n), or None for all; the mask there; the factor's noise given them.

    The mask there is in numbers, 1 and 0.
    """
    factor, variance = density._factor_rows, density._variance_rows
    counts = np.array([np.count_nonzero(row) for row in mask])  # faster than along an axis
    most = int(counts.max())
    if most > GATHERED_SHARE * mask.shape[-1]:
        on = mask.astype(factor.dtype)
        all_fixed = int(counts.min()) == mask.shape[-1]
        return None, on, density._posterior if all_fixed else FactorPosterior(factor, on, variance)
    columns = _masked_columns(mask, counts)
    gathered = np.take(factor, columns[0], axis=-1) if len(columns) == 1 else _gather_each(factor, columns)
    local = variance if variance.shape[-1] == 1 else _gather(variance[None], columns)[0]
    counted = (np.arange(most) < counts[:, None]).astype(factor.dtype)
    return columns, counted, FactorPosterior(gathered, counted, local, precise=most <= PRECISE_COLUMNS)


def _masked_columns(mask: NDArray[np.bool_], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row's masked columns, padded to the longest row with a column off the mask. shape: (M, n)

    counts: how many each row has, (M,).
    """
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[-1])  # much faster than nonzero along two axes
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = np.repeat(mask.argmin(axis=-1)[:, None], counts.max(), axis=1)
    columns[row, place] = column
    return columns


def _gather_each(factor: Array, columns: NDArray[np.int64]) -> Array:
    """Other columns (M, n) of each row of the factor (B or 1, R, S). shape: (M, R, n)"""
    gathered = np.empty((len(columns), factor.shape[1], columns.shape[1]), factor.dtype)
    rows = np.broadcast_to(factor, (len(columns), *factor.shape[1:]))
    for row, chosen, out in zip(rows, columns, gathered, strict=True):
        np.take(row, chosen, axis=-1, out=out, mode="clip")  # in any other mode take writes into a copy of out first
    return gathered


def _gather(rows: Array, columns: NDArray[np.int64] | None) -> Array:
    """Columns of rows (N, B, S). columns: (B or 1, n) or None for all; returns (N, B, n)."""
    if columns is None:
        return rows
    if len(columns) == 1:
        return rows[..., columns[0]]
    full = np.broadcast_to(rows, (rows.shape[0], len(columns), rows.shape[-1]))
    gathered: Array = np.take_along_axis(full, columns[None], axis=-1)
    return gathered
