"""Spherical interpolation, its formula and the ends that the formula leaves undefined, in both homes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import covae_core.densities


def torch_slerp(start, end, steps):
    return covae_core.densities.slerp(torch.from_numpy(start), torch.from_numpy(end), steps).numpy()


@pytest.fixture(params=[covae_core.densities.slerp, torch_slerp], ids=["numpy", "torch"])
def slerp(request):
    return request.param


def vectors(count, size=7, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size))


def test_between_ends_the_formula_holds(slerp):
    a, b = vectors(2)
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    t = np.linspace(0, 1, 5)[:, None]
    expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    np.testing.assert_allclose(slerp(a, b, 5), expected, rtol=1e-12, atol=1e-12)


def test_a_batch_mixes_all_cases_without_nan(slerp):
    a = vectors(5)
    b = np.stack([a[0], -a[1], np.zeros(7), vectors(1, seed=1)[0], a[4] * (1 + 1e-9)])
    path = slerp(a, b, 9)
    assert np.isfinite(path).all()
    np.testing.assert_array_equal(path[0], a)
    np.testing.assert_array_equal(path[-1], b)


def test_equal_ends_stay_where_they_are(slerp):
    (a,) = vectors(1)
    np.testing.assert_allclose(slerp(a, a, 4), np.broadcast_to(a, (4, 7)), rtol=1e-12)


def test_nearly_equal_ends_are_joined_smoothly(slerp):
    (a,) = vectors(1)
    for shift in (1e-9, 1e-7, 1e-5, 1e-3):
        b = a + shift * np.eye(7)[0]
        np.testing.assert_allclose(slerp(a, b, 3)[1], (a + b) / 2, atol=shift**2)


@pytest.mark.parametrize("size", [2, 3, 25])
def test_opposite_ends_of_equal_length_are_joined_on_their_sphere(slerp, size):
    (a,) = vectors(1, size)
    path = slerp(a, -a, 9)
    np.testing.assert_allclose(np.linalg.norm(path, axis=-1), np.linalg.norm(a), rtol=1e-12)
    np.testing.assert_allclose(path[4] @ a, 0, atol=1e-12)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_opposite_ends_of_unequal_length_change_length_linearly(slerp):
    (a,) = vectors(1)
    lengths = np.linalg.norm(slerp(a, -3 * a, 5), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(a) * np.linspace(1, 3, 5), rtol=1e-12)


def test_a_zero_end_and_a_single_number_are_joined_by_a_line(slerp):
    (a,) = vectors(1)
    t = np.linspace(0, 1, 5)[:, None]
    np.testing.assert_allclose(slerp(a, np.zeros(7), 5), (1 - t) * a, rtol=1e-12)
    np.testing.assert_allclose(slerp(np.ones(1), -np.ones(1), 5), 1 - 2 * t, atol=1e-12)


def test_one_step_is_the_start(slerp):
    a, b = vectors(2)
    np.testing.assert_array_equal(slerp(a, b, 1), a[None])


def test_gradients_are_finite_at_every_kind_of_end():
    a = torch.from_numpy(vectors(4)).requires_grad_()
    b = torch.stack([a[0].detach(), -a[1].detach(), torch.zeros(7, dtype=torch.float64), a[0].detach() + 1])
    b.requires_grad_()
    covae_core.densities.slerp(a, b, 5).square().sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
