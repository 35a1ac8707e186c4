"""Normal over images with a low-rank-plus-diagonal covariance: scores, samples, edits (SOS-VAE)."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any, ClassVar

import numpy as np

from covae_core.backends import Array, backend_of, cached
from covae_core.densities.base import (
    logdet_of_diagonal,
    overflows,
    read_variance,
    shared_rows,
    variance_rows,
    weighted_square,
)
from covae_core.densities.diagonal_normal import one_hot
from covae_core.densities.factor_posterior import FactorPosterior, times
from covae_core.densities.factored import Factored
from covae_core.densities.layout import (
    Layout,
    common_batch,
    flat_pixel,
    image_shape_of,
    rank_of,
    variance_lead,
)
from covae_core.densities.observation import Conditional, Observation
from covae_core.errors import NotFinite
from covae_core.noise import Stream

# Up to this many gathered columns the R×R products are float64 throughout: they cost nothing.
PRECISE_COLUMNS = 512


class LowRankNormal(Factored):
    """Normal over images whose covariance is low-rank plus diagonal: N(μ, P Pᵀ + D) (SOS-VAE eq. 3).

    mean: μ (C, H, W) or (B, C, H, W); factor: P (R, C, H, W), shared by the batch, or (B, R, C, H, W); variance: the
    diagonal of D, a positive number or an array that broadcasts to the mean; a number, or one per image, is the fast
    case. Arrays are NumPy's or torch's, float64 if mean or factor is, else float32; log_prob and entropy are float64
    always. A score costs O(S R²) for S = C·H·W, and nothing of size S×S is ever formed. check: look at values too,
    which costs passes over P; never while a graph is traced.

    >>> import numpy as np
    >>> density = LowRankNormal(np.zeros((1, 2, 2)), np.ones((1, 1, 2, 2)), 0.5)
    >>> image = density.sample(1, seed=0)
    >>> image.shape, density.log_prob(image).shape
    ((1, 1, 2, 2), (1,))

    Raises:
        InvalidArgument: a shape does not fit, an axis is empty, a value is not finite, or a variance is not positive.
    """

    kind: ClassVar[str] = "low-rank-normal"

    def __init__(self, mean: Any, factor: Any, variance: Any, *, check: bool = True) -> None:
        self._backend = backend = backend_of(mean, factor, variance)
        mean, self._factor = backend.floats(mean, factor)
        image_shape = image_shape_of("mean", mean.shape)
        self.rank = rank_of(self._factor.shape, image_shape)
        self._variance = read_variance(backend, variance, image_shape, mean, check=check)
        batch = common_batch(
            mean=tuple(mean.shape[:-3]),
            factor=tuple(self._factor.shape[:-4]),
            variance=variance_lead(self._variance.shape, image_shape),
        )
        self._layout = Layout(batch, image_shape)
        if check:
            self._check_finite("mean", mean)
            self._check_finite("factor", self._factor)
        pixels = self._layout.pixels
        self._mean = backend.xp.broadcast_to(mean, batch + image_shape)
        self._mean_rows = shared_rows(backend, mean, image_shape, self._layout).reshape(-1, pixels)
        factor_rows = shared_rows(backend, self._factor, (self.rank, *image_shape), self._layout)
        self._factor_rows = factor_rows.reshape(-1, self.rank, pixels)
        self._variance_rows = variance_rows(backend, self._variance, self._layout)

    @property
    def variance(self) -> Array:
        """The diagonal of D, the variance that the factor does not explain; shape (…, C or 1, H or 1, W or 1)."""
        return self._variance

    @property
    def parameters(self) -> dict[str, Array]:
        """{"mean": μ, "factor": P, "variance": D's diagonal}; LowRankNormal(**parameters) is the same density."""
        return {"mean": self._mean, "factor": self._factor, "variance": self._variance}

    def _square(self, images: Array) -> Array:
        """‖(r − P c)/√D‖² + ‖c‖² with r = x − μ and c = K⁻¹PᵀD⁻¹r.

        The difference r'D⁻¹r − c'Kc of two large numbers that textbooks give loses several nats in float32.
        """
        backend, xp = self._backend, self._backend.xp
        residual = images - self._mean_rows
        noise = self._posterior.mean(residual)
        rest = residual - times(backend, xp.astype(noise, residual.dtype, copy=False), self._factor_rows)
        with np.errstate(over="ignore"):
            return weighted_square(backend, rest, self._variance_rows) + xp.sum(noise * noise, axis=-1)

    def entropy(self) -> Array:
        """Differential entropy (S log 2πe + log|D| + log|K|)/2 in nats (SOS-VAE eq. 7); shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def marginal_variance(self) -> Array:
        """Variance of every pixel, diag(P Pᵀ) + D; shape (*batch_shape, C, H, W)."""
        with np.errstate(over="ignore"):
            explained = self._backend.xp.sum(self._factor_rows * self._factor_rows, axis=1)
        return self._spread(self._held("marginal_variance", explained + self._variance_rows))

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), a row of P Pᵀ + D; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        index = flat_pixel(pixel, self.image_shape)
        with np.errstate(over="ignore", invalid="ignore"):
            covariance = times(self._backend, self._factor_rows[None, :, :, index], self._factor_rows)[0]
        return self._spread(self._held("covariance_with", covariance + self._variance_rows * one_hot(self, index)))

    def _held(self, name: str, values: Array) -> Array:
        """The values, unless its precision cannot hold them."""
        if overflows(self._backend, values):
            raise NotFinite(
                f"{name}: the factor's square, with entries up to {float(abs(self._factor).max()):g}, is beyond "
                f"{values.dtype}; density.to(float64) holds more"
            )
        return values

    def from_noise(self, factor_noise: Any, pixel_noise: Any) -> Array:
        """The image μ + P w + √d ε (SOS-VAE eq. 4). factor_noise: w (…, R); pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        smooth = self._smooth_images("factor_noise", factor_noise)
        noise = self._backend.array(pixel_noise, like=self._mean)
        pixels, sample_shape = self._rows("pixel_noise", noise, self.image_shape)
        return smooth + self._images(self._backend.xp.sqrt(self._variance_rows) * pixels, sample_shape)

    def condition(self, mask: Any, pixels: Any, softness: Any = 0.0) -> ConditionalLowRankNormal:
        """Fix some pixels; the rest follow (SOS-VAE eq. 6, through the R×R capacitance of the fixed pixels).

        mask: bool (H, W) or (B, H, W), which fixes all channels of a pixel, or (B, C, H, W). pixels: (C, H, W) or
        (B, C, H, W); its values off the mask are ignored. softness: standard deviation of the noise with which the
        fixed pixels are seen, one number or one per row, (B,); 0 fixes them exactly. Batches of mask, pixels, softness
        and density go together where their sizes are the same, or 1.

        Raises:
            InvalidArgument: a shape does not fit, mask is not bool, a pixel on the mask is not finite, or the softness
                is negative.
        """
        return ConditionalLowRankNormal(self, Observation(self, self._variance_rows, mask, pixels, softness))

    @cached
    def _posterior(self) -> FactorPosterior:
        return FactorPosterior(self._backend, self._factor_rows, None, self._variance_rows)

    @cached
    def _logdet(self) -> Array:
        """log |P Pᵀ + D| = log |D| + log |K|. shape: (B or 1,)"""
        return logdet_of_diagonal(self._backend, self._variance_rows, self._layout.pixels) + self._posterior.logdet

    @cached
    def _white_factor(self) -> Array:
        return self._factor_rows / self._backend.xp.sqrt(self._variance_rows)[:, None]

    def _white_products(self) -> Array:
        return self._backend.gram(self._factor_rows, None, self._variance_rows, exact=True)

    def _white_residual(self, images: Array) -> Array:
        return (images - self._mean_rows) / self._backend.xp.sqrt(self._variance_rows)

    def _factor_noise(self, residual: Array) -> Array:
        return self._posterior.mean(residual)

    def _draw(self, seeds: Array) -> Array:
        dtype, backend = self._mean.dtype, self._backend
        factor_noise = self._noise(seeds, self.rank, Stream.FACTOR, dtype)
        pixel_noise = self._noise(seeds, self._layout.pixels, Stream.PIXEL, dtype)
        smooth = self._mean_rows + self._along(factor_noise)
        return smooth + backend.xp.sqrt(self._variance_rows) * pixel_noise


class ConditionalLowRankNormal(Conditional):
    """A LowRankNormal with some pixels fixed: N(μ + P c, P K⁻¹ Pᵀ + D) off the mask (SOS-VAE eq. 6).

    K = I + Pᵀdiag(m/(d + s²))P and c = K⁻¹Pᵀdiag(m/(d + s²))(b − μ) for the mask m, the fixed values b and the softness
    s: only masked columns of P enter the R×R algebra. On the mask the image is g b + (1 − g)(μ + P c) with
    g = d/(d + s²), which is b itself at s = 0. Made by LowRankNormal.condition.
    """

    def __init__(self, density: LowRankNormal, observation: Observation) -> None:
        super().__init__(density, observation)
        seen = observation
        if seen.everything and seen.soft is None:
            self._posterior = self._density._posterior
            return
        precise = seen.columns is not None and seen.most <= PRECISE_COLUMNS
        self._posterior = FactorPosterior(
            self._backend, self._observed_factor(), seen.counted, seen.variance, precise=precise
        )

    def _observed_factor(self) -> Array:
        columns, factor = self._observation.columns, self._density._factor_rows
        return factor if columns is None else self._backend.take_factor(factor, columns)

    def _square(self) -> Array:
        seen, backend, xp = self._observation, self._backend, self._backend.xp
        residual = (seen.pixels - backend.take(self._density._mean_rows[None], seen.columns)) * seen.counted
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asked sees it, and does it again in float64
            noise = self._posterior.mean(residual)
            spanned = times(backend, xp.astype(noise, residual.dtype, copy=False), self._observed_factor())
            rest = (residual - spanned) * seen.counted
            return weighted_square(backend, rest, seen.variance) + xp.sum(noise * noise, axis=-1)

    def marginal_variance(self) -> Array:
        """Variance of every pixel, 0 on the mask (softness 0); shape (*batch_shape, C, H, W)."""
        density, xp = self._density, self._backend.xp
        keep = self._observation.keep_everywhere()
        whitened = xp.astype(self._posterior.whitener, density.mean.dtype, copy=False) @ density._factor_rows
        # (1 − g)² d of the density and g² s² of the observation's noise together are (1 − g) d.
        return self._spread(keep * (keep * xp.sum(whitened * whitened, axis=1) + density._variance_rows))

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask (softness 0); shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        density, index = self._density, flat_pixel(pixel, self.image_shape)
        keep = self._observation.keep_everywhere()
        noise = self._posterior.solve(density._factor_rows[None, :, :, index])
        noise = self._backend.xp.astype(noise, density.mean.dtype, copy=False)
        covariance = times(self._backend, noise, density._factor_rows)[0] * keep[:, index, None]
        return self._spread(keep * (covariance + density._variance_rows * one_hot(density, index)))

    def _agree(self, images: Array, seeds: Array | None) -> Array:
        """By Matheron's rule."""
        seen, backend = self._observation, self._backend
        pixels, fixed = seen.observed(seeds)
        residual = (pixels - backend.take(images, seen.columns)) * seen.counted
        noise = backend.xp.astype(self._posterior.mean(residual), images.dtype, copy=False)
        shift = times(backend, noise, self._density._factor_rows)
        return backend.overlay(images, shift, seen.keep, fixed, seen.columns)
