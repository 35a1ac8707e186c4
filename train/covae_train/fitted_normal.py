"""A low-rank normal for a whole data set: no network, no latent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from covae_core.densities import LowRankNormal
from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape
from covae_train.image_model import ImageModel
from covae_train.objective import Batch, Terms

FIRST_FACTOR_STD = 1e-2
FIRST_VARIANCE = 0.05


class FittedNormal(ImageModel):
    """N(μ, P Pᵀ + σ² I), the same for every image.

    Args:
        floor: the least σ²
    """

    def __init__(self, image_shape: ImageShape, rank: int, floor: float) -> None:
        super().__init__({})
        height, width, channels = image_shape
        limit = height * width * channels
        if rank >= limit:
            raise InvalidArgument(f"rank: found {rank}; expected fewer than the image's {limit} numbers")
        shape = (channels, height, width)
        self.mean = nn.Parameter(torch.full(shape, 0.5))
        self.factor = nn.Parameter(FIRST_FACTOR_STD * torch.randn(rank, *shape))
        self.log_variance = nn.Parameter(torch.tensor(max(FIRST_VARIANCE - floor, floor / 1000)).log())
        self.floor = floor

    @property
    def variance(self) -> Tensor:
        """σ². shape: (1, 1, 1)"""
        return (self.log_variance.exp() + self.floor).reshape(1, 1, 1)

    @property
    def rank(self) -> int:
        """R, columns of the factor."""
        return len(self.factor)

    def density(self, latents: Mapping[str, Tensor], rows: int | None = None) -> LowRankNormal:
        """The one density, for each of `rows` images."""
        mean = self.mean if rows is None else self.mean.expand(rows, *self.mean.shape)
        return LowRankNormal(mean, self.factor, self.variance, check=False)

    @torch.no_grad()
    def set(self, mean: Tensor, factor: Tensor, variance: float) -> None:
        """Take a fit. mean: (S,); factor: (R, S); variance: σ², kept at the floor at least."""
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.factor.copy_(factor.reshape(self.factor.shape))
        self.log_variance.fill_(max(variance - self.floor, self.floor / 1000)).log_()


def negative_log_likelihood(model: FittedNormal, batch: Batch) -> Terms:
    """−log p(x): there is no latent to pay for."""
    density = model.density({}, len(batch.images))
    log_prob = density.log_prob(batch.images)
    return Terms(-log_prob.mean(), log_prob, torch.zeros_like(log_prob), density.entropy())
