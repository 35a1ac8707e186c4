"""The sparse Cholesky factor of a precision, Λ = L Lᵀ: its products, and its solves in wavefronts."""

from __future__ import annotations

from array_api_compat import device

from covae_core.backends import Array, Backend
from covae_core.densities.layout import Layout
from covae_core.densities.neighbourhood import Neighbourhood, wavefronts


class SparseCholesky:
    """L with Lᵀ = D^(−½)(I + A): A's row k holds filter k, at the neighbours of pixel k, all of them later ones.

    Given the later pixels, pixel k is μ_k − Σ_j a_kj (x_mj − μ_mj) + √d_k ε_k (the modified Cholesky decomposition,
    Pourahmadi 1999). Channels have filters of their own and do not mix. Rows are (N, B, S), S = C·H·W.

    filters: (B or 1, G·K, S); variance: d, (B or 1, S or 1).
    """

    def __init__(
        self, backend: Backend, filters: Array, variance: Array, neighbourhood: Neighbourhood, layout: Layout
    ) -> None:
        self._backend, self._layout = backend, layout
        self._filters, self._variance = filters, variance
        self._neighbourhood = neighbourhood

    def whiten(self, residual: Array) -> Array:
        """Lᵀ r. shape: (N, B, S)"""
        return self._combine(self._filters_like(residual), residual) / self._roots(residual)

    def color(self, noise: Array) -> Array:
        """L⁻ᵀ ε, of covariance Λ⁻¹. shape: (N, B, S)"""
        return self._solve(self._filters_like(noise), noise * self._roots(noise))

    def whiten_transposed(self, rows: Array) -> Array:
        """L v. shape: (N, B, S)"""
        return self._combine_transposed(self._filters_like(rows), rows / self._roots(rows))

    def color_transposed(self, rows: Array) -> Array:
        """L⁻¹ v. shape: (N, B, S)"""
        return self._solve_transposed(self._filters_like(rows), rows) * self._roots(rows)

    def precision(self, rows: Array) -> Array:
        """Λ v. shape: (N, B, S)"""
        return self.whiten_transposed(self.whiten(rows))

    def covariance(self, rows: Array) -> Array:
        """Λ⁻¹ v. shape: (N, B, S)"""
        return self.color(self.color_transposed(rows))

    def precision_diagonal(self) -> Array:
        """Λ_kk, of float64. shape: (B or 1, S)"""
        xp = self._backend.xp
        filters = xp.astype(self._filters, xp.float64, copy=False)
        shape = (1, filters.shape[0], self._layout.pixels)
        weights = xp.broadcast_to(1 / xp.astype(self._variance, xp.float64, copy=False), shape)
        return self._combine_transposed(filters**2, weights)[0]

    def _filters_like(self, rows: Array) -> Array:
        return self._backend.xp.astype(self._filters, rows.dtype, copy=False)

    def _roots(self, rows: Array) -> Array:
        xp = self._backend.xp
        return xp.sqrt(xp.astype(self._variance, rows.dtype, copy=False))

    def _combine(self, filters: Array, rows: Array) -> Array:
        """(I + A) r: each pixel, and its filter's sum over its neighbours."""
        padded, total = self._padded(rows), rows
        for k, offset in enumerate(self._neighbourhood.offsets):
            total = total + filters[:, k] * self._view(padded, offset)
        return total

    def _combine_transposed(self, filters: Array, rows: Array) -> Array:
        """(I + A)ᵀ v: each pixel gives to its neighbours."""
        padded, total = self._padded(filters * rows[:, :, None]), rows
        for k, (below, right) in enumerate(self._neighbourhood.offsets):
            total = total + self._view(padded[:, :, k], (-below, -right))
        return total

    def _solve(self, filters: Array, rows: Array) -> Array:
        """(I + A)⁻¹ v"""
        backend = self._backend
        solved = self._substituted(filters, rows)
        if not backend.recording():
            return solved
        return backend.implicit(
            solved,
            lambda found: rows - self._combine(filters, found),
            lambda gradient: self._solve_transposed(filters, gradient),
        )

    def _solve_transposed(self, filters: Array, rows: Array) -> Array:
        """(I + A)⁻ᵀ v. Read from the last pixel to the first, (I + A)ᵀ is a matrix of I + A's pattern."""
        backend, xp = self._backend, self._backend.xp
        padded = self._padded(filters)
        moved = [
            self._view(padded[:, k], (-below, -right)) for k, (below, right) in enumerate(self._neighbourhood.offsets)
        ]
        solved = self._turned(self._substituted(self._turned(xp.stack(moved, axis=1)), self._turned(rows)))
        if not backend.recording():
            return solved
        return backend.implicit(
            solved,
            lambda found: rows - self._combine_transposed(filters, found),
            lambda gradient: self._solve(filters, gradient),
        )

    def _substituted(self, filters: Array, rows: Array) -> Array:
        """(I + A)⁻¹ v without gradients; a channel is one more row."""
        xp = self._backend.xp
        channels, height, width = self._layout.image_shape
        fronts = wavefronts(self._neighbourhood, height, width)
        if channels == 1:
            return self._backend.substitute(filters, rows, fronts)
        count, batch, _ = rows.shape
        apart = xp.permute_dims(filters.reshape(*filters.shape[:-1], channels, -1), (0, 2, 1, 3))
        apart = xp.broadcast_to(apart, (batch, *apart.shape[1:])).reshape(batch * channels, *apart.shape[2:])
        return self._backend.substitute(apart, rows.reshape(count, batch * channels, -1), fronts).reshape(rows.shape)

    def _turned(self, rows: Array) -> Array:
        """Each channel's pixels from the last to the first. shape: (…, S)"""
        by_channel = rows.reshape(*rows.shape[:-1], self._layout.image_shape[0], -1)
        return self._backend.xp.flip(by_channel, axis=-1).reshape(rows.shape)

    def _padded(self, rows: Array) -> Array:
        """Images with zeros around, as far as a filter reaches. shape: (…, S) → (…, C, H + 2 span, W + 2 span)"""
        xp, span = self._backend.xp, self._neighbourhood.span
        images = rows.reshape(*rows.shape[:-1], *self._layout.image_shape)
        for axis in (-2, -1):
            shape = list(images.shape)
            shape[axis] = span
            edge = xp.zeros(tuple(shape), dtype=images.dtype, device=device(images))
            images = xp.concat([edge, images, edge], axis=axis)
        return images

    def _view(self, padded: Array, offset: tuple[int, int]) -> Array:
        """Of each pixel, that so many rows below and columns to the right. returns (…, S)"""
        span = self._neighbourhood.span
        _, height, width = self._layout.image_shape
        top, left = span + offset[0], span + offset[1]
        part = padded[..., top : top + height, left : left + width]
        return part.reshape(*padded.shape[:-3], self._layout.pixels)
