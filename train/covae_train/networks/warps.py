"""Warps of images: where each pixel of the result comes from, as a function of a pose.

Coordinates run from −1 to 1 over the centres of an image's outermost pixels (torch's align_corners); a pixel is read
between its four neighbours (bilinear), and beyond the border is the border's own value. A pose of zeros is the
identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

Row: TypeAlias = tuple[Tensor, Tensor, Tensor]


class Warp(nn.Module, ABC):
    """A pose's effect on images of one size.

    Args:
        height, width: of the images
    """

    kind: ClassVar[str]  # of `covae_core.warp`
    degrees: ClassVar[int]
    smallest: ClassVar[int] = 1  # side of images that it makes sense on
    x: Tensor
    y: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("x", torch.linspace(-1, 1, width)[None].expand(height, width).clone())
        self.register_buffer("y", torch.linspace(-1, 1, height)[:, None].expand(height, width).clone())

    @abstractmethod
    def places(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Where each pixel comes from: x and y, (B, H, W) each. pose: (B, degrees)"""

    @abstractmethod
    def undo(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """As places, of the inverse."""

    def forward(self, images: Tensor, pose: Tensor, inverse: bool = False) -> Tensor:
        """The warped images; those of the pose undone where `inverse`. images: (B, C, H, W)"""
        grid = torch.stack(self.undo(pose) if inverse else self.places(pose), dim=-1)
        return nn.functional.grid_sample(
            images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=True
        )

    def _affine(
        self, matrix: tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """x and y of rows (a, b, c): a x + b y + c. Sums, not products of matrices: a row is its own."""
        (a, b, c), (d, e, f) = ([entry[:, None, None] for entry in row] for row in matrix)
        return a * self.x + b * self.y + c, d * self.x + e * self.y + f


class Affine(Warp):
    """Any affine map, 6 numbers: the matrix (2, 3) less the identity, row by row."""

    kind = "affine"
    degrees = 6

    def places(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d, e, f = pose.unbind(1)
        return self._affine(((1 + a, b, c), (d, 1 + e, f)))

    def undo(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """(A, t) has the inverse (A⁻¹, −A⁻¹ t); a matrix that cannot be inverted gives what is not finite."""
        a, b, c, d, e, f = pose.unbind(1)
        a, e = 1 + a, 1 + e
        scale = 1 / (a * e - b * d)
        return self._affine(
            ((e * scale, -b * scale, (b * f - e * c) * scale), (-d * scale, a * scale, (d * c - a * f) * scale))
        )


class Affine5(Warp):
    """A rotation, then a shift, then scales (the thesis's 5 numbers): ψ, log Sx, log Sy, Tx, Ty.

    [[Sx cos ψ, −Sx sin ψ, Sx Tx], [Sy sin ψ, Sy cos ψ, Sy Ty]]
    """

    kind = "affine5"
    degrees = 5

    def places(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin, sx, sy, tx, ty = self._parts(pose)
        return self._affine(((sx * cos, -sx * sin, sx * tx), (sy * sin, sy * cos, sy * ty)))

    def undo(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """R(−ψ) diag(1/Sx, 1/Sy), and −R(−ψ) T."""
        cos, sin, sx, sy, tx, ty = self._parts(pose)
        return self._affine(((cos / sx, sin / sy, -(cos * tx + sin * ty)), (-sin / sx, cos / sy, sin * tx - cos * ty)))

    def _parts(self, pose: Tensor) -> tuple[Tensor, ...]:
        angle, log_sx, log_sy, tx, ty = pose.unbind(1)
        return angle.cos(), angle.sin(), log_sx.exp(), log_sy.exp(), tx, ty


class ThinPlate(Warp):
    """A thin-plate spline over 3×3 control points, 18 numbers: how far each is shifted, all x and then all y.

    The spline is linear in its control points: each pixel's place is Σ φₖ(pixel) (pointₖ + shiftₖ), φ made once of
    U(r) = r² log r². It interpolates the points, and is affine where their shifts are.
    """

    kind = "thin-plate-spline"
    degrees = 18
    smallest = 9
    SIDE: ClassVar[int] = 3
    # Of Newton's method for the inverse; how far from the image it may look, and the least determinant it divides by.
    STEPS: ClassVar[int] = 8
    REACH: ClassVar[float] = 3.0
    LEAST: ClassVar[float] = 0.05
    basis: Tensor
    points: Tensor
    of_points: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__(height, width)
        line = torch.linspace(-1, 1, self.SIDE, dtype=torch.float64)
        points = torch.stack([line.repeat(self.SIDE), line.repeat_interleave(self.SIDE)], dim=1)  # x, y
        pixels = torch.stack([self.x.double().flatten(), self.y.double().flatten()], dim=1)
        count = len(points)
        ones = torch.ones(count, 1, dtype=torch.float64)
        system = torch.zeros(count + 3, count + 3, dtype=torch.float64)
        system[:count, :count] = radial(points, points)
        system[:count, count:] = torch.cat([ones, points], dim=1)
        system[count:, :count] = system[:count, count:].T
        of_points = torch.linalg.inv(system)[:, :count]
        features = torch.cat([radial(pixels, points), torch.ones(len(pixels), 1), pixels], dim=1)
        basis = (features @ of_points).reshape(height, width, count)
        self.register_buffer("basis", basis.to(torch.float32))
        self.register_buffer("points", points.to(torch.float32))
        self.register_buffer("of_points", of_points.to(torch.float32))

    def places(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        across, down = pose.reshape(-1, 2, 1, 1, self.SIDE**2).unbind(1)
        # Along the last axis: along others ONNX Runtime adds up in an order that depends on the batch.
        return self.x + (across * self.basis).sum(-1), self.y + (down * self.basis).sum(-1)

    def undo(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """By Newton's method from where the shifts themselves point; right where the spline does not fold."""
        shifts = pose.reshape(-1, 2, 1, self.SIDE**2)
        across, down = ((self.of_points * axis).sum(-1)[:, None, None] for axis in shifts.unbind(1))
        start_x, start_y = self.places(pose)
        x, y = 2 * self.x - start_x, 2 * self.y - start_y
        for _ in range(self.STEPS):
            (dx, dxx, dxy), (dy, dyx, dyy) = self._shift(x, y, across), self._shift(x, y, down)
            off_x, off_y = x + dx - self.x, y + dy - self.y
            determinant = ((1 + dxx) * (1 + dyy) - dxy * dyx).clamp(min=self.LEAST)
            x = (x - ((1 + dyy) * off_x - dxy * off_y) / determinant).clamp(-self.REACH, self.REACH)
            y = (y - ((1 + dxx) * off_y - dyx * off_x) / determinant).clamp(-self.REACH, self.REACH)
        return x, y

    def _shift(self, x: Tensor, y: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far one axis is shifted at places, and the derivatives of that by x and y, (B, H, W) each.

        coefficients: of the points' U, and of 1, x and y, (B, 1, 1, points + 3)
        """
        count = self.SIDE**2
        of_u, (one, by_x, by_y) = coefficients[..., :count], coefficients[..., count:].unbind(-1)
        right, below = x[..., None] - self.points[:, 0], y[..., None] - self.points[:, 1]
        square = right.square() + below.square()
        log = square.clamp(min=SMALLEST).log()
        slope = 2 * of_u * (log + 1)
        shift = (of_u * square * log).sum(-1) + one + by_x * x + by_y * y
        return shift, (slope * right).sum(-1) + by_x, (slope * below).sum(-1) + by_y


# A squared distance whose logarithm float32 has.
SMALLEST = 1e-37


def radial(places: Tensor, points: Tensor) -> Tensor:
    """U of each place's distance from each point, 0 at 0. shape: (N, 2), (K, 2) → (N, K)"""
    square = (places[:, None] - points).square().sum(-1)
    return square * square.clamp(min=1e-300).log()
