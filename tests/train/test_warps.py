"""Warps against torch's own affine grids, SciPy's interpolation, and what defines a thin-plate spline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import map_coordinates

from covae_train.networks.warps import Affine, Affine5, ThinPlate

SIZES = [(9, 12), (28, 28)]
WARPS = [Affine, Affine5, ThinPlate]


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


def images(size, rows=4):
    return torch.from_numpy(np.random.default_rng(0).random((rows, 2, *size)))


def poses(warp, rows=4, scale=0.2):
    return torch.from_numpy(scale * np.random.default_rng(1).standard_normal((rows, warp.degrees)))


@pytest.mark.parametrize("size", [(9, 9), (14, 11)])
def test_a_spline_undone_and_done_is_the_identity(size):
    warp, pose = ThinPlate(*size).double(), poses(ThinPlate, scale=0.08)
    x, y = warp.undo(pose)
    for row in range(4):  # the spline at the places that it is undone at, by SciPy
        shifts = pose[row].numpy().reshape(2, 9)
        points = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(9, 2).astype(float)
        spline = RBFInterpolator(points, points + shifts.T, kernel="thin_plate_spline", degree=1)
        found = spline(np.stack([x[row].numpy().ravel(), y[row].numpy().ravel()], 1))
        np.testing.assert_allclose(found, np.stack([warp.x.numpy().ravel(), warp.y.numpy().ravel()], 1), atol=1e-6)
    far = warp.undo(poses(ThinPlate, scale=3.0))
    assert all(bool(axis.isfinite().all()) and float(axis.abs().max()) <= 3 for axis in far)


@pytest.mark.parametrize("kind", WARPS)
def test_a_pose_of_zeros_changes_nothing(kind, size):
    warp, given = kind(*size).double(), images(size)
    torch.testing.assert_close(warp(given, torch.zeros(4, kind.degrees).double()), given, rtol=0, atol=1e-6)


def matrices(kind, pose):
    """The (2, 3) matrices that the documents give, in NumPy."""
    if kind is Affine:
        return np.eye(2, 3) + pose.numpy().reshape(-1, 2, 3)
    angle, sx, sy, tx, ty = pose.numpy().T
    sx, sy = np.exp(sx), np.exp(sy)
    first = np.stack([sx * np.cos(angle), -sx * np.sin(angle), sx * tx], axis=1)
    return np.stack([first, np.stack([sy * np.sin(angle), sy * np.cos(angle), sy * ty], axis=1)], axis=1)


@pytest.mark.parametrize("kind", [Affine, Affine5])
def test_affine_maps_are_torchs_and_scipys(kind, size):
    warp, given, pose = kind(*size).double(), images(size), poses(kind)
    found = warp(given, pose)
    theta = torch.from_numpy(matrices(kind, pose))
    grid = torch.nn.functional.affine_grid(theta, list(given.shape), align_corners=True)
    wanted = torch.nn.functional.grid_sample(given, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    height, width = size
    x, y = (grid[..., axis].numpy() for axis in (0, 1))
    for row in range(4):
        places = np.stack([(y[row] + 1) / 2 * (height - 1), (x[row] + 1) / 2 * (width - 1)])
        for channel in range(2):
            ours = map_coordinates(given[row, channel].numpy(), places, order=1, mode="nearest")
            np.testing.assert_allclose(found[row, channel], ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Affine, Affine5])
def test_a_pose_undone_and_done_is_the_identity(kind, size):
    """On coordinates: on pixels, each interpolation blurs."""
    warp, pose = kind(*size).double(), poses(kind)
    x, y = warp.places(pose)
    a, b = matrices(kind, pose)[:, :, :2], matrices(kind, pose)[:, :, 2]
    inverse = np.linalg.inv(a)
    ux, uy = (value.numpy() for value in warp.undo(pose))
    grid = np.stack([warp.x.numpy(), warp.y.numpy()])
    wanted = np.einsum("bij,jhw->bihw", inverse, grid) - np.einsum("bij,bj->bi", inverse, b)[:, :, None, None]
    np.testing.assert_allclose(np.stack([ux, uy], axis=1), wanted, rtol=0, atol=1e-6)
    back = np.einsum("bij,bjhw->bihw", inverse, np.stack([x.numpy(), y.numpy()], axis=1) - b[:, :, None, None])
    np.testing.assert_allclose(back, np.broadcast_to(grid, back.shape), rtol=0, atol=1e-6)


def test_a_spline_is_scipys_thin_plate_spline(size):
    warp, pose = ThinPlate(*size).double(), poses(ThinPlate)
    x, y = warp.places(pose)
    line = np.linspace(-1, 1, 3)
    points = np.stack([np.tile(line, 3), np.repeat(line, 3)], axis=1)
    pixels = np.stack([warp.x.numpy().ravel(), warp.y.numpy().ravel()], axis=1)
    for row in range(4):
        shifts = pose[row].numpy().reshape(2, 9)
        for found, axis in ((x, 0), (y, 1)):
            values = points[:, axis] + shifts[axis]
            wanted = RBFInterpolator(points, values, kernel="thin_plate_spline", degree=1)(pixels)
            np.testing.assert_allclose(found[row].numpy().ravel(), wanted, rtol=0, atol=1e-5)


def test_a_spline_meets_its_points_and_is_affine_where_their_shifts_are():
    size = (9, 13)  # rows and columns 0, 4, 8 and 0, 6, 12 are the control points
    warp, pose = ThinPlate(*size).double(), poses(ThinPlate)
    x, y = warp.places(pose)
    shifts = pose.reshape(4, 2, 3, 3)
    for found, grid, axis in ((x, warp.x, 0), (y, warp.y, 1)):
        at = (found - grid)[:, ::4, ::6]
        torch.testing.assert_close(at, shifts[:, axis], rtol=0, atol=1e-6)
    linear = poses(Affine)
    line = torch.linspace(-1, 1, 3).double()
    px, py = line.repeat(3), line.repeat_interleave(3)
    a, b, c, d, e, f = (value[:, None] for value in linear.unbind(1))
    same = torch.cat([a * px + b * py + c, d * px + e * py + f], dim=1)
    for ours, theirs in zip(warp.places(same), Affine(*size).double().places(linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", WARPS)
def test_gradients_of_the_places_are_those_of_small_steps(kind):
    warp = kind(9, 10).double()
    pose = poses(kind, rows=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: torch.stack(warp.places(given)), pose, eps=1e-6, atol=1e-6)
