"""Spherical interpolation between two noise vectors, with every pair of ends defined."""

from __future__ import annotations

from math import pi
from typing import Any

from covae_core.backends import Array, backend_of

# Below this, sin Ω as a divisor would amplify the rounding of float32 ends.
SMALL_ANGLE = 1e-6


def slerp(start: Any, end: Any, steps: int) -> Array:
    """Great-circle interpolation (SOS-VAE eq. 8): [sin((1−t)Ω) a + sin(tΩ) b] / sin Ω, Ω the angle between a and b.

    start, end: (…, K); returns (steps, …, K), t = linspace(0, 1, steps). Where the formula is 0/0:
    ends that point the same way, or of which one is zero, are joined by the straight line; opposite ends by the half
    circle through the coordinate axis on which they are smallest (the straight line if K = 1), their length changing
    linearly, so ends of equal length stay on their sphere.
    """
    backend = backend_of(start, end)
    xp = backend.xp
    first, last = backend.array(start), backend.array(end)
    a, b = xp.broadcast_arrays(xp.astype(first, xp.float64), xp.astype(last, xp.float64))
    t = xp.linspace(0.0, 1.0, steps, dtype=xp.float64).reshape(steps, *[1] * a.ndim)
    length_a, length_b = _length(xp, a), _length(xp, b)
    one = xp.ones_like(length_a)
    unit_a = a / xp.where(length_a > 0, length_a, one)
    unit_b = b / xp.where(length_b > 0, length_b, one)
    apart, together = _length(xp, unit_a - unit_b), _length(xp, unit_a + unit_b)
    no_zero = (length_a > 0) & (length_b > 0)
    opposite = (together < SMALL_ANGLE) & no_zero if a.shape[-1] > 1 else ~no_zero & no_zero
    straight = ~no_zero | (apart < SMALL_ANGLE) | ((together < SMALL_ANGLE) & ~opposite)
    angle = xp.where(straight | opposite, one * (pi / 2), 2 * xp.atan2(apart, together))
    path = (xp.sin((1 - t) * angle) * a + xp.sin(t * angle) * b) / xp.sin(angle)
    path = xp.where(straight, (1 - t) * a + t * b, path)
    if bool(opposite.any()):
        half_circle = xp.cos(pi * t) * unit_a + xp.sin(pi * t) * _perpendicular(xp, unit_a)
        path = xp.where(opposite, ((1 - t) * length_a + t * length_b) * half_circle, path)
    ends = [a[None], path[1:-1], b[None]] if steps > 1 else [a[None]]
    return xp.astype(xp.concat(ends), xp.result_type(first, last), copy=False)


def _length(xp: Any, vectors: Array) -> Array:
    return xp.linalg.vector_norm(vectors, axis=-1, keepdims=True)


def _perpendicular(xp: Any, unit: Array) -> Array:
    smallest = xp.argmin(xp.abs(unit), axis=-1, keepdims=True)
    axis = xp.astype(xp.arange(unit.shape[-1]) == smallest, xp.float64)
    rest = axis - xp.sum(axis * unit, axis=-1, keepdims=True) * unit
    return rest / _length(xp, rest)
