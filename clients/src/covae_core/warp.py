"""What a served model's pose stands for: the numbers of a warp, as a linear function of the latent `pose`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_core.errors import InvalidArgument, Unsupported

Floats = NDArray[np.float64]
# The kinds of warp by the names of the wire, with how many numbers each has.
DEGREES: Mapping[str, int] = {"affine": 6, "affine5": 5, "thin-plate-spline": 18}
# A warp this near to the wanted one is that one, but for float32.
EXACT = 1e-3
PRIOR, IDENTITY, AVERAGE = POSES = ("prior", "identity", "average")


@dataclass(frozen=True)
class WarpSpec:
    """A kind of warp, and its numbers at a latent pose u: shift + columns · u.

    A warp says where each pixel of an image comes from in the upright one; coordinates run from −1 to 1 over the
    centres of the outermost pixels, x to the right and y down. kind: `affine`, the matrix (2, 3) less the identity, row
    by row; `affine5`, ψ, log Sx, log Sy, Tx, Ty of [[Sx cos ψ, −Sx sin ψ, Sx Tx], [Sy sin ψ, Sy cos ψ, Sy Ty]];
    `thin-plate-spline`, how far 3×3 control points are shifted, all x and then all y. Numbers of 0 are the identity.

    shift: (degrees,); columns: (degrees, k); average: the u of the training images' mean numbers, an angle's a circular
    mean, (k,); 0 of a training that has not ended.
    """

    kind: str
    shift: tuple[float, ...]
    columns: tuple[tuple[float, ...], ...]
    average: tuple[float, ...]

    def numbers(self, pose: Any) -> Floats:
        """The warp's numbers. shape: (…, k) → (…, degrees)"""
        found: Floats = np.asarray(self.shift) + np.asarray(pose, np.float64) @ np.asarray(self.columns).T
        return found

    def pose(self, numbers: Any) -> NDArray[np.float32]:
        """The u whose numbers these are, the nearest ones where columns cannot make them. (…, degrees) → (…, k)"""
        wanted = np.asarray(numbers, np.float64) - np.asarray(self.shift)
        found: NDArray[np.float32] = (wanted @ np.linalg.pinv(np.asarray(self.columns)).T).astype(np.float32)
        return found

    def named(self, name: str) -> NDArray[np.float32]:
        """`identity` or `average`, as u. shape: (k,)

        Raises:
            InvalidArgument: it is neither.
        """
        if name not in (IDENTITY, AVERAGE):
            raise InvalidArgument(f"pose: found {name!r}; expected {', '.join(POSES)}, or an array")
        return np.asarray(self.average, np.float32) if name == AVERAGE else self.pose(np.zeros(len(self.shift)))

    def matrix(self, pose: Any) -> Floats:
        """The affine map from an image's coordinates to the upright one's. shape: (…, k) → (…, 2, 3)

        Raises:
            Unsupported: the warp is a spline.
        """
        numbers = self.numbers(pose)
        if self.kind == "affine":
            return np.eye(2, 3) + numbers.reshape(*numbers.shape[:-1], 2, 3)
        self._require_affine("matrix")
        angle, sx, sy, tx, ty = np.moveaxis(numbers, -1, 0)
        sx, sy, cos, sin = np.exp(sx), np.exp(sy), np.cos(angle), np.sin(angle)
        rows = [np.stack([sx * cos, -sx * sin, sx * tx], -1), np.stack([sy * sin, sy * cos, sy * ty], -1)]
        return np.stack(rows, -2)

    def angle(self, pose: Any) -> Floats:
        """How far a square image is turned against the upright one, counter-clockwise, in radians, −π to π: that of
        the rotation next to the map. shape: (…, k) → (…)

        Raises:
            Unsupported: the warp is a spline.
        """
        matrix = self.matrix(pose)
        found: Floats = np.arctan2(matrix[..., 1, 0] - matrix[..., 0, 1], matrix[..., 0, 0] + matrix[..., 1, 1])
        return found

    def turned(self, pose: Any, angle: Any) -> NDArray[np.float32]:
        """Poses whose images, square ones, are those of `pose`, turned counter-clockwise about the middle by angles in
        radians, as `numpy.linspace` gives them. shape: (…, k) and (…) → (…, k)

        Raises:
            Unsupported: the warp is a spline, or the model's poses cannot turn, as those of a prior of few columns.
        """
        self._require_affine("turned")
        angle = np.asarray(angle, np.float64)
        pose = np.broadcast_to(pose, np.broadcast_shapes(np.shape(pose), (*angle.shape, 1)))
        numbers = self.numbers(pose)
        if self.kind == "affine5":
            numbers[..., 0] += angle
        else:
            cos, sin = np.cos(angle), np.sin(angle)
            turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
            matrix = self.matrix(pose)
            turned = np.concatenate([matrix[..., :2] @ turn, matrix[..., 2:]], -1)
            numbers = (turned - np.eye(2, 3)).reshape(numbers.shape)
        found = self.pose(numbers)
        off = float(np.abs(self.numbers(found) - numbers).max())
        if off > EXACT:
            raise Unsupported(
                f"turned: a pose of {len(self.average)} numbers cannot turn so; the nearest warp is {off:.2g} away"
            )
        return found

    def _require_affine(self, what: str) -> None:
        if not self.kind.startswith("affine"):
            raise Unsupported(f"{what}: a {self.kind} is no affine map")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WarpSpec:
        """Read it back.

        Raises:
            InvalidArgument: a kind that this version does not know, or numbers that do not fit it.
        """
        found = cls(
            values["kind"],
            tuple(map(float, values["shift"])),
            tuple(tuple(map(float, row)) for row in values["columns"]),
            tuple(map(float, values["average"])),
        )
        degrees = DEGREES.get(found.kind)
        rows = {len(row) for row in found.columns}
        finite = all(map(isfinite, (*found.shift, *found.average, *chain(*found.columns))))
        if not finite or (len(found.shift), len(found.columns), rows) != (degrees, degrees, {len(found.average)}):
            raise InvalidArgument(
                f"warp: found {found.kind!r} with {len(found.shift)} numbers; expected {dict(DEGREES)}"
            )
        return found
