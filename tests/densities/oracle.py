"""Dense and Woodbury answers in float64, to hold the densities against, with NumPy arrays and with tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import covae_core.densities
import covae_train.torch_backend  # noqa: F401 - lets the densities take tensors

LOG_2PI = np.log(2 * np.pi)


@dataclass(frozen=True)
class Home:
    """The densities on one kind of array, called with NumPy arrays and answering in NumPy arrays."""

    name: str

    module: Any = covae_core.densities

    @property
    def library(self) -> Any:
        return torch if self.name == "torch" else np

    def give(self, value: Any) -> Any:
        return torch.from_numpy(np.array(value)) if self.name == "torch" and not np.isscalar(value) else value

    def take(self, value: Any) -> np.ndarray:
        return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)

    def low_rank_normal(self, mean, factor, variance) -> Any:
        return self.module.LowRankNormal(self.give(mean), self.give(factor), self.give(variance))

    def diagonal_normal(self, mean, variance) -> Any:
        return self.module.DiagonalNormal(self.give(mean), self.give(variance))

    def call(self, thing: Any, method: str, *arguments: Any, **keywords: Any) -> np.ndarray:
        """The method's result as an array; array arguments are converted, tuples and numbers are not."""
        given = [self.give(value) if isinstance(value, np.ndarray) else value for value in arguments]
        return self.take(getattr(thing, method)(*given, **keywords))

    def condition(self, density: Any, mask, pixels) -> Any:
        return density.condition(self.give(mask), self.give(pixels))


def problem(batch=(), rank=4, image_shape=(3, 4, 4), *, rms=0.3, dtype=np.float64, seed=0, full_variance=False):
    """Mean, factor and variance of a random low-rank normal."""
    generator = np.random.default_rng(seed)
    mean = generator.random((*batch, *image_shape)).astype(dtype)
    factor = (rms * generator.standard_normal((*batch, rank, *image_shape))).astype(dtype)
    if full_variance:
        return mean, factor, (0.05 + generator.random((*batch, *image_shape))).astype(dtype)
    return mean, factor, 0.1


class Dense:
    """N(μ, Σ) of one image with Σ = P Pᵀ + D written out, in float64."""

    def __init__(self, mean, factor, variance) -> None:
        self.shape = mean.shape
        self.mean = mean.astype(np.float64).ravel()
        rows = factor.astype(np.float64).reshape(len(factor), -1)
        diagonal = np.broadcast_to(np.asarray(variance, np.float64), mean.shape).ravel()
        self.covariance = rows.T @ rows + np.diag(diagonal)

    def log_prob(self, x) -> float:
        cholesky = np.linalg.cholesky(self.covariance)
        white = np.linalg.solve(cholesky, x.astype(np.float64).ravel() - self.mean)
        return -0.5 * (white @ white + 2 * np.log(np.diag(cholesky)).sum() + len(white) * LOG_2PI)

    def entropy(self) -> float:
        return 0.5 * (np.linalg.slogdet(self.covariance)[1] + len(self.mean) * (1 + LOG_2PI))

    def condition(self, mask, pixels) -> tuple[np.ndarray, np.ndarray]:
        """Mean (C, H, W) and covariance (S, S) given the pixels on the mask (C, H, W)."""
        fixed, free = np.flatnonzero(mask), np.flatnonzero(~mask)
        mean, covariance = self.mean.copy(), np.zeros_like(self.covariance)
        mean[fixed] = pixels.ravel()[fixed]
        gain = np.linalg.solve(self.covariance[np.ix_(fixed, fixed)], self.covariance[np.ix_(fixed, free)]).T
        mean[free] += gain @ (pixels.ravel()[fixed] - self.mean[fixed])
        rest = self.covariance[np.ix_(free, free)] - gain @ self.covariance[np.ix_(fixed, free)]
        covariance[np.ix_(free, free)] = rest
        return mean.reshape(self.shape), covariance


class Woodbury:
    """The same for images too large for a dense matrix: float64, with the R×R capacitance."""

    def __init__(self, mean, factor, variance) -> None:
        self.shape = mean.shape
        self.mean = mean.astype(np.float64).ravel()
        self.rows = factor.astype(np.float64).reshape(len(factor), -1)
        self.diagonal = np.broadcast_to(np.asarray(variance, np.float64), mean.shape).ravel()

    def _capacitance(self, precision):
        return np.eye(len(self.rows)) + (self.rows * precision) @ self.rows.T

    def log_prob(self, x) -> float:
        residual = x.astype(np.float64).ravel() - self.mean
        capacitance = self._capacitance(1 / self.diagonal)
        noise = np.linalg.solve(capacitance, self.rows @ (residual / self.diagonal))
        rest = residual - noise @ self.rows
        logdet = np.log(self.diagonal).sum() + np.linalg.slogdet(capacitance)[1]
        return -0.5 * ((rest**2 / self.diagonal).sum() + noise @ noise + logdet + len(rest) * LOG_2PI)

    def entropy(self) -> float:
        logdet = np.log(self.diagonal).sum() + np.linalg.slogdet(self._capacitance(1 / self.diagonal))[1]
        return 0.5 * (logdet + len(self.mean) * (1 + LOG_2PI))

    def conditional_mean(self, mask, pixels) -> np.ndarray:
        precision = mask.ravel() / self.diagonal
        residual = np.where(mask, pixels, 0).astype(np.float64).ravel() - np.where(mask.ravel(), self.mean, 0)
        noise = np.linalg.solve(self._capacitance(precision), self.rows @ (precision * residual))
        return np.where(mask, pixels, (self.mean + noise @ self.rows).reshape(self.shape))


def dense_precision(filters, variance, side) -> np.ndarray:
    """Λ = L Lᵀ written out, pixel by pixel, (…, S, S): column k of L is filter k beside a 1, over √d_k.

    filters: (…, G, K, C, H, W); variance: (…, C, H, W).
    """
    *batch, dilations, _, channels, height, width = filters.shape
    h, size = side // 2, channels * height * width
    rows = filters.reshape(-1, *filters.shape[len(batch) :])
    found = []
    for row, scales in zip(rows, variance.reshape(-1, size), strict=True):
        lower = np.zeros((size, size))
        for c, r, w in np.ndindex(channels, height, width):
            k = (c * height + r) * width + w
            lower[k, k] += 1
            for g in range(dilations):
                places = [(r, w + i * 2**g) for i in range(1, h + 1)]
                places += [(r + j * 2**g, w + i * 2**g) for j in range(1, h + 1) for i in range(-h, h + 1)]
                for number, (below, right) in enumerate(places):
                    if below < height and 0 <= right < width:
                        lower[(c * height + below) * width + right, k] += row[g, number, c, r, w]
            lower[:, k] /= np.sqrt(scales[k])
        found.append(lower @ lower.T)
    return np.stack(found).reshape(*batch, size, size)
