"""Inverse and log-determinant of small positive-definite matrices in operators that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor


def eliminate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses and log-determinants by Gauss–Jordan elimination, unrolled over the static size R.

    A positive-definite matrix needs no pivoting: its pivots are the positive Schur complements, and the log-determinant
    is the sum of their logarithms. Each step drops the column it has cleared: about seven ONNX nodes a step.

    matrices: (B, R, R) float64; returns (B, R, R) and (B,).
    """
    size = matrices.shape[-1]
    identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    rest = torch.cat([matrices, identity.expand_as(matrices)], dim=-1)
    pivots = []
    for step in range(size):
        column, rest = rest[..., :1], rest[..., 1:]
        pivot = column[:, step : step + 1]
        pivots.append(pivot)
        row = rest[:, step : step + 1] / pivot
        rest = rest - (column - identity[:, step : step + 1]) * row
    return rest, torch.cat(pivots, dim=1).log().sum(dim=(1, 2))
