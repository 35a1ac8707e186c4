"""Normal over images with a sparse precision: neighbours vary together (structured residuals, Dorta et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any, ClassVar

from covae_core.backends import Array, backend_of, cached
from covae_core.densities.base import (
    Density,
    logdet_of_diagonal,
    read_variance,
    shared_rows,
    variance_rows,
)
from covae_core.densities.diagonal_normal import one_hot
from covae_core.densities.layout import Layout, common_batch, flat_pixel, image_shape_of, variance_lead
from covae_core.densities.marginal import marginal_variance
from covae_core.densities.neighbourhood import neighbourhood_of
from covae_core.densities.observation import Observation
from covae_core.densities.precision_conditional import PrecisionConditional
from covae_core.densities.sparse_cholesky import SparseCholesky
from covae_core.noise import Stream

# Variances are exact up to the work of one image of so many numbers.
EXACT_PIXELS = 4096


class SparsePrecisionNormal(Density):
    """Normal over images whose precision has a sparse Cholesky factor: N(μ, (L Lᵀ)⁻¹) (structured residuals eq. 7).

    Of pixel k, filter k holds a_kj for the later pixels around it, and variance d_k is what these leave unexplained:
    column k of L is 1/√d_k on the diagonal and a_kj/√d_k at the neighbours. Without filters it is DiagonalNormal.

    mean: μ (C, H, W) or (B, C, H, W); filters: a (G, K, C, H, W), shared by the batch, or (B, G, K, C, H, W), with
    K = (n_f² − 1)/2 neighbours in the order of `Neighbourhood.offsets` and G dilations, 1, 2, 4, …; what a filter has
    beyond the border is ignored. variance: d, a positive number or an array that broadcasts to the mean. Arrays are
    NumPy's or torch's, float64 if mean or filters are, else float32; log_prob and entropy are float64 always. Channels
    are independent of each other. A score takes K·G products a pixel, a sample as many, in W + (h + 1)(H − 1) steps.
    check: look at values too; never while a graph is traced.

    >>> import numpy as np
    >>> density = SparsePrecisionNormal(np.zeros((1, 4, 4)), np.full((1, 4, 1, 4, 4), -0.2), 0.5)
    >>> image = density.sample(1, seed=0)
    >>> image.shape, density.log_prob(image).shape
    ((1, 1, 4, 4), (1,))

    Raises:
        InvalidArgument: a shape does not fit, an axis is empty, a value is not finite, or a variance is not positive.
    """

    kind: ClassVar[str] = "sparse-precision-normal"

    def __init__(self, mean: Any, filters: Any, variance: Any, *, check: bool = True) -> None:
        self._backend = backend = backend_of(mean, filters, variance)
        mean, self._filters = backend.floats(mean, filters)
        image_shape = image_shape_of("mean", mean.shape)
        self.neighbourhood = neighbourhood_of(self._filters.shape, image_shape)
        self._variance = read_variance(backend, variance, image_shape, mean, check=check)
        batch = common_batch(
            mean=tuple(mean.shape[:-3]),
            filters=tuple(self._filters.shape[:-5]),
            variance=variance_lead(self._variance.shape, image_shape),
        )
        self._layout = layout = Layout(batch, image_shape)
        if check:
            self._check_finite("mean", mean)
            self._check_finite("filters", self._filters)
        self._mean = backend.xp.broadcast_to(mean, batch + image_shape)
        self._mean_rows = shared_rows(backend, mean, image_shape, layout).reshape(-1, layout.pixels)
        self._variance_rows = variance_rows(backend, self._variance, layout)
        rows = shared_rows(backend, self._filters, tuple(self._filters.shape[-5:]), layout)
        filters = rows.reshape(rows.shape[0], -1, layout.pixels)
        self._cholesky = SparseCholesky(backend, filters, self._variance_rows, self.neighbourhood, layout)

    @property
    def filters(self) -> Array:
        """a; shape (G, K, C, H, W) or (B, G, K, C, H, W), as given."""
        return self._filters

    @property
    def variance(self) -> Array:
        """d, a pixel's variance given the later ones; shape (…, C or 1, H or 1, W or 1)."""
        return self._variance

    @property
    def parameters(self) -> dict[str, Array]:
        """{"mean": μ, "filters": a, "variance": d}; SparsePrecisionNormal(**parameters) is the same density."""
        return {"mean": self._mean, "filters": self._filters, "variance": self._variance}

    def _square(self, images: Array) -> Array:
        white = self._cholesky.whiten(images - self._mean_rows)
        return self._backend.xp.sum(white * white, axis=-1, dtype=self._backend.xp.float64)

    def entropy(self) -> Array:
        """Differential entropy (S log 2πe + Σ log d)/2 in nats; shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def whiten(self, x: Any) -> Array:
        """Lᵀ(x − μ), independent standard normals under the density. x: (…, C, H, W); returns the same shape.

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images, sample_shape = self._rows("x", self._backend.array(x, like=self._mean), self.image_shape)
        self._check_finite("x", images)
        return self._images(self._cholesky.whiten(images - self._mean_rows), sample_shape)

    def from_noise(self, pixel_noise: Any) -> Array:
        """The image μ + L⁻ᵀ ε. pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        noise = self._backend.array(pixel_noise, like=self._mean)
        rows, sample_shape = self._rows("pixel_noise", noise, self.image_shape)
        return self._images(self._mean_rows + self._cholesky.color(rows), sample_shape)

    def marginal_variance(self) -> Array:
        """Variance of every pixel, the first of `marginal_variance_with_error`; shape (*batch_shape, C, H, W)."""
        return self.marginal_variance_with_error()[0]

    def marginal_variance_with_error(self) -> tuple[Array, Array]:
        """Variance of every pixel, and its standard error; shape (*batch_shape, C, H, W) each.

        Exact, with an error of 0, up to the work of one image of EXACT_PIXELS numbers; beyond that from draws.
        """
        found, error = marginal_variance(self, self._cholesky.covariance, EXACT_PIXELS)
        return self._spread(found), self._spread(error)

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), a column of (L Lᵀ)⁻¹; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        unit = one_hot(self, flat_pixel(pixel, self.image_shape))
        rows = self._backend.xp.broadcast_to(unit, (1, self._layout.rows, self._layout.pixels))
        return self._spread(self._cholesky.covariance(rows)[0])

    def condition(self, mask: Any, pixels: Any, softness: Any = 0.0) -> PrecisionConditional:
        """Fix some pixels; the rest follow. Arguments and errors as LowRankNormal.condition.

        The free pixels' mean solves Λ_ff (x_f − μ_f) = −Λ_fb (b − μ_b), by preconditioned conjugate gradients.
        """
        return PrecisionConditional(self, Observation(self, self._variance_rows, mask, pixels, softness))

    def _precision(self, rows: Array) -> Array:
        """Σ⁻¹ v. shape: (N, B, S)"""
        return self._cholesky.precision(rows)

    def _to_noise(self, rows: Array) -> Array:
        """Gᵀ v, with Σ = G Gᵀ and G = L⁻ᵀ. shape: (N, B, S)"""
        return self._cholesky.color_transposed(rows)

    def _from_noise(self, noise: Array) -> Array:
        """G ε. shape: (N, B, S)"""
        return self._cholesky.color(noise)

    @cached
    def _precision_diagonal(self) -> Array:
        """Λ's diagonal. shape: (B or 1, S)"""
        return self._cholesky.precision_diagonal()

    @cached
    def _logdet(self) -> Array:
        return logdet_of_diagonal(self._backend, self._variance_rows, self._layout.pixels)

    def _draw(self, seeds: Array) -> Array:
        noise = self._noise(seeds, self._layout.pixels, Stream.PIXEL, self._mean.dtype)
        return self._mean_rows + self._cholesky.color(noise)
