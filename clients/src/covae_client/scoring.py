"""From importance weights to scores: a bound on an image's log-likelihood, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """Scores of N images from K importance weights w each; arrays of shape (N,), float64, in nats unless said.

    log_likelihood_bound: log (1/K) Σ w, a lower bound on log p(x) in expectation, tighter as K grows (IWAE,
        Burda et al. 2016). The density is over pixels in [0, 1], so values above 0 are normal.
    standard_error: of the bound over other draws of the weights, by the delta method: sd(w) / (mean(w) √K). It is NaN
        for K = 1, and too small wherever few weights carry the sum: trust it only if effective_sample_size is well
        above 10.
    elbo: the mean of log w, the bound of K = 1.
    bits_per_dim: -(bound - S log 255) / (S log 2) for the S = H·W·C numbers of an image: the density in units of
        bytes, pixels being byte/255. Images are scored as they are, without dequantisation noise, so it is comparable
        between models of this project and is no upper bound on the bits of a lossless code.
    effective_sample_size: (Σ w)² / Σ w², from 1 to K.
    num_samples: K.
    """

    log_likelihood_bound: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    elbo: NDArray[np.float64]
    bits_per_dim: NDArray[np.float64]
    effective_sample_size: NDArray[np.float64]
    num_samples: int

    def __len__(self) -> int:
        return len(self.log_likelihood_bound)


def summarise(log_weights: NDArray[np.float64], image_size: int, *, exact: bool = False) -> Scores:
    """Scores from log importance weights, (N, K) float64, of images of `image_size` = H·W·C numbers.

    exact: the one weight is the likelihood itself, so the bound has no error.
    """
    count = log_weights.shape[1]
    largest = log_weights.max(axis=1, keepdims=True)
    # Weights that are all zero stay zero instead of turning to NaN.
    weights = np.exp(log_weights - np.where(np.isfinite(largest), largest, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = largest[:, 0] + np.log(weights.mean(axis=1))
        effective = weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)
    return Scores(
        log_likelihood_bound=bound,
        standard_error=np.zeros(len(bound)) if exact else _standard_error(weights),
        elbo=log_weights.mean(axis=1),
        bits_per_dim=-(bound - image_size * log(255)) / (image_size * log(2)),
        effective_sample_size=effective,
        num_samples=count,
    )


def _standard_error(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    images, count = weights.shape
    if count == 1:
        return np.full(images, np.nan)
    with np.errstate(invalid="ignore"):
        relative: NDArray[np.float64] = weights.std(axis=1, ddof=1) / weights.mean(axis=1)
    error: NDArray[np.float64] = relative / np.sqrt(count)
    return error
