"""A normal known by its precision, with some pixels fixed: by conjugate gradients, whatever the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from covae_core.backends import Array, Factorisation, cached
from covae_core.densities.diagonal_normal import one_hot
from covae_core.densities.factor_posterior import FLOAT64_LIMIT
from covae_core.densities.layout import flat_pixel
from covae_core.densities.marginal import marginal_variance
from covae_core.densities.observation import Conditional, Observation
from covae_core.densities.sparse_cholesky import SparseCholesky

# The residual's norm, in the preconditioner's units, over the right-hand side's, at which a row is solved: of a density
# in float32, and in float64.
TOLERANCES = (1e-8, 1e-10)
# Steps at most.
LIMIT = 1000
# Up to so many fixed numbers a row, the covariance of these is written out instead.
FEW = 32
# Variances are exact up to the work of one image of so many numbers.
EXACT_PIXELS = 1024


class PrecisionConditional(Conditional):
    """N(μ, Σ) with some pixels fixed, for a density that can multiply by Σ⁻¹.

    With the mask m, the softness s, and T = 1 off the mask and s on it, an image x is made to agree with the fixed
    values' residual ρ = m (b − x) by adding ρ + T u, (T Σ⁻¹ T + m) u = −T Σ⁻¹ ρ. At s = 0 this is the free pixels'
    Λ_ff u_f = −Λ_fb ρ_b. Solved by preconditioned conjugate gradients in float64, each row until it is done.

    Where few values are fixed, what is added is Σ E (Eᵀ Σ E + s²)⁻¹ ρ_b, with a column of E for each: with Σ = G Gᵀ,
    Gᵀ E is one solve in wavefronts, and G another. Made by the density's `condition`.
    """

    def __init__(self, density: Any, observation: Observation) -> None:
        super().__init__(density, observation)
        xp = self._backend.xp
        self._on = xp.astype(observation.mask, xp.float64)
        soft = 0.0 if observation.soft is None else xp.astype(observation.soft, xp.float64)
        self._scale = 1 - self._on + soft * self._on
        # Once, not in every step.
        self._normal = self._density.to(xp.float64)
        double = self._density.mean.dtype == xp.float64
        self._tolerance = TOLERANCES[double]

    def marginal_variance(self) -> Array:
        """Variance of every pixel, 0 on the mask (softness 0), the first of `marginal_variance_with_error`;
        shape (*batch_shape, C, H, W)."""
        return self.marginal_variance_with_error()[0]

    def marginal_variance_with_error(self) -> tuple[Array, Array]:
        """Variance of every pixel, and its standard error; shape (*batch_shape, C, H, W) each.

        Exact, with an error of 0, up to the work of one image of EXACT_PIXELS numbers; beyond that from draws.
        """
        found, error = marginal_variance(self, self._covariance, EXACT_PIXELS)
        return self._spread(found), self._spread(error)

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask (softness 0); shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        unit = one_hot(self._density, flat_pixel(pixel, self.image_shape))
        rows = self._backend.xp.broadcast_to(unit, (1, self._layout.rows, self._layout.pixels))
        return self._spread(self._covariance(rows)[0])

    def _covariance(self, rows: Array) -> Array:
        """T (T Σ⁻¹ T + m)⁻¹ T v. shape: (N, B, S)"""
        found = self._scale * self._solve(self._scale * self._backend.xp.astype(rows, self._backend.xp.float64))
        return self._backend.xp.astype(found, self._density.mean.dtype, copy=False)

    def _square(self) -> Array:
        """yᵀ Σ⁻¹ y + ‖u‖² on the mask, with y = ρ + T u for ρ = m (b − μ); or ρ_bᵀ (Eᵀ Σ E + s²)⁻¹ ρ_b."""
        xp = self._backend.xp
        residual = self._on * (self._observation.everywhere(None) - self._exact(self._density._mean_rows[None]))
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asked sees it
            if self._few is not None:
                seen, weights = self._weights(residual)
                return xp.sum(seen * weights, axis=-1)
            solved = self._solve(-self._scale * self._normal._precision(residual))
            image, noise = residual + self._scale * solved, self._on * solved
            moved = self._normal._precision(image)
            return xp.sum(image * moved, axis=-1) + xp.sum(noise * noise, axis=-1)

    def _agree(self, images: Array, seeds: Array | None) -> Array:
        """By Matheron's rule."""
        xp = self._backend.xp
        wanted, exact = self._observation.everywhere(seeds), self._exact(images)
        residual = self._on * (wanted - exact)
        if self._few is not None:
            weights = self._backend.xp.permute_dims(self._weights(residual)[1], (2, 0, 1))[..., None]
            moved = exact + self._normal._from_noise(xp.sum(weights * self._few[0][:, None], axis=0))
        else:
            moved = exact + residual + self._scale * self._solve(-self._scale * self._normal._precision(residual))
        agreed = xp.where((self._on > 0) & (self._scale == 0), wanted, moved)
        return xp.astype(agreed, images.dtype, copy=False)

    def _prepared(self, rows: Array) -> Array:
        """About (T Σ⁻¹ T + m)⁻¹ v: by the free pixels' rows and columns of L; in a graph, by the diagonal."""
        if self._backend.looks:
            return self._local.covariance(rows)
        return rows / (self._scale**2 * self._normal._precision_diagonal + self._on)

    @cached
    def _local(self) -> SparseCholesky:
        found: SparseCholesky = self._normal._cholesky.masked(self._scale, self._on)
        return found

    @cached
    def _few(self) -> tuple[Array, Factorisation] | None:
        """Where few values are fixed, Gᵀ E, (n, B, T), for Σ = G Gᵀ, and Eᵀ Σ E + s², factorised."""
        backend, xp, seen = self._backend, self._backend.xp, self._observation
        if not backend.looks or backend.recording() or seen.columns is None or seen.columns.shape[-1] > FEW:
            return None
        counted = self._exact(seen.counted)
        places = xp.arange(self._layout.pixels, device=self._device)
        units = self._exact(seen.columns[:, :, None] == places) * counted[..., None]
        shape = (units.shape[1], self._layout.rows, self._layout.pixels)
        noise = self._normal._to_noise(xp.broadcast_to(xp.permute_dims(units, (1, 0, 2)), shape))
        rows = xp.permute_dims(noise, (1, 0, 2))
        soft = 0.0 if seen.soft is None else self._exact(seen.soft) ** 2
        diagonal = (1 - counted + soft)[..., None] * backend.identity(shape[0], like=units)
        found = backend.factorise(rows @ xp.matrix_transpose(rows) + diagonal, FLOAT64_LIMIT)
        return None if found is None else (noise, found)

    def _weights(self, residual: Array) -> tuple[Array, Array]:
        """ρ_b and (Eᵀ Σ E + s²)⁻¹ ρ_b. residual: ρ (N, B, S); returns (N, B, n) each"""
        assert self._few is not None
        seen = self._backend.take(residual, self._observation.columns) * self._exact(self._observation.counted)
        full = self._backend.xp.broadcast_to(seen, (seen.shape[0], self._layout.rows, seen.shape[2]))
        return full, self._few[1].solve(full)

    def _exact(self, rows: Array) -> Array:
        return self._backend.xp.astype(rows, self._backend.xp.float64, copy=False)

    def _operator(self, rows: Array) -> Array:
        """(T Σ⁻¹ T + m) u. shape: (N, B, S)"""
        return self._scale * self._normal._precision(self._scale * rows) + self._on * rows

    def _solve(self, rows: Array) -> Array:
        """(T Σ⁻¹ T + m)⁻¹ v. shape: (N, B, S)"""
        return self._backend.implicit(
            self._gradients(rows), lambda found: rows - self._operator(found), self._gradients
        )

    def _gradients(self, rows: Array) -> Array:
        """The same by conjugate gradients; nothing is recorded."""
        backend, xp = self._backend, self._backend.xp
        ready = self._prepared(rows)
        energy = xp.sum(rows * ready, axis=-1, keepdims=True)
        enough = self._tolerance**2 * energy

        def step(busy: Array, solved: Array, rest: Array, ahead: Array, energy: Array) -> tuple[Array, ...]:
            moved = self._operator(ahead)
            curvature = xp.sum(ahead * moved, axis=-1, keepdims=True)
            one, nothing = xp.ones_like(energy), xp.zeros_like(energy)
            length = xp.where(busy, energy / xp.where(busy, curvature, one), nothing)
            solved, rest = solved + length * ahead, rest - length * moved
            ready = self._prepared(rest)
            after = xp.where(busy, xp.sum(rest * ready, axis=-1, keepdims=True), energy)
            ahead = xp.where(busy, ready + after / xp.where(busy, energy, one) * ahead, ahead)
            return after > enough, solved, rest, ahead, after

        state = (energy > enough, xp.zeros_like(rows), rows, ready, energy)
        return backend.iterate(step, state, LIMIT)[1]
