"""Priors p(z): modules, as some learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log, pi
from typing import ClassVar

import torch
from torch import Tensor, nn


class Prior(nn.Module, ABC):
    """p(z) of one latent."""

    kind: ClassVar[str]

    @abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """z from standard normals. shape: (B, *shape)"""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) per row, in nats. shape: (B,)"""


class StandardNormal(Prior):
    """N(0, I)."""

    kind = "standard-normal"

    def draw(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(z; 0, I) per row, in nats. shape: (B,)"""
        return standard_log_prob(value)


class Point(Prior):
    """One value: of a latent that is a function of the image. shape: the latent's"""

    kind = "point"
    value: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(shape))

    def draw(self, noise: Tensor) -> Tensor:
        """The value, for every row."""
        return self.value + 0 * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """0 per row. shape: (B,)"""
        return no_nats(value)


def no_nats(value: Tensor) -> Tensor:
    """0 per row, wherever the value came from. shape: (B, …) → (B,)"""
    return value.flatten(1).sum(1) * 0


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) per row. shape: (B, …) → (B,)"""
    rows = z.flatten(1)
    return -0.5 * (rows.square().sum(1) + rows.shape[1] * log(2 * pi))
