"""Normal over images with a factor and a sparse precision: what varies together, near and far."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any, ClassVar

import numpy as np

from covae_core.backends import Array, backend_of, cached
from covae_core.densities.base import shared_rows
from covae_core.densities.factor_posterior import FactorPosterior, times, times_transposed
from covae_core.densities.factored import Factored
from covae_core.densities.layout import Layout, common_batch, flat_pixel, image_shape_of, rank_of
from covae_core.densities.observation import Observation
from covae_core.densities.precision_conditional import PrecisionConditional
from covae_core.densities.sparse_precision_normal import SparsePrecisionNormal
from covae_core.noise import Stream


class HybridNormal(Factored):
    """N(μ, P Pᵀ + (L Lᵀ)⁻¹): a factor for what varies together across the image, a sparse precision for its texture.

    It is LowRankNormal in whitened coordinates, where what is local is N(0, I): r̃ = Lᵀ(x − μ), P̃ = Lᵀ P and
    K = I + P̃ᵀ P̃. Arguments as those of LowRankNormal and SparsePrecisionNormal; without filters, or with a factor of 0,
    it is the one or the other.

    >>> import numpy as np
    >>> density = HybridNormal(np.zeros((1, 4, 4)), np.ones((1, 1, 4, 4)), np.full((1, 4, 1, 4, 4), -0.2), 0.5)
    >>> density.sample(1, seed=0).shape
    (1, 1, 4, 4)

    Raises:
        InvalidArgument: a shape does not fit, an axis is empty, a value is not finite, or a variance is not positive.
    """

    kind: ClassVar[str] = "hybrid-normal"

    def __init__(self, mean: Any, factor: Any, filters: Any, variance: Any, *, check: bool = True) -> None:
        self._backend = backend = backend_of(mean, factor, filters, variance)
        mean, self._factor, filters = backend.floats(mean, factor, filters)
        image_shape = image_shape_of("mean", mean.shape)
        self.rank = rank_of(self._factor.shape, image_shape)
        local = SparsePrecisionNormal(mean, filters, variance, check=check)
        batch = common_batch(factor=tuple(self._factor.shape[:-4]), others=local.batch_shape)
        self._layout = Layout(batch, image_shape)
        self.local = local._expand(self._layout)
        if check:
            self._check_finite("factor", self._factor)
        self._mean, self._mean_rows = self.local._mean, self.local._mean_rows
        self._variance_rows, self._cholesky = self.local._variance_rows, self.local._cholesky
        factor_rows = shared_rows(backend, self._factor, (self.rank, *image_shape), self._layout)
        self._factor_rows = factor_rows.reshape(-1, self.rank, self._layout.pixels)

    @property
    def filters(self) -> Array:
        """The filters of L; shape (G, K, C, H, W) or (B, G, K, C, H, W), as given."""
        return self.local.filters

    @property
    def variance(self) -> Array:
        """d, a pixel's variance given the later ones and the factor's noise; shape (…, C or 1, H or 1, W or 1)."""
        return self.local.variance

    @property
    def parameters(self) -> dict[str, Array]:
        """{"mean": μ, "factor": P, "filters": a, "variance": d}; HybridNormal(**parameters) is the same density."""
        return {"mean": self._mean, "factor": self._factor, "filters": self.filters, "variance": self.variance}

    def _square(self, images: Array) -> Array:
        """‖r̃ − P̃ c‖² + ‖c‖² with c = K⁻¹ P̃ᵀ r̃, as LowRankNormal's."""
        backend, xp = self._backend, self._backend.xp
        white = self._white_residual(images)
        noise = self._posterior.mean(white)
        rest = white - times(backend, xp.astype(noise, white.dtype, copy=False), self._white_factor)
        with np.errstate(over="ignore"):
            return xp.sum(rest * rest, axis=-1, dtype=xp.float64) + xp.sum(noise * noise, axis=-1)

    def entropy(self) -> Array:
        """Differential entropy (S log 2πe + Σ log d + log|K|)/2 in nats; shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def marginal_variance(self) -> Array:
        """Variance of every pixel, the first of `marginal_variance_with_error`; shape (*batch_shape, C, H, W)."""
        return self.marginal_variance_with_error()[0]

    def marginal_variance_with_error(self) -> tuple[Array, Array]:
        """diag(P Pᵀ) and what is local, and its standard error, as SparsePrecisionNormal's."""
        local, error = self.local.marginal_variance_with_error()
        return self._spread(self._backend.xp.sum(self._factor_rows * self._factor_rows, axis=1)) + local, error

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w); shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        index = flat_pixel(pixel, self.image_shape)
        far = times(self._backend, self._factor_rows[None, :, :, index], self._factor_rows)[0]
        return self._spread(far) + self.local.covariance_with(pixel)

    def from_noise(self, factor_noise: Any, pixel_noise: Any) -> Array:
        """The image μ + P w + L⁻ᵀ ε. factor_noise: w (…, R); pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        return self._smooth_images("factor_noise", factor_noise) + (self.local.from_noise(pixel_noise) - self._mean)

    def condition(self, mask: Any, pixels: Any, softness: Any = 0.0) -> PrecisionConditional:
        """Fix some pixels; the rest follow. Arguments and errors as LowRankNormal.condition, by conjugate gradients."""
        return PrecisionConditional(self, Observation(self, self._variance_rows, mask, pixels, softness))

    def _precision(self, rows: Array) -> Array:
        """Σ⁻¹ v = L (I − P̃ K⁻¹ P̃ᵀ) Lᵀ v. shape: (N, B, S)"""
        white = self._cholesky.whiten(rows)
        noise = self._backend.xp.astype(self._posterior.mean(white), rows.dtype, copy=False)
        factor = self._backend.xp.astype(self._white_factor, rows.dtype, copy=False)
        return self._cholesky.whiten_transposed(white - times(self._backend, noise, factor))

    def _to_noise(self, rows: Array) -> Array:
        """Gᵀ v, with Σ = G Gᵀ and G = (L⁻ᵀ, P). shape: (N, B, S) → (N, B, S + R)"""
        along = times_transposed(self._backend, rows, self._factor_rows)
        return self._backend.xp.concat([self._cholesky.color_transposed(rows), along], axis=-1)

    def _from_noise(self, noise: Array) -> Array:
        """G ε. shape: (N, B, S + R) → (N, B, S)"""
        pixels = self._layout.pixels
        near = self._cholesky.color(noise[..., :pixels])
        return near + times(self._backend, noise[..., pixels:], self._factor_rows)

    @property
    def _precision_diagonal(self) -> Array:
        """Λ's diagonal, at least Σ⁻¹'s. shape: (B or 1, S)"""
        return self.local._precision_diagonal

    @cached
    def _white_factor(self) -> Array:
        """P̃ = Lᵀ P. shape: (B or 1, R, S)"""
        columns = self._backend.xp.permute_dims(self._factor_rows, (1, 0, 2))
        return self._backend.xp.permute_dims(self._cholesky.whiten(columns), (1, 0, 2))

    def _white_products(self) -> Array:
        return self._backend.gram(self._white_factor, None, None, exact=True)

    def _white_residual(self, images: Array) -> Array:
        return self._cholesky.whiten(images - self._mean_rows)

    @cached
    def _posterior(self) -> FactorPosterior:
        ones = self._backend.xp.ones_like(self._white_factor[:1, 0, :1])
        return FactorPosterior(self._backend, self._white_factor, None, ones)

    @cached
    def _logdet(self) -> Array:
        """log |Σ| = Σ log d + log |K|. shape: (B or 1,)"""
        return self.local._logdet + self._posterior.logdet

    def _factor_noise(self, residual: Array) -> Array:
        return self._posterior.mean(self._cholesky.whiten(residual))

    def _draw(self, seeds: Array) -> Array:
        factor_noise = self._noise(seeds, self.rank, Stream.FACTOR, self._mean.dtype)
        return self.local._draw(seeds) + self._along(factor_noise)
