"""Principal component analysis as a density: the baseline of SOS-VAE section 4.5, by scikit-learn's IncrementalPCA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, cast

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from covae_core.errors import InvalidArgument
from covae_train.config import Options, RunConfig
from covae_train.families import Family, register
from covae_train.fitted_normal import FittedNormal
from covae_train.phases import Phase, TrainingImages

Rows: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"


class PcaOptions(Options):
    """The fit's options."""

    rank: PositiveInt = Field(25, description="R, components")
    floor: PositiveFloat = Field(1e-5, description="the least variance of a pixel beside the components")


def build(config: RunConfig) -> FittedNormal:
    """A density in the middle of nowhere, to be fitted."""
    options = cast(PcaOptions, config.options)
    return FittedNormal(config.image_shape, options.rank, options.floor)


@torch.no_grad()
def fit(model: FittedNormal, training: TrainingImages) -> None:
    """Components scaled by the deviations along them, as the paper samples; σ² is what PCA leaves per number."""
    from sklearn.decomposition import IncrementalPCA
    from threadpoolctl import threadpool_limits

    pca = IncrementalPCA(model.rank)
    # As many threads as torch has: more would spin, and on busy cores a small decomposition takes six times as long.
    with threadpool_limits(torch.get_num_threads()):
        for part in _parts(training, model.rank):
            pca.partial_fit(part)
    factor = pca.components_ * np.sqrt(pca.explained_variance_)[:, None]
    # Its own noise_variance_ has forgotten what earlier parts left over, and var_ is not what n − 1 makes of it.
    total = pca.var_.sum() * pca.n_samples_seen_ / max(1, pca.n_samples_seen_ - 1)
    left = (total - pca.explained_variance_.sum()) / (pca.var_.size - model.rank)
    model.set(torch.from_numpy(pca.mean_), torch.from_numpy(factor), float(left))


def _parts(training: TrainingImages, rank: int) -> Iterator[Rows]:
    """All images as rows, in parts that IncrementalPCA takes: each of as many as there are components at least.

    Raises:
        InvalidArgument: there are fewer images than components.
    """
    waiting: list[Rows] = []
    for images in training.images():
        rows = images.double().flatten(1).cpu().numpy()
        if len(rows) >= rank and sum(map(len, waiting)) >= 10 * rank:
            yield np.concatenate(waiting)
            waiting = []
        waiting.append(rows)
    last = np.concatenate(waiting)
    if len(last) < rank:
        raise InvalidArgument(f"rank: found {rank}; expected as many training images at least, found {len(last)}")
    yield last


register(
    Family(
        "pca",
        "principal components of a data set as a density: low-rank-normal's baseline",
        PcaOptions,
        build,
        lambda config: [Phase("fit", 0, begin=fit)],
    )
)
