"""The sparse Cholesky factor of a precision, Λ = L Lᵀ: its products, and its solves in wavefronts."""

from __future__ import annotations

from collections.abc import Sequence

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
        xp = self._backend.xp
        return rows + xp.sum(filters * self._shifted(rows[:, :, None], self._neighbourhood.offsets), axis=-2)

    def _combine_transposed(self, filters: Array, rows: Array) -> Array:
        """(I + A)ᵀ v: each pixel gives to its neighbours."""
        xp = self._backend.xp
        return rows + xp.sum(self._shifted(filters * rows[:, :, None], self._neighbourhood.opposite), axis=-2)

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
        backend = self._backend
        moved = self._shifted(filters, self._neighbourhood.opposite)
        solved = self._turned(self._substituted(self._turned(moved), self._turned(rows)))
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

    def _shifted(self, rows: Array, offsets: Sequence[tuple[int, int]]) -> Array:
        """Row k moved by offset k. shape: (…, K or 1, S) → (…, K, S)"""
        return self._backend.shifted(rows.reshape(*rows.shape[:-1], *self._layout.image_shape), offsets)
