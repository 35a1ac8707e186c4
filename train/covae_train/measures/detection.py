"""Does a p-value find images that are unlike the training's, and leave alone those that are like them?

Held-out images that took no part in the calibration give the false-alarm rate; turned, mirrored, inverted, blurred and
noisy ones, noise, constant and black ones, and the other data sets in COVAE_DATA, the detection rates at 5 % false
alarms and the AUROC of the p-value's statistic, which is above ½ where odd images rank higher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from covae_core.calibration import Calibration
from covae_train.calibration import parts_of_images, untouched
from covae_train.data import ImageData, has_odd_images, load_images, odd_images_of
from covae_train.measures import Estimate, Measure, Settings, auroc, needs_encoder, register
from covae_train.run import TrainedRun

RATES = (0.01, 0.05, 0.1)
ODD_RATE = 0.05
NOISE = 25.0
# The data's own odd images, which the mean over sets leaves out, as other data has none.
OWN_ODD = "infected"
OTHER_DATA = ("cells", "cifar10", "celeba", "mnist")


def needs(run: TrainedRun) -> str | None:
    """An encoder, and a calibration."""
    return needs_encoder(run) or (None if run.calibration else "a calibration (`covae calibrate`)")


def odd_sets(images: Tensor, data: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Sets of odd images by name, each (N, C, H, W) uint8, made from held-out ones or of another data set."""
    random = np.random.default_rng(seed)
    _, channels, height, width = images.shape
    plain = images.numpy().astype(np.float64)
    root = os.environ.get("COVAE_DATA")
    for name in OTHER_DATA:
        if not data.startswith(name) and root and Path(root, name).is_dir():
            yield name, load_images(name, (height, width), channels).held_out[: len(images)]
    if has_odd_images(data):
        yield OWN_ODD, odd_images_of(data, (height, width, channels))[1][0][: len(images)]
    if height == width:
        yield "rotated by 90°", torch.rot90(images, 1, (2, 3))
    yield "mirrored", images.flip(3)
    yield "inverted", 255 - images
    yield "blurred, σ = 1", _bytes(gaussian_filter(plain, (0, 0, 1, 1)))
    yield "noisy, sd 25", _bytes(plain + random.normal(0, NOISE, plain.shape))
    yield "uniform noise", _bytes(random.integers(0, 256, plain.shape))
    flat = random.integers(0, 256, (len(images), channels, 1, 1))
    yield "constant", _bytes(np.broadcast_to(flat, plain.shape))
    yield "black", torch.zeros_like(images)


def _bytes(values: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def statistics(run: TrainedRun, calibration: Calibration, images: Tensor) -> tuple[Tensor, Tensor]:
    """The statistic behind the p-value of each image, and the p-value, (N,) float64. images: (N, C, H, W) uint8"""
    parts = parts_of_images(run.model, images)
    found = calibration.statistic(parts), calibration.judge(parts).p_value
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of held-out images; where the first half of them calibrated the run, of the second."""
    assert run.calibration is not None
    left = untouched(data, run.config.limit)
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(settings.seed))
    usual = left[order[: settings.images]]
    reference, p_values = statistics(run, run.calibration, usual)
    figures = {}
    for rate in RATES:
        error = sqrt(rate * (1 - rate) * (1 / len(usual) + 1 / run.calibration.images))
        figures[f"false alarms at {rate:.0%}"] = Estimate(float((p_values <= rate).double().mean()), error)
    areas = []
    for name, odd in odd_sets(usual, run.config.data, settings.seed):
        found, odd_p = statistics(run, run.calibration, odd)
        truth = np.r_[np.zeros(len(reference), dtype=np.bool_), np.ones(len(found), dtype=np.bool_)]
        area = float(auroc(np.r_[reference.numpy(), found.numpy()], truth))
        if name != OWN_ODD:
            areas.append(area)
        figures[f"AUROC, {name}"] = Estimate(area)
        figures[f"detected, {name}"] = Estimate(float((odd_p <= ODD_RATE).double().mean()))
    return figures | {"AUROC, mean": Estimate(float(np.mean(areas))), "AUROC, least": Estimate(min(areas))}


register(Measure("detection", "false alarms, and how well p-values find odd images", compute, needs))
