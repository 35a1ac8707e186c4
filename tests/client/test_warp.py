"""What the client makes of a pose, against the matrices written out."""

import numpy as np
import pytest

from covae_core.errors import InvalidArgument, Unsupported
from covae_core.warp import DEGREES, WarpSpec

RANDOM = np.random.default_rng(0)


def spec(kind, rank=None):
    degrees = DEGREES[kind]
    columns = RANDOM.normal(0, 0.2, (degrees, rank or degrees))
    shift, average = RANDOM.normal(0, 0.1, degrees), RANDOM.normal(0, 1, rank or degrees)
    return WarpSpec(kind, tuple(shift), tuple(map(tuple, columns)), tuple(average))


@pytest.mark.parametrize("kind", DEGREES)
def test_a_pose_comes_back_from_its_numbers_and_the_identity_is_zeros(kind):
    warp, poses = spec(kind), RANDOM.normal(size=(4, DEGREES[kind]))
    np.testing.assert_allclose(warp.pose(warp.numbers(poses)), poses, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(warp.numbers(warp.named("identity")), 0, atol=1e-5)
    np.testing.assert_allclose(warp.named("average"), warp.average, rtol=1e-6)
    assert WarpSpec.from_json(warp.to_json()) == warp


def test_of_few_columns_the_identity_is_the_nearest_that_there_is():
    warp = spec("affine", 2)
    found = warp.numbers(warp.named("identity"))
    for step in 0.01 * np.eye(2):
        nearby = warp.numbers(warp.named("identity") + step)
        assert np.square(found).sum() < np.square(nearby).sum()


@pytest.mark.parametrize("kind", ["affine", "affine5"])
def test_matrices_and_turns(kind):
    warp, pose = spec(kind), RANDOM.normal(size=(3, DEGREES[kind]))
    matrix = warp.matrix(pose)
    numbers = warp.numbers(pose)
    if kind == "affine":
        np.testing.assert_allclose(matrix, np.eye(2, 3) + numbers.reshape(3, 2, 3))
    else:
        for row in range(3):
            angle, scales, shift = numbers[row, 0], np.exp(numbers[row, 1:3]), numbers[row, 3:]
            rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            np.testing.assert_allclose(matrix[row], np.diag(scales) @ np.column_stack([rotation, shift]))
    angles = np.array([-1.2, 0.0, 0.7])
    turned = warp.matrix(warp.turned(pose[0], angles))
    for found, angle in zip(turned, angles, strict=True):  # the image is read at turned places, then as before
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        np.testing.assert_allclose(found, matrix[0] @ turn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["affine", "affine5"])
def test_the_angle_is_by_how_much_an_image_was_turned(kind):
    degrees = DEGREES[kind]
    warp = WarpSpec(kind, (0.0,) * degrees, tuple(map(tuple, 0.5 * np.eye(degrees))), (0.0,) * degrees)
    angles = np.linspace(-3.1, 3.1, 11)
    np.testing.assert_allclose(warp.angle(warp.turned(np.zeros(degrees), angles)), angles, atol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(Unsupported, match="a pose of 2 numbers cannot turn so; the nearest warp is"):
        spec("affine", 2).turned(np.zeros(2), 0.7)
    with pytest.raises(InvalidArgument, match="pose: found 'upright'; expected prior, identity, average"):
        spec("affine").named("upright")
    for ask in (lambda warp: warp.matrix(np.zeros(18)), lambda warp: warp.turned(np.zeros(18), 0.1)):
        with pytest.raises(Unsupported, match="a thin-plate-spline is no affine map"):
            ask(spec("thin-plate-spline"))
    for change in ({"shift": [np.nan] * 6}, {"kind": "bend"}, {"shift": [0.0]}, {"average": [0.0] * 5}):
        with pytest.raises(InvalidArgument, match="warp: found"):
            WarpSpec.from_json({**spec("affine").to_json(), **change})
