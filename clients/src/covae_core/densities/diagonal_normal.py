"""Normal over images with independent pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any, ClassVar

from array_api_compat import device

from covae_core.backends import Array, backend_of, cached
from covae_core.densities.base import (
    Density,
    logdet_of_diagonal,
    read_variance,
    shared_rows,
    variance_rows,
    weighted_square,
)
from covae_core.densities.layout import Layout, common_batch, flat_pixel, image_shape_of, variance_lead
from covae_core.densities.observation import Conditional, Observation


class DiagonalNormal(Density):
    """Normal over images with independent pixels: N(μ, D).

    mean: μ (C, H, W) or (B, C, H, W); variance: the diagonal of D, a positive number or an array that broadcasts to the
    mean. Arrays are NumPy's or torch's, float64 if the mean is, else float32; log_prob and entropy are float64 always.
    check: look at values too; never while a graph is traced.

    Raises:
        InvalidArgument: a shape does not fit, an axis is empty, a value is not finite, or a variance is not positive.
    """

    kind: ClassVar[str] = "diagonal-normal"

    def __init__(self, mean: Any, variance: Any, *, check: bool = True) -> None:
        self._backend = backend = backend_of(mean, variance)
        (mean,) = backend.floats(mean)
        image_shape = image_shape_of("mean", mean.shape)
        self._variance = read_variance(backend, variance, image_shape, mean, check=check)
        batch = common_batch(mean=tuple(mean.shape[:-3]), variance=variance_lead(self._variance.shape, image_shape))
        self._layout = Layout(batch, image_shape)
        if check:
            self._check_finite("mean", mean)
        self._mean = backend.xp.broadcast_to(mean, batch + image_shape)
        self._mean_rows = shared_rows(backend, mean, image_shape, self._layout).reshape(-1, self._layout.pixels)
        self._variance_rows = variance_rows(backend, self._variance, self._layout)

    @property
    def variance(self) -> Array:
        """The diagonal of D; shape (…, C or 1, H or 1, W or 1)."""
        return self._variance

    @property
    def parameters(self) -> dict[str, Array]:
        """{"mean": μ, "variance": D's diagonal}; DiagonalNormal(**parameters) is the same density."""
        return {"mean": self._mean, "variance": self._variance}

    def _square(self, images: Array) -> Array:
        return weighted_square(self._backend, images - self._mean_rows, self._variance_rows)

    def entropy(self) -> Array:
        """Differential entropy (S log 2πe + log|D|)/2 in nats; shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def whiten(self, x: Any) -> Array:
        """D^(−½)(x − μ), independent standard normals under the density. x: (…, C, H, W); returns the same shape.

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images, sample_shape = self._rows("x", self._backend.array(x, like=self._mean), self.image_shape)
        self._check_finite("x", images)
        return self._images((images - self._mean_rows) / self._backend.xp.sqrt(self._variance_rows), sample_shape)

    def marginal_variance(self) -> Array:
        """Variance of every pixel; shape (*batch_shape, C, H, W)."""
        xp = self._backend.xp
        return self._spread(xp.broadcast_to(self._variance_rows, (self._variance_rows.shape[0], self._layout.pixels)))

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w): 0 but for itself; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        return self._spread(self._variance_rows * one_hot(self, flat_pixel(pixel, self.image_shape)))

    def from_noise(self, pixel_noise: Any) -> Array:
        """The image μ + √d ε. pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        noise = self._backend.array(pixel_noise, like=self._mean)
        rows, sample_shape = self._rows("pixel_noise", noise, self.image_shape)
        return self._images(self._mean_rows + self._backend.xp.sqrt(self._variance_rows) * rows, sample_shape)

    def condition(self, mask: Any, pixels: Any, softness: Any = 0.0) -> ConditionalDiagonalNormal:
        """Fix some pixels; the rest stay as they are. Arguments and errors as LowRankNormal.condition."""
        return ConditionalDiagonalNormal(self, Observation(self, self._variance_rows, mask, pixels, softness))

    @cached
    def _logdet(self) -> Array:
        return logdet_of_diagonal(self._backend, self._variance_rows, self._layout.pixels)

    def _draw(self, seeds: Array) -> Array:
        noise = self._noise(seeds, self._layout.pixels, self.pixel_stream, self._mean.dtype)
        return self._mean_rows + self._backend.xp.sqrt(self._variance_rows) * noise


class ConditionalDiagonalNormal(Conditional):
    """A DiagonalNormal with some pixels fixed; the others keep their mean and variance. Made by its condition."""

    def _square(self) -> Array:
        seen, backend = self._observation, self._backend
        residual = (seen.pixels - backend.take(self._density._mean_rows[None], seen.columns)) * seen.counted
        return weighted_square(backend, residual, seen.variance)

    def marginal_variance(self) -> Array:
        """Variance of every pixel, 0 on the mask (softness 0); shape (*batch_shape, C, H, W)."""
        # (1 − g)² d of the density and g² s² of the observation's noise together are (1 − g) d.
        return self._spread(self._observation.keep_everywhere() * self._density._variance_rows)

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask (softness 0); shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        own = one_hot(self._density, flat_pixel(pixel, self.image_shape))
        return self._spread(self._observation.keep_everywhere() * self._density._variance_rows * own)

    def _agree(self, images: Array, seeds: Array | None) -> Array:
        seen, xp = self._observation, self._backend.xp
        _, fixed = seen.observed(seeds)
        shape = (images.shape[0], self._layout.rows, self._layout.pixels)
        shift = xp.zeros(shape, dtype=images.dtype, device=self._device)
        return self._backend.overlay(images, shift, seen.keep, fixed, seen.columns)


def one_hot(density: Density, index: int) -> Array:
    """Zeros with a one at index, of the density's dtype. shape: (S,)"""
    backend = density._backend
    places = backend.xp.arange(density._layout.pixels, device=device(density.mean))
    return backend.xp.astype(places == index, density.mean.dtype)
