"""Which later pixels a pixel's filter reaches, and in what order an image is solved for.

Of a pixel k, in raster order, a neighbourhood of side n_f holds the h = n_f // 2 pixels to its right and, of the h rows
below, those from h to the left to h to the right: (n_f² − 1)/2 neighbours m > k, the rows of L's column k.
With G dilations it holds the same pattern again at twice the distance, at four times it, … (section 4.3, figure 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from covae_core.densities.layout import Shape
from covae_core.errors import InvalidArgument


@dataclass(frozen=True)
class Neighbourhood:
    """side: n_f, odd, at least 3. dilations: G, at least 1; the last is by 2^(G − 1)."""

    side: int
    dilations: int = 1

    @property
    def reach(self) -> int:
        """h, the undilated pattern's reach each way."""
        return self.side // 2

    @cached_property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """(rows below, columns to the right) of each neighbour, in the order of the filters."""
        h = self.reach
        pattern = [(0, right) for right in range(1, h + 1)]
        pattern += [(below, right) for below in range(1, h + 1) for right in range(-h, h + 1)]
        return tuple((below << step, right << step) for step in range(self.dilations) for below, right in pattern)

    @cached_property
    def opposite(self) -> tuple[tuple[int, int], ...]:
        """Where from each neighbour its pixel is."""
        return tuple((-below, -right) for below, right in self.offsets)

    @property
    def span(self) -> int:
        """How many pixels the farthest neighbour is away, along either axis."""
        return self.reach << (self.dilations - 1)


def neighbours_of(side: int) -> int:
    """(n_f² − 1)/2, the neighbours in an undilated pattern."""
    return (side * side - 1) // 2


def neighbourhood_of(shape: Sequence[int], image_shape: Shape) -> Neighbourhood:
    """The neighbourhood that filters of this shape are for.

    Raises:
        InvalidArgument: the shape is not (G, (n_f² − 1)/2, C, H, W) with an odd n_f ≥ 3, or (B, …) of it.
    """
    shape = tuple(shape)
    side = isqrt(2 * shape[-4] + 1) if len(shape) in (5, 6) else 0
    if side < 3 or side % 2 == 0 or neighbours_of(side) != shape[-4] or shape[-3:] != image_shape or 0 in shape:
        expected = ", ".join(map(str, image_shape))
        raise InvalidArgument(
            f"filters: found shape {shape}, expected (G, K, {expected}) or (B, G, K, {expected}) with G dilations and "
            "K = (n_f² − 1)/2 neighbours: 4, 12 or 24 for n_f = 3, 5 or 7"
        )
    return Neighbourhood(side, shape[-5])


@dataclass(frozen=True, eq=False)
class Wavefronts:
    """The order in which (I + A) y = v is solved, from the last pixel back.

    Pixels (r, c) with the same t = c + (h + 1) r depend on later t alone. Of front t, slot j holds the pixel of row
    t // (h + 1) − j; a slot may be empty. F fronts of J slots; `margin` empty ones stand on either side of them.

    place: of each slot, front by front, its pixel, H·W where there is none; (F, J). slot: of each pixel, its place in
    (F, J); (H·W,). depth: how many later fronts a front needs. neighbours: of front t, by t mod (h + 1), where each
    slot's K neighbours stand in the `depth` fronts behind it, the nearest first, each with its margins; (h + 1, K, J).
    """

    place: NDArray[np.int64]
    slot: NDArray[np.int64]
    depth: int
    margin: int
    neighbours: NDArray[np.int64]

    @property
    def width(self) -> int:
        """Slots of a front, margins counted."""
        return self.place.shape[1] + 2 * self.margin


@lru_cache(maxsize=16)
def wavefronts(neighbourhood: Neighbourhood, height: int, width: int) -> Wavefronts:
    """The fronts of an image of H × W pixels."""
    step = neighbourhood.reach + 1
    slots = -(-width // step)
    front, slot = np.arange(width + step * (height - 1))[:, None], np.arange(slots)[None]
    row, column = front // step - slot, front % step + step * slot
    inside = (row >= 0) & (row < height) & (column < width)
    place = np.where(inside, row * width + column, height * width)
    of_pixel = np.zeros(height * width, np.int64)
    of_pixel[place[inside]] = np.flatnonzero(inside)
    offsets = np.array(neighbourhood.offsets)
    behind = offsets[:, 1] + step * offsets[:, 0]
    shifts = (np.arange(step)[:, None] + offsets[:, 1]) // step  # slots to the right, (h + 1, K)
    margin, depth = int(np.abs(shifts).max()), int(behind.max())
    start = (behind - 1)[:, None] * (slots + 2 * margin) + margin + np.arange(slots)
    return Wavefronts(place, of_pixel, depth, margin, start + shifts[:, :, None])
