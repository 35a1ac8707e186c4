"""Likelihood bounds in bits a number of the image, with and without noise that fills the gaps between grey levels."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

import torch

from covae_train.data import ImageData, in_units, level_noise
from covae_train.measures import Estimate, Measure, Settings, mean_of, needs_encoder, register
from covae_train.measures.bound import bounds_of_units
from covae_train.run import TrainedRun

# The distances between grey levels on [0, 1].
STEPS = 255


@torch.no_grad()
def degrees_of(run: TrainedRun) -> int:
    """The numbers of an image that the model's density is over."""
    latents = run.model.draw_latents(1, torch.Generator().manual_seed(0))
    return run.model.scoring_density(latents, 1).degrees


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """−log₂ p of a grey level, the density being over [0, 1]: 8 bits, all but 0.006, for the uniform density.

    As they are, 8-bit images lie on a grid, on which a density can be as high as its least variance allows; with
    uniform noise of one level no model has fewer bits than a code for the levels needs on average.
    """
    images, noise = data.held_out[: settings.images], level_noise(settings.seed)
    found, degrees = {}, degrees_of(run)
    for name, units in (("as they are", in_units(images)), ("dequantised", in_units(images, noise))):
        bounds, _ = bounds_of_units(run, units, settings.samples, settings.seed)
        found[f"bits per dimension, {name}"] = mean_of(-bounds / (degrees * log(2)) + log(STEPS) / log(2))
    return found


register(Measure("bits", "the bound in bits per dimension, as images are and dequantised", compute, needs_encoder))
