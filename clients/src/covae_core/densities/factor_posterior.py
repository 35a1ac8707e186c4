"""The factor's noise given some pixels: the R×R algebra behind scores, entropy and edits."""

from __future__ import annotations

from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpotrs

from covae_core.densities.checks import not_positive_definite

Array = NDArray[np.floating[Any]]

# Columns of P that are multiplied at once: partial sums of that many products are added up in float64.
BLOCK_COLUMNS = 1024
# Largest entry of the capacitance over its smallest pivot, by the precision of the products, up to which its
# log-determinant is good to 0.01 nat.
CONDITION_LIMITS = {"float32": 1e5, "float64": 1e13}


def times(noise: Array, factor: Array) -> Array:
    """P w. noise: (N, B, R); factor: (B or 1, R, S); returns (N, B, S)."""
    if factor.shape[0] == 1:
        flat: Array = noise.reshape(noise.shape[0] * noise.shape[1], noise.shape[2]) @ factor[0]
        return flat.reshape(*noise.shape[:2], factor.shape[-1])
    product: Array = noise.swapaxes(0, 1) @ factor
    return product.swapaxes(0, 1)


def times_transposed(residual: Array, factor: Array) -> Array:
    """Pᵀ r. residual: (N, B, S); factor: (B or 1, R, S); returns (N, B, R)."""
    return times(residual, factor.swapaxes(1, 2))


def gram(factor: Array, weights: Array | None, dtype: type[np.floating[Any]] | None = None) -> NDArray[np.float64]:
    """Pᵀ diag(weights) P, added up in float64. factor: (F, R, S); weights: (W, S), F = W or one of them 1.

    dtype: the precision of the products, the factor's own if None.
    """
    factor = factor.astype(dtype or factor.dtype, copy=False)
    weights = None if weights is None else weights.astype(factor.dtype, copy=False)
    rows = max(len(factor), 1 if weights is None else len(weights))
    if rows == 1 or factor.shape[-1] <= BLOCK_COLUMNS:
        return _gram(factor, weights)
    # One row after the other: the scaled row that the product reads is then still in the processor's cache.
    factors = np.broadcast_to(factor, (rows, *factor.shape[1:]))
    each = repeat(None) if weights is None else np.broadcast_to(weights, (rows, weights.shape[-1]))[:, None]
    return np.concatenate([_gram(one[None], weight) for one, weight in zip(factors, each, strict=False)])


def _gram(factor: Array, weights: Array | None) -> NDArray[np.float64]:
    # Of A @ A.T NumPy makes a syrk, which OpenBLAS runs at half the speed of a gemm on a copy.
    scaled = factor.copy() if weights is None else factor * weights[:, None]
    blocks = factor.shape[-1] // BLOCK_COLUMNS
    products = _blocks(scaled, blocks) @ _blocks(factor, blocks).swapaxes(-1, -2)
    left_over = slice(blocks * BLOCK_COLUMNS, None)
    rest = scaled[..., left_over] @ factor[..., left_over].swapaxes(-1, -2)
    return np.asarray(products.sum(axis=-3, dtype=np.float64) + rest)


def _blocks(array: Array, count: int) -> Array:
    """The first columns in blocks. array: (B, R, S); returns (B, count, R, BLOCK_COLUMNS)."""
    whole = array[..., : count * BLOCK_COLUMNS]
    return whole.reshape(*array.shape[:-1], count, BLOCK_COLUMNS).swapaxes(-2, -3)


class FactorPosterior:
    """Factor noise w given the residuals r of some pixels: N(K⁻¹PᵀD⁻¹r, K⁻¹), K = I + PᵀD⁻¹P over these pixels.

    K is the capacitance. Its Cholesky factor is float64; if float32 products are too coarse for it, all of them are
    redone in float64.

    factor: (F, R, n), the columns of these pixels. mask: (M, n), 1, or 0 for columns that do not count; None for ones.
    variance: (V, n) or (V, 1). Each of F, M and V is the number of rows B or 1. precise: float64 from the start.

    Raises:
        InvalidArgument: the capacitance has no Cholesky factor.
    """

    def __init__(self, factor: Array, mask: Array | None, variance: Array, *, precise: bool = False) -> None:
        self._factor = factor.astype(np.float64) if precise else factor
        self._mask = mask
        self._variance = variance
        self._cholesky = self._decompose()

    def _decompose(self) -> NDArray[np.float64]:
        capacitance = self._capacitance()
        cholesky = _sound_cholesky(capacitance, self._factor.dtype)
        if cholesky is None and self._factor.dtype != np.float64:
            self._factor = self._factor.astype(np.float64)
            capacitance = self._capacitance()
            cholesky = _sound_cholesky(capacitance, self._factor.dtype)
        if cholesky is None:
            raise not_positive_definite(float(capacitance.max()))
        return cholesky

    def _capacitance(self) -> NDArray[np.float64]:
        if self._variance.shape[-1] == 1:
            products = gram(self._factor, self._mask) / self._variance[:, :, None].astype(np.float64)
        else:
            products = gram(self._factor, (1 if self._mask is None else self._mask) / self._variance)
        return np.asarray(products + np.eye(products.shape[-1]))

    @cached_property
    def logdet(self) -> NDArray[np.float64]:
        """log |K|. shape: (B or 1,)"""
        return np.asarray(2 * np.log(np.diagonal(self._cholesky, axis1=1, axis2=2)).sum(axis=-1))

    @cached_property
    def whitener(self) -> NDArray[np.float64]:
        """L⁻¹ with K = L Lᵀ, so w's covariance K⁻¹ is its transpose times itself. shape: (B or 1, R, R)"""
        identity = np.eye(self._cholesky.shape[-1])
        return np.stack([solve_triangular(row, identity, lower=True) for row in self._cholesky])

    def mean(self, residual: Array) -> NDArray[np.float64]:
        """c = K⁻¹PᵀD⁻¹r. residual: (N, B, n), 0 where the mask is; returns (N, B, R) in float64."""
        residual = residual.astype(self._factor.dtype, copy=False)
        if self._variance.shape[-1] == 1:
            return self.solve(times_transposed(residual, self._factor) / self._variance.astype(np.float64))
        scaled: Array = residual / self._variance
        return self.solve(times_transposed(scaled.astype(self._factor.dtype, copy=False), self._factor))

    def solve(self, vectors: Array) -> NDArray[np.float64]:
        """K⁻¹ v. vectors: (N, B, R); returns the same shape in float64, one row per capacitance at least."""
        if len(self._cholesky) == 1:
            return _solve(self._cholesky[0], vectors)
        full = np.broadcast_to(vectors, (len(vectors), len(self._cholesky), vectors.shape[-1]))
        return np.stack([_solve(row, full[:, b]) for b, row in enumerate(self._cholesky)], axis=1)


def _solve(cholesky: NDArray[np.float64], vectors: Array) -> NDArray[np.float64]:
    columns = vectors.reshape(-1, vectors.shape[-1]).T
    solved, _ = dpotrs(cholesky, columns, lower=1)
    return np.asarray(solved).T.reshape(vectors.shape)


def _sound_cholesky(capacitance: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float64] | None:
    """The Cholesky factors, or None if products of this precision leave nothing of the smallest pivot."""
    try:
        cholesky = np.linalg.cholesky(capacitance)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(cholesky, axis1=1, axis2=2) ** 2
    sound = capacitance.max(axis=(1, 2)) <= CONDITION_LIMITS[dtype.name] * pivots.min(axis=1)
    return cholesky if sound.all() else None
