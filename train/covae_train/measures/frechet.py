"""Fréchet distance between held-out images and a model's, on the features of a classifier of the same data.

FID's procedure (Heusel et al. 2017) with a network that knows these images in place of Inception, which knows none of
28×28: ‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^(½)) of the features' means and covariances.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from covae_train.data import ImageData, in_units, labels_of
from covae_train.measures import Estimate, Measure, Settings, register
from covae_train.measures.parzen import samples_of
from covae_train.run import TrainedRun

SAMPLES = 5000
FEATURES = 64
STEPS, BATCH, RATE = 1000, 64, 2e-3
TRAINED_ON = 20_000


class Classifier(nn.Module):
    """Images (B, C, H, W) in [0, 1] to logits; `features`: what comes before them, (B, FEATURES)."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        height, width, channels = image_shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), FEATURES),
            nn.ReLU(),
        )
        self.logits = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(images))
        return logits


@cache
@torch.enable_grad()
def classifier(data: str, image_shape: tuple[int, int, int], column: str | None) -> tuple[Classifier, float]:
    """A classifier of a data set, and its accuracy on the held-out images; a pure function of the data.

    Raises:
        DataError: the data has no labels.
    """
    images, labels, tested, truth = labels_of(data, image_shape, column)
    torch.manual_seed(0)
    network = Classifier(image_shape, int(labels.max()) + 1)
    adam = torch.optim.Adam(network.parameters())
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=random)[:TRAINED_ON]
    for step in range(STEPS):
        rows = order[torch.randint(len(order), (BATCH,), generator=random)]
        adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        loss = nn.functional.cross_entropy(network(in_units(images[rows])), labels[rows])
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    network.eval().requires_grad_(False)
    right = torch.cat([network(in_units(part)).argmax(1) for part in torch.split(tested, 500)]) == truth
    return network, float(right.double().mean())


def frechet(first: Tensor, second: Tensor) -> float:
    """The distance of two sets of features, (N, F) each."""
    one, two = first.double(), second.double()
    gap = (one.mean(0) - two.mean(0)).square().sum()
    covariance, other = torch.cov(one.T), torch.cov(two.T)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float(gap + covariance.trace() + other.trace() - 2 * mixed)


@torch.no_grad()
def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """Of SAMPLES samples and as many decoded means at latents from the prior, against the held-out images."""
    network, accuracy = classifier(run.config.data, run.config.image_shape, run.config.column)
    real = torch.cat([network.features(in_units(part)) for part in torch.split(data.held_out, 500)])
    figures = {}
    for name, means in (("samples", False), ("decoded means", True)):
        rows = samples_of(run, SAMPLES, settings.seed, means).float().reshape(-1, *data.held_out.shape[1:])
        bytes_ = (rows * 255).round() / 255
        found = torch.cat([network.features(part) for part in torch.split(bytes_, 500)])
        figures[f"Fréchet distance, {name}"] = Estimate(frechet(found, real), digits=1)
    return {**figures, "the classifier's accuracy": Estimate(accuracy)}


register(
    Measure(
        "frechet", "Fréchet distance on a classifier's features, of samples and of decoded means; needs labels", compute
    )
)
