"""The noise of `covae_client.noise` in torch: the same numbers, and every operation exports to ONNX."""

from __future__ import annotations

from math import pi

import torch
from covae_client.noise import MODULI, Stream, jump_multipliers, stream_states
from torch import Tensor


def uniform(seeds: Tensor, count: int, stream: Stream) -> Tensor:
    """Numbers in (0, 1] (float32 rounds the largest to 1). seeds: (N,) int64; returns (N, count) float32."""
    x, y = stream_states(seeds, stream)
    first, second = torch.tensor(jump_multipliers(count), device=seeds.device)
    period = MODULI[0] - 1
    value = (x[:, None] * first % MODULI[0] - y[:, None] * second % MODULI[1]) % period
    return (value.to(torch.float32) + 0.5) * (1.0 / period)


def standard_normal(seeds: Tensor, count: int, stream: Stream) -> Tensor:
    """Standard normals, row n a pure function of seeds[n] and stream. seeds: (N,) int64; returns (N, count) float32."""
    half = (count + 1) // 2
    numbers = uniform(seeds, 2 * half, stream)
    radius = torch.sqrt(-2 * torch.log(numbers[:, :half]))
    angle = 2 * pi * numbers[:, half:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]
