"""The noise of `covae_core.noise` in torch: the same numbers, and every operation exports to ONNX."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from covae_core.noise import MODULI, Stream, jump_multipliers, stream_states


def uniform(seeds: Tensor, count: int, stream: Stream, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in (0, 1] (float32 rounds the largest to 1). seeds: (N,) int64; returns (N, count)."""
    x, y = stream_states(seeds, stream)
    first, second = torch.tensor(jump_multipliers(count), device=seeds.device)
    period = MODULI[0] - 1
    value: Tensor = (x[:, None] * first % MODULI[0] - y[:, None] * second % MODULI[1]) % period
    return (value.to(dtype) + 0.5) * _constant(1 / period, seeds, dtype)


def standard_normal(seeds: Tensor, count: int, stream: Stream, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, row n a pure function of seeds[n] and stream. seeds: (N,) int64; returns (N, count)."""
    half = (count + 1) // 2
    numbers = uniform(seeds, 2 * half, stream, dtype)
    radius = torch.sqrt(-2 * torch.log(numbers[:, :half]))
    angle = _constant(2 * pi, seeds, dtype) * numbers[:, half:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


def _constant(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor: the ONNX exporter writes a Python number as float32 even beside float64 tensors."""
    return torch.tensor(value, dtype=dtype, device=like.device)
