"""Does a model find how far each image is turned? On a data set whose images were, by angles that are known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from covae_train.data import ROTATED, ImageData, labels_of, rotation_angles, unrotated
from covae_train.errors import DataError
from covae_train.measures import Estimate, Measure, Settings, posterior_means, register
from covae_train.run import TrainedRun

# Of so few images of a class nothing is said.
FEWEST = 5
# Digits that half a turn leaves much as they are: their angles are compared up to that.
HALF_TURN = {"digits": (0, 1, 8), "mnist": (0, 1, 8)}


def circular_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of Jammalamadaka & SenGupta (2001, section 8.2), from −1 to 1, for angles in radians (N,) each of which the first
    lie evenly around the circle: |mean of exp i(a − b)| − |mean of exp i(a + b)|; 1 where they differ by a constant."""
    apart, together = np.exp(1j * (first - second)).mean(), np.exp(1j * (first + second)).mean()
    return float(abs(apart) - abs(together))


def all_pairs_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """ρ_T of Fisher & Lee (1983), from −1 to 1, of the same: about the square of the other.

    Σ_{i<j} sin(a_i − a_j) sin(b_i − b_j) over the root of the two sums of squares, which are determinants: none of the
    N² pairs is looked at.
    """
    a, b = (np.stack([np.cos(angles), np.sin(angles)]) for angles in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.linalg.det(a @ b.T) / np.sqrt(np.linalg.det(a @ a.T) * np.linalg.det(b @ b.T))
    return float(found)


def found_angles(run: TrainedRun, images: Tensor) -> NDArray[np.float64]:
    """Of images (N, C, H, W) uint8, the angles of their poses' means, (N,)."""
    warp = run.model.warp_spec
    assert warp is not None
    return warp.angle(posterior_means(run, images, "pose").numpy())


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images, within each class, as a class has an upright of its own."""
    _, _, images, labels = labels_of(run.config.data, run.config.image_shape, run.config.column)
    count = min(settings.images, len(images))
    true, found = rotation_angles(len(images), 1).numpy()[:count], found_angles(run, images[:count])
    classes, of_half = labels[:count].numpy(), HALF_TURN.get(unrotated(run.config.data), ())
    rows, strict = {}, []
    for label in np.unique(classes):
        inside = classes == label
        if inside.sum() < FEWEST:
            continue
        times = 2 if label in of_half else 1
        name = f"angle's circular correlation, class {label}" + (", up to half a turn" if times == 2 else "")
        pair = times * true[inside], times * found[inside]
        rows[name] = circular_correlation(*pair)
        strict.append(all_pairs_correlation(*pair))
    if not rows:
        raise DataError(f"rotation: found {count} images; expected {FEWEST} of a class at least: more --images")
    mean = float(np.mean(list(rows.values())))
    figures = {"angle's circular correlation, mean over classes": mean, **rows}
    figures["Fisher and Lee's ρ_T of it, mean over classes"] = float(np.mean(strict))
    return {name: Estimate(value, None, 2) for name, value in figures.items()}


def needs_angles(run: TrainedRun) -> str | None:
    """What a run lacks."""
    warp = run.model.warp_spec
    if warp is None or not warp.kind.startswith("affine"):
        return "a pose with an angle"
    height, width, _ = run.config.image_shape
    if height != width:
        return "square images"
    return None if unrotated(run.config.data) != run.config.data else f"images that were turned: --data {ROTATED}NAME"


register(
    Measure(
        "rotation",
        "is the pose's angle the one that an image was turned by? for rotated-NAME, with labels",
        compute,
        needs_angles,
    )
)
