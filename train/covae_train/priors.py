"""Priors p(z): modules, as some learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log, pi
from typing import ClassVar

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


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) per row. shape: (B, …) → (B,)"""
    rows = z.flatten(1)
    return -0.5 * (rows.square().sum(1) + rows.shape[1] * log(2 * pi))
