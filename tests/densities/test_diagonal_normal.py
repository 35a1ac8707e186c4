"""DiagonalNormal of both homes: a normal with independent pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import covae_core.densities
from covae_core.densities import Conditionable, HasComponents, HasEntropy
from covae_core.errors import Unsupported

from .oracle import Home, problem


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


@pytest.fixture
def arguments():
    mean, _, variance = problem((2,), full_variance=True)
    return mean, variance


def reference(mean, variance):
    normal = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(variance).sqrt())
    return torch.distributions.Independent(normal, 3)


def test_log_prob_and_entropy_equal_independent_normals(home, arguments):
    x = np.random.default_rng(1).random((5, 2, 3, 4, 4))
    density, expected = home.diagonal_normal(*arguments), reference(*arguments)
    np.testing.assert_allclose(home.call(density, "log_prob", x), expected.log_prob(torch.from_numpy(x)), rtol=1e-12)
    np.testing.assert_allclose(home.call(density, "entropy"), expected.entropy(), rtol=1e-12)


def test_constant_variance_means_its_broadcast(home, arguments):
    mean, _ = arguments
    constant, full = home.diagonal_normal(mean, 0.3), home.diagonal_normal(mean, np.full_like(mean, 0.3))
    for method, given in (("log_prob", (mean + 1,)), ("entropy", ()), ("marginal_variance", ())):
        np.testing.assert_allclose(home.call(constant, method, *given), home.call(full, method, *given), rtol=1e-12)


def test_covariance_is_zero_but_with_itself(home, arguments):
    mean, variance = arguments
    density = home.diagonal_normal(mean, variance)
    row = home.call(density, "covariance_with", (1, 2, 3))
    expected = np.zeros_like(mean)
    expected[:, 1, 2, 3] = variance[:, 1, 2, 3]
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(home.call(density, "marginal_variance"), variance)


def test_conditioning_fixes_pixels_and_leaves_the_rest(home, arguments):
    mean, variance = arguments
    mask = np.random.default_rng(1).random((2, 4, 4)) < 0.4
    full = np.broadcast_to(mask[:, None], mean.shape)
    pixels = np.where(full, 7.0, np.nan)
    density = home.diagonal_normal(mean, variance)
    conditional = home.condition(density, mask, pixels)
    free = home.call(density, "sample", 3, seed=2)
    np.testing.assert_array_equal(home.take(conditional.mean), np.where(full, 7.0, mean))
    np.testing.assert_array_equal(home.call(conditional, "sample", 3, seed=2), np.where(full, 7.0, free))
    np.testing.assert_array_equal(home.call(conditional, "marginal_variance"), np.where(full, 0, variance))
    row = home.call(conditional, "covariance_with", (0, 1, 2))
    np.testing.assert_array_equal(row, np.where(full, 0, home.call(density, "covariance_with", (0, 1, 2))))


def test_one_density_takes_a_batch_of_masks(home, arguments):
    mean, variance = arguments
    mask = np.random.default_rng(1).random((5, 4, 4)) < 0.4
    conditional = home.condition(home.diagonal_normal(mean[0], variance[0]), mask, mean[0] + 1)
    expected = np.where(mask[:, None], mean[0] + 1, mean[0])
    np.testing.assert_array_equal(home.take(conditional.mean), expected)


def test_what_it_cannot_do_is_said(home, arguments):
    density = home.diagonal_normal(*arguments)
    assert isinstance(density, HasEntropy)
    assert isinstance(density, Conditionable)
    assert not isinstance(density, HasComponents)
    with pytest.raises(Unsupported, match="components: a density of the kind 'diagonal-normal' has not components"):
        density.components()
    with pytest.raises(AttributeError, match="no attribute 'rank'"):
        _ = density.rank


def test_noise_makes_the_image(home, arguments):
    mean, variance = arguments
    noise = np.random.default_rng(1).standard_normal((3, *mean.shape))
    found = home.call(home.diagonal_normal(mean, variance), "from_noise", noise)
    np.testing.assert_allclose(found, mean + np.sqrt(variance) * noise, rtol=1e-12)


def test_both_homes_draw_the_same_samples(arguments):
    samples = {
        home.name: home.call(home.diagonal_normal(*arguments), "sample", 4, seed=9)
        for home in (Home("numpy"), Home("torch"))
    }
    np.testing.assert_allclose(samples["torch"], samples["numpy"], rtol=0, atol=1e-5)


def test_parameters_rebuild_the_density(home, arguments):
    density = home.diagonal_normal(*arguments)
    again = home.module.DENSITIES[density.kind](**density.parameters)
    np.testing.assert_array_equal(home.call(again, "entropy"), home.call(density, "entropy"))


def test_gradients_equal_those_of_independent_normals(arguments):
    mean, variance = (torch.from_numpy(array).requires_grad_() for array in arguments)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    ours = covae_core.densities.DiagonalNormal(mean, variance)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, variance.sqrt()), 3)
    found = torch.autograd.grad((ours.log_prob(x) - 2 * ours.entropy()).sum(), (mean, variance))
    expected = torch.autograd.grad((theirs.log_prob(x) - 2 * theirs.entropy()).sum(), (mean, variance))
    torch.testing.assert_close(found, expected)
