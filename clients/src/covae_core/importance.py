"""Importance weights of images: what `score` and every likelihood bound are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from covae_core.backends import Array, backend_of
from covae_core.modelling import Model


class Weights(NamedTuple):
    """Of M draws of the latents for each of B images, in nats. shape of each: (B, M), float64

    log_weight is log_likelihood + log_prior − log_posterior; distance is the image's Mahalanobis square under p(x|z).
    """

    log_weight: Array
    log_likelihood: Array
    log_prior: Array
    log_posterior: Array
    distance: Array


def importance_weights(model: Model, images: Array, noise: Mapping[str, Array]) -> Weights:
    """log p(x|z) + log p(z) − log q(z|x) for each of M draws of z from q(z|x); a model without latents has M = 1.

    The log-densities are evaluated in float64 on the network's outputs: a small D multiplies squared residuals so much
    that the sums that make a log-density are too large for float32.

    images: (B, C, H, W) in [0, 1]; noise: standard normals of each latent, (B, M, *shape)
    """
    xp = backend_of(images).xp
    if not model.latents:
        # Every row has the one density: the images are its samples.
        density = model.scoring_density({}, images.shape[0]).to(xp.float64)
        likelihood, distance = density.score(xp.astype(images, xp.float64))
        prior, posterior = xp.zeros_like(likelihood), xp.zeros_like(likelihood)
        parts = (likelihood + prior, likelihood, prior, posterior, distance)
        return Weights(*(part[:, None] for part in parts))
    count = next(iter(noise.values())).shape[1]
    repeated = repeat_rows(xp.astype(images, xp.float64), count)
    posteriors = {name: posterior.repeat(count) for name, posterior in model.posteriors(images).items()}
    latents = {name: posterior.draw(flat(noise[name])) for name, posterior in posteriors.items()}
    likelihood, distance = model.scoring_density(latents, repeated.shape[0]).to(xp.float64).score(repeated)
    wide = {name: xp.astype(latent, xp.float64) for name, latent in latents.items()}
    prior = sum(model.prior(name).log_prob(latent) for name, latent in wide.items())
    posterior = sum(posteriors[name].to(xp.float64).log_prob(latent) for name, latent in wide.items())
    parts = (likelihood + prior - posterior, likelihood, prior, posterior, distance)
    return Weights(*(part.reshape(-1, count) for part in parts))


def repeat_rows(rows: Array, times: int) -> Array:
    """Each row `times` times in a row. shape: (B, …) → (B · times, …)"""
    xp = backend_of(rows).xp
    full = xp.broadcast_to(rows[:, None], (rows.shape[0], times, *rows.shape[1:]))
    return full.reshape(-1, *rows.shape[1:])


def flat(noise: Array) -> Array:
    """(B, M, …) → (B · M, …)"""
    return noise.reshape(-1, *noise.shape[2:])
