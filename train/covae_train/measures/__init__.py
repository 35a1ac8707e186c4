"""Measures: one evaluation protocol each, by name. A new one is one file here that registers itself.

`covae evaluate RUN --measure NAME` computes it on held-out images.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from covae_core.errors import InvalidArgument
from covae_train.calibration import can_calibrate
from covae_train.data import ImageData, in_units
from covae_train.run import TrainedRun

# Images that go through an encoder at a time.
ROWS = 256


@dataclass(frozen=True)
class Estimate:
    """A figure, with its standard error over images where it is a mean over them. digits: decimals that are shown."""

    value: float
    standard_error: float | None = None
    digits: int = 3

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:,.{self.digits}f}"
        return f"{self.value:z,.{self.digits}f}{error}"


@dataclass(frozen=True)
class Settings:
    """What all measures may be told. images: held-out images to look at, at most; samples: importance weights of each;
    seed: of whatever is random; on_image: called after each image."""

    images: int = 1000
    samples: int = 100
    seed: int = 0
    on_image: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Measure:
    """An evaluation protocol. needs: says of a run what it lacks, or None; usual: computed if no measure is named."""

    name: str
    summary: str
    compute: Callable[[TrainedRun, ImageData, Settings], Mapping[str, Estimate]]
    needs: Callable[[TrainedRun], str | None] = lambda run: None
    usual: bool = False


Measured = tuple[Any, Mapping[str, Estimate]]


@dataclass(frozen=True)
class PairedMeasure(Measure):
    """One that two runs can be compared by, image by image.

    measured: values of single images, and the figures of them; compare: the values of two runs to their difference's
    figures.
    """

    measured: Callable[[TrainedRun, ImageData, Settings], Measured] = field(kw_only=True)
    compare: Callable[[Any, Any], Mapping[str, Estimate]] = field(kw_only=True)


def paired_measure(
    name: str,
    summary: str,
    measured: Callable[[TrainedRun, ImageData, Settings], Measured],
    compare: Callable[[Any, Any], Mapping[str, Estimate]],
    needs: Callable[[TrainedRun], str | None],
    usual: bool = False,
) -> PairedMeasure:
    """A PairedMeasure that computes the figures of what it has measured."""

    def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
        return measured(run, data, settings)[1]

    return PairedMeasure(name, summary, compute, needs, usual, measured=measured, compare=compare)


_MEASURES: dict[str, Measure] = {}


def register(measure: Measure) -> Measure:
    """Make a measure known by its name."""
    _MEASURES[measure.name] = measure
    return measure


@cache
def _import_own() -> None:
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        import_module(f"{__name__}.{module.name}")


def measures() -> dict[str, Measure]:
    """Every measure by name, sorted."""
    _import_own()
    return dict(sorted(_MEASURES.items()))


def find_measure(name: str) -> Measure:
    """The measure of that name.

    Raises:
        InvalidArgument: there is none.
    """
    known = measures()
    if name not in known:
        raise InvalidArgument(f"--measure: found {name!r}; expected one of {', '.join(known)}")
    return known[name]


@torch.no_grad()
def posterior_means(run: TrainedRun, images: Tensor, latent: str) -> Tensor:
    """The posteriors' means of one latent, of images (N, C, H, W) uint8. shape: (N, *latent_shape)"""
    return torch.cat([run.model.posteriors(in_units(rows))[latent].mean for rows in torch.split(images, ROWS)])


def mean_of(values: Tensor, digits: int = 3) -> Estimate:
    """The mean of values (N,) with its standard error."""
    values = values.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Estimate(float(values.mean()), error, digits)


def auroc(values: NDArray[np.floating[Any]], odd: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The area under the curve of odd values over the others, ½ for a tie, along the last axis; NaN if either has none.

    values, odd: (…, N); returns (…)
    """
    inside = odd.sum(-1)
    outside = odd.shape[-1] - inside
    ranks = np.where(odd, rankdata(values, axis=-1), 0).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = (ranks - inside * (inside + 1) / 2) / (inside * outside)
    return found


def needs_encoder(run: TrainedRun) -> str | None:
    """What a run lacks for a measure that scores or reconstructs images: a model with latents has to find them."""
    return None if run.model.encodes or not run.model.latents else "an encoder"


def needs_whitening(run: TrainedRun) -> str | None:
    """As needs_encoder, for a measure that looks at whitened residuals too."""
    return needs_encoder(run) or (None if can_calibrate(run.model) else "whitened residuals, which its density has not")
