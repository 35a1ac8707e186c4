"""The parts that every family shares: an encoder, a decoder, and a head that makes the density's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from covae_train.densities import Density, DiagonalNormal

# SOS-VAE's head initialisation: the first mean is mid-grey, the first factor next to nothing.
HEAD_WEIGHT_STD = 1e-5
MEAN_BIAS = 0.5


def pointwise_head(in_width: int, out_width: int, bias: float) -> nn.Conv2d:
    """A 1×1 convolution with weights N(0, 1e-5²) and a constant bias."""
    head = nn.Conv2d(in_width, out_width, 1)
    nn.init.normal_(head.weight, std=HEAD_WEIGHT_STD)
    assert head.bias is not None
    nn.init.constant_(head.bias, bias)
    return head


class DensityHead(nn.Module, ABC):
    """Feature maps (B, F, H, W) to a density over images (C, H, W).

    `mean_variance` is the variance of every pixel while only the mean is trained; `mean_share` is how much of that
    density's −log N(x; μ, D) stays in the loss when everything is trained.
    """

    mean_variance: float
    mean_share: float = 0.0

    def __init__(self, in_width: int, channels: int) -> None:
        super().__init__()
        self.mean = pointwise_head(in_width, channels, MEAN_BIAS)

    def mean_density(self, features: Tensor) -> DiagonalNormal:
        """The mean with a constant variance: what the first phase of training sees."""
        return self.density_around(self.mean(features))

    def density_around(self, mean: Tensor) -> DiagonalNormal:
        """The density of the first phase around a mean (B, C, H, W)."""
        return DiagonalNormal(mean, self.mean_variance, validate_args=False)

    def start_spread(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Give the spread its first values, where phase `all` begins after a phase `mean`. Called without gradients.

        Args:
            batches: features (B, F, H, W) and images (B, C, H, W) of training images; made as they are asked for
        """

    @abstractmethod
    def density(self, features: Tensor) -> Density:
        """The whole density."""


class Posterior(NamedTuple):
    """q(z|x), independent normals. shape of each: (B, *latent_shape)"""

    mean: Tensor
    scale: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """z = mean + scale · noise."""
        return self.mean + self.scale * noise

    def kl_to_prior(self) -> Tensor:
        """KL[q(z|x) ‖ N(0, I)] per row, in nats. shape: (B,)"""
        variance = self.scale.square()
        terms = 0.5 * (self.mean.square() + variance - 1 - variance.log())
        return terms.flatten(1).sum(1)

    def log_prob(self, latent: Tensor) -> Tensor:
        """log q(z|x) per row, in nats. shape: (B,)"""
        return _standard_log_prob((latent - self.mean) / self.scale) - self.scale.log().flatten(1).sum(1)


def prior_log_prob(latent: Tensor) -> Tensor:
    """log p(z) = log N(z; 0, I) per row, in nats. shape: (B, *latent_shape) → (B,)"""
    return _standard_log_prob(latent)


def _standard_log_prob(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi, dtype=z.dtype))).flatten(1).sum(1)


class ImageModel(nn.Module):
    """A VAE whose decoder yields a density over images.

    Args:
        encoder: (B, C, H, W) in [0, 1] → (mean, scale) of the latent, each (B, *latent_shape)
        decoder: (B, *latent_shape) → features (B, F, H, W)
        head: features → density
        latent_shape: the latent's shape, no batch axis
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, head: DensityHead, latent_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.latent_shape = latent_shape

    def posterior(self, images: Tensor) -> Posterior:
        """q(z|x) of images (B, C, H, W) in [0, 1]."""
        return Posterior(*self.encoder(images))

    def density(self, latent: Tensor) -> Density:
        """p(x|z) of latents (B, *latent_shape)."""
        return self.head.density(self.decoder(latent))

    def mean_density(self, latent: Tensor) -> Density:
        """p(x|z) while only the mean is trained."""
        return self.head.mean_density(self.decoder(latent))
