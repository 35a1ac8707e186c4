"""The factor's noise given some pixels: the R×R algebra behind scores, entropy and edits."""

from __future__ import annotations

from functools import reduce
from math import ceil
from typing import cast

import torch
from torch import Tensor

from covae_core.densities.checks import not_positive_definite
from covae_core.densities.factor_posterior import CONDITION_LIMITS
from covae_train.densities.cached import cached
from covae_train.densities.elimination import eliminate
from covae_train.densities.exporting import exporting

# Columns of P that are multiplied at once: partial sums of that many products are added up in float64.
BLOCK_COLUMNS = 2048


def times(noise: Tensor, factor: Tensor) -> Tensor:
    """P w. noise: (N, B, R); factor: (B or 1, R, S); returns (N, B, S)."""
    if factor.shape[0] == 1:
        flat = noise.reshape(noise.shape[0] * noise.shape[1], noise.shape[2]) @ factor[0]
        return flat.reshape(*noise.shape[:2], factor.shape[-1])
    return (noise.transpose(0, 1) @ factor).transpose(0, 1)


def times_transposed(residual: Tensor, factor: Tensor) -> Tensor:
    """Pᵀ r. residual: (N, B, S); factor: (B or 1, R, S); returns (N, B, R)."""
    return times(residual, factor.mT)


def gram(factor: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Pᵀ diag(scale²) P, added up in float64. factor: (F, R, S); scale: (W, S), F = W or one of them 1.

    Scaling both sides by the root of a weight reads one array where weighting one side would read two. dtype: the
    precision of the products, the factor's own if None.
    """
    factor = factor.to(dtype or factor.dtype)
    blocks = _columns(factor)
    if scale is not None:
        scale = scale.to(factor.dtype)
        recorded = torch.is_grad_enabled() and (factor.requires_grad or scale.requires_grad)
        if not recorded and not exporting() and len(blocks) > 1:
            return _gram_by_rows(factor, scale)
        blocks = [block * part[:, None] for block, part in zip(blocks, _columns(scale), strict=True)]
    products = [(block @ block.mT).double() for block in blocks]
    return reduce(torch.add, products)


def _columns(array: Tensor) -> list[Tensor]:
    """The last axis in parts, by slices: Tensor.chunk exports to an operator that no CUDA kernel runs."""
    count, width = _parts(array.shape[-1])
    return [array[..., part * width : (part + 1) * width] for part in range(count)]


def _parts(columns: int) -> tuple[int, int]:
    """How many parts of at most BLOCK_COLUMNS, and how wide each."""
    count = max(ceil(columns / BLOCK_COLUMNS), 1)
    return count, max(ceil(columns / count), 1)


def _gram_by_rows(factor: Tensor, scale: Tensor) -> Tensor:
    """The same without gradients: what is scaled for one row's product is then still in the processor's cache."""
    rows, rank, columns = max(len(factor), len(scale)), factor.shape[1], factor.shape[2]
    count, width = _parts(columns)
    scaled = factor.new_zeros(rank, count * width)
    blocks = scaled.view(rank, count, width).transpose(0, 1)
    total = factor.new_empty(rows, rank, rank, dtype=torch.float64)
    pairs = zip(factor.expand(rows, -1, -1), scale.expand(rows, -1), total, strict=True)
    for row, part, out in pairs:
        torch.mul(row, part, out=scaled[:, :columns])
        torch.sum(blocks @ blocks.mT, dim=0, dtype=torch.float64, out=out)
    return total


class FactorPosterior:
    """Factor noise w given the residuals r of some pixels: N(K⁻¹PᵀD⁻¹r, K⁻¹), K = I + PᵀD⁻¹P over these pixels.

    K is the capacitance. Its Cholesky factor is float64; if float32 products are too coarse for it, all of them are
    redone in float64. A graph for export, which can neither branch nor factor, starts in float64 and inverts K by
    elimination.

    factor: (F, R, n), the columns of these pixels. mask: (M, n), 1, or 0 for columns that do not count; None for ones.
    variance: (V, n) or (V, 1). Each of F, M and V is the number of rows B or 1. precise: float64 from the start.

    Raises:
        InvalidArgument: the capacitance has no Cholesky factor.
    """

    def __init__(self, factor: Tensor, mask: Tensor | None, variance: Tensor, *, precise: bool = False) -> None:
        self._factor = factor.double() if precise or exporting() else factor
        self._mask = mask
        self._variance = variance
        self._cholesky: Tensor | None = None
        if exporting():
            self._inverse, self._elimination_logdet = eliminate(self._capacitance())
        else:
            self._cholesky = self._decompose()

    def _decompose(self) -> Tensor:
        capacitance = self._capacitance()
        cholesky, sound = _sound_cholesky(capacitance, self._factor.dtype)
        if not sound and self._factor.dtype != torch.float64:
            self._factor = self._factor.double()
            capacitance = self._capacitance()
            cholesky, sound = _sound_cholesky(capacitance, self._factor.dtype)
        if not sound:
            raise not_positive_definite(float(capacitance.detach().max()))
        return cholesky

    def _capacitance(self) -> Tensor:
        if self._variance.shape[-1] == 1:
            products = gram(self._factor, self._mask) / self._variance.double()[:, :, None]
        else:
            roots = self._variance.rsqrt()
            products = gram(self._factor, roots if self._mask is None else self._mask * roots)
        identity: Tensor = torch.eye(products.shape[-1], dtype=torch.float64, device=products.device)
        return products + identity

    @cached
    def logdet(self) -> Tensor:
        """log |K|. shape: (B or 1,)"""
        if self._cholesky is None:
            return self._elimination_logdet
        logs: Tensor = self._cholesky.diagonal(dim1=1, dim2=2).log().sum(dim=-1)
        return 2 * logs

    @cached
    def whitener(self) -> Tensor:
        """A matrix whose transpose times itself is w's covariance K⁻¹. shape: (B or 1, R, R)"""
        if self._cholesky is None:
            raise NotImplementedError(
                "the covariance of an edit has no ONNX form; compute it outside the exported graph"
            )
        identity = torch.eye(self._cholesky.shape[-1], dtype=torch.float64, device=self._cholesky.device)
        inverse = torch.linalg.solve_triangular(self._cholesky, identity.expand_as(self._cholesky), upper=False)
        return cast(Tensor, inverse)

    def mean(self, residual: Tensor) -> Tensor:
        """c = K⁻¹PᵀD⁻¹r. residual: (N, B, n), 0 where the mask is; returns (N, B, R) in float64."""
        residual, variance = residual.to(self._factor.dtype), self._variance.to(self._factor.dtype)
        if variance.shape[-1] == 1:
            return self.solve(times_transposed(residual, self._factor).double() / variance)
        return self.solve(times_transposed(residual / variance, self._factor))

    def solve(self, vectors: Tensor) -> Tensor:
        """K⁻¹ v. vectors: (N, B, R); returns the same shape in float64."""
        if self._cholesky is None:
            return times(vectors.double(), self._inverse)
        if self._cholesky.shape[0] == 1:
            columns = vectors.double().reshape(-1, vectors.shape[-1]).mT
            return torch.cholesky_solve(columns, self._cholesky[0]).mT.reshape(vectors.shape)
        return torch.cholesky_solve(vectors.double().permute(1, 2, 0), self._cholesky).permute(2, 0, 1)


def _sound_cholesky(capacitance: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The Cholesky factors, and whether products of this precision leave something of the smallest pivot."""
    cholesky, info = torch.linalg.cholesky_ex(capacitance)
    pivots = cholesky.detach().diagonal(dim1=1, dim2=2).square()
    limit = CONDITION_LIMITS["float64" if dtype == torch.float64 else "float32"]
    sound = (info == 0) & (capacitance.detach().amax(dim=(1, 2)) <= limit * pivots.amin(dim=1))
    return cholesky, bool(sound.all())
