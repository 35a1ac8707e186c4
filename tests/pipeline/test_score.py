"""`score`: importance weights against an oracle that shares nothing with it but the noise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from covae_client.plans import SCORE_CALLS, image_index
from covae_client.scoring import summarise
from covae_core.images import channels_first
from covae_core.noise import Stream, row_seeds, uniform
from covae_core.operations import OPERATIONS

pytestmark = pytest.mark.slow

SAMPLES = 20
# What the exporter allows, in nats.
WEIGHT_TOLERANCE = 0.05


def posterior_noise(model, image: np.ndarray, seed: int) -> np.ndarray:
    """The standard normals in float64 behind the weights of an image, (H, W, C). shape: (SAMPLES, *latent_shape)"""
    calls = row_seeds(seed, image_index(image) * SCORE_CALLS + np.arange(SAMPLES // model.spec.score_samples))
    shape = (model.spec.score_samples, *model.spec.latents["latent"])
    half = (np.prod(shape) + 1) // 2
    numbers = uniform(calls, 2 * half, Stream.POSTERIOR)
    radius, angle = np.sqrt(-2 * np.log(numbers[:, :half])), 2 * np.pi * numbers[:, half:]
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, : np.prod(shape)]
    return normals.reshape(SAMPLES, *model.spec.latents["latent"])


def dense_log_prob(density, image: Tensor) -> Tensor:
    """log N(image; μ, P Pᵀ + D) by the S×S covariance. shape: (M,)"""
    mean = density.mean.flatten(1)
    variance = density.parameters["variance"].expand_as(density.mean).flatten(1)
    covariance = torch.diag_embed(variance)
    if "factor" in density.parameters:
        factor = density.parameters["factor"].flatten(2)
        covariance = covariance + factor.mT @ factor
    return MultivariateNormal(mean, covariance).log_prob(image.flatten())


@torch.no_grad()
def oracle(network, model, images: np.ndarray, seed: int) -> np.ndarray:
    """log p(x|z) + log p(z) − log q(z|x), everything in float64. shape: (N, SAMPLES)"""
    network = copy.deepcopy(network).double()
    weights = []
    for pixels, image in zip(images, torch.from_numpy(channels_first(images)).double() / 255, strict=True):
        found = network.posteriors(image[None])["latent"]
        mean, scale = found.mean[0], found.scale[0]
        latent = mean + scale * torch.from_numpy(posterior_noise(model, pixels, seed))
        prior = Independent(Normal(torch.zeros_like(mean), 1), 1)
        posterior = Independent(Normal(mean, scale), 1)
        log_prob = dense_log_prob(network.scoring_density({"latent": latent}), image)
        weights.append(log_prob + prior.log_prob(latent) - posterior.log_prob(latent))
    return torch.stack(weights).numpy()


def test_weights_are_those_of_a_dense_float64_oracle(model, network, held_out):
    images = np.concatenate([held_out[:6], model.sample(3, seed=8)])

    expected = oracle(network, model, images, seed=7)
    first = model.score(images, num_samples=1, seed=7)
    scores = model.score(images, num_samples=SAMPLES, seed=7)

    np.testing.assert_allclose(first.elbo, expected[:, 0], rtol=0, atol=WEIGHT_TOLERANCE)
    wanted = summarise(expected, 64)
    for field in ("elbo", "log_likelihood_bound"):
        np.testing.assert_allclose(getattr(scores, field), getattr(wanted, field), rtol=0, atol=WEIGHT_TOLERANCE)
    # Both are ratios of weights, so they move by the weights' errors at most.
    for field in ("standard_error", "effective_sample_size"):
        np.testing.assert_allclose(getattr(scores, field), getattr(wanted, field), rtol=2 * WEIGHT_TOLERANCE)


def test_bound_elbo_and_bits_are_consistent(model, held_out):
    scores = model.score(held_out[:8], num_samples=50)

    assert (scores.log_likelihood_bound >= scores.elbo).all()  # Jensen
    # An error is given where enough weights carry the sum, and nowhere else.
    np.testing.assert_array_equal(np.isfinite(scores.standard_error), scores.effective_sample_size >= 10)
    assert (scores.standard_error[np.isfinite(scores.standard_error)] >= 0).all()
    assert ((scores.effective_sample_size >= 1) & (scores.effective_sample_size <= 50)).all()
    bits = -(scores.log_likelihood_bound / 64 - np.log(255)) / np.log(2)
    np.testing.assert_allclose(scores.bits_per_dim, bits, rtol=1e-12)


def test_one_weight_is_a_bound_without_an_error(model, held_out):
    scores = model.score(held_out[:2], num_samples=1)

    np.testing.assert_array_equal(scores.log_likelihood_bound, scores.elbo)
    assert np.isnan(scores.standard_error).all()


def test_an_image_scores_the_same_in_every_batch(model, held_out):
    images = held_out[:20]
    together = model.score(images, num_samples=30, seed=1)

    alone = [model.score(images[index], num_samples=30, seed=1) for index in (0, 13)]
    backwards = model.score(images[::-1], num_samples=30, seed=1)

    bounds = [scores.log_likelihood_bound[0] for scores in alone]
    np.testing.assert_array_equal(bounds, together.log_likelihood_bound[[0, 13]])
    np.testing.assert_array_equal(backwards.log_likelihood_bound[::-1], together.log_likelihood_bound)


def test_another_seed_gives_other_weights(model, held_out):
    one, other = (model.score(held_out[:4], num_samples=10, seed=seed).elbo for seed in (0, 1))

    assert (one != other).all()


def test_held_out_digits_score_above_noise(model, held_out):
    digits = held_out[:40]
    noise = np.random.default_rng(0).integers(0, 256, digits.shape, dtype=np.uint8)

    bounds = [model.score(images, num_samples=10).log_likelihood_bound for images in (digits, noise)]

    # Ten standard errors of the difference of the two averages: no seed turns that round.
    error = np.sqrt(sum(bound.var(ddof=1) / len(bound) for bound in bounds))
    assert bounds[0].mean() - bounds[1].mean() > 10 * error


def test_the_contract_says_how_many_weights_a_call_gives(model):
    outputs = OPERATIONS["score"].outputs(model.spec)

    assert all(tensor.shape == (model.spec.score_samples,) for tensor in outputs)
    assert SAMPLES % model.spec.score_samples == 0


def test_a_weight_is_made_of_its_parts(model, held_out):
    images = held_out[:5]
    parts = model.run("score", image=images, seed=np.arange(5)[:, None])

    total = parts["log_likelihood"] + parts["log_prior"] - parts["log_posterior"]
    np.testing.assert_allclose(parts["log_weight"], total, rtol=1e-12)
    assert (parts["distance"] > 0).all()
