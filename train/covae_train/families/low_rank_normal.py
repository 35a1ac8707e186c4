"""SOS-VAE's density without a network: one low-rank normal fitted to a data set (SOS-VAE section 4.5)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from covae_core.errors import InvalidArgument
from covae_train.config import RunConfig, TrainedOptions
from covae_train.families import Family, register
from covae_train.fitted_normal import FittedNormal, negative_log_likelihood
from covae_train.phases import Phase, TrainingImages

# A covariance of this many numbers squared is decomposed in a minute on two cores.
LARGEST_COVARIANCE = 4096


class LowRankNormalOptions(TrainedOptions):
    """The fit's options; epochs, batch size and learning rate are those of a fit by gradient."""

    rank: PositiveInt = Field(25, description="R, columns of the factor")
    fit: Literal["closed-form", "gradient"] = Field(
        "closed-form", description="closed-form: probabilistic PCA, the likeliest one; gradient: by Adam, as the paper"
    )
    floor: PositiveFloat = Field(1e-5, description="the least variance of a pixel beside the factor")
    batch_size: int = Field(100, ge=2, description="images per step")
    learning_rate: PositiveFloat = Field(1e-2, description="Adam's")


def build(config: RunConfig) -> FittedNormal:
    """A density in the middle of nowhere, to be fitted."""
    options = cast(LowRankNormalOptions, config.options)
    if options.fit == "closed-form" and config.image_size > LARGEST_COVARIANCE:
        raise InvalidArgument(
            f"fit: found closed-form for images of {config.image_size} numbers; expected at most {LARGEST_COVARIANCE}: "
            "--fit gradient, or a smaller --image-size"
        )
    return FittedNormal(config.image_shape, options.rank, options.floor)


@torch.no_grad()
def probabilistic_pca(model: FittedNormal, training: TrainingImages) -> None:
    """The likeliest N(μ, P Pᵀ + σ² I) (Tipping & Bishop 1999): P = U (Λ − σ² I)^½, σ² the other eigenvalues' mean.

    μ is the images' mean, U and Λ their covariance's largest R eigenvectors and eigenvalues; all in float64.
    """
    count, total, square = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for images in training.images():
        rows = images.double().flatten(1)
        count, total, square = count + len(rows), total + rows.sum(0), square + rows.mT @ rows
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    variance = float(values[model.rank :].mean())
    scales = (values[: model.rank] - variance).clamp(min=0).sqrt()
    model.set(mean, (vectors[:, : model.rank] * scales).mT, variance)


def phases(config: RunConfig) -> list[Phase]:
    """A closed form needs no step; a fit by gradient is the same likelihood, climbed."""
    options = cast(LowRankNormalOptions, config.options)
    if options.fit == "closed-form":
        return [Phase("fit", 0, begin=probabilistic_pca)]
    return [Phase("all", options.epochs, options.learning_rate, negative_log_likelihood)]


register(
    Family(
        "low-rank-normal",
        "one low-rank normal fitted to a data set, no network",
        LowRankNormalOptions,
        build,
        phases,
    )
)
