"""The factor's noise given some pixels: the R×R algebra behind scores, entropy and edits."""

from __future__ import annotations

from covae_core.backends import Array, Backend, Factorisation
from covae_core.errors import NotFinite

# Largest entry of the capacitance over its smallest pivot, by the precision of the products, up to which its
# log-determinant is good to 0.01 nat.
FLOAT32_LIMIT = 1e5
FLOAT64_LIMIT = 1e13


def times(backend: Backend, noise: Array, factor: Array) -> Array:
    """P w. noise: (N, B, R); factor: (B or 1, R, S); returns (N, B, S)."""
    if factor.shape[0] == 1 and not backend.rows_apart:
        flat = noise.reshape(noise.shape[0] * noise.shape[1], noise.shape[2]) @ factor[0]
        return flat.reshape(*noise.shape[:2], factor.shape[-1])
    product = backend.xp.permute_dims(noise, (1, 0, 2)) @ factor
    return backend.xp.permute_dims(product, (1, 0, 2))


def times_transposed(backend: Backend, residual: Array, factor: Array) -> Array:
    """Pᵀ r. residual: (N, B, S); factor: (B or 1, R, S); returns (N, B, R)."""
    return times(backend, residual, backend.xp.matrix_transpose(factor))


class FactorPosterior:
    """Factor noise w given the residuals r of some pixels: N(K⁻¹PᵀD⁻¹r, K⁻¹), K = I + PᵀD⁻¹P over these pixels.

    K is the capacitance. Its Cholesky factor is float64; if float32 products are too coarse for it, all of them are
    redone in float64.

    factor: (F, R, n), the columns of these pixels. mask: (M, n), 1, or 0 for columns that do not count; None for ones.
    variance: (V, n) or (V, 1). Each of F, M and V is the number of rows B or 1. precise: float64 from the start.

    Raises:
        NotFinite: the capacitance has no Cholesky factor.
    """

    def __init__(
        self, backend: Backend, factor: Array, mask: Array | None, variance: Array, *, precise: bool = False
    ) -> None:
        self._backend, self._mask, self._variance = backend, mask, variance
        xp = backend.xp
        self._factor = xp.astype(factor, xp.float64, copy=False) if precise or backend.precise else factor
        self._factorisation = self._factorise()

    def _factorise(self) -> Factorisation:
        xp = self._backend.xp
        if self._factor.dtype != xp.float64:
            found = self._backend.factorise(self._capacitance(), FLOAT32_LIMIT)
            if found is not None:
                return found
            self._factor = xp.astype(self._factor, xp.float64)
        capacitance = self._capacitance()
        found = self._backend.factorise(capacitance, FLOAT64_LIMIT)
        if found is None:
            largest = float(capacitance.max())
            raise NotFinite(
                f"factor, variance: I + PᵀD⁻¹P has no Cholesky factor (its largest entry is {largest:g}); expected a "
                "factor whose components are not parallel to float64 precision; raise the variance or "
                "scale the factor down"
            )
        return found

    def _capacitance(self) -> Array:
        products = self._backend.gram(self._factor, self._mask, self._variance)
        return products + self._backend.identity(products.shape[-1], like=products)

    @property
    def logdet(self) -> Array:
        """log |K|. shape: (B or 1,)"""
        return self._factorisation.logdet

    @property
    def whitener(self) -> Array:
        """A matrix whose transpose times itself is w's covariance K⁻¹. shape: (B or 1, R, R)"""
        return self._factorisation.whitener

    def mean(self, residual: Array) -> Array:
        """c = K⁻¹PᵀD⁻¹r. residual: (N, B, n), 0 where the mask is; returns (N, B, R) in float64."""
        xp = self._backend.xp
        dtype = self._factor.dtype
        residual, variance = xp.astype(residual, dtype, copy=False), xp.astype(self._variance, dtype, copy=False)
        if variance.shape[-1] == 1:
            products = times_transposed(self._backend, residual, self._factor)
            return self.solve(xp.astype(products, xp.float64, copy=False) / variance)
        return self.solve(times_transposed(self._backend, residual / variance, self._factor))

    def solve(self, vectors: Array) -> Array:
        """K⁻¹ v. vectors: (N, B, R); returns the same shape in float64, one row per capacitance at least."""
        xp = self._backend.xp
        return self._factorisation.solve(xp.astype(vectors, xp.float64, copy=False))
