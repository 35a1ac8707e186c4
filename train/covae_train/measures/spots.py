"""Does the largest spot of surprise tell odd images from usual ones? On a data set that has both, with masks.

Such a data set, blood cells, has `infected.parquet` beside `test.parquet`, each with a column `mask`. The statistic,
`covae_core.surprise.spots` within the mask, is fixed: nothing of it is fitted, to odd images least of all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from covae_core.surprise import spots
from covae_train.calibration import untouched
from covae_train.data import ImageData, has_odd_images, odd_images_of
from covae_train.measures import Estimate, Settings, auroc, needs_whitening, paired_measure, register
from covae_train.measures.defects import residual_maps
from covae_train.run import TrainedRun

RESAMPLES = 2000

Spots = tuple[NDArray[np.float64], NDArray[np.float64]]


def needs(run: TrainedRun) -> str | None:
    """An encoder, and odd images."""
    return needs_whitening(run) or (
        None if has_odd_images(run.config.data) else "odd images with masks beside its data"
    )


def area(usual: NDArray[np.float64], odd: NDArray[np.float64]) -> NDArray[np.float64]:
    """The AUROC of odd over usual values, ½ for a tie, along the last axis."""
    values = np.concatenate([usual, odd], axis=-1)
    return auroc(values, np.broadcast_to(np.arange(values.shape[-1]) >= usual.shape[-1], values.shape))


def _resampled(values: Spots) -> NDArray[np.float64]:
    """The areas of RESAMPLES bootstrap samples of usual and of odd images; the same images for all of one data set."""
    random = np.random.default_rng(0)
    chosen = [part[random.integers(0, len(part), (RESAMPLES, len(part)))] for part in values]
    return area(*chosen)


def gap(first: Spots, second: Spots) -> Estimate:
    """The difference of two areas with its bootstrap standard error, paired over images."""
    return Estimate(float(area(*first) - area(*second)), float((_resampled(first) - _resampled(second)).std()))


def measured(run: TrainedRun, data: ImageData, settings: Settings) -> tuple[Spots, Mapping[str, Estimate]]:
    """The spots of usual and odd images, whitened, and the areas: whitened, each pixel alone, and the difference.

    Of all images, but those usual ones that the run was calibrated on.
    """
    usual, odd = odd_images_of(run.config.data, run.config.image_shape)
    left = len(untouched(data, run.config.limit))
    sets = ((usual[0][-left:], usual[1][-left:]), odd)
    found: dict[str, list[NDArray[np.float64]]] = {}
    for images, masks in sets:
        for kind, maps in residual_maps(run, images).items():
            found.setdefault(kind, []).append(spots(maps * masks[:, None].numpy()))
    pairs: dict[str, Spots] = {kind: (usual, odd) for kind, (usual, odd) in found.items()}
    figures = {
        f"AUROC of the largest spot, {kind}": Estimate(float(area(*pair)), float(_resampled(pair).std()))
        for kind, pair in pairs.items()
    }
    difference = gap(pairs["whitened"], pairs["each pixel alone"])
    return pairs["whitened"], figures | {"AUROC of the largest spot, difference": difference}


def compare(first: Spots, second: Spots) -> dict[str, Estimate]:
    """The difference of the areas, paired over images."""
    return {"AUROC of the largest spot": gap(first, second)}


register(paired_measure("spots", "AUROC of the largest spot of surprise, of odd images", measured, compare, needs))
