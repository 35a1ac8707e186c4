"""From importance weights to scores: a bound on an image's log-likelihood, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log

import numpy as np
from numpy.typing import NDArray

from covae_core.calibration import Calibration, false_discoveries
from covae_core.errors import InvalidArgument

# A bound that fewer weights carry has no standard error that means anything.
MIN_EFFECTIVE_SAMPLES = 10


@dataclass(frozen=True)
class Scores:
    """Scores of N images from K importance weights w each; arrays of shape (N,), float64, in nats unless said.

    log_likelihood_bound: log (1/K) Σ w, a lower bound on log p(x) in expectation, tighter as K grows (IWAE,
        Burda et al. 2016). The density is over pixels in [0, 1], so values above 0 are normal.
    standard_error: of the bound over other draws of the weights, by the delta method: sd(w) / (mean(w) √K). NaN where
        few weights carry the sum (effective_sample_size below MIN_EFFECTIVE_SAMPLES), as it would be far too small.
    elbo: the mean of log w, the bound of K = 1.
    bits_per_dim: -(bound - S log 255) / (S log 2) for the S = H·W·C numbers of an image: the density in units of
        bytes, pixels being byte/255. Images are scored as they are, without dequantisation noise, so it is comparable
        between models of this project and is no upper bound on the bits of a lossless code. NaN of a Bernoulli, which
        is no density over grey levels.
    effective_sample_size: (Σ w)² / Σ w², from 1 to K.
    num_samples: K.
    p_value: how usual an image is among images like those that the model was trained on, from 1/(N + 1) for one that is
        odder than all N of the model's calibration, to 1; of such images at most a share α has one of α or less. Too
        likely counts as odd as too unlikely. NaN of a model without a calibration.
    too_likely: whether the model holds an image for likelier than half of the calibration's, bool. part: what departs
        most from theirs, one of `covae_core.calibration.PARTS`; empty without a calibration.
    parts: each of PARTS by name, (N,): the score taken apart, without a random number; {} without a calibration.

    P-value, direction and parts are pure functions of an image and the model.
    """

    log_likelihood_bound: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    elbo: NDArray[np.float64]
    bits_per_dim: NDArray[np.float64]
    effective_sample_size: NDArray[np.float64]
    num_samples: int
    p_value: NDArray[np.float64]
    too_likely: NDArray[np.bool_]
    part: NDArray[np.str_]
    parts: Mapping[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.log_likelihood_bound)

    def odd(self, rate: float) -> NDArray[np.bool_]:
        """Which images to call odd, so that on average at most a share `rate` of those is not (Benjamini–Hochberg).

        Raises:
            InvalidArgument: the rate is not between 0 and 1, or the model has no calibration.
        """
        if not 0 < rate < 1:
            raise InvalidArgument(f"rate: found {rate}; expected a share between 0 and 1, as 0.05")
        if len(self) and np.isnan(self.p_value).all():
            raise InvalidArgument(
                "odd: found no p-values: the model has no calibration (see `covae calibrate`), or its density has no "
                "whitened residuals"
            )
        return false_discoveries(self.p_value, rate)


def summarise(
    log_weights: NDArray[np.float64], image_size: int, *, exact: bool = False, of_bytes: bool = True
) -> Scores:
    """Scores from log importance weights, (N, K) float64, of images of `image_size` = H·W·C numbers.

    exact: the one weight is the likelihood itself, so the bound has no error. of_bytes: the density is one over grey
    levels, so that there are bits of it.
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
        standard_error=np.zeros(len(bound)) if exact else _standard_error(weights, effective),
        elbo=log_weights.mean(axis=1),
        bits_per_dim=-(bound - image_size * log(255)) / (image_size * log(2)) if of_bytes else bound * np.nan,
        effective_sample_size=effective,
        num_samples=count,
        p_value=np.full(len(bound), np.nan),
        too_likely=np.zeros(len(bound), bool),
        part=np.full(len(bound), ""),
        parts={},
    )


def judged(scores: Scores, calibration: Calibration, parts: Mapping[str, NDArray[np.float64]]) -> Scores:
    """The scores with their p-values and what lies behind them."""
    return replace(scores, **calibration.judge(parts)._asdict(), parts=parts)


def _standard_error(weights: NDArray[np.float64], effective: NDArray[np.float64]) -> NDArray[np.float64]:
    count = weights.shape[1]
    with np.errstate(invalid="ignore"):
        relative = weights.std(axis=1) / np.sqrt(max(count - 1, 1)) / weights.mean(axis=1)
    return np.where(effective >= MIN_EFFECTIVE_SAMPLES, relative, np.nan)
