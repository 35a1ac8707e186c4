"""Normal over images with independent pixels."""

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
    split_image,
    variance_batch,
)
from covae_core.densities.slerp import slerp
from covae_core.noise import Stream


class DiagonalNormal(Density):
    """Normal over images with independent pixels: N(μ, D), a LowRankNormal without a factor.

    mean: μ (…, C, H, W); variance: the diagonal of D, a positive number or an array that broadcasts to the mean.
    Arrays are float64 if the mean is, else float32; log_prob and entropy are float64 always.

    Raises:
        InvalidArgument: a shape does not fit, an axis is empty, a value is not finite, or a variance is not positive.
    """

    kind: ClassVar[str] = "diagonal-normal"
    rank: int = 0

    def __init__(self, mean: ArrayLike, variance: ArrayLike) -> None:
        (mean_array,) = float_arrays(mean)
        mean_batch, image_shape = split_image("mean", mean_array.shape)
        self._variance = read_variance(variance, image_shape, mean_array.dtype)
        batch_shape = broadcast_batch(mean=mean_batch, variance=variance_batch(self._variance.shape, image_shape))
        self._layout = Layout(batch_shape, image_shape)
        self.mean = np.broadcast_to(require_finite("mean", mean_array), batch_shape + image_shape)
        self._mean_rows = self.mean.reshape(self._layout.rows, self._layout.pixels)
        self._variance_rows = variance_rows(self._variance, self._layout)

    @property
    def variance(self) -> Array:
        """The diagonal of D; shape (…, C or 1, H or 1, W or 1)."""
        return self._variance

    @property
    def parameters(self) -> dict[str, Array]:
        """{"variance": D's diagonal}; DiagonalNormal(mean, **parameters) is the same density."""
        return {"variance": self._variance}

    def log_prob(self, x: ArrayLike) -> NDArray[np.float64]:
        """Log-density of images in nats, in float64. x: (…, C, H, W), broadcast with the batch; returns (…).

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images, sample_shape = self._rows("x", np.asarray(x, dtype=self.mean.dtype), self.image_shape)
        residual = require_finite("x", images) - self._mean_rows
        quadratic = weighted_square(residual, self._variance_rows)
        log_prob = -0.5 * (quadratic + self._logdet + self._layout.pixels * log(2 * pi))
        return np.asarray(log_prob.reshape(sample_shape + self.batch_shape))

    def entropy(self) -> NDArray[np.float64]:
        """Differential entropy (S log 2πe + log|D|)/2 in nats; shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def marginal_variance(self) -> Array:
        """Variance of every pixel; shape (*batch_shape, C, H, W)."""
        return self._spread(np.broadcast_to(self._variance_rows, (len(self._variance_rows), self._layout.pixels)))

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w): 0 but for itself; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        index = flat_pixel(pixel, self.image_shape)
        return self._spread(self._variance_rows * one_hot(index, self._layout.pixels))

    def from_noise(self, factor_noise: ArrayLike, pixel_noise: ArrayLike) -> Array:
        """The image μ + √d ε. factor_noise: (…, 0), for the other densities' sake; pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        self._rows("factor_noise", np.asarray(factor_noise, dtype=self.mean.dtype), (0,))
        return self._noisy_images("pixel_noise", np.asarray(pixel_noise, dtype=self.mean.dtype))

    def condition(self, mask: ArrayLike, pixels: ArrayLike) -> ConditionalDiagonalNormal:
        """Fix some pixels; the rest stay as they are. Arguments and errors as LowRankNormal.condition."""
        mask_array, pixel_array, layout = read_condition(self, mask, pixels)
        return ConditionalDiagonalNormal(self._expand(layout), *condition_rows(mask_array, pixel_array, layout))

    def components(self) -> Array:
        """No components; shape (*batch_shape, 0, C, H, W)."""
        return np.zeros((*self.batch_shape, 0, *self.image_shape), dtype=self.mean.dtype)

    def scale_components(self, scales: ArrayLike, noise: ArrayLike) -> Array:
        """The mean. scales, noise: (…, 0); returns (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        scale_array, _ = self._together((0,), scales=scales, noise=noise)
        self._rows("scales", scale_array, (0,))
        return np.broadcast_to(self.mean, scale_array.shape[:-1] + self.image_shape).copy()

    def interpolate(self, noise_a: ArrayLike, noise_b: ArrayLike, steps: int) -> Array:
        """Images μ + √d slerp(ε_a, ε_b, t), t from 0 to 1. noise_a, noise_b: (…, C, H, W); returns (steps, …, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit, or steps < 1.
        """
        steps = require_count("steps", steps)
        ends = self._together(self.image_shape, noise_a=noise_a, noise_b=noise_b)
        start, end = (noise.reshape(*noise.shape[:-3], self._layout.pixels) for noise in ends)
        path = slerp(start, end, steps)
        return self._noisy_images("noise", path.reshape(*path.shape[:-1], *self.image_shape).astype(self.mean.dtype))

    @cached_property
    def _logdet(self) -> NDArray[np.float64]:
        logs = np.log(self._variance_rows.astype(np.float64)).sum(axis=-1)
        return np.asarray(logs * (self._layout.pixels / self._variance_rows.shape[-1]))

    def _draw(self, seeds: NDArray[np.int64]) -> Array:
        noise = seeded_normals(seeds, self._layout.pixels, Stream.PIXEL, self.mean.dtype)
        return np.asarray(self._mean_rows + np.sqrt(self._variance_rows) * noise)

    def _noisy_images(self, name: str, noise: Array) -> Array:
        rows, sample_shape = self._rows(name, noise, self.image_shape)
        return self._images(self._mean_rows + np.sqrt(self._variance_rows) * rows, sample_shape)

    def _expand(self, layout: Layout) -> DiagonalNormal:
        if layout.batch_shape == self.batch_shape:
            return self
        return DiagonalNormal(np.broadcast_to(self.mean, layout.batch_shape + layout.image_shape), self._variance)


class ConditionalDiagonalNormal(Drawable):
    """A DiagonalNormal with some pixels fixed; the others keep their mean and variance. Made by its condition."""

    def __init__(self, density: DiagonalNormal, mask: NDArray[np.bool_], pixels: Array) -> None:
        self._density = density
        self._layout = density._layout
        self._mask = mask
        self._pixels = pixels

    @cached_property
    def mean(self) -> Array:
        """The fixed values on the mask, μ off it; shape (*batch_shape, C, H, W)."""
        return self._images(np.where(self._mask, self._pixels, self._density._mean_rows), ())

    def marginal_variance(self) -> Array:
        """Variance of every pixel, 0 on the mask; shape (*batch_shape, C, H, W)."""
        return self._off_mask(self._density.marginal_variance())

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        return self._off_mask(self._density.covariance_with(pixel))

    def _off_mask(self, images: Array) -> Array:
        rows = images.reshape(self._layout.rows, self._layout.pixels)
        return self._spread(np.where(self._mask, 0, rows).astype(images.dtype))

    def _draw(self, seeds: NDArray[np.int64]) -> Array:
        return np.where(self._mask, self._pixels, self._density._draw(seeds))
