"""Spherical interpolation between two noise vectors, with every pair of ends defined."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Below this, sin Ω as a divisor would amplify the rounding of float32 ends.
SMALL_ANGLE = 1e-6


def slerp(start: NDArray[np.floating[Any]], end: NDArray[np.floating[Any]], steps: int) -> NDArray[np.floating[Any]]:
    """Great-circle interpolation (SOS-VAE eq. 8): [sin((1−t)Ω) a + sin(tΩ) b] / sin Ω, Ω the angle between a and b.

    start, end: (…, K); returns (steps, …, K), t = linspace(0, 1, steps). Where the formula is 0/0:
    ends that point the same way, or of which one is zero, are joined by the straight line; opposite ends by the half
    circle through the coordinate axis on which they are smallest (the straight line if K = 1), their length changing
    linearly, so ends of equal length stay on their sphere.
    """
    a, b = np.broadcast_arrays(np.asarray(start, np.float64), np.asarray(end, np.float64))
    t = np.linspace(0.0, 1.0, steps).reshape(steps, *[1] * a.ndim)
    length_a = np.linalg.norm(a, axis=-1, keepdims=True)
    length_b = np.linalg.norm(b, axis=-1, keepdims=True)
    unit_a = a / np.where(length_a > 0, length_a, 1)
    unit_b = b / np.where(length_b > 0, length_b, 1)
    apart = np.linalg.norm(unit_a - unit_b, axis=-1, keepdims=True)
    together = np.linalg.norm(unit_a + unit_b, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(apart, together)
    opposite = (together < SMALL_ANGLE) & (length_a > 0) & (length_b > 0) & (a.shape[-1] > 1)
    straight = (length_a == 0) | (length_b == 0) | (apart < SMALL_ANGLE) | ((together < SMALL_ANGLE) & ~opposite)
    sine = np.where(straight | opposite, 1, np.sin(angle))
    path = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / sine
    path = np.where(straight, (1 - t) * a + t * b, path)
    if opposite.any():
        half_circle = np.cos(np.pi * t) * unit_a + np.sin(np.pi * t) * _perpendicular(unit_a)
        path = np.where(opposite, ((1 - t) * length_a + t * length_b) * half_circle, path)
    path[0], path[-1] = (a, b) if steps > 1 else (a, a)
    return path.astype(np.result_type(start, end))


def _perpendicular(unit: NDArray[np.float64]) -> NDArray[np.float64]:
    axis = np.zeros_like(unit)
    np.put_along_axis(axis, np.abs(unit).argmin(axis=-1)[..., None], 1.0, axis=-1)
    rest = axis - (axis * unit).sum(axis=-1, keepdims=True) * unit
    return np.asarray(rest / np.linalg.norm(rest, axis=-1, keepdims=True))
