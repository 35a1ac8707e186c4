"""How much do more importance weights say? The effective sample size and the bound at several numbers of them.

ESS is (Σ w)²/Σ w², 1 where one weight carries the sum. Normal log weights of standard deviation s need some exp(s²)
draws before many of them count. A bound is sound at any number; its standard error is not where the ESS is near 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import log

import torch

from covae_core.importance import importance_weights
from covae_train.data import ImageData, in_units
from covae_train.measures import Estimate, Measure, Settings, mean_of, needs_encoder, register
from covae_train.run import TrainedRun

IMAGES, AT_ONCE = 20, 100
COUNTS = (100, 1000, 4000)


def needs(run: TrainedRun) -> str | None:
    """Latents, and an encoder for them."""
    return needs_encoder(run) or (None if run.model.latents else "latents")


@torch.no_grad()
def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of the first held-out images, IMAGES at most."""
    random = torch.Generator().manual_seed(settings.seed)
    images = in_units(data.held_out[: min(IMAGES, settings.images)])
    started = time.perf_counter()
    rows = []
    for image in images:
        parts = [
            importance_weights(run.model, image[None], run.model.latent_noise((1, AT_ONCE), random)).log_weight[0]
            for _ in range(COUNTS[-1] // AT_ONCE)
        ]
        rows.append(torch.cat(parts))
    spent = time.perf_counter() - started
    logs = torch.stack(rows)
    figures = {
        "standard deviation of log weights": Estimate(float(logs.std(1).median()), digits=1),
        "ms per weight": Estimate(1e3 * spent / logs.numel()),
    }
    for count in COUNTS:
        weights = logs[:, :count].softmax(1)
        figures[f"median ESS, K = {count:,}"] = Estimate(float((1 / weights.square().sum(1)).median()), digits=1)
        gain = logs[:, :count].logsumexp(1) - log(count) - logs[:, : COUNTS[0]].logsumexp(1) + log(COUNTS[0])
        figures[f"gain of the bound over K = {COUNTS[0]}, K = {count:,}"] = mean_of(gain, 2)
    return figures


register(Measure("importance", "effective sample size and bound at several numbers of weights", compute, needs))
