"""What the scores of unseen images make of a score: a p-value, its direction, and the part that makes an image odd.

A calibration holds a statistic, one number that grows as the parts of an image's score depart from those of images like
the training's, upwards or downwards (a blurred image is too likely, and as odd as a noisy one), and that statistic of N
images that neither training nor the statistic has seen. An image's p-value is (k + 1)/(N + 1), k being how many of the
N have a statistic as large. For an image like them it is at most α with probability at most α, whatever the statistic
is (conformal p-values: Vovk et al. 2005; for outliers Bates et al., arXiv 2104.08279).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from covae_core.errors import InvalidArgument

Floats = NDArray[np.float64]
# Of what an image's oddness is made; see `parts_of`.
PARTS = ("residual", "log_determinant", "latent", "complexity", "texture")
# What the quantiles of a calibration are kept of and at, for people.
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# In units of its own spread, a part that departs further says no more of how parts vary together.
FAR = 6.0
# The share of their variances that is added to the parts' covariance.
RIDGE = 0.02
# Numbers travel as text: so many digits keep every rank.
DIGITS = 8


class Judgement(NamedTuple):
    """Of N images. p_value: (N,), from 1/(N' + 1) to 1 for a calibration on N' images. too_likely: whether the model
    holds an image for likelier, not for less likely, than half of those, (N,) bool. part: which of PARTS departs most
    from theirs, (N,) str."""

    p_value: Floats
    too_likely: NDArray[np.bool_]
    part: NDArray[np.str_]


def parts_of(
    images: NDArray[np.uint8],
    surprise: NDArray[np.floating[Any]],
    residual: Floats,
    log_determinant: Floats,
    latent: Floats,
) -> dict[str, Floats]:
    """What an image's oddness is made of, (N,) each; a pure function of the image, so a file has one score.

    residual, log_determinant, latent: as `covae_core.surprise` gives them. complexity: a code length of the image's
    bytes, in nats; texture: the lag-1 autocorrelation of its whitened residual, near 0 where the density is right.

    images: (N, H, W, C) uint8; surprise: (N, C, H, W); the others (N,) or (N, 1)
    """
    found = (residual, log_determinant, latent, code_lengths(images), lag1_of_each(surprise))
    return {name: np.asarray(part, np.float64).reshape(-1) for name, part in zip(PARTS, found, strict=True)}


def code_lengths(images: NDArray[np.uint8]) -> Floats:
    """Nats that an image's bytes take in a two-part code: median edge prediction (LOCO-I, Weinberger et al. 2000) and
    the entropy of what it leaves, beside a table of the values that occur.

    images: (N, H, W, C) uint8; returns (N,)
    """
    pixels = images.astype(np.int16)
    left, above, corner = (np.zeros_like(pixels) for _ in range(3))
    left[:, :, 1:], above[:, 1:], corner[:, 1:, 1:] = pixels[:, :, :-1], pixels[:, :-1], pixels[:, :-1, :-1]
    low, high = np.minimum(left, above), np.maximum(left, above)
    predicted = np.where(corner >= high, low, np.where(corner <= low, high, left + above - corner))
    left_over = (pixels - predicted) % 256
    lengths = np.empty(len(images))
    for index, values in enumerate(left_over.reshape(len(images), -1)):
        counts = np.bincount(values)
        counts = counts[counts > 0]
        lengths[index] = len(counts) * np.log(256) - (counts * np.log(counts / values.size)).sum()
    return lengths


def lag1_of_each(maps: NDArray[np.floating[Any]]) -> Floats:
    """Lag-1 autocorrelation of each of maps (N, C, H, W), along rows and columns together; 0 for a map of zeros."""
    white = maps.astype(np.float64)
    axes = (1, 2, 3)
    pairs = (white[..., 1:] * white[..., :-1]).sum(axes) + (white[..., 1:, :] * white[..., :-1, :]).sum(axes)
    power = 2 * np.square(white).sum(axes)
    found: Floats = pairs / np.where(power > 0, power, 1.0)
    return found


def log_likelihood(parts: Mapping[str, Floats]) -> Floats:
    """log p(x|z̄) − KL, but for a constant: what tells a likely image from an unlikely one. (N,)"""
    return -0.5 * (parts["residual"] + parts["log_determinant"]) - parts["latent"]


@dataclass(frozen=True)
class Calibration:
    """The scores of unseen images.

    data, run_digest: what the images are of, and the training run that scored them. parts: the names of the numbers
    below. centre, below, above: each part's median, and its distance from the quantiles 0.16 and 0.84. inverse: of the
    covariance of the parts in these units. statistics: of the N images, ascending. median: of their `log_likelihood`.
    quantiles: of each part at LEVELS, for people.
    """

    data: str
    run_digest: str
    parts: tuple[str, ...]
    centre: tuple[float, ...]
    below: tuple[float, ...]
    above: tuple[float, ...]
    inverse: tuple[tuple[float, ...], ...]
    statistics: tuple[float, ...]
    median: float
    quantiles: Mapping[str, tuple[float, ...]]

    @property
    def images(self) -> int:
        """N."""
        return len(self.statistics)

    def statistic(self, parts: Mapping[str, Floats]) -> Floats:
        """What p-values rank, the larger the odder. parts: as `parts_of` gives them, (M,) each; returns (M,)"""
        return self._statistic(self._units(parts))

    def judge(self, parts: Mapping[str, Floats]) -> Judgement:
        """P-values and what lies behind them. parts: as `parts_of` gives them, (M,) each"""
        units = self._units(parts)
        larger = self.images - np.searchsorted(np.array(self.statistics), self._statistic(units), side="left")
        likely = log_likelihood(parts) > self.median
        return Judgement((larger + 1) / (self.images + 1), likely, np.array(self.parts)[np.abs(units).argmax(axis=1)])

    def _units(self, parts: Mapping[str, Floats]) -> Floats:
        """Each part's departure from its median in units of its spread on that side. shape: (M, P)"""
        away = np.column_stack([parts[name] for name in self.parts]) - np.array(self.centre)
        spread = np.where(away < 0, np.array(self.below), np.array(self.above))
        units: Floats = away / spread
        return units

    def _statistic(self, units: Floats) -> Floats:
        """The departures' Mahalanobis square, to DIGITS. (M, P) → (M,)"""
        squares = np.einsum("mi,ij,mj->m", units, np.array(self.inverse), units)
        return np.array([_rounded(value) for value in squares])

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Back from JSON.

        Raises:
            TypeError, ValueError, KeyError: it is not what to_json gave.
        """
        found = {field.name: values[field.name] for field in fields(cls)}
        for name in ("parts", "centre", "below", "above", "statistics"):
            found[name] = tuple(found[name])
        found["inverse"] = tuple(tuple(row) for row in found["inverse"])
        found["quantiles"] = {name: tuple(row) for name, row in found["quantiles"].items()}
        return cls(**found)


def calibrate_on(data: str, run_digest: str, first: Mapping[str, Floats], scored: Mapping[str, Floats]) -> Calibration:
    """The statistic that the parts of some images suggest, and what it is of others.

    first, scored: as `parts_of` gives them, of images that training has not seen; no image is in both.

    Raises:
        InvalidArgument: fewer than ten images in one of them.
    """
    counts = [len(parts[PARTS[0]]) for parts in (first, scored)]
    if min(counts) < 10:
        raise InvalidArgument(f"calibrate_on: found {counts[0]} and {counts[1]} images; expected 10 of each at least")
    low, centre, high = np.quantile(np.column_stack([first[name] for name in PARTS]), (0.16, 0.5, 0.84), axis=0)
    varying = (high > centre) & (centre > low)  # a part that hardly varies says nothing
    names = tuple(name for name, varies in zip(PARTS, varying, strict=True) if varies)
    base = Calibration(
        data=data,
        run_digest=run_digest,
        parts=names,
        centre=_rounded_all(centre[varying]),
        below=_rounded_all((centre - low)[varying]),
        above=_rounded_all((high - centre)[varying]),
        inverse=(),
        statistics=(),
        median=_rounded(float(np.median(log_likelihood(scored)))),
        quantiles={name: _rounded_all(np.quantile(scored[name], LEVELS)) for name in PARTS},
    )
    units = base._units(first).clip(-FAR, FAR)
    covariance = units.T @ units / len(units)
    inverse = np.linalg.inv(covariance + RIDGE * np.diag(np.diag(covariance)))
    shaped = replace(base, inverse=tuple(_rounded_all(row) for row in inverse))
    return replace(shaped, statistics=tuple(np.sort(shaped.statistic(scored)).tolist()))


def false_discoveries(p_values: Floats, rate: float) -> NDArray[np.bool_]:
    """Which images to call odd so that at most a share `rate` of them is not, on average (Benjamini & Hochberg 1995).

    p_values: (N,); NaN is never odd.
    """
    known = np.isfinite(p_values)
    order = np.sort(p_values[known])
    below = np.nonzero(order <= rate * np.arange(1, len(order) + 1) / max(len(order), 1))[0]
    limit = order[below[-1]] if len(below) else -1.0
    return known & (np.where(known, p_values, np.inf) <= limit)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rounded_all(values: Floats) -> tuple[float, ...]:
    return tuple(_rounded(float(value)) for value in values)
