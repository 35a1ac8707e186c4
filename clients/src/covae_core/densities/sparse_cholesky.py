"""The sparse Cholesky factor of a precision, Λ = L Lᵀ: its products, and its solves in wavefronts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covae_core.backends import Array, Backend
from covae_core.densities.layout import Layout
from covae_core.densities.neighbourhood import Neighbourhood, Wavefronts, wavefronts


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
        self._kept: dict[tuple[Any, bool], Array] = {}

    def masked(self, scale: Array, on: Array) -> SparseCholesky:
        """L with T L restricted to where T is not 0, and beside m on the diagonal: next to a factor of T Λ T + m.

        T, m: (B or 1, S). With T = 1 − m it is the free pixels' rows and columns of L.
        """
        xp = self._backend.xp
        own = scale * scale / self._variance
        variance = 1 / (own + on)
        shares = own * variance * xp.sqrt(variance / self._variance)
        reached = self._shifted(scale[:, None], self._neighbourhood.offsets)
        filters = self._filters * reached * shares[:, None]
        return SparseCholesky(self._backend, filters, variance, self._neighbourhood, self._layout)

    def whiten(self, residual: Array) -> Array:
        """Lᵀ r. shape: (N, B, S)"""
        return self._combine(self._filters_like(residual), residual) / self._roots(residual)

    def color(self, noise: Array) -> Array:
        """L⁻ᵀ ε, of covariance Λ⁻¹. shape: (N, B, S)"""
        return self._solve(noise * self._roots(noise))

    def whiten_transposed(self, rows: Array) -> Array:
        """L v. shape: (N, B, S)"""
        return self._combine_transposed(self._filters_like(rows), rows / self._roots(rows))

    def color_transposed(self, rows: Array) -> Array:
        """L⁻¹ v. shape: (N, B, S)"""
        return self._solve_transposed(rows) * self._roots(rows)

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
        return rows + self._backend.filtered(filters, self._as_images(rows), self._neighbourhood.offsets)

    def _combine_transposed(self, filters: Array, rows: Array) -> Array:
        """(I + A)ᵀ v: each pixel gives to its neighbours."""
        return rows + self._backend.scattered(filters, self._as_images(rows), self._neighbourhood.offsets)

    def _solve(self, rows: Array) -> Array:
        """(I + A)⁻¹ v"""
        backend, filters = self._backend, self._filters_like(rows)
        solved = self._substituted(self._arranged(filters, turned=False), rows)
        return backend.implicit(solved, lambda found: rows - self._combine(filters, found), self._solve_transposed)

    def _solve_transposed(self, rows: Array) -> Array:
        """(I + A)⁻ᵀ v. Read from the last pixel to the first, (I + A)ᵀ is a matrix of I + A's pattern."""
        backend, filters = self._backend, self._filters_like(rows)
        solved = self._turned(self._substituted(self._arranged(filters, turned=True), self._turned(rows)))
        return backend.implicit(solved, lambda found: rows - self._combine_transposed(filters, found), self._solve)

    def _arranged(self, filters: Array, *, turned: bool) -> Array:
        """Filters as they are solved with, a channel as one more row; kept, as a density is solved with again."""
        key = (filters.dtype, turned)
        if key not in self._kept:
            if turned:
                filters = self._turned(self._shifted(filters, self._neighbourhood.opposite))
            channels = self._layout.image_shape[0]
            if channels > 1:
                xp, batch = self._backend.xp, self._layout.rows
                filters = xp.permute_dims(filters.reshape(*filters.shape[:-1], channels, -1), (0, 2, 1, 3))
                filters = xp.broadcast_to(filters, (batch, *filters.shape[1:]))
                filters = filters.reshape(batch * channels, *filters.shape[2:])
            self._kept[key] = self._backend.arranged(filters, self._fronts)
        return self._kept[key]

    @property
    def _fronts(self) -> Wavefronts:
        return wavefronts(self._neighbourhood, *self._layout.image_shape[1:])

    def _substituted(self, arranged: Array, rows: Array) -> Array:
        """(I + A)⁻¹ v without gradients."""
        count, batch, _ = rows.shape
        apart = rows.reshape(count, batch * self._layout.image_shape[0], -1)
        return self._backend.substitute(arranged, apart, self._fronts).reshape(rows.shape)

    def _turned(self, rows: Array) -> Array:
        """Each channel's pixels from the last to the first. shape: (…, S)"""
        by_channel = rows.reshape(*rows.shape[:-1], self._layout.image_shape[0], -1)
        return self._backend.xp.flip(by_channel, axis=-1).reshape(rows.shape)

    def _shifted(self, rows: Array, offsets: Sequence[tuple[int, int]]) -> Array:
        """Row k moved by offset k. shape: (…, K or 1, S) → (…, K, S)"""
        return self._backend.shifted(self._as_images(rows), offsets)

    def _as_images(self, rows: Array) -> Array:
        """(…, S) → (…, C, H, W)"""
        return rows.reshape(*rows.shape[:-1], *self._layout.image_shape)
