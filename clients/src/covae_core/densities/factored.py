"""What densities with a factor share: its columns are what images vary along together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from covae_core.backends import Array, cached
from covae_core.densities.base import Density
from covae_core.densities.factor_posterior import times, times_transposed
from covae_core.densities.layout import require_count
from covae_core.densities.slerp import slerp

OneFactored = TypeVar("OneFactored", bound="Factored")


class Factored(Density):
    """A density of μ + P w and something beside it, w standard normal."""

    rank: int
    _factor: Array
    _factor_rows: Array
    _maker: Callable[[Array], Array] | None = None

    def made_by(self: OneFactored, maker: Callable[[Array], Array]) -> OneFactored:
        """This density, told how to make P w of noise (B, R), (B, S), without P, for single draws of each row.

        Whoever makes P from something smaller, as a network's last layer does, saves building it in an exported graph,
        where what nobody uses falls away. Elsewhere P is there, and used.
        """
        self._maker = maker
        return self

    def _along(self, noise: Array) -> Array:
        """P w. shape: (N, B, R) → (N, B, S)"""
        if self._maker is not None and noise.shape[0] == 1 and not self._backend.looks:
            return self._maker(noise[0])[None]
        return times(self._backend, noise, self._factor_rows)

    @property
    def factor(self) -> Array:
        """P; shape (R, C, H, W) or (B, R, C, H, W), as given."""
        return self._factor

    def project(self, x: Any) -> Array:
        """μ + P E[w|x], what the factor makes of an image: PCA's reconstruction, shrunk. x: (…, C, H, W)

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        backend = self._backend
        images, sample_shape = self._rows("x", backend.array(x, like=self._mean), self.image_shape)
        self._check_finite("x", images)
        noise = backend.xp.astype(self._factor_noise(images - self._mean_rows), self._mean.dtype, copy=False)
        return self._images(self._mean_rows + times(backend, noise, self._factor_rows), sample_shape)

    def components(self) -> Array:
        """Principal components P V of the factor, largest first; shape (*batch_shape, R, C, H, W).

        V holds the eigenvectors of PᵀP; the norms are P's singular values. Of each component the entry of largest
        magnitude is positive.
        """
        xp = self._backend.xp
        components = xp.matrix_transpose(xp.astype(self._basis, self._mean.dtype, copy=False)) @ self._factor_rows
        largest = xp.argmax(xp.abs(components), axis=-1, keepdims=True)
        sign = xp.sign(xp.take_along_axis(components, largest, axis=-1))
        components = components * xp.where(sign < 0, sign, xp.ones_like(sign))
        return self._spread(components, (self.rank, *self.image_shape))

    def scale_components(self, scales: Any, noise: Any) -> Array:
        """The image μ + P V diag(a) Vᵀ w (SOS-VAE eq. 5), no pixel noise, exact at a = 0.

        scales: a (…, R), in the order of components(); noise: w (…, R). They broadcast; returns (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        scale_array, noise_array = self._together((self.rank,), scales=scales, noise=noise)
        scale_rows, _ = self._rows("scales", scale_array, (self.rank,))
        noise_rows, sample_shape = self._rows("noise", noise_array, (self.rank,))
        along = scale_rows * times(self._backend, noise_rows, self._basis)
        scaled = times_transposed(self._backend, along, self._basis)
        return self._smooth_images("noise", scaled.reshape(*sample_shape, *self.batch_shape, self.rank))

    def interpolate(self, noise_a: Any, noise_b: Any, steps: int) -> Array:
        """Images μ + P slerp(w_a, w_b, t), t from 0 to 1 (SOS-VAE eq. 4 without ε, eq. 8).

        noise_a, noise_b: (R,) or (B, R); returns (steps, *batch_shape, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit, or steps < 1.
        """
        steps = require_count("steps", steps)
        start, end = self._together((self.rank,), noise_a=noise_a, noise_b=noise_b)
        for name, array in (("noise_a", start), ("noise_b", end)):
            self._layout.sample_shape(name, array.shape, (self.rank,))
        path = slerp(start, end, steps)
        if path.ndim == 2 and self.batch_shape:
            path = path[:, None]
        return self._smooth_images("noise", path)

    def whiten(self, x: Any) -> Array:
        """(I + P̃P̃ᵀ)^(−½) r̃, independent standard normals under the density, r̃ = x − μ and P̃ = P where what is beside
        P w is N(0, I): for LowRankNormal times D^(−½), for HybridNormal times Lᵀ.

        With P̃ᵀP̃ = V diag(s²) Vᵀ it is r̃ − P̃ V diag((1 − 1/√(1 + s²))/s²) Vᵀ P̃ᵀ r̃.

        x: (…, C, H, W), broadcast with the batch; returns the same shape.

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        backend, xp = self._backend, self._backend.xp
        images, sample_shape = self._rows("x", backend.array(x, like=self._mean), self.image_shape)
        self._check_finite("x", images)
        white, factor = self._white_residual(images), self._white_factor
        along = xp.astype(times_transposed(backend, white, factor), xp.float64)
        inside = times(backend, along, backend.whitening(self._white_products()))
        return self._images(white - times(backend, xp.astype(inside, white.dtype), factor), sample_shape)

    @abstractmethod
    def _white_products(self) -> Array:
        """P̃ᵀP̃. shape: (B or 1, R, R), float64"""

    @property
    @abstractmethod
    def _white_factor(self) -> Array:
        """P where what is beside P w is N(0, I). shape: (B or 1, R, S)"""

    @abstractmethod
    def _white_residual(self, images: Array) -> Array:
        """x − μ there. shape: (N, B, S)"""

    @abstractmethod
    def _factor_noise(self, residual: Array) -> Array:
        """E[w|x] of x − μ. shape: (N, B, S) → (N, B, R), float64"""

    @cached
    def _basis(self) -> Array:
        """V, the eigenvectors of PᵀP by descending eigenvalue. shape: (B or 1, R, R)"""
        xp = self._backend.xp
        return xp.flip(xp.linalg.eigh(self._backend.gram(self._factor_rows, None, None, exact=True))[1], axis=-1)

    def _smooth_images(self, name: str, noise: Any) -> Array:
        """The image μ + P w of noise (…, R)."""
        rows, sample_shape = self._rows(name, self._backend.array(noise, like=self._mean), (self.rank,))
        return self._images(self._mean_rows + times(self._backend, rows, self._factor_rows), sample_shape)
