"""Bernoulli of both homes: pixels that are on or off, each for itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from covae_core.densities import Bernoulli, Conditionable, HasComponents, HasEntropy, Whitening
from covae_core.errors import InvalidArgument, Unsupported

from .oracle import Home

IMAGE = (2, 3, 4)


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


@pytest.fixture
def mean():
    return np.random.default_rng(0).random((5, *IMAGE))


def reference(mean):
    return torch.distributions.Independent(
        torch.distributions.Bernoulli(torch.from_numpy(mean), validate_args=False), 3, validate_args=False
    )


def test_log_prob_and_entropy_are_those_of_independent_bernoullis(home, mean):
    density, expected = Bernoulli(home.give(mean)), reference(mean)
    for x in (np.random.default_rng(1).random((3, 5, *IMAGE)), (mean > 0.5).astype(float)):
        wanted = expected.log_prob(torch.from_numpy(x))
        np.testing.assert_allclose(home.call(density, "log_prob", x), wanted, rtol=1e-12)
    np.testing.assert_allclose(home.call(density, "entropy"), expected.entropy(), rtol=1e-12)
    square = ((mean - 1) ** 2 / (mean * (1 - mean))).sum((1, 2, 3))
    np.testing.assert_allclose(home.call(density, "distance", np.ones_like(mean)), square, rtol=1e-12)


def test_draws_are_on_as_often_as_they_should(home, mean):
    density = Bernoulli(home.give(mean))
    drawn = home.take(density.sample(20_000, seed=2))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    # Four and a half standard errors of 120 shares, and of the correlation of neighbours.
    assert (np.abs(drawn.mean(0) - mean) < 4.5 * np.sqrt(mean * (1 - mean) / 20_000) + 1e-9).all()
    white = (drawn - mean) / np.sqrt(mean * (1 - mean))
    assert np.abs((white[..., 1:] * white[..., :-1]).mean(0)).max() < 5 / np.sqrt(20_000)
    np.testing.assert_allclose(home.take(density.marginal_variance()), mean * (1 - mean), rtol=1e-12)
    one = home.take(density.covariance_with((1, 2, 3)))
    assert np.count_nonzero(one) == 5
    np.testing.assert_allclose(one[:, 1, 2, 3], (mean * (1 - mean))[:, 1, 2, 3], rtol=1e-12)


def test_numpy_draws_what_torch_draws(mean):
    ours, theirs = Bernoulli(mean).sample(50, seed=4), Bernoulli(torch.from_numpy(mean)).sample(50, seed=4)
    np.testing.assert_array_equal(ours, theirs)


def test_it_has_an_entropy_and_can_do_nothing_that_takes_other_pixels(home, mean):
    density = Bernoulli(home.give(mean))
    assert isinstance(density, HasEntropy)
    assert not isinstance(density, (Conditionable, Whitening, HasComponents))
    with pytest.raises(Unsupported, match="condition: a density of the kind 'bernoulli' has not a conditional"):
        density.condition(None, None)


def test_certain_pixels_have_a_finite_score_and_a_gradient():
    logits = torch.tensor([-200.0, 200.0, 0.0, 1.0]).reshape(1, 2, 2).requires_grad_()
    density = Bernoulli(logits.sigmoid())
    wrong = density.log_prob(torch.tensor([1.0, 0.0, 1.0, 1.0]).reshape(1, 2, 2))
    assert float(wrong.detach()) == pytest.approx(2 * np.log(1e-6) + np.log(0.5) - np.log1p(np.exp(-1)), rel=1e-3)
    wrong.backward()
    assert torch.isfinite(logits.grad).all()


def test_parameters_and_precision_rebuild_it(home, mean):
    density = Bernoulli(home.give(mean))
    x = np.random.default_rng(1).random(mean.shape)
    again = Bernoulli(**density.parameters)
    np.testing.assert_array_equal(home.call(again, "log_prob", x), home.call(density, "log_prob", x))
    small = density.to(torch.float32 if home.name == "torch" else np.float32)
    np.testing.assert_allclose(home.call(small, "log_prob", x), home.call(density, "log_prob", x), rtol=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_what_is_no_probability_is_refused(value, home, mean):
    mean[2, 0, 0, 0] = value
    with pytest.raises(InvalidArgument, match="mean: found"):
        Bernoulli(home.give(mean))
