"""How much a linear classifier reads off the latent: the Transformer VAE thesis's protocol (V.ii, Table 1).

A linear SVM on the posterior's mean of `latent`, the pose left aside: its accuracy on the test images, and on nine
parts of the training images, each by one that was fitted to the eight others. What the thesis leaves open is decided
so: scikit-learn's LinearSVC with its defaults (squared hinge, C = 1, one class against the rest), which gives the
thesis's 91.8 % for raw pixels on [0, 1]; latents as they are, unscaled. Of a low-rank density without latents the
coordinates along its components are probed, which for `pca` is the thesis's PCA.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covae_train.data import ImageData, in_units, labels_of
from covae_train.fitted_normal import FittedNormal
from covae_train.measures import Estimate, Measure, Settings, needs_encoder, posterior_means, register
from covae_train.run import TrainedRun

FOLDS = 9
Features: TypeAlias = Callable[[TrainedRun, Tensor], NDArray[np.float64]]


@torch.no_grad()
def features(run: TrainedRun, images: Tensor) -> NDArray[np.float64]:
    """What is probed of images (N, C, H, W) uint8. shape: (N, features)"""
    if isinstance(run.model, FittedNormal):
        directions = nn.functional.normalize(run.model.factor.flatten(1))
        return ((in_units(images) - run.model.mean).flatten(1) @ directions.mT).double().numpy()
    return posterior_means(run, images, "latent").flatten(1).double().numpy()


def pixels(run: TrainedRun, images: Tensor) -> NDArray[np.float64]:
    """Raw pixels on [0, 1]. shape: (N, C·H·W)"""
    return in_units(images).flatten(1).double().numpy()


def probe(run: TrainedRun, data: ImageData, settings: Settings, what: Features, name: str) -> Mapping[str, Estimate]:
    """Percentages. The classifier is fitted to all training images, whatever the run's limit.

    Raises:
        DataError: the data has no labels.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    images, labels, tested, truth = labels_of(run.config.data, run.config.image_shape, run.config.column)
    known, asked = what(run, images), what(run, tested)
    machine = LinearSVC(dual="auto", random_state=settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after the default 1,000 iterations, as the thesis's too
        parts = 100 * cross_val_score(machine, known, labels.numpy(), cv=FOLDS)
        accuracy = 100 * machine.fit(known, labels.numpy()).score(asked, truth.numpy())
    return {
        f"{name}, test accuracy, %": Estimate(float(accuracy), None, 2),
        f"{name}, mean of {FOLDS} parts, %": Estimate(float(parts.mean()), None, 2),
        f"{name}, deviation of {FOLDS} parts, %": Estimate(float(parts.std(ddof=1)), None, 2),
    }


register(
    Measure(
        "linear-probe",
        "accuracy of a linear SVM on the latent's mean; needs labels",
        partial(probe, what=features, name="linear probe"),
        needs_encoder,
    )
)
register(
    Measure(
        "pixel-probe",
        "the same of raw pixels, whatever the run: what linear-probe is held against; minutes",
        partial(probe, what=pixels, name="linear probe of pixels"),
    )
)
