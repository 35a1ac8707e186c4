"""Spherical interpolation between two noise vectors, with every pair of ends defined."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from covae_core.densities.slerp import SMALL_ANGLE


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Great-circle interpolation (SOS-VAE eq. 8): [sin((1−t)Ω) a + sin(tΩ) b] / sin Ω, Ω the angle between a and b.

    start, end: (…, K); returns (steps, …, K), t = linspace(0, 1, steps). Where the formula is 0/0:
    ends that point the same way, or of which one is zero, are joined by the straight line; opposite ends by the half
    circle through the coordinate axis on which they are smallest (the straight line if K = 1), their length changing
    linearly, so ends of equal length stay on their sphere.
    """
    a, b = start.double(), end.double()
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device).reshape(steps, *[1] * a.ndim)
    length_a = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    length_b = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    unit_a = a / torch.where(length_a > 0, length_a, 1)
    unit_b = b / torch.where(length_b > 0, length_b, 1)
    apart = torch.linalg.vector_norm(unit_a - unit_b, dim=-1, keepdim=True)
    together = torch.linalg.vector_norm(unit_a + unit_b, dim=-1, keepdim=True)
    no_zero = (length_a > 0) & (length_b > 0)
    opposite = (together < SMALL_ANGLE) & no_zero if a.shape[-1] > 1 else torch.zeros_like(no_zero)
    straight = ~no_zero | (apart < SMALL_ANGLE) | ((together < SMALL_ANGLE) & ~opposite)
    angle = torch.where(straight | opposite, pi / 2, 2 * torch.atan2(apart, together))
    path = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    path = torch.where(straight, (1 - t) * a + t * b, path)
    if bool(opposite.any()):
        half_circle = torch.cos(pi * t) * unit_a + torch.sin(pi * t) * _perpendicular(unit_a)
        path = torch.where(opposite, ((1 - t) * length_a + t * length_b) * half_circle, path)
    ends = [a[None], path[1:-1], b[None]] if steps > 1 else [a[None]]
    return torch.cat(ends).to(torch.promote_types(start.dtype, end.dtype))


def _perpendicular(unit: Tensor) -> Tensor:
    axis = torch.nn.functional.one_hot(unit.abs().argmin(dim=-1), unit.shape[-1]).to(unit.dtype)
    rest = axis - (axis * unit).sum(dim=-1, keepdim=True) * unit
    length: Tensor = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    return rest / length
