"""Principal component analysis as a density: the baseline of SOS-VAE section 4.5, by scikit-learn's IncrementalPCA."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from covae_train.config import Options, RunConfig
from covae_train.families import Family, register
from covae_train.fitted_normal import FittedNormal
from covae_train.phases import Phase, TrainingImages


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

    pca = IncrementalPCA(model.rank)
    waiting: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
    for images in training.images():
        waiting.append(images.double().flatten(1).cpu().numpy())
        if sum(map(len, waiting)) >= 10 * model.rank:  # each part has to be larger than the rank
            pca.partial_fit(np.concatenate(waiting))
            waiting = []
    if waiting and sum(map(len, waiting)) >= model.rank:
        pca.partial_fit(np.concatenate(waiting))
    factor = pca.components_ * np.sqrt(pca.explained_variance_)[:, None]
    # Its own noise_variance_ has forgotten what earlier parts left over.
    left = (pca.var_.sum() - pca.explained_variance_.sum()) / (pca.var_.size - model.rank)
    model.set(torch.from_numpy(pca.mean_), torch.from_numpy(factor), float(left))


register(
    Family(
        "pca",
        "principal components of a data set as a density: low-rank-normal's baseline",
        PcaOptions,
        build,
        lambda config: [Phase("fit", 0, begin=fit)],
    )
)
