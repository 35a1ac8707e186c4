"""Warps of images: where each pixel of the result comes from, as a function of a pose.

Coordinates run from −1 to 1 over the centres of an image's outermost pixels (torch's align_corners); a pixel is read
between its four neighbours (bilinear), and beyond the border is the border's own value. A pose of zeros is the
identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Warp(nn.Module, ABC):
    """A pose's effect on images of one size: where a pixel comes from is linear in some functions of its place.

    Args:
        height, width: of the images
    """

    kind: ClassVar[str]  # of `covae_core.warp`
    degrees: ClassVar[int]
    smallest: ClassVar[int] = 1  # side of images that it makes sense on
    x: Tensor
    y: Tensor
    basis: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("x", torch.linspace(-1, 1, width)[None].expand(height, width).clone())
        self.register_buffer("y", torch.linspace(-1, 1, height)[:, None].expand(height, width).clone())
        self.register_buffer("basis", self.functions(height, width))

    @abstractmethod
    def functions(self, height: int, width: int) -> Tensor:
        """The functions at each pixel. shape: (H·W, K)"""

    @abstractmethod
    def coefficients(self, pose: Tensor) -> Tensor:
        """Those of x and of y. shape: (B, degrees) → (B, K, 2)"""

    def grid(self, pose: Tensor) -> Tensor:
        """Where each pixel comes from, x and y. shape: (B, degrees) → (B, H, W, 2)"""
        return self._at(self.coefficients(pose))

    @abstractmethod
    def inverse(self, pose: Tensor) -> Tensor:
        """As grid, of the inverse."""

    def places(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """The grid's x and y, (B, H, W) each."""
        x, y = self.grid(pose).unbind(-1)
        return x, y

    def undo(self, pose: Tensor) -> tuple[Tensor, Tensor]:
        """As places, of the inverse."""
        x, y = self.inverse(pose).unbind(-1)
        return x, y

    def forward(self, images: Tensor, pose: Tensor, inverse: bool = False) -> Tensor:
        """The warped images; those of the pose undone where `inverse`. images: (B, C, H, W)"""
        grid = self.inverse(pose) if inverse else self.grid(pose)
        return nn.functional.grid_sample(
            images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=True
        )

    def _at(self, coefficients: Tensor) -> Tensor:
        # A product for each row of the batch, not one for all of them: a row is its own.
        return (self.basis @ coefficients).reshape(-1, *self.x.shape, 2)


class AffineWarp(Warp):
    """Any that is an affine map: of x, y and 1."""

    def functions(self, height: int, width: int) -> Tensor:
        """x, y and 1."""
        return torch.stack([self.x, self.y, torch.ones_like(self.x)], dim=-1).reshape(-1, 3)

    @abstractmethod
    def inverted(self, pose: Tensor) -> Tensor:
        """As coefficients, of the inverse."""

    def inverse(self, pose: Tensor) -> Tensor:
        """In closed form."""
        return self._at(self.inverted(pose))


def columns(*rows: Tensor) -> Tensor:
    """A map's entries a, b, c, d, e, f, (B,) each, as the coefficients of x = a x + b y + c and y = d x + e y + f."""
    return torch.stack(rows, dim=-1).reshape(-1, 2, 3).mT


class Affine(AffineWarp):
    """Any affine map, 6 numbers: the matrix (2, 3) less the identity, row by row."""

    kind = "affine"
    degrees = 6

    def coefficients(self, pose: Tensor) -> Tensor:
        """The matrix's columns."""
        return (pose.reshape(-1, 2, 3) + torch.eye(2, 3, dtype=pose.dtype, device=pose.device)).mT

    def inverted(self, pose: Tensor) -> Tensor:
        """(A, t) has the inverse (A⁻¹, −A⁻¹ t); a matrix that cannot be inverted gives what is not finite."""
        a, b, c, d, e, f = pose.unbind(1)
        a, e = 1 + a, 1 + e
        scale = 1 / (a * e - b * d)
        return columns(e * scale, -b * scale, (b * f - e * c) * scale, -d * scale, a * scale, (d * c - a * f) * scale)


class Affine5(AffineWarp):
    """A rotation, then a shift, then scales (the thesis's 5 numbers): ψ, log Sx, log Sy, Tx, Ty.

    [[Sx cos ψ, −Sx sin ψ, Sx Tx], [Sy sin ψ, Sy cos ψ, Sy Ty]]
    """

    kind = "affine5"
    degrees = 5

    def coefficients(self, pose: Tensor) -> Tensor:
        """The matrix's columns."""
        cos, sin, sx, sy, tx, ty = self._parts(pose)
        return columns(sx * cos, -sx * sin, sx * tx, sy * sin, sy * cos, sy * ty)

    def inverted(self, pose: Tensor) -> Tensor:
        """R(−ψ) diag(1/Sx, 1/Sy), and −R(−ψ) T."""
        cos, sin, sx, sy, tx, ty = self._parts(pose)
        return columns(cos / sx, sin / sy, -(cos * tx + sin * ty), -sin / sx, cos / sy, sin * tx - cos * ty)

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
    points: Tensor
    of_points: Tensor

    def functions(self, height: int, width: int) -> Tensor:
        """φₖ, and how U, 1, x and y make them."""
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
        self.register_buffer("points", points.to(torch.float32))
        self.register_buffer("of_points", of_points.to(torch.float32))
        basis: Tensor = (features @ of_points).to(torch.float32)
        return basis

    def coefficients(self, pose: Tensor) -> Tensor:
        """The control points as they are shifted."""
        shifted: Tensor = self.points + pose.reshape(-1, 2, self.SIDE**2).mT
        return shifted

    def inverse(self, pose: Tensor) -> Tensor:
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
        return torch.stack([x, y], dim=-1)

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
