"""Does a map of whitened residuals show where an image is odd? On defects that are put into held-out images.

A patch of another image, a scratch, on faces an eye out of its place: of each image the area under the curve (AUROC) of
its pixels, those of the defect against the others, ranked by the magnitude of the map's mean over 3×3 pixels. Beside
the density's own whitening stands that of each pixel alone, (x − μ)/sd with the same mean and the same marginal
variances: what the correlations add, image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covae_core.densities import Whitening
from covae_core.surprise import density_at_means, patch_sums
from covae_train.calibration import untouched
from covae_train.data import ImageData, in_units
from covae_train.measures import Estimate, Settings, auroc, mean_of, needs_whitening, paired_measure, register
from covae_train.run import TrainedRun

BATCH = 100
# A scratch moves pixels by so many grey levels; a patch differs from what it hides by so many on average.
SCRATCH, LEAST_CHANGE, TRIES = 96, 32.0, 100
# Where aligned faces have their left eye, as shares of the side, and how far it is moved down.
EYE_ROWS, EYE_COLUMNS, EYE_SHIFT = (0.44, 0.58), (0.30, 0.48), 0.06

Bytes = NDArray[np.uint8]
Defect = Callable[[Bytes, Bytes, np.random.Generator], Bytes]
Whitenings = Mapping[str, NDArray[np.float64]]


@torch.no_grad()
def residual_maps(run: TrainedRun, images: Tensor) -> Whitenings:
    """Residuals at the posteriors' means, whitened by the density to score with, and each pixel's by its own standard
    deviation. images: (N, C, H, W) uint8; returns (N, C, H, W) each
    """
    found: dict[str, list[Tensor]] = {"whitened": [], "each pixel alone": []}
    for batch in torch.split(images, BATCH):
        pixels = in_units(batch)
        _, density = density_at_means(run.model, pixels)
        assert isinstance(density, Whitening)
        found["whitened"].append(density.whiten(pixels.double()))
        found["each pixel alone"].append((pixels.double() - density.mean) / density.marginal_variance().sqrt())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def patch(image: Bytes, other: Bytes, random: np.random.Generator) -> Bytes:
    """A seventh of the side of another image, at a place where that makes a difference. shapes: (C, H, W)"""
    side = max(2, round(min(image.shape[1:]) / 7))
    found = image.copy()
    for _ in range(TRIES):
        (top, left), (row, column) = (
            [int(random.integers(0, size - side + 1)) for size in image.shape[1:]] for _ in range(2)
        )
        found = image.copy()
        found[:, top : top + side, left : left + side] = other[:, row : row + side, column : column + side]
        if np.abs(found.astype(int) - image).sum() >= LEAST_CHANGE * side * side * len(image):
            break
    return found


def scratch(image: Bytes, other: Bytes, random: np.random.Generator) -> Bytes:
    """A straight line, a pixel wide and half a side long, lighter on dark pixels and darker on light ones."""
    height, width = image.shape[1:]
    length, angle = min(height, width) / 2, random.uniform(0, np.pi)
    reach = np.abs(length / 2 * np.array([np.sin(angle), np.cos(angle)]))
    centre = random.uniform(reach, np.array([height - 1, width - 1]) - reach)
    steps = np.linspace(-0.5, 0.5, 2 * max(height, width)) * length
    rows = np.rint(centre[0] + steps * np.sin(angle)).astype(int)
    columns = np.rint(centre[1] + steps * np.cos(angle)).astype(int)
    found = image.copy()
    under = image[:, rows, columns].astype(int)
    found[:, rows, columns] = np.where(under < 128, under + SCRATCH, under - SCRATCH)
    return found


def shifted_eye(image: Bytes, other: Bytes, random: np.random.Generator) -> Bytes:
    """The left eye of an aligned face, moved down; what was above it stays, so it is stretched, too."""
    height, width = image.shape[1:]
    top, bottom = (round(share * height) for share in EYE_ROWS)
    left, right = (round(share * width) for share in EYE_COLUMNS)
    shift = max(1, round(EYE_SHIFT * height))
    found = image.copy()
    found[:, top + shift : bottom + shift, left:right] = image[:, top:bottom, left:right]
    return found


def defects_of(data: str) -> dict[str, Defect]:
    """The defects that make sense for a data set, by name."""
    faces: dict[str, Defect] = {"shifted eye": shifted_eye} if data.startswith("celeba") else {}
    return {"pasted patch": patch, "scratch": scratch, **faces}


def areas(maps: NDArray[np.float64], defective: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The AUROC of each image's pixels; NaN where the defect changed none or all. maps: (N, C, H, W), defective:
    (N, H, W)"""
    values = np.abs(patch_sums(maps)).sum(1)
    return auroc(values.reshape(len(maps), -1), defective.reshape(len(maps), -1))


def measured(run: TrainedRun, data: ImageData, settings: Settings) -> tuple[dict[str, Tensor], Mapping[str, Estimate]]:
    """The areas of each image by defect, whitened, (N,), and the figures: whitened, alone, and the difference."""
    images = untouched(data, run.config.limit)[: settings.images].numpy()
    each: dict[str, Tensor] = {}
    figures: dict[str, Estimate] = {}
    for name, defect in defects_of(run.config.data).items():
        random = np.random.default_rng(settings.seed)
        odd = np.stack([defect(image, images[index - 1], random) for index, image in enumerate(images)])
        changed = (odd != images).any(1)
        maps = residual_maps(run, torch.from_numpy(odd))
        found = {kind: torch.from_numpy(areas(values, changed)) for kind, values in maps.items()}
        each[name] = found["whitened"]
        usable = ~each[name].isnan()
        for kind, values in found.items():
            figures[f"pixel AUROC, {name}, {kind}"] = mean_of(values[usable])
        gain = found["whitened"] - found["each pixel alone"]
        figures[f"pixel AUROC, {name}, difference"] = mean_of(gain[usable])
    return each, figures


def compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Estimate]:
    """Differences of the areas, paired over images."""
    gaps = {name: first[name] - second[name] for name in first}
    return {f"pixel AUROC, {name}": mean_of(gap[~gap.isnan()]) for name, gap in gaps.items()}


register(
    paired_measure(
        "defects", "pixel AUROC of surprise maps, defects put into images", measured, compare, needs_whitening
    )
)
