"""Parzen-window log-likelihood, by the procedure of Goodfellow et al. 2014 (Spatial VAE's Table 1).

10,000 samples of the model are the centres of Gaussian kernels on pixels in [0, 1]; the kernels' width is the best of
ten for images that are neither trained on nor tested on. The released code of the Spatial VAE chooses it on the test
images themselves. The estimate says more of the samples' spread than of their looks (Theis et al. 2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi

import torch
from torch import Tensor

from covae_core.errors import InvalidArgument
from covae_train.data import ImageData
from covae_train.measures import Estimate, Measure, Settings, mean_of, register
from covae_train.run import TrainedRun

SAMPLES = 10_000
VALIDATION_IMAGES = 1000
WIDTHS = torch.logspace(-1, 0, 10, dtype=torch.float64)
# Distances held at a time.
CHUNK = 256


@torch.no_grad()
def samples_of(run: TrainedRun, count: int, seed: int, means: bool) -> Tensor:
    """Images of the model as float64 rows (count, S): decoded means at latents from the prior, or samples."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        density = run.model.density(run.model.draw_latents(size, random), size)
        seeds = torch.arange(start, start + size) + (seed << 32)
        drawn = density.mean if means else density.sample_rows(seeds)
        rows.append(drawn.clamp(0, 1).double().flatten(1))
    return torch.cat(rows)


def parzen(images: Tensor, centres: Tensor, width: float) -> Tensor:
    """log (1/M) Σ N(x; centre, width² I) of each image. images: (N, S), centres: (M, S), float64; returns (N,)."""
    size = images.shape[1]
    norm = log(len(centres)) + size * (log(width) + 0.5 * log(2 * pi))
    squares = centres.square().sum(1)
    rows = []
    for batch in torch.split(images, CHUNK):
        distances = (batch.square().sum(1)[:, None] - 2 * batch @ centres.T + squares).clamp(min=0)
        rows.append((distances / (-2 * width**2)).logsumexp(1) - norm)
    return torch.cat(rows)


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of all held-out images up to `settings.images`; the validation images are the data's own, or the last held out.

    Raises:
        InvalidArgument: too few held-out images to choose the width on others than those that are measured.
    """
    test, validation = data.held_out, data.validation
    if validation is None:
        half = min(VALIDATION_IMAGES, len(test) // 2)
        test, validation = test[: len(test) - half], test[len(test) - half :]
    test, validation = test[: settings.images], validation[:VALIDATION_IMAGES]
    if len(test) < 2 or len(validation) < 2:
        raise InvalidArgument(f"{run.run_id}: found {len(data.held_out)} held-out image(s); expected 4 or more")
    means = bool(run.model.latents)
    centres = samples_of(run, SAMPLES, settings.seed, means)
    chosen = [float(parzen(_rows(validation), centres, float(width)).mean()) for width in WIDTHS]
    width = float(WIDTHS[max(range(len(chosen)), key=chosen.__getitem__)])
    return {
        "Parzen log-likelihood": mean_of(parzen(_rows(test), centres, width), 1),
        "its kernel's width": Estimate(width),
    }


def _rows(images: Tensor) -> Tensor:
    return images.double().flatten(1) / 255


register(Measure("parzen", "Parzen-window log-likelihood of 10,000 decoded means, nats per image", compute))
